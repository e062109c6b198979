"""AdaMix: a mixture of adaptation modules (Wang et al. 2022, arXiv 2205.12410)."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from mmpeft.tuners.adding import (
    AddingLayer,
    AddingOptions,
    activation,
    bottleneck,
    down_start,
)
from mmpeft.tuners.base import Computed, Tuner, register
from mmpeft.tuners.options import check_options
from mmpeft.tuners.sublayers import decoder_layers, find_outputs, hidden_size, sizes


@dataclass
class AdaMixConfig(AddingOptions, PeftConfig):
    """Several modules in one place, of which each training step takes one by chance.

    Down- and up-projection are drawn apart, in every place anew (section 3.1). A second draw of
    the same step must predict alike (3.2), which costs another pass. What is used after training
    is the mean of the modules' weights (3.3). The up-projections start at 0, so the adapter is the
    identity.

    Further options are those of :class:`~mmpeft.tuners.adding.AddingOptions`.

    Attributes:
        kind: ``bottleneck``, on the output of ``sublayers``; or ``lora``, beside linear layers.
        modules: how many there are in each place.
        share: the projection, ``down`` or ``up``, that all modules of a place have in common
            (3.4), or ``none``.
        consistency: weight of the divergence of the two draws' predictions; 0 makes no second pass.
    """

    method: ClassVar[str] = "MMPEFT_ADAMIX"

    kind: Literal["bottleneck", "lora"] = "bottleneck"
    modules: int = 4
    bottleneck_size: int = 16
    share: Literal["none", "down", "up"] = "up"
    consistency: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_options(self, modules=1, consistency=0)


class AdaMixLayer(AddingLayer):
    """A module of the LLM and its mixture.

    The modules of a place are one tensor, mixed by weights: a step's draw has a 1 and zeros.
    """

    adapter_layer_names = (
        "adamix_down", "adamix_up", "adamix_down_bias", "adamix_up_bias", "adamix_dropout"
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdaMixConfig, hidden: int):
        super().__init__(base_layer, adapter_name)
        self.count, self.scaling = config.modules, config.scaling
        self.activation = activation(config) if config.kind == "bottleneck" else None
        self.reads = "input" if config.kind == "lora" else "output"
        into, out = sizes(base_layer, hidden)
        downs, ups = (1 if config.share == side else config.modules for side in ("down", "up"))
        size = config.bottleneck_size
        start = {
            "adamix_down": down_start(downs, size, out if self.reads == "output" else into),
            "adamix_up": torch.zeros(ups, out, size),
        }
        if self.activation is not None:
            start["adamix_down_bias"] = torch.zeros(downs, size)
            start["adamix_up_bias"] = torch.zeros(ups, out)
        for name in self.adapter_layer_names[:-1]:
            own = {adapter_name: nn.Parameter(start[name])} if name in start else {}
            setattr(self, name, nn.ParameterDict(own))
        self.adamix_dropout = nn.ModuleDict({adapter_name: nn.Dropout(config.dropout)})
        even = torch.full((2, config.modules), 1 / config.modules)  # until a draw
        self.register_buffer("adamix_mix", even, persistent=False)
        self.drawn: Tensor | None = None  # (2 draws, down and up, modules)

    def draw(self) -> None:
        """Draw one module for down and one for up, twice, and take the first draw."""
        chosen = torch.randint(self.count, (2, 2))
        self.drawn = F.one_hot(chosen, self.count).to(self.adamix_mix)
        self.take(0)

    def take(self, which: int) -> None:
        """Use draw ``which`` from now on."""
        self.adamix_mix = self.drawn[which]

    def mixed(self, name: str) -> Tensor:
        """The weights in use: a step's draw while training, the mean of the modules after it."""
        weights = getattr(self, name)[self.adapter_name]  # (modules, ...)
        if len(weights) == 1:
            return weights[0]
        if not self.training:
            return weights.mean(0)
        return torch.tensordot(self.adamix_mix[int("up" in name)], weights, 1)

    def contribution(self, x: Tensor) -> Tensor:
        """``(B, T, in or out)`` to ``(B, T, out)``."""
        down, up = self.mixed("adamix_down"), self.mixed("adamix_up")
        x = self.adamix_dropout[self.adapter_name](self._cast_input_dtype(x, down.dtype))
        if self.activation is None:
            return F.linear(F.linear(x, down), up) * self.scaling
        biases = self.mixed("adamix_down_bias"), self.mixed("adamix_up_bias")
        return bottleneck(x, down, up, self.activation, *biases) * self.scaling

    @torch.no_grad()
    def average(self) -> None:
        """Leave one module, the mean."""
        for name in self.adapter_layer_names[:-1]:
            own = getattr(self, name)
            for adapter, weights in own.items():
                own[adapter] = nn.Parameter(weights.mean(0, keepdim=True), weights.requires_grad)
        self.count, self.drawn = 1, None
        self.adamix_mix = self.adamix_mix.new_ones(2, 1)


class AdaMixModel(Tuner):
    """AdaMix on a language model."""

    prefix = "adamix_"
    tuner_layer_cls = AdaMixLayer
    _first = Computed()  # logits of the step's first pass

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: AdaMixConfig) -> list[str]:
        """The sublayers' output layers, or LoRA's targets."""
        if config.kind == "lora":
            return super().find_targets(language_model, config)
        return find_outputs(language_model, config)

    def wrap(self, module, adapter_name, config, path) -> AdaMixLayer:
        """The module with its mixture."""
        return AdaMixLayer(module, adapter_name, config, hidden_size(self.model))

    def average(self) -> None:
        """Deploy: leave the mean of the modules alone, a plain adapter of 1 / ``modules`` the size.

        What comes out is as before, in evaluation; :meth:`save_pretrained` then writes that.
        """
        for layer in self._layers():
            layer.average()
        self._config.modules = 1

    def forward(self, *args, **kwargs):
        """As the LLM; keeps the logits for :meth:`penalty`."""
        outputs = self.model(*args, **kwargs)
        keep = self.training and torch.is_grad_enabled() and self._compares()
        self._first = Computed(logits=outputs.logits) if keep else Computed()
        return outputs

    def begin_step(self, step: int, steps: int) -> None:
        """Draw the modules of this step."""
        for layer in self._layers():
            layer.draw()

    def end_step(self, step: int) -> None:
        """Let go of the logits, where nothing asked for the penalty."""
        self._first = Computed()

    def penalty(self, model, inputs: dict) -> Tensor | None:
        """Mean symmetric KL divergence, per learned token, of the predictions of two draws.

        Called behind the forward of the same ``inputs``, whose logits serve where it made them
        whole: with ``logits_chunk`` the first draw is computed again.
        """
        labels = inputs.get("labels")
        if not self.training or labels is None or not self._compares():
            return None
        if any(layer.drawn is None for layer in self._layers()):
            raise ValueError("AdaMix: no modules are drawn; call begin_step before the forward.")
        learned = F.pad(labels[:, 1:] != -100, (0, 1))  # (B, T)
        if not learned.any():
            return None
        first = self._kept(learned)
        if first is None:
            first = self._predict(model, inputs, learned)
        with self._second_draw():
            second = self._predict(model, inputs, learned)
        self._first = Computed()
        p, q = (logits.float().log_softmax(-1) for logits in (first, second))  # (n, V)
        return self._config.consistency * 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()

    def _kept(self, learned: Tensor) -> Tensor | None:
        """``(n, V)``, the first pass's logits at positions ``learned`` (B, T)."""
        logits = self._first.pop("logits", None)
        if logits is None or logits.shape[:2] == learned.shape:
            return None if logits is None else logits[learned]
        return logits[0] if logits.shape[1] == int(learned.sum()) else None

    @staticmethod
    def _predict(model, inputs: dict, learned: Tensor) -> Tensor:
        call = {k: v for k, v in inputs.items() if k not in ("labels", "num_items_in_batch")}
        with model._project_only(learned):
            return model(**call, use_cache=False).logits[0]

    @contextmanager
    def _second_draw(self):
        """Inside, the second draw; and again where activation checkpointing recomputes this pass.

        Recomputation happens in backward, when the first draw is in use again.
        """
        layers = [m for m in decoder_layers(self.model).values() if m.gradient_checkpointing]
        before = [layer._gradient_checkpointing_func for layer in layers]

        def with_second(checkpoint, function, *args):
            def run(*args):
                with self._taken(1):
                    return function(*args)

            return checkpoint(run, *args)

        try:
            for layer, own in zip(layers, before, strict=True):
                layer._gradient_checkpointing_func = lambda function, *args, own=own: with_second(
                    own, function, *args
                )
            # a compiled layer would compile again for the other function
            eager = torch.compiler.set_stance("force_eager") if layers else nullcontext()
            with self._taken(1), eager:
                yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                layer._gradient_checkpointing_func = own

    @contextmanager
    def _taken(self, which: int):
        layers = list(self._layers())
        before = [layer.adamix_mix for layer in layers]
        try:
            for layer in layers:
                layer.take(which)
            yield
        finally:
            for layer, mix in zip(layers, before, strict=True):
                layer.adamix_mix = mix

    @property
    def _config(self) -> AdaMixConfig:
        return self.peft_config[self.active_adapters[0]]

    def _compares(self) -> bool:
        return self._config.consistency > 0 and self._config.modules > 1

    def _layers(self):
        return (module for module in self.model.modules() if isinstance(module, AdaMixLayer))


register(AdaMixConfig, AdaMixModel)
