"""Any encoder with any connector: forward, backward, generation and checkpoint."""

import json

import pytest
import torch
import transformers as t

import mmpeft
from mmpeft import BridgeForConditionalGeneration, BridgeProcessor, adapters
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
from mmpeft.encoder import OpenClipEncoderConfig, TimmEncoderConfig, TransformersEncoderConfig

from .conftest import assistant, model_inputs, user
from .test_encoder_open_clip import PREPROCESS, TEXT, TOWERS
from .test_encoder_transformers import DINO, VIT

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64}  # fmt: skip
CONNECTORS = {
    "linear": LinearConnectorConfig(),
    "mlp": MLPConnectorConfig(),
    "pixel_shuffle": PixelShuffleConnectorConfig(),
    "pool": PoolConnectorConfig(),
    "identity": IdentityConnectorConfig(),
    "c_abstractor": CAbstractorConnectorConfig(side=2, depth=1, hidden_size=16, position_grid=4),
    "resampler": ResamplerConnectorConfig(3, depth=1, num_attention_heads=2, head_dim=8,
                                          num_key_value_heads=1),
    "abstractor": AbstractorConnectorConfig(3, 1, 2, intermediate_size=32),
    "qformer": QFormerConnectorConfig(num_query_tokens=3, **BERT),
    "instruct_qformer": QFormerConnectorConfig(
        num_query_tokens=3, **BERT, instruction=True, vocab_size=300, tokenizer="filled in"
    ),
}  # fmt: skip
ENCODERS = ("timm vit", "timm cnn", "open_clip", "clip", "siglip", "dinov2")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, encoder_dir):
    """Configs of tiny random encoders on disk."""
    import open_clip
    from safetensors.torch import save_file

    def folder(name):
        return tmp_path_factory.mktemp(name)

    torch.manual_seed(0)
    found = {"timm vit": TimmEncoderConfig(encoder_dir, image_size=64)}

    import timm

    cnn = folder("cnn")
    timm.models.save_for_hf(
        timm.create_model("test_efficientnet", num_classes=0), cnn, safe_serialization=True
    )
    # as large as the others' maps: 4 x 4
    found["timm cnn"] = TimmEncoderConfig(str(cnn), image_size=64, layers=[3])

    clip = folder("open_clip")
    config = {"embed_dim": 32, "text_cfg": TEXT, **TOWERS["vit"]}
    document = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (clip / "open_clip_config.json").write_text(json.dumps(document))
    model = open_clip.create_model(f"local-dir:{clip}", load_weights=False)
    save_file(model.state_dict(), clip / "open_clip_model.safetensors")
    found["open_clip"] = OpenClipEncoderConfig(f"local-dir:{clip}", image_size=64)

    for name, cls, config in (
        ("clip", t.CLIPVisionModel, t.CLIPVisionConfig(**VIT)),
        ("siglip", t.SiglipVisionModel, t.SiglipVisionConfig(**VIT)),
        ("dinov2", t.Dinov2Model, t.Dinov2Config(**DINO)),
    ):
        where = folder(name)
        cls(config).save_pretrained(where)
        t.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(where)
        found[name] = TransformersEncoderConfig(str(where))
    return found


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_pair(encoder, connector, encoders, llm_dir, images, tmp_path):
    from peft import LoraConfig

    config: ConnectorConfig = CONNECTORS[connector]
    if connector == "instruct_qformer":
        config.tokenizer = llm_dir
    torch.manual_seed(1)

    def build():
        return BridgeForConditionalGeneration.from_parts(
            encoders[encoder], config, llm_dir, gate="sample",
            adapter=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )  # fmt: skip

    if connector == "identity" and encoder in ("timm vit", "timm cnn", "open_clip"):
        with pytest.raises(ValueError, match=r"dimensions cannot meet.*32.*Linear"):
            build()
        return
    model = build()
    processor = BridgeProcessor.from_model(model)
    prompts = [[user(images[0], "what is it?")], [user("text alone")]]
    batch = model_inputs(processor, prompts)
    count = int(batch["mm_token_type_ids"].sum())
    assert count == model.layout.resolutions[0].tokens

    adapters.set_trainable(model, connector=True, adapter=True)
    model.train()
    chats = [[*prompt, assistant("yes")] for prompt in prompts]
    learn = model_inputs(processor, chats, add_generation_prompt=False)
    model(**learn, labels=learn["input_ids"]).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    allowed = {n for n, _ in model.named_parameters() if n.startswith("connector") or "lora_" in n}
    assert moved == allowed

    model.eval()
    new = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert new.shape[0] == 2
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = mmpeft.load(tmp_path)
    assert torch.equal(loaded(**model_inputs(again, prompts)).logits, model(**batch).logits)
