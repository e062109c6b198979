"""Connectors: the small trained network between a frozen encoder and a frozen LLM.

To add one, write a file in ``connectors/`` with a config dataclass and a module; the config's
class name is then usable in YAML.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ConnectorConfig:
    """Options of a connector. A subclass adds its own and ``build``.

    Attributes:
        standardize: bring every feature channel to mean 0 and standard deviation 1 over the data
            before the connector sees it. The encoder is frozen, so its statistics are constants;
            without this, channels of large variance hide small ones from the optimiser.
    """

    standardize: bool = True

    def build(self, vision_size: int, llm_size: int) -> "Connector":
        """Args: channels of a patch feature, and hidden size of the LLM."""
        raise NotImplementedError


class Connector(nn.Module):
    """Encoder features ``(B, K + P, D_vision)`` to LLM embeddings ``(B, N, D_llm)``.

    P = h * w patch features in row-major order over ``grid = (h, w)``, behind K prefix tokens
    (class token, registers; 0 unless the encoder is told to keep them). A subclass writes
    ``project`` and, when N differs from K + P or the result is no map, the two methods above it.

    Attributes:
        frozen: keys of the state dict that never train and are not saved with the connector (a
            pretrained Q-Former, say); a bridge loads only where their hash is the same.
        frozen_source: name or directory that the frozen weights come from.
        instruction_tokenizer: arguments of ``AutoTokenizer.from_pretrained`` for the tokenizer
            whose ids ``project`` wants as ``instruction``; ``None`` for a connector that does not
            look at the text.

    Buffers (saved with the weights; set once by :meth:`calibrate`):
        feature_mean, feature_std: ``(D_vision,)``, of the frozen features over the training data.
        output_scale: scalar that puts the first outputs on the scale of the LLM's embeddings.
    """

    frozen: frozenset[str] = frozenset()
    frozen_source: str | None = None
    instruction_tokenizer: dict | None = None

    def __init__(self, config: ConnectorConfig, vision_size: int, llm_size: int):
        super().__init__()
        self.config, self.vision_size, self.llm_size = config, vision_size, llm_size
        self.register_buffer("feature_mean", torch.zeros(vision_size))
        self.register_buffer("feature_std", torch.ones(vision_size))
        self.register_buffer("output_scale", torch.ones(()))
        self.register_parameter("newline", None)

    def add_newline(self) -> None:
        """Give the connector a learned embedding ``(D_llm,)`` that ends a row of tokens."""
        self.newline = nn.Parameter(torch.zeros(self.llm_size))

    def initialize(self) -> None:
        """Read the weights a new bridge starts from, where the config names a source.

        Called once, on a bridge that is new; a loaded one has its weights from the checkpoint, and
        the source may be gone. ``frozen`` weights are in no checkpoint: ``build`` reads those.
        """

    def num_image_tokens(self, grid: tuple[int, int], num_prefix_tokens: int = 0) -> int:
        """N, known before anything runs.

        Raises:
            ValueError: this connector cannot serve such a grid, or wants no prefix tokens.
        """
        return num_prefix_tokens + grid[0] * grid[1]

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """``(rows, columns)`` when the N outputs are a map in row-major order, else ``None``."""
        return grid

    def project(self, features: Tensor, grid: tuple[int, int], instruction=None) -> Tensor:
        """Standardised ``(B, K + P, D_vision)`` to ``(B, N, D_llm)``.

        ``instruction`` is ``{"input_ids", "attention_mask"}``, each ``(B, T)``, or ``None``.
        """
        raise NotImplementedError

    def forward(self, features: Tensor, grid: tuple[int, int], instruction=None) -> Tensor:
        features = features.to(self.feature_mean.dtype)
        features = (features - self.feature_mean) / self.feature_std  # (B, K + P, D_vision)
        return self.project(features, grid, instruction) * self.output_scale  # (B, N, D_llm)

    @torch.no_grad()
    def calibrate(self, features: Tensor, grid: tuple[int, int], embedding_std: float) -> None:
        """Set the buffers from a sample of frozen features ``(M, K + P, D_vision)``.

        ``embedding_std`` is the standard deviation of the LLM's token embeddings.
        """
        if self.config.standardize:
            flat = features.flatten(0, 1).double()
            self.feature_mean.copy_(flat.mean(0))
            # A channel that never varies carries nothing: leave it near zero, do not blow it up.
            std = flat.std(0)
            self.feature_std.copy_(torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)))
        self.output_scale.fill_(1.0)
        std = self.forward(features, grid).std().item()
        if std == 0:
            raise ValueError(
                "the pictures that the connector is calibrated with all look the same to the "
                "vision encoder; give it others."
            )
        self.output_scale.fill_(embedding_std / std)
        if self.newline is not None:
            self.newline.normal_(std=embedding_std)

    def requires_grad_(self, requires_grad: bool = True):
        """As upstream, but what is ``frozen`` stays so."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.frozen)
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the state dict without the ``frozen`` entries."""
        return {k: v for k, v in self.state_dict().items() if k not in self.frozen}


class FoldingConnector(Connector):
    """Each ``config.factor`` x ``config.factor`` block of patches becomes one token.

    ``folds`` says in error messages what is done to a block.
    """

    folds: str

    def num_image_tokens(self, grid, num_prefix_tokens=0):
        if num_prefix_tokens:
            raise ValueError(
                f"{self.folds} neighbouring patches and has no place for the encoder's "
                f"{num_prefix_tokens} prefix token(s); set tokens: patch on the vision encoder."
            )
        rows, columns = self.output_grid(grid)
        return rows * columns

    def output_grid(self, grid):
        factor = self.config.factor
        if grid[0] % factor or grid[1] % factor:
            raise ValueError(
                f"{self.folds} {factor} x {factor} patches, which a grid of {grid[0]} x "
                f"{grid[1]} does not divide into; change factor or the image size."
            )
        return grid[0] // factor, grid[1] // factor
