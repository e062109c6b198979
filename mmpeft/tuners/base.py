"""What the tuners here have in common: peft's base classes, the gate, and what happens each step.

A method is a config, a :class:`Layer` and a :class:`Tuner` in one file, entered into peft's own
tables by :func:`register`: ``get_peft_model``, ``save_pretrained``, ``disable_adapter`` and
``PeftConfig.from_pretrained`` then serve it as they serve LoRA.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn


def register(config: type[PeftConfig], tuner: type["Tuner"]) -> None:
    """Make peft know a method.

    peft's ``register_peft_method`` takes only names of its own enumeration; its tables take any
    string, here ``config.method``.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[config.method] = config
    PEFT_TYPE_TO_TUNER_MAPPING[config.method] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[config.method] = tuner.prefix


class Computed(dict):
    """What a tuner has worked out in the pass at hand; a copy of it, or a pickle, is empty."""

    def __reduce__(self):
        return type(self), ()


class Kept:
    """What is made of parameters, kept while they stay as they are and no gradient is wanted.

    So generation makes it once, not for every token. A copy of it, or a pickle, is empty. A change
    by way of ``parameter.data`` alone is not seen.
    """

    def __init__(self):
        self._made_of, self._value = None, None

    def __reduce__(self):
        return type(self), ()

    def get(self, parameters: Iterable[Tensor], make: Callable):
        """``make()``, or what it gave before of the same values of the same parameters."""
        parameters = list(parameters)
        # an inference tensor does not count its changes, nor does a fused optimizer those it makes
        if torch.is_grad_enabled() or any(
            p.is_inference() or p.grad is not None for p in parameters
        ):
            self._made_of = self._value = None
            return make()
        made_of = [_State(p, p.data_ptr(), p._version) for p in parameters]
        if made_of != self._made_of:
            self._made_of, self._value = made_of, make()
        return self._value


class _State(NamedTuple):
    parameter: Tensor  # held, so that no other can take its place in memory
    place: int
    version: int

    def __eq__(self, other):
        same = self.parameter is other.parameter
        return same and (self.place, self.version) == (other.place, other.version)


def weights_follow(config: PeftConfig) -> bool:
    """Whether the adapter is being loaded, by peft or by a bridge, so that no start is made."""
    return config.inference_mode or getattr(config, "weights_follow", False)


class Layer(nn.Module, BaseTunerLayer):
    """A module of the LLM, ``base_layer``, and what an adapter makes of it.

    A subclass keeps its weights in ``ModuleDict``s and ``ParameterDict``s by adapter name, which it
    names in ``adapter_layer_names``. Its forward returns ``base_layer``'s own output where
    ``disable_adapters`` is set.

    Attributes:
        gate: the bridge's :class:`~mmpeft.gate.Gate`; ``None`` is open.
        dial: what the adapter's part of the output is scaled by, see :mod:`mmpeft.adapter_scale`.
    """

    gate = None
    dial = 1.0

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter = adapter_name

    @property
    def adapter_name(self) -> str:
        """The key of the adapter's weights; peft keeps it as a name or as a list of one."""
        return self.active_adapters[0]

    def close(self, contribution: Tensor, tokens: int = 1) -> Tensor:
        """``(B, T, D)`` to be added, T at dimension ``tokens``; 0 where the gate is shut."""
        if self.dial != 1:
            contribution = self.dial * contribution
        return contribution if self.gate is None else self.gate.close(contribution, tokens=tokens)

    def choose(self, adapted: Tensor, base: Callable[[], Tensor], tokens: int = 1) -> Tensor:
        """``adapted`` ``(B, T, D)``; ``base()`` where the gate is shut."""
        if self.dial != 1:
            own = base()
            adapted = own + self.dial * (adapted - own)
        return adapted if self.gate is None else self.gate.choose(adapted, base, tokens=tokens)


class Tuner(BaseTuner):
    """A method on a language model.

    Subclasses set ``prefix`` and ``tuner_layer_cls``, whose instances are made as
    ``tuner_layer_cls(base_layer, adapter_name, config)``, or override :meth:`wrap`.
    """

    merges = False

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: PeftConfig) -> list[str]:
        """Full paths of the modules to adapt; by default the linear layers that are asked for.

        Raises:
            ValueError: there are none, or a name fits none.
        """
        from mmpeft.targets import resolve_targets

        return resolve_targets(language_model, config.target_modules)

    def wrap(self, module: nn.Module, adapter_name: str, config: PeftConfig, path: str) -> Layer:
        """The adapted module at ``path``."""
        return self.tuner_layer_cls(module, adapter_name, config)

    def begin_step(self, step: int, steps: int) -> None:
        """Called before step ``step`` of ``steps`` (from 0): random choices for the whole of it."""

    def penalty(self, model, inputs: dict) -> Tensor | None:
        """What is added to the loss of a batch; ``model`` is the bridge.

        The trainer weights a micro-batch by its share of the step's learned tokens, so a mean over
        tokens becomes that of the step, and what depends on no input counts once.
        """
        return None

    def end_step(self, step: int) -> None:
        """Called after an optimizer step, whose gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """What is remembered from step to step besides the weights; saved for resuming."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""

    def _prepare_adapter_config(self, peft_config, model_config):
        """Targets left open are found in the LLM; peft looks them up by its kind."""
        if peft_config.target_modules is None:
            peft_config.target_modules = self.find_targets(self.model, peft_config)
        return peft_config

    def _check_new_adapter_config(self, config):
        super()._check_new_adapter_config(config)
        if any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            raise ValueError(
                f"the LLM has an adapter, and {type(config).__name__} goes on one that has none; "
                "unload it first."
            )

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ):
        layer = self.wrap(target, adapter_name, peft_config, current_key)
        self._replace_module(parent, target_name, layer, target)
        _follow(layer, target)

    def _replace_module(self, parent, child_name, new_module, child):
        if isinstance(new_module, BaseTunerLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # taken off again; peft would look for a weight, which whole sublayers have not
            setattr(parent, child_name, new_module)

    def _mark_only_adapters_as_trainable(self, model):
        super()._mark_only_adapters_as_trainable(model)
        if any(config.inference_mode for config in self.peft_config.values()):
            for child in self.children():  # what layers share
                child.requires_grad_(False)

    def _check_merge_allowed(self):
        super()._check_merge_allowed()
        if not self.merges:
            name = type(self).__name__.removesuffix("Model")
            raise ValueError(f"a {name} adapter cannot be merged into the weights of the LLM.")


def _follow(layer: Layer, module: nn.Module) -> None:
    """Put what ``layer`` holds on the device of ``module``; peft does with what its prefix names.

    Weights on device meta stay there: they are about to be loaded.
    """
    device = next(module.parameters()).device
    for name, child in layer.named_children():
        if name != "base_layer" and not any(p.is_meta for p in child.parameters()):
            child.to(device)
    for name, buffer in layer.named_buffers(recurse=False):
        setattr(layer, name, buffer.to(device))
