"""LLM and connector of a vision-language checkpoint in transformers' format, each on its own.

LLaVA, BLIP-2 and InstructBLIP directories (or hub names) hold a vision tower (which any
``TransformersEncoderConfig`` reads), a connector and an LLM. Only the tensors of the part that is
asked for are read, from safetensors, in one file or in shards; the keys may be those that
transformers 4 wrote or those of transformers 5.
"""

import re
from contextlib import contextmanager

import torch
from torch import Tensor

from mmpeft.weights import first_line, readable, weight_files

# Checkpoint keys of the LLM to its own keys. A LLaVA directory holds it without the class of a
# causal LM around it: {base} and {head} are what that class calls its parts.
_BLIP_LLM = {r"^language_model\.": ""}
_LANGUAGE_MODEL = {
    "llava": {
        r"^(language_model\.model|model\.language_model)\.": "{base}.",
        r"^(language_model\.)?lm_head\.": "{head}.",
    },
    "blip-2": _BLIP_LLM,
    "instructblip": _BLIP_LLM,
}
# What a key of the connector starts with; the match is taken off.
_BLIP_CONNECTOR = r"(?=qformer\.|query_tokens|language_projection\.)"
_CONNECTOR = {
    "llava": r"(model\.)?multi_modal_projector\.",
    "blip-2": _BLIP_CONNECTOR,
    "instructblip": _BLIP_CONNECTOR,
}
SUPPORTED = tuple(_CONNECTOR)


def is_vlm(config) -> bool:
    """Whether a loaded transformers config describes an LLM with something around it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    has_text_config = getattr(config, "text_config", None) is not None
    return has_text_config and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def load_config(name: str, revision: str | None = None):
    """The config of a supported vision-language checkpoint.

    Raises:
        ValueError: there is none, it is of another type, or its LLM is no causal LM (T5).
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is no checkpoint directory of transformers and cannot be had from the hub "
            f"({first_line(error)})"
        ) from error
    check_supported(name, config)
    return config


def check_supported(name: str, config) -> None:
    """Refuse a config whose parts cannot be taken out."""
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint; only {', '.join(SUPPORTED)} can be "
            "imported."
        )
    if config.text_config.is_encoder_decoder:
        raise ValueError(
            f"the language model of {name} is an encoder-decoder "
            f"({config.text_config.model_type}); only decoder LLMs can be imported (BLIP-2 with "
            "OPT, InstructBLIP with Vicuna)."
        )


def llm_config(name: str, config):
    """The LLM's own config, out of that of the checkpoint."""
    check_supported(name, config)
    if config.model_type == "llava":  # there the outer config says whether embeddings are tied
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
    return config.text_config


def load_language_model(name: str, config, *, revision=None, dtype=torch.float32):
    """The LLM as a causal LM, with the vocabulary it has in the checkpoint."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    text_config = llm_config(name, config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(text_config)
    head = empty.get_output_embeddings()
    names = {
        "base": empty.base_model_prefix,
        "head": next(n for n, module in empty.named_modules() if module is head),
    }
    keys = {k: v.format(**names) for k, v in _LANGUAGE_MODEL[config.model_type].items()}
    weight_files(name, revision)
    # the weights of the other parts would be reported as unexpected
    with _quiet(), readable(name):
        model, found = type(empty).from_pretrained(
            name, config=text_config, revision=revision, dtype=dtype, use_safetensors=True,
            key_mapping=keys, output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of its language model: {missing[0]} ..."
        )
    if config.model_type != "llava":  # upstream generates with what the LLM's own config says
        model.generation_config = GenerationConfig.from_model_config(text_config)
    return model


def read_connector(name: str, config, *, revision=None) -> dict[str, Tensor]:
    """The tensors between vision tower and LLM, in float32.

    Their keys are those of upstream: ``linear_1.weight`` (LLaVA); ``query_tokens``,
    ``qformer.encoder...`` and ``language_projection.weight`` (BLIP-2).
    """
    from safetensors import safe_open

    check_supported(name, config)
    start = re.compile(_CONNECTOR[config.model_type])
    tensors = {}
    for file in weight_files(name, revision):
        with readable(name), safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                if match := start.match(key):
                    tensors[key[match.end() :]] = opened.get_tensor(key).float()
    if not tensors:
        raise ValueError(f"{name} holds no weights of the connector; is the download complete?")
    return tensors


@contextmanager
def _quiet():
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
