"""Layers whose adapter is another value of the module's own parameters, which can be merged."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmpeft.trial import find_tokens_third
from mmpeft.tuners.base import Kept, Layer, Tuner


class MergingLayer(Layer):
    """A module of the LLM and the parameters an adapter wants it to have.

    Attributes:
        tokens: which dimension of what it reads counts tokens.
    """

    tokens = 1
    _before: dict | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__(base_layer, adapter_name)
        self._adapted = Kept()

    def adapted_parameters(self) -> dict[str, Tensor]:
        """The module's parameters as the adapter has them, by name, in the module's own type."""
        raise NotImplementedError

    def with_adapted_parameters(self, *args, **kwargs):
        """What the module gives with them; what it gives by itself where the gate is shut.

        A tuple, as routers to experts give, is chosen part by part. The dial scales the parameters,
        as merging does: of experts and routers that is not to scale what they give.
        """
        made_of = [*self.base_layer.parameters(), *self._trained()]
        values = self._adapted.get(made_of, self.adapted_parameters)
        if self.dial != 1:
            values = {name: self._scaled(name, value) for name, value in values.items()}
        adapted = functional_call(self.base_layer, values, args, kwargs, tie_weights=False)
        if self.gate is None:
            return adapted
        if isinstance(adapted, Tensor):
            own = partial(self.base_layer, *args, **kwargs)
            return self.gate.choose(adapted, own, tokens=self.tokens)
        own = self.base_layer(*args, **kwargs)
        return tuple(
            self.gate.choose(one, lambda base=base: base, tokens=self.tokens)
            for one, base in zip(adapted, own, strict=True)
        )

    def _trained(self):
        """The adapter's own parameters."""
        return (p for name in self.adapter_layer_names for p in getattr(self, name).parameters())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put them into the module, scaled as the dial says.

        Raises:
            ValueError: ``safe_merge``, and one is not finite.
        """
        if self.merged:
            return
        with torch.no_grad():
            values = {name: self._scaled(name, value)
                      for name, value in self.adapted_parameters().items()}  # fmt: skip
        if safe_merge and not all(value.isfinite().all() for value in values.values()):
            raise ValueError("the adapter holds values that are not finite.")
        self._before = {name: getattr(self.base_layer, name) for name in values}
        for name, value in values.items():
            setattr(self.base_layer, name, nn.Parameter(value, requires_grad=False))
        self.merged_adapters = [self.adapter_name]

    def _scaled(self, name: str, adapted: Tensor) -> Tensor:
        """Between the module's own and the adapted parameter, as far as the dial says."""
        own = getattr(self.base_layer, name)
        own = torch.zeros_like(adapted) if own is None else own
        return adapted.clone() if self.dial == 1 else own.lerp(adapted, self.dial)

    def unmerge(self) -> None:
        """Put the module's own back, to the bit; in the type and place that it now has."""
        for name, own in (self._before or {}).items():
            if own is not None:
                own.data = own.data.to(getattr(self.base_layer, name))
            setattr(self.base_layer, name, own)
        self._before, self.merged_adapters = None, []

    def enable_adapters(self, enabled: bool) -> None:
        """As peft: switching a merged adapter off takes it out of the weights."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)


class MergingTuner(Tuner):
    """A method whose layers can be merged."""

    merges = True

    def wrap(self, module, adapter_name, config, path) -> MergingLayer:
        """The adapted module at ``path``."""
        layer = super().wrap(module, adapter_name, config, path)
        layer.tokens = 2 if path in self._tokens_third else 1
        return layer

    def _pre_injection_hook(self, model, config, adapter_name):
        super()._pre_injection_hook(model, config, adapter_name)
        self._tokens_third = find_tokens_third(model)
