"""The Q-Former: upstream parity, instructions, where its weights come from, what trains."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from mmpeft.connectors.qformer import QFormerConnectorConfig

GRID = (2, 3)
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
TEXT = {"vocab_size": 30, "max_position_embeddings": 12}
TINY = {"num_query_tokens": 4, **SIZES, **TEXT}
PRETRAINED = {**TINY, "standardize": False}


def features(n=2):
    return torch.randn(n, 1 + 6, 12, generator=torch.Generator().manual_seed(0))


def instruction(*rows):
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[int(i < len(r)) for i in range(length)] for r in rows]),
    }


def build(initialize=True, llm_size=20, **options):
    torch.manual_seed(0)
    connector = QFormerConnectorConfig(**options).build(12, llm_size)
    if initialize:
        connector.initialize()
    return connector


def randomize(model, std=0.2):
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def full_model(model_class, config_class, qformer_class, folder, **options):
    qformer = qformer_class(
        **SIZES, **TEXT, encoder_hidden_size=12, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    vision = {
        "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    text = {
        "model_type": "opt", "vocab_size": 20, "hidden_size": 20, "ffn_dim": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 20,
        "max_position_embeddings": 16,
    }  # fmt: skip
    config = config_class(
        vision_config=vision, qformer_config=qformer.to_dict(), text_config=text, num_query_tokens=4
    )
    model = randomize(model_class(config))
    model.save_pretrained(folder, **options)
    return model


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    model = full_model(
        Blip2ForConditionalGeneration, Blip2Config, Blip2QFormerConfig, folder,
        max_shard_size="20KB",
    )  # fmt: skip
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model, str(folder)


@pytest.fixture(scope="module")
def instructblip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructblip")
    model = full_model(
        InstructBlipForConditionalGeneration, InstructBlipConfig, InstructBlipQFormerConfig, folder
    )
    return model, str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    model = randomize(BertModel(BertConfig(**{**SIZES, "num_hidden_layers": 4}, **TEXT)))
    model.save_pretrained(folder)
    return model, str(folder)


# ---------------------------------------------------------------------------------- parity


def test_plain_is_blip2s(blip2):
    model, folder = blip2
    connector = build(**PRETRAINED, pretrained=folder)
    connector.language_projection = model.language_projection
    queries = model.query_tokens.expand(2, -1, -1)
    out = model.qformer(query_embeds=queries, encoder_hidden_states=features())
    expected = model.language_projection(out.last_hidden_state)
    torch.testing.assert_close(connector(features(), GRID), expected)


@pytest.mark.parametrize("text", [None, instruction([3, 4, 5], [6, 7])])
def test_with_instruction_is_instructblips(instructblip, text):
    model, folder = instructblip
    connector = build(**PRETRAINED, pretrained=folder, instruction=True)
    connector.language_projection = model.language_projection
    queries = model.query_tokens.expand(2, -1, -1)
    seen = {"input_ids": None}
    if text:
        seen = {
            "input_ids": text["input_ids"],
            "attention_mask": torch.cat([torch.ones(2, 4).long(), text["attention_mask"]], 1),
        }
    out = model.qformer(query_embeds=queries, encoder_hidden_states=features(), **seen)
    expected = model.language_projection(out.last_hidden_state[:, :4])
    torch.testing.assert_close(connector(features(), GRID, text), expected)


def test_plain_from_an_instructblip(instructblip):
    model, folder = instructblip
    connector = build(**PRETRAINED, pretrained=folder)
    connector.language_projection = model.language_projection
    queries = model.query_tokens.expand(2, -1, -1)
    out = model.qformer(None, query_embeds=queries, encoder_hidden_states=features())
    expected = model.language_projection(out.last_hidden_state)
    torch.testing.assert_close(connector(features(), GRID), expected)


def test_true_size_with_instruction():
    # InstructBLIP on Vicuna 7B: 188.8M, of which the last layer's text block is never read
    with torch.device("meta"):
        config = QFormerConnectorConfig(instruction=True, tokenizer="-", vocab_size=30523)
        ours = sum(p.numel() for p in config.build(1408, 4096).parameters())
        upstream = InstructBlipQFormerModel(InstructBlipQFormerConfig(vocab_size=30523))
        last = upstream.encoder.layer[-1]
        unread = sum(p.numel() for m in (last.intermediate, last.output) for p in m.parameters())
        theirs = sum(p.numel() for p in upstream.parameters()) + 32 * 768 + 769 * 4096
    assert ours == theirs - unread
    h, i, layers, cross = 768, 3072, 12, 6
    ffn = 2 * h * i + i + 3 * h
    documented = 32 * h + 2 * h + layers * (4 * h * h + 6 * h + ffn) + (h + 1) * 4096
    documented += cross * (2 * h * h + 2 * 1408 * h + 6 * h)
    assert ours == documented + (30523 + 512) * h + (layers - 1) * ffn
    assert round(theirs / 1e6, 1) == 188.8


# ------------------------------------------------------------------------------ instruction


@pytest.fixture
def instructed():
    return randomize(build(**TINY, instruction=True, tokenizer="-"))


def test_the_instruction_changes_the_tokens_and_its_padding_does_not(instructed):
    a = instructed(features(), GRID, instruction([3, 4], [5, 6]))
    b = instructed(features(), GRID, instruction([3, 9], [5, 6]))
    assert not torch.allclose(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])
    padded = instruction([3, 4, 8, 8], [5, 6, 8, 8])
    padded["attention_mask"][:, 2:] = 0
    torch.testing.assert_close(instructed(features(), GRID, padded), a)


def test_no_word_of_an_instruction_is_no_instruction(instructed):
    empty = instruction([3, 4], [5, 6])
    empty["attention_mask"][:] = 0
    torch.testing.assert_close(instructed(features(), GRID, empty), instructed(features(), GRID))


def test_every_parameter_learns_from_an_instruction(instructed):
    instructed(features(), GRID, instruction([3, 4], [5, 6])).square().sum().backward()
    assert all(p.grad is not None for p in instructed.parameters())


def test_calibration_needs_no_instruction(instructed):
    instructed.calibrate(features(8), GRID, 0.14)
    assert instructed(features(8), GRID).std().item() == pytest.approx(0.14, rel=1e-3)


def test_instructions_must_fit(instructed):
    with pytest.raises(ValueError, match="13 tokens; the Q-Former takes 12"):
        instructed(features(1), GRID, instruction(list(range(13))))
    with pytest.raises(ValueError, match="1 instructions for 2 images"):
        instructed(features(2), GRID, instruction([1]))


def test_whose_tokenizer(tmp_path):
    from transformers import AutoTokenizer, BertTokenizerFast

    def named(**options):
        return build(initialize=False, **TINY, instruction=True, **options).instruction_tokenizer

    limit = {"model_max_length": build(**TINY).config.max_position_embeddings}
    key = "pretrained_model_name_or_path"
    assert named(tokenizer="a", text_encoder="b") == {key: "a", **limit}
    assert named(text_encoder="b") == {key: "b", **limit}
    arguments = named(pretrained=str(tmp_path), standardize=False)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "word"]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "qformer_tokenizer")
    assert AutoTokenizer.from_pretrained(**arguments)("word") == tokenizer("word")
    assert build(**TINY).instruction_tokenizer is None


# ------------------------------------------------------------------------- weights to start from


def test_starts_from_a_text_encoder(bert):
    model, folder = bert
    connector = build(**TINY, text_encoder=folder, instruction=True)
    theirs, ours = model.state_dict(), connector.qformer.state_dict()
    for kind in ("query.weight", "key.bias"):
        a = ours[f"encoder.layer.2.attention.attention.{kind}"]
        assert torch.equal(a, theirs[f"encoder.layer.2.attention.self.{kind}"])
    for kind in ("dense.weight", "LayerNorm.bias"):
        for suffix in ("", "_query"):
            a = ours[f"encoder.layer.1.output{suffix}.{kind}"]
            assert torch.equal(a, theirs[f"encoder.layer.1.output.{kind}"])
    for a, b in (("word_embeddings", "word_embeddings"), ("layernorm", "LayerNorm")):
        assert torch.equal(ours[f"embeddings.{a}.weight"], theirs[f"embeddings.{b}.weight"])
    fresh = build(**TINY, instruction=True, tokenizer="-").qformer.state_dict()
    same = {k for k in ours if torch.equal(ours[k], fresh[k])}
    assert same == {k for k in ours if "crossattention" in k}


def test_text_encoder_without_instruction_and_with_the_old_names(bert, tmp_path):
    _, folder = bert
    connector = build(**TINY, text_encoder=folder)
    state = load_file(f"{folder}/model.safetensors")
    old = {
        "bert." + k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in state.items()
    }
    save_file(old, tmp_path / "model.safetensors")
    shutil.copy(f"{folder}/config.json", tmp_path)
    again = build(**TINY, text_encoder=str(tmp_path))
    for (name, a), b in zip(
        connector.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("option", ["pretrained", "text_encoder"])
def test_a_trained_bridge_reloads_without_its_start(option, blip2, bert):
    options = {**PRETRAINED, option: (blip2 if option == "pretrained" else bert)[1]}
    first = build(**options)
    again = build(initialize=False, **{**options, option: "/gone"})
    again.load_state_dict(first.trained_state())
    torch.testing.assert_close(again(features(), GRID), first(features(), GRID))
    assert not again.frozen and all(p.requires_grad for p in again.parameters())


# ------------------------------------------------------------------------------ what trains


def train_a_step(connector):
    before = {k: v.clone() for k, v in connector.state_dict().items()}
    trained = [p for p in connector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):  # LoRA's A moves once B is not zero
        connector(features(), GRID).square().sum().backward()
        optimizer.step()
    return {k for k, v in connector.state_dict().items() if not torch.equal(v, before[k])}


PROJECTION = {"language_projection.weight", "language_projection.bias"}
BUFFERS = {"feature_mean", "feature_std", "output_scale"}


def test_frozen_trains_one_linear_layer(blip2):
    connector = build(**PRETRAINED, pretrained=blip2[1], freeze=True)
    assert train_a_step(connector.requires_grad_(True)) == PROJECTION
    assert connector.trained_state().keys() == PROJECTION | BUFFERS
    rest = connector.state_dict().keys() - PROJECTION - BUFFERS
    assert connector.frozen == rest and connector.frozen_source == blip2[1]


def test_frozen_weights_come_back_without_being_saved(blip2):
    options = {**PRETRAINED, "pretrained": blip2[1], "freeze": True}
    first, again = build(**options), build(initialize=False, **options)
    again.load_state_dict(first.trained_state(), strict=False)
    torch.testing.assert_close(again(features(), GRID), first(features(), GRID))


def test_lora_trains_lora_and_the_linear_layer(blip2):
    options = {**PRETRAINED, "pretrained": blip2[1], "lora_r": 2}
    connector = build(**options)
    plain = build(**PRETRAINED, pretrained=blip2[1])
    plain.load_state_dict({k: v for k, v in connector.state_dict().items() if k in PROJECTION},
                          strict=False)  # fmt: skip
    torch.testing.assert_close(connector(features(), GRID), plain(features(), GRID))
    lora = {k for k in connector.state_dict() if "lora_" in k}
    assert len(lora) == 2 * 2 * (3 + 2)  # A, B; query, value; 3 self- and 2 cross-attentions
    assert train_a_step(connector) == lora | PROJECTION
    assert connector.trained_state().keys() == lora | PROJECTION | BUFFERS
    count = sum(p.numel() for n, p in connector.named_parameters() if n in lora)
    assert count == 2 * (4 * 3 * 16 + 2 * (3 * 16 + 12))
    again = build(initialize=False, **options)
    again.load_state_dict(connector.trained_state(), strict=False)
    torch.testing.assert_close(again(features(), GRID), connector(features(), GRID))


@pytest.mark.parametrize("options", [{"freeze": True}, {"lora_r": 2}, {}, {"instruction": True}])
def test_on_meta_nothing_is_read(options):
    with torch.device("meta"):
        connector = build(**PRETRAINED, pretrained="/gone", **options)
    assert all(p.is_meta for p in connector.parameters())
    trained = sum(p.numel() for p in connector.parameters() if p.requires_grad)
    if "freeze" in options:
        assert trained == 17 * 20


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": True}, "freeze.*set pretrained"),
        ({"lora_r": 4}, "lora_r.*set pretrained"),
        ({"pretrained": "x"}, "set standardize: false"),
        ({"pretrained": "x", "text_encoder": "y", "standardize": False}, "not both"),
        ({"instruction": True}, "instruction needs a tokenizer"),
        ({"num_attention_heads": 5}, "5 does not divide hidden_size 768"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; at least 1"),
        ({"num_query_tokens": 0}, "num_query_tokens is 0; at least 1"),
        ({"cross_attention_frequency": 0}, "cross_attention_frequency is 0; at least 1"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(ValueError, match=message):
        QFormerConnectorConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers 3, not 4; set num_hidden_layers: 3"),
        ({"num_query_tokens": 5}, "num_query_tokens 4, not 5; set num_query_tokens: 4"),
        ({"cross_attention_frequency": 1}, "set cross_attention_frequency: 2"),
        ({"instruction": True}, "word_embeddings.*instruction needs an InstructBLIP model"),
        ({"instruction": True, "vocab_size": 31}, "vocab_size 30, not 31; set vocab_size: 30"),
        ({"freeze": True, "pretrained": "/gone"}, "'/gone' is no local model directory"),
        ({"pretrained": None, "text_encoder": "/gone"}, "text_encoder '/gone' is no local"),
        ({"pretrained": None, "text_encoder": "blip2"}, "is a blip-2 model; it must be bert"),
    ],
)
def test_sources_that_do_not_fit(options, message, blip2):
    options = {**PRETRAINED, "pretrained": blip2[1], **options}
    options = {k: blip2[1] if v == "blip2" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_an_encoder_of_another_width(blip2):
    with pytest.raises(ValueError, match="reads 12 channels, the vision encoder gives 16"):
        QFormerConnectorConfig(**PRETRAINED, pretrained=blip2[1]).build(16, 20).initialize()


def test_a_bert_with_too_few_layers(bert):
    with pytest.raises(ValueError, match="has 4 layers, fewer than num_hidden_layers 5"):
        build(**{**TINY, "num_hidden_layers": 5}, text_encoder=bert[1])


def test_a_missing_shard_matters_if_it_holds_the_qformer(blip2, tmp_path):
    folder = shutil.copytree(blip2[1], tmp_path / "copy")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in index.items() if name.startswith(("qformer", "query"))}
    for shard in set(index.values()) - needed:
        (folder / shard).unlink()
    build(**PRETRAINED, pretrained=str(folder))
    shard = index["query_tokens"]
    (folder / shard).rename(folder / "away")
    with pytest.raises(ValueError, match=f"misses {shard}; only safetensors"):
        build(**PRETRAINED, pretrained=str(folder))
    state = load_file(folder / "away")
    del state["query_tokens"]
    save_file(state, folder / shard)
    with pytest.raises(ValueError, match="misses query_tokens, which its index"):
        build(**PRETRAINED, pretrained=str(folder))


def test_damaged_files_are_named(bert, tmp_path):
    folder = shutil.copytree(bert[1], tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="text_encoder: .*model.safetensors is damaged.*fetch"):
        build(**TINY, text_encoder=str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="text_encoder: .*index.json is no index of shards"):
        build(**TINY, text_encoder=str(folder))


def test_a_missing_weight_and_one_of_another_shape(bert, tmp_path):
    folder = shutil.copytree(bert[1], tmp_path / "copy")
    name = "encoder.layer.1.output.dense.bias"
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"has no weight {name}"):
        build(**TINY, text_encoder=str(folder))
    save_file({**state, name: torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} of .* has shape .3,., not .16,."):
        build(**TINY, text_encoder=str(folder))
