"""Space to depth, then a linear layer or an MLP.

The connector of Idefics3 (arXiv 2408.12637, on the architecture of Idefics3-8B), SmolVLM (arXiv
2504.05299, section 2.2) and nanoVLM; with two layers close to InternVL 1.5's (arXiv 2404.16821,
section 3.1).
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from mmpeft.connector import ConnectorConfig, FoldingConnector


@dataclass
class PixelShuffleConnectorConfig(ConnectorConfig):
    """N = P / factor^2 tokens, each of factor x factor neighbouring patches.

    With C = D_vision * factor^2: C * D_llm parameters for one layer (which has no bias, as in
    Idefics3), (C + 1) * hidden + (layers - 2) * (hidden + 1) * hidden + (hidden + 1) * D_llm for
    more.

    Attributes:
        factor: patches along each side that become one token.
        num_layers: 1 is a linear map; 2 or more an MLP with GELUs between.
        hidden_size: width between the layers; ``None`` is the LLM's hidden size.
    """

    factor: int = 2
    num_layers: int = 1
    hidden_size: int | None = None

    def __post_init__(self):
        for name in ("factor", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"pixel shuffle: {name} is {getattr(self, name)}; at least 1.")

    def build(self, vision_size, llm_size):
        return PixelShuffleConnector(self, vision_size, llm_size)


class PixelShuffleConnector(FoldingConnector):
    folds = "pixel shuffle joins"

    def __init__(self, config, vision_size, llm_size):
        super().__init__(config, vision_size, llm_size)
        sizes = [vision_size * config.factor**2]
        sizes += [config.hidden_size or llm_size] * (config.num_layers - 1) + [llm_size]
        layers = [nn.Linear(sizes[0], sizes[1], bias=config.num_layers > 1)]
        for size, next_size in pairwise(sizes[1:]):
            layers += [nn.GELU(), nn.Linear(size, next_size)]
        self.layers = nn.Sequential(*layers)

    def project(self, features, grid, instruction=None):
        factor, (rows, columns) = self.config.factor, self.output_grid(grid)
        patches = features.unflatten(1, (rows, factor, columns, factor))
        # channels of a token run over its patches in reading order, as upstream's weights expect
        tokens = patches.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, N, factor^2 * D_vision)
        return self.layers(tokens)
