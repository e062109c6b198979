"""peft's own configs for learned prompts, as the methods of this package that stand for them.

peft puts prompts in front of the token ids or into the KV cache, which a bridge has no room for. A
text that a prompt begins as is read with the LLM's own tokenizer.
"""

import dataclasses
import sys

from peft import (
    AdaptionPromptConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from mmpeft.tuners.llama_adapter import LlamaAdapterConfig
from mmpeft.tuners.prefix import PrefixConfig
from mmpeft.tuners.prompt import PromptConfig, PTuningConfig

# what says nothing about the method
NOTES = {field.name for field in dataclasses.fields(PeftConfig)} | {"num_transformer_submodules"}


def translate(adapter: PeftConfig) -> PeftConfig:
    """A config of this package for one of peft's for prompts, with a line on stderr; or itself.

    Raises:
        ValueError: an option has nothing that it corresponds to.
    """
    if type(adapter) not in TRANSLATIONS:
        return adapter
    given = {
        field.name: getattr(adapter, field.name)
        for field in dataclasses.fields(adapter)
        if field.name not in NOTES and getattr(adapter, field.name) != field.default
    }
    name = type(adapter).__name__
    try:
        ours = TRANSLATIONS[type(adapter)](given.pop)
    except KeyError as error:
        raise ValueError(f"adapter {name}: set {error.args[0]}.") from None
    if given:
        option, value = next(iter(given.items()))
        raise ValueError(
            f"adapter {name}: {option} {value!r} has no counterpart in {type(ours).__name__}, "
            "which stands for it here; leave it out."
        )
    fields = ", ".join(
        f"{field.name}={value!r}"
        for field in dataclasses.fields(ours)
        if field.name not in NOTES and (value := getattr(ours, field.name)) is not None
    )
    print(f"adapter: {name} is here {type(ours).__name__}({fields}).", file=sys.stderr)
    ours.task_type = adapter.task_type
    return ours


def _prefix(take) -> PrefixConfig:
    projected = take("prefix_projection", False)
    return PrefixConfig(
        num_virtual_tokens=take("num_virtual_tokens"),
        hidden_size=take("encoder_hidden_size") if projected else None,
        init=take("init_weights", "normal"),
    )


def _prompt(take) -> PromptConfig:
    kind = take("prompt_tuning_init", "RANDOM")
    kind = getattr(kind, "value", kind)
    text = take("prompt_tuning_init_text", None) if kind == "TEXT" else None
    take("tokenizer_name_or_path", None)
    return PromptConfig(
        num_virtual_tokens=take("num_virtual_tokens"), init_text=text,
        init={"RANDOM": "normal", "SAMPLE_VOCAB": "vocabulary", "TEXT": "text"}[kind],
    )  # fmt: skip


def _p_tuning(take) -> PTuningConfig:
    kind = take("encoder_reparameterization_type", "MLP")
    return PTuningConfig(
        num_virtual_tokens=take("num_virtual_tokens"),
        encoder=getattr(kind, "value", kind).lower(),
        hidden_size=take("encoder_hidden_size", None),
        num_layers=take("encoder_num_layers", 2),
        dropout=take("encoder_dropout", 0.0),
    )


def _adaption(take) -> LlamaAdapterConfig:
    return LlamaAdapterConfig(
        num_virtual_tokens=take("adapter_len"), num_layers=take("adapter_layers")
    )


TRANSLATIONS = {
    PrefixTuningConfig: _prefix,
    PromptTuningConfig: _prompt,
    PromptEncoderConfig: _p_tuning,
    AdaptionPromptConfig: _adaption,
}
