"""A scaled adapter: kept, loaded, merged, or refused."""

import json

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoKrConfig, LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

import mmpeft
from mmpeft.adapter_scale import scale_of, scaled, set_scale
from mmpeft.adapters import attach_adapter
from mmpeft.tuners.bitfit import BitFitConfig
from mmpeft.tuners.bottleneck import BottleneckConfig
from mmpeft.tuners.dylora import DyLoraConfig
from mmpeft.tuners.full import FullTuningConfig
from mmpeft.tuners.prefix import PrefixConfig

from .conftest import model_inputs, user

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
METHODS = {
    "lora": LoraConfig(**LORA), "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "dora": LoraConfig(**LORA, use_dora=True),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "lokr": LoKrConfig(r=2, target_modules=["q_proj"]),
    "bottleneck": BottleneckConfig(), "dylora": DyLoraConfig(**LORA),
    "bitfit": BitFitConfig(add_biases=True),
    "full": FullTuningConfig(target_modules=["down_proj"]),
}  # fmt: skip
MERGED_AT_ANY = ["lora", "pissa", "adalora", "dylora", "bitfit", "full"]


@pytest.fixture
def bridge(make_bridge):
    """``bridge(method, gate)``: its adapter's weights are far from where they began."""

    def make(method, gate="none"):
        adapter = METHODS[method] if isinstance(method, str) else method
        model, processor = make_bridge(gate, adapter=adapter)
        torch.manual_seed(3)
        for parameter in model.language_model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        return model, processor

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", ["none", "sample"])
def test_a_checkpoint_keeps_the_scale(bridge, images, tmp_path, method, gate):
    model, processor = bridge(method, gate)
    batch = model_inputs(processor, [[user("text")], [user(images[0], "seen")]])
    whole = model(**batch).logits
    with scaled(model.language_model, 0.5):
        half = model(**batch).logits
    assert not half.equal(whole)
    model.set_adapter_scale(0.5)
    assert model(**batch).logits.equal(half)
    with scaled(model.language_model, 1):
        assert model(**batch).logits.equal(whole)
    assert scale_of(model.language_model) == 0.5
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["adapter_scale"] == 0.5
    loaded, _ = mmpeft.load(tmp_path)
    assert loaded(**batch).logits.equal(half)
    loaded.set_adapter_scale(1)
    assert loaded(**batch).logits.equal(whole)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_merged_is_what_was_scaled_or_it_is_refused(bridge, images, method):
    model, processor = bridge(method)
    batch = model_inputs(processor, [[user("text")], [user(images[0], "seen")]])
    model.set_adapter_scale(0.5)
    half = model(**batch).logits
    if method in MERGED_AT_ANY:
        merged = model.merge_adapter()(**batch).logits
        torch.testing.assert_close(merged, half, atol=1e-4, rtol=1e-3)
    else:
        with pytest.raises(ValueError, match="has scale 0.5, at which|cannot be merged into"):
            model.merge_adapter()
        assert model(**batch).logits.equal(half)


def test_experts_and_routers_are_scaled_as_they_are_merged():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    tuned = attach_adapter(llm, FullTuningConfig())
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.arange(12).view(2, 6)
    whole = tuned(ids).logits
    set_scale(tuned, 0.5)
    half = tuned(ids).logits
    assert not torch.allclose(half, whole, atol=1e-2)
    assert torch.equal(tuned.merge_and_unload()(ids).logits, half)


def test_a_passing_scale_is_not_saved(bridge, tmp_path):
    model, _ = bridge("lora")
    with scaled(model.language_model, 0.5), pytest.raises(ValueError, match="set_adapter_scale"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)


def test_a_scale_that_cannot_be(bridge, make_bridge):
    model, _ = bridge("lora")
    for scale in (-0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="the scale of an adapter is .*; use 0 or more"):
            model.set_adapter_scale(scale)
    with pytest.raises(ValueError, match="there is none; leave the scale out"):
        make_bridge("none", adapter=None)[0].set_adapter_scale(0.5)
    with pytest.raises(ValueError, match="the dial cannot scale PrefixConfig"):
        bridge(PrefixConfig())[0].set_adapter_scale(0.5)


def test_a_new_adapter_is_not_scaled(bridge):
    model, _ = bridge("lora")
    model.set_adapter_scale(0.5)
    model.replace_adapter(LoraConfig(**LORA))
    assert model.config.adapter_scale == scale_of(model.language_model) == 1


# ------------------------------------------------------------------- one adapter, over one base


@pytest.mark.parametrize("method", ["lora", "full", "dylora", "bitfit"])
def test_a_merged_bridge_has_no_base(bridge, method):
    model, _ = bridge(method)
    model.merge_adapter()
    gone = "merged into the language model, so its base is gone"
    with pytest.raises(ValueError, match=gone), model.disable_adapter():
        pass
    with pytest.raises(ValueError, match=gone):
        model.replace_adapter(LoraConfig(**LORA))


def test_a_bridge_without_an_adapter_gets_its_first(make_bridge):
    model, _ = make_bridge("none", adapter=None)
    model.replace_adapter(LoraConfig(**LORA))
    assert list(model.language_model.peft_config) == ["default"]


def test_an_adapter_that_the_gate_does_not_know_is_refused(bridge, tmp_path):
    model, processor = bridge("lora", "sample")
    batch = model_inputs(processor, [[user("only text")]])
    model.language_model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.language_model.set_adapter("other")
    for act in (lambda: model(**batch), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="has the adapters default, other, and a bridge serve"):
            act()
    assert not list(tmp_path.iterdir())
