"""Attention over packed rows, and attention to keys and values that an adapter has learned.

An attention implementation in the sense of transformers, ``ATTENTION``, put on the LLM by
:func:`serve_packed_rows` and by the tuners that learn keys and values. It acts when the LLM is
called with a ``packed`` row, whose samples each attend to themselves and to the root before them,
or an attention module with something ``learned``; every other call goes to transformers' own
``sdpa``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import maybe_autocast

from mmpeft.language_model import attends_alone, counts_places
from mmpeft.packing import Block, PackedRow, pack

ATTENTION = "mmpeft_packed"
# Attends to nothing, so an LLM that does not hand the packed row on to its attention fails.
NO_MASK = torch.zeros(1, 1, 0, 0, dtype=torch.bool)
UNSERVED = ("softcap", "position_bias", "s_aux", "sinks")  # what some LLMs want of attention
PROBE = (24, 4)  # tokens of two samples; windows and chunks of an LLM are longer
LONGEST_MATRIX = 512  # positions of a block up to which its whole attention matrix is made


@torch.no_grad()
def serve_packed_rows(bridge) -> str | None:
    """Put ``ATTENTION`` on the bridge's LLM if packed samples then come out as they do alone.

    Tries it: LLMs that take positions or masks from elsewhere (ALiBi, recurrence), cap their
    scores, or do not hand on what a call brings stay as they are.

    Returns:
        why not, or ``None``.
    """
    llm = bridge.language_model
    model = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    kind, before = model.config.model_type, model.config._attn_implementation
    if before not in ("sdpa", ATTENTION):
        return f"{kind} language models run here with {before} attention, not sdpa"
    if counts_places(model.config):  # a window that PROBE does not reach
        return f"{kind} language models count the places of the whole row"
    if not attends_alone(model.config):
        return f"{kind} language models carry a state from token to token beside attention"
    embed = model.get_input_embeddings()
    ids = (torch.arange(sum(PROBE), device=embed.weight.device) * 7 + 1) % len(embed.weight)
    rows = [
        {"input_ids": part, "position_ids": torch.arange(len(part), device=ids.device),
         "labels": part, "branch_ids": torch.zeros_like(part), "mm_token_type_ids": part * 0}
        for part in ids.split(PROBE)
    ]  # fmt: skip
    joined = pack([rows], dict.fromkeys(rows[0], 0))

    def last(row, packed=None):  # logits of the second sample
        given = {"packed": packed} if packed else {}
        outputs = model(
            inputs_embeds=embed(row["input_ids"]), position_ids=row["position_ids"],
            attention_mask=NO_MASK if packed else None, use_cache=False, **given,
        )  # fmt: skip
        return outputs.logits[0, -PROBE[1] :].float()

    with bridge.disable_adapter():
        try:
            alone = last({key: value[None] for key, value in rows[1].items()})
            whole = torch.arange(len(ids), device=ids.device)[None]
            leaked = last(joined | {"position_ids": whole})
            model.set_attn_implementation(ATTENTION)
            packed = last(joined, joined["packed"])
            exact = (packed - alone).norm() < 0.1 * (leaked - alone).norm()  # rounding is far below
        except (ValueError, RuntimeError, IndexError, TypeError, NotImplementedError):
            exact = False
    if not exact:
        model.set_attn_implementation(before)
        return f"{kind} language models do not keep samples of one row apart"
    return None


@dataclass
class Learned:
    """Keys and values that every position sees before those of its sequence.

    Attributes:
        key, value: ``(1, H_kv, P, d)``, as attention gets them: after rotary positions.
        choose: what to take of the output ``(B, T, H * d)`` with them and, as a function, of the
            base's own, see :meth:`mmpeft.gate.Gate.choose`.
    """

    key: Tensor
    value: Tensor
    choose: Callable[[Tensor, Callable[[], Tensor]], Tensor]

    def apply(self, attend: Callable, query: Tensor, scaling: float, log_sums: Callable) -> Tensor:
        """The module's output ``(B, T, H, d)``.

        Args:
            attend: ``attend(learned)`` attends with it, or ``None``.
            query: ``(B, H, T, d)``.
            scaling: of scores.
            log_sums: of the scores that the sequence's own keys get, see :func:`_log_sums`.
        """
        adapted = attend(self)
        chosen = self.choose(adapted.flatten(2), lambda: attend(None).flatten(2))
        return chosen.unflatten(2, adapted.shape[2:])


@dataclass
class LearnedApart(Learned):
    """The same with a softmax of their own, whose output is scaled and added to the base's.

    Scores are float32 whatever the LLM's type, as in :class:`_MatrixAttention`.

    Attributes:
        scale: ``(1,)``, the factor.
    """

    scale: Tensor

    def apply(self, attend: Callable, query: Tensor, scaling: float, log_sums: Callable) -> Tensor:
        base, groups = attend(None), query.shape[1] // self.key.shape[1]
        key, value = (repeat_kv(x.to(query.dtype), groups) for x in (self.key, self.value))
        scores = _scores(query, key, scaling)  # (B, H, T, P)
        weights = torch.softmax(scores, -1) * self.scale
        added = (weights.to(query.dtype) @ value).transpose(1, 2)  # (B, T, H, d)
        added = self.choose(added.flatten(2), lambda: torch.zeros_like(added).flatten(2))
        return base + added.unflatten(2, base.shape[2:])


@dataclass
class LearnedGated(Learned):
    """The same, each key and value multiplied by a weight that depends on who looks.

    Keys that differ by query are no business of fused kernels: these attend to the sequence, and
    the learned part joins by its share of the softmax, for which the scores of the sequence are
    made once more, all ``(T, S)`` of them, in float32.

    Attributes:
        weight: ``(B, T, P)``.
    """

    weight: Tensor

    def apply(self, attend: Callable, query: Tensor, scaling: float, log_sums: Callable) -> Tensor:
        base, groups = attend(None), query.shape[1] // self.key.shape[1]
        key, value = (repeat_kv(x.to(query.dtype), groups) for x in (self.key, self.value))
        weight = self.weight[:, None].float()  # (B, 1, T, P)
        scores = _scores(query, key, scaling) * weight  # (B, H, T, P)
        shares = torch.softmax(torch.cat([log_sums()[..., None], scores], -1), -1)
        own, theirs = shares[..., :1].transpose(1, 2), shares[..., 1:] * weight
        added = (theirs.to(query.dtype) @ value).transpose(1, 2)  # (B, T, H, d)
        adapted = own.to(base.dtype) * base + added
        return self.choose(adapted.flatten(2), lambda: base.flatten(2)).unflatten(2, base.shape[2:])


class Recorder:
    """Passed as ``learned``, leaves attention as it is and keeps what each module attends to.

    Attributes:
        taken: (key, value) ``(B, H_kv, T, d)`` by attention module, in the order of the calls.
    """

    def __init__(self):
        self.taken: dict[torch.nn.Module, tuple[Tensor, Tensor]] = {}


def attention(
    module, query, key, value, attention_mask, packed: PackedRow | None = None,
    learned: Learned | Recorder | None = None, **kwargs,
):  # fmt: skip
    """As transformers calls it: ``query`` (B, H, T, d), ``key`` and ``value`` (B, H_kv, T, d)."""
    if packed is None and learned is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if given := [name for name in UNSERVED if kwargs.get(name) is not None]:
        what = "over packed rows" if learned is None else "to learned keys"
        raise NotImplementedError(f"attention {what} has no {', '.join(given)}")
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(learned: Learned | None) -> Tensor:  # (B, T, H, d)
        if packed is not None:
            return _packed_attention(query, key, value, packed, scaling, learned)
        return _attention(module, query, key, value, attention_mask, learned, **kwargs)

    def log_sums() -> Tensor:  # (B, H, T)
        if packed is not None:
            return _packed_log_sums(query, key, packed, scaling)
        return _log_sums(query, key, attention_mask, scaling)

    if isinstance(learned, Recorder):
        learned.taken[module] = key, value
        learned = None
    if learned is None:
        return attend(None), None
    return learned.apply(attend, query, scaling, log_sums), None


def _attention(module, query, key, value, mask, learned: Learned | None, **kwargs) -> Tensor:
    """transformers' ``sdpa`` with the learned keys and values in front; ``(B, T, H, d)``."""
    if learned is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    (rows, _, length, _), more = query.shape, learned.key.shape[2]
    if mask is not None:
        mask = F.pad(mask, (more, 0), value=True if mask.dtype == torch.bool else 0)
    elif length > 1:  # causal: queries of no one keep it so, and the fast kernels
        query = F.pad(query, (0, 0, more, 0))
        key, value = key[:, :, :length], value[:, :, :length]  # as sdpa cuts a static cache
    key = torch.cat([learned.key.to(key.dtype).expand(rows, -1, -1, -1), key], 2)
    value = torch.cat([learned.value.to(value.dtype).expand(rows, -1, -1, -1), value], 2)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0][:, -length:]


def _scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """``(B, H, T, S)`` in float32, of ``(B, H, T, d)`` and ``(B, H, S, d)``."""
    with maybe_autocast(query.device.type, enabled=False):
        return query.float() @ key.float().transpose(2, 3) * scaling


def _log_sums(query, key, mask, scaling: float) -> Tensor:
    """Logarithm of the softmax' denominator ``(B, H, T)`` of keys ``(B, H_kv, S, d)``.

    ``mask`` is as sdpa takes it: bool, or added; ``None`` is causal.
    """
    length = query.shape[2]
    if mask is None and length > 1:
        key = key[:, :, :length]  # as sdpa cuts a static cache
        mask = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
    scores = _scores(query, repeat_kv(key, query.shape[1] // key.shape[1]), scaling)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.logsumexp(-1)


@torch.compiler.disable  # as below
def _packed_log_sums(query, key, packed: PackedRow, scaling: float) -> Tensor:
    """The same of a packed row, ``(1, H, N)``."""
    blocks = _by_block(packed, query, key)
    return torch.cat([_log_sums(q, k, block.mask, scaling) for block, q, k in blocks], 2)


def _by_block(packed: PackedRow, query: Tensor, *seen: Tensor):
    """Each block, its queries, and of what is ``seen`` the root's part and its own."""
    lengths = [block.length for block in packed.blocks]
    # split, not slices: the gradient of each slice would be as long as the row
    parts, before = zip(*(x.split(lengths, 2) for x in (query, *seen)), strict=True), {}
    for block, (q, *own) in zip(packed.blocks, parts, strict=True):
        before[block.start] = own
        if block.root[1]:
            own = [torch.cat(x, 2) for x in zip(before[block.root[0]], own, strict=True)]
        yield block, q, *own


@torch.compiler.disable  # the number and the sizes of blocks change with every batch
def _packed_attention(
    query, key, value, packed: PackedRow, scaling: float, learned: Learned | None = None
) -> Tensor:
    """``(1, H, N, d)`` queries, ``(1, H_kv, N, d)`` keys and values to ``(1, N, H, d)``."""
    outputs = []
    for block, q, k, v in _by_block(packed, query, key, value):
        if learned is not None:
            k = torch.cat([learned.key.to(k.dtype), k], 2)
            v = torch.cat([learned.value.to(v.dtype), v], 2)
        more = 0 if learned is None else learned.key.shape[2]
        outputs.append(_attend(q, k, v, block, scaling, more))
    return torch.cat(outputs, 2).transpose(1, 2)


def _attend(query, key, value, block: Block, scaling: float, more: int) -> Tensor:
    """One block, of whose keys the first ``more`` are seen by all."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cpu" and half and block.length <= LONGEST_MATRIX:
        return _attend_by_matrix(query, key, value, block, scaling, more)
    grouped, mask = query.shape[1] != key.shape[1], block.mask
    if more and mask is None:
        query = F.pad(query, (0, 0, more, 0))  # causal, as above
    elif more:
        mask = F.pad(mask, (more, 0), value=True)
    if grouped and mask is not None:  # CUDA's kernels take one or the other
        groups, grouped = query.shape[1] // key.shape[1], False
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
        enable_gqa=grouped,
    )  # fmt: skip
    return attended[:, :, more:] if more and mask is None else attended


def _attend_by_matrix(query, key, value, block: Block, scaling: float, more: int) -> Tensor:
    """The same with the whole matrix of scores, as transformers' ``eager`` has it."""
    _, heads, length, size = query.shape
    kv_heads = key.shape[1]
    # heads that share a key lie below each other
    bias = block.bias(torch.float32, heads // kv_heads, query.device)
    if more:
        bias = F.pad(bias, (more, 0))
    q = query[0].reshape(kv_heads, -1, size)  # (H_kv, groups * t, d)
    attended = _MatrixAttention.apply(q, key[0], value[0], bias, scaling)
    return attended.view(1, heads, length, value.shape[-1])


class _MatrixAttention(torch.autograd.Function):
    """Attention in 16 bits whose scores are float32, as those of torch's fused kernels are.

    Scores of 30 rounded to bfloat16 are off by a tenth, and so are the weights made of them. What
    flows back is rounded like any other gradient. Forward and backward together take less time on
    a CPU than torch's fused kernel, whose backward is slow there.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, scaling):
        """``(H_kv, n, d)``; keys and values ``(H_kv, m, d)``, bias ``(n, m)``."""
        with torch.autocast("cpu", enabled=False):  # it would round again
            scores = torch.baddbmm(bias, query.float(), key.float().transpose(1, 2), alpha=scaling)
        weights = torch.softmax(scores, -1).to(value.dtype)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scaling = scaling
        return weights @ value

    @staticmethod
    def backward(ctx, grad):
        query, key, value, weights = ctx.saved_tensors
        of_weights = grad @ value.transpose(1, 2)  # (H_kv, n, m)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_scores *= ctx.scaling
        of_query, of_key = of_scores @ key, of_scores.transpose(1, 2) @ query
        return of_query, of_key, weights.transpose(1, 2) @ grad, None, None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
