"""Bottleneck adapters: serial (Houlsby et al. 2019) and parallel (He et al. 2022)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from peft import PeftConfig
from torch import Tensor, nn

from mmpeft.tuners.adding import AddingLayer, AddingOptions, activation, bottleneck
from mmpeft.tuners.base import Tuner, register
from mmpeft.tuners.sublayers import (
    find_outputs,
    find_sublayers,
    hidden_size,
    named_modules,
    sizes,
)


@dataclass
class BottleneckConfig(AddingOptions, PeftConfig):
    """Two small layers with an activation between, in every layer of the LLM.

    ``serial`` reads what the sublayer gives, before it is added to the residual (arXiv 1902.00751,
    section 2.1, which trains the norms, too: they stay frozen here). With ``sublayers: [ffn]`` it
    has the places of Pfeiffer et al. (arXiv 2005.00247), whose adapters read the residual as well.
    ``parallel`` reads what the sublayer reads (arXiv 2110.04366, section 3.3; the paper's best has
    ``sublayers: [ffn]`` and ``scaling: 4``). The up-projection starts at 0, so the adapter is the
    identity.

    Further options are those of :class:`~mmpeft.tuners.adding.AddingOptions`.

    Attributes:
        placement: ``serial`` or ``parallel``.
        target_modules: modules to put one on instead of those of ``sublayers``: such as return
            (B, T, D), and for ``parallel`` read it as their first argument.
    """

    method: ClassVar[str] = "MMPEFT_BOTTLENECK"

    placement: Literal["serial", "parallel"] = "serial"


class BottleneckLayer(AddingLayer):
    """A module and the bottleneck on its output, or beside it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_dropout")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, hidden: int
    ):
        super().__init__(base_layer, adapter_name)
        self.reads = "output" if config.placement == "serial" else "input"
        self.activation, self.scaling = activation(config), config.scaling
        into, out = sizes(base_layer, hidden)
        down = nn.Linear(out if self.reads == "output" else into, config.bottleneck_size)
        up = nn.Linear(config.bottleneck_size, out)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down = nn.ModuleDict({adapter_name: down})
        self.bottleneck_up = nn.ModuleDict({adapter_name: up})
        self.bottleneck_dropout = nn.ModuleDict({adapter_name: nn.Dropout(config.dropout)})

    def contribution(self, x: Tensor) -> Tensor:
        """``(B, T, in or out)`` to ``(B, T, out)``."""
        down, up = self.bottleneck_down[self.adapter_name], self.bottleneck_up[self.adapter_name]
        x = self.bottleneck_dropout[self.adapter_name](self._cast_input_dtype(x, down.weight.dtype))
        weights = down.weight, up.weight, self.activation, down.bias, up.bias
        return bottleneck(x, *weights) * self.scaling


class BottleneckModel(Tuner):
    """Bottleneck adapters on a language model."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: BottleneckConfig) -> list[str]:
        """The sublayers' output layers, or for ``parallel`` the sublayers.

        Raises:
            ValueError: they cannot be told, or one is no module of its own.
        """
        if config.placement == "serial":
            return find_outputs(language_model, config)
        if config.target_modules is not None:
            return named_modules(language_model, config.target_modules)
        chosen = [s for s in find_sublayers(language_model) if s.kind in config.sublayers]
        if missing := next((s for s in chosen if s.module is None), None):
            raise ValueError(
                f"BottleneckConfig: the {missing.kind} of {language_model.config.model_type} is no "
                "module that an adapter can stand beside; set placement: serial, or leave it out "
                "of sublayers."
            )
        return [sublayer.module for sublayer in chosen]

    def wrap(self, module, adapter_name, config, path) -> BottleneckLayer:
        """The module with its bottleneck."""
        return BottleneckLayer(module, adapter_name, config, hidden_size(self.model))


register(BottleneckConfig, BottleneckModel)
