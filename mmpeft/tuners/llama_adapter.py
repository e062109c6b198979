"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn

from mmpeft.attention import LearnedApart
from mmpeft.tuners.attention_base import (
    AttentionLayer,
    AttentionTuner,
    record,
)
from mmpeft.tuners.base import register
from mmpeft.tuners.options import check_options


@dataclass
class LlamaAdapterConfig(PeftConfig):
    """Prompts in the top layers, attended to apart from the text, by a gate that begins at 0.

    A prompt has the keys and values that the layer's frozen attention makes of it, at position 0
    (no rotation). Attention to it has a softmax of its own, is scaled by the gate (section 3.2) and
    added: an untrained one is the identity. As in peft the gate is one number for each layer, and
    the number itself, where later versions of the paper take a tanh.

    Attributes:
        num_virtual_tokens: how many in each layer, K of the paper.
        num_layers: how many layers from the top, L of the paper; ``None`` is all.
        target_modules: attention modules, and nothing else then counts; ``None`` finds those of
            ``num_layers``.
    """

    method: ClassVar[str] = "MMPEFT_LLAMA_ADAPTER"

    num_virtual_tokens: int = 10
    num_layers: int | None = None
    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method
        check_options(self, num_virtual_tokens=1)


class LlamaAdapterLayer(AttentionLayer):
    """An attention module, its prompt ``(P, D)`` and its gate ``(1,)``."""

    adapter_layer_names = ("adaption_prompt", "adaption_gate")
    shares_softmax = False

    def __init__(self, base_layer, adapter_name, prompt: nn.Parameter):
        super().__init__(base_layer, adapter_name)
        gate = nn.Parameter(torch.zeros(1, device=prompt.device))
        self.adaption_prompt = nn.ParameterDict({adapter_name: prompt})
        self.adaption_gate = nn.ParameterDict({adapter_name: gate})

    def learned(self, hidden: Tensor) -> LearnedApart:
        """As :class:`AttentionLayer`."""
        gate = self.adaption_gate[self.adapter_name]
        return LearnedApart(self.computed["key"], self.computed["value"], self.choose, gate)


class LlamaAdapterModel(AttentionTuner):
    """LLaMA-Adapter on a language model."""

    prefix = "adaption_"
    tuner_layer_cls = LlamaAdapterLayer

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: LlamaAdapterConfig) -> list[str]:
        """The attention modules of the top layers.

        Raises:
            ValueError: there are fewer, or ``num_layers`` is not 1 or more.
        """
        found = super().find_targets(language_model, config)
        if config.target_modules is not None or config.num_layers is None:
            return found
        if not 1 <= config.num_layers <= len(found):
            raise ValueError(
                f"LlamaAdapterConfig: num_layers is {config.num_layers}; it must lie in 1 to "
                f"{len(found)}, the layers of this language model."
            )
        return found[-config.num_layers :]

    def wrap(self, module, adapter_name, config, path):
        """The adapted module at ``path``."""
        size = config.num_virtual_tokens, self.model.config.get_text_config().hidden_size
        prompt = nn.Parameter(torch.randn(size, device=self.device))
        return LlamaAdapterLayer(module, adapter_name, prompt)

    def source(self) -> Tensor:
        """The prompts of all layers ``(L, P, D)``."""
        return torch.stack([layer.adaption_prompt[layer.adapter_name] for layer in self._layers()])

    def compute(self, source: Tensor) -> None:
        """What the attention modules make of their own prompts; what else runs is dropped."""
        prompts = zip(self._layers(), source, strict=True)
        own = {layer.base_layer: lambda _, p=prompt: p[None] for layer, prompt in prompts}
        embed = self.model.get_input_embeddings()
        ids = torch.zeros(source.shape[1], dtype=torch.long, device=embed.weight.device)
        self.show(record(self.model, embed(ids)[None], ids, own))  # all at position 0


register(LlamaAdapterConfig, LlamaAdapterModel)
