"""A loss or gradient that is no number: training stops, and the rows that gave it are kept.

Nothing that was made of it reaches a weight, so the checkpoint before is intact.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mmpeft import durable

SCHEMA = "mmpeft.nonfinite/1"
KEPT = ("input_ids", "labels", "mm_token_type_ids")


class NonFinite(ValueError):
    """What a batch gave is no number.

    Args:
        what: ``loss`` or ``gradient``.
        value: nan or an infinity.
        rows: of the batch, as :class:`KeepRows` keeps them.
    """

    def __init__(self, what: str, value: float, rows: list[dict]):
        super().__init__(f"the {what} is {value}")
        self.what, self.value, self.rows = what, value, rows


class KeepRows:
    """A collator whose batches also name their rows and hold their tokens, under ``rows``."""

    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, samples: list[dict]) -> dict:
        rows = [
            {"where": sample["where"]} | {name: np.asarray(sample[name]) for name in KEPT}
            for sample in samples
        ]
        return self.collate(samples) | {"rows": rows}


def report(found: NonFinite, model, tokenizer, stage: str, step: int, path: Path) -> None:
    """Write the rows to ``path`` for inspection; see ``docs/json.md``.

    Args:
        step: the optimizer step that would have been made, from 1.
    """
    weights = (p for p in model.parameters() if p.requires_grad)
    body = {
        "schema": SCHEMA,
        "stage": stage,
        "step": step,
        "what": found.what,
        "value": str(found.value),
        "weights_finite": all(bool(torch.isfinite(weight).all()) for weight in weights),
        "rows": [_readable(row, tokenizer) for row in found.rows],
    }
    durable.write(path, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def _readable(row: dict, tokenizer) -> dict:
    ids, labels, is_image = (row[name] for name in KEPT)
    return {
        "where": row["where"],
        "tokens": len(ids),
        "image_tokens": int((is_image == 1).sum()),
        "learned_tokens": int((labels != -100).sum()),
        "text": tokenizer.decode(ids[is_image != 1].tolist()),
        "learned_text": tokenizer.decode(labels[labels != -100].tolist()),
        "input_ids": ids.tolist(),
        "labels": labels.tolist(),
    }
