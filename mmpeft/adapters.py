"""Put a peft method on the LLM, decide what trains, and say so."""

import copy
import difflib
import re
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

# what peft adapts by default, for LLMs that it has no entry for: query and value, or all in one
ATTENTION = (("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",))

# ways to start LoRA that take what it begins with out of the frozen weights
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# options of peft that a bridge cannot keep its word with: they train or change the LLM's own
# parameters, which stay frozen here, or pick layers by names that are full paths by then
UNSERVED = {
    "modules_to_save": "trains modules of the LLM, which stays frozen; leave it out",
    "trainable_token_indices": "trains embeddings of the LLM, which stays frozen; leave it out",
    "layer_replication": "makes another LLM of it; leave it out",
    "layers_to_transform": "is not read; write target_modules as a regular expression that matches "
    "the full names, for example '.*layers\\.[01]\\..*q_proj'",
}


def attach_adapter(language_model: nn.Module, adapter):
    """Wrap a frozen causal LM in a ``PeftModel``; targets become full paths inside this LLM.

    Args:
        adapter: a peft config, which stays as it is. ``target_modules`` may be peft's own default
            (``None``), names like ``q_proj``, a regular expression, or ``"all-linear"``. GPT-2's
            ``Conv1D`` layers count as linear.

    Raises:
        ValueError: a target names no linear layer of this LLM, or the adapter would be more than an
            addition to the frozen LLM.
    """
    from peft import get_peft_model

    _require_addition(adapter)
    adapter = copy.deepcopy(adapter)
    if hasattr(adapter, "target_modules"):
        adapter.target_modules = resolve_targets(language_model, adapter.target_modules)
        layers = [language_model.get_submodule(name) for name in adapter.target_modules]
        conv = bool(layers) and all(isinstance(layer, Conv1D) for layer in layers)
        if conv and hasattr(adapter, "fan_in_fan_out"):
            adapter.fan_in_fan_out = True  # Conv1D keeps its weight transposed
    # peft's causal wrapper refuses inputs_embeds for MPT, its plain one does not
    causal = adapter.task_type or "CAUSAL_LM"
    adapter.task_type = None if language_model.config.model_type == "mpt" else causal
    return get_peft_model(language_model, adapter)


def _require_addition(adapter) -> None:
    """Refuse what would change the LLM itself, or be dropped without a word."""
    if adapter.is_prompt_learning or adapter.is_adaption_prompt:
        raise ValueError(
            f"adapter {type(adapter).__name__} puts learned prompts in front of the text, which a "
            "bridge does not serve; choose one that adapts layers, for example LoraConfig."
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
            "could not be had back; set true, gaussian or orthogonal."
        )


def resolve_targets(language_model: nn.Module, targets) -> list[str]:
    """Full module paths of the linear layers that ``targets`` name."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    head = language_model.get_output_embeddings()
    linear = [
        name
        for name, module in language_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    if targets is None:
        model_type, parts = language_model.config.model_type, _last_parts(linear)
        usual = next((names for names in ATTENTION if set(names) <= set(parts)), None)
        targets = DEFAULTS.get(model_type, usual)
        if targets is None:
            raise ValueError(
                f"peft has no default targets for {model_type!r}; set target_modules to some of "
                f"{parts}."
            )
    if targets == "all-linear":
        return linear
    if isinstance(targets, str):
        matched = {targets: [name for name in linear if re.fullmatch(targets, name)]}
    else:
        matched = {t: [n for n in linear if n == t or n.endswith(f".{t}")] for t in targets}
    for target, names in matched.items():
        if not names:
            known = _last_parts(linear)
            close = difflib.get_close_matches(target, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"target_modules: {target!r} names no linear layer of this language model.{hint} "
                f"It has {known}."
            )
    return sorted({name for names in matched.values() for name in names})


def _last_parts(names):
    return sorted({name.rsplit(".", 1)[-1] for name in names})


@dataclass
class PartSummary:
    """One row of the freeze plan."""

    part: str
    total: int
    trained: int


def adapter_parameters(language_model: nn.Module) -> list[nn.Parameter]:
    """The parameters a peft method added to the LLM; empty when there is no adapter."""
    config = getattr(language_model, "peft_config", None)
    if config is None:
        return []
    prefix = language_model.base_model.prefix
    return [p for name, p in language_model.named_parameters() if prefix in name]


def set_adapter_mode(language_model: nn.Module, training: bool) -> None:
    """Put the adapter alone (its dropout) in training or eval mode."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in language_model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.training = training
            for name, child in layer.named_children():
                if name != "base_layer":
                    child.train(training)


def set_trainable(model, *, connector: bool, adapter: bool) -> None:
    """Freeze everything, then open the connector and the adapter as asked."""
    model.requires_grad_(False)
    model.connector.requires_grad_(connector)
    for parameter in adapter_parameters(model.language_model):
        parameter.requires_grad_(adapter)


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
