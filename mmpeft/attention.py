"""Attention over packed rows: each sample attends to itself and to the root before it.

An attention implementation in the sense of transformers, ``ATTENTION``, put on the LLM by
:func:`serve_packed_rows`. It acts when the LLM is called with a ``packed`` row; every other call
goes to transformers' own ``sdpa``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmpeft.language_model import counts_places
from mmpeft.packing import Block, PackedRow, pack

ATTENTION = "mmpeft_packed"
# Attends to nothing, so an LLM that does not hand the packed row on to its attention fails.
NO_MASK = torch.zeros(1, 1, 0, 0, dtype=torch.bool)
UNSERVED = ("softcap", "position_bias", "s_aux", "sinks")  # what some LLMs want of attention
PROBE = (24, 4)  # tokens of two samples; windows and chunks of an LLM are longer
LONGEST_MATRIX = 1024  # positions of a block up to which its whole attention matrix is made


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


def attention(module, query, key, value, attention_mask, packed: PackedRow | None = None, **kwargs):
    """As transformers calls it: ``query`` (B, H, T, d), ``key`` and ``value`` (B, H_kv, T, d)."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if given := [name for name in UNSERVED if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention over packed rows has no {', '.join(given)}")
    return _packed_attention(query, key, value, packed, kwargs.get("scaling")), None


@torch.compiler.disable  # the number and the sizes of blocks change with every batch
def _packed_attention(query, key, value, packed: PackedRow, scaling: float | None) -> Tensor:
    """``(1, H, N, d)`` queries, ``(1, H_kv, N, d)`` keys and values to ``(1, N, H, d)``."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = [block.length for block in packed.blocks]
    # split, not slices: the gradient of each slice would be as long as the row
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    outputs, before = [], {}
    for block, (q, k, v) in zip(packed.blocks, parts, strict=True):
        before[block.start] = k, v
        if block.root[1]:
            k, v = (torch.cat(x, 2) for x in zip(before[block.root[0]], (k, v), strict=True))
        outputs.append(_attend(q, k, v, block, scaling))
    return torch.cat(outputs, 2).transpose(1, 2)


def _attend(query, key, value, block: Block, scaling: float) -> Tensor:
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cpu" and half and block.length <= LONGEST_MATRIX:
        return _attend_by_matrix(query, key, value, block, scaling)
    grouped = query.shape[1] != key.shape[1]
    if grouped and block.mask is not None:  # CUDA's kernels take one or the other
        groups, grouped = query.shape[1] // key.shape[1], False
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=block.mask, is_causal=block.mask is None, scale=scaling,
        enable_gqa=grouped,
    )  # fmt: skip


def _attend_by_matrix(query, key, value, block: Block, scaling: float) -> Tensor:
    """The same with the whole matrix of scores, as transformers' ``eager`` has it.

    Forward and backward together take half the time of torch's fused kernel on a CPU, whose
    backward in bfloat16 is slow.
    """
    _, heads, length, size = query.shape
    kv_heads = key.shape[1]
    # heads that share a key lie below each other
    bias = block.bias(query.dtype, heads // kv_heads, query.device)
    q = query[0].reshape(kv_heads, -1, size)  # (H_kv, groups * t, d)
    scores = torch.baddbmm(bias, q, key[0].transpose(1, 2), alpha=scaling)
    attended = torch.softmax(scores, -1) @ value[0]
    return attended.view(1, heads, length, size)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
