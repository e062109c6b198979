"""Adaptive prefix tuning, APT (Zhang et al. 2023, arXiv 2305.15212)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.tuners.base import register
from mmpeft.tuners.prefix import PrefixConfig, PrefixLayer, PrefixModel


@dataclass
class AdaptivePrefixConfig(PrefixConfig):
    """Prefix tuning whose tokens and layers have weights: lambda * alpha * (keys, values).

    Alpha is a gate in (0, 1) for each token of each layer, lambda a factor for each layer, both
    learned. The paper makes alpha of the hidden states that enter the layer; in a causal LLM these
    differ by position, and what attention shares between positions cannot depend on them. Here
    alpha is the sigmoid of a weight that is learned as it is. It begins at 1/2, lambda at 1.
    """

    method: ClassVar[str] = "MMPEFT_ADAPTIVE_PREFIX"


class AdaptivePrefixLayer(PrefixLayer):
    """An attention module, its learned keys and values and their weights."""

    adapter_layer_names = (*PrefixLayer.adapter_layer_names, "prefix_token", "prefix_layer")

    def __init__(self, base_layer, adapter_name, config, shape, device):
        super().__init__(base_layer, adapter_name, config, shape, device)
        token = torch.zeros(config.num_virtual_tokens, 1, device=device)
        self.prefix_token = nn.ParameterDict({adapter_name: nn.Parameter(token)})
        self.prefix_layer = nn.ParameterDict(
            {adapter_name: nn.Parameter(torch.ones(1, device=device))}
        )

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """As :class:`~mmpeft.tuners.prefix.PrefixLayer`, weighted."""
        alpha = torch.sigmoid(self.prefix_token[self.adapter_name])  # (P, 1)
        weight = self.prefix_layer[self.adapter_name] * alpha
        return tuple(x * weight for x in super().keys_and_values())


class AdaptivePrefixModel(PrefixModel):
    """Adaptive prefix tuning on a language model."""

    tuner_layer_cls = AdaptivePrefixLayer


register(AdaptivePrefixConfig, AdaptivePrefixModel)
