"""Put a peft method on the LLM, decide what trains, and say so."""

import copy
import difflib
import re
import sys
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from mmpeft.trial import find_unserved, is_base_when_off, probe

# what peft adapts by default, for LLMs that it has no entry for: query and value, or all in one
ATTENTION = (("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",))

# ways to start LoRA that change the frozen weights, others than those of mmpeft.starts
CHANGES_THE_BASE = ("loftq", "lora_ga")
# options of peft that a bridge cannot keep its word with: they train or change the LLM's own
# parameters, which stay frozen here, or pick layers by names that are full paths by then
UNSERVED = {
    "modules_to_save": "trains modules of the LLM, which stays frozen; leave it out",
    "trainable_token_indices": "trains embeddings of the LLM, which stays frozen; leave it out",
    "layer_replication": "makes another LLM of it; leave it out",
    "alora_invocation_tokens": "looks for words among token ids, which a bridge does not hand on; "
    "leave it out, gates are there for that",
    "use_qalora": "is read for GPTQ layers alone; leave it out",
    "arrow_config": "mixes several adapters, of which a bridge has one; leave it out",
    "layers_to_transform": "is not read; write target_modules as a regular expression that matches "
    "the full names, for example '.*layers\\.[01]\\..*q_proj'",
}

# methods of peft that need what a bridge has not, or break what it promises
REFUSED = {
    "LILY": "mixes its experts by the mean over a whole row, so that words would see those behind",
    "POLY": "picks skills by task ids, which rows here do not have",
    "SHADOW": "runs a second stream through layers that it replaces",
    "TRAINABLE_TOKENS": "trains embeddings of the LLM, which stays frozen",
    "XLORA": "mixes trained adapters, of which a bridge has one",
}


def attach_adapter(language_model: nn.Module, adapter, new: bool = True):
    """Wrap a frozen causal LM in a ``PeftModel``; targets become full paths inside this LLM.

    Args:
        adapter: a config of peft or of :mod:`mmpeft.tuners`, which stays as it is.
            ``target_modules`` may be the method's own default (``None``), names like ``q_proj``, a
            regular expression, or ``"all-linear"``. GPT-2's ``Conv1D`` layers count as linear.
        new: false where the adapter's weights follow, so that no start need be made.

    Raises:
        ValueError: a target names no layer of this LLM that the method adapts, or the adapter would
            be more than an addition to the frozen LLM.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from mmpeft.starts import wrap
    from mmpeft.tuners.from_peft import translate
    from mmpeft.tuners.merging import MergingTuner

    adapter = copy.deepcopy(translate(adapter))
    _require_addition(adapter)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[adapter.peft_type]
    if hasattr(tuner, "find_targets"):
        adapter.target_modules = tuner.find_targets(language_model, adapter)
    elif hasattr(adapter, "target_modules"):
        _resolve(language_model, adapter, getattr(tuner, "target_module_mapping", None))
    if new and hasattr(adapter, "target_modules"):
        _leave_out(language_model, adapter, whole=issubclass(tuner, MergingTuner))
    # peft's causal wrapper refuses inputs_embeds for MPT, its plain one does not
    causal = adapter.task_type or "CAUSAL_LM"
    adapter.task_type = None if language_model.config.model_type == "mpt" else causal
    before = probe(language_model)
    asked = getattr(adapter, "target_modules", None)
    parameters = set(getattr(adapter, "target_parameters", None) or ())
    try:
        wrapped = wrap(language_model, adapter, new)
    except (TypeError, NotImplementedError) as error:  # peft's words for a kind of layer
        raise ValueError(
            f"adapter {type(adapter).__name__} does not serve these layers ({error}); choose other "
            "target_modules, or another method, for example LoraConfig."
        ) from error
    _require_targets_kept(asked, parameters, wrapped)
    if before is not None and not is_base_when_off(wrapped, before):
        raise ValueError(
            f"adapter {type(adapter).__name__} changes the frozen weights, and the base LLM could "
            "not be had back by switching it off; choose another method, or another way to start."
        )
    return wrapped


def _resolve(language_model: nn.Module, adapter, defaults: dict | None) -> None:
    """Put full paths into a config of peft."""
    norms = adapter.peft_type == "LN_TUNING"
    kind = _is_norm if norms else _is_linear
    if adapter.peft_type == "IA3" and adapter.target_modules is None:
        adapter.target_modules = _usual_of_ia3(language_model)
    adapter.target_modules = resolve_targets(language_model, adapter.target_modules, kind, defaults)
    if getattr(adapter, "feedforward_modules", ()) is None:  # (IA)^3 scales these at their input
        outputs = _ffn_outputs(language_model)
        adapter.feedforward_modules = [n for n in outputs if _named(adapter.target_modules, n)]
    if ff := getattr(adapter, "feedforward_modules", None):
        paths = set(resolve_targets(language_model, ff)) & set(adapter.target_modules)
        adapter.feedforward_modules = sorted(paths)
    layers = [language_model.get_submodule(name) for name in adapter.target_modules]
    conv = bool(layers) and all(isinstance(layer, Conv1D) for layer in layers)
    if conv and hasattr(adapter, "fan_in_fan_out"):
        adapter.fan_in_fan_out = True  # Conv1D keeps its weight transposed


def _leave_out(language_model: nn.Module, adapter, whole: bool) -> None:
    """Take out of the targets those where the adapter would not act, and say so on stderr.

    Raises:
        ValueError: no target is left.
    """
    unserved = find_unserved(language_model, whole)
    left_out = [name for name in adapter.target_modules if name in unserved]
    if not left_out:
        return
    for field in ("target_modules", "feedforward_modules"):
        if names := getattr(adapter, field, None):
            setattr(adapter, field, [name for name in names if name not in unserved])
    for why in dict.fromkeys(unserved[name] for name in left_out):
        names = [name for name in left_out if unserved[name] == why]
        what = f"{', '.join(_last_parts(names))} in {len(names)} places ({names[0]}, ...)"
        if not adapter.target_modules:
            raise ValueError(f"target_modules: {what}: {why}; choose other layers.")
        print(f"adapter: leaves out {what}: {why}.", file=sys.stderr)


def _require_targets_kept(asked, parameters: set[str], wrapped) -> None:
    """Refuse what peft makes of some names in an LLM with experts.

    They were its experts' layers before transformers 5, and peft, for the sake of old adapters,
    takes any layer of such a name for all experts at once: ``target_parameters``.
    """
    added = set(getattr(wrapped.active_peft_config, "target_parameters", None) or ()) - parameters
    if added:
        adapted = {name.removeprefix("base_model.model.") for name, _ in adapted_layers(wrapped)}
        taken = sorted(set(asked) - adapted)
        raise ValueError(
            f"target_modules: peft takes {_last_parts(taken)} in this LLM, {taken[0]} among them, "
            f"for all its experts at once; choose others, for example "
            f"{_last_parts(set(asked) & adapted) or 'q_proj'}, and name experts in "
            "target_parameters."
        )


def _usual_of_ia3(language_model: nn.Module) -> list[str]:
    """What (IA)^3 scales: as peft has it for this LLM, else keys, values and within the FFN."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as USUAL

    if names := USUAL.get(language_model.config.model_type):
        return names
    names = [name for name, module in language_model.named_modules() if _is_linear(module)]
    if not {"k_proj", "v_proj"} <= set(_last_parts(names)):
        raise ValueError(
            f"peft has no default targets of (IA)^3 for {language_model.config.model_type!r}; set "
            f"target_modules and feedforward_modules to some of {_last_parts(names)}."
        )
    return ["k_proj", "v_proj", *_ffn_outputs(language_model)]


def _ffn_outputs(language_model: nn.Module) -> list[str]:
    """The layers at whose input (IA)^3 scales."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as USUAL

    from mmpeft.tuners.sublayers import find_sublayers

    if names := USUAL.get(language_model.config.model_type):
        return names
    return [one.output for one in find_sublayers(language_model) if one.kind == "ffn"]


def _require_addition(adapter) -> None:
    """Refuse what would change the LLM itself, or be dropped without a word."""
    if adapter.is_prompt_learning:
        raise ValueError(
            f"adapter {type(adapter).__name__} puts prompts of its own kind in front of the text, "
            "which a bridge does not serve; choose another, for example PromptConfig."
        )
    if reason := REFUSED.get(adapter.peft_type):
        raise ValueError(
            f"adapter {type(adapter).__name__} {reason}; choose another, for example LoraConfig."
        )
    for option, reason in UNSERVED.items():
        if value := getattr(adapter, option, None):
            raise ValueError(f"adapter: {option} {value!r} {reason}.")
    if (bias := getattr(adapter, "bias", "none")) != "none":
        raise ValueError(
            f"adapter: bias {bias!r} trains biases of the LLM, which stays frozen; set bias: none."
        )
    start = getattr(adapter, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"adapter: init_lora_weights {start!r} changes the frozen weights, and the base LLM "
            "could not be had back; set true, gaussian, orthogonal, pissa, olora, corda or eva."
        )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _is_norm(module: nn.Module) -> bool:
    """A layer with weights of its own that is neither linear nor a table."""
    own = any(True for _ in module.parameters(recurse=False))
    return own and not isinstance(module, (nn.Linear, Conv1D, nn.Embedding))


def resolve_targets(
    language_model: nn.Module, targets, kind=_is_linear, defaults: dict | None = None
) -> list[str]:
    """Full paths of the modules that ``targets`` name.

    Args:
        kind: says of a module whether the method adapts such a one; the vocabulary projection is
            never adapted.
        defaults: the method's targets by model type, for ``targets`` ``None``; LoRA's fill in.
    """
    head = language_model.get_output_embeddings()
    found = [
        name
        for name, module in language_model.named_modules()
        if kind(module) and module is not head
    ]
    if targets is None:
        targets = _usual(language_model.config.model_type, found, kind, defaults or {})
    if targets == "all-linear":
        return found
    if isinstance(targets, str):
        matched = {targets: [name for name in found if re.fullmatch(targets, name)]}
    else:
        matched = {target: _named(found, target) for target in targets}
    for target, names in matched.items():
        if not names:
            known = _last_parts(found)
            close = difflib.get_close_matches(target, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            what = "linear layer" if kind is _is_linear else "layer that this method adapts"
            raise ValueError(
                f"target_modules: {target!r} names no {what} of this language model.{hint} "
                f"It has {known}."
            )
    return sorted({name for names in matched.values() for name in names})


def _usual(model_type: str, found: list[str], kind, defaults: dict):
    """The default targets of a method."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA

    parts = _last_parts(found)
    if model_type in defaults:
        return defaults[model_type]
    if kind is not _is_linear:
        return parts
    usual = next((names for names in ATTENTION if set(names) <= set(parts)), None)
    targets = LORA.get(model_type, usual)
    if targets is None:
        raise ValueError(
            f"peft has no default targets for {model_type!r}; set target_modules to some of "
            f"{parts}."
        )
    return targets


def _named(paths, name: str) -> list[str]:
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def _last_parts(names):
    return sorted({name.rsplit(".", 1)[-1] for name in names})


@dataclass
class PartSummary:
    """One row of the freeze plan."""

    part: str
    total: int
    trained: int


def adapted_layers(language_model: nn.Module):
    """``(path, layer)`` of each layer that a peft method put in the place of one of the LLM."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in language_model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield name, layer


def require_own_weights(language_model: nn.Module) -> None:
    """Refuse to merge adapters of layers that share a weight: it would take up all of them.

    Raises:
        ValueError: there are such layers, as in Zamba2.
    """
    first = {}
    for path, layer in adapted_layers(language_model):
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is not None and first.setdefault(id(weight), path) != path:
            raise ValueError(
                f"the adapter cannot be merged: {first[id(weight)]} and {path} share one weight, "
                "and each has an adapter of its own. Keep the adapter beside the LLM."
            )


def adapter_parameters(language_model: nn.Module) -> list[nn.Parameter]:
    """The parameters a peft method added to the LLM; empty when there is no adapter."""
    return list({id(p): p for part in _adapter_parts(language_model) for p in part}.values())


def _adapter_parts(language_model: nn.Module):
    """Parameters of each layer's adapter, and what layers share."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    for module in language_model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                yield getattr(module, name).parameters()
        elif isinstance(module, BaseTuner):
            for name, child in module.named_children():
                if name != "model":
                    yield child.parameters()


def set_adapter_mode(language_model: nn.Module, training: bool) -> None:
    """Put the adapter alone (its dropout) in training or eval mode."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    for layer in language_model.modules():
        if isinstance(layer, (BaseTuner, BaseTunerLayer)):
            layer.training = training
            for name, child in layer.named_children():
                if name not in ("base_layer", "model"):
                    child.train(training)


def set_trainable(model, *, connector: bool, adapter: bool) -> None:
    """Freeze everything, then open the connector and the adapter as asked."""
    model.requires_grad_(False)
    model.connector.requires_grad_(connector)
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parameter in adapter_parameters(model.language_model):
        parameter.requires_grad_(adapter)
    for layer in model.language_model.modules():
        if isinstance(layer, BaseTunerLayer):  # some methods keep a part of theirs as it began
            layer._freeze_non_trainable_peft_weights()


def freeze_plan(model) -> list[PartSummary]:
    """What is frozen and what trains, part by part."""
    adapter = adapter_parameters(model.language_model)
    in_adapter = {id(p) for p in adapter}
    parts = {
        "vision encoder": list(model.vision_encoder.parameters()),
        "connector": list(model.connector.parameters()),
        "language model": [p for p in model.language_model.parameters() if id(p) not in in_adapter],
        "adapter": adapter,
    }
    return [
        PartSummary(
            part,
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
        )
        for part, parameters in parts.items()
    ]


def render_freeze_plan(plan: list[PartSummary]) -> str:
    """The plan as a table, with shares of the whole."""
    whole = sum(row.total for row in plan)
    lines = [f"{'part':<16}{'parameters':>14}{'trained':>14}{'share':>9}"]
    for row in [*plan, PartSummary("all", whole, sum(row.trained for row in plan))]:
        share = row.trained / whole
        lines.append(f"{row.part:<16}{row.total:>14,}{row.trained:>14,}{share:>9.2%}")
    return "\n".join(lines)
