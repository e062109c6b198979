"""The mix-and-match adapter, MAM (He et al. 2022, arXiv 2110.04366, section 4.6)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.tuners.attention_base import all_of, find_attention
from mmpeft.tuners.base import register
from mmpeft.tuners.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel
from mmpeft.tuners.prefix import PrefixConfig, PrefixModel
from mmpeft.tuners.sublayers import hidden_size


@dataclass
class MAMConfig(PrefixConfig):
    """Short prefixes in attention and a scaled bottleneck beside every FFN.

    The prefix is no identity at the start, see :class:`~mmpeft.tuners.prefix.PrefixConfig`, whose
    options serve here (the paper's is made by a network: set ``hidden_size``); the bottleneck is.

    Attributes:
        num_virtual_tokens: of the prefix, l of the paper.
        bottleneck_size: width of the bottleneck, r of the paper.
        scaling: of what the bottleneck adds.
        activation: of the bottleneck, by transformers' name.
        target_modules: found by itself.
    """

    method: ClassVar[str] = "MMPEFT_MAM"

    num_virtual_tokens: int = 30
    bottleneck_size: int = 512
    scaling: float = 4.0
    activation: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        self.beside()

    def beside(self) -> BottleneckConfig:
        """The bottleneck by itself."""
        return BottleneckConfig(
            bottleneck_size=self.bottleneck_size, placement="parallel", sublayers=["ffn"],
            scaling=self.scaling, activation=self.activation,
        )  # fmt: skip


class MAMModel(PrefixModel):
    """MAM on a language model."""

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: MAMConfig) -> list[str]:
        """The attention modules and the FFNs.

        Raises:
            ValueError: they cannot be told, or others are asked for.
        """
        attention = list(find_attention(language_model))
        beside = BottleneckModel.find_targets(language_model, config.beside())
        return all_of(language_model, config, attention + beside)

    def wrap(self, module, adapter_name, config, path):
        """The adapted module at ``path``."""
        if path in self.shapes:
            return super().wrap(module, adapter_name, config, path)
        return BottleneckLayer(module, adapter_name, config.beside(), hidden_size(self.model))


register(MAMConfig, MAMModel)
