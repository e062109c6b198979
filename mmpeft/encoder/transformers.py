"""Encoders of transformers."""

import inspect
import json
import re
from dataclasses import dataclass

from mmpeft.encoder.contract import VisionEncoder, VisionEncoderConfig, one_line
from mmpeft.weights import readable

# Learned tokens that the embeddings of a ViT put in front of the patches.
PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")

# Given a small image these shrink their attention windows, and never widen them again.
SHRINKING = ("swin", "donut-swin", "maskformer-swin")


@dataclass
class TransformersEncoderConfig(VisionEncoderConfig):
    """Any transformers vision model, or the vision half of a composite (CLIP, BLIP-2, LLaVA, ...).

    Of a composite only the vision weights are read. ``layers`` index ``hidden_states`` (0 is the
    embedding, LLaVA uses -2); ``None`` takes ``last_hidden_state``, which some models normalise
    (BLIP-2, DINOv2, SigLIP) and others do not (CLIP). ``pooled`` is ``pooler_output``.
    """

    revision: str | None = None

    def build(self, weights: bool = True) -> "TransformersEncoder":
        return TransformersEncoder(self, weights).freeze_and_measure()


class TransformersEncoder(VisionEncoder):
    def __init__(self, config: TransformersEncoderConfig, weights: bool):
        super().__init__(config)
        from transformers import AutoImageProcessor

        from mmpeft.starter import resolve

        name = resolve(config.name)
        try:
            with readable(config.name):
                self.model = _vision_model(name, config.revision, weights)
            processor = AutoImageProcessor.from_pretrained(
                name, revision=config.revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{config.name} cannot be loaded by transformers: {one_line(error)}"
            ) from error
        self._refuse_what_takes_no_image()
        self._refuse_other_steps(processor)
        size = _processor_size(processor) or _pair(getattr(self.model.config, "image_size", 224))
        normalize = getattr(processor, "do_normalize", True)
        self.preprocessing = {
            "size": size if config.image_size is None else _pair(config.image_size),
            "mean": list(processor.image_mean) if normalize else [0.0] * 3,
            "std": list(processor.image_std) if normalize else [1.0] * 3,
            "resample": int(processor.resample),
        }
        self.layers = config.layers
        # stages of different grids tell the shape of their maps in hidden_states
        self.stages = any(hasattr(self.model.config, key) for key in ("depths", "hidden_sizes"))
        self.resizes = "interpolate_pos_encoding" in _options(self.model)
        if self.stages or not hasattr(self.model.config, "patch_size"):
            self.prefix = 0
        else:
            self.stride = _pair(self.model.config.patch_size)
            embeddings = getattr(self.model, "embeddings", None)
            self.prefix = sum(
                token.numel() // token.shape[-1]
                for key, token in getattr(embeddings, "_parameters", {}).items()
                if key in PREFIX_TOKENS and token is not None
            )
        self.one_size = self.model.config.model_type in SHRINKING
        if self.model.config.model_type == "dinov3_convnext":
            self.prefix = 1  # it puts the mean of the map in front of it

    def _refuse_what_takes_no_image(self):
        kind = type(self.model).__name__
        if getattr(self.model, "main_input_name", None) != "pixel_values":
            raise ValueError(f"{self.config.name} is a {kind}, which is no vision model.")
        if needs := {"spatial_shapes", "image_grid_thw", "grid_thw"} & _options(self.model).keys():
            raise ValueError(
                f"{self.config.name} is a {kind}, which takes flattened patches of any number "
                f"({needs.pop()}) instead of an image; choose a variant of fixed resolution."
            )
        if self.model.config.model_type == "vit_mae":
            raise ValueError(
                f"{self.config.name} is a {kind}, which shuffles its patches anew at each call; "
                "load its weights as a ViT (TimmEncoderConfig, vit_base_patch16_224.mae)."
            )

    def _refuse_other_steps(self, processor):
        """Refuse what a bridge does not do to pixels, which the model would miss."""
        steps = {
            "do_flip_channel_order": getattr(processor, "do_flip_channel_order", None),
            "include_top": getattr(processor, "include_top", None),
            "rescale_offset": getattr(processor, "rescale_offset", None),
            "rescale_factor": getattr(processor, "rescale_factor", 1 / 255) not in (None, 1 / 255),
        }
        if wanted := [step for step, is_on in steps.items() if is_on]:
            raise ValueError(
                f"{self.config.name} wants its pixels prepared with {', '.join(wanted)}, which is "
                "not done here; choose another encoder."
            )

    def _run(self, pixel_values, hidden_states: bool):
        options = {}
        if self.resizes:
            native = _pair(getattr(self.model.config, "image_size", 0))
            options["interpolate_pos_encoding"] = tuple(pixel_values.shape[2:]) != native
        return self.model(pixel_values, output_hidden_states=hidden_states, **options)

    def feature_maps(self, pixel_values):
        several = self.layers is not None
        outputs = self._run(pixel_values, hidden_states=several or self.stages)
        shaped = getattr(outputs, "reshaped_hidden_states", None)
        shaped = getattr(outputs, "hidden_states", None) if shaped is None else shaped
        if self.stages and not shaped:
            raise ValueError(f"{type(self.model).__name__} does not tell the shape of its maps.")
        if not several:
            states = [(outputs.last_hidden_state, shaped[-1] if self.stages else None)]
        elif self.stages:
            states = [(shaped[i], shaped[i]) for i in self.layers]
        else:
            states = [(shaped[i], None) for i in self.layers]
        maps, prefixes = zip(
            *(self._split(state, like, pixel_values.shape[2:]) for state, like in states),
            strict=True,
        )
        return list(maps), [p for p in prefixes if p is not None]

    def _split(self, state, like, image_size):
        """One state to its map ``(B, D, h, w)`` and its prefix tokens ``(B, K, D)`` or ``None``."""
        if state.dim() == 4:  # convolutional: already a map
            return state, None
        if like is None:
            grid = tuple(
                side // s for side, s in zip(image_size, self.stride or (1, 1), strict=True)
            )
        else:
            grid = tuple(like.shape[2:])
        if state.shape[1] != self.prefix + grid[0] * grid[1]:
            raise ValueError(
                f"{type(self.model).__name__} gave {state.shape[1]} tokens, not {self.prefix} and "
                f"a {grid[0]} x {grid[1]} grid; its patches cannot be told from other tokens."
            )
        patches = state[:, self.prefix :].transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        return patches, state[:, : self.prefix] if self.prefix else None

    def pooled(self, pixel_values):
        pooled = getattr(self._run(pixel_values, hidden_states=False), "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{type(self.model).__name__} has no pooled embedding.")
        return pooled.flatten(1)


def _options(model):
    return inspect.signature(model.forward).parameters


def _pair(side) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)


def _processor_size(processor) -> tuple[int, int] | None:
    """What the image processor hands to the model, when that is one fixed size."""
    crop = getattr(processor, "crop_size", None) if processor.do_center_crop else None
    for size in (crop, processor.size):
        size = dict(size or {})
        if size.get("height") and size.get("width"):
            return size["height"], size["width"]
        if size.get("shortest_edge"):
            return _pair(size["shortest_edge"])
    return None


def _vision_model(name: str, revision: str | None, weights: bool):
    """The vision model of a checkpoint; of a composite its vision half alone."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    composite = getattr(config, "vision_config", None) is not None
    if composite:
        part, cls = _vision_part(config)
        config = config.vision_config
        build, source = cls, None
    else:
        build, source = AutoModel, name
    if not weights:
        return build._from_config(config) if composite else build.from_config(config)
    state = {"state_dict": _vision_state(name, revision, part)} if composite else {}
    model, loading = build.from_pretrained(
        source, config=config, revision=revision, use_safetensors=True, output_loading_info=True,
        **state, **({} if composite else {"trust_remote_code": False}),
    )  # fmt: skip
    missing = sorted(loading["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler, missing = None, []  # made for this checkpoint's model without its weights
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"its weights miss {', '.join(missing[:3])}{more}.")
    return model


def _vision_part(config):
    """Name and class of the vision half, from the composite's skeleton."""
    import torch
    from transformers import AutoModel, PreTrainedModel

    with torch.device("meta"):
        skeleton = AutoModel.from_config(config, trust_remote_code=False)
    for name, module in skeleton.named_modules():
        if (
            isinstance(module, PreTrainedModel)
            and type(module.config) is type(config.vision_config)
            and module.main_input_name == "pixel_values"
        ):
            return name.rpartition(".")[2], type(module)
    raise ValueError(f"a {type(skeleton).__name__} has no vision half that takes pixel_values.")


def _vision_state(name: str, revision: str | None, part: str) -> dict:
    """The tensors of ``part``, from those files of a checkpoint that hold some.

    Keys lose everything up to the part's name; transformers renames what older versions wrote.
    """
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    inside = re.compile(rf"(?:.*?\.)?{re.escape(part)}\.(.+)")
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        files = [SAFE_WEIGHTS_NAME]
    else:
        with open(index, encoding="utf-8") as file:
            where = json.load(file)["weight_map"]
        files = sorted({file for key, file in where.items() if inside.fullmatch(key)})
    state = {}
    for file in files:
        with safe_open(cached_file(name, file, revision=revision), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                if match := inside.fullmatch(key):
                    state[match[1]] = tensors.get_tensor(key)
    return state
