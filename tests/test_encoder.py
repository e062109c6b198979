"""Vision encoders: patches only, right order, frozen, one identity."""

import pytest
import torch
import torch.nn.functional as F

from mmpeft.encoder import (
    OpenClipEncoderConfig,
    TimmEncoderConfig,
    TransformersEncoderConfig,
    fuse_on_coarsest_grid,
    weights_hash,
)


def pixels(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_timm_vit_patches_without_the_class_token(encoder_dir):
    encoder = TimmEncoderConfig(encoder_dir, image_size=64).build()
    assert (encoder.grid, encoder.hidden_size) == ((4, 4), 64)
    states = encoder.model.forward_features(pixels())  # (2, 1 + 16, 64), normalised
    torch.testing.assert_close(encoder(pixels()), states[:, 1:])


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_vit3", "test_efficientnet", "test_convnext"]
)
def test_timm_families(name):
    encoder = TimmEncoderConfig(name, image_size=64, pretrained=False).build()
    features = encoder(pixels())
    assert features.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.hidden_size)


def test_fusing_folds_the_finer_map_and_loses_nothing():
    fine, coarse = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 2, 2)
    fused = fuse_on_coarsest_grid([fine, coarse])
    assert fused.shape == (1, 3 * 4 + 5, 2, 2)
    assert torch.equal(F.pixel_shuffle(fused[:, :12], 2), fine)
    assert torch.equal(fused[:, 12:], coarse)
    with pytest.raises(ValueError, match="do not nest; choose an image_size"):
        fuse_on_coarsest_grid([torch.zeros(1, 1, 5, 5), coarse])


def test_layers_of_a_cnn_are_joined():
    config = TimmEncoderConfig("test_efficientnet", image_size=64, layers=[2, 3], pretrained=False)
    encoder = config.build()
    fine, coarse = encoder.feature_maps(pixels())
    k = fine.shape[2] // coarse.shape[2]
    assert k > 1 and encoder.hidden_size == fine.shape[1] * k * k + coarse.shape[1]


def save(tmp_path, model, size):
    from transformers import ViTImageProcessor

    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(tmp_path)
    return str(tmp_path)


def tiny_vision_models():
    import transformers as t

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 64, "patch_size": 16}  # fmt: skip
    wide = small | {"intermediate_size": 64}
    return {
        "clip": (t.CLIPVisionModel, t.CLIPVisionConfig(**wide), 1),
        "siglip": (t.SiglipVisionModel, t.SiglipVisionConfig(**wide), 0),
        "dinov2": (t.Dinov2Model, t.Dinov2Config(**small, mlp_ratio=2), 1),
        "registers": (
            t.Dinov2WithRegistersModel, t.Dinov2WithRegistersConfig(**small, mlp_ratio=2), 5,
        ),
        "vit": (t.ViTModel, t.ViTConfig(**wide), 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "registers", "vit"])
@pytest.mark.parametrize("layers", [None, [-2], [1, 2]])
def test_transformers_towers_drop_prefix_tokens_and_no_patch(tmp_path, name, layers):
    cls, config, prefix = tiny_vision_models()[name]
    torch.manual_seed(0)
    model = cls(config).eval()
    encoder = TransformersEncoderConfig(save(tmp_path, model, 64), layers=layers).build()
    with torch.no_grad():
        outputs = model(pixels(), output_hidden_states=True)
    if layers is None:
        expected = outputs.last_hidden_state[:, prefix:]
    else:
        expected = torch.cat([outputs.hidden_states[i][:, prefix:] for i in layers], dim=-1)
    assert encoder.grid == (4, 4)
    torch.testing.assert_close(encoder(pixels()), expected)


def test_transformers_tower_at_another_resolution(tmp_path):
    cls, config, _ = tiny_vision_models()["dinov2"]
    encoder = TransformersEncoderConfig(save(tmp_path, cls(config), 64), image_size=96).build()
    assert encoder.grid == (6, 6) and encoder.preprocessing["size"] == (96, 96)


def test_open_clip_tower():
    encoder = OpenClipEncoderConfig("ViT-B-32", image_size=64).build()
    assert (encoder.grid, encoder.hidden_size) == ((2, 2), 768)
    assert encoder(pixels()).shape == (2, 4, 768)


def test_frozen_and_in_eval(encoder_dir):
    encoder = TimmEncoderConfig(encoder_dir, image_size=64).build()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(pixels().requires_grad_()).requires_grad


def test_identity_is_of_the_weights_not_of_their_type():
    layer = torch.nn.Linear(4, 4)
    same = weights_hash(layer)
    assert weights_hash(layer.bfloat16()) == same
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert weights_hash(layer) != same


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TimmEncoderConfig("efficientnet_light0"), "timm has no vision model.*Did you mean"),
        (OpenClipEncoderConfig("ViT-B-33"), "open_clip has no vision model.*Did you mean.*B-32"),
        (TimmEncoderConfig("starter:nope"), "starter"),
    ],
)
def test_unknown_names(config, message):
    with pytest.raises(ValueError, match=message):
        config.build()
