"""Rows of a JSONL file, read when they are asked for: memory does not grow with the file.

A file is read once from start to end, only to note where its lines begin; of a hundred thousand
rows, two megabytes stay in memory. A row is parsed anew each time. Every read opens the file for
itself, so rows may be shared by processes, forked or not.
"""

import codecs
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmpeft.formats.errors import RowError

SILENT = 3  # seconds before a bar is shown
BLOCK = 1 << 20  # bytes between two steps of the bar


class FileRows(Sequence):
    """Rows that lie somewhere in a file, parsed on access.

    Args:
        path: file in UTF-8.
        parse: makes a row of ``(path, number of the row, text)``; raises ``ValueError``.

    Raises:
        ValueError: there is no row, or (on access) the file is no longer what it was.
        RowError: (on access) a row is no UTF-8, or what ``parse`` raises.
    """

    unit = "row"  # what ``number`` counts

    def __init__(self, path: Path, parse: Callable[[Path, int, str], dict]):
        self.path, self.file, self.folder = path, str(path), path.parent
        self._parse = parse
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            self._version = _version(status)
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:  # which some editors write
                file.seek(0)
            with tqdm(total=status.st_size, desc=f"opening {path.name}", unit="B", delay=SILENT,
                      unit_scale=True, leave=False) as bar:  # fmt: skip
                self._places = np.frombuffer(self._find(file, bar), np.int64).reshape(-1, 2)
        if not len(self._places):
            raise ValueError(f"{path} has no rows.")

    def _find(self, file, bar) -> array:
        """Two numbers for each row, from which ``_read`` finds it."""
        raise NotImplementedError

    def _read(self, file, index: int) -> bytes:
        raise NotImplementedError

    def number(self, index: int) -> int:
        """The number of the row that errors name, from 1."""
        return index + 1

    def __len__(self):
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        with self._open() as file:
            return self._row(file, index)

    def __iter__(self) -> Iterator[dict]:
        with self._open() as file:
            for index in range(len(self)):
                yield self._row(file, index)
            self._check(file)

    def scan(self, start: int, stop: int) -> Iterator[dict | RowError]:
        """Rows ``start`` to ``stop`` in order; in place of one that is bad, what is wrong."""
        with self._open() as file:
            for index in range(start, stop):
                try:
                    yield self._row(file, index)
                except RowError as error:
                    yield error
            self._check(file)

    def lengths(self, column: str) -> np.ndarray:
        """How long the list in a column is, in every row; 1 where there is none."""
        return list_lengths(self.scan(0, len(self)), column)

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

    def _row(self, file, index: int) -> dict:
        data, number = self._read(file, index), self.number(index)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(
                self.file, number, "", f"not UTF-8 ({error.reason} at byte {error.start} of the "
                f"{self.unit})", "save the file as UTF-8", self.unit,
            ) from None  # fmt: skip
        return self._parse(self.path, number, text)


class JsonLines(FileRows):
    """The lines of a JSONL file that are not blank."""

    unit = "line"

    def _find(self, file, bar):
        places = array("q")  # offset in bytes and number of the line, by turns
        offset = shown = file.tell()
        for number, line in enumerate(file, 1):
            if not line.isspace():
                places.extend((offset, number))
            offset += len(line)
            if offset - shown > BLOCK:
                bar.update(offset - shown)
                shown = offset
        return places

    def _read(self, file, index):
        file.seek(self._places[index, 0])
        return file.readline()

    def number(self, index):
        return int(self._places[index, 1])


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def list_lengths(rows, column: str) -> np.ndarray:
    """The lengths of lists; 1 for anything else, a bad row too."""
    values = (None if isinstance(row, RowError) else row.get(column) for row in rows)
    lengths = (len(value) if isinstance(value, list) else 1 for value in values)
    return np.fromiter(lengths, np.int64)
