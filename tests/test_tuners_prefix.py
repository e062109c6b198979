"""The prefix family against upstream peft, closed forms and explicit rows."""

import copy
import itertools
import pickle
import warnings

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, GPT2Config

from mmpeft import BridgeForConditionalGeneration
from mmpeft.adapters import adapter_parameters, attach_adapter, set_trainable
from mmpeft.attention import (
    ATTENTION,
    Learned,
    LearnedApart,
    LearnedGated,
    attention,
    serve_packed_rows,
)
from mmpeft.data import Collator
from mmpeft.gate import GATES
from mmpeft.packing import Block, PackedRow
from mmpeft.prefix import Prompt, SharedPrompts
from mmpeft.tuners.adaptive_prefix import AdaptivePrefixConfig
from mmpeft.tuners.llama_adapter import LlamaAdapterConfig
from mmpeft.tuners.mam import MAMConfig
from mmpeft.tuners.prefix import PrefixConfig
from mmpeft.tuners.prefix_propagation import PrefixPropagationConfig
from mmpeft.tuners.prompt import PromptConfig, PTuningConfig

from .conftest import model_inputs, user
from .test_packing import gradients, samples_of

METHODS = {
    "prefix": lambda: PrefixConfig(num_virtual_tokens=5),
    "prefix, made": lambda: PrefixConfig(num_virtual_tokens=5, hidden_size=8),
    "adaptive": lambda: AdaptivePrefixConfig(num_virtual_tokens=5),
    "prompt": lambda: PromptConfig(num_virtual_tokens=5),
    "p-tuning": lambda: PTuningConfig(num_virtual_tokens=5, hidden_size=8),
    "propagation": lambda: PrefixPropagationConfig(num_virtual_tokens=5),
    "llama adapter": lambda: LlamaAdapterConfig(num_virtual_tokens=5),
    "mam": lambda: MAMConfig(num_virtual_tokens=5, bottleneck_size=4),
}
GENERATE = {"max_new_tokens": 6, "do_sample": False, "output_logits": True,
            "return_dict_in_generate": True}  # fmt: skip


@pytest.fixture
def llm(llm_dir):
    return AutoModelForCausalLM.from_pretrained(llm_dir).requires_grad_(False)


@pytest.fixture
def ids():
    return torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bridge(make_bridge):
    """``bridge(method, gate)``: a bridge whose adapter is far from where it began."""

    def make(method, gate="none", **kwargs):
        model, processor = make_bridge(gate, adapter=METHODS[method](), **kwargs)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in adapter_parameters(model.language_model):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model, processor

    return make


def tiny(kind, **kwargs):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(vocab_size=200, **kwargs)).eval()


def own(wrapped):
    """The adapter's weights by the last part of their name before the adapter's."""
    return {n.split(".default")[0]: p for n, p in wrapped.named_parameters() if "default" in n}


# ---------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal", "masked", "bias", "decode", "packed"])
def test_learned_keys_stand_before_those_of_the_row(kind, dtype):
    torch.manual_seed(0)
    steps, rows = (1 if kind == "decode" else 10), (1 if kind == "packed" else 2)
    query = torch.randn(rows, 4, steps, 8, dtype=dtype)
    key, value = torch.randn(2, rows, 2, 10, 8, dtype=dtype)
    front = torch.randn(2, 1, 2, 3, 8)  # float32, as adapters are
    visible = torch.ones(10, 10, dtype=torch.bool).tril()[None, None]
    mask, packed = None, None
    if kind in ("masked", "bias"):
        visible = visible & torch.tensor([[1] * 10, [0] * 4 + [1] * 6]).bool()[:, None, None]
        mask = visible if kind == "masked" else torch.where(visible, 0.0, -1e9).to(dtype)
    if kind == "packed":
        lengths, blocks = (3, 5, 2), [Block(0, 3), None, Block(8, 2)]
        branch = torch.tensor([0, 0, 1, 1, 1])
        inner = (branch[:, None] == branch) & torch.ones(5, 5).tril().bool()
        blocks[1] = Block(3, 5, (0, 3), torch.cat([torch.ones(5, 3).bool(), inner], 1))
        packed = PackedRow(blocks, [8, 2])
        visible = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
        visible[3:8, :8] = blocks[1].mask

    class Module(torch.nn.Module):
        num_key_value_groups = 2

    learned = Learned(*front, lambda adapted, base: adapted)
    ours, _ = attention(Module(), query, key, value, mask, packed=packed, learned=learned)
    seen = visible[..., -steps:, :].expand(rows, 1, steps, 10)
    expected = scaled_dot_product_attention(
        query.float(), *(torch.cat([x.expand(rows, -1, -1, -1), y.float()], 2)
                         for x, y in zip(front, (key, value), strict=True)),
        attn_mask=torch.cat([torch.ones(rows, 1, steps, 3, dtype=torch.bool), seen], -1),
        enable_gqa=True,
    ).transpose(1, 2)  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    rows_seen = seen.any(-1)[:, 0]  # padding sees the front alone
    torch.testing.assert_close(
        ours.float()[rows_seen], expected[rows_seen], atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_of_what_is_learned_apart_are_float32(dtype, autocast):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8), 12 * torch.randn(1, 4, 5, 8)  # scores of some 30
    query, key, value = (x.to(dtype) for x in (query, key, torch.randn(1, 4, 5, 8)))
    learned = LearnedApart(key, value, lambda added, _: added, torch.ones(1))
    nothing = torch.zeros(2, 6, 4, 8, dtype=dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = learned.apply(lambda _: nothing, query, 8**-0.5, None)
    scores = query.double() @ key.double().transpose(2, 3) * 8**-0.5
    expected = (scores.softmax(-1) @ value.double()).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


# ------------------------------------------------------------------------- against upstream peft


def upstream(llm, config):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(llm), config).eval()


def turned(keys, by):
    """Keys ``(..., 8)`` as rotary embeddings turn them at position ``by``."""
    angles = torch.cat([by / 10000 ** (torch.arange(0, 8, 2) / 8)] * 2)
    half = torch.cat([-keys[..., 4:], keys[..., :4]], -1)
    return keys * angles.cos() + half * angles.sin()


@pytest.mark.parametrize("projected", [False, True])
def test_prefix_tuning_is_pefts(llm, ids, projected):
    """There the text moves on by P, which turns what is learned the same way for all positions."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projected,
        encoder_hidden_size=8 if projected else None,
    )  # fmt: skip
    theirs = upstream(llm, copy.deepcopy(config))
    ours = attach_adapter(llm, config)
    encoder = theirs.prompt_encoder["default"]
    last = encoder.transform[2] if projected else encoder.embedding
    for i, layer in enumerate(ours.get_base_model().model.layers):
        both, attn = last.weight.detach(), layer.self_attn
        if not projected:
            key, value = both[:, i * 32 : i * 32 + 32].view(5, 4, 8).transpose(0, 1).split(2)
            attn.prefix_key["default"].data.copy_(turned(key, -5))
            attn.prefix_value["default"].data.copy_(value)
            continue
        both = torch.cat([both, last.bias.detach()[:, None]], 1)[i * 32 : i * 32 + 32]
        both = both.view(4, 8, -1).transpose(1, 2)  # heads of keys and of values
        both = torch.cat([turned(both[:2], -5), both[2:]]).transpose(1, 2).flatten(0, 1)
        attn.prefix_up["default"].weight.data.copy_(both[:, :-1])
        attn.prefix_up["default"].bias.data.copy_(both[:, -1])
    if projected:  # theirs is as narrow as the keys
        network = ours.base_model.prefix_network["default"]
        network.tokens, network.down = encoder.embedding.weight, encoder.transform[0]
    found, expected = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (found - llm_logits(ours, ids)).abs().max() > 0.1


def llm_logits(wrapped, ids):
    with wrapped.disable_adapter():
        return wrapped(input_ids=ids).logits


@pytest.mark.parametrize("padded", [False, True])
def test_prompt_tuning_is_pefts(llm, ids, padded):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs, ours = upstream(llm, copy.deepcopy(config)), attach_adapter(llm, config)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 1 - int(padded)
    with torch.no_grad():
        prompt = theirs.prompt_encoder["default"].embedding.weight
        ours.base_model.prompt_embeddings["default"].copy_(prompt)
    ours.zero_grad()
    found, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (ours, theirs))
    expected = expected[:, 5:]  # peft's own has the prompt's logits, too
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=2e-5, rtol=1e-5)
    weights = torch.randn_like(found[seen])
    (mine,) = torch.autograd.grad(
        (found[seen] * weights).sum(), ours.base_model.prompt_embeddings["default"]
    )
    (wanted,) = torch.autograd.grad((expected[seen] * weights).sum(), prompt)
    torch.testing.assert_close(mine, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_is_pefts(llm, ids, kind):
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16,
        encoder_reparameterization_type=kind,
    )  # fmt: skip
    theirs, ours = upstream(llm, copy.deepcopy(config)), attach_adapter(llm, config)
    encoder, mine = theirs.prompt_encoder["default"], ours.base_model.prompt_encoder["default"]
    with torch.no_grad():
        mine.tokens.copy_(encoder.embedding.weight)
    mine.mlp.load_state_dict(encoder.mlp_head.state_dict())
    if kind == "LSTM":
        mine.lstm.load_state_dict(encoder.lstm_head.state_dict())
    expected = theirs(input_ids=ids).logits[:, 5:]
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-5)


def test_llama_adapter_is_pefts_and_starts_as_the_identity(llm, ids):
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=1)
    theirs, ours = upstream(llm, copy.deepcopy(config)), attach_adapter(llm, config)
    assert torch.equal(ours(input_ids=ids).logits, llm_logits(ours, ids))
    first, last = (layer.self_attn for layer in ours.get_base_model().model.layers)
    assert not hasattr(first, "adaption_gate")  # the top layer alone
    upper = theirs.get_base_model().model.layers[1].self_attn
    with torch.no_grad():
        upper.adaption_gate.fill_(0.7)
        last.adaption_gate["default"].fill_(0.7)
        last.adaption_prompt["default"].copy_(upper.adaption_prompt[0])
    expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-5)
    assert (expected - llm_logits(ours, ids)).abs().max() > 0.1


# --------------------------------------------------------------------------------- closed forms


def test_an_untrained_adaptive_prefix_is_a_prefix_at_half_its_size(llm, ids):
    plain = attach_adapter(copy.deepcopy(llm), PrefixConfig(num_virtual_tokens=5))
    ours = attach_adapter(llm, AdaptivePrefixConfig(num_virtual_tokens=5))
    with torch.no_grad():
        for i, layer in enumerate(ours.get_base_model().model.layers):
            attn, other = layer.self_attn, plain.get_base_model().model.layers[i].self_attn
            attn.prefix_layer["default"].fill_(2.0 + i)
            other.prefix_key["default"].copy_(attn.prefix_key["default"] * 0.5 * (2 + i))
            other.prefix_value["default"].copy_(attn.prefix_value["default"] * 0.5 * (2 + i))
    expected = plain(input_ids=ids).logits
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-5)


def test_an_adaptive_prefix_is_weighted_by_the_state_of_each_position(llm, ids):
    ours = attach_adapter(llm, AdaptivePrefixConfig(num_virtual_tokens=5))
    attn = ours.get_base_model().model.layers[0].self_attn
    with torch.no_grad():
        nn.init.normal_(attn.prefix_gate["default"].weight, std=2)
        attn.prefix_layer["default"].fill_(3.0)
    hidden = torch.randn(2, 9, 32)
    weight = attn.learned(hidden).weight
    gates = torch.sigmoid(hidden @ attn.prefix_gate["default"].weight.T)
    torch.testing.assert_close(weight, 3 * gates)
    before, other = ours(input_ids=ids).logits, ids.clone()
    other[:, 6:] += 1  # what follows changes nothing
    torch.testing.assert_close(ours(input_ids=other).logits[:, :6], before[:, :6])
    with torch.no_grad():
        attn.prefix_gate["default"].weight.zero_()
    assert (ours(input_ids=ids).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("seen", ["causal", "bool", "added", "packed", "one query"])
def test_attention_whose_learned_keys_differ_by_query_by_hand(seen):
    torch.manual_seed(0)
    rows, count = (1, 1) if seen == "packed" else (2, 1 if seen == "one query" else 7)
    count = 7 if seen == "packed" else count
    query = torch.randn(rows, 4, count, 8)
    key, value = torch.randn(2, rows, 2, 7, 8)
    weight = 2 * torch.rand(rows, count, 3)
    learned = LearnedGated(*torch.randn(2, 1, 2, 3, 8), lambda adapted, base: adapted, weight)
    visible, given = torch.ones(7, 7, dtype=torch.bool).tril(), {}
    if seen in ("bool", "added"):
        visible = visible & (torch.rand(7, 7) < 0.7) | torch.eye(7, dtype=torch.bool)
    mask = visible[None, None].expand(rows, 1, 7, 7)
    if seen == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    if seen == "packed":
        given["packed"] = PackedRow([Block(0, 4), Block(4, 3)], [4, 3])
        visible = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).bool() & visible
    if seen == "one query":
        visible = visible[-1:]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    mask = mask if seen in ("bool", "added") else None
    ours, _ = attention(module, query, key, value, mask, scaling=0.3, learned=learned, **given)

    expected = torch.empty(rows, count, 4, 8)
    for row, t, head in itertools.product(range(rows), range(count), range(4)):
        who, of = visible[t], head // 2
        w = weight[row, t, :, None]
        keys = torch.cat([learned.key[0, of] * w, key[row, of, who]])
        values = torch.cat([learned.value[0, of] * w, value[row, of, who]])
        scores = keys @ query[row, head, t] * 0.3
        expected[row, t, head] = scores.softmax(0) @ values
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_prefix_propagation_is_a_row_with_vectors_added_in_front(llm, ids):
    base = copy.deepcopy(llm)
    ours = attach_adapter(llm, PrefixPropagationConfig(num_virtual_tokens=5))
    vectors = ours.base_model.propagated_vectors["default"]
    embeds = base.get_input_embeddings()(ids)
    for layer, own_vectors in zip(base.model.layers, vectors, strict=True):
        added = torch.cat([own_vectors, torch.zeros(9, 32)])
        layer.register_forward_pre_hook(lambda _, args, added=added: (args[0] + added,))
    row = torch.cat([torch.zeros(2, 5, 32), embeds], 1)
    expected = base(inputs_embeds=row).logits[:, 5:]
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-5)


def test_a_vocabulary_prefix_starts_as_words_in_front(llm, ids, monkeypatch):
    words = torch.tensor([7, 8, 9])
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: words)
    ours = attach_adapter(copy.deepcopy(llm), PrefixConfig(num_virtual_tokens=3))
    row = torch.cat([words.expand(2, -1), ids], 1)
    expected = llm(input_ids=row).logits[:, 3:]
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-5)


def test_a_text_to_start_from_is_repeated_to_its_length(llm):
    ours = attach_adapter(llm, PromptConfig(num_virtual_tokens=5, init="text", init_text="abc"))
    prompt = ours.base_model.prompt_embeddings["default"]
    assert torch.equal(prompt[:2], prompt[3:]) and not torch.equal(prompt[0], prompt[1])
    table = llm.get_input_embeddings().weight
    assert (table[:, None] == prompt).all(-1).any(0).all()


def test_a_text_to_start_from_needs_tokens(llm, llm_dir, tmp_path):
    from tokenizers.normalizers import Strip
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    tokenizer.backend_tokenizer.normalizer = Strip()
    tokenizer.save_pretrained(tmp_path)
    llm.config.save_pretrained(tmp_path)
    llm.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="init_text ' ' has no tokens in .*; choose another text"):
        attach_adapter(llm, PromptConfig(init="text", init_text=" "))


def test_a_text_to_start_from_needs_the_tokenizer(ids):
    llm = tiny(GPT2Config, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="^PromptConfig: init: text needs the LLM's own tokenizer"):
        attach_adapter(llm, PromptConfig(init="text", init_text="abc"))


def test_a_prompt_that_began_as_a_text_is_loaded_without_a_tokenizer(llm, ids, tmp_path):
    bare = copy.deepcopy(llm)
    bare.name_or_path = str(tmp_path)
    ours = attach_adapter(llm, PromptConfig(init="text", init_text="abc"))
    ours.save_pretrained(tmp_path)
    expected = ours(input_ids=ids).logits
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    filled = attach_adapter(bare, ours.active_peft_config, new=False)
    peft.set_peft_model_state_dict(filled, peft.get_peft_model_state_dict(ours))
    assert torch.equal(filled(input_ids=ids).logits, expected)


def test_a_table_of_positions_gives_the_prompt_those_of_the_text(ids):
    base = tiny(GPT2Config, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ours = attach_adapter(copy.deepcopy(base), PromptConfig(num_virtual_tokens=5))
    prompt = ours.base_model.prompt_embeddings["default"]
    embeds = base.get_input_embeddings()(ids)
    row = torch.cat([prompt.expand(2, -1, -1), embeds], 1)
    places = torch.cat([torch.arange(5), torch.arange(9)])[None]
    whole = base(inputs_embeds=row, position_ids=places, attention_mask=torch.ones(2, 14))
    found = ours(input_ids=ids).logits
    torch.testing.assert_close(found, whole.logits[:, 5:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [PrefixConfig, PromptConfig])
def test_no_more_tokens_stand_in_front_than_a_table_has_positions(ids, config):
    base = tiny(GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    attach_adapter(copy.deepcopy(base), config(num_virtual_tokens=32))(input_ids=ids)
    with pytest.raises(ValueError, match="num_virtual_tokens is 33, but .* table of 32 positions"):
        attach_adapter(base, config(num_virtual_tokens=33))(input_ids=ids)


# ------------------------------------------------------------------------------------ in a bridge


def mixed(processor, images):
    chats = [[user(images[0], "what?")], [user("only text")], [user("first", images[1], "both")]]
    return model_inputs(processor, chats)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("method", METHODS)
def test_where_the_gate_is_shut_rows_are_the_base(bridge, images, method, gate, side):
    model, processor = bridge(method, gate, dtype="bfloat16")
    processor.tokenizer.padding_side = side
    batch = mixed(processor, images)
    adapted = model(**batch).logits
    with model.disable_adapter():
        base = model(**batch).logits
    assert torch.equal(adapted[1], base[1])
    assert not torch.allclose(adapted[0], base[0], atol=1e-2)


@pytest.mark.parametrize("gate", ["none", "after_image"])
@pytest.mark.parametrize("method", METHODS)
def test_cached_generation_is_that_without_a_cache(bridge, images, method, gate):
    model, processor = bridge(method, gate)
    batch = mixed(processor, images)
    cached = torch.stack(model.generate(**batch, **GENERATE).logits)
    whole = torch.stack(model.generate(**batch, **GENERATE, use_cache=False).logits)
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("method", METHODS)
def test_one_packed_row_has_the_gradients_of_its_samples(bridge, images, method, gate):
    model, processor = bridge(method, gate)
    set_trainable(model, connector=True, adapter=True)
    samples = samples_of(processor, images)
    expected, alone = gradients(model, [Collator(0)([s]) for s in samples])
    assert serve_packed_rows(model) is None
    batch = Collator(0, packing=True, pad_to_multiple_of=32)(samples)
    loss, packed = gradients(model, [batch])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert packed.keys() == alone.keys()
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_does_not_change_gradients(bridge, images, method, packing):
    model, processor = bridge(method, "sample")
    set_trainable(model, connector=True, adapter=True)
    batch = Collator(0, packing=packing)(samples_of(processor, images))
    expected, plain = gradients(model, [batch])
    loss, recomputed = gradients(model, [batch], checkpointing=True)
    assert plain.keys() == recomputed.keys() and torch.equal(loss, expected)
    torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_adapter_is_the_saved_one(bridge, images, tmp_path, method):
    model, processor = bridge(method, "sample")
    model.save_pretrained(tmp_path)
    again = BridgeForConditionalGeneration.from_pretrained(tmp_path)
    batch = mixed(processor, images)
    assert again.language_model.config._attn_implementation == ATTENTION
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("method", ["prompt", "llama adapter"])
def test_what_is_kept_for_generation_follows_the_weights(bridge, images, method, monkeypatch):
    model, processor = bridge(method)
    tuner, calls = model.language_model.base_model, []
    compute = tuner.compute
    monkeypatch.setattr(tuner, "compute", lambda source: calls.append(1) or compute(source))
    batch = mixed(processor, images)
    before = torch.stack(model.generate(**batch, **GENERATE).logits)
    assert len(calls) == 1
    for parameter in adapter_parameters(model.language_model):
        parameter.data += 0.5  # which no counter of changes notices
    after = torch.stack(model.generate(**batch, **GENERATE).logits)
    assert len(calls) == 2 and not torch.allclose(before[0], after[0], atol=1e-3)
    model(**batch).logits.sum().backward()  # with gradients, after a pass without
    copy.deepcopy(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_made_after_generation_runs(bridge, images, method):
    model, processor = bridge(method)
    batch = mixed(processor, images)
    expected = torch.stack(model.generate(**batch, **GENERATE).logits)
    again = copy.deepcopy(model)
    found = torch.stack(again.generate(**batch, **GENERATE).logits)
    assert torch.equal(found, expected)
    llm = pickle.loads(pickle.dumps(model.language_model))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(llm(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


@pytest.mark.parametrize("method", METHODS)
def test_shared_starts_give_the_replies_of_generate(bridge, images, method):
    model, processor = bridge(method, "after_image")
    chats = [[user("look ", images[0], q)] for q in ("red?", "how many?", "where is it?")]
    chats += [[user(f"only text {i}")] for i in range(2)]
    sharing = SharedPrompts(model, processor)
    assert sharing.shares(100, 6)
    found = sharing.replies([Prompt.of(processor, chat) for chat in chats], 6, 4)
    for chat, reply in zip(chats, found, strict=True):
        inputs = model_inputs(processor, [chat])
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert reply == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def fresh_compiler():
    """Graphs of other tests count against the compiler's limit for each function."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_share_one_graph(bridge, images, method, fresh_compiler):
    from torch._dynamo.utils import counters

    model, processor = bridge(method, "sample")
    set_trainable(model, connector=True, adapter=True)
    batch = Collator(0)(samples_of(processor, images))
    expected, plain = gradients(model, [batch])
    for layer in model.language_model.get_base_model().model.layers:
        layer.compile(dynamic=True, backend="eager")
    before = counters["stats"]["unique_graphs"]
    loss, found = gradients(model, [batch])
    assert counters["stats"]["unique_graphs"] == before + 1
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_shapes_are_found_without_weights(llm, method):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(llm.config)
        wrapped = attach_adapter(empty, METHODS[method]())
    here = attach_adapter(llm, METHODS[method]())
    shapes = {n: p.shape for n, p in wrapped.named_parameters()}
    assert shapes == {n: p.shape for n, p in here.named_parameters()}
    assert all(p.is_meta for p in wrapped.parameters())


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("kind", "options", "reason"), [
    ("bloom", {"n_layer": 2, "n_head": 4}, "their attention runs as eager"),
    ("falcon", {"alibi": True}, "layers that do not pass on"),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers that do not pass on"),
    ("gemma2", {"head_dim": 8}, "runs as eager"),
])  # fmt: skip
def test_llms_without_such_attention_are_refused_and_left(kind, options, reason):
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=200, **sizes | options)
    base = AutoModelForCausalLM.from_config(config)
    before = base.config._attn_implementation
    with pytest.raises(ValueError, match=f"{kind} language models take no learned.*{reason}"):
        attach_adapter(base, PrefixConfig())
    assert base.config._attn_implementation == before


def test_a_prompt_before_a_recurrence_is_refused():
    from transformers import FalconH1Config

    base = tiny(
        FalconH1Config, hidden_size=32, intermediate_size=64, num_hidden_layers=2, mamba_d_head=8,
        num_attention_heads=4, num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=8,
        initializer_range=0.2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="reaches a text by other ways"):
        attach_adapter(base, PromptConfig(num_virtual_tokens=4))


@pytest.mark.parametrize(("config", "message"), [
    (lambda: PrefixConfig(num_virtual_tokens=0), "num_virtual_tokens is 0; it must be 1 or more"),
    (lambda: PrefixConfig(hidden_size=8, init="vocabulary"), "leave out one of the two"),
    (lambda: PrefixConfig(hidden_size=0), "hidden_size is 0; it must be 1 or more"),
    (lambda: PrefixConfig(init="vocab"), "init 'vocab' is unknown; choose one of vocabulary, norm"),
    (lambda: PromptConfig(init="vocab"), "init 'vocab' is unknown; choose one of vocabulary, norm"),
    (lambda: PromptConfig(init="text"), "init: text needs init_text"),
    (lambda: PTuningConfig(encoder="gru"), "encoder 'gru' is unknown; choose one of lstm, mlp"),
    (lambda: PTuningConfig(hidden_size=0), "hidden_size is 0; it must be 1 or more"),
    (lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_reparameterization_type="GRU"),
     "encoder 'gru' is unknown"),
    (lambda: PTuningConfig(encoder="mlp", num_layers=3), "of the lstm encoder"),
    (lambda: LlamaAdapterConfig(num_layers=3), "num_layers is 3; it must lie in 1 to 2"),
    (lambda: PromptConfig(target_modules=["layers.0.self_attn"]), "leave out target_modules"),
    (lambda: PrefixConfig(target_modules=["q_proj"]), "names no layer that this method adapts"),
    (lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, num_layers=1), "num_layers 1 has no"),
    (lambda: peft.PrefixTuningConfig(), "PrefixTuningConfig: set num_virtual_tokens"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(llm, config, message):
    with pytest.raises(ValueError, match=message):
        attach_adapter(llm, config())


def test_configs_of_peft_are_translated_aloud(llm, capsys):
    attach_adapter(llm, peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=1))
    line = "AdaptionPromptConfig is here LlamaAdapterConfig(num_virtual_tokens=5, num_layers=1)."
    assert line in capsys.readouterr().err


def test_prefix_in_some_layers(llm, ids):
    ours = attach_adapter(
        llm, PrefixConfig(num_virtual_tokens=5, target_modules=r".*\.1\.self_attn")
    )
    assert sorted(own(ours)) == [
        f"base_model.model.model.layers.1.self_attn.prefix_{x}" for x in ("key", "value")
    ]
    assert not torch.allclose(ours(input_ids=ids).logits, llm_logits(ours, ids), atol=1e-3)


def test_plain_lora_leaves_attention_as_it_was(llm):
    attach_adapter(llm, LoraConfig(r=2))
    assert llm.config._attn_implementation == "sdpa"


def test_an_attention_window_keeps_the_prompt_in_sight(ids):
    from transformers import MistralConfig

    base = tiny(
        MistralConfig, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=6, initializer_range=0.2,
    )  # fmt: skip
    ours = attach_adapter(base, PrefixConfig(num_virtual_tokens=3))
    assert not torch.allclose(
        ours(input_ids=ids).logits[:, 8], llm_logits(ours, ids)[:, 8], atol=1e-3
    )
