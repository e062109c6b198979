"""Every connector on the contract; each against upstream classes and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Idefics3Config, LlavaConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

import mmpeft.connectors
from mmpeft.connector import ConnectorConfig
from mmpeft.connectors.abstractor import AbstractorConnectorConfig
from mmpeft.connectors.c_abstractor import CAbstractorConnectorConfig
from mmpeft.connectors.identity import IdentityConnectorConfig
from mmpeft.connectors.linear import LinearConnectorConfig
from mmpeft.connectors.mlp import MLPConnectorConfig
from mmpeft.connectors.pixel_shuffle import PixelShuffleConnectorConfig
from mmpeft.connectors.pool import PoolConnectorConfig
from mmpeft.connectors.qformer import QFormerConnectorConfig
from mmpeft.connectors.resampler import ResamplerConnectorConfig

GRID = (4, 6)
TINY_QFORMER = {
    "num_query_tokens": 5, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip
MAPS = [
    LinearConnectorConfig(),
    MLPConnectorConfig(),
    MLPConnectorConfig(hidden_size=7),
    PixelShuffleConnectorConfig(),
    PixelShuffleConnectorConfig(num_layers=3, hidden_size=9),
    PoolConnectorConfig(),
    CAbstractorConnectorConfig(side=3, depth=2, hidden_size=8, position_grid=5),
    CAbstractorConnectorConfig(side=2, depth=1, hidden_size=8, mlp_depth=1, position_grid=0),
]
QUERIES = [
    ResamplerConnectorConfig(
        num_query_tokens=5, depth=2, num_attention_heads=4, head_dim=6, num_key_value_heads=2
    ),
    AbstractorConnectorConfig(
        num_query_tokens=5, num_hidden_layers=2, num_attention_heads=3, intermediate_size=10
    ),
    QFormerConnectorConfig(**TINY_QFORMER),
]
ALL = [*MAPS, *QUERIES]


def name(config):
    return type(config).__name__.removesuffix("ConnectorConfig")


every = pytest.mark.parametrize("config", ALL, ids=name)


def build(config, vision_size=12, llm_size=20):
    torch.manual_seed(0)
    return config.build(vision_size, llm_size)


def features(n=8, grid=GRID, prefix=0):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, prefix + grid[0] * grid[1], 12, generator=generator)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_every_connector_is_in_these_tests():
    shipped = {
        member
        for module in vars(mmpeft.connectors).values()
        for member in getattr(module, "__dict__", {}).values()
        if isinstance(member, type) and issubclass(member, ConnectorConfig)
    }
    assert shipped - {ConnectorConfig} == {type(c) for c in ALL} | {IdentityConnectorConfig}


# ------------------------------------------------------------------------------- the contract


@every
@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (12, 2)])
def test_tokens_are_as_many_as_announced_and_every_parameter_learns(config, grid):
    connector = build(config)
    out = connector(features(3, grid), grid)
    assert out.shape == (3, connector.num_image_tokens(grid), 20)
    if config in MAPS:
        rows, columns = connector.output_grid(grid)
        assert rows * columns == out.shape[1]
    else:
        assert connector.output_grid(grid) is None
    out.square().sum().backward()
    assert all(p.grad is not None for p in connector.parameters())
    assert all(p.grad.isfinite().all() for p in connector.parameters())


@every
def test_prefix_tokens_are_served_or_refused(config):
    connector = build(config)
    if name(config) in ("PixelShuffle", "Pool", "CAbstractor"):
        with pytest.raises(ValueError, match="2 prefix token.*tokens: patch"):
            connector.num_image_tokens(GRID, 2)
        return
    seen = features(3, prefix=2)
    out = connector(seen, GRID)
    assert out.shape == (3, connector.num_image_tokens(GRID, 2), 20)
    changed = seen.clone()
    changed[:, 0] = changed[:, 0].flip(-1)
    assert not torch.equal(connector(changed, GRID), out)


@every
def test_an_image_does_not_depend_on_its_neighbours(config):
    connector = build(config)
    batch = features(4)
    alone = torch.cat([connector(image[None], GRID) for image in batch])
    torch.testing.assert_close(connector(batch, GRID), alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", MAPS[:6], ids=name)
def test_a_map_keeps_its_places(config):
    # what stands in one place of the map changes the token of that place, and no other
    connector = build(config)
    seen = features(1)
    changed = seen.clone()
    changed[0, 2 * GRID[1] + 5] += 1  # row 2, column 5
    moved = (connector(changed, GRID) - connector(seen, GRID))[0].abs().sum(-1) > 0
    rows, columns = connector.output_grid(GRID)
    expected = (2 * rows // GRID[0]) * columns + 5 * columns // GRID[1]
    assert moved.nonzero().flatten().tolist() == [expected]


@pytest.mark.parametrize("config", QUERIES, ids=name)
def test_queries_start_different(config):
    # from equal queries (upstream's zeros and ones) equal tokens would never part
    out = build(config)(features(2), GRID)[:, :5]
    assert torch.pdist(out[0]).min() > 1e-4 * out.std()


@every
def test_bfloat16_autocast(config):
    connector = build(config)
    exact = connector(features(), GRID)
    with torch.autocast("cpu", torch.bfloat16):
        out = connector(features(), GRID)
    out.float().square().sum().backward()
    assert (out - exact).std() < 0.05 * exact.std()


@every
def test_meta_device(config):
    with torch.device("meta"):
        connector = config.build(12, 20)
        connector.initialize()
    assert {t.device.type for t in connector.state_dict().values()} == {"meta"}
    assert count(connector) == count(config.build(12, 20))
    assert connector.num_image_tokens(GRID) == build(config).num_image_tokens(GRID)


@every
def test_what_trains_is_what_is_saved(config):
    connector, other = build(config), config.build(12, 20)
    other.load_state_dict(connector.trained_state())
    torch.testing.assert_close(other(features(), GRID), connector(features(), GRID))
    assert all(p.requires_grad for p in connector.parameters())


@every
def test_calibration_standardises_channels_and_meets_the_embedding_scale(config):
    connector = build(config)
    scaled = features(64) * torch.logspace(-3, 3, 12) + 5
    connector.calibrate(scaled, GRID, embedding_std=0.14)
    seen = []
    project = connector.project
    connector.project = lambda x, *rest: seen.append(x) or project(x, *rest)
    out = connector(scaled, GRID)
    torch.testing.assert_close(seen[0].mean((0, 1)), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0].std((0, 1)), torch.ones(12), atol=1e-2, rtol=0)
    torch.testing.assert_close(out.std(), torch.tensor(0.14), atol=1e-3, rtol=0)


def test_a_constant_channel_is_not_blown_up():
    connector = build(LinearConnectorConfig())
    constant = features()
    constant[..., 3] = 7.0
    connector.calibrate(constant, GRID, 0.1)
    assert connector(constant + 1e-4, GRID).abs().max() < 10


def test_pictures_that_all_look_alike_calibrate_nothing():
    connector = PixelShuffleConnectorConfig().build(16, 20)
    with pytest.raises(ValueError, match="all look the same to the vision encoder"):
        connector.calibrate(torch.ones(3, 16, 16), (4, 4), 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_c_abstractor_takes_other_grids_in_16_bits(dtype):
    config = CAbstractorConnectorConfig(side=2, depth=1, hidden_size=16, position_grid=4)
    connector = config.build(16, 20).to(dtype)
    assert torch.isfinite(connector(torch.randn(1, 24, 16, dtype=dtype), (4, 6))).all()


def test_standardising_can_be_switched_off():
    connector = build(LinearConnectorConfig(standardize=False))
    connector.calibrate(features() * 9 + 1, GRID, 0.1)
    assert connector.feature_mean.eq(0).all() and connector.feature_std.eq(1).all()


# --------------------------------------------------------------------------------- parameters


def test_parameter_counts_as_documented():
    d, llm = 12, 20
    block = lambda i, o: (  # noqa: E731
        i * o + o * o + 2 * o * round(i / 4) + 16 * o + round(i / 4) + (i != o) * (i * o + 2 * o)
    )
    ffn, layers, cross = 2 * 16 * 24 + 24 + 3 * 16, 3, 2
    documented = [
        (d + 1) * llm,
        (d + 1) * llm + (llm + 1) * llm,
        (d + 1) * 7 + 8 * llm,
        4 * d * llm,
        (4 * d + 1) * 9 + 10 * 9 + 10 * llm,
        (d + 1) * llm,
        25 * d + block(d, 8) + 3 * block(8, 8) + 9 * llm + (llm + 1) * llm,
        block(d, 8) + block(8, 8) + 9 * llm,
        (d + 1) * d + 5 * d + 2 * (2 * d * (24 + 12) + 12 * d * d + 3 * d) + d + (d + 1) * llm,
        5 * d + 2 * (4 * (d * d + d) + 3 * d * 10 + 40 + 7 * d) + (d + 1) * llm + llm,
        5 * 16 + 2 * 16 + layers * (4 * 16**2 + 6 * 16 + ffn)
        + cross * (2 * 16**2 + 2 * d * 16 + 6 * 16) + 17 * llm,
    ]  # fmt: skip
    assert [count(build(config)) for config in ALL] == documented


@pytest.mark.parametrize(
    ("config", "vision_size", "llm_size", "millions"),
    [
        (LinearConnectorConfig(), 1024, 4096, 4.198),  # LLaVA: CLIP ViT-L/14, Vicuna 7B
        (MLPConnectorConfig(), 1024, 4096, 20.980),  # LLaVA-1.5 7B
        (PixelShuffleConnectorConfig(factor=4), 768, 576, 7.078),  # SmolVLM-256M
        (AbstractorConnectorConfig(), 1024, 4096, 81.474),  # mPLUG-Owl
        (QFormerConnectorConfig(), 1408, 2560, 107.131),  # BLIP-2 OPT 2.7B, without its text side
    ],
)  # fmt: skip
def test_true_sizes(config, vision_size, llm_size, millions):
    with torch.device("meta"):
        assert count(config.build(vision_size, llm_size)) / 1e6 == pytest.approx(millions, abs=1e-3)


# ----------------------------------------------------------------------------------- upstream


def test_mlp_is_llavas_projector():
    config = LlavaConfig()
    config.vision_config.hidden_size, config.text_config.hidden_size = 12, 20
    reference = LlavaMultiModalProjector(config)
    connector = build(MLPConnectorConfig())
    for ours, theirs in ((0, reference.linear_1), (2, reference.linear_2)):
        connector.layers[ours].load_state_dict(theirs.state_dict())
    torch.testing.assert_close(connector(features(), GRID), reference(features()))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_shuffle_is_idefics3s_connector(factor):
    config = Idefics3Config(scale_factor=factor)
    config.vision_config.hidden_size, config.text_config.hidden_size = 12, 20
    reference = Idefics3Connector(config)
    connector = build(PixelShuffleConnectorConfig(factor=factor))
    connector.layers[0].load_state_dict(reference.modality_projection.proj.state_dict())
    square = features(grid=(6, 6))
    assert torch.equal(connector(square, (6, 6)), reference(square))


def test_pixel_shuffle_of_an_oblong_grid_joins_neighbours():
    connector = build(PixelShuffleConnectorConfig())
    connector.layers = torch.nn.Identity()
    places = torch.arange(24.0).reshape(1, 24, 1).expand(1, 24, 12)
    out = connector.project(places, GRID)[0, :, ::12]
    assert out[0].tolist() == [0, 1, 6, 7] and out[5].tolist() == [16, 17, 22, 23]


def test_pool_is_the_mean_of_neighbours():
    connector = build(PoolConnectorConfig())
    seen = features(1)
    corner = connector.linear(seen[:, [0, 1, 6, 7]].mean(1))
    torch.testing.assert_close(connector(seen, GRID)[:, 0], corner)


def test_resampler_is_idefics2s_perceiver():
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    connector = build(QUERIES[0])
    reference = Idefics2PerceiverResampler(
        Idefics2PerceiverConfig(
            hidden_size=12, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4,
            resampler_head_dim=6, num_key_value_heads=2, attn_implementation="eager",
        )
    )  # fmt: skip
    reference.load_state_dict(connector.perceiver_resampler.state_dict())
    context = connector.modality_projection(features())
    expected = connector.language_projection(reference(context, torch.ones(8, 24)))
    torch.testing.assert_close(connector(features(), GRID), expected)


def test_abstractor_by_hand():
    connector = build(QUERIES[1])
    norm = lambda x, ln, eps=1e-5: F.layer_norm(x, x.shape[-1:], ln.weight, ln.bias, eps)  # noqa: E731
    queries, seen = connector.query_tokens[0], features(1)[0]
    for layer in connector.layers:
        queries = norm(queries, layer.norm1)
        context = torch.cat([queries, norm(seen, layer.normk)])
        q, k, v = layer.query(queries), layer.key(context), layer.value(context)
        heads = [
            (q[:, s] @ k[:, s].T / math.sqrt(4)).softmax(-1) @ v[:, s]
            for s in (slice(0, 4), slice(4, 8), slice(8, 12))
        ]
        queries = queries + layer.out_proj(torch.cat(heads, -1))
        states = norm(queries, layer.norm2)
        gated = F.silu(layer.w1(states)) * layer.w3(states)
        queries = queries + layer.w2(norm(gated, layer.ffn_ln, 1e-6))
    expected = torch.cat([connector.visual_fc(queries), connector.vit_eos[0]])
    torch.testing.assert_close(connector(features(1), GRID)[0], expected)


def test_abstractor_of_the_published_size():
    connector = AbstractorConnectorConfig(num_hidden_layers=1).build(1024, 32)
    assert connector.layers[0].w1.out_features == 2816
    assert connector.num_image_tokens((16, 16), 1) == 65


def test_c_abstractor_sees_positions_and_neighbours():
    config = CAbstractorConnectorConfig(side=2, depth=1, hidden_size=8, position_grid=4)
    connector = build(config)
    torch.nn.init.normal_(connector.position_embeddings)
    flat = torch.ones(1, 16, 12)
    assert not torch.allclose(*connector(flat, (4, 4))[0, :2])
    # the embeddings are laid over another grid, not cut from it
    assert torch.equal(connector._positions((4, 4)), connector.position_embeddings)
    mean = connector.position_embeddings.mean((2, 3))
    torch.testing.assert_close(connector._positions((1, 1))[..., 0, 0], mean, atol=0.3, rtol=0)
    without = build(CAbstractorConnectorConfig(side=4, depth=1, hidden_size=8, position_grid=0))
    seen = features(1, (4, 4))
    changed = seen.clone()
    changed[0, 0] += 5
    moved = (without(changed, (4, 4)) - without(seen, (4, 4)))[0].abs().sum(-1)
    assert (moved > 1e-7).sum() > 1


# ----------------------------------------------------------------------------------- identity


def test_identity_passes_features_to_the_bit():
    connector = IdentityConnectorConfig().build(12, 12)
    connector.calibrate(features() * 7 + 1, GRID, 0.1)
    assert torch.equal(connector(features(), GRID), features())
    assert connector.num_image_tokens(GRID, 2) == 26 and count(connector) == 0
    connector.requires_grad_(True)
    connector.load_state_dict(connector.trained_state())


def test_identity_can_standardise():
    connector = IdentityConnectorConfig(standardize=True).build(12, 12)
    connector.calibrate(features() * 7 + 1, GRID, 0.1)
    torch.testing.assert_close(connector(features() * 7 + 1, GRID).std(), torch.tensor(0.1))


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IdentityConnectorConfig().build(12, 20), "12 channels.*takes 20.*LinearConn"),
        (lambda: build(PixelShuffleConnectorConfig()).num_image_tokens((5, 4)), "grid of 5 x 4"),
        (lambda: build(PoolConnectorConfig()).num_image_tokens((4, 3)), "grid of 4 x 3"),
        (lambda: build(AbstractorConnectorConfig(num_attention_heads=5)), "5 does not divide.*12"),
        (lambda: ResamplerConnectorConfig(num_key_value_heads=3), "3 does not divide.* 16"),
        (lambda: PixelShuffleConnectorConfig(factor=0), "factor is 0"),
        (lambda: PoolConnectorConfig(factor=0), "factor is 0"),
        (lambda: CAbstractorConnectorConfig(side=0), "side is 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
