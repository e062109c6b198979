"""Imports of published checkpoints: equal to upstream's own model, and bridges like any other."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmpeft
from mmpeft import BridgeForConditionalGeneration, BridgeProcessor, adapters, vlm

from .conftest import assistant, model_inputs, user

GREEDY = {"max_new_tokens": 6, "do_sample": False}
IMAGE_SIZE = 56  # 4 x 4 patches
WORDS = ["what", "is", "this", "the", "image", "compare", "yes", "no", "USER:", "ASSISTANT:"]
# as llava-hf writes it: images first, a newline after each
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# ------------------------------------------------------------- tiny random upstream checkpoints


def sentencepiece_like():
    """As Llama's tokenizer: the first word of a text gets a space, BOS is added in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(map(chr, range(33, 127))) | {"▁", "\n"})
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*special, *letters]))}
    merges = []
    for word in WORDS:
        piece = "▁"
        for letter in word:
            if (pair := (piece, letter)) not in merges:
                merges.append(pair)
                vocabulary.setdefault(piece + letter, len(vocabulary))
            piece += letter
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip


def byte_level(bos, eos, pad, suffix=None, image=True):
    """As OPT's tokenizer (BOS in front), or as BERT's (the text between two tokens)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys([pad, bos, eos, *(["<image>"] if image else [])]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        f"{bos} $A {suffix or ''}".strip(),
        special_tokens=[(t, special.index(t)) for t in {bos, suffix or bos}],
    )
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad
    )


def llama(vocabulary):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def randomise(model):
    """Weights at which everything matters; upstream's own are too small for the image to show."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if is_norm else 0.2 * noise
    return model.eval()


def tiny_llava(folder, shard="5GB", **options):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = sentencepiece_like()
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=14,
    )  # fmt: skip
    options = {"vision_feature_select_strategy": "default"} | options
    vision = options.pop("vision_config", vision)
    text = options.pop("text_config", llama(len(tokenizer)))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, image_seq_length=16, **options
    )
    randomise(LlavaForConditionalGeneration(config)).save_pretrained(folder, max_shard_size=shard)
    LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer, patch_size=14, chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=int(vision.model_type == "clip_vision_model"),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    ).save_pretrained(folder)  # fmt: skip


def blip_parts():
    vision = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": IMAGE_SIZE, "patch_size": 14,
    }  # fmt: skip
    qformer = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": 263, "max_position_embeddings": 64,
    }  # fmt: skip
    return vision, qformer


def blip_image_processor():
    from transformers import BlipImageProcessor

    return BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def tiny_blip2(folder, shard="5GB", text_config=None, **qformer_options):
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    tokenizer = byte_level("</s>", "</s>", "<pad>")
    vision, qformer = blip_parts()
    text = OPTConfig(
        vocab_size=len(tokenizer) + 2, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=tokenizer("!").input_ids[-1], pad_token_id=0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**vision), num_query_tokens=6, image_token_index=2,
        qformer_config=Blip2QFormerConfig(**qformer | qformer_options),
        text_config=text_config or text,
    )  # fmt: skip
    randomise(Blip2ForConditionalGeneration(config)).save_pretrained(folder, max_shard_size=shard)
    Blip2Processor(blip_image_processor(), tokenizer, num_query_tokens=6).save_pretrained(folder)


def tiny_instructblip(folder, shard="5GB"):
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
    )

    tokenizer = sentencepiece_like()
    vision, qformer = blip_parts()
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**vision), num_query_tokens=6, image_token_index=3,
        qformer_config=InstructBlipQFormerConfig(**qformer), text_config=llama(len(tokenizer)),
    )  # fmt: skip
    model = randomise(InstructBlipForConditionalGeneration(config))
    model.save_pretrained(folder, max_shard_size=shard)
    InstructBlipProcessor(
        blip_image_processor(), tokenizer, num_query_tokens=6,
        qformer_tokenizer=byte_level("[CLS]", "[SEP]", "[PAD]", suffix="[SEP]", image=False),
    ).save_pretrained(folder)  # fmt: skip


MAKE = {"llava": tiny_llava, "blip2": tiny_blip2, "instructblip": tiny_instructblip}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Directory of a tiny checkpoint by its name, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            kind, _, sharded = name.partition("-")
            MAKE[kind](made[name], shard="40KB" if sharded else "5GB")
        return str(made[name])

    return get


class Upstream:
    """The checkpoint in upstream's own classes, one row at a time."""

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.is_llava = self.model.config.model_type == "llava"

    def inputs(self, message):
        """One user message; BLIP takes its words as they are, LLaVA through its template."""
        parts = message["content"]
        if self.is_llava:
            return self.processor.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
        images = [part["image"] for part in parts if part["type"] == "image"] or None
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        inputs = self.processor(images=images, text=text, return_tensors="pt")
        if images is None:  # upstream's own model takes no text alone: its language model does
            return {k: inputs[k] for k in ("input_ids", "attention_mask")}
        return inputs

    def whom(self, inputs):
        return self.model if "pixel_values" in inputs or self.is_llava else self.language_model

    @property
    def language_model(self):
        return self.model.language_model

    def logits(self, message):
        inputs = self.inputs(message)
        return self.whom(inputs)(**inputs).logits[0]

    def generate(self, message):
        inputs = self.inputs(message)
        out = self.whom(inputs).generate(**inputs, **GREEDY)
        return out[0, inputs["input_ids"].shape[1] :].tolist()


NAMES = ["llava", "llava-sharded", "blip2", "blip2-sharded", "instructblip"]


@pytest.fixture(params=NAMES)
def pair(request, folder):
    """(upstream, our model, our processor)."""
    where = folder(request.param)
    model = BridgeForConditionalGeneration.from_hf(where)
    return Upstream(where), model, BridgeProcessor.from_model(model)


# ---------------------------------------------------------------------------------------- parity


def test_tokens_and_pixels_are_upstreams(pair, images):
    upstream, _, processor = pair
    for message in (user("what is this"), user(images[0], "compare this: what\nis  it?")):
        theirs, ours = upstream.inputs(message), model_inputs(processor, [[message]])
        marked = ours["mm_token_type_ids"][0] == 1
        assert torch.equal(marked, theirs["input_ids"][0] == upstream.model.config.image_token_id)
        assert torch.equal(ours["input_ids"][0][~marked], theirs["input_ids"][0][~marked])
        for key in ("pixel_values", "qformer_input_ids", "qformer_attention_mask"):
            assert (key in theirs) == (key in ours), key
            if key in theirs:
                assert torch.equal(theirs[key], ours[key]), key


@torch.no_grad()
def test_logits_are_upstreams(pair, images):
    upstream, model, processor = pair
    messages = [
        user("what is this"),
        user(images[0], "what is it"),
        user(images[1], "a longer one"),
    ]
    for message in messages:
        inputs = model_inputs(processor, [[message]])
        logits = model(**inputs).logits[0]
        torch.testing.assert_close(logits, upstream.logits(message), atol=1e-5, rtol=0)
        if "pixel_values" in inputs:
            changed = model(**inputs | {"pixel_values": inputs["pixel_values"].flip(2)}).logits[0]
            assert (changed[-1] - logits[-1]).abs().max() > 0.01
    batch = model_inputs(processor, [[message] for message in messages])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = model(**batch, position_ids=positions).logits
    for row, message in enumerate(messages):
        real = together[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(real, upstream.logits(message), atol=1e-5, rtol=0)


def test_greedy_generations_are_upstreams(pair, images):
    upstream, model, processor = pair
    messages = [
        user("what is this"),
        user(images[0], "what is it"),
        user(images[1], "a longer one"),
    ]
    expected = [upstream.generate(message) for message in messages]
    assert len({tuple(ids) for ids in expected}) == 3
    batch = model_inputs(processor, [[message] for message in messages])
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, message in enumerate(messages):
        inputs = model_inputs(processor, [[message]])
        alone = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
        assert alone == expected[row]
        assert together[row, : len(alone)].tolist() == expected[row]


@pytest.mark.parametrize("name", ["llava", "blip2", "instructblip"])
def test_gradients_to_the_connector_are_upstreams(name, folder, images):
    upstream, message = Upstream(folder(name)), user(images[0], "what is it")
    model = BridgeForConditionalGeneration.from_hf(folder(name))
    adapters.set_trainable(model, connector=True, adapter=False)
    model.train()
    inputs = model_inputs(BridgeProcessor.from_model(model), [[message]])
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 1, -100)
    loss = model(**inputs, labels=labels).loss
    theirs = upstream.logits(message)[:-1]
    expected = torch.nn.functional.cross_entropy(theirs, labels[0, 1:])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    names = dict(upstream.model.named_parameters())
    if name == "llava":
        projector = "model.multi_modal_projector.linear_"
        names |= {f"layers.{i}.{w}": names[f"{projector}{n}.{w}"]
                  for i, n in ((0, 1), (2, 2)) for w in ("weight", "bias")}  # fmt: skip
    largest = 0
    for key, parameter in model.connector.named_parameters():
        torch.testing.assert_close(parameter.grad, names[key].grad, atol=1e-6, rtol=1e-4)
        largest = max(largest, parameter.grad.abs().max())
    assert largest > 1e-3


@torch.no_grad()
def test_two_images_in_one_message(folder, images):
    upstream = Upstream(folder("llava"))
    model = BridgeForConditionalGeneration.from_hf(folder("llava"))
    processor = BridgeProcessor.from_model(model)
    message = user(images[0], images[1], "compare this")
    inputs = model_inputs(processor, [[message]])
    assert int(inputs["mm_token_type_ids"].sum()) == 32
    torch.testing.assert_close(
        model(**inputs).logits[0], upstream.logits(message), atol=1e-5, rtol=0
    )
    swapped = model(**model_inputs(processor, [[user(images[1], images[0], "compare this")]]))
    assert (swapped.logits[0, -1] - upstream.logits(message)[-1]).abs().max() > 0.01


def test_a_whole_chat_renders_as_upstream_and_marks_the_answers(folder, images):
    upstream = Upstream(folder("llava"))
    processor = BridgeProcessor.from_model(BridgeForConditionalGeneration.from_hf(folder("llava")))
    answers = [assistant([{"type": "text", "text": text}]) for text in ("yes it is", "no")]
    chat = [user(images[0], "what is this"), answers[0], user("is it"), answers[1]]
    theirs = upstream.processor.apply_chat_template(
        [chat], tokenize=True, return_dict=True, return_tensors="pt",
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    row, _ = processor.encode_chat(chat)
    image = upstream.model.config.image_token_id
    kept = [
        token
        for token, kind in zip(row["input_ids"], row["mm_token_type_ids"], strict=True)
        if not kind
    ]
    assert kept == [token for token in theirs["input_ids"][0].tolist() if token != image]
    learned = [label != -100 for label in row["labels"]]
    assert learned == theirs["assistant_masks"][0].bool().tolist()
    as_strings = [message | {"content": message["content"][-1]["text"]} for message in chat[1:]]
    as_parts = upstream.processor.apply_chat_template(chat[1:])
    assert processor.apply_chat_template(as_strings) == as_parts
    # text suites render with the tokenizer
    rendered = processor.tokenizer.apply_chat_template(
        as_strings, chat_template=processor.chat_template, tokenize=False
    )
    assert rendered == as_parts


def test_blip_answers_end_where_its_llm_stops(folder, images):
    model = BridgeForConditionalGeneration.from_hf(folder("blip2"))
    processor = BridgeProcessor.from_model(model)
    row, pictures = processor.encode_chat(
        [user("what is ", images[0], "this?"), assistant("a cat")]
    )
    assert row["mm_token_type_ids"] == [1] * 6 + [0] * (len(row["labels"]) - 6)
    bos, *words = row["input_ids"][6:]
    assert bos == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(words) == "what is this? a cat!"
    learned = [token for token in row["labels"] if token != -100]
    assert learned[-1] == model.generation_config.eos_token_id
    assert processor.tokenizer.decode(learned) == " a cat!"
    assert len(pictures) == 1


@pytest.mark.parametrize("name", ["llava", "instructblip"])
def test_a_mark_that_a_user_spells_stays_text(name, folder, images):
    model = BridgeForConditionalGeneration.from_hf(folder(name))
    processor = BridgeProcessor.from_model(model)
    inputs = model_inputs(processor, [[user(images[0], "is <image> this")]])
    assert int(inputs["mm_token_type_ids"].sum()) == model.layout.resolutions[0].tokens
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert image_id not in inputs["input_ids"][0]
    with pytest.raises(ValueError, match="could not tell from an image"):
        processor.apply_chat_template([user(images[0], "is <image> this")])


@pytest.mark.parametrize("name", ["llava", "blip2", "instructblip"])
def test_raw_text_is_tokenised_as_upstream(name, folder, images):
    upstream = Upstream(folder(name))
    processor = BridgeProcessor.from_model(BridgeForConditionalGeneration.from_hf(folder(name)))
    text = "USER: {}\nwhat is this ASSISTANT:" if upstream.is_llava else "{}what is this"
    ours = processor(images=images[0], text=text.format("<image>"), return_tensors="pt")
    mark = "<image>" if upstream.is_llava else ""
    theirs = upstream.processor(images=images[0], text=text.format(mark), return_tensors="pt")
    words = ours["mm_token_type_ids"][0] == 0
    assert torch.equal(ours["input_ids"][0][words], theirs["input_ids"][0][words])
    assert ours["input_ids"].shape == theirs["input_ids"].shape
    if name == "instructblip":
        assert torch.equal(ours["qformer_input_ids"], theirs["qformer_input_ids"])


# ------------------------------------------------------------------------ a bridge like any other


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-sharded", "blip2", "instructblip"])
def test_save_and_load(name, folder, images, tmp_path):
    model = BridgeForConditionalGeneration.from_hf(folder(name))
    chats = [[user(images[0], "what is it")], [user("what is this")]]
    inputs = model_inputs(BridgeProcessor.from_model(model), chats)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    BridgeProcessor.from_model(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "connector.safetensors")
    assert saved.keys() == model.connector.trained_state().keys()
    assert sorted(p.name for p in tmp_path.rglob("*.safetensors")) == ["connector.safetensors"]
    loaded, processor = mmpeft.load(tmp_path)
    again = model_inputs(processor, chats)
    assert again.keys() == inputs.keys()
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)
    assert torch.equal(loaded(**again).logits, logits)
    loaded.save_pretrained(tmp_path / "again")
    twice = BridgeForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert model_inputs(BridgeProcessor.from_model(twice), chats).keys() == inputs.keys()


def test_another_checkpoint_in_the_same_place_is_refused(folder, tmp_path):
    where = tmp_path / "llava"
    shutil.copytree(folder("llava"), where)
    BridgeForConditionalGeneration.from_hf(str(where)).save_pretrained(tmp_path / "bridge")
    state = load_file(where / "model.safetensors")
    key = next(key for key in state if key.endswith("lm_head.weight"))
    save_file(state | {key: state[key] + 1}, where / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="trained on language_model .*now has weights"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")


@pytest.mark.parametrize("name", ["llava", "blip2", "instructblip"])
def test_an_adapter_goes_on_from_there(name, folder, images, tmp_path):
    base = BridgeForConditionalGeneration.from_hf(folder(name))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = BridgeForConditionalGeneration.from_hf(folder(name), adapter=lora, gate="sample")
    processor = BridgeProcessor.from_model(model)
    adapters.set_trainable(model, connector=True, adapter=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = model_inputs(processor, [[user(images[0], "what is it")], [user("what is this")]])
    for _ in range(2):
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    before, after = base(**inputs).logits, model(**inputs).logits
    assert torch.equal(after[1], before[1])
    assert (after[0] - before[0]).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert torch.equal(mmpeft.load(tmp_path)[0](**inputs).logits, after)


def test_the_llm_of_a_checkpoint_serves_any_bridge(folder, encoder_dir, images):
    from mmpeft.connectors.linear import LinearConnectorConfig
    from mmpeft.encoder import TimmEncoderConfig

    model = BridgeForConditionalGeneration.from_parts(
        TimmEncoderConfig(encoder_dir, image_size=64), LinearConnectorConfig(), folder("llava")
    )
    processor = BridgeProcessor.from_model(model, chat_template="vicuna")
    assert model(**model_inputs(processor, [[user(images[0], "what")]])).logits.isfinite().all()


def test_retention_reads_an_import(folder, images):
    from mmpeft.retention.sides import BridgeSides

    model = BridgeForConditionalGeneration.from_hf(folder("llava"))
    sides = BridgeSides(model, BridgeProcessor.from_model(model))
    assert sides.render([{"role": "user", "content": "what"}]) == "USER: what ASSISTANT:"
    for before in ("", "USER: "):  # BOS in front, as in its chats, and once
        seen = sides.look(before, images[0])
        assert int(seen["mm_token_type_ids"].sum()) == 16
        assert seen["input_ids"][0, 0] == 1 and (seen["input_ids"] == 1).sum() == 1


def test_command_line(folder, images, tmp_path, capsys):
    from mmpeft import cli

    images[0].save(tmp_path / "image.png")
    out = str(tmp_path / "bridge")
    assert cli.main(["import", folder("instructblip"), "--output", out]) == 0
    assert capsys.readouterr().out.strip().endswith(out)
    ask = ["ask", out, "--image", str(tmp_path / "image.png"), "what is it", "--json"]
    assert cli.main([*ask, "--max_new_tokens", "6"]) == 0
    report = json.loads(capsys.readouterr().out)
    upstream = Upstream(folder("instructblip"))
    expected = upstream.generate(user(images[0], "what is it"))
    assert report["reply"] == upstream.processor.tokenizer.decode(
        expected, skip_special_tokens=True
    )
    recipe = tmp_path / "recipe.yaml"  # to go on from it
    recipe.write_text(
        f"output_dir: run\nmodel: {{start_from: {out}}}\n"
        "data: {task: {class_path: Messages, init_args: {train: data.jsonl}}}\n"
        "align: {max_steps: 1}\n"
    )
    assert cli.main(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    model = mmpeft.load(out)[0]
    counts = [part["parameters"] for part in plan["parts"]]
    assert counts[:3] == [row.total for row in adapters.freeze_plan(model)[:3]]
    assert cli.main(["import", folder("instructblip"), "--output", out]) == 2
    assert "exists already" in capsys.readouterr().err


# ------------------------------------------------------------------------ layouts and variants


def relabel(folder, target, renames):
    """A copy of a checkpoint whose weights have other names."""
    import re

    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    for pattern, name in renames.items():
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@torch.no_grad()
@pytest.mark.parametrize(
    "renames",
    [
        {r"^vision_tower\.": "vision_tower.vision_model."},  # as on the hub
        {r"^language_model\.model\.": "model.language_model.",
         r"^language_model\.lm_head": "lm_head",
         r"^(vision_tower|multi_modal_projector)": r"model.\1"},
    ],
    ids=["transformers 4", "transformers 5"],
)  # fmt: skip
def test_keys_of_all_ages(renames, folder, images, tmp_path):
    where = relabel(folder("llava"), tmp_path / "llava", renames)
    assert (
        load_file(where + "/model.safetensors").keys()
        != load_file(folder("llava") + "/model.safetensors").keys()
    )
    model, message = BridgeForConditionalGeneration.from_hf(where), user(images[0], "what is it")
    inputs = model_inputs(BridgeProcessor.from_model(model), [[message]])
    expected = Upstream(folder("llava")).logits(message)
    torch.testing.assert_close(model(**inputs).logits[0], expected, atol=1e-5, rtol=0)


def siglip(layers=3):
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=14,
    )  # fmt: skip


def other_llm(kind):
    from transformers import GPTNeoXConfig, Qwen2Config

    size = {"vocab_size": 220, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    if kind == "qwen2":
        return Qwen2Config(**size, num_key_value_heads=2, tie_word_embeddings=True)
    return GPTNeoXConfig(**size)


VARIANTS = {
    "class token kept": {"vision_feature_select_strategy": "full"},
    "several layers": {"vision_feature_layer": [-2, -3]},
    "no bias": {"multimodal_projector_bias": False},
    "SigLIP": {"vision_config": siglip(), "vision_feature_select_strategy": "full"},
    "tied Qwen2": {"text_config": other_llm("qwen2")},
    "GPT-NeoX": {"text_config": other_llm("gpt_neox")},
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_llava(variant, images, tmp_path):
    tiny_llava(tmp_path, **VARIANTS[variant])
    upstream, message = Upstream(tmp_path), user(images[0], "what is it")
    model = BridgeForConditionalGeneration.from_hf(str(tmp_path))
    tokens = 16 + (variant == "class token kept")
    assert model.layout.resolutions[0].tokens == tokens
    inputs = upstream.inputs(message)
    marked = (inputs["input_ids"] == 3).long()
    assert int(marked.sum()) == tokens
    logits = model(**inputs, mm_token_type_ids=marked).logits[0]
    torch.testing.assert_close(logits, upstream.logits(message), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'; only 'gelu'"),
        ({"vision_config": siglip()}, "drops one token, but the vision tower has 0"),
    ],
)
def test_a_variant_that_cannot_be_imported(options, message, tmp_path):
    tiny_llava(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        BridgeForConditionalGeneration.from_hf(str(tmp_path))


def test_encoders_and_processors_of_another_kind_are_refused(tmp_path):
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PixtralVisionConfig,
    )

    vision = PixtralVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=2, image_size=64, patch_size=16)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=llama(100), image_token_index=3)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "pixtral")
    with pytest.raises(ValueError, match="Pixtral encoder, .* cannot be imported"):
        BridgeForConditionalGeneration.from_hf(str(tmp_path / "pixtral"))
    tiny_llava(tmp_path / "uncropped")
    whole = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, do_center_crop=False)
    whole.save_pretrained(tmp_path / "whole")
    own = tmp_path / "uncropped/processor_config.json"
    changed = json.loads((tmp_path / "whole/preprocessor_config.json").read_text())
    written = json.loads(own.read_text())
    own.write_text(json.dumps(written | {"image_processor": changed}))
    model = BridgeForConditionalGeneration.from_hf(str(tmp_path / "uncropped"))
    with pytest.raises(ValueError, match="makes 56 x 100 pixels of a picture of 90 x 50"):
        BridgeProcessor.from_model(model)


def test_an_import_is_found_from_another_folder(tmp_path, monkeypatch):
    tiny_llava(tmp_path / "llava")
    monkeypatch.chdir(tmp_path)
    BridgeForConditionalGeneration.from_hf("./llava").save_pretrained("saved")
    monkeypatch.chdir("/")
    model = BridgeForConditionalGeneration.from_pretrained(tmp_path / "saved")
    BridgeProcessor.from_model(model)


def test_other_kinds_of_checkpoints(folder, llm_dir, tmp_path):
    from transformers import Blip2Config, LlavaNextConfig, T5Config

    Blip2Config(text_config=T5Config()).save_pretrained(tmp_path / "t5")
    LlavaNextConfig(text_config=llama(10)).save_pretrained(tmp_path / "next")
    tiny_blip2(tmp_path / "act", hidden_act="relu")
    for name, message in (
        (tmp_path / "t5", r"is an encoder-decoder \(t5\); only decoder LLMs"),
        (tmp_path / "next", "'llava_next' checkpoint; only llava, blip-2, instructblip can be"),
        (llm_dir, "'llama' checkpoint; only llava, blip-2, instructblip can be"),
        (tmp_path / "act", "Q-Former .* has hidden_act 'relu'"),
        (tmp_path, "is no checkpoint directory of transformers"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            BridgeForConditionalGeneration.from_hf(str(name))
        assert "\n" not in str(error.value)


def test_a_missing_query_or_tokenizer_is_named(folder, tmp_path):
    where = tmp_path / "blip2"
    shutil.copytree(folder("blip2"), where)
    model = BridgeForConditionalGeneration.from_hf(str(where))
    for file in where.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="its processor cannot be loaded"):
        BridgeProcessor.from_model(model)
    state = load_file(where / "model.safetensors")
    del state["query_tokens"]
    save_file(state, where / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weight query_tokens of its connector"):
        BridgeForConditionalGeneration.from_hf(str(where))


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_a_damaged_file_is_named(file, folder, tmp_path):
    where = tmp_path / "blip2"
    shutil.copytree(folder("blip2"), where)
    config = vlm.load_config(str(where))
    if file.endswith(".json"):
        (where / "model.safetensors").unlink()
        (where / file).write_text("{}")
    else:
        (where / file).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    for read in (vlm.read_connector, vlm.load_language_model):
        with pytest.raises(
            ValueError, match="(damaged|no index of shards).*fetch it again"
        ) as error:
            read(str(where), config)
        assert str(where) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_shard_is_named(folder, tmp_path):
    where = tmp_path / "llava"
    shutil.copytree(folder("llava-sharded"), where)
    shard = sorted(where.glob("model-*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks the shard {shard.name}"):
        BridgeForConditionalGeneration.from_hf(str(where))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "1 weights of its language model"),
        ("multi_modal_projector.linear_2.weight", "lacks the weight linear_2.weight"),
        ("multi_modal_projector.linear_1.bias", "lacks the weight linear_1.bias"),
        ("vision_tower.embeddings.class_embedding", "weights miss .*class_embedding"),
    ],
)
def test_a_missing_weight_is_named(key, message, folder, tmp_path):
    where = tmp_path / "llava"
    shutil.copytree(folder("llava"), where)
    state = load_file(where / "model.safetensors")
    del state[key]
    save_file(state, where / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        BridgeForConditionalGeneration.from_hf(str(where))


def test_pickled_weights_are_refused(folder, tmp_path):
    where = tmp_path / "llava"
    shutil.copytree(folder("llava"), where)
    torch.save(load_file(where / "model.safetensors"), where / "pytorch_model.bin")
    (where / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only safetensors are read"):
        BridgeForConditionalGeneration.from_hf(str(where))
