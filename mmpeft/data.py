"""Rows of a task as training samples: validated, tokenised, batched; nothing cut or dropped.

Chats about one image repeat its tokens and the system prompt. ``share_prefix`` keeps these once
and lets the chats branch off behind them: positions continue from the prefix and no branch sees
another, so every token gets the loss it would get alone.

An assistant's message marked ``"unfinished": true`` as the last of its chat was cut by a token
limit: its words are learned, the end of turn that the template puts behind them is not.
"""

import random

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from mmpeft.model import IMAGE_INPUTS
from mmpeft.task import Task

ROLES = ("system", "user", "assistant", "tool")


class ConversationDataset(Dataset):
    """Samples of a task's split; one sample is up to ``chats_per_sample`` chats of one group.

    Chats that share a prefix may be ``branch_limit`` tokens long, see
    :func:`mmpeft.language_model.branch_limit`. At least ``held_out`` rows, drawn with ``seed``,
    are left out; their numbers are in the attribute of that name.
    """

    def __init__(
        self, task: Task, split: str, processor, chats_per_sample: int = 1, held_out: int = 0,
        seed: int = 0, branch_limit: int | None = None,
    ):  # fmt: skip
        if chats_per_sample > 1 and processor.qformer_tokenizer is not None:
            raise ValueError(
                f"data.chats_per_sample is {chats_per_sample}, but this connector reads the "
                "question beside the image, so questions cannot share image tokens; set it to 1."
            )
        self.task, self.processor, self.branch_limit = task, processor, branch_limit
        self.rows = task.rows(split)
        self.held_out = hold_out(task, self.rows, held_out, seed)
        self.samples = _grouped(task, self.rows, chats_per_sample, set(self.held_out))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        encoded, pictures, where = [], None, ""
        for number in self.samples[index]:
            where = self.task.where(self.rows[number], number)
            row, own = self._encode(self.rows[number], where)
            encoded.append(row)
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
        sample = share_prefix(encoded)
        if pictures:
            sample |= self.processor.image_inputs(pictures, f"{where}: ")
        return sample

    def _encode(self, row, where):
        messages = self.task.messages(row)
        check_chat(messages, where)
        try:
            encoded, pictures = self.processor.encode_chat(messages)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{where}: {error}") from None
        if messages[-1].get("unfinished"):
            leave_open(encoded["labels"], self.processor.tokenizer)
        if all(label == -100 for label in encoded["labels"]):
            raise ValueError(f"{where}: the chat has no assistant token to learn from.")
        return encoded, pictures


def hold_out(task: Task, rows, count: int, seed: int) -> list[int]:
    """Numbers of at least ``count`` rows drawn with ``seed``, in whole groups: no picture is split.

    Raises:
        ValueError: nothing would be left to learn from.
    """
    groups = {}
    for number, row in enumerate(rows):
        key = task.group(row)
        groups.setdefault(number if key is None else (key,), []).append(number)
    order, held_out = list(groups.values()), []
    random.Random(seed).shuffle(order)
    while len(held_out) < count:
        held_out += order.pop()
        if not order:
            raise ValueError(
                f"{count} of {len(rows)} rows cannot be held out: nothing would be left to learn "
                "from. Lower retention.vision_samples."
            )
    return sorted(held_out)


class WithReplay(Dataset):
    """A data set with replay behind it, rows in turn, so that ``share`` of all samples are replay.

    The share is that of one pass over the whole, to the nearest sample; whoever draws shuffles.
    """

    def __init__(self, dataset: ConversationDataset, replay: ConversationDataset, share: float):
        self.dataset, self.replay, self.processor = dataset, replay, dataset.processor
        self.replayed = max(1, round(len(dataset) * share / (1 - share)))

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
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = max((i for i, label in enumerate(labels) if label in special), default=len(labels))
    labels[end:] = [-100] * (len(labels) - end)


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


def _grouped(task, rows, size: int, without: set[int]) -> list[list[int]]:
    """Row numbers, cut into samples of at most ``size`` rows of one group, in file order."""
    groups = {}
    for number, row in enumerate(rows):
        if number in without:
            continue
        key = task.group(row) if size > 1 else None
        groups.setdefault(number if key is None else (key,), []).append(number)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def share_prefix(rows: list[dict]) -> dict:
    """Fold rows that start alike into one: the common start, then each row's rest as a branch.

    Returns a row with ``position_ids`` and ``branch_ids`` (-1 in the prefix) besides the rest.
    The prefix ends before the first supervised token and keeps every image whole.
    """
    keys = [list(zip(*(row[k] for k in row), strict=True)) for row in rows]
    length = 0
    for column in zip(*keys, strict=False):
        if any(token != column[0] for token in column) or rows[0]["labels"][length] != -100:
            break
        length += 1
    # The token before a supervised one predicts it, so it must stand in the same branch.
    while length and any(row["labels"][length] != -100 for row in rows):
        length -= 1
    sample = {key: list(rows[0][key][:length]) for key in rows[0]}
    sample["position_ids"], sample["branch_ids"] = list(range(length)), [-1] * length
    for branch, row in enumerate(rows):
        if branch and any(row["mm_token_type_ids"][length:]):
            raise ValueError("chats of one group must share their images; they differ here.")
        for key, values in row.items():
            sample[key] += values[length:]
        rest = len(row["labels"]) - length
        sample["position_ids"] += range(length, length + rest)
        sample["branch_ids"] += [branch] * rest
    return sample


class Collator:
    """Pads samples on the right; builds the attention mask that keeps branches apart."""

    def __init__(self, pad_token_id: int):
        self.fill = {
            "input_ids": pad_token_id, "mm_token_type_ids": 0, "labels": -100,
            "position_ids": 0, "branch_ids": -2,
        }  # fmt: skip

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(sample["input_ids"]) for sample in samples)
        batch = {
            key: torch.tensor([s[key] + [value] * (width - len(s[key])) for s in samples])
            for key, value in self.fill.items()
        }
        branch = batch.pop("branch_ids")  # (B, T)
        if (branch > 0).any():
            same = branch[:, :, None] == branch[:, None, :]  # (B, query, key)
            visible = same | (branch[:, None, :] == -1)
            batch["attention_mask"] = visible.tril()[:, None]  # (B, 1, T, T)
        else:
            batch["attention_mask"] = (branch != -2).long()  # (B, T)
        return batch | join_images(samples)


def join_images(samples: list[dict]) -> dict[str, torch.Tensor]:
    """The image inputs of all samples that have any, padded with 0 to a common size."""
    images = [sample for sample in samples if "pixel_values" in sample]
    joined = {}
    for key in [k for k in IMAGE_INPUTS if images and k in images[0]]:
        parts = [sample[key] for sample in images]
        shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        joined[key] = torch.cat([_pad_to(part, shape) for part in parts])
    return joined


def _pad_to(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Zeros behind every dimension but the first, up to ``shape``."""
    missing = [want - has for want, has in zip(shape, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [n for gap in reversed(missing) for n in (0, gap)])
