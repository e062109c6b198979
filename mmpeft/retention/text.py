"""How the two sides predict running prose: bits per byte, token KL and top-1 agreement."""

import hashlib
import math

import numpy as np
import torch
from torch.nn.functional import log_softmax
from tqdm import tqdm

from mmpeft.language_model import context_length
from mmpeft.retention.sides import RetentionError, Sides, paired_logits, positions, start_token

PROSE_TOKENS = 16384
CHUNK = 128  # positions whose log-probabilities (CHUNK, V) are held in float32 at a time


def embedded_text() -> str:
    """The prose that comes with Python: the language reference behind `help()`.

    It differs between Python versions, which is why the report carries its hash.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RetentionError(
            "this Python does not ship pydoc_data.topics: pass the prose to measure on as text=..."
        ) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def compare_text(
    sides: Sides, text: str, *, max_tokens: int = PROSE_TOKENS, window: int = 512,
    batch_size: int = 2,
) -> dict:  # fmt: skip
    """Base and bridge on the first `max_tokens` tokens of `text`.

    The tokens are cut into windows of `window` inputs, each opened by the start token; every token
    is predicted exactly once. Log-probabilities are float32 and KL is in nats per token, base
    relative to bridge, also as a mean over each sixteenth of the window.

    Returns `bits_per_byte`, `kl`, `top1_agreement`, `max_abs_dlogit` and `source`.
    """
    tokenizer = sides.tokenizer
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = coded["input_ids"][:max_tokens]
    if not ids:
        raise RetentionError("the text to measure on is empty")
    scored = text[: coded["offset_mapping"][len(ids) - 1][1]]
    window = min(window, context_length(sides.text_config("base")) or window)
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    opening = start_token(tokenizer)

    # the last window may be shorter; alone in its batch it needs no padding
    full = len(windows) if len(windows[-1]) == window else len(windows) - 1
    groups = [windows[i : min(i + batch_size, full)] for i in range(0, full, batch_size)]
    groups += [[rest] for rest in windows[full:]]
    batches = [_batch(group, opening) for group in groups]

    nats = {"base": 0.0, "bridge": 0.0}
    kl, agree, most = [], 0, 0.0
    bar = tqdm(total=len(ids), desc="prose", unit="token", leave=False)
    for group, (base, bridge) in zip(groups, paired_logits(sides, batches, "prose"), strict=True):
        targets = torch.tensor(group, device=base.device)
        for p_rows, q_rows, answers in zip(
            base.flatten(0, 1).split(CHUNK),
            bridge.flatten(0, 1).split(CHUNK),
            targets.flatten().split(CHUNK),
            strict=True,
        ):
            p, q = p_rows.float(), q_rows.float()
            most = max(most, (q - p).abs().max().item())
            agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
            p, q = log_softmax(p, -1), log_softmax(q, -1)
            nats["base"] -= p.gather(1, answers[:, None]).double().sum().item()
            nats["bridge"] -= q.gather(1, answers[:, None]).double().sum().item()
            # rounding can leave a divergence a hair below its bound of 0
            kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0).cpu().numpy())
        bar.update(targets.numel())
    bar.close()
    places = np.concatenate([np.arange(len(row)) for group in groups for row in group])
    kl = np.concatenate(kl)
    size = len(scored.encode("utf-8"))
    return {
        "bits_per_byte": {name: total / math.log(2) / size for name, total in nats.items()},
        "kl": {
            "mean": float(kl.mean()),
            "p95": float(np.percentile(kl, 95)),
            "max": float(kl.max()),
            "by_position": _by_position(kl, places, window),
        },
        "top1_agreement": agree / len(ids),
        "max_abs_dlogit": most,
        "source": {
            "sha256": hashlib.sha256(scored.encode("utf-8")).hexdigest(),
            "tokens": len(ids),
            "bytes": size,
            "window": window,
        },
    }


def _batch(group: list[list[int]], opening: int) -> dict[str, torch.Tensor]:
    """Inputs (B, T) that predict the tokens of `group`."""
    inputs = torch.tensor(group).roll(1, dims=1)
    inputs[:, 0] = opening
    mask = torch.ones_like(inputs)
    return {"input_ids": inputs, "attention_mask": mask, "position_ids": positions(mask)}


def _by_position(kl: np.ndarray, places: np.ndarray, window: int) -> list[dict]:
    """Mean divergence by the number of tokens already read."""
    step = max(1, window // 16)
    parts = [(low, kl[(places >= low) & (places < low + step)]) for low in range(0, window, step)]
    return [{"from": low, "to": low + step, "mean": float(part.mean())}
            for low, part in parts if len(part)]  # fmt: skip
