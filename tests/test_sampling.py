"""The order of samples: complete, a function of seed and pass, and grouped where asked for."""

import numpy as np
import pytest
from accelerate.data_loader import skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import get_length_grouped_indices

from mmpeft.data import ConversationDataset
from mmpeft.sampling import PassSampler, grouped

from .conftest import assistant, user
from .test_data import InMemory


class Sized:
    """A data set of known sizes."""

    def __init__(self, sizes):
        self.own = np.asarray(sizes)

    def __len__(self):
        return len(self.own)

    def __getitem__(self, index):
        return index

    def sizes(self, turn=0):
        return self.own


def cut(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def random_sizes(count, seed=0):
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 2, count) * 64
    return np.stack([draw.integers(5, 300, count) + image, image], 1)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize(("count", "batch"), [(1, 4), (7, 4), (97, 4), (1200, 8)])
def test_every_pass_has_every_sample_once(strategy, count, batch):
    sampler = PassSampler(Sized(random_sizes(count)), 3, strategy, batch)
    passes = []
    for turn in range(3):
        sampler.set_epoch(turn)
        passes.append(list(sampler))
        assert sorted(passes[-1]) == list(range(turn * count, (turn + 1) * count))
        assert passes[-1] == list(sampler)  # once more
    again = PassSampler(Sized(random_sizes(count)), 3, strategy, batch)
    again.set_epoch(2)  # as a run that goes on begins
    assert list(again) == passes[2]
    if strategy != "sequential" and count > 7:
        assert [index - count for index in passes[1]] != passes[0]
        assert passes[0] != list(PassSampler(Sized(random_sizes(count)), 4, strategy, batch))


@pytest.mark.parametrize("count", [40, 399, 5000])
def test_grouped_batches_are_of_one_kind_and_even(count):
    sizes, batch = random_sizes(count), 8
    order = np.random.default_rng(1).permutation(count)
    result = grouped(order, sizes, batch, np.random.default_rng(2))
    batches = cut(result.tolist(), batch)
    kinds = [len({bool(sizes[index, 1]) for index in one}) for one in batches]
    assert sum(kind > 1 for kind in kinds) <= 2 and all(kind == 1 for kind in kinds[:-2])
    longest = [sizes[one, 0].max() for one in batches]
    assert longest[0] == max(longest[:-2])

    def padding(order):
        return sum(
            len(one) * sizes[one, 0].max() - sizes[one, 0].sum() for one in cut(order, batch)
        )

    reference = get_length_grouped_indices(sizes[:, 0].tolist(), batch)  # of transformers
    assert padding(result.tolist()) < max(0.3 * padding(order.tolist()), 1.5 * padding(reference))
    where = np.argsort(result)  # batches are shuffled: lengths do not fall through the pass
    assert abs(np.corrcoef(where, sizes[:, 0])[0, 1]) < 0.5


def test_a_loader_that_skips_goes_on_as_the_whole_one():
    from accelerate import Accelerator

    def loader():
        sampler = PassSampler(Sized(random_sizes(50)), 0, "group_by_length", 4)
        return Accelerator(cpu=True).prepare(
            DataLoader(Sized(random_sizes(50)), 4, sampler=sampler)
        )

    for turn in (0, 2):
        whole = loader()
        whole.set_epoch(turn)
        expected = [batch.tolist() for batch in whole]
        rest = skip_first_batches(loader(), 5)
        rest.set_epoch(turn)
        assert [batch.tolist() for batch in rest] == expected[5:]
        assert min(map(min, expected)) == 50 * turn


def test_sizes_are_close_to_the_tokens_and_read_no_picture(tiny, images, monkeypatch):
    chats = [
        [user(*images[: i % 3], "word " * (1 + i * i % 23)), assistant("so " * (1 + i % 5))]
        for i in range(24)
    ]
    dataset = ConversationDataset(InMemory(chats=chats, keys=[None] * 24), "train", tiny[1])
    samples = [len(sample["input_ids"]) for sample in dataset]
    monkeypatch.setattr(Image.Image, "load", None)
    sizes = dataset.sizes()
    assert sizes[:, 1].tolist() == [16 * (i % 3) for i in range(24)]
    assert np.corrcoef(sizes[:, 0], samples)[0, 1] > 0.99
    assert np.abs(sizes[:, 0] / samples - 1).max() < 0.1


def test_sizes_of_chats_that_share_a_picture_count_it_once(tiny, images):
    chats = [[user(images[0], f"q{i}"), assistant("a")] for i in range(6)]
    task = InMemory(chats=chats, keys=["one"] * 6)
    dataset = ConversationDataset(task, "train", tiny[1], chats_per_sample=4)
    assert dataset.sizes()[:, 1].tolist() == [16, 16]


def test_a_strategy_for_several_processes_is_refused():
    from mmpeft.stage import StageConfig

    with pytest.raises(ValueError, match="batch_rebalance.; use random"):
        StageConfig(train_sampling_strategy="batch_rebalance")
