"""The rows of one split, where a column says which split a row belongs to."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from mmpeft.formats.errors import RowError


class Chosen(Sequence):
    """The rows of a container whose column says that they belong to a split, and the bad ones."""

    def __init__(self, container, column: str, split: str | None):
        self.file, self.unit, self.folder = container.file, container.unit, container.folder
        self._container, self._chosen, found = container, array("q"), Counter()
        for index, row in enumerate(container.scan(0, len(container))):
            bad = isinstance(row, RowError)
            if not bad:
                found[str(row.get(column))] += 1
            if bad or str(row.get(column)) == split:
                self._chosen.append(index)
        if split not in found:
            counts = ", ".join(f"{value} ({count})" for value, count in found.most_common(10))
            raise ValueError(
                f"{self.file}: no row has {split!r} in column {column}, which has {counts}. Name "
                f"one behind it: {self.file}#{found.most_common(1)[0][0]}."
            )

    def number(self, index: int) -> int:
        return self._container.number(self._chosen[index])

    def __len__(self):
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict:
        return self._container[self._chosen[index]]

    def scan(self, start: int, stop: int) -> Iterator[dict | RowError]:
        """Rows ``start`` to ``stop`` in order; in place of one that is bad, what is wrong."""
        if start >= stop:
            return
        chosen = self._chosen[start:stop]
        first, last = chosen[0], chosen[-1]
        wanted = set(chosen)
        for index, row in enumerate(self._container.scan(first, last + 1), first):
            if index in wanted:
                yield row

    def lengths(self, column: str) -> np.ndarray:
        """How long the list in a column is, in every row; 1 where there is none."""
        return self._container.lengths(column)[self._chosen]
