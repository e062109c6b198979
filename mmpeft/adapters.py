"""Put a peft method on the LLM, decide what trains, and say so."""

import copy
import sys
from dataclasses import dataclass

from peft import PeftConfig
from torch import nn

from mmpeft.targets import last_parts, leave_out, resolve
from mmpeft.trial import is_base_when_off, probe

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
    "use_asa": "moves subspaces as training goes on, which is not served; leave it out",
    "monteclora_config": "adds a loss of its own, which is not served; leave it out",
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

    if not isinstance(adapter, PeftConfig):
        raise ValueError(f"adapter is {adapter!r}; give one peft config, such as LoraConfig(r=16).")
    adapter = copy.deepcopy(translate(adapter))
    _require_addition(adapter)
    adapter.weights_follow = not new
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[adapter.peft_type]
    if hasattr(tuner, "find_targets"):
        adapter.target_modules = tuner.find_targets(language_model, adapter)
    elif hasattr(adapter, "target_modules"):
        resolve(language_model, adapter, getattr(tuner, "target_module_mapping", None))
    if new and adapter.peft_type == "LN_TUNING" and language_model.dtype.itemsize < 4:
        adapter = _with_float32_copies(language_model, adapter)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[adapter.peft_type]
    if new and hasattr(adapter, "target_modules"):
        leave_out(language_model, adapter, whole=issubclass(tuner, MergingTuner))
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
    except ArithmeticError as error:  # of a size that peft does not check
        raise ValueError(
            f"adapter {type(adapter).__name__} cannot have these sizes ({error}); mend r, or what "
            "else sets its size."
        ) from error
    _require_targets_kept(asked, parameters, wrapped)
    if before is not None and not is_base_when_off(wrapped, before):
        raise ValueError(
            f"adapter {type(adapter).__name__} changes the frozen weights, and the base LLM could "
            "not be had back by switching it off; choose another method, or another way to start."
        )
    return wrapped


def _with_float32_copies(language_model: nn.Module, adapter) -> PeftConfig:
    """LN tuning whose norms can move: in 16 bits a step is less than the last digit of a 1."""
    from mmpeft.tuners.full import FullTuningConfig

    print(
        f"adapter: LNTuningConfig would train norms in {language_model.dtype}, too coarse for its "
        "steps; taken as FullTuningConfig of them, whose copies are float32.",
        file=sys.stderr,
    )
    return FullTuningConfig(target_modules=adapter.target_modules, task_type=adapter.task_type)


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
            f"target_modules: peft takes {last_parts(taken)} in this LLM, {taken[0]} among them, "
            "for all its experts at once; choose others, for example "
            f"{last_parts(set(asked) & adapted) or 'q_proj'}, and name experts in "
            "target_parameters."
        )


def _require_addition(adapter) -> None:
    """Refuse what would change the LLM itself, or be dropped without a word."""
    if adapter.peft_type is None:
        raise ValueError(
            f"adapter {type(adapter).__name__} is no method; name one, for example LoraConfig."
        )
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
        value = getattr(adapter, option, None)
        if value or (value == 0 and value is not False):  # 0 is a layer
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


def require_one_adapter(language_model: nn.Module) -> None:
    """Raise ValueError if peft put another adapter beside the bridge's, or in its place."""
    names = list(getattr(language_model, "peft_config", {"default": None}))
    if names != ["default"]:
        raise ValueError(
            f"the language model has the adapters {', '.join(names)}, and a bridge serves the one "
            "it was made with; load a bridge for each."
        )


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
