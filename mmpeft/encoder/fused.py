"""Two or more encoders that look at the same image."""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from mmpeft.encoder.contract import VisionEncoder, VisionEncoderConfig, fuse_on_coarsest_grid

BICUBIC = 3  # PIL's code


@dataclass
class FusedEncoderConfig(VisionEncoderConfig):
    """Several encoders fused, as in Prismatic (DINOv2 + SigLIP) or Eagle.

    Attributes:
        encoders: the members. The image is prepared as the first wants it; the others get it
            normalised and resized anew. Size, layers and tokens are set on each of them.
        join: ``channels`` puts features of one position side by side on the coarsest grid;
            ``tokens`` puts the sequences one behind the other (channels must be equal).
        dtype: floating type of the joined features.
        name: names the whole in messages; the members' names by default.
    """

    name: str | None = None
    encoders: list[VisionEncoderConfig] = field(default_factory=list)
    join: Literal["channels", "tokens"] = "channels"

    def __post_init__(self):
        if len(self.encoders) < 2:
            raise ValueError(
                f"encoders: {len(self.encoders)} to fuse; name two or more, or use one alone."
            )
        if (self.image_size, self.layers, self.tokens) != (None, None, "patch"):
            raise ValueError("image_size, layers and tokens are set on each of the encoders.")
        if self.name is None:
            self.name = " + ".join(member.name for member in self.encoders)
        for member in self.encoders:
            if member.fit != self.fit:
                raise ValueError(
                    f"{member.name} has fit: {member.fit}, and the whole {self.fit}; one picture "
                    "is made for all encoders, so set it on the whole and on each."
                )
            if self.join == "channels" and member.tokens != "patch":
                raise ValueError(
                    f"{member.name} has tokens: {member.tokens}, which stand at no position of a "
                    "grid; use join: tokens, or tokens: patch."
                )

    def build(self, weights: bool = True) -> "FusedEncoder":
        members = [member.build(weights) for member in self.encoders]
        return FusedEncoder(self, members).requires_grad_(False).eval()


class FusedEncoder(VisionEncoder):
    def __init__(self, config: FusedEncoderConfig, members: list[VisionEncoder]):
        super().__init__(config)
        self.encoders = nn.ModuleList(members)
        first = members[0]
        self.preprocessing = {**first.preprocessing, "fit": config.fit}
        widths = [m.hidden_size for m in members]
        if config.join == "tokens" and len(set(widths)) > 1:
            raise ValueError(
                f"{config.name}: features of {widths} channels cannot form one sequence; "
                "use join: channels."
            )
        self.num_prefix_tokens = sum(m.num_prefix_tokens for m in members)
        self.any_size = all(m.any_size for m in members)
        self.grid = self._join_grids([m.grid for m in members])
        coarse = self.grid if config.join == "channels" else first.grid
        self.stride = tuple(
            s // n for s, n in zip(first.preprocessing["size"], coarse, strict=True)
        )
        self.hidden_size = widths[0]
        if config.join == "channels":
            h, w = self.grid
            cells = [m.grid[0] * m.grid[1] // (h * w) for m in members]
            self.hidden_size = sum(d * n for d, n in zip(widths, cells, strict=True))

    def grid_of(self, height, width):
        return self._join_grids([m.grid_of(*self._size(m, height, width)) for m in self.encoders])

    def _size(self, member, height, width):
        """What a member sees of H x W pixels: its own size, scaled as the first one's is."""
        (h0, w0), (h, w) = self.preprocessing["size"], member.preprocessing["size"]
        return round(height * h / h0), round(width * w / w0)

    def _join_grids(self, grids):
        if self.config.join == "tokens":
            if len({w for _, w in grids}) == 1:
                return sum(h for h, _ in grids), grids[0][1]
            return 1, sum(h * w for h, w in grids)
        # on the meta device: the rule and the error of the real maps
        maps = [torch.empty(1, 1, h, w, device="meta") for h, w in grids]
        try:
            return tuple(fuse_on_coarsest_grid(maps).shape[2:])
        except ValueError as error:
            raise ValueError(
                f"{self.config.name}: grids {grids} do not nest, so their channels cannot be "
                "joined; set image_size so that they do, or use join: tokens."
            ) from error

    @torch.no_grad()
    def forward(self, pixel_values):
        self.grid_of(*pixel_values.shape[2:])
        prefixes, patches, grids = [], [], []
        for member in self.encoders:
            seen = self._prepare(pixel_values.float(), member)
            features = member(seen).to(getattr(torch, self.config.dtype))  # (B, K_i + P_i, D_i)
            prefixes.append(features[:, : member.num_prefix_tokens])
            patches.append(features[:, member.num_prefix_tokens :])
            grids.append(member.grid_of(*seen.shape[2:]))
        if self.config.join == "tokens":
            return torch.cat([*prefixes, *patches], dim=1)  # (B, K + P, D)
        maps = [
            p.transpose(1, 2).unflatten(2, grid) for p, grid in zip(patches, grids, strict=True)
        ]
        return fuse_on_coarsest_grid(maps).flatten(2).transpose(1, 2)  # (B, P, D)

    def _prepare(self, pixel_values, member):
        """The image in the member's normalisation and size; untouched where these agree."""
        own, its = self.preprocessing, member.preprocessing
        size = self._size(member, *pixel_values.shape[2:])
        resize = size != tuple(pixel_values.shape[2:])
        same = (own["mean"], own["std"]) == (its["mean"], its["std"])
        if same and not resize:
            return pixel_values
        column = {
            key: [pixel_values.new_tensor(how[key])[:, None, None] for how in (own, its)]
            for key in ("mean", "std")
        }
        pixels = pixel_values * column["std"][0] + column["mean"][0]  # in [0, 1] again
        if resize:
            mode = "bicubic" if its["resample"] == BICUBIC else "bilinear"
            pixels = F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)
            pixels = pixels.clamp(0, 1)  # bicubic overshoots at edges
        return (pixels - column["mean"][1]) / column["std"][1]
