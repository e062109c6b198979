"""Two linear layers with a GELU between, per patch: LLaVA-1.5 (arXiv 2310.03744, section 3.3)."""

from dataclasses import dataclass

from torch import nn

from mmpeft.connector import Connector, ConnectorConfig


@dataclass
class MLPConnectorConfig(ConnectorConfig):
    """N = K + P tokens; (D_vision + 1) * hidden + (hidden + 1) * D_llm parameters.

    Attributes:
        hidden_size: width between the layers; ``None`` is the LLM's hidden size, as in LLaVA-1.5.
    """

    hidden_size: int | None = None

    def build(self, vision_size, llm_size):
        return MLPConnector(self, vision_size, llm_size)


class MLPConnector(Connector):
    def __init__(self, config, vision_size, llm_size):
        super().__init__(config, vision_size, llm_size)
        hidden_size = config.hidden_size or llm_size
        self.layers = nn.Sequential(
            nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, llm_size)
        )

    def project(self, features, grid, instruction=None):
        return self.layers(features)
