"""Several data sets as one, each with its share of the samples."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from mmpeft.data import ConversationDataset


class Mixture(Dataset):
    """So many samples of each data set in a pass; the next pass goes on where this one ended.

    Each data set is walked through again and again in one order, drawn with ``seed``. So its rows
    are seen equally often, give or take one, whatever its share and however short the training.
    Index ``n * len(mixture) + i`` is sample ``i`` of pass ``n``; whoever draws shuffles.

    Args:
        counts: samples of each data set in a pass.
    """

    def __init__(
        self, datasets: Sequence[ConversationDataset], counts: Sequence[int], seed: int = 0
    ):
        self.datasets, self.counts = list(datasets), np.asarray(counts, np.int64)
        self.processor, self.bad_rows = self.datasets[0].processor, self.datasets[0].bad_rows
        self._ends = self.counts.cumsum()
        self._orders = [
            np.random.default_rng([seed, number]).permutation(len(dataset))
            for number, dataset in enumerate(self.datasets)
        ]

    def __len__(self):
        return int(self._ends[-1])

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> dict:
        number, own = self.place(index)
        return self.datasets[number][own]

    def place(self, index: int) -> tuple[int, int]:
        """Which data set an index draws from, and the index there."""
        turn, within = divmod(index, len(self))
        number = int(np.searchsorted(self._ends, within, side="right"))
        count, end, order = self.counts[number], self._ends[number], self._orders[number]
        round_, step = divmod(int(turn * count + within - (end - count)), len(order))
        return number, round_ * len(order) + int(order[step])

    def sizes(self, turn: int = 0) -> np.ndarray:
        """Those of the samples of a pass, as :meth:`ConversationDataset.sizes` gives them."""
        parts = []
        for dataset, count, order in zip(self.datasets, self.counts, self._orders, strict=True):
            steps = np.arange(turn * count, (turn + 1) * count) % len(order)
            parts.append(dataset.sizes()[order[steps]])
        return np.concatenate(parts)

    @property
    def store(self):
        """The feature store of all of them."""
        return self.datasets[0].store

    @store.setter
    def store(self, store):
        for dataset in self.datasets:
            dataset.store = store

    def __str__(self):
        lines = [f"mixture: {len(self)} samples a pass"]
        for dataset, count in zip(self.datasets, self.counts.tolist(), strict=True):
            rows = len(dataset.rows) - len(dataset.held_out)
            of = "" if rows == len(dataset) else f" in {len(dataset)} samples"
            lines.append(
                f"  {dataset.task.name}: {count} of them ({count / len(self):.1%}), from {rows} "
                f"rows{of}, each seen {count / len(dataset):.3g} times a pass"
            )
        return "\n".join(lines)


def shared_out(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Samples a pass of data sets of these sizes: as many as there are, in shares by weight.

    Without weights, each sample once. Every data set has one sample at least.
    """
    if None in weights:
        return list(sizes)
    return [max(1, round(sum(sizes) * weight / sum(weights))) for weight in weights]


def replayed(samples: int, share: float) -> int:
    """How many samples of replay make up ``share`` of all, beside so many others."""
    return max(1, round(samples * share / (1 - share)))


def with_replay(dataset, replay: ConversationDataset, share: float, seed: int = 0) -> Mixture:
    """A data set or mixture with replay as the last: ``share`` of all, to the nearest sample."""
    parts = dataset if isinstance(dataset, Mixture) else Mixture([dataset], [len(dataset)])
    counts = [*parts.counts, replayed(len(parts), share)]
    return Mixture([*parts.datasets, replay], counts, seed)
