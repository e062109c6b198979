"""The frozen language model: loading any causal LM, and the facts about it that other parts need.

A name is a model directory, a hub name, ``starter:NAME``, or a GGUF file (also a directory that
holds nothing but one, or ``owner/name/file.gguf`` on the hub), which is read dense.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft.weights import NO_SAFETENSORS, first_line, readable, weight_map

# what configs call the longest sequence they were made for
CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
# what configs call how far back a token may look in layers that do not see everything
WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")


# ------------------------------------------------------------------------------------- loading


def load_language_model(name: str, revision: str | None, dtype: str):
    """A causal LM with all its weights, from safetensors or GGUF; never runs foreign code.

    Raises:
        ValueError: it cannot be had, a file or weight is missing, or it is no causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from mmpeft.vlm import is_vlm
    from mmpeft.vlm import load_language_model as vlm_part

    where = source(name, revision)
    try:
        config = AutoConfig.from_pretrained(**where)
        _drop_nothing(config.get_text_config())
        if is_vlm(config):
            path = where["pretrained_model_name_or_path"]
            return vlm_part(path, config, revision=revision, dtype=getattr(torch, dtype))
        _require_causal(name, config)
        with readable(name):
            model, info = AutoModelForCausalLM.from_pretrained(
                **where, config=config, dtype=getattr(torch, dtype), use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
    except OSError as error:
        reason = first_line(error)
        if "safetensors" in reason:  # it is there, but not its weights
            raise ValueError(
                f"language_model {name!r} has no model.safetensors; only safetensors are read. "
                f"{NO_SAFETENSORS}"
            ) from error
        raise ValueError(
            f"language_model {name!r} cannot be loaded: it is no local model directory, no starter "
            f"model and cannot be had from the hub ({reason})"
        ) from error
    except (ValueError, RuntimeError) as error:  # the latter: weights of other shapes
        if str(error).startswith("language_model "):
            raise
        raise ValueError(
            f"language_model {name!r} cannot be loaded: {first_line(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"language_model {name!r} misses {len(missing)} weights of {type(model).__name__}, "
            f"{missing[0]} among them: give the complete causal language model."
        )
    if "gguf_file" in where:
        _as_dense(model)
    return model


def load_tokenizer(name: str, revision: str | None):
    """The tokenizer of a language model, padding on the left, always with a pad token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**source(name, revision), padding_side="left")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {name!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {name!r} is slow: it cannot tell which characters a token covers. "
            "Save a fast one (tokenizer.json) next to the model."
        )
    if tokenizer.vocab_size == 0:  # what transformers makes of a directory without its files
        raise ValueError(f"{name!r} has no tokenizer; put its tokenizer.json next to the model.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, its id never matters
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {name!r} has neither pad_token nor eos_token; name them in its "
            "tokenizer_config.json."
        )
    return tokenizer


def source(name: str, revision: str | None = None) -> dict:
    """What ``from_pretrained`` takes to find the language model ``name`` or its tokenizer.

    Raises:
        ValueError: a local directory that cannot hold a loadable model, with what it lacks.
    """
    from mmpeft.starter import resolve

    path = resolve(name)
    where = {"pretrained_model_name_or_path": path, "revision": revision}
    if path.lower().endswith(".gguf"):
        folder, _, file = path.rpartition("/")
        if not Path(path).is_file() and folder.count("/") != 1:
            raise ValueError(f"language_model {name!r}: there is no such GGUF file.")
        where |= {"pretrained_model_name_or_path": folder or ".", "gguf_file": file}
    elif Path(path).is_absolute() and not Path(path).exists():
        raise ValueError(
            f"language_model {name!r} does not exist; put the folder back, or a link to it."
        )
    elif Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        found = sorted(file.name for file in Path(path).glob("*.gguf"))
        if len(found) != 1:
            hint = f"name one of {', '.join(found)}" if found else "it is no model directory"
            raise ValueError(f"language_model {name!r} holds no config.json; {hint}.")
        where["gguf_file"] = found[0]
    elif Path(path).is_dir():
        _require_files(name, Path(path))
    if "gguf_file" in where and importlib.util.find_spec("gguf") is None:
        raise ValueError(f"language_model {name!r} is a GGUF file: pip install 'mmpeft[starter]'")
    return where


def _require_files(name: str, folder: Path) -> None:
    """Refuse a directory that lacks a shard, or has its weights pickled only."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(weight_map(index).values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ValueError(
                f"language_model {name!r} misses {', '.join(missing)} of {len(shards)} shards: "
                "fetch the missing ones into that directory."
            )
    elif not (folder / "model.safetensors").is_file() and any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"language_model {name!r} holds pickled weights only, which can run code when read; "
            "get its safetensors, or convert it where you trust it."
        )


def _require_causal(name: str, config) -> None:
    """Refuse what is no decoder of text alone, by the kind of its config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = config.model_type
    whole = config.get_text_config() is config
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not masked
    if not whole or not causal or getattr(config, "is_encoder_decoder", False):
        problem = "is made of several parts" if not whole else "is no causal language model"
        raise ValueError(
            f"language_model {name!r} is a {kind} model, which {problem}; "
            "give a text-only decoder such as Llama, Qwen, Gemma or GPT-2."
        )


def _drop_nothing(config) -> None:
    """Turn dropout off for good: the LLM is frozen.

    Eval mode is not enough: a layer that recomputes its activations must count as training, and
    some (OPT's, Bloom's) drop activations by themselves then.
    """
    for field, value in vars(config).items():
        if "drop" in field and isinstance(value, float):
            setattr(config, field, 0.0)


def _as_dense(model) -> None:
    """Take off the loader's marks of a quantised model: the weights are dense and may train."""
    model.hf_quantizer, model.is_quantized = None, False
    for owner, mark in (
        (model, "quantization_method"), (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),
    ):  # fmt: skip
        if hasattr(owner, mark):
            delattr(owner, mark)


# --------------------------------------------------------------------------------------- facts


def embedding_size(language_model: nn.Module) -> int:
    """D, the size of ``inputs_embeds``; not the hidden size where the LLM projects them (OPT)."""
    return language_model.get_input_embeddings().weight.shape[1]


@torch.no_grad()
def embedding_std(language_model: nn.Module) -> float:
    """Standard deviation per coordinate of the embeddings as they enter ``inputs_embeds``.

    Not that of the table where the embedding layer scales what it looks up (Gemma).
    """
    layer = language_model.get_input_embeddings()
    table = layer.weight.float()
    some = torch.linspace(0, len(table) - 1, min(256, len(table)), device=table.device).long()
    scale = layer(some).float().norm() / table[some].norm()
    return (table.std() * scale).item()


def attention_window(config) -> int | None:
    """How far back every layer looks, in tokens; ``None`` where all look at everything."""
    config = config.get_text_config()
    windows = [getattr(config, field, None) for field in WINDOW_FIELDS]
    if counts_places(config):
        windows.append(config.window_size)
    return min((window for window in windows if window), default=None)


def counts_places(config) -> bool:
    """Whether a window is counted in places of the row, whatever mask it is given (GPT-Neo)."""
    return "local" in getattr(config.get_text_config(), "attention_layers", ())


def rope_limit(config) -> int | None:
    """Longest sequence up to which rotary positions do not depend on its length; ``None``: any.

    Beyond it the keys of a cache are not those of a longer sequence.
    """
    config = config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    limits = []
    for own in [given, *(own for own in given.values() if isinstance(own, dict))]:  # or by layer
        kind = own.get("rope_type") or ""
        if kind == "longrope":
            limits.append(own["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def context_length(config) -> int | None:
    """Longest sequence the LLM was made for; ``None`` if its config sets no bound (Bloom)."""
    config = config.get_text_config()
    found = (getattr(config, field, None) for field in CONTEXT_FIELDS)
    return next((length for length in found if length), None)


def check_context(language_model: nn.Module, max_length: int | None) -> None:
    """Refuse samples that are longer than a learned table of positions.

    Raises:
        ValueError: ``max_length`` goes beyond it.
    """
    context, given = context_length(language_model.config), language_model.get_input_embeddings()
    tables = [m.num_embeddings for m in language_model.modules()
              if isinstance(m, nn.Embedding) and m is not given]  # fmt: skip
    # OPT's has two rows more
    if context and (max_length or 0) > context and any(0 <= n - context <= 8 for n in tables):
        raise ValueError(
            f"data.max_length is {max_length}, but this language model has learned {context} "
            "positions; set it to that or less."
        )


# ---------------------------------------------------------------------------------- attention


def as_bias(language_model: nn.Module, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask ``(B, 1, T, T)`` in the form this LLM's attention takes; others come back as is.

    The eager implementation adds the mask to the scores: a bool one would count as 0 and 1.
    """
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4:
        return mask
    if language_model.config.get_text_config()._attn_implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def attends_alone(config) -> bool:
    """Whether attention is all by which tokens tell each other: a cache is keys and values.

    Convolutions and recurrences beside it (LFM2, RecurrentGemma, Falcon-H1) carry a little of any
    token to the next, too little for some weights to be seen by trying.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config.get_text_config(decoder=True))
    return {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


@torch.no_grad()
def branch_limit(bridge: nn.Module) -> int | None:
    """Longest chat, in tokens, for which chats that share a prefix are computed exactly.

    Tries it on the bridge's LLM: two branches behind a prefix in one row (``packing.share_prefix``)
    against the second one alone. ``None`` is "any length".

    Raises:
        ValueError: this LLM takes its positions or its mask from elsewhere (ALiBi, recurrence).
    """
    language_model = bridge.language_model
    config = language_model.config.get_text_config()
    prefix, first, second = 4, 24, 4
    length = prefix + first + second
    device = language_model.get_input_embeddings().weight.device
    vocabulary = language_model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(length, device=device)[None] * 7 % vocabulary
    branch = torch.tensor([[-1] * prefix + [0] * first + [1] * second], device=device)
    visible = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == -1)
    steps = [range(prefix), range(prefix, prefix + first), range(prefix, prefix + second)]
    positions = torch.tensor([[step for part in steps for step in part]], device=device)

    def run(ids, mask, positions):
        embeds = language_model.get_input_embeddings()(ids)
        mask = as_bias(language_model, mask, embeds.dtype)
        outputs = language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return outputs.logits[:, -second:].float()

    def plain(ids):
        steps = torch.arange(ids.shape[1], device=device)[None]
        return run(ids, torch.ones_like(ids), steps)

    with bridge.disable_adapter():
        alone = plain(torch.cat([ids[:, :prefix], ids[:, -second:]], 1))
        seen = plain(ids)  # what comes out when the branches do see each other
        try:
            shared = run(ids, visible.tril()[:, None], positions)
            exact = (shared - alone).norm() < 0.1 * (seen - alone).norm()  # rounding is far below
        except (ValueError, RuntimeError, IndexError, TypeError):  # it cannot read such a mask
            exact = False
    if not exact or counts_places(config) or not attends_alone(config):
        raise ValueError(
            f"{config.model_type} language models take no positions and masks that let chats share "
            "a prefix; set data.chats_per_sample: 1."
        )
    limits = (attention_window(config), rope_limit(config))
    return min((limit for limit in limits if limit is not None), default=None)
