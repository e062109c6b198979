"""Encoders of timm."""

import inspect
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
class TimmEncoderConfig(VisionEncoderConfig):
    """Any timm model with ``forward_intermediates`` (ViTs, EfficientNets, ConvNeXts, ...).

    Features are those after the model's last norm; ``pooled`` is what its classifier would read.
    ``pretrained=False`` builds random weights, for tests.
    """

    pretrained: bool = True

    def build(self, weights: bool = True) -> "TimmEncoder":
        return TimmEncoder(self, self.pretrained and weights).freeze_and_measure()


class TimmEncoder(VisionEncoder):
    def __init__(self, config: TimmEncoderConfig, pretrained: bool):
        super().__init__(config)
        import timm
        from PIL import Image

        self.layers = [-1] if config.layers is None else config.layers
        self.model = self._create(config, pretrained)
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(
                f"{config.name} has no forward_intermediates in timm {timm.__version__}, so its "
                "patches cannot be had; choose another model."
            )
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
        try:
            # each layer's pixels to a position; the coarsest is the grid all are joined on
            coarsest = max(self.model.feature_info[i]["reduction"] for i in self.layers)
            self.stride = (coarsest, coarsest)
        except (AttributeError, KeyError, IndexError, TypeError):
            pass  # not every model tells; then it is measured
        # only models that have prefix tokens know the option
        options = inspect.signature(self.model.forward_intermediates).parameters
        self.options = {"return_prefix_tokens": True} if "return_prefix_tokens" in options else {}

    @staticmethod
    def _create(config, pretrained):
        import timm

        from mmpeft.starter import resolve

        name = resolve(config.name)
        if name != config.name or "/" in name or (Path(name).is_dir() and not timm.is_model(name)):
            name = name if name.startswith("hf-hub:") else f"local-dir:{name}"
        elif not timm.is_model(name):
            raise unknown_name("timm", name, timm.list_models())
        size = {} if config.image_size is None else {"img_size": config.image_size}
        # convolutions know neither option and take any size; some transformers know the first
        attempts = [{**size, "dynamic_img_size": True}, size, {}]
        while True:
            options = attempts.pop(0)
            try:
                with readable(config.name):
                    return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
            except TypeError:
                if not attempts:
                    raise
            except (OSError, RuntimeError, KeyError) as error:  # a config.json of something else
                raise ValueError(
                    f"{config.name} cannot be loaded by timm: {one_line(error)}"
                ) from error

    def feature_maps(self, pixel_values):
        try:
            maps = self._intermediates(pixel_values)
        except AssertionError:  # some (Hiera) have no norm for their maps; else it fails again
            maps = self._intermediates(pixel_values, norm=False)
        if isinstance(maps[0], tuple):  # (map, prefix tokens)
            return [m for m, _ in maps], [prefix for _, prefix in maps]
        return maps, []

    def _intermediates(self, pixel_values, norm=True):
        return self.model.forward_intermediates(
            pixel_values, indices=self.layers, norm=norm, intermediates_only=True, **self.options
        )

    def pooled(self, pixel_values):
        return self.model(pixel_values)
