"""The order in which training draws samples: a function of seed and pass, so a run can go on."""

import numpy as np
from torch.utils.data import Sampler

WINDOW = 50  # batches whose samples are sorted by length together


class PassSampler(Sampler):
    """Indices of a whole pass; those of pass ``n`` begin at ``n * len(dataset)``.

    Args:
        dataset: a :class:`~mmpeft.data.ConversationDataset` or :class:`~mmpeft.mixture.Mixture`.
        seed: with the number of the pass, all that the order depends on.
        strategy: ``random``, ``sequential``, or ``group_by_length``: batches of samples that all
            have pictures, or none, and that are about equally long, see :func:`grouped`.
        batch_size: samples of a batch.
    """

    def __init__(self, dataset, seed: int, strategy: str = "random", batch_size: int = 1):
        self.dataset, self.seed, self.strategy = dataset, seed, strategy
        self.batch_size, self.turn = batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Which pass comes next."""
        self.turn = epoch

    def __len__(self):
        return len(self.dataset)

    def __iter__(self):
        order = np.arange(len(self))
        if self.strategy != "sequential":
            draw = np.random.default_rng([self.seed, self.turn])
            order = draw.permutation(order)
        if self.strategy == "group_by_length":
            order = grouped(order, self.dataset.sizes(self.turn), self.batch_size, draw)
        yield from map(int, order + self.turn * len(self))


def grouped(order: np.ndarray, sizes: np.ndarray, batch: int, draw) -> np.ndarray:
    """Reorder samples so that batches cut from them are alike in kind and length.

    The batch with the longest sample comes first, so that what does not fit in memory shows at
    once; the others in random order; last, in two batches at most, what fills none of its kind.

    Args:
        order: numbers of the samples in random order ``(n,)``.
        sizes: tokens and image tokens of each sample ``(n, 2)``.
        draw: a numpy generator.
    """
    batches, rest = [], []
    for seeing in (True, False):
        own = order[(sizes[order, 1] > 0) == seeing]
        full = len(own) - len(own) % batch
        rest.append(own[full:])
        for start in range(0, full, WINDOW * batch):
            part = own[start : min(start + WINDOW * batch, full)]
            part = part[np.argsort(-sizes[part, 0], kind="stable")]
            batches += np.split(part, len(part) // batch)
    batches = [batches[number] for number in draw.permutation(len(batches))]
    if batches:
        longest = max(range(len(batches)), key=lambda number: sizes[batches[number], 0].max())
        batches.insert(0, batches.pop(longest))
    return np.concatenate([*batches, *rest])
