"""Any causal LM serves: the same exactness, generation and checkpoints for each architecture."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from mmpeft import BridgeForConditionalGeneration, BridgeProcessor
from mmpeft.attention import serve_packed_rows
from mmpeft.chat_session import SIDES, ChatSession
from mmpeft.connectors.mlp import MLPConnectorConfig
from mmpeft.data import Collator
from mmpeft.encoder import TimmEncoderConfig
from mmpeft.evaluate import generate_replies
from mmpeft.language_model import (
    attention_window,
    branch_limit,
    context_length,
    counts_places,
    embedding_size,
    embedding_std,
    load_language_model,
    load_tokenizer,
    rope_limit,
)
from mmpeft.packing import share_prefix
from mmpeft.prefix import SharedPrompts
from mmpeft.targets import resolve_targets
from mmpeft.tuners.prompt import PromptConfig

from .conftest import assistant, model_inputs, user

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
FALCON = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip
WINDOW = 24  # of the architectures that look back a limited way
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "mistral": LLAMA | {"sliding_window": WINDOW},
    "gemma": LLAMA,
    "gemma2": LLAMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": LLAMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "phi": LLAMA,
    "phi3": LLAMA | {"sliding_window": WINDOW},
    "gpt_neox": LLAMA,
    "opt": {
        "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "init_std": 0.2,
        "do_layer_norm_before": False,
    },
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512,
        "attention_types": [[["global", "local"], 1]], "window_size": WINDOW,
        "initializer_range": 0.2,
    },
    "falcon": FALCON,
    "falcon-alibi": FALCON | {"alibi": True},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "mpt": {
        "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "initializer_range": 0.2,
    },
}  # fmt: skip
NO_BRANCHES = ("gpt_neo", "falcon-alibi", "bloom", "mpt")
UNPACKED = ("gemma2", "gptj", "gpt_neo", "falcon", "falcon-alibi", "bloom", "mpt")
WINDOWED = ("mistral", "gemma2", "gemma3_text", "phi3", "gpt_neo")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def random_llm(llm_dir, tmp_path_factory):
    """Write a random two-layer LLM of an architecture with the byte-level tokenizer, once."""
    tokenizer, made = AutoTokenizer.from_pretrained(llm_dir), {}

    def write(name):
        if name not in made:
            logging.set_verbosity_error()
            config = AutoConfig.for_model(
                name.partition("-")[0], vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2,
                pad_token_id=0, **ARCHITECTURES[name],
            )  # fmt: skip
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return str(made[name])

    return write


@pytest.fixture(scope="module")
def bridge(architecture, random_llm, encoder_dir):
    """(model, processor, directory of the LLM); the adapter sits at the default targets."""
    folder = random_llm(architecture)
    torch.manual_seed(1)
    model = BridgeForConditionalGeneration.from_parts(
        TimmEncoderConfig(encoder_dir, image_size=64), MLPConnectorConfig(), folder,
        adapter=LoraConfig(r=4), gate="sample",
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model, BridgeProcessor.from_model(model), folder


def test_text_is_the_base_and_images_are_not(bridge, images):
    model, processor, folder = bridge
    base = AutoModelForCausalLM.from_pretrained(folder)
    batch = model_inputs(processor, [[user("hello")], [user("a longer question, more words")]])
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(model(**text).logits, base(**text).logits)
    model.train()  # a frozen LLM drops nothing, whatever its config says
    assert torch.equal(model(**text).logits, base(**text).logits)
    model.eval()
    batch = model_inputs(processor, [[user(images[0], "what?")], [user("only text")]])
    ours = model(**batch).logits
    with model.disable_adapter():
        untouched = model(**batch).logits
    assert torch.equal(ours[1], untouched[1])
    assert not torch.allclose(ours[0], untouched[0], atol=1e-3)


def generated(model, batch, **options):
    """Logits of the generated steps, (B, steps, V)."""
    out = model.generate(
        **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


def test_generation(bridge, images):
    model, processor, folder = bridge
    chats = [[user(images[0], "what is this?")], [user("only text")], [user("a", images[1])]]
    batch = model_inputs(processor, chats)
    cached = generated(model, batch)
    assert torch.isfinite(cached).all()
    torch.testing.assert_close(cached, generated(model, batch, use_cache=False), atol=1e-3, rtol=0)
    for row, chat in enumerate(chats):  # padding on the left changes nothing
        alone = generated(model, model_inputs(processor, [chat]))
        torch.testing.assert_close(cached[row], alone[0], atol=1e-3, rtol=0)
    with model.disable_adapter():
        untouched = generated(model, batch)
    assert torch.equal(cached[1], untouched[1])
    text = model_inputs(processor, [chats[1]])
    text = {k: text[k] for k in ("input_ids", "attention_mask")}
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(generated(model, text), generated(base, text))


def test_replies_to_prompts_that_start_alike(architecture, bridge, images, monkeypatch):
    """The same as row by row, also where starts cannot be shared."""
    model, processor, _ = bridge
    monkeypatch.setattr(model.generation_config, "use_cache", True)  # MPT's is off
    look, other, _ = images
    prompts = [
        [user("hm, ", look, "what is this?")], [user("hm, ", look, "and this, then?")],
        [user("hm, ", other, "what?")], [user("only text")], [user("hm, ", look, "what is this?")],
        [user("only a bit more text")], [user("hm, ", other, "a rather long question, this")],
        [user("hm, ", look, other, "both?")],
    ]  # fmt: skip
    sharing = SharedPrompts(model, processor)
    for size in (2, 8):
        options = (model, processor, prompts, 6, size, None)
        assert generate_replies(*options, sharing) == generate_replies(*options, False)
    assert sharing.why_not() is None
    assert sharing.shares(20, 6) is (architecture not in ("mpt", *WINDOWED))


def test_a_chat_goes_on_from_its_cache(bridge, images, monkeypatch):
    model, processor, _ = bridge
    monkeypatch.setattr(model.generation_config, "use_cache", True)
    kept = ChatSession(model, processor)
    turns = [user(images[0], "what is this?")]
    for words in ("and now?", "a longer question, more words", "hm"):
        for side in SIDES:
            *_, alone = ChatSession(model, processor).stream(turns, side, 12)
            *_, reply = kept.stream(turns, side, 12)
            assert reply == alone
        turns = [*turns, assistant(alone), user(words)]


def test_checkpoint(bridge, images, tmp_path):
    model, processor, _ = bridge
    model.save_pretrained(tmp_path)
    loaded = BridgeForConditionalGeneration.from_pretrained(tmp_path)
    batch = model_inputs(processor, [[user(images[0], "what?")], [user("only text")]])
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_chats_that_share_a_prefix(architecture, bridge, images):
    """A branch has the loss it has alone, or the architecture is refused."""
    model, processor, _ = bridge
    if architecture in NO_BRANCHES:
        with pytest.raises(ValueError, match="set data.chats_per_sample: 1"):
            branch_limit(model)
        return
    limit = branch_limit(model)
    assert limit == (WINDOW if architecture in WINDOWED else None)
    processor = copy.copy(processor)
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    look = [] if limit else [images[0]]  # within the window there is no room for a picture
    chats = [[user(*look, "same, "), assistant(a)] for a in ("short", "a bit more", "else")]
    encoded = [processor.encode_chat(chat) for chat in chats]
    rows, pictures = [row for row, _ in encoded], encoded[0][1]
    pixels = processor.image_inputs(pictures) if pictures else {}
    collate = Collator(processor.tokenizer.pad_token_id)
    model.train()

    def loss(rows):
        return model(**collate([share_prefix(rows) | pixels]), num_items_in_batch=1).loss

    alone, shared = sum(loss([row]) for row in rows), loss(rows)
    model.eval()
    torch.testing.assert_close(shared, alone, atol=1e-3, rtol=1e-4)


def test_samples_in_one_row(architecture, bridge, images):
    """A packed sample has the loss it has alone, or the architecture is left as it was."""
    model, processor, _ = bridge
    before = model.language_model.config._attn_implementation
    why_not = serve_packed_rows(model)
    if architecture in UNPACKED:
        assert why_not and model.language_model.config._attn_implementation == before
        return
    assert why_not is None
    chats = [[user(images[0], "what?"), assistant("this")], [user("text"), assistant("that")]]
    chats += [[user("more text", images[1]), assistant("other")]]
    samples = []
    for chat in chats:
        row, pictures = processor.encode_chat(chat)
        samples.append(share_prefix([row]))
        samples[-1] |= processor.image_inputs(pictures) if pictures else {}
    pad = processor.tokenizer.pad_token_id
    model.train()

    def loss(collate, samples):
        return model(**collate(samples), num_items_in_batch=1).loss

    if architecture not in WINDOWED:  # a picture is longer than the window
        alone = sum(loss(Collator(pad), [sample]) for sample in samples)
        packed = loss(Collator(pad, packing=True, pad_to_multiple_of=16), samples)
        torch.testing.assert_close(packed, alone, atol=1e-3, rtol=1e-4)
    model.eval()
    model.language_model.set_attn_implementation(before)


def test_sizes_the_other_parts_need(random_llm):
    opt = load_language_model(random_llm("opt"), None, "float32")
    assert (opt.config.hidden_size, embedding_size(opt)) == (32, 16)
    table = opt.get_input_embeddings().weight
    assert embedding_std(opt) == pytest.approx(table.std().item(), rel=1e-4)
    gemma = load_language_model(random_llm("gemma"), None, "float32")
    looked_up = gemma.get_input_embeddings()(torch.arange(1, len(table)))
    assert embedding_std(gemma) == pytest.approx(looked_up.std().item(), rel=0.02)
    lengths = [context_length(AutoConfig.from_pretrained(random_llm(n))) for n in (
        "llama", "gpt2", "mpt", "bloom")]  # fmt: skip
    assert lengths == [512, 512, 512, None]


def test_windows_by_any_name():
    def config(kind, **options):
        return AutoConfig.for_model(kind, **options)

    local = config("gpt_neo", window_size=256)  # longer than any probe
    everywhere = config("gpt_neo", attention_types=[[["global"], 24]])
    assert attention_window(local) == 256 and counts_places(local)
    assert attention_window(everywhere) is None and not counts_places(everywhere)
    assert attention_window(config("mistral", sliding_window=99)) == 99
    assert attention_window(config("llama")) is None


def test_how_long_rotary_positions_stay_as_they_are():
    short = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    for rope, limit in (
        ({"rope_type": "longrope", **short, **factors}, 64),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 512),
        ({"rope_type": "yarn", "factor": 2.0, **short}, None),
        ({"rope_type": "default", "rope_theta": 1e4}, None),
    ):
        assert rope_limit(AutoConfig.for_model("llama", **LLAMA, rope_parameters=rope)) == limit
    by_layer = AutoConfig.for_model("gemma3_text", **ARCHITECTURES["gemma3_text"])
    assert rope_limit(by_layer) is None
    by_layer.rope_parameters["full_attention"] = {"rope_type": "longrope", **short, **factors}
    assert rope_limit(by_layer) == 64
    assert rope_limit(AutoConfig.for_model("gpt2", **GPT)) is None


def test_default_targets(random_llm):
    names = {
        "gpt2": {"c_attn"}, "gpt_neox": {"query_key_value"}, "phi3": {"qkv_proj"},
        "smollm3": {"q_proj", "v_proj"}, "bloom": {"query_key_value"}, "mpt": {"Wqkv"},
    }  # fmt: skip
    for name, expected in names.items():
        llm = load_language_model(random_llm(name), None, "float32")
        found = resolve_targets(llm, None)
        assert {path.rsplit(".", 1)[-1] for path in found} == expected and len(found) == 2 * len(
            expected
        )
    llm = load_language_model(random_llm("gpt2"), None, "float32")
    every = {path.rsplit(".", 1)[-1] for path in resolve_targets(llm, "all-linear")}
    assert every == {"c_attn", "c_proj", "c_fc"}  # Conv1D layers; the head is left alone


def test_a_window_shorter_than_a_shared_chat_is_refused(tiny, jsonl):
    from mmpeft.data import ConversationDataset
    from mmpeft.tasks.messages import Messages

    class Grouped(Messages):
        def group(self, row):
            return 0

    rows = [{"messages": [user("a question"), assistant(a)]} for a in ("yes", "no, " * 9)]
    task = Grouped(str(jsonl(rows)))
    short = ConversationDataset(task, "train", tiny[1], 2, branch_limit=WINDOW)
    with pytest.raises(
        ValueError, match=f"longer than the window of {WINDOW}.*chats_per_sample: 1"
    ):
        short[0]
    assert ConversationDataset(task, "train", tiny[1], 1, branch_limit=WINDOW)[0]
    assert ConversationDataset(task, "train", tiny[1], 2, branch_limit=999)[0]


# ------------------------------------------------------------------------------------- loading


def test_a_missing_shard_is_named(random_llm, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(random_llm("llama"))
    llm.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ValueError) as error:
        load_language_model(str(tmp_path), None, "float32")
    assert f"misses {shards[1].name} of {len(shards)} shards: fetch" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_there_are_never_made_up(random_llm, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(random_llm("llama"), tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="misses 1 weights of LlamaForCausalLM.*up_proj"):
        load_language_model(str(tmp_path), None, "float32")


@pytest.mark.parametrize(("file", "content", "message"), [
    ("model.safetensors", "version https://git-lfs", "is damaged, or a pointer.*fetch it again"),
    ("model.safetensors", None, "has no model.safetensors.*Give a revision that has them"),
    ("model.safetensors.index.json", "{", "is no index of shards; fetch it again"),
    ("config.json", {"hidden_size": 64}, "cannot be loaded"),
    ("config.json", "{", "cannot be loaded.*not a valid JSON file"),
])  # fmt: skip
def test_damage_is_one_line(random_llm, tmp_path, file, content, message):
    where = tmp_path / "llm"
    shutil.copytree(random_llm("llama"), where)
    if isinstance(content, dict):
        content = json.dumps(json.loads((where / file).read_text()) | content)
    (where / file).unlink(missing_ok=True)
    if content is not None:
        (where / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_language_model(str(where), None, "float32")
    assert str(where) in str(error.value) and "\n" not in str(error.value)


def test_a_directory_without_a_tokenizer(random_llm, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{random_llm('llama')}/{name}", tmp_path)
    with pytest.raises(ValueError, match="the tokenizer of .* cannot be loaded") as error:
        load_tokenizer(str(tmp_path), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", "is a t5 model, which is no causal language model"),
        ("bert", "is a bert model, which is no causal language model"),
        ("bart", "is a bart model, which is no causal language model"),
        ("gemma3", "is a gemma3 model, which is made of several parts"),
        ("nonsense", "cannot be loaded.*nonsense"),
    ],
)
def test_what_is_no_causal_lm_is_refused_in_a_line(tmp_path, model_type, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=message) as error:
        load_language_model(str(tmp_path), None, "float32")
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end(random_llm, tmp_path):
    backend = AutoTokenizer.from_pretrained(random_llm("llama")).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    shutil.copy(f"{random_llm('llama')}/config.json", tmp_path)
    with pytest.raises(ValueError, match="has neither pad_token nor eos_token"):
        load_tokenizer(str(tmp_path), None)


def test_a_directory_without_a_model(tmp_path, random_llm):
    with pytest.raises(ValueError, match="holds no config.json; it is no model directory"):
        load_language_model(str(tmp_path), None, "float32")
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match="holds no config.json; name one of a.gguf, b.gguf"):
        load_language_model(str(tmp_path), None, "float32")
    with pytest.raises(ValueError, match="there is no such GGUF file"):
        load_language_model(str(tmp_path / "c.gguf"), None, "float32")
    shutil.copy(f"{random_llm('llama')}/config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="pickled weights only"):
        load_language_model(str(tmp_path), None, "float32")


@pytest.fixture
def gguf_file(tmp_path, random_llm):
    """A random Llama and its tokenizer as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    llm = AutoModelForCausalLM.from_pretrained(random_llm("llama"))
    tokenizer = AutoTokenizer.from_pretrained(random_llm("llama"))
    config = llm.config
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary[-1] = "ab"  # some merge must be there
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocabulary))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
        "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    }  # fmt: skip
    for key, tensor in llm.state_dict().items():
        if "q_proj" in key or "k_proj" in key:  # the file interleaves the halves of a head
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape_as(tensor)
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, llm


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_gguf_file_comes_out_dense_and_trainable(gguf_file, by, make_bridge, images, tmp_path):
    path, llm = gguf_file
    name = str(path if by == "file" else path.parent)
    loaded = load_language_model(name, None, "float32")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, llm(ids).logits)
    assert load_tokenizer(name, None)("hello").input_ids
    model, processor = make_bridge(language_model=name)
    processor.chat_template = "{{ messages[0].content }}"
    model.train()
    batch = model_inputs(processor, [[user(images[0], "hi")]], add_generation_prompt=False)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.language_model.parameters())
    model.save_pretrained(tmp_path / "run")
    model.eval()
    again = BridgeForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_a_prompt_starts_as_text_by_the_tokenizer_of_a_gguf_file(gguf_file, make_bridge):
    path, _ = gguf_file
    (path.parent / "other.gguf").touch()  # so that the folder would not do
    prompt = PromptConfig(num_virtual_tokens=3, init="text", init_text="cd")
    model, _ = make_bridge("none", adapter=prompt, language_model=str(path))
    found = model.language_model.base_model.prompt_embeddings["default"]
    ids = load_tokenizer(str(path), None)("cdc", add_special_tokens=False).input_ids
    assert torch.equal(found, model.get_input_embeddings().weight[ids])
