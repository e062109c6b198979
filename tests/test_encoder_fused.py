"""Several encoders on one image: what each sees, and how their features are joined."""

import dataclasses

import pytest
import torch

from mmpeft import config as configuration
from mmpeft.encoder import (
    FusedEncoderConfig,
    TimmEncoderConfig,
    VisionEncoderConfig,
    weights_hash,
)
from mmpeft.spec import from_spec, to_spec

from .test_config import write_recipe
from .test_encoder import pixels


def member(name, **options):
    return TimmEncoderConfig(name, pretrained=False, **{"image_size": 64} | options)


def fused(*members, **options):
    torch.manual_seed(0)
    return FusedEncoderConfig(encoders=list(members), **options).build()


def renormalised(images, own, its):
    """Closed form: back to [0, 1], then as the other wants it."""
    mean, std, to_mean, to_std = (
        torch.tensor(how[key])[:, None, None] for how in (own, its) for key in ("mean", "std")
    )
    return (images * std + mean - to_mean) / to_std


def test_channels_on_the_coarsest_grid():
    encoder = fused(member("test_vit"), member("test_efficientnet"))
    vit, cnn = encoder.encoders
    assert vit.grid == (4, 4) and cnn.grid == encoder.grid == (2, 2)
    assert encoder.hidden_size == vit.hidden_size * 4 + cnn.hidden_size
    features = encoder(pixels())
    assert features.shape == (2, 4, encoder.hidden_size)
    seen = renormalised(pixels(), vit.preprocessing, cnn.preprocessing)
    torch.testing.assert_close(features[..., -cnn.hidden_size :], cnn(seen))
    # the first coarse cell holds the four fine ones of its corner
    corner = vit(pixels())[:, [0, 1, 4, 5]].transpose(1, 2).flatten(1)
    torch.testing.assert_close(features[:, 0, : 4 * vit.hidden_size], corner)
    assert encoder.any_size and encoder.grid_of(64, 96) == (2, 3)
    assert encoder(pixels(64, 96)).shape == (2, 6, encoder.hidden_size)


def test_each_sees_its_own_normalisation():
    encoder = fused(member("test_vit"), member("test_vit2"))
    first, second = encoder.encoders
    second.preprocessing |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    seen = encoder._prepare(pixels(), second)
    expected = renormalised(pixels(), first.preprocessing, second.preprocessing)
    torch.testing.assert_close(seen, expected)
    assert torch.equal(encoder._prepare(pixels(), first), pixels())
    features = encoder(pixels())
    torch.testing.assert_close(features[..., : first.hidden_size], first(pixels()))
    torch.testing.assert_close(features[..., first.hidden_size :], second(expected))


def test_each_sees_its_own_size():
    encoder = fused(member("test_vit"), member("test_vit2", image_size=128))
    second = encoder.encoders[1]
    flat = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(encoder._prepare(flat, second), torch.full((1, 3, 128, 128), 0.3))
    assert encoder._prepare(pixels(64, 96), second).shape == (2, 3, 128, 192)
    assert (encoder.grid, encoder.stride) == ((4, 4), (16, 16))
    assert encoder.hidden_size == encoder.encoders[0].hidden_size + 4 * second.hidden_size
    assert encoder(pixels(64, 96)).shape == (2, 24, encoder.hidden_size)


def test_tokens_one_behind_the_other():
    both = [member("test_vit", tokens="all"), member("test_vit2", tokens="all")]
    encoder = fused(*both, join="tokens")
    one, two = (m(pixels()) for m in encoder.encoders)
    features = encoder(pixels())
    assert (encoder.grid, encoder.num_prefix_tokens) == ((8, 4), 2)
    expected = torch.cat([one[:, :1], two[:, :1], one[:, 1:], two[:, 1:]], dim=1)
    torch.testing.assert_close(features, expected)
    assert encoder.grid_of(64, 96) == (8, 6)
    uneven = fused(member("test_vit"), member("test_vit2", image_size=128), join="tokens")
    assert uneven.grid == (1, 16 + 64) and uneven(pixels()).shape[1] == 80
    pooled = fused(member("test_vit", tokens="pooled"), member("test_vit2"), join="tokens")
    assert pooled.grid == (1, 17) and pooled(pixels()).shape[1] == 17


def test_frozen_one_identity_and_built_on_meta():
    encoder = fused(member("test_vit"), member("test_efficientnet"))
    again = fused(member("test_vit"), member("test_efficientnet"))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert encoder.config.name == "test_vit + test_efficientnet"
    assert weights_hash(encoder.state_dict()) == weights_hash(again.state_dict())
    with torch.device("meta"):
        meta = encoder.config.build(weights=False)
    assert (meta.grid, meta.hidden_size) == (encoder.grid, encoder.hidden_size)
    half = dataclasses.replace(encoder.config, dtype="bfloat16").build()
    assert half(pixels()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([member("test_vit")], {}, "encoders: 1 to fuse; name two or more"),
        (
            [member("test_vit", tokens="all"), member("test_vit2")], {},
            "test_vit has tokens: all, which stand at no position of a grid; use join: tokens",
        ),
        (
            [member("test_vit"), member("test_vit3")], {"join": "tokens"},
            r"features of \[64, 96\] channels cannot form one sequence; use join: channels",
        ),
        (
            [member("test_vit"), member("test_vit2", image_size=96)], {},
            r"grids \[\(4, 4\), \(6, 6\)\] do not nest.*set image_size.*or use join: tokens",
        ),
        (
            [member("test_vit"), member("test_vit2", fit="pad")], {},
            "test_vit2 has fit: pad, and the whole stretch; one picture is made for all",
        ),
        ([member("test_vit"), member("test_vit2")], {"image_size": 64}, "set on each of the enc"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined(members, options, message):
    with pytest.raises(ValueError, match=message):
        fused(*members, **options)


def test_sizes_that_one_member_refuses():
    encoder = fused(member("test_vit"), member("test_efficientnet"))
    with pytest.raises(ValueError, match="test_efficientnet takes no image of 64 x 80 pixels"):
        encoder(pixels(64, 80))


def test_named_in_a_recipe_and_in_a_checkpoint(tmp_path):
    recipe = write_recipe(tmp_path)
    old = "{class_path: TimmEncoderConfig, init_args: {name: e, image_size: 64}}"
    new = (
        "{class_path: FusedEncoderConfig, init_args: {join: tokens, encoders: ["
        "{class_path: TimmEncoderConfig, init_args: {name: a, tokens: all}}, "
        "{class_path: OpenClipEncoderConfig, init_args: {name: b, pretrained: openai}}]}}"
    )
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    run, resolved = configuration.load(recipe)
    encoder = run.model.vision_encoder
    assert [type(m).__name__ for m in encoder.encoders] == [
        "TimmEncoderConfig", "OpenClipEncoderConfig",
    ]  # fmt: skip
    assert (encoder.join, encoder.name, encoder.encoders[0].tokens) == ("tokens", "a + b", "all")
    spec = to_spec(encoder)
    assert from_spec(spec, VisionEncoderConfig) == encoder
    recipe.write_text(resolved)
    assert configuration.load(recipe)[0].model.vision_encoder == encoder
