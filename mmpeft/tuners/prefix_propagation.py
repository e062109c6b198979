"""Prefix propagation (Li et al. 2023, arXiv 2305.12086)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn

from mmpeft.tuners.attention_base import FrontTuner, layers_of
from mmpeft.tuners.base import register
from mmpeft.tuners.options import check_options


@dataclass
class PrefixPropagationConfig(PeftConfig):
    """Tokens in front that run through the frozen LLM, with learned vectors added in every layer.

    The tokens begin as zeros; what enters a layer is what the layer before made of them plus that
    layer's own vectors, so a prefix depends on those below it. A token has D weights in a layer,
    half of prefix tuning's where every head has keys of its own. In a causal LLM the tokens see
    themselves alone: unlike in the paper's encoders, the text does not reach them. No identity at
    the start. Positions are as in :mod:`mmpeft.tuners.prompt`.

    Attributes:
        num_virtual_tokens: how many, P.
        init_std: deviation of the vectors at the start.
        target_modules: found by itself.
    """

    method: ClassVar[str] = "MMPEFT_PREFIX_PROPAGATION"

    num_virtual_tokens: int = 20
    init_std: float = 1.0
    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method
        check_options(self, num_virtual_tokens=1)


class PrefixPropagationModel(FrontTuner):
    """Prefix propagation on a language model; ``propagated_vectors`` are ``(L, P, D)``."""

    prefix = "propagated_"

    def source(self) -> Tensor:
        """The vectors of all layers ``(L, P, D)``."""
        (vectors,) = self.propagated_vectors.values()
        return vectors

    def compute(self, source: Tensor) -> None:
        """Keys and values of the tokens they are added to."""
        width = self.model.get_input_embeddings().weight.shape[1]
        layers = zip(layers_of(self.model), source, strict=True)
        adding = {layer: vectors.__add__ for layer, vectors in layers}
        self.run(source.new_zeros(source.shape[1], width), adding)

    def _pre_injection_hook(self, model, config, adapter_name):
        super()._pre_injection_hook(model, config, adapter_name)
        width = model.config.get_text_config().hidden_size  # of layers: OPT's embeddings differ
        shape = len(layers_of(model)), config.num_virtual_tokens, width
        start = torch.randn(shape, device=self.device) * config.init_std
        self.propagated_vectors = nn.ParameterDict({adapter_name: nn.Parameter(start)})


register(PrefixPropagationConfig, PrefixPropagationModel)
