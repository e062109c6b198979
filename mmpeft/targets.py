"""Which layers of an LLM an adapter goes on: names in a config become full paths inside the LLM."""

import difflib
import re
import sys

from torch import nn
from transformers.pytorch_utils import Conv1D

from mmpeft.trial import find_unserved

# what peft adapts by default, for LLMs that it has no entry for: query and value, or all in one
ATTENTION = (("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",))


def resolve(language_model: nn.Module, adapter, defaults: dict | None) -> None:
    """Put full paths into a config of peft."""
    norms = adapter.peft_type == "LN_TUNING"
    kind = _is_norm if norms else _is_linear
    named = adapter.target_modules is not None
    if adapter.peft_type == "IA3" and adapter.target_modules is None:
        adapter.target_modules = _usual_of_ia3(language_model)
    adapter.target_modules = resolve_targets(language_model, adapter.target_modules, kind, defaults)
    if getattr(adapter, "feedforward_modules", ()) is None:  # (IA)^3 scales these at their input
        try:
            outputs = _ffn_outputs(language_model)
        except ValueError:
            if not named:
                raise
            outputs = []  # experts, and none of them was named
        adapter.feedforward_modules = [n for n in outputs if _named(adapter.target_modules, n)]
    if ff := getattr(adapter, "feedforward_modules", None):
        paths = set(resolve_targets(language_model, ff)) & set(adapter.target_modules)
        adapter.feedforward_modules = sorted(paths)
    layers = [language_model.get_submodule(name) for name in adapter.target_modules]
    conv = bool(layers) and all(isinstance(layer, Conv1D) for layer in layers)
    if conv and hasattr(adapter, "fan_in_fan_out"):
        adapter.fan_in_fan_out = True  # Conv1D keeps its weight transposed


def leave_out(language_model: nn.Module, adapter, whole: bool) -> None:
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
        what = f"{', '.join(last_parts(names))} in {len(names)} places ({names[0]}, ...)"
        if not adapter.target_modules:
            raise ValueError(f"target_modules: {what}: {why}; choose other layers.")
        print(f"adapter: leaves out {what}: {why}.", file=sys.stderr)


def _usual_of_ia3(language_model: nn.Module) -> list[str]:
    """What (IA)^3 scales: as peft has it for this LLM, else keys, values and within the FFN."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    head = language_model.get_output_embeddings()
    names = [name for name, module in language_model.named_modules()
             if _is_linear(module) and module is not head]  # fmt: skip
    usual = TARGETS.get(language_model.config.model_type)
    if usual and all(_named(names, one) for one in usual):  # else they were, before transformers 5
        return usual
    if not {"k_proj", "v_proj"} <= set(last_parts(names)):
        raise ValueError(
            f"peft has no default targets of (IA)^3 for {language_model.config.model_type!r}; set "
            f"target_modules and feedforward_modules to some of {last_parts(names)}."
        )
    return ["k_proj", "v_proj", *_ffn_outputs(language_model)]


def _ffn_outputs(language_model: nn.Module) -> list[str]:
    """The layers at whose input (IA)^3 scales."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as OUTPUTS

    from mmpeft.tuners.sublayers import find_sublayers

    usual = OUTPUTS.get(language_model.config.model_type)
    if usual and all(_named((n for n, _ in language_model.named_modules()), one) for one in usual):
        return usual
    return [one.output for one in find_sublayers(language_model) if one.kind == "ffn"]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _is_norm(module: nn.Module) -> bool:
    """A layer of vectors alone; others with parameters are linear, tables, experts, recurrences."""
    own = list(module.parameters())
    inside = any(True for _ in module.children())
    return bool(own) and not inside and all(parameter.dim() <= 1 for parameter in own)


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
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"target_modules: {targets!r} is no regular expression ({error}); names go into a "
                "list, as [q_proj, v_proj]."
            ) from None
        matched = {targets: [name for name in found if re.fullmatch(targets, name)]}
    else:
        matched = {target: _named(found, target) for target in targets}
    for target, names in matched.items():
        if not names:
            known = last_parts(found)
            close = difflib.get_close_matches(target, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            if isinstance(targets, str):
                hint = " A text is a regular expression of whole paths; names go into a list, as "
                hint += f"[{close[0] if close else target}]."
            what = "linear layer" if kind is _is_linear else "layer that this method adapts"
            raise ValueError(
                f"target_modules: {target!r} names no {what} of this language model.{hint} "
                f"It has {known}."
            )
    return sorted({name for names in matched.values() for name in names})


def _usual(model_type: str, found: list[str], kind, defaults: dict):
    """The default targets of a method."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA

    parts = last_parts(found)
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


def last_parts(names):
    return sorted({name.rsplit(".", 1)[-1] for name in names})
