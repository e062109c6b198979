"""Encoders of open_clip."""

from dataclasses import dataclass
from pathlib import Path

from mmpeft.encoder.contract import (
    VisionEncoder,
    VisionEncoderConfig,
    one_line,
    unknown_name,
)
from mmpeft.weights import readable


@dataclass
class OpenClipEncoderConfig(VisionEncoderConfig):
    """The visual tower of any open_clip model, with the weights named by ``pretrained``.

    Features are those of the chosen blocks before the tower's last norm; ``pooled`` is the
    embedding that CLIP compares with text. ``name`` may also be ``hf-hub:OWNER/NAME`` or
    ``local-dir:FOLDER``. ``pretrained=None`` builds random weights of a built-in model, for tests.
    """

    pretrained: str | None = None

    def build(self, weights: bool = True) -> "OpenClipEncoder":
        return OpenClipEncoder(self, weights).freeze_and_measure()


class OpenClipEncoder(VisionEncoder):
    def __init__(self, config: OpenClipEncoderConfig, weights: bool):
        super().__init__(config)
        import open_clip
        from PIL import Image

        self.layers = [-1] if config.layers is None else config.layers
        model = self._create(config, weights)
        self.model = model.visual
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"{config.name}: its visual tower gives no patches; choose another.")
        data = open_clip.get_model_preprocess_cfg(model)
        side = data["size"]
        self.preprocessing = {
            "size": (side, side) if isinstance(side, int) else tuple(side),
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "resample": int(Image.Resampling[data.get("interpolation", "bicubic").upper()]),
        }
        if isinstance(self.model, open_clip.transformer.VisionTransformer):
            self.stride = tuple(self.model.patch_size)
        # convolutions have no prefix tokens, and towers of timm know the option only if they have
        trunk = getattr(self.model, "trunk", self.model)
        self.options = {"output_extra_tokens": True} if _has_prefix(trunk) else {}

    @staticmethod
    def _create(config, weights):
        import open_clip

        name, known = config.name, open_clip.list_models()
        if name not in known and not name.startswith(("hf-hub:", "local-dir:")):
            raise unknown_name("open_clip", name, known)
        options = {"pretrained": config.pretrained}
        # without this a folder without weights would give a random model and no error
        options["require_pretrained"] = name not in known or config.pretrained is not None
        if config.image_size is not None:
            options["force_image_size"] = config.image_size
        try:
            if not weights:
                name, options = _without_weights(name, config.pretrained, options)
            with readable(config.name):
                return open_clip.create_model(name, **options)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{config.name} (pretrained {config.pretrained}) cannot be loaded by open_clip: "
                f"{one_line(error)}"
            ) from error

    def feature_maps(self, pixel_values):
        outputs = self.model.forward_intermediates(
            pixel_values, indices=self.layers, intermediates_only=True, output_fmt="NCHW",
            **self.options,
        )  # fmt: skip
        return outputs["image_intermediates"], outputs.get("image_intermediates_prefix", [])

    def pooled(self, pixel_values):
        output = self.model(pixel_values)
        return output[0] if isinstance(output, tuple) else output  # CoCa gives its tokens too


def _without_weights(name, pretrained, options):
    """Name and options that make the same model, and the preprocessing of its weights."""
    import open_clip
    import torch

    if name.startswith("hf-hub:"):  # open_clip would download the weights all the same
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(name.removeprefix("hf-hub:"), "open_clip_config.json")
        name = f"local-dir:{Path(file).parent}"
    trained = open_clip.get_pretrained_cfg(name, pretrained or "")
    kept = {key: trained[key] for key in ("mean", "std", "interpolation") if key in trained}
    return name, options | {
        "pretrained": None,
        "require_pretrained": False,
        "load_weights": False,
        "pretrained_text": False,
        "device": torch.get_default_device(),
        "force_preprocess_cfg": kept,
    }


def _has_prefix(tower) -> bool:
    import open_clip

    if isinstance(tower, open_clip.transformer.VisionTransformer):
        return True
    return getattr(tower, "num_prefix_tokens", 0) > 0
