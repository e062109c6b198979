"""What a checkpoint holds, and loading that refuses to guess.

A checkpoint is a folder: ``config.json`` (parts by name, identities of the frozen ones),
``connector.safetensors``, ``adapter/`` in peft's own format, and the processor's files. Training
adds ``checksums.json``, and then every file must be as it was written. The frozen weights are never
in it; they are found by name and must hash to what was trained on.
"""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

from mmpeft import durable
from mmpeft.adapter_scale import scale_of
from mmpeft.adapters import require_one_adapter
from mmpeft.language_model import embedding_size, load_language_model
from mmpeft.weights import readable

CONNECTOR_FILE = "connector.safetensors"
ADAPTER_FOLDER = "adapter"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def assemble(
    cls, vision_encoder, connector, language_model: dict, adapter, gate: str, resolution=None,
    new: bool = True, new_adapter: bool = True,
):  # fmt: skip
    """Build the parts and put them together; ``cls`` is the bridge's model class.

    Only a ``new`` bridge reads the weights its connector starts from, and only a ``new_adapter``
    makes the start that it takes out of the frozen weights.
    """
    from mmpeft.adapters import attach_adapter
    from mmpeft.spec import to_spec

    if new:  # what is local is found from anywhere
        vision_encoder = copy.deepcopy(vision_encoder)
        language_model["name"] = absolute(language_model["name"])
        for part in getattr(vision_encoder, "encoders", [vision_encoder]):
            part.name = absolute(part.name)
    encoder = vision_encoder.build()
    llm = load_language_model(**language_model)
    module = connector.build(encoder.hidden_size, embedding_size(llm))
    if new:
        module.initialize()
    # peft and transformers write this name into what they save: not the path it resolved to
    llm.name_or_path = llm.config._name_or_path = language_model["name"]
    config = cls.config_class(
        text_config=llm.config.to_dict(),
        language_model=language_model,
        vision_encoder=to_spec(vision_encoder),
        connector=to_spec(connector),
        gate=gate,
        resolution=None if resolution is None else dataclasses.asdict(resolution),
        identities=_identities(vision_encoder.name, encoder, module, language_model["name"], llm),
    )
    llm.requires_grad_(False)
    if adapter is not None:
        llm = attach_adapter(llm, adapter, new_adapter)
    return cls(config, encoder, module, llm).eval()


def absolute(name: str) -> str:
    """Of a path; a name of timm or the hub comes back as it is."""
    import timm

    local = Path(name).exists() and ("/" in name or not timm.is_model(name))
    return str(Path(name).resolve()) if local else name


def _identities(encoder_name, encoder, connector, llm_name, llm) -> dict:
    """Name and hash of everything that is frozen, and so not in the checkpoint."""
    from mmpeft.encoder import weights_hash

    parts = {
        "vision_encoder": (encoder_name, encoder.state_dict()),
        "language_model": (llm_name, llm.state_dict()),
    }
    if connector.frozen:
        state = connector.state_dict()
        frozen = {key: state[key] for key in connector.frozen}
        parts["connector"] = (connector.frozen_source, frozen)
    return {
        part: {"name": name, "sha256": weights_hash(state)} for part, (name, state) in parts.items()
    }


def save(model, directory) -> None:
    """Write the trained parts, the config and the identities; an older adapter there goes.

    Raises:
        ValueError: the adapter was merged into the LLM, which is not written; it is not the only
            one, or is scaled for a while.
    """
    from safetensors.torch import save_file

    if model.merged:
        raise ValueError(
            "the adapter was merged into the language model, which a checkpoint does not hold; "
            "save before merge_adapter, or save model.language_model and processor.tokenizer, and "
            "build a bridge on that folder."
        )
    require_one_adapter(model.language_model)
    if (scale := scale_of(model.language_model)) != model.config.adapter_scale:
        raise ValueError(
            f"the adapter has scale {scale:g} for a while, which a checkpoint would not hold; save "
            "it outside of scaled(), or set the scale with set_adapter_scale."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    durable.unseal(directory)
    shutil.rmtree(directory / ADAPTER_FOLDER, ignore_errors=True)
    model.config.save_pretrained(directory)
    connector = {k: v.contiguous().cpu() for k, v in model.connector.trained_state().items()}
    save_file(connector, directory / CONNECTOR_FILE, metadata={"format": "pt"})
    if hasattr(model.language_model, "peft_config"):
        # "auto" would look the base up on the hub to see whether embeddings changed; ours never do
        model.language_model.save_pretrained(
            directory / ADAPTER_FOLDER, save_embedding_layers=False
        )


def load_model(
    cls, directory, *, dtype: str | None = None, is_trainable: bool = False, adapter=None,
    gate: str | None = None,
):  # fmt: skip
    """Load a bridge from a checkpoint folder.

    Args:
        directory: the folder, see :func:`find_checkpoint`.
        dtype: floating type for the frozen LLM instead of the one it was trained with.
        is_trainable: leave the adapter and the connector trainable.
        adapter: a peft config: a new adapter for a bridge that has none.
        gate: where the adapter acts, for a bridge that has none; ``None`` is what was saved.

    Raises:
        ValueError: a frozen part is not the one trained on, the weights do not fit exactly, or the
            bridge has an adapter already; a file is torn (see :mod:`mmpeft.durable`).
    """
    durable.verify(Path(directory))
    config = cls.config_class.from_pretrained(directory)
    parts = saved_parts(config, directory)
    # auto: as it was trained with
    dtype = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    half = {dtype, parts["language_model"]["dtype"]} if dtype else set()
    if "float16" in half and len(half) > 1:
        raise ValueError(
            f"{directory}: trained on a language model in {parts['language_model']['dtype']}; "
            "whether weights are the same cannot be told between float16 and others. Leave out "
            f"dtype {dtype}."
        )
    adapter_and_gate = choose_adapter(parts, adapter, gate, directory)
    if dtype is not None:
        parts["language_model"]["dtype"] = dtype
    model = assemble(cls, **parts | adapter_and_gate, new=False, new_adapter=adapter is not None)
    model.config.processor = config.processor
    for part, trained_on in config.identities.items():
        found = model.config.identities[part]
        if found["sha256"] != trained_on["sha256"]:
            raise ValueError(
                f"{directory}: trained on {part} {trained_on['name']!r} "
                f"(weights {trained_on['sha256'][:12]}), but {found['name']!r} now has weights "
                f"{found['sha256'][:12]}; load it onto the {part} it was trained on."
            )
    load_trained(model, directory, new_adapter=adapter is not None)
    if config.adapter_scale != 1:
        model.set_adapter_scale(config.adapter_scale)
    model.requires_grad_(False)
    if is_trainable:
        from mmpeft.adapters import set_trainable

        set_trainable(model, connector=True, adapter=True)
    return model


def choose_adapter(parts: dict, adapter, gate: str | None, directory) -> dict:
    """``adapter`` and ``gate`` for a bridge of these parts: its own, or a first one."""
    if parts["adapter"] is not None and (adapter is not None or gate not in (None, parts["gate"])):
        raise ValueError(
            f"{directory} has an adapter already, trained with gate {parts['gate']!r}: leave out "
            "adapter and gate to go on with that one, or start from a bridge without."
        )
    return {"adapter": parts["adapter"] or adapter, "gate": gate or parts["gate"]}


def saved_parts(config, directory) -> dict:
    """The arguments of :func:`assemble` that a checkpoint's config stands for."""
    from mmpeft.connector import ConnectorConfig
    from mmpeft.encoder import VisionEncoderConfig
    from mmpeft.layout import ResolutionConfig
    from mmpeft.spec import from_spec

    resolution = config.resolution
    return {
        "vision_encoder": from_spec(config.vision_encoder, VisionEncoderConfig),
        "connector": from_spec(config.connector, ConnectorConfig),
        "language_model": dict(config.language_model),
        "adapter": adapter_config(directory),
        "gate": config.gate,
        "resolution": None if resolution is None else ResolutionConfig(**resolution),
    }


def load_trained(model, directory, new_adapter: bool = False) -> None:
    """Load connector and adapter weights into an assembled model; every key must match.

    A ``new_adapter`` is the model's alone and stays as it is.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    directory = Path(directory)
    with readable(str(directory / CONNECTOR_FILE)):
        state = load_file(directory / CONNECTOR_FILE)
    _require_same_keys(state, model.connector.trained_state(), directory / CONNECTOR_FILE)
    model.connector.load_state_dict(state, strict=False)  # the frozen keys are in place already
    adapter_file = directory / ADAPTER_FOLDER / "adapter_model.safetensors"
    has_adapter = hasattr(model.language_model, "peft_config") and not new_adapter
    if adapter_file.is_file() != has_adapter:
        raise ValueError(
            f"{directory}: the model has {'an' if has_adapter else 'no'} adapter, but "
            f"{adapter_file.name} is {'missing' if has_adapter else 'there'}."
        )
    if has_adapter:
        with readable(str(adapter_file)):
            state = load_file(adapter_file)
        expected = get_peft_model_state_dict(model.language_model, save_embedding_layers=False)
        _require_same_keys(state, expected, adapter_file)
        set_peft_model_state_dict(model.language_model, state)


def _require_same_keys(state, expected, file) -> None:
    missing, unexpected = sorted(expected.keys() - state), sorted(state.keys() - expected)
    shapes = [k for k in expected.keys() & state if expected[k].shape != state[k].shape]
    for problem, keys in (
        ("misses", missing), ("has unexpected", unexpected), ("has other shapes for", shapes),
    ):  # fmt: skip
        if keys:
            some = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"{file} {problem} {some}: it belongs to another model.")


def adapter_config(directory):
    """The peft config of a checkpoint, to be filled with weights; ``None`` without adapter."""
    from peft import PeftConfig

    import mmpeft.tuners  # noqa: F401 (importing them makes peft know them)

    folder = Path(directory) / ADAPTER_FOLDER
    if not folder.is_dir():
        return None
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def find_checkpoint(path, **hub_options) -> Path:
    """A checkpoint folder, given itself, the run folder that holds it, or a hub name.

    Raises:
        FileNotFoundError: there is none, with what was found instead.
    """
    name, path = str(path), Path(path)
    if not path.exists() and name.count("/") == 1 and name[0] not in "/.~":
        path = _download(name, hub_options)
    for candidate in (path, path / "checkpoint"):
        if (candidate / "config.json").is_file() and (candidate / CONNECTOR_FILE).is_file():
            return candidate
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}: it does not exist.")
    raise FileNotFoundError(
        f"{path} holds no finished bridge (config.json and {CONNECTOR_FILE}); "
        "if its training was interrupted, continue it with --resume."
    )


def is_run_folder(path) -> bool:
    """Whether results belong in it: a run on this machine, with its checkpoint in a folder."""
    return Path(path).is_dir() and find_checkpoint(path) != Path(path)


def _download(name: str, hub_options: dict) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **hub_options))
    except Exception as error:  # the hub client raises many kinds; each means "not to be had"
        raise FileNotFoundError(
            f"{name} is no local folder and cannot be had from the hub: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def load(path, **kwargs):
    """Model and processor of a run or checkpoint folder, ready to ``generate``."""
    from mmpeft.model import BridgeForConditionalGeneration
    from mmpeft.processing import BridgeProcessor

    hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
    directory = find_checkpoint(path, **hub)
    if "auto_map" in json.loads((directory / "config.json").read_text()):
        raise ValueError(f"{directory}: config.json asks to run its own code (auto_map); refused.")
    model = BridgeForConditionalGeneration.from_pretrained(directory, **kwargs)
    processor = BridgeProcessor.from_pretrained(directory)
    model.stop_at(processor.ends_of_turn())
    return model, processor
