"""The attention and the FFN of each layer of an LLM, found by how its modules are built."""

from dataclasses import dataclass
from typing import Literal

from peft import PeftConfig
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from mmpeft.targets import resolve_targets

Kind = Literal["attention", "ffn"]
LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a decoder layer.

    Attributes:
        kind: ``attention`` or ``ffn``.
        module: its full path; ``None`` where it is no module of its own (OPT's FFN).
        output: full path of the linear layer that makes its output.
    """

    kind: Kind
    module: str | None
    output: str


def decoder_layers(language_model: nn.Module) -> dict[str, nn.Module]:
    """The LLM's layers by path, as transformers marks them."""
    return {
        name: module
        for name, module in language_model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }


def hidden_size(language_model: nn.Module) -> int:
    """D, the width of what flows from layer to layer."""
    return language_model.config.get_text_config().hidden_size


def sizes(module: nn.Module, hidden: int) -> tuple[int, int]:
    """Width of what a module reads and of what it returns; ``hidden`` for whole sublayers."""
    return _get_in_out_features(module) if isinstance(module, LINEAR) else (hidden, hidden)


def find_sublayers(language_model: nn.Module) -> list[Sublayer]:
    """Both sublayers of every layer, in order.

    Transformers names its attention classes ``...Attention``; the FFN is what else there is of
    linear layers. The last one of each that is made with width D gives the sublayer's output.

    Raises:
        ValueError: a layer is not made like this, a mixture of experts for example.
    """
    hidden, found = hidden_size(language_model), []
    for path, layer in decoder_layers(language_model).items():
        inside = dict(layer.named_modules())
        attention = next(
            (name for name, m in inside.items() if type(m).__name__.endswith("Attention")), None
        )
        linear = {name: m for name, m in inside.items() if isinstance(m, LINEAR)}
        own = {name for name in linear if attention and name.startswith(f"{attention}.")}
        rest = [name for name in linear if name not in own]
        parents = {name.partition(".")[0] for name in rest}
        ffn = parents.pop() if len(parents) == 1 and "." in rest[0] else None
        for kind, module, names in (
            ("attention", attention, [name for name in linear if name in own]), ("ffn", ffn, rest),
        ):  # fmt: skip
            outputs = [name for name in names if sizes(linear[name], hidden)[1] == hidden]
            if not outputs or _has_experts(inside, module):
                raise ValueError(
                    f"{language_model.config.model_type}: {path} has no {kind} that can be told "
                    f"from its modules; set target_modules to some of {sorted(linear)}."
                )
            found.append(Sublayer(kind, module and f"{path}.{module}", f"{path}.{outputs[-1]}"))
    if not found:
        raise ValueError(
            f"{language_model.config.model_type}: this LLM does not mark its layers; set "
            "target_modules."
        )
    return found


def _has_experts(inside: dict[str, nn.Module], sublayer: str | None) -> bool:
    """Whether weights other than those of linear layers and norms make the sublayer's output."""
    return sublayer is not None and any(
        parameter.dim() > 1
        for name, module in inside.items()
        if name.startswith(sublayer) and not isinstance(module, LINEAR)
        for parameter in module.parameters(recurse=False)
    )


def find_outputs(language_model: nn.Module, config: PeftConfig) -> list[str]:
    """Paths of the linear layers that make the output of ``config.sublayers``.

    ``config.target_modules``, where set, names modules of any kind instead.
    """
    if config.target_modules is not None:
        return named_modules(language_model, config.target_modules)
    found = find_sublayers(language_model)
    return [sublayer.output for sublayer in found if sublayer.kind in config.sublayers]


def named_modules(language_model: nn.Module, targets: list[str] | str) -> list[str]:
    """Paths of the modules with weights, of any kind, that ``targets`` name.

    Raises:
        ValueError: one names none, or lies in another.
    """
    if targets == "all-linear":
        return resolve_targets(language_model, targets)
    found = resolve_targets(
        language_model, targets, kind=lambda module: any(True for _ in module.parameters())
    )
    for path in found:
        for outer in found:
            if path != outer and path.startswith(f"{outer}." if outer else ""):
                raise ValueError(
                    f"target_modules: {path} lies in {outer or 'the whole LLM'}, which is one, "
                    "too; name one of the two."
                )
    return found
