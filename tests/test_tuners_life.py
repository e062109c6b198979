"""What befalls an adapter beside training: devices, types, merging, another one in its place."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from mmpeft.adapter_steps import steps_of
from mmpeft.adapters import adapter_parameters, attach_adapter
from mmpeft.attention import ATTENTION
from mmpeft.tuners.attention_base import first_position
from mmpeft.tuners.dylora import DyLoraConfig
from mmpeft.tuners.full import FullTuningConfig

from .conftest import model_inputs, user
from .test_language_models import ARCHITECTURES
from .test_tuners_layers import METHODS as LAYERS
from .test_tuners_layers import fill, tiny_llm
from .test_tuners_prefix import METHODS as PREFIXES

METHODS = LAYERS | PREFIXES | {"dylora": lambda: DyLoraConfig(r=4)}
IDS = torch.arange(4, 22).view(2, 9)


@pytest.fixture
def llm():
    return tiny_llm("llama").requires_grad_(False)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_where_its_llm_is(llm, method):
    """Buffers and parts that peft knows no prefix of, too; meta stands for any other device."""
    wrapped = attach_adapter(llm.to("meta"), METHODS[method]())
    layers = [layer for layer in wrapped.modules() if hasattr(layer, "adapter_layer_names")]
    held = [x for layer in layers for x in (*layer.parameters(), *layer.buffers())]
    assert layers and {x.device.type for x in held} <= {"meta"}


@pytest.mark.parametrize("method", METHODS)
def test_peft_puts_it_on_by_itself_and_loads_it_frozen(llm, tmp_path, method):
    wrapped = get_peft_model(llm, METHODS[method]())
    fill(wrapped, 0.1)
    wrapped.save_pretrained(tmp_path)
    expected = logits(wrapped.eval())
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tiny_llm("llama"), tmp_path, **options).eval()
        assert torch.equal(logits(loaded), expected)
        assert not [name for name, p in loaded.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("method", ["serial", "bitfit", "prefix, made", "mam", "propelt"])
def test_a_second_adapter_is_refused(llm, tmp_path, method):
    wrapped = get_peft_model(llm, METHODS[method]())
    wrapped.save_pretrained(tmp_path)
    before = logits(wrapped)
    with pytest.raises(ValueError, match="the LLM has an adapter, .* unload it first"):
        wrapped.load_adapter(tmp_path, "second")
    assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("second", PREFIXES)
@pytest.mark.parametrize("first", ["llama adapter", "prompt", "prefix, made"])
def test_what_is_taken_off_acts_no_more(llm, first, second):
    base = attach_adapter(llm, METHODS[first]()).unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    replaced = attach_adapter(base, METHODS[second]())
    other = attach_adapter(tiny_llm("llama"), METHODS[second]())
    other.load_state_dict(replaced.state_dict())
    assert torch.equal(logits(replaced), logits(other))
    assert len(base._forward_pre_hooks) == 1


@pytest.mark.parametrize("method", ["full", "bitfit", "dylora"])
def test_a_merged_llm_may_be_converted(llm, method):
    wrapped = attach_adapter(llm, METHODS[method]())
    fill(wrapped)
    wrapped.merge_adapter()
    wrapped.to(torch.bfloat16)
    wrapped.unmerge_adapter()
    assert torch.isfinite(logits(wrapped)).all()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_llm("llama").to(torch.bfloat16)))


@pytest.mark.parametrize("adapter", [FullTuningConfig, PREFIXES["p-tuning"]])
def test_a_fused_optimizer_is_noticed(llm, adapter):
    """It changes parameters and does not count it."""
    wrapped = attach_adapter(llm.to(torch.bfloat16), adapter())
    trained = adapter_parameters(wrapped)
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    before = logits(wrapped)
    optimizer.step()
    after = logits(wrapped)
    optimizer.zero_grad()
    again = copy.deepcopy(wrapped)  # which keeps nothing
    assert not torch.equal(after, before) and torch.equal(after, logits(again))
    assert torch.equal(logits(wrapped), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_a_prompt_stands_does_not_depend_on_rounding(architecture, dtype):
    llm = tiny_llm(architecture)
    expected = first_position(llm, 5)
    assert expected == (0 if architecture in ("gpt2", "opt", "gpt_neo") else -5)
    for std in (0.02, 0.2):
        generator = torch.Generator().manual_seed(1)
        for parameter in llm.float().parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, std, generator=generator)
        assert first_position(llm.to(dtype), 5) == expected


def test_attention_that_was_set_anew_is_noticed(llm):
    wrapped = attach_adapter(llm, METHODS["prefix"]())
    wrapped.base_model.model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=f"was set to sdpa, .* set it to {ATTENTION}"):
        logits(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_llm("llama")))


def test_an_llm_whose_decoder_is_itself_is_served_or_refused_in_a_line():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    small = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    llm = Llama4ForCausalLM(small).eval()
    before = logits(llm)
    try:
        wrapped = attach_adapter(llm, METHODS["prefix"]())
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped), before)


def test_ia3_takes_targets_outside_of_experts():
    llm = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    ))  # fmt: skip
    for layer in llm.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="no ffn"):
        attach_adapter(llm, IA3Config())
    wrapped = attach_adapter(llm, IA3Config(target_modules=["k_proj", "v_proj"]))
    assert wrapped.peft_config["default"].feedforward_modules == []


def test_ia3_of_gpt2_is_pefts_own():
    def trained(model):
        found = {n: tuple(p.shape) for n, p in model.named_parameters() if "ia3_l" in n}
        return {name.removeprefix("base_model.model."): shape for name, shape in found.items()}

    theirs = trained(get_peft_model(tiny_llm("gpt2"), IA3Config(task_type="CAUSAL_LM")))
    assert trained(attach_adapter(tiny_llm("gpt2"), IA3Config())) == theirs
    assert {name.split(".")[3] for name in theirs} == {"attn", "mlp"}


@pytest.mark.parametrize("skipped", [(), (16,), (15, 16, 17)])
def test_adalora_keeps_its_budget_when_the_step_that_settles_ranks_is_skipped(llm, skipped):
    adapter = AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=4, deltaT=100, total_step=20,
                            target_modules=["q_proj", "v_proj"])  # fmt: skip
    wrapped = attach_adapter(llm, adapter)
    steps, optimizer = steps_of(wrapped), torch.optim.AdamW(adapter_parameters(wrapped), lr=1e-2)
    for step in range(20):
        steps.begin_step(step, 20)
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        if step + 1 not in skipped:
            optimizer.step()
            steps.end_step(step + 1)
        optimizer.zero_grad()
    kept = sum(int((p != 0).sum()) for n, p in wrapped.named_parameters() if "lora_E" in n)
    layers = sum("lora_E" in name for name, _ in wrapped.named_parameters())
    assert kept == 2 * layers


def test_adamix_may_be_copied_in_the_middle_of_a_step(llm):
    wrapped = attach_adapter(llm, METHODS["adamix"]())
    wrapped.train()
    wrapped.base_model.begin_step(0, 1)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    copy.deepcopy(wrapped)
    wrapped.base_model.end_step(1)
    assert not wrapped.base_model._first


def test_a_rank_to_cut_to_is_checked(llm):
    tuner = attach_adapter(llm, DyLoraConfig(r=4, target_modules=["q_proj"])).base_model
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank {rank} must lie in 1 to r, 4"):
            tuner.as_lora(rank)
    assert tuner.as_lora()[0].r == 4


@pytest.mark.parametrize("gate", ["none", "sample", "image_tokens", "after_image"])
def test_words_tried_ahead_do_not_change_replies(make_bridge, images, gate):
    model, processor = make_bridge(gate, adapter=LoraConfig(r=2, target_modules=["q_proj"]))
    fill(model.language_model)
    for prompt in ([user(images[0], "what what what is it?")], [user("text text text alone")]):
        inputs = model_inputs(processor, [prompt])
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        ahead = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
        )
        assert torch.equal(plain, ahead)
