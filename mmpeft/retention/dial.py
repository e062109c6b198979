"""The dial: the adapter scaled after training, vision score against text retention."""

import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mmpeft.adapter_scale import scalable_layers, scaled
from mmpeft.evaluate import score_rows
from mmpeft.retention.compare import compare_sides
from mmpeft.retention.modes import Exchange
from mmpeft.retention.sides import BridgeSides
from mmpeft.retention.statistics import MARGIN
from mmpeft.retention.store import Store
from mmpeft.retention.suite import Suite

KEPT = ("n", "base", "bridge", "delta", "ci95", "verdict")
VISION_SAMPLES = 200


def turn(
    model,
    processor,
    task,
    scales: Sequence[float],
    suite: Suite,
    exchanges: dict[str, list[Exchange]],
    *,
    seed: int = 0,
    margin: float = MARGIN,
    vision_samples: int = VISION_SAMPLES,
    cache: Path | None = None,
) -> dict:
    """Vision score and text retention at each scale of the adapter.

    Only tasks scored by likelihood are asked. `largest_retained` is the largest scale whose verdict
    is "retained" in every mode measured; verdicts of different scales are not corrected for their
    number.

    Returns:
        `{"vision_task", "points": [{"scale", "vision", "modes"}], "largest_retained"}`.

    Raises:
        ValueError: no scales, one below 0, or an adapter that cannot be scaled.
    """
    check_scales(scales)
    scalable_layers(model.language_model)
    stores = {"base": Store(cache, BridgeSides(model, processor).setting("base"))}
    points = []
    for scale in tqdm(sorted(set(scales)), desc="dial", unit="scale"):
        with scaled(model.language_model, float(scale)):
            vision = score_rows(model, processor, task, samples=vision_samples, seed=seed)
            found = compare_sides(
                BridgeSides(model, processor), suite, exchanges, margin=margin, generated=False,
                control=False, cache=cache, stores=stores,
            )  # fmt: skip
        modes = {mode: body["overall"] and {key: body["overall"][key] for key in KEPT}
                 for mode, body in found.modes.items()}  # fmt: skip
        points.append({"scale": float(scale), "vision": vision, "modes": modes})
    kept = [point["scale"] for point in points if _retained(point["modes"])]
    return {
        "vision_task": task.name,
        "points": points,
        "largest_retained": max(kept, default=None),
    }


def _retained(modes: dict) -> bool:
    return all(body is not None and body["verdict"] == "retained" for body in modes.values())


def check_scales(scales: Sequence[float]) -> None:
    """Raise ValueError unless there are scales, all of them finite and 0 or more."""
    if not scales or not all(0 <= scale < math.inf for scale in scales):
        raise ValueError(f"--scales {list(scales)}: give scales of 0 or more, for example 0,0.5,1")
