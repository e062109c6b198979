"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190) and P-tuning v2 (Liu et al. 2022).

Both put learned keys and values before those of the sequence, in every layer. The former makes
them by a small network that all layers share, the latter (arXiv 2110.07602) learns them as they
are.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn

from mmpeft.attention import Learned
from mmpeft.tuners.attention_base import (
    AttentionLayer,
    AttentionTuner,
    record,
    some_tokens,
)
from mmpeft.tuners.base import register
from mmpeft.tuners.options import check_options


@dataclass
class PrefixConfig(PeftConfig):
    """Learned keys and values in each attention module; P-tuning v2 unless ``hidden_size`` is set.

    No identity at the start, for rows attend to them from the first step on; with ``vocabulary``
    the LLM begins as if a few random words stood in front (Li and Liang, section 7.4).

    Attributes:
        num_virtual_tokens: how many in each module, P.
        hidden_size: of the network that makes them; ``None`` learns them as they are.
        init: how keys and values begin: those of ``vocabulary`` tokens in front, ``normal`` (of
            deviation 1, as in peft), or ``zero``. ``None`` is ``vocabulary``, or ``normal`` where a
            network makes them.
        target_modules: attention modules, by name or regular expression; ``None`` is all.
    """

    method: ClassVar[str] = "MMPEFT_PREFIX"

    num_virtual_tokens: int = 20
    hidden_size: int | None = None
    init: Literal["vocabulary", "normal", "zero"] | None = None
    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method
        check_options(self, num_virtual_tokens=1, hidden_size=1)
        if self.hidden_size is not None and self.init == "vocabulary":
            raise ValueError(
                f"{type(self).__name__}: init vocabulary gives keys and values, but with "
                "hidden_size a network makes them; leave out one of the two."
            )


class PrefixLayer(AttentionLayer):
    """An attention module and its learned keys and values, ``(H_kv, P, d)``.

    With a network, ``prefix_up`` makes both of the ``hidden`` ``(P, hidden_size)`` that the layers
    share: for each token the keys of all heads, then the values.
    """

    adapter_layer_names = ("prefix_key", "prefix_value", "prefix_up")

    def __init__(self, base_layer, adapter_name, config, shape, device):
        super().__init__(base_layer, adapter_name)
        self.shape = heads, *sizes = shape
        self.prefix_key, self.prefix_value = nn.ParameterDict(), nn.ParameterDict()
        self.prefix_up = nn.ModuleDict()
        if config.hidden_size is None:
            new = torch.zeros if config.init == "zero" else torch.randn
            for weights, size in zip((self.prefix_key, self.prefix_value), sizes, strict=True):
                start = new(heads, config.num_virtual_tokens, size, device=device)
                weights[adapter_name] = nn.Parameter(start)
            return
        up = nn.Linear(config.hidden_size, heads * sum(sizes), device=device)
        if config.init == "zero":
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.prefix_up[adapter_name] = up

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """``(H_kv, P, d)`` each."""
        if not self.prefix_up:
            return self.prefix_key[self.adapter_name], self.prefix_value[self.adapter_name]
        heads, *sizes = self.shape
        both = self.prefix_up[self.adapter_name](self.computed["hidden"])  # (P, H_kv * 2d)
        key, value = both.split([heads * size for size in sizes], -1)
        return tuple(x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (key, value))

    def learned(self, hidden: Tensor) -> Learned:
        """As :class:`AttentionLayer`."""
        key, value = self.keys_and_values()
        return Learned(key[None], value[None], self.choose)


class Network(nn.Module):
    """What the layers share: the tokens' embeddings and a hidden layer, ``(P, hidden_size)``."""

    def __init__(self, tokens: int, width: int, hidden_size: int, device):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(tokens, width, device=device))
        self.down = nn.Linear(width, hidden_size, device=device)

    def forward(self) -> Tensor:
        return torch.tanh(self.down(self.tokens))


class PrefixModel(AttentionTuner):
    """Prefix tuning on a language model."""

    prefix = "prefix_"
    tuner_layer_cls = PrefixLayer

    def wrap(self, module, adapter_name, config, path):
        """The adapted module at ``path``."""
        return self.tuner_layer_cls(module, adapter_name, config, self.shapes[path], self.device)

    def source(self) -> Tensor | None:
        """The hidden layer of the network, if there is one."""
        return next((network() for network in self.prefix_network.values()), None)

    def compute(self, source: Tensor) -> None:
        """It is all that layers share."""
        for layer in self._layers():
            layer.computed["hidden"] = source

    def _pre_injection_hook(self, model, config, adapter_name):
        super()._pre_injection_hook(model, config, adapter_name)
        self.prefix_network = nn.ModuleDict()
        if config.hidden_size is not None:
            width = model.get_input_embeddings().weight.shape[1]
            network = Network(config.num_virtual_tokens, width, config.hidden_size, self.device)
            self.prefix_network[adapter_name] = network

    @torch.no_grad()
    def _post_injection_hook(self, model, config, adapter_name):
        super()._post_injection_hook(model, config, adapter_name)
        plain = config.hidden_size is None and config.init in (None, "vocabulary")
        weights = [p for layer in self._layers() for p in layer.prefix_key.parameters()]
        if not plain or self.device.type == "meta" or any(p.is_meta for p in weights):
            return  # or they are about to be loaded
        tokens = some_tokens(model, config.num_virtual_tokens)
        taken = record(model, tokens[None], self._front(len(tokens)))
        for layer in self._layers():
            for weights, (x, *_) in zip(
                (layer.prefix_key, layer.prefix_value), taken[layer.base_layer], strict=True
            ):
                weights[adapter_name].copy_(x)


register(PrefixConfig, PrefixModel)
