"""Learned latents that attend to the features: the perceiver resampler of Flamingo.

arXiv 2204.14198, section 2.1 and appendix A.1.1, in the form of Idefics2 (arXiv 2405.02246,
section 3.3): transformers' ``Idefics2PerceiverResampler``, whose keys and values are features and
latents together.
"""

from dataclasses import dataclass

from torch import nn

from mmpeft.connector import Connector, ConnectorConfig


@dataclass
class ResamplerConnectorConfig(ConnectorConfig):
    """N = num_query_tokens, for any grid and any prefix tokens.

    With H = hidden, q = num_attention_heads * head_dim and k = num_key_value_heads * head_dim:
    (D_vision + 1) * H + N * H + depth * (2 * H * (q + k) + 12 * H^2 + 3 * H) + H
    + (H + 1) * D_llm parameters.

    Attributes:
        num_query_tokens: latents, and tokens out.
        depth: layers of cross-attention and MLP.
        hidden_size: width of the latents; ``None`` is the encoder's, as in Flamingo. Idefics2
            takes the LLM's.
        num_attention_heads: heads of the queries.
        head_dim: channels of a head.
        num_key_value_heads: heads of keys and values; divides ``num_attention_heads``.
    """

    num_query_tokens: int = 64
    depth: int = 3
    hidden_size: int | None = None
    num_attention_heads: int = 16
    head_dim: int = 96
    num_key_value_heads: int = 4

    def __post_init__(self):
        for name in ("num_query_tokens", "depth", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"resampler: {name} is {getattr(self, name)}; at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"resampler: num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}."
            )

    def build(self, vision_size, llm_size):
        return ResamplerConnector(self, vision_size, llm_size)


class ResamplerConnector(Connector):
    def __init__(self, config, vision_size, llm_size):
        super().__init__(config, vision_size, llm_size)
        from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
        from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

        hidden_size = config.hidden_size or vision_size
        self.modality_projection = nn.Linear(vision_size, hidden_size)
        self.perceiver_resampler = Idefics2PerceiverResampler._from_config(
            Idefics2PerceiverConfig(
                hidden_size=hidden_size,
                resampler_n_latents=config.num_query_tokens,
                resampler_depth=config.depth,
                resampler_n_heads=config.num_attention_heads,
                resampler_head_dim=config.head_dim,
                num_key_value_heads=config.num_key_value_heads,
            ),
            attn_implementation="sdpa",
        )
        # upstream's are all ones, from which equal latents would never part
        nn.init.normal_(self.perceiver_resampler.latents)
        self.language_projection = nn.Linear(hidden_size, llm_size)

    def num_image_tokens(self, grid, num_prefix_tokens=0):
        return self.config.num_query_tokens

    def output_grid(self, grid):
        return None

    def project(self, features, grid, instruction=None):
        context = self.modality_projection(features)  # (B, K + P, hidden)
        everywhere = features.new_ones(features.shape[:2])
        latents = self.perceiver_resampler(context, everywhere)  # (B, N, hidden)
        return self.language_projection(latents)
