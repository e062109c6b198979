"""Vision encoders: the contract, and timm. Patches only, right order, frozen, one identity."""

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


def pixels(height=64, width=None):
    shape = (2, 3, height, width or height)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def timm_encoder(name, **options):
    torch.manual_seed(0)
    return TimmEncoderConfig(name, pretrained=False, **options).build()


def test_timm_vit_patches_without_the_class_token(encoder_dir):
    encoder = TimmEncoderConfig(encoder_dir, image_size=64).build()
    assert (encoder.grid, encoder.hidden_size) == ((4, 4), 64)
    states = encoder.model.forward_features(pixels())  # (2, 1 + 16, 64), normalised
    torch.testing.assert_close(encoder(pixels()), states[:, 1:])


TIMM = {  # name -> prefix tokens
    "test_vit": 1,
    "test_vit2": 1,
    "test_vit3": 1,
    "test_efficientnet": 0,
    "test_convnext": 0,
    "test_resnet": 0,
}


@pytest.mark.parametrize(("name", "prefix"), TIMM.items())
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_timm_families_give_upstream_features(name, prefix, size):
    encoder = timm_encoder(name, image_size=64, tokens="all")
    features = encoder(pixels(*size))
    with torch.no_grad():
        if name == "test_efficientnet":  # its maps are those before the convolution of the head
            model = encoder.model
            upstream = model.blocks(model.bn1(model.conv_stem(pixels(*size))))
        else:
            upstream = encoder.model.forward_features(pixels(*size))
    if upstream.dim() == 4:
        upstream = upstream.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, upstream)
    h, w = encoder.grid_of(*size)
    assert features.shape == (2, prefix + h * w, encoder.hidden_size)
    assert encoder.num_prefix_tokens == prefix and encoder.any_size
    patches = timm_encoder(name, image_size=64)
    torch.testing.assert_close(patches(pixels(*size)), features[:, prefix:])
    assert patches.num_prefix_tokens == 0


def test_timm_registers_are_no_patches(tmp_path):
    import timm

    torch.manual_seed(0)
    options = {"img_size": 64, "reg_tokens": 4}
    model = timm.create_model("test_vit", num_classes=0, **options)
    timm.models.save_for_hf(model, tmp_path, model_args=options, safe_serialization=True)
    config = TimmEncoderConfig(str(tmp_path), image_size=64, tokens="all")
    with torch.no_grad():
        upstream = model.eval().forward_features(pixels())
    assert config.build().num_prefix_tokens == 5
    torch.testing.assert_close(config.build()(pixels()), upstream)
    patches = TimmEncoderConfig(str(tmp_path), image_size=64).build()
    torch.testing.assert_close(patches(pixels()), upstream[:, 5:])


@pytest.mark.parametrize(
    ("name", "size", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", 56, 5),
        ("vit_small_patch16_dinov3", 64, 5),
        ("deit_tiny_distilled_patch16_224", 64, 2),
        ("eva02_tiny_patch14_224", 56, 1),
        ("vit_base_patch16_siglip_224", 64, 0),
        ("eva_giant_patch14_clip_224", 56, 1),
    ],
)
def test_timm_prefix_tokens_at_true_size_on_meta(name, size, prefix):
    with torch.device("meta"):
        encoder = TimmEncoderConfig(name, image_size=size, tokens="all").build(weights=False)
        features = encoder(torch.zeros(2, 3, size, size))
    assert encoder.num_prefix_tokens == prefix and encoder.any_size
    assert features.shape == (2, prefix + 16, encoder.hidden_size) and features.is_meta


def test_timm_swin_and_one_that_takes_one_size_only():
    with torch.device("meta"):
        swin = TimmEncoderConfig("swin_tiny_patch4_window7_224").build(weights=False)
        maxvit = TimmEncoderConfig("maxvit_tiny_tf_224").build(weights=False)
        hiera = TimmEncoderConfig("hiera_tiny_224").build(weights=False)
    assert (swin.grid, swin.hidden_size, swin.stride) == ((7, 7), 768, (32, 32))
    assert hiera.hidden_size == 768
    assert not maxvit.any_size
    with pytest.raises(ValueError, match="maxvit_tiny_tf_224 takes 224 x 224 pixels only, not 64"):
        maxvit.grid_of(64, 224)
    with pytest.raises(ValueError, match="224 x 224 pixels only"):
        maxvit(pixels())


def test_pooled_is_one_token():
    encoder = timm_encoder("test_vit", image_size=64, tokens="pooled")
    assert (encoder.grid, encoder.num_prefix_tokens) == ((1, 1), 0)
    assert encoder.grid_of(96, 64) == (1, 1)
    torch.testing.assert_close(encoder(pixels())[:, 0], encoder.model(pixels()))


def test_layers_join_their_prefix_tokens():
    encoder = timm_encoder("test_vit", image_size=64, layers=[-2, -1], tokens="all")
    one = [timm_encoder("test_vit", image_size=64, layers=[i], tokens="all") for i in (-2, -1)]
    torch.testing.assert_close(encoder(pixels()), torch.cat([e(pixels()) for e in one], dim=-1))
    assert encoder.num_prefix_tokens == 1


def test_prefix_tokens_of_different_grids_are_refused():
    encoder = timm_encoder("test_vit", image_size=64, tokens="all", layers=[-2, -1])
    maps, prefixes = encoder.feature_maps(pixels())
    encoder.feature_maps = lambda _: ([maps[0], F.avg_pool2d(maps[1], 2)], prefixes)
    with pytest.raises(ValueError, match=r"layers \[-2, -1\] have different grids.*tokens: patch"):
        encoder(pixels())


def test_fusing_folds_the_finer_map_and_loses_nothing():
    fine, coarse = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 2, 2)
    fused = fuse_on_coarsest_grid([fine, coarse])
    assert fused.shape == (1, 3 * 4 + 5, 2, 2)
    assert torch.equal(F.pixel_shuffle(fused[:, :12], 2), fine)
    assert torch.equal(fused[:, 12:], coarse)
    with pytest.raises(ValueError, match="do not nest; choose an image_size"):
        fuse_on_coarsest_grid([torch.zeros(1, 1, 5, 5), coarse])


def test_layers_of_a_cnn_are_joined():
    encoder = timm_encoder("test_efficientnet", image_size=64, layers=[2, 3])
    (fine, coarse), prefixes = encoder.feature_maps(pixels())
    k = fine.shape[2] // coarse.shape[2]
    assert k > 1 and encoder.hidden_size == fine.shape[1] * k * k + coarse.shape[1]
    assert prefixes == []
    assert encoder.stride == (64 // coarse.shape[2],) * 2


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_preprocessing_is_the_models_own(fit):
    encoder = timm_encoder("test_vit", fit=fit)
    own = encoder.model.pretrained_cfg
    assert encoder.preprocessing == {
        "size": own["input_size"][1:], "mean": list(own["mean"]), "std": list(own["std"]),
        "resample": 3, "fit": fit,
    }  # fmt: skip


def test_a_size_it_refuses_is_one_line_with_the_nearest():
    near = "takes no image of {} pixels: sides must be multiples of 16 x 16, the nearest are {}"
    with pytest.raises(ValueError, match=near.format("100 x 100", "96 x 96 and 112 x 112")):
        timm_encoder("test_vit", image_size=100)
    encoder = timm_encoder("test_vit", image_size=64)
    with pytest.raises(ValueError, match=near.format("64 x 40", "64 x 32 and 64 x 48")):
        encoder.grid_of(64, 40)
    with pytest.raises(ValueError, match=near.format("64 x 7", "64 x 16")):
        encoder(pixels(64, 7))


def test_an_odd_default_size_is_served_where_the_model_pads():
    encoder = timm_encoder("test_efficientnet", image_size=80)
    assert (encoder.grid, encoder.stride) == ((3, 3), (32, 32))
    assert encoder.grid_of(80, 80) == (3, 3) and encoder(pixels(80)).shape[1] == 9


def test_a_layer_that_is_not_there():
    message = r"test_vit cannot encode 64 x 64 pixels with layers \[99\]"
    with pytest.raises(ValueError, match=message):
        timm_encoder("test_vit", image_size=64, layers=[99])


def test_no_layer_at_all_is_refused():
    for config in (TimmEncoderConfig, OpenClipEncoderConfig, TransformersEncoderConfig):
        with pytest.raises(ValueError, match=r"layers: \[\] names none; name some"):
            config(name="any", layers=[])


def test_frozen_and_in_eval(encoder_dir):
    encoder = TimmEncoderConfig(encoder_dir, image_size=64, dtype="bfloat16").build()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(pixels().requires_grad_()).requires_grad
    assert encoder(pixels()).dtype == torch.bfloat16


def test_identity_is_of_the_weights_not_of_their_type(encoder_dir):
    layer = torch.nn.Linear(4, 4)
    same = weights_hash(layer.state_dict())
    assert weights_hash(layer.bfloat16().state_dict()) == same
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert weights_hash(layer.state_dict()) != same
    configs = [
        TimmEncoderConfig(encoder_dir, image_size=64),
        TimmEncoderConfig(encoder_dir, image_size=64, tokens="all", fit="pad", dtype="bfloat16"),
    ]
    assert len({weights_hash(config.build().state_dict()) for config in configs}) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TimmEncoderConfig("efficientnet_light0"), "timm has no vision model.*Did you mean"),
        (OpenClipEncoderConfig("ViT-B-33"), "open_clip has no vision model.*Did you mean.*B-32"),
        (TimmEncoderConfig("starter:nope"), "starter"),
        (TimmEncoderConfig("/no/such/folder"), "/no/such/folder cannot be loaded by timm"),
    ],
)
def test_unknown_names(config, message):
    with pytest.raises(ValueError, match=message):
        config.build()


def test_old_specs_still_name_the_class():
    from mmpeft.encoder import VisionEncoderConfig
    from mmpeft.spec import from_spec, to_spec

    spec = {"class_path": "mmpeft.encoder.TimmEncoderConfig", "init_args": {"name": "test_vit"}}
    config = from_spec(spec, VisionEncoderConfig)
    assert config == TimmEncoderConfig("test_vit")
    assert from_spec(to_spec(config), VisionEncoderConfig) == config


def test_starter_cnn(starter_path):
    encoder = TimmEncoderConfig(starter_path("efficientnet-lite0"), layers=[3, 4]).build()
    assert (encoder.grid, encoder.hidden_size, encoder.any_size) == ((7, 7), 112 * 4 + 320, True)
    assert encoder(pixels(64, 96)).shape == (2, 6, encoder.hidden_size)
