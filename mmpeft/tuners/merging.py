"""Layers whose adapter is another value of the module's own parameters, which can be merged."""

import torch
from torch import Tensor, nn

from mmpeft.tuners.base import Layer, Tuner


class MergingLayer(Layer):
    """A module of the LLM and the parameters an adapter wants it to have.

    Attributes:
        tokens: which dimension of what it reads counts tokens.
    """

    tokens = 1
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


class MergingTuner(Tuner):
    """A method whose layers can be merged."""

    merges = True

    def wrap(self, module, adapter_name, config, path) -> MergingLayer:
        """The adapted module at ``path``."""
        layer = super().wrap(module, adapter_name, config, path)
        layer.tokens = 2 if path in self._behind_heads else 1
        return layer

    def _pre_injection_hook(self, model, config, adapter_name):
        super()._pre_injection_hook(model, config, adapter_name)
        self._behind_heads = find_behind_heads(model)


@torch.no_grad()
def find_behind_heads(language_model: nn.Module) -> set[str]:
    """Paths of modules that see heads in front of tokens, ``(B, heads, T, d)``: some LLMs' norms.

    A shape does not tell, for there may be as many tokens as heads. Tries it: the second dimension
    of other inputs grows with the tokens. Empty where there are no weights yet.
    """
    table = language_model.get_input_embeddings().weight
    if table.device.type == "meta":
        return set()
    seen: dict[str, set] = {}

    def look(path, args):
        if args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            seen.setdefault(path, set()).add(args[0].shape[1:3])

    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: look(path, args))
        for path, module in language_model.named_modules()
    ]
    try:
        for count in (2, 3):
            ids = torch.arange(count, device=table.device)[None]
            language_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {path for path, shapes in seen.items() if len({heads for heads, _ in shapes}) == 1}
