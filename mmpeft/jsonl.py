"""Rows of a JSONL file, read when they are asked for: memory does not grow with the file.

A file is read once from start to end, to parse every line and to note where it begins; of a
hundred thousand rows, two megabytes stay in memory. A row is parsed anew each time. Every read
opens the file for itself, so rows may be shared by processes, forked or not.
"""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

SILENT = 3  # seconds before a bar is shown


class JsonLines(Sequence):
    """The lines of a JSONL file that are not blank, parsed on access.

    Args:
        path: file in UTF-8.
        parse: makes a row of ``(path, number of the line from 1, line)``; raises ``ValueError``.

    Raises:
        ValueError: a line is no UTF-8 or cannot be parsed, there is none, or (on access) the file
            is no longer what it was.
    """

    def __init__(self, path: Path, parse: Callable[[Path, int, str], dict]):
        self.path, self._parse = path, parse
        places = array("q")  # offset in bytes and number of the line, by turns
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            self._version = _version(status)
            with tqdm(total=status.st_size, desc=f"reading {path.name}", unit="B", delay=SILENT,
                      unit_scale=True, leave=False) as bar:  # fmt: skip
                offset = 0
                for number, line in enumerate(file, 1):
                    if self._text(number, line).strip():
                        self._row(number, line)
                        places.extend((offset, number))
                    offset += len(line)
                    bar.update(len(line))
        if not places:
            raise ValueError(f"{path} has no rows.")
        self._places = np.frombuffer(places, np.int64).reshape(-1, 2)

    def __len__(self):
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        offset, number = self._places[index].tolist()
        with self._open() as file:
            file.seek(offset)
            return self._row(number, file.readline())

    def __iter__(self) -> Iterator[dict]:
        with self._open() as file:
            for offset, number in self._places:
                file.seek(offset)
                yield self._row(int(number), file.readline())
            self._check(file)

    @contextmanager
    def _open(self):
        with self.path.open("rb") as file:
            self._check(file)
            yield file

    def _check(self, file):
        if _version(os.fstat(file.fileno())) != self._version:
            raise ValueError(
                f"{self.path} was changed while it was in use, so its rows are no longer those "
                "that were read at the start; start again."
            )

    def _row(self, number: int, line: bytes):
        return self._parse(self.path, number, self._text(number, line))

    def _text(self, number: int, line: bytes) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} line {number}: not UTF-8 ({error.reason} at byte {error.start} of "
                "the line); save the file as UTF-8."
            ) from None


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
