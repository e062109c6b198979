"""The contract of a vision encoder, and what every backend shares.

To add one, subclass :class:`VisionEncoderConfig` with ``build`` and :class:`VisionEncoder` with
``feature_maps``, ``pooled`` and ``preprocessing``.
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
        tokens: ``patch`` gives the patches alone; ``all`` puts the class and register tokens in
            front of them (BLIP-2 and mPLUG-Owl attend to them); ``pooled`` gives the model's one
            global embedding (NExT-GPT) as a 1 x 1 grid.
        fit: how a picture of another shape is made to fit: ``stretch`` it, resize its short side
            and ``crop`` the centre (CLIP), or ``pad`` it with the mean colour (LLaVA-1.5).
    """

    name: str
    image_size: int | None = None
    layers: list[int] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tokens: Literal["patch", "all", "pooled"] = "patch"
    fit: Literal["stretch", "crop", "pad"] = "stretch"

    def __post_init__(self):
        if self.layers == []:
            raise ValueError("layers: [] names none; name some, or leave it out for the last one.")

    def build(self, weights: bool = True) -> "VisionEncoder":
        """Load the pretrained encoder, frozen and in eval mode.

        ``weights=False`` makes the same modules untrained, reading configuration files only;
        under ``torch.device("meta")`` a model of any size then takes no memory.
        """
        raise NotImplementedError


class VisionEncoder(nn.Module):
    """Frozen encoder: ``(B, 3, H, W)`` pixels to ``(B, K + P, D)`` features.

    K prefix tokens (0 unless ``tokens="all"``) stand in front of P = h * w patches in row-major
    order.

    Attributes:
        hidden_size: D, channels of one feature.
        grid: ``(h, w)`` of the patches at the default size.
        num_prefix_tokens: K.
        stride: ``(rows, columns)`` of pixels to a cell of the grid.
        any_size: takes other H and W than the default, see :meth:`grid_of`.
        preprocessing: ``{"size": (H, W), "mean": 3 floats, "std": 3 floats,
            "resample": PIL code, "fit": as in the config}``.
    """

    hidden_size: int
    grid: tuple[int, int]
    num_prefix_tokens: int = 0
    stride: tuple[int, int] | None = None  # set by a backend that knows it, else measured
    any_size: bool = False
    one_size: bool = False  # set by a backend whose model must not even try another size
    preprocessing: dict

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        self.config = config

    def feature_maps(self, pixel_values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The chosen layers of ``(B, 3, H, W)`` pixels.

        Returns:
            maps ``(B, C_i, h_i, w_i)``, patches only; and their prefix tokens ``(B, K, C_i)``, an
            empty list for a model that has none.
        """
        raise NotImplementedError

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to the model's global embedding ``(B, D)``."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        self.grid_of(*pixel_values.shape[2:])
        return self.encode(pixel_values.to(next(self.parameters()).dtype))[0]

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int], int]:
        """``(B, 3, H, W)`` to features ``(B, K + P, D)``, their grid, and K."""
        if self.config.tokens == "pooled":
            return self.pooled(pixel_values).unsqueeze(1), (1, 1), 0
        maps, prefixes = self.feature_maps(pixel_values)
        fused = fuse_on_coarsest_grid(maps)  # (B, D, h, w)
        patches, grid = fused.flatten(2).transpose(1, 2), tuple(fused.shape[2:])
        if self.config.tokens == "patch" or not prefixes:
            return patches, grid, 0
        if len({m.shape[2:] for m in maps}) > 1:
            raise ValueError(
                f"{self.config.name}: layers {self.config.layers} have different grids, so their "
                "prefix tokens cannot be joined; use tokens: patch, or layers of one grid."
            )
        prefix = torch.cat(prefixes, dim=-1)  # (B, K, D)
        return torch.cat([prefix, patches], dim=1), grid, prefix.shape[1]

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """``(h, w)`` of the patches of an image of H x W pixels.

        Raises:
            ValueError: the encoder refuses this size.
        """
        if (height, width) == tuple(self.preprocessing["size"]):
            return self.grid
        if not self.any_size:
            own = "{} x {}".format(*self.preprocessing["size"])
            raise ValueError(
                f"{self.config.name} takes {own} pixels only, not {height} x {width}; resize the "
                "image, or set image_size."
            )
        if height % self.stride[0] or width % self.stride[1]:
            raise ValueError(self._refusal(height, width))
        if self.config.tokens == "pooled":
            return (1, 1)
        return height // self.stride[0], width // self.stride[1]

    def freeze_and_measure(self) -> "VisionEncoder":
        """Freeze, then learn the attributes above from blank images.

        Raises:
            ValueError: the model cannot take images of its default size.
        """
        self.requires_grad_(False).eval().to(getattr(torch, self.config.dtype))
        height, width = self.preprocessing["size"]
        self.preprocessing["fit"] = self.config.fit
        try:
            features, self.grid, self.num_prefix_tokens = self.encode(self._blank(height, width))
            pooled = self.config.tokens == "pooled"
            patches = self._patch_grid(height, width) if pooled else self.grid
        except Exception as error:  # backends assert, raise and index out of range
            if self.stride and (height % self.stride[0] or width % self.stride[1]):
                raise ValueError(self._refusal(height, width)) from error
            layers = "" if self.config.layers is None else f" with layers {self.config.layers}"
            raise ValueError(
                f"{self.config.name} cannot encode {height} x {width} pixels{layers}: "
                f"{one_line(error)}"
            ) from error
        self.hidden_size = features.shape[-1]
        if self.stride is None:
            self.stride = self._measured_stride(height, width, patches)
        if abs(patches[0] * width - patches[1] * height) > max(height, width):
            raise ValueError(
                f"{self.config.name} gives {patches[0]} x {patches[1]} positions for {height} x "
                f"{width} pixels with layers {self.config.layers}: these are no rows and columns; "
                "leave out layers, or choose another encoder."
            )
        if patches[0] * self.stride[0] < height or patches[1] * self.stride[1] < width:
            raise ValueError(self._refusal(height, width))  # it would cut off the last pixels
        self.any_size = not self.one_size and self._takes_another_size()
        return self

    def _blank(self, height: int, width: int) -> Tensor:
        like = next(self.parameters())
        return torch.zeros(1, 3, height, width, dtype=like.dtype, device=like.device)

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        maps, _ = self.feature_maps(self._blank(height, width))
        return tuple(fuse_on_coarsest_grid(maps).shape[2:])

    def _measured_stride(self, height, width, patches) -> tuple[int, int]:
        """Convolutions pad or cut an odd size, so a round one is measured where it can be."""
        try:
            rows, columns = self._patch_grid(256, 256)
        except Exception:  # each backend refuses in its own way
            return height // patches[0], width // patches[1]
        return 256 // rows, 256 // columns

    def _takes_another_size(self) -> bool:
        """Try a small oblong image; a model of one size raises, or gives another grid."""
        height, width = 2 * self.stride[0], 3 * self.stride[1]
        try:
            if self.config.tokens == "pooled":  # its pooling may be of one size only
                self.pooled(self._blank(height, width))
            return self._patch_grid(height, width) == (2, 3)
        except Exception:  # each backend refuses in its own way
            return False

    def _refusal(self, height: int, width: int) -> str:
        (sh, sw), near = self.stride, []
        for rows, columns in (
            (height // sh, width // sw), (-(-height // sh), -(-width // sw)),
        ):  # fmt: skip
            near.append(f"{max(rows, 1) * sh} x {max(columns, 1) * sw}")
        return (
            f"{self.config.name} takes no image of {height} x {width} pixels: sides must be "
            f"multiples of {sh} x {sw}, the nearest are {' and '.join(dict.fromkeys(near))}."
        )


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


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over the names, shapes and values of a state dict.

    Values are rounded to bfloat16 first, so that a model has one identity whether it was loaded
    in float32 or in bfloat16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            tensor = tensor.bfloat16().view(torch.int16)
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def unknown_name(backend: str, name: str, known: list[str]) -> ValueError:
    """The error for a model the backend does not have, with the nearest it has."""
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return ValueError(f"{backend} has no vision model {name!r}.{hint}")


def one_line(error: Exception) -> str:
    """What a backend says is wrong, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).replace("\t", "")
