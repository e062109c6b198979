"""Connectors against upstream classes and closed forms."""

import pytest
import torch
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mmpeft.connectors.linear import LinearConnectorConfig
from mmpeft.connectors.mlp import MLPConnectorConfig

GRID = (3, 5)
ALL = [LinearConnectorConfig(), MLPConnectorConfig(), MLPConnectorConfig(hidden_size=7)]


def features(n=8):
    return torch.randn(n, 15, 12, generator=torch.Generator().manual_seed(0))


def test_mlp_is_llavas_projector():
    config = LlavaConfig()
    config.vision_config.hidden_size, config.text_config.hidden_size = 12, 20
    reference = LlavaMultiModalProjector(config)
    connector = MLPConnectorConfig().build(12, 20)
    for ours, theirs in ((0, reference.linear_1), (2, reference.linear_2)):
        connector.layers[ours].load_state_dict(theirs.state_dict())
    torch.testing.assert_close(connector(features(), GRID), reference(features()))


@pytest.mark.parametrize("config", ALL)
def test_contract(config):
    connector = config.build(12, 20)
    out = connector(features(), GRID)
    assert out.shape == (8, connector.num_image_tokens(GRID), 20)
    out.sum().backward()
    assert all(p.grad is not None for p in connector.parameters())


def test_parameter_counts_as_documented():
    def count(config):
        return sum(p.numel() for p in config.build(12, 20).parameters())

    assert count(ALL[0]) == 12 * 20 + 20
    assert count(ALL[1]) == 13 * 20 + 21 * 20
    assert count(ALL[2]) == 13 * 7 + 8 * 20


@pytest.mark.parametrize("config", ALL)
def test_calibration_standardises_channels_and_meets_the_embedding_scale(config):
    connector = config.build(12, 20)
    scaled = features(64) * torch.logspace(-3, 3, 12) + 5
    connector.calibrate(scaled, GRID, embedding_std=0.14)
    seen = []
    project = connector.project
    connector.project = lambda x, grid: seen.append(x) or project(x, grid)
    out = connector(scaled, GRID)
    torch.testing.assert_close(seen[0].mean((0, 1)), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0].std((0, 1)), torch.ones(12), atol=1e-2, rtol=0)
    torch.testing.assert_close(out.std(), torch.tensor(0.14), atol=1e-3, rtol=0)


def test_a_constant_channel_is_not_blown_up():
    connector = LinearConnectorConfig().build(12, 20)
    constant = features()
    constant[..., 3] = 7.0
    connector.calibrate(constant, GRID, 0.1)
    assert connector(constant + 1e-4, GRID).abs().max() < 10


def test_standardising_can_be_switched_off():
    connector = LinearConnectorConfig(standardize=False).build(12, 20)
    connector.calibrate(features() * 9 + 1, GRID, 0.1)
    assert connector.feature_mean.eq(0).all() and connector.feature_std.eq(1).all()
