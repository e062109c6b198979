"""The adapter scaled after training, from 0, the base LLM, over 1, as it was trained, and beyond.

Scaling LoRA by s is the interpolation between base and tuned weights, W + s BA (WiSE-FT, Wortsman
et al. 2022, arXiv 2109.01903, section 3); full tuning and BitFit are scaled in that way, too. Other
adapters are scaled at the output of the layers they are on, base + s (adapted - base): for a linear
layer that is the same interpolation. The connector stays as it was trained.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmpeft.tuners.attention_base import AttentionLayer
from mmpeft.tuners.base import Layer
from mmpeft.tuners.merging import MergingLayer


def scalable_layers(language_model: nn.Module) -> list[BaseTunerLayer]:
    """The adapter's layers.

    Raises:
        ValueError: there are none, or they change what attention looks at, of which there is no
            part to scale.
    """
    layers = [m for m in language_model.modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ValueError("the dial scales an adapter, and there is none; leave the scale out.")
    if any(isinstance(layer, AttentionLayer) and layer.shares_softmax for layer in layers):
        name = type(language_model.active_peft_config).__name__
        raise ValueError(
            f"the dial cannot scale {name}: its learned keys and values share a softmax with the "
            "text's; leave the scale out, or train an adapter of layers, for example LoraConfig."
        )
    return layers


def scale_of(language_model: nn.Module) -> float:
    """The adapter's scale; 1 where there is no adapter."""
    layers = (m for m in language_model.modules() if isinstance(m, BaseTunerLayer))
    return next((getattr(layer, "dial", 1.0) for layer in layers), 1.0)


def set_scale(language_model: nn.Module, scale: float) -> None:
    """Scale what the adapter does; the scale before counts no more.

    Raises:
        ValueError: the scale is below 0 or not finite, or the adapter cannot be scaled.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"the scale of an adapter is {scale}; use 0 or more, 1 is as trained.")
    for layer in scalable_layers(language_model):
        if _adds(layer):
            trained = vars(layer).pop("scaling_as_trained", layer.scaling)
            layer.scaling = trained
            if scale != 1:
                layer.scaling_as_trained = trained
                layer.scaling = {name: scale * own for name, own in trained.items()}
        elif not isinstance(layer, Layer):  # ours do it themselves
            if hook := vars(layer).pop("dial_hook", None):
                hook.remove()
            if scale != 1:
                layer.dial_hook = layer.register_forward_hook(_interpolate, with_kwargs=True)
        layer.dial = scale


@contextmanager
def scaled(language_model: nn.Module, scale: float) -> Iterator[None]:
    """Inside, the adapter has this scale.

    Raises:
        ValueError: as :func:`set_scale`.
    """
    before = scale_of(language_model)
    set_scale(language_model, scale)
    try:
        yield
    finally:
        set_scale(language_model, before)


def require_mergeable(language_model: nn.Module) -> None:
    """Raise ValueError if peft would merge layers as they were trained, though scaled."""
    if scale_of(language_model) == 1:
        return
    for layer in scalable_layers(language_model):
        if not isinstance(layer, MergingLayer) and not _adds(layer):
            name = type(language_model.active_peft_config).__name__
            raise ValueError(
                f"the adapter has scale {scale_of(language_model):g}, at which {name} cannot be "
                "merged; keep it beside the LLM, or set the scale to 1."
            )


def _adds(layer: BaseTunerLayer) -> bool:
    """Whether it is LoRA, and what it adds is in proportion to its ``scaling``."""
    from mmpeft.starts import KeptStart  # which imports the model

    return isinstance(layer, LoraLayer) and all(
        isinstance(variant, KeptStart) for variant in layer.lora_variant.values()
    )


def _interpolate(layer, args, kwargs, output: Tensor) -> Tensor:
    if layer.disable_adapters:
        return output
    base = layer.base_layer(*args, **kwargs)
    return base + layer.dial * (output - base)
