"""No connector: features enter the LLM as they are, the baseline of learning nothing between."""

from dataclasses import dataclass

from mmpeft.connector import Connector, ConnectorConfig


@dataclass
class IdentityConnectorConfig(ConnectorConfig):
    """N = K + P tokens; no parameters. D_vision must be D_llm.

    Attributes:
        standardize: as everywhere, but off: features pass unchanged, to the bit. Switched on, they
            are standardised and brought to the scale of the LLM's embeddings.
    """

    standardize: bool = False

    def build(self, vision_size, llm_size):
        if vision_size != llm_size:
            raise ValueError(
                f"dimensions cannot meet: the vision encoder gives {vision_size} channels and the "
                f"LLM takes {llm_size}; use connector LinearConnectorConfig, which maps them."
            )
        return IdentityConnector(self, vision_size, llm_size)


class IdentityConnector(Connector):
    def project(self, features, grid, instruction=None):
        return features

    def calibrate(self, features, grid, embedding_std):
        if self.config.standardize:
            super().calibrate(features, grid, embedding_std)
