"""Adaptive prefix tuning, APT (Zhang et al. 2023, arXiv 2305.15212, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.attention import LearnedGated
from mmpeft.tuners.base import register
from mmpeft.tuners.prefix import PrefixConfig, PrefixLayer, PrefixModel


@dataclass
class AdaptivePrefixConfig(PrefixConfig):
    """Prefix tuning whose tokens have weights that the text decides: lambda * alpha * (K, V).

    Alpha, in (0, 1), is a gate for each token of a layer's prefix, made of the hidden state that
    enters the layer's attention: ``sigmoid(W h)``. Lambda is a learned factor of the layer. In a
    causal LLM a position must not know what follows, so each has its own alpha, made of its own
    state behind the layer's norm. W begins at 0 (alpha at 1/2), lambda at 1.
    """

    method: ClassVar[str] = "MMPEFT_ADAPTIVE_PREFIX"


class AdaptivePrefixLayer(PrefixLayer):
    """An attention module, its learned keys and values, W ``(P, D)`` and lambda ``(1,)``."""

    adapter_layer_names = (*PrefixLayer.adapter_layer_names, "prefix_gate", "prefix_layer")

    def __init__(self, base_layer, adapter_name, config, shape, device, hidden_size):
        super().__init__(base_layer, adapter_name, config, shape, device)
        gate = nn.Linear(hidden_size, config.num_virtual_tokens, bias=False, device=device)
        nn.init.zeros_(gate.weight)
        self.prefix_gate = nn.ModuleDict({adapter_name: gate})
        self.prefix_layer = nn.ParameterDict(
            {adapter_name: nn.Parameter(torch.ones(1, device=device))}
        )

    def learned(self, hidden: Tensor) -> LearnedGated:
        """As :class:`~mmpeft.tuners.prefix.PrefixLayer`; ``hidden`` ``(B, T, D)`` decides."""
        key, value = self.keys_and_values()
        gate = self.prefix_gate[self.adapter_name]
        alpha = torch.sigmoid(gate(self._cast_input_dtype(hidden, gate.weight.dtype)))  # (B, T, P)
        weight = self.prefix_layer[self.adapter_name] * alpha
        return LearnedGated(key[None], value[None], self.choose, weight)


class AdaptivePrefixModel(PrefixModel):
    """Adaptive prefix tuning on a language model."""

    tuner_layer_cls = AdaptivePrefixLayer

    def wrap(self, module, adapter_name, config, path):
        """The adapted module at ``path``."""
        hidden_size = self.model.config.get_text_config().hidden_size
        return AdaptivePrefixLayer(
            module, adapter_name, config, self.shapes[path], self.device, hidden_size
        )


register(AdaptivePrefixConfig, AdaptivePrefixModel)
