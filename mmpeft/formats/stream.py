"""Rows one behind the other, shuffled in blocks, from a place that can be kept and taken up again.

What lies on a disk needs no stream: :func:`mmpeft.formats.open_rows` opens it in seconds, in flat
memory. A data set of the hub may be too large to fetch; it is streamed by ``datasets``.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np

from mmpeft.formats.containers import hub_name, split_of
from mmpeft.formats.errors import RowError, one_line
from mmpeft.formats.rows import TRIED, Rows, open_rows, rows_of
from mmpeft.formats.table import choose_hub_split, named, undecoded


def open_stream(
    source, split: str | None = None, shuffle: int = 1, seed: int = 0, **options
) -> "Stream":
    """A stream of what :func:`mmpeft.formats.open_rows` opens, with the same options.

    A name of the hub is streamed by ``datasets``; nothing of it is kept.
    """
    source, chosen = split_of(source, split)
    if (name := hub_name(source)) is None:
        return Stream(Local(open_rows(source, chosen, **options)), shuffle, seed)
    of_hub = choose_hub_split(name, source, chosen)
    data = datasets.load_dataset(*name, split=of_hub, streaming=True)
    return Stream(Remote(data, source, chosen, **options), shuffle, seed)


class Stream:
    """One pass after another over rows, as :meth:`Rows.scan` gives them, without their numbers.

    Blocks of ``shuffle`` rows are read and each is given in an order of its own, drawn with
    ``seed``, the pass and the block: so a place is a place in the source and a count, however
    large the block, and a stream that takes it up goes on with the very next row.
    """

    def __init__(self, source: "Local | Remote", shuffle: int = 1, seed: int = 0):
        if shuffle < 1:
            raise ValueError(f"shuffle is {shuffle}; it must be 1 (in order) or more.")
        self._source, self._shuffle, self._seed = source, shuffle, seed
        self._start = {"source": source.start, "passes": 0, "blocks": 0, "taken": 0}

    def __iter__(self) -> Iterator[dict | RowError]:
        """The rest of a pass; the next call gives the next pass."""
        self._source.go_to(self._start["source"])
        while block := self._source.take(self._shuffle):
            now = self._start
            order = list(range(len(block)))
            if self._shuffle > 1:
                random.Random(f"{self._seed} {now['passes']} {now['blocks']}").shuffle(order)
            for place in range(now["taken"], len(block)):
                now["taken"] = place + 1
                yield block[order[place]]
            self._start = {"source": self._source.place(), "passes": now["passes"],
                           "blocks": now["blocks"] + 1, "taken": 0}  # fmt: skip
        passes = self._start["passes"] + 1
        self._start = {"source": self._source.start, "passes": passes, "blocks": 0, "taken": 0}

    def state_dict(self) -> dict:
        """Where the stream is, behind the last row that it gave; plain values."""
        return dict(self._start)

    def load_state_dict(self, state: dict) -> None:
        """Go on from there: with the same source, shuffle and seed."""
        self._start = dict(state)


class Local:
    """Rows that are opened; a place is a number."""

    start = 0

    def __init__(self, rows: Rows):
        self._rows, self._next = rows, 0

    def go_to(self, place: int):
        self._next = place

    def place(self) -> int:
        return self._next

    def take(self, count: int) -> list[dict | RowError]:
        found = [row for _, row in self._rows.scan(self._next, self._next + count)]
        self._next += len(found)
        return found


class Remote:
    """Rows that ``datasets`` streams; a place is its own, and how many came before."""

    def __init__(self, data: datasets.IterableDataset, file: str, split: str, **options):
        self._whole, self._file = data, file
        self._rows = rows_of(_Opening(_undecoded(data), file), **options)
        self._column, self._split = self._rows.columns.get("split"), split
        self.start = {"source": None, "read": 0, "given": 0}

    def go_to(self, place: dict):
        self._data = _undecoded(self._whole)
        if place["source"] is not None:
            self._data.load_state_dict(place["source"])
        self._read, self._given = place["read"], place["given"]
        self._iterator = iter(self._data)

    def place(self) -> dict:
        return {"source": self._data.state_dict(), "read": self._read, "given": self._given}

    def take(self, count: int) -> list[dict | RowError]:
        """The rows of the next ``count`` of the source that belong to the split."""
        found, wanted = [], count
        while wanted and (data := self._next()) is not None:
            number, self._read = self._read, self._read + 1
            data = _read(self._data, data)
            chosen = None in (self._column, self._split)
            if not chosen and str(data.get(self._column)) != self._split:
                continue
            wanted -= 1
            for row in self._rows.entries(data, number, self._given):
                found.append(row)
                self._given += 1
        return found

    def _next(self) -> dict | None:
        try:
            return next(self._iterator, None)
        except (ValueError, TypeError, OSError) as error:  # of the network, or of the file
            raise ValueError(
                f"{self._file} cannot be read behind row {self._read} ({one_line(str(error))})."
            ) from error


def _undecoded(data: datasets.IterableDataset) -> datasets.IterableDataset:
    """A stream of its own over the same, whose pictures stay as they are."""
    # without known features nothing is decoded, and asking for that would be an error
    return data.decode(False) if data.features else data.with_format(None)


def _read(data: datasets.IterableDataset, row: dict) -> dict:
    """A row with what else than pictures its features decode: JSON, and names of classes."""
    if not data.features:
        return row
    return named(data.features, undecoded(data.features).decode_example(row))


class _Opening:
    """The first rows of a stream, as a container from which the format is detected."""

    unit, folder = "row", Path()

    def __init__(self, data: datasets.IterableDataset, file: str):
        self.file, self._data = file, data
        self._first = [_read(data, row) for row in islice(data, TRIED)]
        if not self._first:
            raise ValueError(f"{file} has no rows.")

    def number(self, index: int) -> int:
        return index + 1

    def __len__(self):
        return len(self._first)

    def scan(self, start: int, stop: int) -> Iterator[dict]:
        return iter(self._first[start:stop])

    def lengths(self, column: str) -> np.ndarray:
        return np.ones(len(self), np.int64)  # a stream is not counted
