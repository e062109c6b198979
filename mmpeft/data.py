"""Rows of a task as training samples: validated, tokenised, batched; nothing cut or dropped.

An assistant's message marked ``"unfinished": true`` as the last of its chat was cut by a token
limit: its words are learned, the end of turn that the template puts behind them is not.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from mmpeft.augmentation import Augmentation, drawn_by
from mmpeft.bad_rows import KEY, BadRows, TooManyBadRows, place
from mmpeft.checks import chat_problems
from mmpeft.formats.errors import RowError
from mmpeft.images import load_image
from mmpeft.model import IMAGE_INPUTS
from mmpeft.packing import pack, pad, share_prefix
from mmpeft.task import Task, pictures, words

STREAM = "stream"  # of a sample or batch: where a stream goes on behind it


class ConversationDataset(Dataset):
    """Samples of a task's split; one sample is up to ``chats_per_sample`` chats of one group.

    Chats that share a prefix may be ``branch_limit`` tokens long, see
    :func:`mmpeft.language_model.branch_limit`. At least ``held_out`` rows, drawn with ``seed``,
    are left out; their numbers are in the attribute of that name. ``fraction`` of the rows are
    used, see :class:`Share`; the others are as if they were not there. ``augmentation`` are
    transforms of a loaded picture, see :class:`mmpeft.augmentation.Augmentation`.

    Index ``n * len(dataset) + i`` is sample ``i`` in pass ``n``: the same, augmented anew. What an
    index gives depends on it and on ``seed`` alone, not on the process that makes it.

    A row that ``bad_rows`` passes over is left out of its sample; a sample without any other is
    replaced by the next good one.

    Attributes:
        store: a :class:`~mmpeft.feature_store.FeatureStore` to look pictures up in, or ``None``.
        seeing: whether any row has a picture, ``None`` until all were looked through for it.
    """

    store = None
    seeing: bool | None = None

    def __init__(
        self, task: Task, split: str, processor, chats_per_sample: int = 1, held_out: int = 0,
        seed: int = 0, branch_limit: int | None = None, augmentation: list | None = None,
        bad_rows: BadRows | None = None, fraction: float = 1.0,
    ):  # fmt: skip
        if chats_per_sample > 1 and processor.qformer_tokenizer is not None:
            raise ValueError(
                f"data.chats_per_sample is {chats_per_sample}, but this connector reads the "
                "question beside the image, so questions cannot share image tokens; set it to 1."
            )
        self.task, self.processor, self.branch_limit = task, processor, branch_limit
        self.bad_rows, self.seed = bad_rows or BadRows(), seed
        several_sizes = len(getattr(processor.image_processor, "resolutions", None) or ()) > 1
        self.augment = Augmentation(augmentation, several_sizes) if augmentation else None
        self._open(split, chats_per_sample, held_out, fraction)

    def _open(self, split: str, chats_per_sample: int, held_out: int, fraction: float) -> None:
        def groups_of(rows):
            return np.arange(len(rows)) if chats_per_sample == 1 else row_groups(self.task, rows)

        self.rows = self.task.rows(split)
        if fraction < 1:
            self.rows = Share(self.rows, groups_of(self.rows), fraction, self.seed)
        self.held_out = hold_out(self.task, self.rows, held_out, self.seed)
        groups = groups_of(self.rows)
        self.samples = Samples(groups, chats_per_sample, self.held_out)

    def __len__(self):
        return len(self.samples)

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> dict:
        return self._made(index, index)

    def _made(self, index, number: int) -> dict:
        """The sample of an index; ``number`` is what it is augmented by."""
        with named_in_workers() as names, drawn_by(self.seed, number, self.augment is not None):
            sample = self.first_good(index, lambda own: self._sample(own, names))
            return self.bad_rows.take(sample)

    def first_good(self, index: int, make: Callable):
        """``make(i)`` of the first sample from ``index`` on that has one, which is not ``None``."""
        for further in range(len(self)):
            if (made := make((index + further) % len(self))) is not None:
                return made
        raise TooManyBadRows(f"task {self.task.name} has no row that can be learned from.")

    def _sample(self, index: int, names: list[str]) -> dict | None:
        """``None`` where all of it was passed over."""
        encoded, of_rows, told = [], [], []
        for number in self.samples[index]:
            with self.bad_rows.passing(names):
                chat, pictures = self._encode(self._row(number, names), names[-1])
                encoded.append(chat)
                of_rows.append(pictures)
                told += names
        if not encoded:
            return None
        names[:] = told
        with self.bad_rows.passing(names):
            return self._joined(encoded, of_rows, told) | {"where": told}

    def _row(self, number: int, names: list[str]) -> dict:
        """A row, which may be read from disk each time; ``names`` then holds its name alone."""
        names.clear()
        row = self.rows[number]
        if isinstance(self.rows, Share):
            number = int(self.rows.numbers[number])
        names.append(self.task.where(row, number))
        return row

    def _joined(self, encoded: list[dict], of_rows: list[list], told: list[str]) -> dict:
        """One sample of chats that share their pictures; ``told`` are their names."""
        pictures, where = of_rows[0], told[-1]
        for name, own in zip(told, of_rows, strict=True):
            if [p.source for p in own] != [p.source for p in pictures]:
                raise ValueError(
                    f"{name}: its group has rows with other images; rows of one group must share "
                    "theirs (see Task.group), or set chats_per_sample: 1."
                )
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
        """The pictures of a sample and how error messages point at it.

        They are unread, except where bad rows are passed over: there, every one can be read.
        """
        return self.first_good(index, self._pictures)

    def _pictures(self, index: int) -> tuple[list, str] | None:
        names = []
        for number in self.samples[index]:
            with self.bad_rows.passing(names):
                messages = self._checked(self._row(number, names), names[-1])
                pictures = self._named(names[-1], lambda own=messages: self.processor.pictures(own))
                if self.bad_rows.limit is not None:
                    _load(pictures, names[-1])
                return pictures, names[-1]

    def good_rows(self, numbers: list[int]) -> list[dict]:
        """Those rows of these numbers that are not passed over, each tried."""
        good, names = [], []
        for number in numbers:
            with self.bad_rows.passing(names):
                row = self._row(number, names)
                _load(self._encode(row, names[-1])[1], names[-1])
                good.append(row)
        return good

    def sizes(self, turn: int = 0) -> np.ndarray:
        """Tokens and image tokens of every sample, estimated, int64 ``(samples, 2)``.

        Words are counted in characters, and a few rows tell how many tokens a character makes and
        a chat has besides. All rows are read, once; no picture is, but for its size where that
        decides its tokens.
        """
        if self.samples.sizes is None:
            every = tqdm(
                range(len(self)), desc=f"lengths of {self.task.name}", delay=3, leave=False
            )
            counted = np.array([self.first_good(index, self._size) for index in every], np.int64)
            tokens = counted[:, :2] @ self._tokens_of() + counted[:, 2]
            self.samples.sizes = np.stack([tokens.round().astype(np.int64), counted[:, 2]], 1)
        return self.samples.sizes

    def _size(self, index: int) -> tuple[int, int, int] | None:
        """Characters, chats and image tokens of a sample."""
        characters, chats, image_tokens, names = 0, 0, 0, []
        for number in self.samples[index]:
            with self.bad_rows.passing(names):
                messages = self._checked(self._row(number, names), names[-1])
                if shown := pictures(*messages):  # rows of one sample share theirs
                    image_tokens = self._named(
                        names[-1], lambda own=(messages, shown): self._image_tokens(*own)
                    )
                characters, chats = characters + len(words(*messages)), chats + 1
        return (characters, chats, image_tokens) if chats else None

    def _image_tokens(self, messages: list[dict], shown: list[dict]) -> int:
        """Of a chat with these image and video parts."""
        resolutions = getattr(self.processor.image_processor, "resolutions", ())
        alike = self.processor.num_image_tokens is not None or len(resolutions) == 1
        if not alike or any(part["type"] == "video" for part in shown):
            shown = self.processor.pictures(messages)
        return sum(self.processor._counts(shown))

    def _tokens_of(self, rows: int = 32) -> np.ndarray:
        """Of a character and of a chat without any ``(2,)``, fitted to evenly spread rows."""
        known, tokens, names = [], [], []
        for index in range(0, len(self), max(1, len(self) // rows)):
            with self.bad_rows.passing(names):
                row = self._row(self.samples[index][0], names)
                tokens.append(self._encode(row, names[-1])[0]["mm_token_type_ids"].count(0))
                known.append([len(words(*self.task.messages(row))), 1])
        return np.linalg.lstsq(np.array(known, float), np.array(tokens, float))[0]

    def _checked(self, row, where: str) -> list[dict]:
        messages = self.task.messages(row)
        check_chat(messages, where)
        return messages

    def _named(self, where: str, make: Callable):
        try:
            return make()
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{where}: {error}") from None

    def _encode(self, row, where: str) -> tuple[dict, list]:
        messages = self._checked(row, where)
        encoded, pictures = self._named(where, lambda: self.processor.encode_chat(messages))
        if messages[-1].get("unfinished"):
            leave_open(encoded["labels"], self.processor.tokenizer)
        if encoded["labels"].count(-100) == len(encoded["labels"]):
            raise ValueError(f"{where}: the chat has no assistant token to learn from.")
        return encoded, pictures


def _load(pictures: list, where: str) -> None:
    """Read pictures, so that one that cannot be is named."""
    for number, picture in enumerate(pictures, 1):
        load_image(picture.source, f"{where}: image {number}")


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
    """Numbers of at least ``count`` rows drawn with ``seed``, in whole groups (``Task.group``).

    So no picture is split where the task knows whose rows it has in common; ``messages`` does not.

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


class Share(Sequence):
    """A part of the rows, in their order: whole groups, drawn with ``seed``, at least one.

    Of one seed a smaller share is part of every larger one.

    Attributes:
        numbers: of the rows in all of them.
    """

    def __init__(self, rows: Sequence, groups: np.ndarray, fraction: float, seed: int):
        order = np.random.default_rng(seed).permutation(groups.max() + 1)
        drawn = order[: max(1, round(fraction * len(order)))]
        self.rows, self.numbers = rows, np.flatnonzero(np.isin(groups, drawn))

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index: int):
        return self.rows[int(self.numbers[index])]


class Samples(Sequence):
    """Row numbers of each sample: at most ``size`` rows of one group, in the order of the file.

    Two arrays, however many samples there are: lists in a list would be several times as large,
    and worker processes would copy them, since Python counts references in them.

    Args:
        groups: group of each row, see :func:`row_groups`.
        without: numbers of rows that are left out.

    Attributes:
        sizes: what :meth:`ConversationDataset.sizes` found of them.
    """

    sizes: np.ndarray | None = None

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
        ours = names and not str(error).startswith(names[-1])
        if get_worker_info() is None or (ours and not isinstance(error, TooManyBadRows)):
            raise
        raise WorkerError(str(error)) from None


def leave_open(labels: list[int], tokenizer) -> None:
    """Stop learning, in place, before the template's last special token: the end of the turn."""
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    ends = np.flatnonzero(np.isin(labels, special))
    if len(ends):
        labels[ends[-1] :] = [-100] * (len(labels) - ends[-1])


def check_chat(messages: list[dict], where: str) -> None:
    """Refuse a chat that could not be learned from, naming row and field."""
    if problems := chat_problems(messages):
        if found := place(where):
            file, unit, row, entry = found
            field, problem, remedy = problems[0]
            raise RowError(file, row, entry + field, problem, remedy, unit)
        raise ValueError(f"{where}: {problems[0]}")


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
        others = join_images(samples)
        if passed_over := [row for sample in samples for row in sample.get(KEY, ())]:
            others[KEY] = passed_over
        if place := samples[-1].get(STREAM):
            others[STREAM] = place
        if not self.packing:
            return pad(rows, self.fill, self.multiple) | others
        sees = [bool((row["mm_token_type_ids"] == 1).any()) for row in rows]
        trees = [  # a gate may treat samples with and without images apart
            [row for row, has_image in zip(rows, sees, strict=True) if has_image == kind]
            for kind in sorted(set(sees), reverse=True)
        ]
        return pack(trees, self.fill, self.multiple) | others

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
