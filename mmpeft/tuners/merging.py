"""Layers whose adapter is another value of the module's own parameters, which can be merged."""

import torch
from torch import Tensor, nn

from mmpeft.tuners.base import Layer


class MergingLayer(Layer):
    """A module of the LLM and the parameters an adapter wants it to have."""

    _before: dict | None = None

    def adapted_parameters(self) -> dict[str, Tensor]:
        """The module's parameters as the adapter has them, by name, in the module's own type."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put them into the module.

        Raises:
            ValueError: ``safe_merge``, and one is not finite.
        """
        if self.merged:
            return
        with torch.no_grad():
            values = {name: value.clone() for name, value in self.adapted_parameters().items()}
        if safe_merge and not all(value.isfinite().all() for value in values.values()):
            raise ValueError("the adapter holds values that are not finite.")
        self._before = {name: getattr(self.base_layer, name) for name in values}
        for name, value in values.items():
            setattr(self.base_layer, name, nn.Parameter(value, requires_grad=False))
        self.merged_adapters = [self.adapter_name]

    def unmerge(self) -> None:
        """Put the module's own back, to the bit."""
        for name, value in (self._before or {}).items():
            setattr(self.base_layer, name, value)
        self._before, self.merged_adapters = None, []

    def enable_adapters(self, enabled: bool) -> None:
        """As peft: switching a merged adapter off takes it out of the weights."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)


def token_dimension(x: Tensor) -> int:
    """Which dimension of a module's input counts tokens.

    1; but 2 where a norm sees heads in front of them, (B, heads, T, d). Which it is shows in
    memory: what is cut into heads has them inside of a token.
    """
    if x.dim() != 4:
        return 1
    if x.stride(1) == x.stride(2):
        return 2 if x.shape[1] == 1 else 1
    return 2 if x.stride(1) < x.stride(2) else 1
