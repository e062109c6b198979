"""open_clip's visual towers: small ones of every kind, and true sizes on the meta device."""

import json

import pytest
import torch

from mmpeft.encoder import OpenClipEncoderConfig

from .test_encoder import pixels

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
TOWERS = {
    "vit": {"vision_cfg": VIT},
    "average": {"vision_cfg": VIT | {"pool_type": "avg"}},
    "coca": {
        "vision_cfg": VIT
        | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "multimodal_cfg": {"width": 32, "heads": 2, "layers": 1, "context_length": 8},
        "custom_text": True,
    },
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}},
    "timm vit": {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 64}},
    "timm cnn": {"vision_cfg": {"timm_model_name": "test_convnext", "image_size": 64}},
}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


@pytest.fixture
def tower(tmp_path):
    """Name of a tower of random weights on disk."""
    import open_clip
    from safetensors.torch import save_file

    def write(kind):
        config = {"embed_dim": 32, "text_cfg": TEXT, **TOWERS[kind]}
        document = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
        torch.manual_seed(0)
        name = f"local-dir:{tmp_path}"
        model = open_clip.create_model(name, load_weights=False)
        save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
        return name

    return write


def build(name, **options):
    size = {"image_size": 64}  # timm's own would be 160
    return OpenClipEncoderConfig(name, **size, **options).build()


def blocks_output(model, images):
    """What the last block of a VisionTransformer puts out, class token first."""
    seen = []
    hook = model.transformer.resblocks[-1].register_forward_hook(lambda *a: seen.append(a[-1]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["vit", "average", "coca"])
def test_vit_patches_and_class_token(tower, kind):
    name = tower(kind)
    encoder = build(name, tokens="all")
    expected = blocks_output(encoder.model, pixels())
    torch.testing.assert_close(encoder(pixels()), expected)
    assert (encoder.grid, encoder.num_prefix_tokens, encoder.stride) == ((4, 4), 1, (16, 16))
    assert not encoder.any_size  # its position table is of one size
    torch.testing.assert_close(build(name)(pixels()), expected[:, 1:])


def test_resnet_map(tower):
    encoder = build(tower("resnet"), tokens="all")
    model = encoder.model
    with torch.no_grad():
        states = model.stem(pixels(64, 96))
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            states = layer(states)
    torch.testing.assert_close(encoder(pixels(64, 96)), states.flatten(2).transpose(1, 2))
    assert (encoder.grid, encoder.stride, encoder.any_size) == ((2, 2), (32, 32), True)
    assert encoder.num_prefix_tokens == 0


@pytest.mark.parametrize(("kind", "prefix"), [("timm vit", 1), ("timm cnn", 0)])
def test_towers_of_timm(tower, kind, prefix):
    name = tower(kind)
    encoder = build(name, tokens="all")
    maps = encoder.model.trunk.forward_intermediates(
        pixels(), indices=[-1], intermediates_only=True
    )
    patches = maps[0].flatten(2).transpose(1, 2)
    assert encoder.num_prefix_tokens == prefix
    torch.testing.assert_close(encoder(pixels())[:, prefix:], patches)
    torch.testing.assert_close(build(name)(pixels()), patches)


@pytest.mark.parametrize("kind", TOWERS)
def test_pooled_is_the_embedding_compared_with_text(tower, kind):
    encoder = build(tower(kind), tokens="pooled")
    with torch.no_grad():
        expected = encoder.model(pixels())
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert encoder.grid == (1, 1) and encoder.hidden_size == 32
    torch.testing.assert_close(encoder(pixels()), expected[:, None])


def test_a_pooling_of_one_size(tower):
    encoder = build(tower("resnet"), tokens="pooled")
    with pytest.raises(ValueError, match="takes 64 x 64 pixels only, not 64 x 96"):
        encoder.grid_of(64, 96)


def test_preprocessing_is_of_the_checkpoint(tower):
    encoder = OpenClipEncoderConfig(tower("vit")).build()
    assert encoder.preprocessing == {
        "size": (64, 64), "mean": PREPROCESS["mean"], "std": PREPROCESS["std"], "resample": 2,
        "fit": "stretch",
    }  # fmt: skip


def test_a_size_that_would_lose_pixels(tower):
    name = tower("average")
    with pytest.raises(ValueError, match="100 x 100.*multiples of 16 x 16.*96 x 96 and 112"):
        OpenClipEncoderConfig(name, image_size=100).build(weights=False)


@pytest.mark.parametrize(
    ("name", "hidden_size", "prefix"),
    [
        ("ViT-B-16-SigLIP", 768, 0),
        ("EVA01-g-14", 1408, 1),
        ("ViT-H-14", 1280, 1),
        ("RN50", 2048, 0),
    ],
)
def test_true_sizes_on_meta(name, hidden_size, prefix):
    with torch.device("meta"):
        encoder = OpenClipEncoderConfig(name, tokens="all").build(weights=False)
    assert (encoder.hidden_size, encoder.num_prefix_tokens) == (hidden_size, prefix)
    assert next(encoder.parameters()).is_meta


def test_true_size_brings_the_preprocessing_of_the_weights():
    with torch.device("meta"):
        encoder = OpenClipEncoderConfig("ViT-B-16-SigLIP", pretrained="webli").build(weights=False)
    assert encoder.preprocessing["mean"] == [0.5] * 3


def test_weights_that_are_not_there(tower, tmp_path):
    name = tower("vit")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="local-dir:.* cannot be loaded by open_clip: Required"):
        OpenClipEncoderConfig(name).build()
    with pytest.raises(ValueError, match=r"ViT-B-32 \(pretrained nobody\) cannot be loaded by"):
        OpenClipEncoderConfig("ViT-B-32", pretrained="nobody").build()
