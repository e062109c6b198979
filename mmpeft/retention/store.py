"""Answers on disk: a killed report goes on where it was, a base is asked once for all its bridges.

One file for one model in one setting, a line for each batch. A line is written when its batch is
done and carries a checksum; a torn or damaged line is dropped, counted and computed again.
"""

import hashlib
import json
import os
import sys
import zlib
from pathlib import Path

from mmpeft.retention.sides import RetentionError

ENGINE = 2  # raise it when the same batch may give other answers


class Store:
    """Answers of one side.

    Args:
        folder: where the files of all sides lie; None keeps the answers in memory only.
        identity: everything the answers depend on besides the batch (weights, dtype, device, ...).

    Raises:
        RetentionError: the file of this side was written by another.
    """

    def __init__(self, folder: str | Path | None, identity: dict):
        self.identity = {"engine": ENGINE, **identity}
        self.answers: dict[str, list] = {}
        self.reused = self.computed = self.damaged = 0
        self.path = None
        if folder is None:
            return
        name = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:24]
        self.path = Path(folder) / f"{name}.jsonl"
        if self.path.is_file():
            self._read()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite()

    def get(self, batch: str) -> list | None:
        found = self.answers.get(batch)
        self.reused += found is not None
        return found

    def put(self, batch: str, answers: list) -> None:
        self.computed += 1
        self.answers[batch] = answers
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(batch, answers))

    def _read(self) -> None:
        written = self.path.read_bytes()
        first, *lines = written.split(b"\n")
        header = _parse(first)
        if header is not None and header[0] != "identity":
            header = None  # the first line is gone: nobody knows whose answers these are
        if header is not None and header[1] != self.identity:
            raise RetentionError(
                f"{self.path} holds the answers of another model or setting "
                f"({_difference(header[1], self.identity)}), so the two sides would share answers. "
                "Remove the file."
            )
        for line in lines:
            entry = _parse(line) if header is not None else None
            if entry is not None:
                self.answers[entry[0]] = entry[1]
            else:
                self.damaged += bool(line)
        if header is None or self.damaged:
            self.damaged += header is None
            print(
                f"{self.path}: {self.damaged} damaged lines dropped; their answers are computed "
                "again.",
                file=sys.stderr,
            )
        if self.damaged or not written.endswith(b"\n"):  # the next line must not join the last
            self._rewrite()

    def _rewrite(self) -> None:
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        lines = [_line("identity", self.identity)]
        lines += [_line(batch, answers) for batch, answers in self.answers.items()]
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, self.path)


def _line(key: str, value) -> str:
    body = json.dumps([key, value], sort_keys=True, allow_nan=False)
    return f"{zlib.crc32(body.encode()):08x} {body}\n"


def _parse(line: bytes):
    """(key, value), or None if the line is not what was written."""
    checksum, _, body = line.partition(b" ")
    if not body or checksum != f"{zlib.crc32(body):08x}".encode():
        return None
    return json.loads(body)


def _difference(one: dict, other: dict) -> str:
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return ", ".join(f"{key}: {one.get(key)!r}, not {other.get(key)!r}" for key in keys)
