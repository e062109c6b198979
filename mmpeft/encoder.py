"""Vision encoders: frozen networks that turn pixels into patch features.

Contract: :class:`VisionEncoder`, built by a :class:`VisionEncoderConfig`. Three backends follow:
timm, open_clip and transformers. Each separates class and register tokens from patches by what
the backend knows of its own model, and brings the model's own preprocessing.
"""

import difflib
import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class VisionEncoderConfig:
    """What to build. A subclass adds its options and ``build``.

    Attributes:
        name: a model name of the backend, a local directory, or ``starter:NAME``.
        image_size: side in pixels the image is resized to; ``None`` takes the model's own.
        layers: feature maps to use, as the backend counts them (negative from the end);
            several are joined along channels on the coarsest grid. ``None`` is the last one.
        dtype: floating type of the frozen weights.
    """

    name: str
    image_size: int | None = None
    layers: list[int] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def build(self) -> "VisionEncoder":
        """Load the pretrained encoder, frozen and in eval mode."""
        raise NotImplementedError


class VisionEncoder(nn.Module):
    """Frozen encoder: ``(B, 3, H, W)`` pixels to ``(B, P, D)`` patch features.

    Attributes:
        hidden_size: D, channels of one patch feature.
        grid: ``(h, w)`` with ``h * w == P``; features are in row-major order.
        preprocessing: ``{"size": (H, W), "mean": 3 floats, "std": 3 floats,
            "resample": PIL code}``.
    """

    hidden_size: int
    grid: tuple[int, int]
    preprocessing: dict

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` to a list of ``(B, C_i, h_i, w_i)`` maps, patches only."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        fused = fuse_on_coarsest_grid(self.feature_maps(pixel_values.to(dtype)))  # (B, D, h, w)
        return fused.flatten(2).transpose(1, 2)  # (B, P, D)

    def freeze_and_measure(self, dtype: str) -> "VisionEncoder":
        """Freeze, then learn ``grid`` and ``hidden_size`` from one blank image."""
        self.requires_grad_(False).eval().to(getattr(torch, dtype))
        parameter = next(self.parameters())
        height, width = self.preprocessing["size"]
        blank = torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device)
        with torch.no_grad():
            fused = fuse_on_coarsest_grid(self.feature_maps(blank))
        self.hidden_size, self.grid = fused.shape[1], tuple(fused.shape[2:])
        return self


def fuse_on_coarsest_grid(maps: list[Tensor]) -> Tensor:
    """Join ``(B, C_i, h_i, w_i)`` maps along channels on the coarsest grid, losing nothing.

    A finer map is folded by space-to-depth (pixel unshuffle): each k x k block of positions
    becomes k*k times the channels.
    """
    height, width = min((m.shape[2:] for m in maps), key=lambda size: size[0])
    folded = []
    for m in maps:
        k = m.shape[2] // height
        if m.shape[2] != k * height or m.shape[3] != k * width:
            raise ValueError(
                f"feature maps of {[tuple(m.shape[2:]) for m in maps]} positions do not nest; "
                "choose an image_size that is a multiple of the largest stride, or fewer layers."
            )
        folded.append(F.pixel_unshuffle(m, k))
    return torch.cat(folded, dim=1)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, shapes and values of all weights.

    Values are rounded to bfloat16 first, so that a model has one identity whether it was loaded
    in float32 or in bfloat16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            tensor = tensor.bfloat16().view(torch.int16)
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _unknown_name(backend: str, name: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return ValueError(f"{backend} has no vision model {name!r}.{hint}")


# ----------------------------------------------------------------------------------------- timm


@dataclass
class TimmEncoderConfig(VisionEncoderConfig):
    """Any timm model with ``forward_intermediates`` (ViTs, EfficientNets, ConvNeXts, ...).

    ``pretrained=False`` builds random weights, for tests.
    """

    pretrained: bool = True

    def build(self) -> "TimmEncoder":
        return TimmEncoder(self).freeze_and_measure(self.dtype)


class TimmEncoder(VisionEncoder):
    def __init__(self, config: TimmEncoderConfig):
        super().__init__()
        import timm
        from PIL import Image

        from mmpeft.starter import resolve

        self.layers = [-1] if config.layers is None else config.layers
        name = resolve(config.name)
        if name != config.name or "/" in name:
            name = name if name.startswith("hf-hub:") else f"local-dir:{name}"
        elif not timm.is_model(name):
            raise _unknown_name("timm", name, timm.list_models())
        size = {} if config.image_size is None else {"img_size": config.image_size}
        build = {"pretrained": config.pretrained, "num_classes": 0}
        try:
            self.model = timm.create_model(name, **build, **size)
        except TypeError:  # convolutions take any size and know no img_size
            self.model = timm.create_model(name, **build)
        data = timm.data.resolve_model_data_config(self.model)
        height, width = data["input_size"][1:]
        if config.image_size is not None:
            height = width = config.image_size
        self.preprocessing = {
            "size": (height, width),
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "resample": int(Image.Resampling[data["interpolation"].upper()]),
        }

    def feature_maps(self, pixel_values):
        return self.model.forward_intermediates(
            pixel_values, indices=self.layers, norm=True, intermediates_only=True
        )


# ------------------------------------------------------------------------------------ open_clip


@dataclass
class OpenClipEncoderConfig(VisionEncoderConfig):
    """The visual tower of any open_clip model, with the weights named by ``pretrained``.

    ``pretrained=None`` builds random weights, for tests.
    """

    pretrained: str | None = None

    def build(self) -> "OpenClipEncoder":
        return OpenClipEncoder(self).freeze_and_measure(self.dtype)


class OpenClipEncoder(VisionEncoder):
    def __init__(self, config: OpenClipEncoderConfig):
        super().__init__()
        import open_clip
        from PIL import Image

        known = open_clip.list_models()
        if config.name not in known and not config.name.startswith(("hf-hub:", "local-dir:")):
            raise _unknown_name("open_clip", config.name, known)
        self.layers = [-1] if config.layers is None else config.layers
        size = {} if config.image_size is None else {"force_image_size": config.image_size}
        model = open_clip.create_model(config.name, pretrained=config.pretrained, **size)
        self.model = model.visual
        data = open_clip.get_model_preprocess_cfg(model)
        side = data["size"]
        self.preprocessing = {
            "size": (side, side) if isinstance(side, int) else tuple(side),
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "resample": int(Image.Resampling[data.get("interpolation", "bicubic").upper()]),
        }

    def feature_maps(self, pixel_values):
        outputs = self.model.forward_intermediates(
            pixel_values, indices=self.layers, intermediates_only=True, output_fmt="NCHW"
        )
        return outputs["image_intermediates"]


# --------------------------------------------------------------------------------- transformers


@dataclass
class TransformersEncoderConfig(VisionEncoderConfig):
    """Any transformers vision model, or the vision half of CLIP and SigLIP.

    ``layers`` index ``hidden_states`` (0 is the embedding, LLaVA uses -2); ``None`` takes
    ``last_hidden_state``.
    """

    revision: str | None = None

    def build(self) -> "TransformersEncoder":
        return TransformersEncoder(self).freeze_and_measure(self.dtype)


class TransformersEncoder(VisionEncoder):
    def __init__(self, config: TransformersEncoderConfig):
        super().__init__()
        import inspect

        from transformers import AutoImageProcessor, AutoModel

        from mmpeft.starter import resolve

        name = resolve(config.name)
        model = AutoModel.from_pretrained(name, revision=config.revision, use_safetensors=True)
        self.model = getattr(model, "vision_model", model)
        self.layers = config.layers
        native = self.model.config.image_size
        side = config.image_size or native
        processor = AutoImageProcessor.from_pretrained(name, revision=config.revision)
        self.preprocessing = {
            "size": (side, side),
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "resample": int(processor.resample),
        }
        self.options = {}
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            self.options["interpolate_pos_encoding"] = side != native

    def feature_maps(self, pixel_values):
        several = self.layers is not None
        outputs = self.model(pixel_values, output_hidden_states=several, **self.options)
        if several:
            states = [outputs.hidden_states[i] for i in self.layers]
        else:
            states = [outputs.last_hidden_state]
        return [self._to_map(state, pixel_values.shape[2:]) for state in states]

    def _to_map(self, state, image_size):
        if state.dim() == 4:  # convolutional: already (B, C, h, w)
            return state
        patch = self.model.config.patch_size
        h, w = image_size[0] // patch, image_size[1] // patch
        prefix = state.shape[1] - h * w  # class and register tokens stand in front
        if prefix < 0:
            raise ValueError(
                f"{type(self.model).__name__} gave {state.shape[1]} tokens for a {h} x {w} grid."
            )
        return state[:, prefix:].transpose(1, 2).unflatten(2, (h, w))  # (B, D, h, w)
