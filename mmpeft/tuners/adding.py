"""Layers that add to a module's output what they make of its input or its output."""

from dataclasses import MISSING, dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from mmpeft.tuners.base import Layer
from mmpeft.tuners.options import check_options
from mmpeft.tuners.sublayers import Kind


@dataclass
class AddingOptions:
    """What the configs of these methods have in common, before ``PeftConfig`` among their bases.

    Attributes:
        bottleneck_size: width of a bottleneck; the rank, where one is a LoRA.
        sublayers: which of ``attention`` and ``ffn`` have a bottleneck.
        activation: of a bottleneck, by transformers' name.
        scaling: of what is added.
        dropout: on what is read.
        target_modules: modules to adapt: instead of ``sublayers``, or as for LoRA.
    """

    bottleneck_size: int = 64
    sublayers: list[Kind] = field(default_factory=lambda: ["attention", "ffn"])
    activation: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method
        check_options(self, bottleneck_size=1)
        activation(self)
        _refuse_beside_lora(self)
        unknown = [name for name in self.sublayers if name not in ("attention", "ffn")]
        if unknown or not self.sublayers:
            raise ValueError(
                f"{type(self).__name__}: sublayers is {self.sublayers}; "
                "choose attention, ffn or both."
            )


def _refuse_beside_lora(config: AddingOptions) -> None:
    """Raise ValueError if ``kind`` is ``lora`` and an option of bottlenecks is set."""
    if getattr(config, "kind", None) != "lora":
        return
    for option in fields(config):
        plain = option.default if option.default is not MISSING else option.default_factory()
        if option.name in ("sublayers", "activation") and getattr(config, option.name) != plain:
            raise ValueError(
                f"{type(config).__name__}: {option.name} is of bottlenecks, and kind is lora; "
                f"leave {option.name} out, or set kind to another."
            )


class AddingLayer(Layer):
    """A module of the LLM and what is added to its output.

    The module may return a tuple, whose first entry is then its output, and is called once.

    Attributes:
        reads: ``input`` or ``output`` of the module, what :meth:`contribution` is made of.
    """

    reads = "output"

    def contribution(self, x: Tensor) -> Tensor:
        """``(B, T, in)``, or ``(B, T, out)`` where the output is read, to ``(B, T, out)``."""
        raise NotImplementedError

    def forward(self, *args, **kwargs):
        """As the module, with what is added."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        own = output[0] if isinstance(output, tuple) else output
        read = own if self.reads == "output" else self._given(args, kwargs)
        added = self.close(self.contribution(read))
        adapted = (own + added).to(own.dtype)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

    def _given(self, args: tuple, kwargs: dict) -> Tensor:
        if not args and "hidden_states" not in kwargs:
            name, names = type(self.base_layer).__name__, ", ".join(kwargs) or "nothing"
            raise ValueError(
                f"{name} is called with {names}; "
                "what an adapter reads must come first or be named hidden_states. Leave it out of "
                "target_modules."
            )
        return args[0] if args else kwargs["hidden_states"]


def bottleneck(
    x: Tensor, down: Tensor, up: Tensor, activation, down_bias: Tensor, up_bias: Tensor
) -> Tensor:
    """``(..., in)`` through weights ``(r, in)`` and ``(out, r)``, and their biases."""
    return F.linear(activation(F.linear(x, down, down_bias)), up, up_bias)


def activation(config):
    """The function that ``config.activation`` names.

    Raises:
        ValueError: transformers has none of this name.
    """
    if config.activation not in ACT2FN:
        raise ValueError(
            f"{type(config).__name__}: activation {config.activation!r} is unknown; choose one of "
            f"{', '.join(ACT2FN)}."
        )
    return ACT2FN[config.activation]


def down_start(*shape: int) -> Tensor:
    """Weights ``(..., r, in)`` as peft starts LoRA's A."""
    weight = torch.empty(*shape)
    bound = shape[-1] ** -0.5  # kaiming uniform with a = sqrt(5)
    return weight.uniform_(-bound, bound)
