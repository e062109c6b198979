"""Convolutions, average pooling, convolutions: Honeybee's C-Abstractor (arXiv 2312.06742, 3.2).

The residual blocks are timm's RegNet bottlenecks with squeeze-and-excitation, as in the paper's
code, so that neighbouring patches mix before and after the map is pooled to ``side x side``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mmpeft.connector import Connector, ConnectorConfig


@dataclass
class CAbstractorConnectorConfig(ConnectorConfig):
    """N = side^2 tokens, for any grid; no prefix tokens.

    A block from i to o channels has, with r = round(i / 4), i * o + o^2 + 2 * o * r + 16 * o + r
    parameters, and i * o + 2 * o more for its shortcut where i is not o. In all, with H = hidden:
    position_grid^2 * D_vision, a block from D_vision to H, 2 * depth - 1 blocks from H to H, and
    (H + 1) * D_llm + (mlp_depth - 1) * (D_llm + 1) * D_llm.

    Attributes:
        side: rows and columns of the map that comes out (12 in the paper's code).
        depth: blocks before the pooling, and as many after it.
        hidden_size: channels of the blocks.
        mlp_depth: layers of the MLP to the LLM, with SiLUs between.
        position_grid: rows and columns of the learned position embeddings, which are interpolated
            to other grids; 24 is CLIP ViT-L/14 at 336 pixels. 0 leaves them out.
    """

    side: int = 12
    depth: int = 3
    hidden_size: int = 1024
    mlp_depth: int = 2
    position_grid: int = 24

    def __post_init__(self):
        for name in ("side", "depth", "mlp_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"c_abstractor: {name} is {getattr(self, name)}; at least 1.")

    def build(self, vision_size, llm_size):
        return CAbstractorConnector(self, vision_size, llm_size)


class CAbstractorConnector(Connector):
    def __init__(self, config, vision_size, llm_size):
        super().__init__(config, vision_size, llm_size)
        from timm.layers import LayerNorm2d
        from timm.models.regnet import RegStage

        def stage(in_channels):
            return RegStage(
                config.depth, in_channels, config.hidden_size, stride=1, dilation=1,
                act_layer=nn.SiLU, norm_layer=LayerNorm2d,
            )  # fmt: skip

        side = config.position_grid
        self.position_embeddings = (
            nn.Parameter(torch.empty(1, vision_size, side, side)) if side else None
        )
        self.net = nn.Sequential(
            stage(vision_size), nn.AdaptiveAvgPool2d(config.side), stage(config.hidden_size)
        )
        readout = [nn.Linear(config.hidden_size, llm_size)]
        for _ in range(config.mlp_depth - 1):
            readout += [nn.SiLU(), nn.Linear(llm_size, llm_size)]
        self.readout = nn.Sequential(*readout)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if side:
            nn.init.trunc_normal_(self.position_embeddings, std=0.02)

    def num_image_tokens(self, grid, num_prefix_tokens=0):
        if num_prefix_tokens:
            raise ValueError(
                f"c_abstractor convolves the map of patches and has no place for the encoder's "
                f"{num_prefix_tokens} prefix token(s); set tokens: patch on the vision encoder."
            )
        return self.config.side**2

    def output_grid(self, grid):
        return self.config.side, self.config.side

    def project(self, features, grid, instruction=None):
        maps = features.transpose(1, 2).unflatten(2, grid)  # (B, D_vision, h, w)
        if self.position_embeddings is not None:
            maps = maps + self._positions(grid)
        pooled = self.net(maps)  # (B, hidden, side, side)
        return self.readout(pooled.flatten(2).transpose(1, 2))

    def _positions(self, grid):
        if self.position_embeddings.shape[2:] == tuple(grid):
            return self.position_embeddings
        own = self.position_embeddings.float()  # in 16 bits torch has no such interpolation
        return F.interpolate(own, grid, mode="bicubic", antialias=True).to(self.position_embeddings)
