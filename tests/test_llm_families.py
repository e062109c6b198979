"""LLMs with experts, state spaces or convolutions: an adapter acts there, or says why not."""

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoKrConfig, LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from mmpeft.adapters import adapted_layers, adapter_parameters, attach_adapter
from mmpeft.attention import serve_packed_rows
from mmpeft.gate import Gate, gate_mask
from mmpeft.language_model import attends_alone, branch_limit
from mmpeft.speed import can_pack
from mmpeft.trial import find_tokens_third, find_unserved
from mmpeft.tuners.bitfit import BitFitConfig
from mmpeft.tuners.dylora import DyLoraConfig
from mmpeft.tuners.full import FullTuningConfig

from .test_tuners_layers import fill, tiny_llm

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
FAMILIES = {
    "llama": LLAMA,
    "mixtral": LLAMA | {"num_local_experts": 4},
    "gpt_oss": LLAMA | {"head_dim": 8, "num_local_experts": 4},
    "llama4_text": LLAMA | {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2},
    "deepseek_v3": LLAMA | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": LLAMA | {
        "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16,
    },
    "mamba": MAMBA,
}  # fmt: skip
EVERYTHING = {
    "full": FullTuningConfig,
    "bitfit": lambda: BitFitConfig(add_biases=True),
    "dylora": lambda: DyLoraConfig(target_modules="all-linear"),
}
IDS = torch.arange(1, 9).view(2, 4)
SHUT = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])  # the second row has no picture


def random_llm(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    # the one way to run experts that gives a row the same bits whatever the other rows are
    more = {"experts_implementation": "batched_mm"} if family == "mixtral" else {}
    return AutoModelForCausalLM.from_config(config, **more).eval().requires_grad_(False)


def logits(llm):
    return llm(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("method", EVERYTHING)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_an_adapter_learns_and_merges(family, method):
    adapted = attach_adapter(random_llm(family), EVERYTHING[method]())
    fill(adapted, 0.1)
    parameters = adapter_parameters(adapted)
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = logits(adapted)
    found.square().sum().backward()
    assert parameters and all(p.grad is not None for p in parameters)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family, left_out", [("lfm2", {"conv"}), ("mamba", {"conv1d", "dt_proj"})])
def test_what_is_read_and_not_called_is_left_out_with_a_line(family, left_out, capsys):
    llm = random_llm(family)
    assert {path.rpartition(".")[2] for path in find_unserved(llm)} == left_out
    adapted = attach_adapter(llm, FullTuningConfig())
    said = capsys.readouterr().err
    assert f"adapter: leaves out {', '.join(sorted(left_out))} in" in said
    assert "without calling the layer" in said and said.count("\n") == 1
    assert not left_out & {path.rpartition(".")[2] for path, _ in adapted_layers(adapted)}


def test_an_adapter_that_would_act_nowhere_is_refused():
    with pytest.raises(ValueError, match="dt_proj in 2 places .*without calling.*choose other"):
        attach_adapter(random_llm("mamba"), LoraConfig(target_modules=["dt_proj"]))


def test_ordinary_llms_have_none(capsys):
    assert find_unserved(random_llm("llama")) == {}
    attach_adapter(random_llm("llama"), FullTuningConfig())
    assert capsys.readouterr().err == ""


def test_experts_without_a_token_are_served():
    class Expert(torch.nn.Linear):
        pass

    llm = random_llm("llama")
    llm.model.layers[0].mlp.experts = torch.nn.ModuleList(
        [torch.nn.Sequential(Expert(32, 32)) for _ in range(2)]
    )
    assert find_unserved(llm) == {}


@pytest.mark.parametrize("config", [LoraConfig, DyLoraConfig])
def test_routers_are_left_out_by_what_adds_to_a_tensor(config, capsys):
    adapted = attach_adapter(random_llm("llama4_text"), config(target_modules="all-linear"))
    assert "leaves out router in 2 places" in capsys.readouterr().err
    fill(adapted)
    assert logits(adapted).isfinite().all()


@pytest.mark.parametrize("gate", ["sample", "image_tokens", "after_image"])
@pytest.mark.parametrize(
    "family, method", [("mixtral", "full"), ("gpt_oss", "bitfit"), ("recurrent_gemma", "dylora")]
)
def test_the_gate_on_routers_and_experts(family, method, gate):
    adapted = attach_adapter(random_llm(family), EVERYTHING[method]())
    fill(adapted, 0.1)
    control = Gate(adapted, gate)
    control.mask, control.length = gate_mask(gate, SHUT), SHUT.shape[1]
    gated = logits(adapted)
    with adapted.disable_adapter():
        base = logits(adapted)
    assert torch.equal(gated[1], base[1])
    assert not torch.allclose(gated[0], base[0], atol=1e-3)


def test_experts_that_see_every_token_several_times_cannot_be_gated():
    adapted = attach_adapter(random_llm("llama4_text"), FullTuningConfig())
    control = Gate(adapted, "sample")
    control.mask, control.length = gate_mask("sample", SHUT), SHUT.shape[1]
    with pytest.raises(ValueError, match=r"set for 2 rows, .* got \(16, 32\)"):
        logits(adapted)


def test_the_bridge_tells_the_gate_how_long_rows_are(make_bridge, images):
    from .test_tuners_layers import mixed

    model, processor = make_bridge("sample", adapter=FullTuningConfig())
    batch = mixed(processor, images)
    model(**batch)
    assert model._gate.length == batch["input_ids"].shape[1]


def test_channels_are_not_taken_for_tokens():
    # a convolution of (B, C, T) with as many channels as tokens
    found = find_tokens_third(random_llm("recurrent_gemma"))
    convolutions = {f"model.layers.{n}.temporal_block.conv_1d" for n in (0, 1)}
    assert convolutions <= found and not any(path.endswith("proj") for path in found)


def test_names_that_peft_takes_for_experts_are_refused():
    # the dense layer and the shared expert of DeepSeek have the names of its experts' layers of old
    config = LoraConfig(target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ValueError, match="peft takes .*down_proj.*all its experts.*'o_proj'"):
        attach_adapter(random_llm("deepseek_v3"), config)
    attach_adapter(random_llm("deepseek_v3"), LoraConfig(target_modules=["o_proj"]))


def test_layers_that_share_a_weight_are_not_merged(make_bridge):
    # as in Zamba2, whose shared block stands in several places
    model, _ = make_bridge("none")
    first, second = model.language_model.get_base_model().model.layers
    model.merge_adapter()
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    model.language_model = attach_adapter(model.language_model, LoraConfig())
    with pytest.raises(ValueError, match=r"layers.0.* and .*layers.1.*q_proj share one weight"):
        model.merge_adapter()


def test_a_kind_of_layer_that_a_method_does_not_know_is_one_line():
    with pytest.raises(ValueError, match="LoKrConfig does not serve .*Conv1D.*another method"):
        attach_adapter(tiny_llm("gpt2"), LoKrConfig(target_modules=["c_attn"]))


@pytest.mark.parametrize("family", ["mixtral", "mamba", "recurrent_gemma"])
def test_ln_tuning_trains_norms_alone(family):
    adapted = attach_adapter(random_llm(family), LNTuningConfig())
    paths = [path for path, _ in adapted_layers(adapted)]
    assert paths and all("norm" in path.rpartition(".")[2] for path in paths)


def test_ia3_where_pefts_names_are_of_old():
    # peft's table has w2, an expert's layer before transformers 5
    with pytest.raises(ValueError, match="mixtral: .* has no ffn .*; set target_modules"):
        attach_adapter(random_llm("mixtral"), IA3Config())
    config = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    assert len(list(adapted_layers(attach_adapter(random_llm("mixtral"), config)))) == 4


@pytest.mark.parametrize("family", ["lfm2", "recurrent_gemma", "mamba", "llama"])
def test_what_carries_a_state_shares_no_row(make_bridge, family):
    # by some weights a convolution's leak was too small for a trial
    model, _ = make_bridge("none")
    model.language_model = random_llm(family)
    assert attends_alone(model.language_model.config) == (family == "llama")
    assert (serve_packed_rows(model) is None) == (family == "llama")
    if family in ("lfm2", "recurrent_gemma"):
        with pytest.raises(ValueError, match="set data.chats_per_sample: 1"):
            branch_limit(model)


@pytest.mark.parametrize(("longest", "packs"), [(32, True), (33, False), (None, False)])
def test_long_neighbours_that_change_positions_share_no_row(make_bridge, longest, packs, capsys):
    model, _ = make_bridge("none")
    long = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}  # fmt: skip
    config = AutoConfig.for_model(
        "phi3", **LLAMA, max_position_embeddings=64, original_max_position_embeddings=32,
        rope_parameters=long,
    )  # fmt: skip
    model.language_model = AutoModelForCausalLM.from_config(config).eval()
    assert can_pack(model, longest) == packs
    assert ("more than 32 tokens changes the rotary positions" in capsys.readouterr().err) != packs
    assert branch_limit(model) == 32


@pytest.mark.filterwarnings("ignore")
def test_a_trial_is_not_compiled():
    # compiled layers call the hooks they were compiled with
    for _ in range(2):
        llm = random_llm("llama4_text")
        for layer in llm.model.layers:
            layer.compile(dynamic=True, backend="eager")
        first = find_unserved(llm)
        again = find_unserved(llm)
        assert first == again and len(first) == 2
