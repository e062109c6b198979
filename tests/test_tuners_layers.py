"""Bottleneck, AdaMix, ProPELT, BitFit and full tuning: what each computes, trains and saves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig, VeraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from mmpeft import BridgeForConditionalGeneration
from mmpeft.adapters import adapter_parameters, attach_adapter, set_trainable
from mmpeft.attention import serve_packed_rows
from mmpeft.data import Collator, ConversationDataset
from mmpeft.gate import GATES
from mmpeft.tuners.adamix import AdaMixConfig, AdaMixLayer
from mmpeft.tuners.bitfit import BitFitConfig
from mmpeft.tuners.bottleneck import BottleneckConfig
from mmpeft.tuners.full import FullTuningConfig
from mmpeft.tuners.merging import MergingLayer
from mmpeft.tuners.propelt import ProPELTConfig, ProPELTLayer, top_mask
from mmpeft.tuners.sublayers import find_sublayers

from .conftest import assistant, model_inputs, user
from .test_data import InMemory
from .test_language_models import ARCHITECTURES

LORA = {"kind": "lora", "bottleneck_size": 4, "target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "serial": lambda: BottleneckConfig(bottleneck_size=4),
    "parallel": lambda: BottleneckConfig(bottleneck_size=4, placement="parallel", scaling=4.0),
    "adamix": lambda: AdaMixConfig(bottleneck_size=4, modules=3),
    "adamix lora": lambda: AdaMixConfig(modules=3, share="none", **LORA),
    "propelt": lambda: ProPELTConfig(bottleneck_size=4, sublayers=["attention", "ffn"]),
    "propelt lora": lambda: ProPELTConfig(**LORA),
    "bitfit": lambda: BitFitConfig(add_biases=True),
    "full": FullTuningConfig,
}
# attention and FFN, then their output layers, in the first layer of each architecture
LLAMA = "self_attn mlp self_attn.o_proj mlp.down_proj"
NEOX = "dense mlp.dense_4h_to_h"
SUBLAYERS = dict.fromkeys(
    ("llama", "qwen2", "qwen3", "smollm3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3"),
    LLAMA,
) | {
    "phi": "self_attn mlp self_attn.dense mlp.fc2",
    "gpt_neox": f"attention mlp attention.{NEOX}",
    "opt": "self_attn - self_attn.out_proj fc2",
    "gpt2": "attn mlp attn.c_proj mlp.c_proj",
    "gptj": "attn mlp attn.out_proj mlp.fc_out",
    "gpt_neo": "attn mlp attn.attention.out_proj mlp.c_proj",
    "falcon": f"self_attention mlp self_attention.{NEOX}",
    "falcon-alibi": f"self_attention mlp self_attention.{NEOX}",
    "bloom": f"self_attention mlp self_attention.{NEOX}",
    "mpt": "attn ffn attn.out_proj ffn.down_proj",
}  # fmt: skip


def tiny_llm(architecture, device="cpu", **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture.partition("-")[0], vocab_size=100, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **ARCHITECTURES[architecture] | fields,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@torch.no_grad()
def fill(language_model, std=0.3):
    """Move an adapter far from where it began."""
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter_parameters(language_model):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(std * noise.to(parameter.dtype))


def tuner_of(model):
    return model.language_model.base_model


def mixed(processor, images):
    chats = [[user(images[0], "what?")], [user("only text")], [user("first", images[1], "both")]]
    return model_inputs(processor, chats)


def training_batch(model, processor, images):
    set_trainable(model, connector=True, adapter=True)
    model.train()
    batch = dict(mixed(processor, images))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100)}


def gradients(model):
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


# ------------------------------------------------------------------------------ where they go


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sublayers_of_every_architecture(architecture):
    found = find_sublayers(tiny_llm(architecture, "meta"))
    assert len(found) == 4
    first = [found[0].module, found[1].module, found[0].output, found[1].output]
    parts = ["-" if path is None else path.partition(".0.")[2] for path in first]
    assert " ".join(parts) == SUBLAYERS[architecture]


@pytest.mark.parametrize(
    "architecture", ["gemma3_text", "gpt2", "gpt_neo", "falcon", "bloom", "mpt"]
)
@pytest.mark.parametrize("method", ["serial", "parallel"])
def test_bottlenecks_act_in_other_architectures(architecture, method):
    llm, ids = tiny_llm(architecture), torch.arange(1, 13).view(2, 6)
    base = llm(ids).logits
    adapted = attach_adapter(llm, METHODS[method]())
    assert torch.equal(adapted(ids).logits, base)
    fill(adapted)
    assert not torch.allclose(adapted(ids).logits, base, atol=1e-3)
    cache = adapted(ids[:, :4], use_cache=True).past_key_values
    behind = adapted(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(behind, adapted(ids).logits[:, 4:], atol=1e-4, rtol=1e-4)


def test_an_ffn_without_a_module_has_no_parallel_form():
    with pytest.raises(ValueError, match="the ffn of opt is no module.*set placement: serial"):
        attach_adapter(tiny_llm("opt"), BottleneckConfig(placement="parallel"))
    attach_adapter(tiny_llm("opt"), BottleneckConfig(placement="parallel", sublayers=["attention"]))


def test_experts_are_refused_and_targets_still_choosable():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=100, num_local_experts=2, **ARCHITECTURES["llama"]
    )
    llm = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="mixtral: .*layers.0 has no ffn .*set target_modules"):
        attach_adapter(llm, BottleneckConfig())
    adapted = attach_adapter(llm, BottleneckConfig(target_modules=["o_proj"]))
    assert len(adapter_parameters(adapted)) == 2 * 4


@pytest.mark.parametrize("sublayers", [["attention"], ["ffn"]])
def test_pfeiffer_is_after_one_sublayer(sublayers):
    adapted = attach_adapter(tiny_llm("llama"), BottleneckConfig(sublayers=sublayers))
    name = {"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"}[sublayers[0]]
    expected = [f"model.layers.{layer}.{name}" for layer in range(2)]
    assert adapted.base_model.targeted_module_names == expected


# --------------------------------------------------------------------------- what they compute


def only_layer(adapter, module):
    """One adapted module of a tiny LLM, its weights far from their start."""
    adapted = attach_adapter(tiny_llm("llama", num_hidden_layers=1), adapter)
    fill(adapted)
    return adapted, adapted.base_model.model.get_submodule(f"model.layers.0.{module}")


def test_serial_bottleneck_by_hand():
    _, layer = only_layer(BottleneckConfig(bottleneck_size=3, scaling=0.5), "mlp.down_proj")
    x = torch.randn(2, 5, 64)
    h = x @ layer.base_layer.weight.T
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    z = (h @ down.weight.T + down.bias).clamp(min=0)
    expected = h + 0.5 * (z @ up.weight.T + up.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("module", ["mlp", "self_attn"])
def test_parallel_bottleneck_by_hand(module):
    config = BottleneckConfig(
        bottleneck_size=3, placement="parallel", scaling=4.0, activation="tanh"
    )
    adapted, layer = only_layer(config, module)
    seen = []
    hook = lambda m, args, kwargs, output: seen.append((args, kwargs, output))  # noqa: E731
    layer.register_forward_hook(hook, with_kwargs=True)
    calls = []
    layer.base_layer.register_forward_hook(lambda m, args, output: calls.append(output))
    adapted(torch.arange(1, 7)[None])
    assert len(calls) == 1  # a second call would write the KV cache twice
    args, kwargs, output = seen[0]
    x = args[0] if args else kwargs["hidden_states"]
    own = calls[0][0] if module == "self_attn" else calls[0]
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    added = torch.tanh(x @ down.weight.T + down.bias) @ up.weight.T + up.bias
    result = output[0] if module == "self_attn" else output
    torch.testing.assert_close(result, own + 4.0 * added)


def test_a_module_whose_input_cannot_be_told_is_named():
    _, layer = only_layer(BottleneckConfig(bottleneck_size=3, placement="parallel"), "mlp")
    layer.base_layer.forward = lambda **given: next(iter(given.values()))
    with pytest.raises(ValueError, match="LlamaMLP is called with states; .* target_modules"):
        layer(states=torch.ones(1, 2, 32))
    x = torch.ones(1, 2, 32)
    assert torch.equal(layer(hidden_states=x), x + layer.contribution(x))


def test_adamix_by_hand_while_training_and_after():
    config = AdaMixConfig(bottleneck_size=3, modules=4, share="none")
    adapted, layer = only_layer(config, "mlp.down_proj")
    adapted.base_model.begin_step(0, 10)
    weights = [getattr(layer, name)["default"] for name in layer.adapter_layer_names[:-1]]
    x = torch.randn(2, 5, 64)
    h = x @ layer.base_layer.weight.T

    def by_hand(down, up, down_bias, up_bias):
        return h + (h @ down.T + down_bias).relu() @ up.T + up_bias

    layer.train()
    for draw in (0, 1):
        layer.take(draw)
        i, j = layer.drawn[draw].argmax(-1).tolist()
        picked = by_hand(weights[0][i], weights[1][j], weights[2][i], weights[3][j])
        torch.testing.assert_close(layer(x), picked)
    layer.eval()
    torch.testing.assert_close(layer(x), by_hand(*(w.mean(0) for w in weights)))


def test_adamix_lora_by_hand():
    _, layer = only_layer(AdaMixConfig(modules=2, share="none", **LORA), "self_attn.q_proj")
    x = torch.randn(2, 5, 32)
    a, b = layer.adamix_down["default"].mean(0), layer.adamix_up["default"].mean(0)
    expected = x @ (layer.base_layer.weight + b @ a).T
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_propelt_by_hand(kind):
    names = {"adapter": "mlp.down_proj", "lora": "self_attn.q_proj"}
    targets = None if kind == "adapter" else ["q_proj"]
    config = ProPELTConfig(kind=kind, bottleneck_size=3, share=0.25, target_modules=targets)
    adapted, layer = only_layer(config, names[kind])
    pro = adapted.base_model.propelt_prototype["default"]
    place = names[kind].replace(".", "_")
    weights = []
    for side in ("down", "up"):
        scores = getattr(layer, f"propelt_{side}_scores")["default"].abs()
        bar = scores.flatten().sort(descending=True).values[round(0.25 * scores.numel()) - 1]
        weights.append(pro[f"{place}_{side}"] * (scores >= bar))
    x = torch.randn(2, 5, layer.base_layer.in_features)
    h = x @ layer.base_layer.weight.T
    if kind == "lora":
        expected = h + x @ weights[0].T @ weights[1].T
    else:
        z = (h @ weights[0].T + pro[f"{place}_down_bias"]).relu()
        expected = h + z @ weights[1].T + pro[f"{place}_up_bias"]
    torch.testing.assert_close(layer(x), expected)


def test_top_mask_by_hand():
    scores = torch.tensor([[0.1, -3.0], [2.0, -0.5]], requires_grad=True)
    mask = top_mask(scores, 0.5)
    assert mask.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    (mask * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert scores.grad.tolist() == [[1.0, -2.0], [3.0, -4.0]]  # of sizes: also where it is shut
    assert top_mask(scores, 0.01).sum() == 1


def test_propelt_sorts_its_scores_once_for_all_tokens(make_bridge, images, monkeypatch):
    from mmpeft.tuners import propelt

    sorts = []
    monkeypatch.setattr(
        propelt, "top_mask", lambda *args: sorts.append(args) or top_mask(*args)
    )  # fmt: skip
    model, processor = make_bridge("none", adapter=METHODS["propelt"]())
    batch = mixed(processor, images)
    with torch.no_grad():
        first = model(**batch).logits
        assert len(sorts) == 2 * 2 * 2  # layers, places, projections
        assert torch.equal(model(**batch).logits, first) and len(sorts) == 8
        fill(model.language_model)
        assert not torch.equal(model(**batch).logits, first) and len(sorts) == 16
        now = model(**batch).logits
    assert torch.equal(model(**batch).logits, now) and len(sorts) == 24  # with gradients, always


def test_propelt_masks_differ_by_layer_and_keep_their_share(make_bridge, images):
    model, processor = make_bridge("none", adapter=ProPELTConfig(bottleneck_size=8, share=0.3))
    layers = [m for m in model.modules() if isinstance(m, ProPELTLayer)]
    masks = [layer.masks()[0] for layer in layers]
    assert len(masks) == 2 and not torch.equal(*masks)
    assert [int(m.sum()) for layer in layers for m in layer.masks()] == [round(0.3 * 32 * 8)] * 4
    fill(model.language_model)
    model(**training_batch(model, processor, images)).loss.backward()
    for layer in layers:
        for name in ("propelt_down_scores", "propelt_up_scores"):
            grad = getattr(layer, name)["default"].grad
            shut = layer.masks()[int("up" in name)] == 0
            assert grad[shut].any() and grad[~shut].any()


def test_bitfit_is_the_llm_with_other_biases():
    llm, ids = tiny_llm("gpt2"), torch.arange(1, 7)[None]
    biases = [name for name, _ in llm.named_parameters() if name.endswith(".bias")]
    other = tiny_llm("gpt2")
    adapted = attach_adapter(llm, BitFitConfig())
    fill(adapted, 1.0)
    changed = {
        name.partition("base_model.model.")[2].replace("bitfit_bias.default", "bias"): value
        for name, value in adapted.named_parameters() if value.requires_grad
    }  # fmt: skip
    assert changed.keys() == set(biases)
    with torch.no_grad():
        for name, value in changed.items():
            other.get_parameter(name).add_(value)
    torch.testing.assert_close(adapted(ids).logits, other(ids).logits, atol=1e-4, rtol=1e-4)


def test_full_tuning_is_the_llm_with_other_weights():
    llm, ids = tiny_llm("qwen3"), torch.arange(1, 7)[None]
    other = tiny_llm("qwen3")
    adapted = attach_adapter(llm, FullTuningConfig())
    fill(adapted)
    left = {name for name, _ in other.named_parameters()}
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if value.requires_grad:
                own = name.partition("base_model.model.")[2].replace("full_parameters.default.", "")
                left.remove(own)
                other.get_parameter(own).copy_(value)
    assert left == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(adapted(ids).logits, other(ids).logits)


# ----------------------------------------------------------------------- what trains, and where

D, FF, KV, VOCABULARY = 32, 64, 16, 259
BY_HAND = {  # of both layers
    "serial": 4 * (2 * 4 * D + 4 + D),
    "parallel": 4 * (2 * 4 * D + 4 + D),
    "adamix": 4 * (3 * (4 * D + 4) + 4 * D + D),  # the up-projection is shared
    "adamix lora": 2 * 3 * ((4 * D + D * 4) + (4 * D + KV * 4)),
    "propelt": 2 * (2 * 4 * D + 4 + D) + 4 * 2 * 4 * D,  # two prototypes, four pairs of scores
    "propelt lora": 3 * ((4 * D + D * 4) + (4 * D + KV * 4)),  # one pair of prototypes, two layers
    "bitfit": 2 * (2 * D + 2 * KV + 2 * FF + D),
    "full": 2 * (2 * D * D + 2 * KV * D + 3 * D * FF + 2 * D) + D,
}


@pytest.mark.parametrize("method", METHODS)
def test_parameters_by_hand(make_bridge, method):
    model, _ = make_bridge("none", adapter=METHODS[method]())
    set_trainable(model, connector=False, adapter=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == BY_HAND[method]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_identity_at_the_start(make_bridge, llm_dir, images, method, dtype):
    model, processor = make_bridge("none", adapter=METHODS[method](), dtype=dtype)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model.language_model))
    batch = mixed(processor, images)
    adapted = model(**batch).logits
    assert adapted.dtype == getattr(torch, dtype)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, adapted)
    fill(model.language_model)
    model(**training_batch(model, processor, images)).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapter_parameters(model.language_model))


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("architecture", ["opt", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("method", ["serial", "bitfit", "full"])
def test_the_gate_where_rows_are_flat_and_heads_apart(architecture, method, gate):
    # OPT's FFN sees (B T, D); Qwen3's norms of keys (B, T, heads, d), Gemma3's (B, heads, T, d)
    from mmpeft.gate import Gate, gate_mask

    heads = {"num_key_value_heads": 1} if architecture == "gemma3_text" else {}
    adapted = attach_adapter(tiny_llm(architecture, **heads), METHODS[method]())
    fill(adapted)
    control = Gate(adapted, gate)
    types = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])  # as many tokens as heads
    ids = torch.arange(1, 9).view(2, 4)
    control.mask = gate_mask(gate, types)
    gated = adapted(ids).logits
    with adapted.disable_adapter():
        base = adapted(ids).logits
    assert torch.equal(gated[1], base[1])
    assert torch.equal(gated[0, :2], base[0, :2]) is (gate != "sample")
    assert not torch.allclose(gated[0, 2:], base[0, 2:], atol=1e-3)
    if gate == "image_tokens":  # words behind differ only by what they attend to
        control.mask = gate_mask(gate, torch.zeros_like(types))
        assert torch.equal(adapted(ids).logits, base)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_the_gate_knows_tokens_from_heads_whatever_the_memory(architecture):
    from mmpeft.gate import Gate

    adapted = attach_adapter(tiny_llm(architecture), FullTuningConfig())
    fill(adapted)
    control, shapes = Gate(adapted, "image_tokens"), []

    def in_order(layer, args):
        if args[0].dim() == 4:
            shapes.append(args[0].shape)
            return args[0].contiguous(), *args[1:]

    layers = [m for m in adapted.modules() if isinstance(m, MergingLayer)]
    ids = torch.arange(1, 5)[None]  # as many tokens as heads
    control.mask = torch.tensor([[False, False, True, False]])
    expected = adapted(ids).logits
    for layer in layers:
        layer.register_forward_pre_hook(in_order)
    assert torch.equal(adapted(ids).logits, expected)
    assert (1, 4, 4) in {shape[:3] for shape in shapes}


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("method", METHODS)
def test_rows_behind_a_shut_gate_are_the_base(make_bridge, images, method, gate):
    model, processor = make_bridge(gate, adapter=METHODS[method]())
    fill(model.language_model)
    batch = mixed(processor, images)
    for training in (False, True):
        model.train(training)
        adapted = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        assert torch.equal(adapted[1], base[1])
        assert all(not torch.allclose(adapted[i], base[i], atol=1e-3) for i in (0, 2))


@pytest.mark.parametrize("method", METHODS)
def test_cached_generation(make_bridge, images, method):
    model, processor = make_bridge("sample", adapter=METHODS[method]())
    fill(model.language_model)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    batch = mixed(processor, images)
    cached = torch.stack(model.generate(**batch, **options).logits)
    whole = torch.stack(model.generate(**batch, **options, use_cache=False).logits)
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(make_bridge, images, tmp_path, method):
    model, processor = make_bridge("image_tokens", adapter=METHODS[method]())
    fill(model.language_model)
    batch = mixed(processor, images)
    model.save_pretrained(tmp_path)
    loaded = BridgeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_changes_no_gradient(make_bridge, images, method):
    model, processor = make_bridge("sample", adapter=METHODS[method]())
    fill(model.language_model)
    batch = training_batch(model, processor, images)
    tuner_of(model).begin_step(0, 10)
    model(**batch).loss.backward()
    plain = gradients(model)
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    for expected, found in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_are_the_samples_apart(make_bridge, images, method):
    model, processor = make_bridge("after_image", adapter=METHODS[method]())
    fill(model.language_model)
    assert serve_packed_rows(model) is None
    chats = [[user(images[0], "what?"), assistant("a")], [user("text"), assistant("b")],
             [user("x", images[1]), assistant("c")]]  # fmt: skip
    rows = list(ConversationDataset(InMemory(chats=chats, keys=[None] * 3), "train", processor))
    packed = Collator(0, packing=True)(rows)
    apart = [Collator(0)([row]) for row in rows]
    total = model(**packed).loss
    counts = [int((one["labels"][:, 1:] != -100).sum()) for one in apart]
    losses = [model(**one).loss * n for one, n in zip(apart, counts, strict=True)]
    torch.testing.assert_close(total, sum(losses) / sum(counts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_built_without_weights(llm_dir, method):
    from mmpeft.plan import empty_language_model

    with torch.device("meta"):
        adapted = attach_adapter(empty_language_model(llm_dir, None, "bfloat16"), METHODS[method]())
    assert all(p.device.type == "meta" for p in adapted.parameters())
    assert sum(p.numel() for p in adapter_parameters(adapted)) == BY_HAND[method]


# -------------------------------------------------------------------------- each method's own


def test_bitfit_refuses_an_llm_without_biases(make_bridge):
    message = "this llama language model has no biases to train; set add_biases: true"
    with pytest.raises(ValueError, match=message):
        make_bridge("none", adapter=BitFitConfig())
    chosen = BitFitConfig(add_biases=True, target_modules=["q_proj", "v_proj"])
    model, _ = make_bridge("none", adapter=chosen)
    assert sum(p.numel() for p in adapter_parameters(model.language_model)) == 2 * (D + KV)


@pytest.mark.parametrize("architecture", ["opt", "qwen2", "phi"])
def test_bitfit_trains_exactly_the_biases(architecture):
    llm = tiny_llm(architecture)
    biases = [p.numel() for name, p in llm.named_parameters() if name.endswith(".bias")]
    head = llm.get_output_embeddings().bias  # phi has one
    adapted = attach_adapter(llm, BitFitConfig())
    expected = sum(biases) - (0 if head is None else len(head))
    assert sum(p.numel() for p in adapter_parameters(adapted)) == expected > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_merging(make_bridge, images, method, dtype):
    model, processor = make_bridge("none", adapter=METHODS[method](), dtype=dtype)
    fill(model.language_model)
    batch = mixed(processor, images)
    with model.disable_adapter():
        base = model(**batch).logits
    adapted = model(**batch).logits
    tuner_of(model).merge_adapter()
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == "float32" else {"atol": 0.5, "rtol": 0.1}
    torch.testing.assert_close(model(**batch).logits, adapted, **tolerance)
    tuner_of(model).unmerge_adapter()
    assert torch.equal(model(**batch).logits, adapted)
    tuner_of(model).merge_adapter()
    with model.disable_adapter():  # takes it out of the weights
        assert torch.equal(model(**batch).logits, base)
    assert torch.equal(model(**batch).logits, adapted)
    model.merge_adapter()
    assert not hasattr(model.language_model, "peft_config")
    torch.testing.assert_close(model(**batch).logits, adapted, **tolerance)


@pytest.mark.parametrize("method", ["serial", "adamix", "propelt"])
def test_what_cannot_be_merged_says_so(make_bridge, method):
    model, _ = make_bridge("none", adapter=METHODS[method]())
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()


@pytest.mark.parametrize("method", ["adamix", "adamix lora"])
def test_adamix_deploys_the_average(make_bridge, images, tmp_path, method):
    model, processor = make_bridge("none", adapter=METHODS[method]())
    fill(model.language_model)
    batch = mixed(processor, images)
    before = model(**batch).logits
    tuner_of(model).average()
    assert torch.equal(model(**batch).logits, before)
    model.save_pretrained(tmp_path)
    loaded = BridgeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, before)
    shapes = {len(m.adamix_down["default"]) for m in loaded.modules()
              if isinstance(m, AdaMixLayer)}  # fmt: skip
    assert shapes == {1}


def test_adamix_draws_anew_each_step_and_in_each_place(make_bridge):
    model, _ = make_bridge("none", adapter=AdaMixConfig(modules=4))
    layers = [m for m in model.modules() if isinstance(m, AdaMixLayer)]
    seen = []
    for step in range(200):
        tuner_of(model).begin_step(step, 200)
        seen.append(torch.stack([layer.drawn for layer in layers]))
    draws = torch.stack(seen).argmax(-1)  # (200, places, 2 draws, down and up)
    counts = draws.flatten().bincount(minlength=4) / draws.numel()
    torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.05, rtol=0)
    pairs = draws.flatten(1).T.float()
    assert torch.corrcoef(pairs).fill_diagonal_(0).abs().max() < 0.3


def symmetric_divergence(first, second):
    p, q = first.softmax(-1), second.softmax(-1)
    kl = (p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)
    return kl.mean() / 2


@pytest.mark.parametrize("options", [{}, {"supervised_logits": False}, {"logits_chunk": 3}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adamix_consistency_is_the_divergence_of_two_draws(
    make_bridge, images, options, checkpointing
):
    model, processor = make_bridge("none", adapter=AdaMixConfig(bottleneck_size=4, consistency=0.7))
    fill(model.language_model)
    batch = training_batch(model, processor, images)
    if checkpointing:
        model.activation_checkpointing_enable()
    for name, value in options.items():
        setattr(model, name, value)
    tuner = tuner_of(model)
    tuner.begin_step(0, 10)
    passes = []
    counter = tuner.model.register_forward_hook(lambda *_: passes.append(1))
    loss = model(**batch).loss
    penalty = tuner.penalty(model, batch)
    counter.remove()
    assert len(passes) == (3 if "logits_chunk" in options else 2)
    (loss + penalty).backward()
    found = gradients(model)

    # by hand, without activation checkpointing
    model.activation_checkpointing_disable()
    learned = F.pad(batch["labels"][:, 1:] != -100, (0, 1))
    call = {key: value for key, value in batch.items() if key != "labels"}
    layers = [m for m in model.modules() if isinstance(m, AdaMixLayer)]
    logits = []
    for draw in (0, 1):
        for layer in layers:
            layer.take(draw)
        logits.append(model(**call).logits[learned])
    expected = 0.7 * symmetric_divergence(*logits)
    torch.testing.assert_close(penalty, expected)
    targets = batch["labels"][:, 1:][learned[:, :-1]]
    (F.cross_entropy(logits[0], targets) + expected).backward()
    for ours, hand in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(ours, hand, atol=1e-5, rtol=1e-3)
    assert penalty > 0.01


def test_adamix_consistency_can_be_off_and_needs_a_draw(make_bridge, images):
    model, processor = make_bridge("none", adapter=AdaMixConfig(consistency=0))
    batch = training_batch(model, processor, images)
    assert tuner_of(model).penalty(model, batch) is None
    model, processor = make_bridge("none", adapter=AdaMixConfig())
    batch = training_batch(model, processor, images)
    with pytest.raises(ValueError, match="call begin_step before the forward"):
        tuner_of(model).penalty(model, batch)
    model.eval()
    assert tuner_of(model).penalty(model, batch) is None


@pytest.mark.parametrize(
    "make, message", [
        (lambda: BottleneckConfig(bottleneck_size=0), "bottleneck_size is 0; it must be 1 or more"),
        (lambda: BottleneckConfig(placement="paralel"), "choose one of serial, parallel"),
        (lambda: BottleneckConfig(sublayers=["mlp"]), "choose attention, ffn or both"),
        (lambda: BottleneckConfig(activation="rellu"), "activation 'rellu' is unknown"),
        (lambda: AdaMixConfig(share="both"), "share 'both' is unknown"),
        (lambda: AdaMixConfig(consistency=-1), "consistency is -1"),
        (lambda: ProPELTConfig(share=0), r"share is 0; it must lie in \(0, 1\]"),
        (lambda: ProPELTConfig(kind="prefix"), "choose one of adapter, lora"),
    ])  # fmt: skip
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "adapter, message", [
        (BottleneckConfig(target_modules=["act_fn"]), "'act_fn' names no layer that this method"),
        (BottleneckConfig(target_modules=["self_attn", "o_proj"]),
         "layers.0.self_attn.o_proj lies in model.layers.0.self_attn, which is one, too"),
        (FullTuningConfig(target_modules="[q_proj"), "'.q_proj' is no regular expression"),
        (VeraConfig(r=0, target_modules=["q_proj"]), "VeraConfig cannot have these sizes"),
        (PeftConfig(), "PeftConfig is no method; name one"),
    ])  # fmt: skip
def test_what_an_adapter_cannot_be_on(adapter, message):
    with pytest.raises(ValueError, match=message):
        attach_adapter(tiny_llm("llama"), adapter)


def test_propelt_refuses_layers_of_other_shapes():
    targets = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    attach_adapter(tiny_llm("llama"), ProPELTConfig(kind="lora", target_modules=targets))
    llm = tiny_llm("llama")
    llm.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 16)
    with torch.device("meta"), pytest.raises(ValueError, match="cannot share with it"):
        attach_adapter(llm.to("meta"), ProPELTConfig(kind="lora", target_modules=["q_proj"]))


def test_what_is_made_of_parameters_is_made_anew_when_they_change():
    from mmpeft.tuners.base import Kept

    kept, parameter, made = Kept(), torch.nn.Parameter(torch.zeros(2)), []

    def get(*parameters):
        return kept.get(
            parameters, lambda: made.append(1) or sum(p.detach() + 1 for p in parameters)
        )

    get(parameter)
    get(parameter)
    assert len(made) == 2  # with gradients, each time
    with torch.no_grad():
        assert get(parameter) is get(parameter) and len(made) == 3
        parameter.add_(1)
        assert get(parameter).tolist() == [2, 2] and len(made) == 4
        parameter.data = torch.full((2,), 5.0)
        assert get(parameter).tolist() == [6, 6] and len(made) == 5
        other = torch.nn.Parameter(torch.full((2,), 7.0))
        assert get(other).tolist() == [8, 8] and get(other, parameter).tolist() == [14, 14]
    with torch.inference_mode():
        own = torch.zeros(2)
        assert get(own).tolist() == [1, 1] and own.add_(1) is own and get(own).tolist() == [2, 2]
    assert copy.deepcopy(kept)._value is None


@pytest.mark.parametrize("method", ["full", "p-tuning"])
def test_generation_makes_the_adapted_weights_once(make_bridge, images, method, monkeypatch):
    from mmpeft.tuners import full, prompt

    calls = []
    place, name = {
        "full": (full.FullTuningLayer, "adapted_parameters"),
        "p-tuning": (prompt.PromptEncoder, "forward"),
    }[method]
    made = getattr(place, name)
    monkeypatch.setattr(place, name, lambda self: calls.append(self) or made(self))
    config = FullTuningConfig() if method == "full" else prompt.PTuningConfig()
    model, processor = make_bridge("none", adapter=config, dtype="bfloat16")
    model.eval()
    calls.clear()
    model.generate(**mixed(processor, images), max_new_tokens=3, min_new_tokens=3)
    assert calls and len(calls) == len(set(map(id, calls)))
    with torch.no_grad():  # a step of the optimizer
        for parameter in adapter_parameters(model.language_model):
            parameter.add_(0.1)
    before = len(calls)
    model.generate(**mixed(processor, images), max_new_tokens=1)
    assert len(calls) == 2 * before


@pytest.mark.parametrize("config", [AdaMixConfig, ProPELTConfig])
@pytest.mark.parametrize("option", [{"sublayers": ["attention"]}, {"activation": "tanh"}])
def test_options_of_bottlenecks_are_refused_beside_lora(config, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is of bottlenecks, and kind is lora; leave"):
        config(kind="lora", **option)
    config(kind="lora", target_modules=["q_proj"])
