"""Rows that say what another row says, and evaluation rows that are trained on.

Chats and pictures are compared by hashes of 64 bits: among ten million of them, the chance that any
two meet by accident is one in 400,000.
"""

import numpy as np

from mmpeft.checks import Problem
from mmpeft.data_check.engine import Source
from mmpeft.data_check.scan import Found, RowProblem


def find_duplicates(sources: list[Source], limit: int) -> None:
    """Note rows whose texts and pictures are those of an earlier row, of any of the files."""
    every = _Column(sources, "chats", "key")
    for again, first in zip(*duplicates(every.values), strict=True):
        said = "are, with their pictures, those of", "keep one of the two"
        every.note(again, "duplicate", said, every, first, limit)


def find_leaks(trained: list[Source], evaluated: list[Source], limit: int) -> None:
    """Note evaluation rows with a picture, or (without pictures) a question, that is trained on."""
    remedy = "take it out of one of the two"
    for table, problem in (
        ("pictures", "have a picture that is also in"),
        ("questions", "ask what is also asked in"),
    ):
        own, known = (_Column(part, table, "key") for part in (evaluated, trained))
        places = np.arange(len(own.values))
        if table == "questions":  # only the last answer of a row is scored
            places = np.flatnonzero(_Column(evaluated, table, "last").values)
        told = set()
        for place, first in zip(*leaked(own.values[places], known.values), strict=True):
            row = own.row(places[place])
            if row not in told:  # a row may have several pictures
                told.add(row)
                own.note(places[place], "leakage", (problem, remedy), known, first, limit)


def duplicates(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in ``keys``, int64 ``(n,)``, whose key came before, and the first place of each.

    In the order of the places; int64 ``(d,)`` both.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    first = first[inverse]
    again = np.flatnonzero(first != np.arange(len(keys)))
    return again, first[again]


def leaked(evaluated: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in ``evaluated`` whose key is in ``trained``, and the first place there; int64."""
    known, first = np.unique(trained, return_index=True)
    if not len(known):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(known, evaluated), len(known) - 1)
    found = np.flatnonzero(known[place] == evaluated)
    return found, first[place[found]]


class _Column:
    """One column of a table of several files, end to end."""

    def __init__(self, sources: list[Source], table: str, name: str):
        self.sources = sources
        tables = [getattr(source.found, table) for source in sources]
        whole = np.concatenate([getattr(Found(0), table), *tables])
        self.values, self._rows = whole[name], whole["row"]
        self._ends = np.cumsum([len(own) for own in tables])

    def row(self, place: int) -> tuple[int, int]:
        """The number of the file, and that of the row in it."""
        return int(np.searchsorted(self._ends, place, side="right")), int(self._rows[place])

    def where(self, place: int) -> str:
        number, row = self.row(place)
        return self.sources[number].rows[row]["where"]

    def note(self, place, kind: str, said: tuple[str, str], other: "_Column", first, limit: int):
        """Add an error to the file of ``place``, about ``first``; only one that is kept is read."""
        found = self.sources[self.row(place)[0]].found
        if found.counts[kind] >= limit:
            found.counts[kind] += 1
            return
        problem = Problem("messages", f"{said[0]} {other.where(first)}", said[1])
        found.add(RowProblem(kind, self.where(place), problem), limit)
