"""Random changes to training pictures, made before the image processor sees them."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image


class Augmentation:
    """Applies transforms in order to a loaded picture.

    Args:
        transforms: callables from PIL image to PIL image, such as those of
            ``torchvision.transforms.v2``.
        keeps_size: the picture's size decides how many tokens it takes, so it may not change.
    """

    def __init__(self, transforms: list, keeps_size: bool):
        self.transforms, self.keeps_size = transforms, keeps_size

    def __call__(self, image: Image.Image, name: str) -> Image.Image:
        """The changed picture, as RGB; ``name`` is what errors call it.

        Raises:
            ValueError: a transform gives no picture, or one of another size where that may not be.
        """
        for transform in self.transforms:
            what = f"{name}: data.augmentation: {type(transform).__name__}"
            changed = transform(image)
            if not isinstance(changed, Image.Image):
                raise ValueError(
                    f"{what} gives a {type(changed).__name__}; use one that gives a PIL image."
                )
            if self.keeps_size and changed.size != image.size:
                was, now = ("{} x {}".format(*size) for size in (image.size, changed.size))
                raise ValueError(
                    f"{what} makes {now} pixels of {was}, but a picture's size decides how many "
                    "tokens it takes; use one that keeps it, or resolution.mode fixed."
                )
            image = changed.convert("RGB")
        return image


@contextmanager
def drawn_by(seed: int, index: int, on: bool = True) -> Iterator[None]:
    """Inside, torch (CPU), numpy and Python draw what belongs to ``seed`` and ``index`` alone.

    Outside, their generators are as they were. Nothing happens unless ``on``.
    """
    if not on:
        yield
        return
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8])
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(drawn)
        random.seed(drawn)
        np.random.seed(drawn % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
