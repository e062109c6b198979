"""The visual abstractor of mPLUG-Owl (arXiv 2304.14178, section 3.1 and its official code).

Learned queries attend to themselves and the features together, pass a gated MLP, and are mapped to
the LLM; one learned token ends them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mmpeft.connector import Connector, ConnectorConfig


@dataclass
class AbstractorConnectorConfig(ConnectorConfig):
    """N = num_query_tokens + 1, for any grid and any prefix tokens.

    Queries and features share keys and values, so the width is that of the encoder, D. With I =
    intermediate: num_query_tokens * D + num_hidden_layers * (4 * (D^2 + D) + 3 * D * I + 4 * I
    + 7 * D) + (D + 1) * D_llm + D_llm parameters. Attention has no dropout here.

    Attributes:
        num_query_tokens: learned queries.
        num_hidden_layers: layers of attention and MLP.
        num_attention_heads: heads; divides D_vision.
        intermediate_size: width of the MLP; ``None`` is 8/3 D_vision, rounded up to a multiple of
            256 (2,816 for 1,024).
    """

    num_query_tokens: int = 64
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    intermediate_size: int | None = None

    def __post_init__(self):
        for name in ("num_query_tokens", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"abstractor: {name} is {getattr(self, name)}; at least 1.")

    def build(self, vision_size, llm_size):
        if vision_size % self.num_attention_heads:
            raise ValueError(
                f"abstractor: num_attention_heads {self.num_attention_heads} does not divide the "
                f"vision encoder's {vision_size} channels; choose a divisor."
            )
        return AbstractorConnector(self, vision_size, llm_size)


class AbstractorConnector(Connector):
    def __init__(self, config, vision_size, llm_size):
        super().__init__(config, vision_size, llm_size)
        intermediate_size = config.intermediate_size or -(-vision_size * 8 // 3 // 256) * 256
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, vision_size))
        self.layers = nn.ModuleList(
            AbstractorLayer(vision_size, config.num_attention_heads, intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.visual_fc = nn.Linear(vision_size, llm_size)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, llm_size))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for parameter in (self.query_tokens, self.vit_eos):
            nn.init.trunc_normal_(parameter, std=0.02)

    def num_image_tokens(self, grid, num_prefix_tokens=0):
        return self.config.num_query_tokens + 1

    def output_grid(self, grid):
        return None

    def project(self, features, grid, instruction=None):
        queries = self.query_tokens.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)  # (B, num_query_tokens, D_vision)
        tokens = self.visual_fc(queries)
        end = self.vit_eos.to(tokens.dtype).expand(len(features), -1, -1)
        return torch.cat([tokens, end], dim=1)


class AbstractorLayer(nn.Module):
    """Attention of the queries to queries and features, then a SwiGLU with a norm inside."""

    def __init__(self, size, num_heads, intermediate_size):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.normk, self.norm2 = (nn.LayerNorm(size) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.out_proj = nn.Linear(size, size)
        self.w1, self.w3 = (nn.Linear(size, intermediate_size) for _ in range(2))
        self.ffn_ln = nn.LayerNorm(intermediate_size, eps=1e-6)
        self.w2 = nn.Linear(intermediate_size, size)

    def heads(self, states):
        return states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, queries, features):
        queries = self.norm1(queries)  # the residual starts behind the norm, as in the paper's code
        context = torch.cat([queries, self.normk(features)], dim=1)
        attended = F.scaled_dot_product_attention(
            self.heads(self.query(queries)), self.heads(self.key(context)),
            self.heads(self.value(context)),
        )  # fmt: skip
        queries = queries + self.out_proj(attended.transpose(1, 2).flatten(2))
        states = self.norm2(queries)
        return queries + self.w2(self.ffn_ln(F.silu(self.w1(states)) * self.w3(states)))
