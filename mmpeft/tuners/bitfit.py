"""BitFit: training the biases alone (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from mmpeft.targets import resolve_targets
from mmpeft.tuners.base import register
from mmpeft.tuners.merging import MergingLayer, MergingTuner
from mmpeft.tuners.sublayers import LINEAR

CONVOLUTION = (nn.Conv1d, nn.Conv2d)


@dataclass
class BitFitConfig(PeftConfig):
    """The biases of linear layers and norms, as changes that are added to them.

    All of the LLM's but that of the vocabulary projection. The changes start at 0.

    Attributes:
        add_biases: give linear layers that have none a bias of 0 to train.
        target_modules: names of the modules whose biases train; ``None`` is all.
    """

    method: ClassVar[str] = "MMPEFT_BITFIT"

    add_biases: bool = False
    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method


class BitFitLayer(MergingLayer):
    """A module and the change of its bias."""

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BitFitConfig):
        super().__init__(base_layer, adapter_name)
        bias = base_layer.bias
        size = _get_in_out_features(base_layer)[1] if bias is None else len(bias)
        self.bitfit_bias = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(size))})

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """``(B, T, in)`` to ``(B, T, out)``."""
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        if not isinstance(output, Tensor) or isinstance(self.base_layer, CONVOLUTION):
            # routers give more than scores, and the channels of a convolution do not come last
            return self.with_adapted_parameters(x, *args, **kwargs)
        change = self.bitfit_bias[self.adapter_name].expand(output.shape)
        return (output + self.close(change, self.tokens)).to(output.dtype)

    def adapted_parameters(self) -> dict[str, Tensor]:
        """The bias."""
        own, weight = self.base_layer.bias, self.base_layer.weight
        change = self.bitfit_bias[self.adapter_name]
        return {"bias": (change if own is None else own + change).to(weight.dtype)}


class BitFitModel(MergingTuner):
    """BitFit on a language model."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: BitFitConfig) -> list[str]:
        """Modules with a bias, and with ``add_biases`` all linear layers.

        Raises:
            ValueError: there are none.
        """

        def serves(module: nn.Module) -> bool:
            own = isinstance(getattr(module, "bias", None), nn.Parameter)
            return own or (config.add_biases and isinstance(module, LINEAR))

        head = language_model.get_output_embeddings()
        if not any(serves(module) for module in language_model.modules() if module is not head):
            raise ValueError(
                f"BitFitConfig: this {language_model.config.model_type} language model has no "
                "biases to train; set add_biases: true, which gives its linear layers biases of 0."
            )
        targets = ".*" if config.target_modules is None else config.target_modules
        return resolve_targets(language_model, targets, kind=serves)


register(BitFitConfig, BitFitModel)
