"""How a picture's size becomes image tokens: which sizes there are, what each costs, their order.

Every size a picture may be resized to stands in one table, with the tokens it costs; sizes over
the budget are not in it. ``fixed`` has one entry. ``tiles`` cuts a picture into a grid of tiles of
the encoder's own size behind a thumbnail of the whole (LLaVA-NeXT's AnyRes; InternVL 1.5,
arXiv 2404.16821, section 3.2, without padding). ``native`` shows the picture whole, at a size of
its own shape, to encoders that take any. In the last two a learned newline ends every row.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LONGEST_SIDE = 4  # native sizes are at most this many times longer than wide


@dataclass
class ResolutionConfig:
    """How the size and shape of a picture are served.

    Attributes:
        mode: fixed (every picture at the encoder's size), tiles (cut into tiles of that size, after
            a thumbnail) or native (whole, at a size of its own shape; the encoder must take any).
        max_image_tokens: most tokens one picture may take; null leaves max_area alone to decide.
        max_area: largest picture, in areas of the encoder's own size: for tiles, their number.
    """

    mode: Literal["fixed", "tiles", "native"] = "fixed"
    max_image_tokens: int | None = None
    max_area: int = 4

    def __post_init__(self):
        for name in ("max_image_tokens", "max_area"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"resolution.{name} is {value}; it must be 1 or more.")
        if self.mode == "fixed" and self.max_area != type(self).max_area:
            raise ValueError(
                f"resolution.max_area is {self.max_area}, but mode fixed shows every picture at "
                "the encoder's size; set mode to tiles or native."
            )


class Resolution(NamedTuple):
    """A size in pixels that pictures may be resized to, and the image tokens it costs."""

    height: int
    width: int
    tokens: int


class ImageLayout:
    """The table of one bridge, and the order of an image's tokens.

    Attributes:
        resolutions: every :class:`Resolution`, cheapest first.

    Raises:
        ValueError: the budget holds no image, or the encoder takes one size only.
    """

    def __init__(self, config: ResolutionConfig, encoder, connector):
        self.config, self.encoder, self.connector = config, encoder, connector
        self.size = tuple(encoder.preprocessing["size"])  # of a tile
        if config.mode == "native" and not encoder.any_size:
            raise ValueError(
                "resolution.mode is native, but this vision encoder takes one size only "
                f"({self.size[0]} x {self.size[1]}); use tiles or fixed."
            )
        every = sorted(self._every(), key=lambda r: (r.tokens, r.height * r.width, r.height))
        budget = config.max_image_tokens
        self.resolutions = [r for r in every if budget is None or r.tokens <= budget]
        if not self.resolutions:
            raise ValueError(
                f"resolution.max_image_tokens is {budget}, but the smallest image takes "
                f"{every[0].tokens} tokens; raise the budget or choose a connector with fewer."
            )

    def _every(self):
        height, width = self.size
        if self.config.mode == "native":
            yield from self._native()
            return
        most = self.config.max_area if self.config.mode == "tiles" else 1
        for rows in range(1, most + 1):
            for columns in range(1, most // rows + 1):
                yield Resolution(rows * height, columns * width, self._tile_tokens(rows, columns))

    def _native(self):
        (sh, sw), (height, width) = self.encoder.stride, self.size
        most = (height // sh) * (width // sw) * self.config.max_area
        reason = None
        found = False
        for rows in range(1, most + 1):
            narrow, wide = -(-rows // LONGEST_SIDE), min(rows * LONGEST_SIDE, most // rows)
            for columns in range(narrow, wide + 1):
                size = rows * sh, columns * sw
                try:
                    # not (rows, columns) where the encoder pools, or joins several sequences
                    tokens = self._native_tokens(self.encoder.grid_of(*size))
                except ValueError as error:  # the connector folds the map by a factor
                    reason = error
                    continue
                found = True
                yield Resolution(*size, tokens)
        if not found:
            raise reason

    def _per_tile(self, grid) -> int:
        return self.connector.num_image_tokens(grid, self.encoder.num_prefix_tokens)

    def _tile_tokens(self, rows: int, columns: int) -> int:
        one, out = self._per_tile(self.encoder.grid), self._output_grid(self.encoder.grid)
        if rows * columns == 1:
            return one
        lines = rows if out is None else rows * out[0]
        return one + rows * columns * one + lines  # thumbnail, tiles, a newline for each line

    def _native_tokens(self, grid) -> int:
        out = self._output_grid(grid)
        return self._per_tile(grid) + (0 if out is None else out[0])

    def _output_grid(self, grid):
        out = None if self.encoder.num_prefix_tokens else self.connector.output_grid(grid)
        if out is not None and out[0] * out[1] != (count := self._per_tile(grid)):
            raise ValueError(
                f"{type(self.connector).__name__}.output_grid says {out[0]} x {out[1]}, but its "
                f"num_image_tokens is {count}; let it return None if the outputs are no map."
            )
        return out

    # ------------------------------------------------------------------------------- an image

    def tiles(self, size: tuple[int, int]) -> int:
        """How many pictures of the encoder an image of this size is, its thumbnail included."""
        if self.config.mode == "native":
            return 1
        count = (size[0] // self.size[0]) * (size[1] // self.size[1])
        return 1 if count == 1 else count + 1

    def sizes(self, image_sizes: Tensor | None, num_images: int) -> list[tuple[int, int]]:
        """``(images, 2)`` as a list; without it, every image has the encoder's size."""
        if image_sizes is None:
            return [self.size] * num_images
        return [tuple(size) for size in image_sizes.tolist()]

    def arrange(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Connector outputs of one image, ``(tiles, N, D)``, to its run of tokens ``(n, D)``."""
        if self.config.mode == "native":
            grid = self._output_grid(self.encoder.grid_of(*size))
            return tokens[0] if grid is None else self._lines(tokens[0].unflatten(0, grid))
        if len(tokens) == 1:
            return tokens[0]
        rows, columns = size[0] // self.size[0], size[1] // self.size[1]
        grid = self._output_grid(self.encoder.grid)
        tiles = tokens[1:].unflatten(0, (rows, columns))  # (r, c, N, D)
        if grid is not None:  # the tiles as one map
            tiles = tiles.unflatten(2, grid).transpose(1, 2).flatten(0, 1)  # (r * h, c, w, D)
        return torch.cat([tokens[0], self._lines(tiles.flatten(1, 2))])

    def _lines(self, lines: Tensor) -> Tensor:
        """``(lines, columns, D)`` to ``(lines * (columns + 1), D)``: a newline ends each."""
        newline = self.connector.newline.to(lines.dtype).expand(len(lines), 1, -1)
        return torch.cat([lines, newline], dim=1).flatten(0, 1)

    def __str__(self):
        low, high = self.resolutions[0], self.resolutions[-1]
        if low.tokens == high.tokens and len(self.resolutions) == 1:
            plural = "s" if low.tokens > 1 else ""
            return f"{low.tokens} token{plural} an image, {low.height} x {low.width} pixels"
        return (
            f"{low.tokens} ({low.height} x {low.width}) to {high.tokens} ({high.height} x "
            f"{high.width}) tokens an image, {len(self.resolutions)} sizes"
        )
