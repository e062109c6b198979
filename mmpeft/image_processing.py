"""BridgeImageProcessor: pictures to pixel values, at the sizes a bridge's layout allows."""

import functools

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, select_best_resolution
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs

from mmpeft.model import BridgeConfig


class BridgeImagesKwargs(ImagesKwargs, total=False):
    """What ``BridgeImageProcessor`` adds to transformers' image options."""

    fit: str
    resolutions: list
    cut_tiles: bool


class BridgeImageProcessor(TorchvisionBackend):
    """Resizes each picture to the best of ``resolutions`` and normalises it.

    Args:
        size: height and width of the encoder's own size (of a tile).
        fit: ``stretch`` to the target, ``crop`` the middle of what covers it (as CLIP), or ``pad``
            what fits into it with the mean colour (as LLaVA-1.5).
        resolutions: ``[height, width, image tokens]`` of every allowed size; ``None`` is ``size``.
        cut_tiles: cut what is larger than ``size`` into tiles of it, after a thumbnail.

    Called with pictures, it returns ``pixel_values``, ``(tiles, 3, H, W)`` in reading order (padded
    on the right and below when sizes differ), and ``image_sizes``, ``(images, 2)``: the height and
    width each picture was resized to.
    """

    valid_kwargs = BridgeImagesKwargs
    model_input_names = ("pixel_values", "image_sizes")
    do_resize = do_rescale = do_normalize = True
    fit = "stretch"
    cut_tiles = False

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The size a picture of ``height`` x ``width`` pixels is resized to."""
        return _target(height, width, tuple(tuple(r) for r in self._allowed(self.resolutions)))

    def num_image_tokens(self, height: int, width: int) -> int:
        """Image tokens of a picture of ``height`` x ``width`` pixels."""
        target = self.target(height, width)
        return next(tokens for *size, tokens in self.resolutions if tuple(size) == target)

    def _allowed(self, resolutions):
        if resolutions is None:
            return [(self.size.height, self.size.width)]
        return [(height, width) for height, width, _ in resolutions]

    def _preprocess(
        self, images, size, resample, do_rescale, rescale_factor, do_normalize, image_mean,
        image_std, fit, resolutions, cut_tiles, return_tensors=None, **kwargs,
    ) -> BatchFeature:  # fmt: skip
        allowed, tile = self._allowed(resolutions), (size.height, size.width)
        pixel_values, image_sizes = [], []
        for image in images:  # (3, height, width), 0 to 255
            target = _target(*image.shape[1:], tuple(allowed))
            tiles = [self._fit(image, target, fit, resample, image_mean)]
            if cut_tiles and target != tile:
                thumbnail = self._fit(image, tile, fit, resample, image_mean)
                tiles = [thumbnail, *_cut(tiles[0], tile)]
            pixel_values += self.rescale_and_normalize(
                torch.stack(tiles), do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            image_sizes.append(target)
        data = {"pixel_values": stack_padded(pixel_values), "image_sizes": image_sizes}
        return BatchFeature(data, tensor_type=return_tensors)

    def _fit(self, image: Tensor, target, fit: str, resample, mean) -> Tensor:
        height, width = image.shape[1:]
        if fit == "stretch":
            return self.resize(image, SizeDict(height=target[0], width=target[1]), resample)
        choose = max if fit == "crop" else min
        scale = choose(target[0] / height, target[1] / width)
        scaled = [max(1, round(height * scale)), max(1, round(width * scale))]
        image = self.resize(image, SizeDict(height=scaled[0], width=scaled[1]), resample)
        if fit == "crop":
            return self.center_crop(image, SizeDict(height=target[0], width=target[1]))
        above, left = (target[0] - scaled[0]) // 2, (target[1] - scaled[1]) // 2
        below, right = target[0] - scaled[0] - above, target[1] - scaled[1] - left
        colour = [round(255 * channel) for channel in mean]
        return tv.pad(image, [left, above, right, below], fill=colour)


@functools.lru_cache(maxsize=4096)
def _target(height: int, width: int, allowed: tuple) -> tuple[int, int]:
    # a picture so thin that it vanishes in every size gets the first
    return select_best_resolution((height, width), allowed) or allowed[0]


def _cut(image: Tensor, tile: tuple[int, int]) -> list[Tensor]:
    """``(3, r * h, c * w)`` to r * c tiles ``(3, h, w)``, row by row."""
    rows = image.unfold(1, tile[0], tile[0]).unfold(2, tile[1], tile[1])  # (3, r, c, h, w)
    return list(rows.permute(1, 2, 0, 3, 4).flatten(0, 1))


def stack_padded(images: list[Tensor]) -> Tensor:
    """``(3, h, w)`` each to ``(images, 3, H, W)``, zeros on the right and below."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    return torch.stack([
        F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images
    ])  # fmt: skip


AutoImageProcessor.register(
    BridgeConfig, image_processor_classes={"torchvision": BridgeImageProcessor}, exist_ok=True
)
