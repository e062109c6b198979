"""Training on rows that are read one behind the other: samples of them, and their order.

The process that trains reads; what is drawn for a sample is the row itself, in place of an index.
So a row is read once and the order is the same, however many workers make samples of rows.
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice, repeat, takewhile
from typing import NamedTuple

from torch.utils.data import Sampler

from mmpeft.bad_rows import TooManyBadRows
from mmpeft.data import STREAM, ConversationDataset
from mmpeft.formats.errors import RowError

FIRST = 256  # rows that stand for all of a stream where all would be looked at


class Drawn(NamedTuple):
    """What a sample is made of.

    Attributes:
        number: of the sample, from 0.
        rows: the row, or what is wrong with it, and those that stand in for it if it is bad.
        place: where to go on behind the row, plain values; ``None`` where nobody will.
    """

    number: int
    rows: list[dict | RowError]
    place: dict | None


class StreamDataset(ConversationDataset):
    """Samples of rows that are streamed; ``dataset[drawn]`` makes that of a :class:`Drawn`.

    It has no length. A row that ``bad_rows`` passes over is replaced by the next good one, which
    also has its own turn, as in a data set that is counted.
    """

    def _open(self, split, chats_per_sample, held_out, fraction):
        self.stream = self.task.stream(split, self.seed)
        self.held_out, self.samples, self._beginning = [], _Alone(), self.stream.state_dict()

    def __getstate__(self):  # a worker is handed rows; what is open in the stream stays here
        return self.__dict__ | {"stream": None}

    def __getitem__(self, drawn: Drawn) -> dict:
        return self._made(drawn, drawn.number) | {STREAM: drawn.place}

    def first_good(self, drawn: Drawn, make):
        for row in drawn.rows:
            if (made := make(row)) is not None:
                return made
        raise TooManyBadRows(
            f"task {self.task.name}: {len(drawn.rows)} rows one behind the other cannot be learned "
            "from."
        )

    def _row(self, row: dict | RowError, names: list[str]) -> dict:
        names.clear()
        if isinstance(row, RowError):
            raise row
        names.append(self.task.where(row, 0))
        return row

    def drawn(self, place: dict | None = None) -> Iterator[Drawn]:
        """One after another without end, from the beginning or on from a place."""
        number = place["samples"] if place else 0
        # if one more is bad, the limit is exceeded: there is always a row to stand in, or an error
        behind = self.bad_rows.limit or 0
        ahead = deque()
        for one in self._read(place):
            ahead.append(one)
            if len(ahead) > behind:
                rows = [row for row, _ in ahead]
                _, state = ahead.popleft()
                yield Drawn(number, rows, {"samples": number + 1, "stream": state})
                number += 1

    def first(self, count: int) -> Iterator[Drawn]:
        """The first of the first pass, to look at."""
        whole = takewhile(lambda one: not one.place["stream"]["passes"], self.drawn())
        return (one._replace(place=None) for one in islice(whole, count))

    def _read(self, place: dict | None) -> Iterator[tuple[dict | RowError, dict]]:
        """Rows of pass after pass, each with the state of the stream behind it."""
        self.stream.load_state_dict(place["stream"] if place else self._beginning)
        given = place is not None  # then nothing may be left of the pass
        while True:
            for row in self.stream:
                given = True
                yield row, self.stream.state_dict()
            if not given:
                raise ValueError(f"task {self.task.name}: its stream has no rows to train on.")
            given = False


class _Alone:
    """Every row is a sample of its own."""

    def __getitem__(self, row):
        return [row]


class StreamSampler(Sampler):
    """Draws ``samples`` in all.

    Attributes:
        place: behind the last sample that was trained on. From there it goes on; what lies before
            is ``None``, for a trainer that counts batches and makes no sample of those it skips.
    """

    def __init__(self, dataset: StreamDataset, samples: int):
        self.dataset, self.samples, self.place = dataset, samples, None

    def __len__(self):
        return self.samples

    def __iter__(self):
        place = self.place
        done = place["samples"] if place else 0
        yield from repeat(None, done)
        yield from islice(self.dataset.drawn(place), self.samples - done)


def some(dataset, count: int) -> Iterable:
    """By what to draw ``count`` samples, or all there are: of a stream, the first.

    Else they are drawn from all rows, the same each time; a part of them is, too.
    """
    if isinstance(dataset, StreamDataset):
        return dataset.first(count)
    size = len(dataset)
    return random.Random(0).sample(range(size), min(count, size))
