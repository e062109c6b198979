"""ProPELT: one prototype adapter for all layers, and a mask for each (arXiv 2305.17682)."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from mmpeft.tuners.adding import AddingLayer, AddingOptions, activation, bottleneck, down_start
from mmpeft.tuners.base import Kept, Tuner, register
from mmpeft.tuners.sublayers import Kind, find_outputs, hidden_size, sizes


@dataclass
class ProPELTConfig(AddingOptions, PeftConfig):
    """A prototype that all layers share, of which each uses the weights its own mask keeps.

    Masks are the ``share`` of largest scores by size, and scores learn through them as if they
    were the mask (Zeng et al. 2023, section 3). Each place in a layer (after attention, after the
    FFN, a query projection) has a prototype; biases are shared as they are. The up-projection
    starts at 0, so the adapter is the identity.

    Further options are those of :class:`~mmpeft.tuners.adding.AddingOptions`.

    Attributes:
        kind: ``adapter``, a bottleneck on the output of ``sublayers``; or ``lora``, beside linear
            layers.
        share: of a prototype's weights that each mask keeps.
    """

    method: ClassVar[str] = "MMPEFT_PROPELT"

    kind: Literal["adapter", "lora"] = "adapter"
    share: float = 0.5
    sublayers: list[Kind] = field(default_factory=lambda: ["ffn"])

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"ProPELTConfig: share is {self.share}; it must lie in (0, 1].")


def top_mask(scores: Tensor, share: float) -> Tensor:
    """1 at the ``share`` of largest scores by size, else 0; its gradient is that of the sizes."""
    size = scores.abs().flatten()
    kept = size.detach().topk(max(1, round(share * len(size)))).indices
    mask = torch.zeros_like(size).scatter(0, kept, 1.0)
    return (mask + (size - size.detach())).view_as(scores)


class ProPELTLayer(AddingLayer):
    """A module of the LLM and its masks of the prototype."""

    adapter_layer_names = ("propelt_down_scores", "propelt_up_scores", "propelt_dropout")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: ProPELTConfig,
        prototypes: nn.ModuleDict, place: str,
    ):  # fmt: skip
        super().__init__(base_layer, adapter_name)
        self.share, self.scaling, self.place = config.share, config.scaling, place
        self.activation = activation(config) if config.kind == "adapter" else None
        self.reads = "input" if config.kind == "lora" else "output"
        self._shared = (prototypes,)  # not a part of this module: it is the tuner's
        self._masked = Kept()
        down, up = (prototypes[adapter_name][f"{place}_{side}"] for side in ("down", "up"))
        for name, like in (("propelt_down_scores", down), ("propelt_up_scores", up)):
            scores = nn.Parameter(down_start(*like.shape))
            setattr(self, name, nn.ParameterDict({adapter_name: scores}))
        self.propelt_dropout = nn.ModuleDict({adapter_name: nn.Dropout(config.dropout)})

    def masks(self) -> tuple[Tensor, Tensor]:
        """Of the down-projection ``(r, in)`` and of the up-projection ``(out, r)``."""
        down = self.propelt_down_scores[self.adapter_name]
        return top_mask(down, self.share), top_mask(
            self.propelt_up_scores[self.adapter_name], self.share
        )

    def weights(self) -> tuple[Tensor, Tensor]:
        """The masked down- and up-projection."""
        prototype, name = self._shared[0][self.adapter_name], self.adapter_name
        down, up = prototype[f"{self.place}_down"], prototype[f"{self.place}_up"]
        sources = down, up, self.propelt_down_scores[name], self.propelt_up_scores[name]
        return self._masked.get(sources, lambda: tuple(map(torch.mul, (down, up), self.masks())))

    def contribution(self, x: Tensor) -> Tensor:
        """``(B, T, in or out)`` to ``(B, T, out)``."""
        prototype = self._shared[0][self.adapter_name]
        down, up = self.weights()
        x = self.propelt_dropout[self.adapter_name](self._cast_input_dtype(x, down.dtype))
        if self.activation is None:
            return F.linear(F.linear(x, down), up) * self.scaling
        biases = prototype[f"{self.place}_down_bias"], prototype[f"{self.place}_up_bias"]
        return bottleneck(x, down, up, self.activation, *biases) * self.scaling


class ProPELTModel(Tuner):
    """ProPELT on a language model.

    Attributes:
        propelt_prototype: by adapter name, the prototypes' weights by place.
    """

    prefix = "propelt_"
    tuner_layer_cls = ProPELTLayer
    uses_shared_state = True

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: ProPELTConfig) -> list[str]:
        """The sublayers' output layers, or LoRA's targets."""
        if config.kind == "lora":
            return super().find_targets(language_model, config)
        return find_outputs(language_model, config)

    def _pre_injection_hook(self, model, config, adapter_name) -> None:
        self.propelt_prototype = nn.ModuleDict({adapter_name: nn.ParameterDict()})

    def wrap(self, module, adapter_name, config, path) -> ProPELTLayer:
        """The module with its masks; makes the prototype of its place if it is the first there.

        Raises:
            ValueError: the prototype has another shape.
        """
        place = re.split(r"\.\d+\.", path)[-1].replace(".", "_")
        into, out = sizes(module, hidden_size(self.model))
        read, size = (into if config.kind == "lora" else out), config.bottleneck_size
        prototype = self.propelt_prototype[adapter_name]
        if f"{place}_down" not in prototype:
            start = {"down": down_start(size, read), "up": torch.zeros(out, size)}
            if config.kind == "adapter":
                start |= {"down_bias": torch.zeros(size), "up_bias": torch.zeros(out)}
            device = next(module.parameters()).device
            for name, value in start.items():
                prototype[f"{place}_{name}"] = nn.Parameter(value.to(device))
        down, up = prototype[f"{place}_down"], prototype[f"{place}_up"]
        if (down.shape[1], up.shape[0]) != (read, out):
            raise ValueError(
                f"ProPELTConfig: {path} is {read} by {out}, but the layers before it are "
                f"{down.shape[1]} by {up.shape[0]} and cannot share with it; leave it out of "
                "target_modules."
            )
        return ProPELTLayer(module, adapter_name, config, self.propelt_prototype, place)


register(ProPELTConfig, ProPELTModel)
