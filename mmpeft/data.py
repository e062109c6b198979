"""Rows of a task as training samples: validated, tokenised, batched; nothing cut or dropped.

An assistant's message marked ``"unfinished": true`` as the last of its chat was cut by a token
limit: its words are learned, the end of turn that the template puts behind them is not.
"""

import random
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, get_worker_info

from mmpeft.augmentation import Augmentation
from mmpeft.model import IMAGE_INPUTS
from mmpeft.packing import pack, pad, share_prefix
from mmpeft.task import Task

ROLES = ("system", "user", "assistant", "tool")


class ConversationDataset(Dataset):
    """Samples of a task's split; one sample is up to ``chats_per_sample`` chats of one group.

    Chats that share a prefix may be ``branch_limit`` tokens long, see
    :func:`mmpeft.language_model.branch_limit`. At least ``held_out`` rows, drawn with ``seed``,
    are left out; their numbers are in the attribute of that name. ``augmentation`` are transforms
    of a loaded picture, see :class:`mmpeft.augmentation.Augmentation`.

    Attributes:
        store: a :class:`~mmpeft.feature_store.FeatureStore` to look pictures up in, or ``None``.
    """

    store = None

    def __init__(
        self, task: Task, split: str, processor, chats_per_sample: int = 1, held_out: int = 0,
        seed: int = 0, branch_limit: int | None = None, augmentation: list | None = None,
    ):  # fmt: skip
        if chats_per_sample > 1 and processor.qformer_tokenizer is not None:
            raise ValueError(
                f"data.chats_per_sample is {chats_per_sample}, but this connector reads the "
                "question beside the image, so questions cannot share image tokens; set it to 1."
            )
        self.task, self.processor, self.branch_limit = task, processor, branch_limit
        self.rows = task.rows(split)
        self.held_out = hold_out(task, self.rows, held_out, seed)
        several_sizes = len(getattr(processor.image_processor, "resolutions", None) or ()) > 1
        self.augment = Augmentation(augmentation, several_sizes) if augmentation else None
        alone = chats_per_sample == 1
        groups = np.arange(len(self.rows)) if alone else row_groups(task, self.rows)
        self.samples = Samples(groups, chats_per_sample, self.held_out)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        with named_in_workers() as names:
            return self._sample(index, names)

    def _sample(self, index: int, names: list[str]) -> dict:
        encoded, pictures = [], None
        for number in self.samples[index]:
            names.clear()
            row = self.rows[number]  # which may be read from disk, each time
            where = self.task.where(row, number)
            names.append(where)
            chat, own = self._encode(row, where)
            encoded.append(chat)
            if pictures is not None and [p.source for p in own] != [p.source for p in pictures]:
                raise ValueError(
                    f"{where}: its group has rows with other images; rows of one group must share "
                    "theirs (see Task.group), or set chats_per_sample: 1."
                )
            pictures = own
        longest = max(len(row["input_ids"]) for row in encoded)
        if len(encoded) > 1 and self.branch_limit is not None and longest > self.branch_limit:
            raise ValueError(
                f"{where}: a chat of {longest} tokens is longer than the window of "
                f"{self.branch_limit} that this language model attends to, so it cannot share a "
                "prefix; set data.chats_per_sample: 1."
            )
        try:
            sample = share_prefix(encoded)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if pictures:
            sample |= self._image_inputs(pictures, f"{where}: ")
        return sample

    def _image_inputs(self, pictures, where):
        if self.store is not None:
            return self.store.image_inputs(self.processor, pictures, where)
        return self.processor.image_inputs(pictures, where, self.augment)

    def pictures(self, index: int) -> tuple[list, str]:
        """The pictures of a sample, unread, and how error messages point at it."""
        number = self.samples[index][0]
        row = self.rows[number]
        where, messages = self.task.where(row, number), self.task.messages(row)
        check_chat(messages, where)
        try:
            return self.processor.pictures(messages), where
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{where}: {error}") from None

    def _encode(self, row, where):
        messages = self.task.messages(row)
        check_chat(messages, where)
        try:
            encoded, pictures = self.processor.encode_chat(messages)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{where}: {error}") from None
        if messages[-1].get("unfinished"):
            leave_open(encoded["labels"], self.processor.tokenizer)
        if encoded["labels"].count(-100) == len(encoded["labels"]):
            raise ValueError(f"{where}: the chat has no assistant token to learn from.")
        return encoded, pictures


def row_groups(task: Task, rows) -> np.ndarray:
    """Number of each row's group (see ``Task.group``), int64 ``(rows,)``, from 0 as they appear."""
    if type(task).group is Task.group:  # it knows none, so no row need be read
        return np.arange(len(rows))
    seen, numbers = {}, np.empty(len(rows), np.int64)
    for number, row in enumerate(rows):
        key = task.group(row)
        numbers[number] = seen.setdefault(number if key is None else (key,), len(seen))
    return numbers


def hold_out(task: Task, rows, count: int, seed: int) -> list[int]:
    """Numbers of at least ``count`` rows drawn with ``seed``, in whole groups: no picture is split.

    Raises:
        ValueError: nothing would be left to learn from.
    """
    if not count:
        return []
    groups = row_groups(task, rows)
    sizes = np.bincount(groups)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    drawn, held_out = [], 0
    while held_out < count:
        drawn.append(order.pop())
        held_out += sizes[drawn[-1]]
        if not order:
            raise ValueError(
                f"{count} of {len(rows)} rows cannot be held out: nothing would be left to learn "
                "from. Lower retention.vision_samples or rank_search.validation."
            )
    return np.flatnonzero(np.isin(groups, drawn)).tolist()


class Samples(Sequence):
    """Row numbers of each sample: at most ``size`` rows of one group, in the order of the file.

    Two arrays, however many samples there are: lists in a list would be several times as large,
    and worker processes would copy them, since Python counts references in them.

    Args:
        groups: group of each row, see :func:`row_groups`.
        without: numbers of rows that are left out.
    """

    def __init__(self, groups: np.ndarray, size: int, without: list[int]):
        kept = np.delete(np.arange(len(groups)), without)
        self._rows = kept[np.argsort(groups[kept], kind="stable")]  # group after group
        _, first, sizes = np.unique(groups[self._rows], return_index=True, return_counts=True)
        within = np.arange(len(kept)) - np.repeat(first, sizes)  # place in the group
        starts = np.flatnonzero(within % size == 0)
        self._ends = np.append(starts[1:], len(kept))[: len(starts)]

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index: int) -> list[int]:
        index = range(len(self))[index]
        first = self._ends[index - 1] if index else 0
        return self._rows[first : self._ends[index]].tolist()


class WorkerError(ValueError):
    """What was wrong with a sample, in its one line, when a worker process made the sample.

    The process that waits for the sample makes the error anew, of the worker's whole traceback;
    what that ends with is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@contextmanager
def named_in_workers():
    """Inside, a user's mistake stays its one line when it is made in a worker process.

    Yields a list for the name of the row in hand, with which a message about the row begins; while
    it is empty the row is being read. Any other error keeps its traceback.
    """
    names: list[str] = []
    try:
        yield names
    except (ValueError, OSError) as error:
        if get_worker_info() is None or (names and not str(error).startswith(names[-1])):
            raise
        raise WorkerError(str(error)) from None


def replayed(samples: int, share: float) -> int:
    """How many samples of replay make up ``share`` of all, beside so many others."""
    return max(1, round(samples * share / (1 - share)))


class WithReplay(Dataset):
    """A data set with replay behind it, rows in turn, so that ``share`` of all samples are replay.

    The share is that of one pass over the whole, to the nearest sample; whoever draws shuffles.
    """

    def __init__(self, dataset: ConversationDataset, replay: ConversationDataset, share: float):
        self.dataset, self.replay, self.processor = dataset, replay, dataset.processor
        self.replayed = replayed(len(dataset), share)

    def __len__(self):
        return len(self.dataset) + self.replayed

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        past = index - len(self.dataset)
        return self.dataset[index] if past < 0 else self.replay[past % len(self.replay)]

    def __str__(self):
        return (
            f"replay: {self.replayed} of {len(self)} samples, from {len(self.replay)} rows "
            f"({min(self.replayed, len(self.replay))} of them used)"
        )


def leave_open(labels: list[int], tokenizer) -> None:
    """Stop learning, in place, before the template's last special token: the end of the turn."""
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    ends = np.flatnonzero(np.isin(labels, special))
    if len(ends):
        labels[ends[-1] :] = [-100] * (len(labels) - ends[-1])


def check_chat(messages: list[dict], where: str) -> None:
    """Refuse a chat that could not be learned from, naming row and field."""
    if not messages:
        raise ValueError(f"{where}: messages is empty.")
    for n, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"{where}: messages[{n}].role is {role!r}; use {', '.join(ROLES)}.")
        if not content or (isinstance(content, str) and not content.strip()):
            raise ValueError(f"{where}: messages[{n}].content ({role}) is empty; fill or drop it.")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last message is the {messages[-1]['role']}'s; a training "
                         "chat ends with the assistant's answer.")  # fmt: skip


class Collator:
    """Samples to a batch: one packed row, or rows padded on the right.

    Args:
        packing: join the samples to one row, see :mod:`mmpeft.packing`; else each is a row.
        pad_to_multiple_of: round the length of rows up, so that few different lengths occur: what
            computes a new shape is prepared anew (compiled, on a CPU by oneDNN).
    """

    def __init__(self, pad_token_id: int, packing: bool = False, pad_to_multiple_of: int = 1):
        self.fill = {
            "input_ids": pad_token_id, "mm_token_type_ids": 0, "labels": -100,
            "position_ids": 0, "branch_ids": -2,
        }  # fmt: skip
        self.packing, self.multiple = packing, pad_to_multiple_of

    def __call__(self, samples: list[dict]) -> dict:
        rows = [self._tensors(sample) for sample in samples]
        if not self.packing:
            return pad(rows, self.fill, self.multiple) | join_images(samples)
        sees = [bool((row["mm_token_type_ids"] == 1).any()) for row in rows]
        trees = [  # a gate may treat samples with and without images apart
            [row for row, has_image in zip(rows, sees, strict=True) if has_image == kind]
            for kind in sorted(set(sees), reverse=True)
        ]
        return pack(trees, self.fill, self.multiple) | join_images(samples)

    def _tensors(self, sample: dict) -> dict[str, torch.Tensor]:
        return {key: torch.as_tensor(sample[key]) for key in self.fill}


def join_images(samples: list[dict]) -> dict[str, torch.Tensor]:
    """The image inputs of all samples that have any, padded with 0 to a common size.

    What :class:`mmpeft.feature_store.FeatureStore` adds about each image is joined, too.
    """
    joined = {}
    for key in ("image_keys", "cached_shapes"):
        if any(key in sample for sample in samples):
            joined[key] = [one for sample in samples for one in sample.get(key, ())]
    for key in (*IMAGE_INPUTS, "cached_features"):
        parts = [sample[key] for sample in samples if key in sample]
        if not parts:
            continue
        shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        joined[key] = torch.cat([_pad_to(part, shape) for part in parts])
    return joined


def _pad_to(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Zeros behind every dimension but the first, up to ``shape``."""
    missing = [want - has for want, has in zip(shape, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [n for gap in reversed(missing) for n in (0, gap)])
