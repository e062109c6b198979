"""The dial: the adapter scaled after training, vision score against text retention.

Scaling LoRA by s is the interpolation between base and tuned weights, W + s BA (WiSE-FT, Wortsman
et al. 2022, arXiv 2109.01903, section 3). Other adapters are scaled at the output of the layers
they are on, base + s (adapted - base): for a linear layer that is the same interpolation. The
connector stays as it was trained.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm

from mmpeft.evaluate import score_rows
from mmpeft.retention.compare import compare_sides
from mmpeft.retention.modes import Exchange
from mmpeft.retention.sides import BridgeSides
from mmpeft.retention.statistics import MARGIN
from mmpeft.retention.store import Store
from mmpeft.retention.suite import Suite
from mmpeft.starts import KeptStart
from mmpeft.tuners.attention_base import AttentionLayer
from mmpeft.tuners.base import Layer

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


def scalable_layers(language_model: nn.Module) -> list[BaseTunerLayer]:
    """The adapter's layers.

    Raises:
        ValueError: there are none, or they change what attention looks at, of which there is no
            part to scale.
    """
    layers = [m for m in language_model.modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ValueError("the dial scales an adapter, and there is none; leave --scales out.")
    if any(isinstance(layer, AttentionLayer) and layer.shares_softmax for layer in layers):
        name = type(language_model.active_peft_config).__name__
        raise ValueError(
            f"the dial cannot scale {name}: its learned keys and values share a softmax with the "
            "text's; leave --scales out, or train an adapter of layers, for example LoraConfig."
        )
    return layers


@contextmanager
def scaled(language_model: nn.Module, scale: float) -> Iterator[None]:
    """Inside, what the adapter does is scaled; 0 is the base, 1 the adapter as it was trained.

    Raises:
        ValueError: the adapter cannot be scaled.
    """
    with ExitStack() as stack:
        for layer in scalable_layers(language_model):
            if isinstance(layer, LoraLayer) and _adds(layer):
                stack.callback(setattr, layer, "scaling", layer.scaling)
                layer.scaling = {name: scale * own for name, own in layer.scaling.items()}
                continue
            layer.dial = scale
            stack.callback(delattr, layer, "dial")
            if not isinstance(layer, Layer):  # ours do it themselves
                stack.callback(layer.register_forward_hook(_interpolate, with_kwargs=True).remove)
        yield


def _adds(layer: LoraLayer) -> bool:
    """Whether what the layer adds is in proportion to its ``scaling``."""
    return all(isinstance(variant, KeptStart) for variant in layer.lora_variant.values())


def _interpolate(layer, args, kwargs, output: Tensor) -> Tensor:
    if layer.disable_adapters or layer.dial == 1:
        return output
    base = layer.base_layer(*args, **kwargs)
    return base + layer.dial * (output - base)
