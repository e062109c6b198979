"""What a recipe builds, at its true size and without its weights: parameters, memory, tokens."""

import dataclasses
from pathlib import Path

import torch

from mmpeft import adapters, checkpoint, vlm
from mmpeft.config import STAGES, ModelConfig, load
from mmpeft.language_model import embedding_size, source
from mmpeft.layout import ResolutionConfig
from mmpeft.model import BridgeConfig, BridgeForConditionalGeneration
from mmpeft.weights import first_line

OPTIMIZER_BYTES = 8  # AdamW keeps two float32 states for each trained parameter


def plan(recipe, overrides: list[str] = ()) -> dict:
    """Build a recipe's bridge on the meta device and count.

    Args:
        recipe: YAML file, see ``configs/``.
        overrides: command-line style, as for training.

    Returns:
        the report, ``mmpeft.plan/1``; see ``docs/json.md``.

    Raises:
        ValueError: a bad recipe, parts that do not fit, or a config that cannot be had.
    """
    config, _ = load(recipe, overrides)
    config.model = own_parts(config.model)
    model = build_empty(config.model)
    stages = [stage for stage in STAGES if getattr(config, stage) is not None]
    names = part_names(config.model)
    parts = [
        {"part": row.part, "name": names[row.part], "parameters": row.total}
        for row in adapters.freeze_plan(model)
    ]
    memory = {"weights": sum(p.numel() * p.element_size() for p in model.parameters())}
    for stage in stages:
        adapters.set_trainable(model, **config.trained_parts(stage))
        for part, row in zip(parts, adapters.freeze_plan(model), strict=True):
            part[stage] = row.trained
        memory[stage] = sum(
            p.numel() * (p.element_size() + OPTIMIZER_BYTES)
            for p in model.parameters()
            if p.requires_grad
        )
    resolution = model.layout.config
    return {
        "schema": "mmpeft.plan/1",
        "recipe": str(recipe),
        "stages": stages,
        "parts": parts,
        "memory": memory,
        "images": {
            "mode": resolution.mode,
            "max_image_tokens": resolution.max_image_tokens,
            "min_tokens": model.layout.resolutions[0].tokens,
            "max_tokens": model.layout.resolutions[-1].tokens,
            "sizes": [list(one) for one in model.layout.resolutions],
            "text": str(model.layout),
        },
    }


def own_parts(model: ModelConfig) -> ModelConfig:
    """The same with the parts of ``start_from`` spelt out."""
    if model.start_from is None:
        return model
    directory = checkpoint.find_checkpoint(model.start_from)
    parts = checkpoint.saved_parts(BridgeConfig.from_pretrained(directory), directory)
    language_model = parts.pop("language_model")
    parts |= checkpoint.choose_adapter(parts, model.adapter, model.gate, directory)
    parts["resolution"] = parts["resolution"] or ResolutionConfig()
    return ModelConfig(
        **parts, language_model=language_model["name"],
        revision=language_model["revision"], dtype=model.dtype or language_model["dtype"],
    )  # fmt: skip


def part_names(model: ModelConfig) -> dict[str, str | None]:
    """What stands in each part's place: names of frozen models, kinds of what trains."""
    return {
        "vision encoder": model.vision_encoder.name,
        "connector": type(model.connector).__name__.removesuffix("ConnectorConfig"),
        "language model": model.language_model,
        "adapter": model.adapter and type(model.adapter).__name__.removesuffix("Config"),
    }


def build_empty(model: ModelConfig) -> BridgeForConditionalGeneration:
    """The bridge of a recipe, its parameters on the meta device: shapes and types, no values."""
    with torch.device("meta"):
        llm = empty_language_model(model.language_model, model.revision, model.dtype or "float32")
        encoder = model.vision_encoder.build(weights=False)
        connector = model.connector.build(encoder.hidden_size, embedding_size(llm))
        if model.adapter is not None:
            llm = adapters.attach_adapter(llm, model.adapter)
        config = BridgeConfig(
            text_config=llm.config.to_dict(), gate=model.gate or "none",
            resolution=dataclasses.asdict(model.resolution),
        )  # fmt: skip
        return BridgeForConditionalGeneration(config, encoder, connector, llm)


def empty_language_model(name: str, revision: str | None, dtype: str):
    """The language model on the meta device; only its ``config.json`` is read.

    Raises:
        ValueError: the config cannot be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(**source(name, revision))
    except OSError as error:
        raise ValueError(
            f"the config of language_model {name!r} is neither in a local folder nor in the hub's "
            f"cache, and cannot be fetched ({first_line(error)})"
        ) from error
    if vlm.is_vlm(config):
        config = vlm.llm_config(name, config)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return llm.requires_grad_(False)


def render(report: dict) -> str:
    """The report as a table, with a line on images and one on memory."""
    stages, parts = report["stages"], report["parts"]
    whole = {key: sum(part[key] for part in parts) for key in ("parameters", *stages)}
    titles = [f"{stage} trains" for stage in stages]
    lines = [
        f"{Path(report['recipe']).stem}: {' -> '.join(p['name'] for p in parts[:3])}"
        + (f" with {parts[3]['name']}" if parts[3]["name"] else ""),
        f"{'part':<16}{'parameters':>16}" + "".join(f"{t:>18}{'share':>8}" for t in titles),
    ]
    for part in [*parts, {"part": "all", **whole}]:
        counts = [f"{part[s]:>18,}{part[s] / whole['parameters']:>8.2%}" for s in stages]
        lines.append(f"{part['part']:<16}{part['parameters']:>16,}" + "".join(counts))
    memory = report["memory"]
    states = ", ".join(f"{size(memory[stage])} in {stage}" for stage in stages)
    return "\n".join([
        *lines,
        f"images: {report['images']['mode']}, {report['images']['text']}",
        f"memory: {size(memory['weights'])} of weights; gradients and AdamW states: {states}; "
        "activations come on top",
    ])  # fmt: skip


def size(count: int) -> str:
    """Bytes for people: ``15.4 GB``, ``38 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
