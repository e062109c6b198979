"""transformers' vision models and the vision halves of its composites, against upstream."""

import json

import pytest
import torch
import transformers as t

from mmpeft.encoder import TransformersEncoderConfig, weights_hash

from .test_encoder import pixels

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
       "patch_size": 16, "intermediate_size": 64}  # fmt: skip
DINO = {key: VIT[key] for key in VIT if key != "intermediate_size"} | {"mlp_ratio": 2}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1],
        "num_heads": [1, 2, 2], "window_size": 4}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
TOWERS = {  # name -> (class, config, prefix tokens)
    "clip": (t.CLIPVisionModel, t.CLIPVisionConfig(**VIT), 1),
    "siglip": (t.SiglipVisionModel, t.SiglipVisionConfig(**VIT), 0),
    "dinov2": (t.Dinov2Model, t.Dinov2Config(**DINO), 1),
    "registers": (t.Dinov2WithRegistersModel, t.Dinov2WithRegistersConfig(**DINO), 5),
    "dinov3": (t.DINOv3ViTModel, t.DINOv3ViTConfig(**VIT, num_register_tokens=4), 5),
    "vit": (t.ViTModel, t.ViTConfig(**VIT), 1),
    "deit": (t.DeiTModel, t.DeiTConfig(**VIT), 2),
    "beit": (t.BeitModel, t.BeitConfig(**VIT), 1),
}
MAPS = {  # their states are maps, or sequences whose grid the model tells
    "convnext": (t.ConvNextModel, t.ConvNextConfig(**STAGES)),
    "resnet": (t.ResNetModel, t.ResNetConfig(**STAGES, embedding_size=8)),
    "swin": (t.SwinModel, t.SwinConfig(**SWIN)),
    "swinv2": (t.Swinv2Model, t.Swinv2Config(**SWIN)),
    "dinov3_convnext": (t.DINOv3ConvNextModel, t.DINOv3ConvNextConfig(**STAGES)),
}
COMPOSITES = {
    "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VIT)),
    "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=VIT)),
    "blip2": lambda: t.Blip2ForConditionalGeneration(
        t.Blip2Config(
            vision_config=VIT, qformer_config=TEXT | {"encoder_hidden_size": 32},
            text_config={"model_type": "llama"} | TEXT, num_query_tokens=4,
        )
    ),
    "instructblip": lambda: t.InstructBlipForConditionalGeneration(
        t.InstructBlipConfig(
            vision_config=VIT, qformer_config=TEXT | {"encoder_hidden_size": 32},
            text_config={"model_type": "llama"} | TEXT, num_query_tokens=4,
        )
    ),
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VIT), text_config=t.LlamaConfig(**TEXT),
        )
    ),
    "paligemma": lambda: t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(
            vision_config=t.SiglipVisionConfig(**VIT, vision_use_head=False),
            text_config=t.GemmaConfig(**TEXT, head_dim=16, num_key_value_heads=2),
        )
    ),
}  # fmt: skip


@pytest.fixture
def save(tmp_path):
    def write(model, size=64, **options):
        model.save_pretrained(tmp_path, **options)
        t.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def random(cls, config=None):
    """A model whose outputs are far from each other: every parameter is drawn anew."""
    torch.manual_seed(0)
    model = (cls() if config is None else cls(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layers", [None, [-2], [1, 2]])
def test_towers_drop_prefix_tokens_and_no_patch(save, name, layers):
    cls, config, prefix = TOWERS[name]
    model = random(cls, config)
    folder = save(model)
    with torch.no_grad():
        outputs = model(pixels(), output_hidden_states=True)
    states = [outputs.hidden_states[i] for i in layers or ()] or [outputs.last_hidden_state]
    expected = torch.cat(states, dim=-1)
    every = TransformersEncoderConfig(folder, layers=layers, tokens="all").build()
    torch.testing.assert_close(every(pixels()), expected)
    patches = TransformersEncoderConfig(folder, layers=layers).build()
    torch.testing.assert_close(patches(pixels()), expected[:, prefix:])
    assert (every.num_prefix_tokens, patches.num_prefix_tokens) == (prefix, 0)
    assert every.grid == patches.grid == (4, 4) and every.stride == (16, 16)


@pytest.mark.parametrize("name", TOWERS)
def test_towers_take_oblong_images(save, name):
    cls, config, _ = TOWERS[name]
    model = random(cls, config)
    encoder = TransformersEncoderConfig(save(model), tokens="all").build()
    options = {"interpolate_pos_encoding": True} if encoder.resizes else {}
    with torch.no_grad():
        expected = model(pixels(64, 96), **options).last_hidden_state
    assert encoder.any_size and encoder.grid_of(64, 96) == (4, 6)
    torch.testing.assert_close(encoder(pixels(64, 96)), expected)
    with pytest.raises(ValueError, match="64 x 90.*multiples of 16 x 16.*64 x 80 and 64 x 96"):
        encoder(pixels(64, 90))


@pytest.mark.parametrize("name", MAPS)
def test_maps_become_patches(save, name):
    cls, config = MAPS[name]
    model = random(cls, config)
    folder = save(model)
    encoder = TransformersEncoderConfig(folder, tokens="all").build()
    with torch.no_grad():
        outputs = model(pixels(), output_hidden_states=True)
    expected = outputs.last_hidden_state
    if expected.dim() == 4:
        expected = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(pixels()), expected)
    prefix = 1 if name == "dinov3_convnext" else 0
    assert encoder.num_prefix_tokens == prefix
    assert encoder.grid[0] * encoder.grid[1] == expected.shape[1] - prefix
    shaped = getattr(outputs, "reshaped_hidden_states", outputs.hidden_states)
    two = TransformersEncoderConfig(folder, layers=[-2, -1]).build()
    last = shaped[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(two(pixels())[..., -last.shape[-1] :], last)
    # trying sizes has left the model as it was: Swin shrinks its windows for good
    torch.testing.assert_close(encoder(pixels()), expected)
    assert encoder.any_size == (name != "swin")


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("sharded", [False, True])
def test_vision_half_of_a_composite(save, name, sharded):
    model = random(COMPOSITES[name])
    whole = model.model if hasattr(model, "model") else model
    half = getattr(whole, "vision_tower", None) or whole.vision_model
    folder = save(model, **({"max_shard_size": "20KB"} if sharded else {}))
    encoder = TransformersEncoderConfig(folder, tokens="all").build()
    assert type(encoder.model) is type(half)
    with torch.no_grad():
        expected = half(pixels()).last_hidden_state
    torch.testing.assert_close(encoder(pixels()), expected)
    assert weights_hash(encoder.model.state_dict()) == weights_hash(half.state_dict())


def test_blip2_normalises_its_last_state_and_clip_does_not(save):
    blip = random(COMPOSITES["blip2"])
    encoder = TransformersEncoderConfig(save(blip), tokens="all").build()
    raw = TransformersEncoderConfig(encoder.config.name, tokens="all", layers=[-1]).build()
    torch.testing.assert_close(encoder.model.post_layernorm(raw(pixels())), encoder(pixels()))
    clip = random(COMPOSITES["clip"])
    encoder = TransformersEncoderConfig(save(clip), tokens="all").build()
    raw = TransformersEncoderConfig(encoder.config.name, tokens="all", layers=[-1]).build()
    torch.testing.assert_close(raw(pixels()), encoder(pixels()))


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "vit"])
def test_pooled(save, name):
    cls, config, _ = TOWERS[name]
    model = random(cls, config)
    encoder = TransformersEncoderConfig(save(model), tokens="pooled").build()
    with torch.no_grad():
        expected = model(pixels()).pooler_output
    torch.testing.assert_close(encoder(pixels()), expected[:, None])
    assert encoder.grid == (1, 1)


def test_a_pooler_without_weights_is_left_out(save):
    folder = save(t.ViTForImageClassification(TOWERS["vit"][1]))  # has no pooler
    hashes = {
        weights_hash(TransformersEncoderConfig(folder).build().state_dict()) for _ in range(2)
    }
    assert len(hashes) == 1
    with pytest.raises(ValueError, match="ViTModel has no pooled embedding"):
        TransformersEncoderConfig(folder, tokens="pooled").build()


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_another_default_size(save, name):
    cls, config, _ = TOWERS[name]
    folder = save(cls(config))
    encoder = TransformersEncoderConfig(folder, image_size=96).build()
    assert encoder.grid == (6, 6) and encoder.preprocessing["size"] == (96, 96)
    with pytest.raises(ValueError, match="100 x 100.*multiples of 16 x 16.*96 x 96 and 112 x 112"):
        TransformersEncoderConfig(folder, image_size=100).build()


def test_size_is_what_the_image_processor_hands_over(tmp_path):
    cls, config, _ = TOWERS["dinov2"]
    cls(config).save_pretrained(tmp_path)
    processor = t.CLIPImageProcessor(
        size={"shortest_edge": 80}, crop_size={"height": 48, "width": 48}, image_mean=[0.1] * 3
    )
    processor.save_pretrained(tmp_path)
    encoder = TransformersEncoderConfig(str(tmp_path), fit="crop").build()
    assert encoder.preprocessing == {
        "size": (48, 48), "mean": [0.1] * 3, "std": list(processor.image_std), "resample": 3,
        "fit": "crop",
    }  # fmt: skip


@pytest.mark.parametrize("name", [*TOWERS, *MAPS])
def test_meta_tells_the_same(save, name):
    cls, config, *_ = (TOWERS | MAPS)[name]
    folder = save(cls(config))
    real = TransformersEncoderConfig(folder, tokens="all").build()
    with torch.device("meta"):
        meta = TransformersEncoderConfig(folder, tokens="all").build(weights=False)
    assert next(meta.parameters()).is_meta
    for attribute in ("hidden_size", "grid", "num_prefix_tokens", "stride", "any_size"):
        assert getattr(meta, attribute) == getattr(real, attribute), attribute
    assert meta.preprocessing == real.preprocessing


def test_meta_of_a_composite_needs_no_weights(save, tmp_path):
    folder = save(COMPOSITES["llava"]())
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        encoder = TransformersEncoderConfig(folder, layers=[-2]).build(weights=False)
    assert (encoder.grid, encoder.hidden_size) == ((4, 4), 32)


def test_a_missing_shard(save, tmp_path):
    folder = save(COMPOSITES["clip"](), max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = next(f for key, f in index["weight_map"].items() if key.startswith("vision_model"))
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=f"cannot be loaded by transformers: .*{shard}"):
        TransformersEncoderConfig(folder).build()


def test_missing_weights(save, tmp_path):
    from safetensors.torch import load_file, save_file

    cls, config, _ = TOWERS["clip"]
    folder = save(cls(config))
    state = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in state if "mlp.fc1.weight" in key)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its weights miss encoder.layers.0.mlp.fc1.weight"):
        TransformersEncoderConfig(folder).build()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: t.LlamaModel(t.LlamaConfig(**TEXT)), "is a LlamaModel, which is no vision model"),
        (
            lambda: t.Siglip2VisionModel(t.Siglip2VisionConfig(**TEXT, num_patches=16)),
            r"takes flattened patches.*\(spatial_shapes\).*choose a variant of fixed resolution",
        ),
        (
            lambda: t.ViTMAEModel(t.ViTMAEConfig(**VIT)),
            "is a ViTMAEModel, which shuffles its patches anew at each call",
        ),
    ],
)
def test_what_cannot_be_served(save, model, message):
    with pytest.raises(ValueError, match=message):
        TransformersEncoderConfig(save(model())).build()


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (lambda: t.SamVisionModel(t.SamVisionConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64,
            patch_size=16, output_channels=24, global_attn_indexes=[1], window_size=2,
        )), [-2]),
    ],
)  # fmt: skip
def test_states_whose_channels_come_last_are_no_maps(save, model, layers):
    with pytest.raises(ValueError, match="these are no rows and columns|cannot encode"):
        TransformersEncoderConfig(save(model()), layers=layers).build()


@pytest.mark.parametrize(
    "step", [{"do_flip_channel_order": True}, {"include_top": True}, {"rescale_factor": 1 / 127.5}]
)
def test_pixels_prepared_otherwise_are_refused(save, tmp_path, step):
    cls, config, _ = TOWERS["clip"]
    folder = save(cls(config))
    written = tmp_path / "preprocessor_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | step))
    kinds = {"do_flip_channel_order": "MobileViTImageProcessor",
             "include_top": "EfficientNetImageProcessor"}  # fmt: skip
    for key, kind in kinds.items():
        if key in step:
            getattr(t, kind)(size={"height": 64, "width": 64}).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"wants its pixels prepared with {next(iter(step))}"):
        TransformersEncoderConfig(folder).build()


def test_no_such_model():
    with pytest.raises(ValueError, match="/no/such/folder cannot be loaded by transformers"):
        TransformersEncoderConfig("/no/such/folder").build()


def test_starter_vit(starter_path):
    folder = starter_path("vit-small-saliency")
    encoder = TransformersEncoderConfig(folder, image_size=56, tokens="all").build()
    assert (encoder.grid, encoder.num_prefix_tokens, encoder.any_size) == ((4, 4), 1, True)
    assert TransformersEncoderConfig(folder).build().preprocessing["size"] == (224, 224)
    assert encoder(pixels(56, 84)).shape == (2, 1 + 24, 384)
