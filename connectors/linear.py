"""One linear layer per patch: the connector of LLaVA (arXiv 2304.08485, section 4.1)."""

from dataclasses import dataclass

from torch import nn

from mmpeft.connector import Connector, ConnectorConfig


@dataclass
class LinearConnectorConfig(ConnectorConfig):
    """N = K + P tokens; D_vision * D_llm + D_llm parameters."""

    def build(self, vision_size, llm_size):
        return LinearConnector(self, vision_size, llm_size)


class LinearConnector(Connector):
    def __init__(self, config, vision_size, llm_size):
        super().__init__(config, vision_size, llm_size)
        self.linear = nn.Linear(vision_size, llm_size)

    def project(self, features, grid, instruction=None):
        return self.linear(features)
