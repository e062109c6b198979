"""Training rows without wasted positions: what samples share once, the rest without padding.

Chats about one image repeat its tokens, and all samples the system prompt. ``share_prefix`` keeps
what the chats of one sample share once and lets them branch off behind it; ``pack`` does the same
over the samples of a batch and joins them to one row (as TRL's padding-free batches are).
Positions continue from what is shared, and no token sees a token that it would not see alone, so
every token gets the loss and the gradient it would get alone.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def share_prefix(rows: list[dict]) -> dict:
    """Fold rows that start alike into one: the common start, then each row's rest as a branch.

    Returns a row with ``position_ids`` and ``branch_ids`` (-1 in the prefix) besides the rest.
    The prefix ends before the first supervised token and keeps every image whole.
    """
    rows = [{key: np.asarray(values) for key, values in row.items()} for row in rows]
    for row in rows:
        row["labels"] = np.concatenate([[-100], row["labels"][1:]])  # nothing predicts the first
    length = min(len(row["labels"]) for row in rows)
    alike = rows[0]["labels"][:length] == -100
    for row in rows:
        for key, values in row.items():
            alike = alike & (values[:length] == rows[0][key][:length])
    length = int(alike.cumprod().sum())
    # The token before a supervised one predicts it, so it must stand in the same branch.
    if length and any(row["labels"][length] != -100 for row in rows):
        length -= 1
    if any(row["mm_token_type_ids"][length:].any() for row in rows[1:]):
        raise ValueError(
            "chats of one group must share their images and all that stands before them; put the "
            "images first, or set data.chats_per_sample: 1."
        )
    parts = {key: [rows[0][key][:length], *(row[key][length:] for row in rows)] for key in rows[0]}
    sample = {key: np.concatenate(values).tolist() for key, values in parts.items()}
    rests = [len(row["labels"]) - length for row in rows]
    position_ids = [np.arange(length), *(np.arange(length, length + rest) for rest in rests)]
    branch_ids = np.repeat(np.arange(-1, len(rows)), [length, *rests])
    sample["position_ids"] = np.concatenate(position_ids).tolist()
    return sample | {"branch_ids": branch_ids.tolist()}


@dataclass
class Block:
    """Neighbouring positions of a packed row that see each other, and a root before them.

    Attributes:
        start, length: the positions, ``[start, start + length)``.
        root: ``(start, length)`` of what all samples of a tree share; ``length`` may be 0.
        mask: ``(length, root length + length)`` bool, what each position sees; ``None`` is causal.
    """

    start: int
    length: int
    root: tuple[int, int] = (0, 0)
    mask: Tensor | None = None
    _bias: Tensor | None = None

    def bias(self, dtype: torch.dtype, repeats: int, device) -> Tensor:
        """The mask as ``(repeats * length, root length + length)`` to add to scores; kept."""
        if self._bias is None or self._bias.dtype != dtype or self._bias.device != device:
            mask = self.mask
            if mask is None:
                mask = torch.ones(self.length, self.length, dtype=torch.bool, device=device).tril()
            bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            self._bias = bias.repeat(repeats, 1)
        return self._bias


@dataclass
class PackedRow:
    """How a row ``(1, N)`` is made of samples.

    Attributes:
        blocks: cover the row, in order.
        trees: lengths of the stretches that share a root; either every sample of a tree holds an
            image or none does, since the gate may treat these apart.
    """

    blocks: list[Block]
    trees: list[int]

    def spread(self, by_token: Tensor) -> Tensor:
        """``(1, N)`` bool: for each position, whether any of its tree is true in ``by_token``."""
        stretches = by_token.split(self.trees, dim=1)
        return torch.cat([s.any(1, keepdim=True).expand(s.shape) for s in stretches], 1)

    def see(self, by_token: Tensor) -> Tensor:
        """``(1, N)`` bool: for each position, whether it sees one that is true in ``by_token``.

        Roots hold words alone.
        """
        parts = []
        for block in self.blocks:
            own = by_token[:, block.start : block.start + block.length]  # (1, t)
            if block.mask is None:
                parts.append(own.cumsum(1) > 0)
            else:
                visible = block.mask[:, block.root[1] :]  # (t, t)
                parts.append((visible & own).any(1)[None])
        return torch.cat(parts, 1)

    def part(self, taken: Tensor) -> "PackedRow":
        """The row of some trees alone: of those at whose positions ``taken`` ``(1, N)`` is true."""
        taken = taken[0].tolist()
        places = np.cumsum(taken) - 1  # of each position that is taken
        blocks = [
            replace(b, start=int(places[b.start]), root=(int(places[b.root[0]]), b.root[1]))
            for b in self.blocks
            if taken[b.start]
        ]
        starts = np.cumsum([0, *self.trees])[:-1]
        return PackedRow(blocks, [n for n, at in zip(self.trees, starts, strict=True) if taken[at]])

    def _map(self, change) -> "PackedRow":
        blocks = [b if b.mask is None else replace(b, mask=change(b.mask)) for b in self.blocks]
        return PackedRow(blocks, self.trees)

    def to(self, *args, **kwargs) -> "PackedRow":
        """The same with its masks elsewhere, as ``Tensor.to``."""
        return self._map(lambda mask: mask.to(*args, **kwargs))

    def pin_memory(self, *args) -> "PackedRow":
        """The same with its masks in page-locked memory, as data loaders ask for."""
        return self._map(lambda mask: mask.pin_memory(*args))


def pad(rows: list[dict], fill: dict, multiple: int = 1) -> dict:
    """Rows ``{key: (t,)}`` below each other, padded on the right: ``{key: (B, T)}``.

    ``attention_mask`` is ``(B, T)``, or ``(B, 1, T, T)`` where branches must not see each other.
    """
    width = _rounded(max(len(row["labels"]) for row in rows), multiple)
    batch = {
        key: torch.stack([F.pad(row[key], (0, width - len(row[key])), value=value) for row in rows])
        for key, value in fill.items()
    }
    branch = batch.pop("branch_ids")  # (B, T)
    if (branch > 0).any():
        same = branch[:, :, None] == branch[:, None, :]  # (B, query, key)
        visible = same | (branch[:, None, :] == -1)
        return batch | {"attention_mask": visible.tril()[:, None]}
    return batch | {"attention_mask": (branch != -2).long()}


def pack(trees: list[list[dict]], fill: dict, multiple: int = 1) -> dict:
    """Rows ``{key: (t,)}`` behind each other: ``{key: (1, N)}`` and the :class:`PackedRow`.

    The rows of a tree share the tokens that they all begin with.
    """
    parts, blocks, lengths, at = [], [], [], 0
    for tree in trees:
        root, began = _root(tree) if len(tree) > 1 else 0, at
        if root:
            parts.append({key: tree[0][key][:root] for key in fill})
            blocks.append(Block(at, root))
            at += root
        for row in tree:
            rest = {key: row[key][root:] for key in fill}
            parts.append(rest)
            length = len(rest["labels"])
            blocks.append(Block(at, length, (began, root), _visible(rest["branch_ids"], root)))
            at += length
        lengths.append(at - began)
    if missing := _rounded(at, multiple) - at:
        blocks[-1], lengths[-1] = _lengthened(blocks[-1], missing), lengths[-1] + missing
    batch = {
        key: F.pad(torch.cat([part[key] for part in parts]), (0, missing), value=value)[None]
        for key, value in fill.items()
    }
    del batch["branch_ids"]
    return batch | {"packed": PackedRow(blocks, lengths)}


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _root(tensors: list[dict]) -> int:
    """How many first tokens all samples share before anything is learned or looked at."""
    shortest = min(len(t["labels"]) for t in tensors)
    alike = torch.ones(shortest, dtype=torch.bool)
    for t in tensors:
        first = tensors[0]["input_ids"][:shortest]
        shared = (t["branch_ids"][:shortest] == -1) & (t["mm_token_type_ids"][:shortest] == 0)
        alike &= shared & (t["input_ids"][:shortest] == first)
    return int(alike.long().cumprod(0).sum())


def _visible(branch: Tensor, root: int) -> Tensor | None:
    """``(t, root + t)``: what each of t positions sees, by their branches; ``None``: causal."""
    if root == 0 and not (branch > 0).any():
        return None
    same = (branch[:, None] == branch[None, :]) | (branch[None, :] == -1)  # (query, key)
    return F.pad(same.tril(), (root, 0), value=True)


def _lengthened(block: Block, more: int) -> Block:
    """The block with padding behind it, which sees itself alone and which nothing sees."""
    mask = block.mask
    if mask is not None:
        mask = F.pad(mask, (0, more, 0, more))
        mask.diagonal(block.root[1])[-more:] = True
    return Block(block.start, block.length + more, block.root, mask)
