"""Full and partial fine-tuning, the upper baseline, with the base kept beside it."""

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftConfig
from torch import Tensor, nn

from mmpeft.targets import resolve_targets
from mmpeft.tuners.base import register
from mmpeft.tuners.merging import MergingLayer, MergingTuner
from mmpeft.tuners.sublayers import LINEAR, decoder_layers


@dataclass
class FullTuningConfig(PeftConfig):
    """All weights of the LLM's layers and norms train, as copies that start at the LLM's own.

    Not the embeddings, what projects them, nor the vocabulary projection. The copies are float32
    whatever the LLM's type, and are what a checkpoint holds. The LLM computes in its own type.

    Attributes:
        target_modules: names of the modules that train; ``None`` is all of the above.
    """

    method: ClassVar[str] = "MMPEFT_FULL"

    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method


class FullTuningLayer(MergingLayer):
    """A linear layer or a norm, and trained copies of its parameters."""

    adapter_layer_names = ("full_parameters",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FullTuningConfig):
        super().__init__(base_layer, adapter_name)
        copies = nn.ParameterDict()
        for name, parameter in base_layer.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"FullTuningConfig: {name} is {parameter.dtype}, which cannot train; load the "
                    "language model unquantised."
                )
            copies[name] = nn.Parameter(parameter.detach().float().clone())
        self.full_parameters = nn.ModuleDict({adapter_name: copies})

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """``(B, T, in)`` to ``(B, T, out)``."""
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self.with_adapted_parameters(x, *args, **kwargs)

    def adapted_parameters(self) -> dict[str, Tensor]:
        """The copies, in the LLM's type."""
        own = dict(self.base_layer.named_parameters())
        copies = self.full_parameters[self.adapter_name]
        return {name: copy.to(own[name].dtype) for name, copy in copies.items()}


class FullTuningModel(MergingTuner):
    """Full fine-tuning of a language model."""

    prefix = "full_"
    tuner_layer_cls = FullTuningLayer

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: FullTuningConfig) -> list[str]:
        """The linear layers inside the LLM's layers, and its norms, or those of them asked for.

        Raises:
            ValueError: a name fits none.
        """
        inside = {
            id(m) for layer in decoder_layers(language_model).values() for m in layer.modules()
        }

        def serves(module: nn.Module) -> bool:
            parameters = len(list(module.parameters(recurse=False)))
            if not parameters or parameters != len(list(module.parameters())):
                return False  # none, or some in modules of its own
            if isinstance(module, nn.Embedding):
                return False
            return not isinstance(module, LINEAR) or id(module) in inside

        targets = ".*" if config.target_modules is None else config.target_modules
        return resolve_targets(language_model, targets, kind=serves)


register(FullTuningConfig, FullTuningModel)
