"""What the prefix family has in common: attention modules that see learned keys and values.

Each of the LLM's attention modules is wrapped, and passes what is learned to
:func:`mmpeft.attention.attention`, which puts it before the sequence's own keys and values. Text
keeps its positions, its KV cache holds the text alone, and where the gate is shut attention is the
base's own.
"""

from contextlib import contextmanager, nullcontext

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpeft.attention import ATTENTION, Learned, Recorder
from mmpeft.tuners.base import Computed, Layer, Tuner
from mmpeft.weights import first_line

UNREADABLE = (
    ValueError, RuntimeError, IndexError, TypeError, AttributeError, NotImplementedError,
    AssertionError,
)  # fmt: skip

# ------------------------------------------------------------------- what the LLM attends with


@torch.no_grad()
def find_attention(language_model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Put ``ATTENTION`` on the LLM, if all its attention takes learned keys and values.

    Tries it: a few tokens run, and every layer must show what it attends to.

    Returns:
        path of each attention module: heads of its keys, size of a key, size of a value.

    Raises:
        ValueError: it does not.
    """
    kind, before = language_model.config.model_type, language_model.config._attn_implementation
    problem = f"their attention runs as {before} here, not as sdpa"
    if before in ("sdpa", ATTENTION):
        embed = language_model.get_input_embeddings()
        ids = torch.arange(4, device=embed.weight.device)
        language_model.set_attn_implementation(ATTENTION)
        try:
            taken = record(language_model, embed(ids)[None])
            if all(any(m in taken for m in layer.modules()) for layer in layers_of(language_model)):
                names = {module: name for name, module in language_model.named_modules()}
                return {
                    names[module]: (key.shape[1], key.shape[3], value.shape[3])
                    for module, (key, value) in taken.items()
                }
            problem = "they have layers that do not pass on to attention what a call brings"
        except UNREADABLE as error:
            problem = f"a trial failed ({first_line(error)})"
        language_model.set_attn_implementation(before)
    raise ValueError(_refusal(kind, problem))


def _refusal(kind: str, problem: str) -> str:
    return (
        f"{kind} language models take no learned keys and values: {problem}; choose an adapter of "
        "layers instead, for example LoraConfig."
    )


def layers_of(language_model: nn.Module) -> list[nn.Module]:
    """The decoder's layers."""
    return [m for m in language_model.modules() if isinstance(m, GradientCheckpointingLayer)]


def record(
    language_model: nn.Module,
    embeds: Tensor,
    positions: Tensor | None = None,
    changes: dict | None = None,
) -> dict:
    """Keys and values of a row that stands alone, by attention module; no prefix acts.

    Args:
        embeds: ``(1, P, D)``.
        positions: ``(P,)``; ``None`` counts from 0.
        changes: by module, what is made of the hidden states ``(1, P, D)`` that enter it.
    """
    recorder, layers = Recorder(), layers_of(language_model)
    given = {} if positions is None else {"position_ids": positions[None]}
    if embeds.device.type == "meta":  # with a cache nothing asks for the values of positions
        given["past_key_values"] = DynamicCache(config=language_model.config)
    decoder = language_model.get_decoder()
    with _plainly(layers), _changing(changes or {}):
        decoder(inputs_embeds=embeds, use_cache=False, learned=recorder, **given)
    return recorder.taken


@contextmanager
def _plainly(layers: list[nn.Module]):
    """Inside, layers run as they are written: not compiled, and keeping their activations."""
    modes = [layer.training for layer in layers]  # says only whether they recompute
    compiled = any(layer._compiled_call_impl is not None for layer in layers)
    for layer in layers:
        layer.training = False
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


@contextmanager
def _changing(changes: dict):
    """Inside, modules get what the functions make of their hidden states."""

    def hook(change):
        def replace(module, args, kwargs):
            if args:
                return (change(args[0]).to(args[0].dtype), *args[1:]), kwargs
            hidden = kwargs["hidden_states"]
            return args, kwargs | {"hidden_states": change(hidden).to(hidden.dtype)}

        return replace

    hooks = [
        module.register_forward_pre_hook(hook(change), with_kwargs=True)
        for module, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def first_position(language_model: nn.Module, count: int) -> int:
    """Position of the first of ``count`` tokens that stand before a text which begins at 0.

    Where attention depends on distances alone it is ``-count``, as if the text were moved on to
    make room. A learned table of positions has no entry for it: there it is 0, as the text's is.
    Tries which it is: where distances count, moving the text is no more than rounding, which is as
    much as a change of the embeddings in their last digit.
    """
    table = language_model.get_input_embeddings().weight
    if table.device.type == "meta":
        return 0
    ids = torch.arange(6, device=table.device)
    embeds = language_model.get_input_embeddings()(ids * 7 % len(table))
    digit = 1 + torch.finfo(embeds.dtype).eps
    near, moved, spread = (_run(language_model, embeds, x) for x in (ids, ids + 16, ids * 3))
    rounding = (_run(language_model, embeds * digit, ids) - near).norm()
    seen = max(0.1 * (spread - near).norm(), 8 * rounding)
    return -count if (moved - near).norm() < seen else 0


def _run(language_model: nn.Module, embeds: Tensor, positions: Tensor, **given) -> Tensor:
    """Behind the last layer, of ``embeds`` ``(T, D)``: hidden states ``(T, D)``, or logits."""
    found = language_model.get_decoder()(
        inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False,
        attention_mask=torch.ones_like(positions)[None], **given,
    )  # fmt: skip
    # of some LLMs (Llama 4) the decoder is the whole
    return (found.logits if "logits" in found else found.last_hidden_state)[0].float()


def some_tokens(language_model: nn.Module, count: int) -> Tensor:
    """Embeddings ``(count, D)`` of tokens drawn from the vocabulary, as they enter the LLM."""
    embed = language_model.get_input_embeddings()
    ids = torch.randint(len(embed.weight), (count,), device=embed.weight.device)
    return embed(ids).detach()


# ---------------------------------------------------------------------------------- the tuners


class AttentionLayer(Layer):
    """An attention module that sees learned keys and values.

    Attributes:
        computed: what the tuner gives it, here ``key`` and ``value``.
        shares_softmax: whether what is learned takes weight from the sequence's own keys.
    """

    adapter_layer_names = ()
    shares_softmax = True

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__(base_layer, adapter_name)
        self.computed = Computed()

    def learned(self, hidden: Tensor) -> Learned:
        """What it sees besides its sequence; ``hidden`` ``(B, T, D)`` enters the module."""
        return Learned(self.computed["key"], self.computed["value"], self.choose)

    def forward(self, *args, **kwargs):
        """As the attention module itself."""
        if self.disable_adapters or kwargs.get("learned") is not None:
            return self.base_layer(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return self.base_layer(*args, **kwargs | {"learned": self.learned(hidden)})


class AttentionTuner(Tuner):
    """Learned keys and values in a language model's attention.

    What all modules need is worked out by :meth:`compute` once for each pass of the LLM. Without
    gradients it is kept as long as :meth:`source` stays the same: generation computes it once.
    """

    tuner_layer_cls = AttentionLayer
    uses_shared_state = True

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: PeftConfig) -> list[str]:
        """The attention modules, or those of them that are asked for."""
        from mmpeft.targets import resolve_targets

        found = list(find_attention(language_model))
        if config.target_modules is None:
            return found
        modules = {language_model.get_submodule(path) for path in found}
        return resolve_targets(language_model, config.target_modules, modules.__contains__)

    def source(self) -> Tensor | None:
        """What :meth:`compute` begins with; ``None`` if there is nothing to compute."""
        return None

    def compute(self, source: Tensor) -> None:
        """Fill ``computed`` of each layer."""
        raise NotImplementedError

    def show(self, taken: dict) -> None:
        """Give layers the keys and values that :func:`record` took."""
        for layer in self._layers():
            key, value = taken[layer.base_layer]
            layer.computed.update(key=key, value=value)

    def _pre_injection_hook(self, model, config, adapter_name):
        self._kept = Computed()  # empty where the layers' are
        self.shapes = find_attention(model)
        self.device = model.get_input_embeddings().weight.device
        self.first = first_position(model, config.num_virtual_tokens)

    def _post_injection_hook(self, model, config, adapter_name):
        self._hook = model.register_forward_pre_hook(self._prepare)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        self._hook.remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _prepare(self, model, args):
        layer = next(self._layers(), None)
        if layer is None or layer.disable_adapters:
            return
        if (kind := model.config._attn_implementation) != ATTENTION:
            raise ValueError(
                f"the LLM's attention was set to {kind}, which sees nothing of the adapter; set it "
                f"to {ATTENTION}."
            )
        source = self.source()
        if source is None:
            return
        if not torch.is_grad_enabled() and self._is_kept(source):
            return
        self.compute(source)
        self._kept.clear()
        if not torch.is_grad_enabled():
            self._kept["source"] = source.detach().clone()

    def _is_kept(self, source: Tensor) -> bool:
        kept = self._kept.get("source")
        same = kept is not None and (kept.device, kept.dtype) == (source.device, source.dtype)
        return same and torch.equal(kept, source)

    def _layers(self):
        return (m for m in self.model.modules() if isinstance(m, AttentionLayer))

    def _front(self, count: int) -> Tensor:
        """Positions ``(count,)`` of tokens in front.

        Raises:
            ValueError: the LLM's table of positions is shorter.
        """
        table = getattr(self.model.config, "max_position_embeddings", None)
        if self.first == 0 and table is not None and count > table:
            raise ValueError(
                f"num_virtual_tokens is {count}, but the LLM has a table of {table} positions; "
                f"lower it to {table} or less."
            )
        device = self.model.get_input_embeddings().weight.device  # it may have moved
        return torch.arange(self.first, self.first + count, device=device)


class FrontTuner(AttentionTuner):
    """Keys and values are those of tokens that run through the frozen LLM in front of every row.

    A causal LLM's tokens in front see themselves alone, so one pass over them serves all rows.
    """

    @classmethod
    def find_targets(cls, language_model: nn.Module, config: PeftConfig) -> list[str]:
        """All attention modules.

        Raises:
            ValueError: others are asked for.
        """
        return all_of(language_model, config, list(find_attention(language_model)))

    def wrap(self, module, adapter_name, config, path):
        """The adapted module at ``path``."""
        return AttentionLayer(module, adapter_name)

    def run(self, embeds: Tensor, changes: dict | None = None) -> None:
        """Give layers the keys and values of tokens in front; arguments as of :func:`record`."""
        embeds = embeds.to(self.model.get_input_embeddings().weight.dtype)
        self.show(record(self.model, embeds[None], self._front(len(embeds)), changes))

    def _post_injection_hook(self, model, config, adapter_name):
        super()._post_injection_hook(model, config, adapter_name)
        if self.device.type != "meta" and not self._stands_in_front():
            problem = "what stands in front reaches a text by other ways, too"
            raise ValueError(_refusal(model.config.model_type, problem))

    @torch.no_grad()
    def _stands_in_front(self, count: int = 4) -> bool:
        """Whether the LLM reads a text as it does with the tokens in its row; tries it."""
        tokens, text = some_tokens(self.model, 2 * count).split(count)
        places, before = torch.arange(count, device=text.device), self._front(count)
        row = torch.cat([tokens, text]), torch.cat([before, places])
        whole = _run(self.model, *row, learned=Recorder())[count:]
        alone = _run(self.model, text, places, learned=Recorder())
        self.run(tokens)
        ours = _run(self.model, text, places)
        return bool((ours - whole).norm() < 0.1 * (alone - whole).norm())  # rounding is far below


def all_of(language_model: nn.Module, config: PeftConfig, found: list[str]) -> list[str]:
    """``found``, for a method that leaves no choice of modules.

    Raises:
        ValueError: the config chooses.
    """
    from mmpeft.targets import resolve_targets

    modules = {language_model.get_submodule(path) for path in found}
    chosen = config.target_modules
    if chosen is not None and set(found) != set(
        resolve_targets(language_model, chosen, modules.__contains__)
    ):
        raise ValueError(
            f"adapter {type(config).__name__} acts on every layer of the LLM; leave out "
            "target_modules."
        )
    return found
