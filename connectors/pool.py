"""Average pooling of the map, then a linear layer: the baseline for connectors that compress.

MM1 compares it with attention and convolutions (arXiv 2403.09611, section 3.1); DeCo compresses
with pooling alone (arXiv 2405.20985).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from mmpeft.connector import ConnectorConfig, FoldingConnector


@dataclass
class PoolConnectorConfig(ConnectorConfig):
    """N = P / factor^2 tokens; (D_vision + 1) * D_llm parameters.

    Attributes:
        factor: patches along each side whose mean becomes one token.
    """

    factor: int = 2

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"pool: factor is {self.factor}; at least 1.")

    def build(self, vision_size, llm_size):
        return PoolConnector(self, vision_size, llm_size)


class PoolConnector(FoldingConnector):
    folds = "pooling averages"

    def __init__(self, config, vision_size, llm_size):
        super().__init__(config, vision_size, llm_size)
        self.linear = nn.Linear(vision_size, llm_size)

    def project(self, features, grid, instruction=None):
        maps = features.transpose(1, 2).unflatten(2, grid)  # (B, D_vision, h, w)
        pooled = F.avg_pool2d(maps, self.config.factor)
        return self.linear(pooled.flatten(2).transpose(1, 2))
