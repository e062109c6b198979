"""Where the gate is shut, the bridge is the base LLM to the bit."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from mmpeft.adapters import attach_adapter
from mmpeft.gate import Gate, gate_behind, gate_mask
from mmpeft.packing import Block, PackedRow

from .conftest import model_inputs, user

TEXTS = ["hello", "a rather longer question, with more words"]


def text_only(batch):
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_rows_equal_the_untouched_llm(make_bridge, llm_dir, training, side, dtype):
    model, processor = make_bridge("sample", dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(llm_dir, dtype=getattr(torch, dtype))
    processor.tokenizer.padding_side = side
    batch = text_only(model_inputs(processor, [[user(t)] for t in TEXTS]))
    model.train(training)
    assert torch.equal(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("training", [False, True])
def test_text_rows_of_a_mixed_batch_equal_the_base_on_the_same_batch(tiny, images, training):
    model, processor = tiny
    chats = [[user(images[0], "what?")], [user("only text")], [user(images[1], images[2], "both")]]
    batch = model_inputs(processor, chats)
    model.train(training)
    bridge = model(**batch).logits
    with model.disable_adapter():
        base = model(**batch).logits
    assert torch.equal(bridge[1], base[1])
    for row in (0, 2):
        assert not torch.allclose(bridge[row], base[row], atol=1e-3)


def test_generation_of_text_rows_in_a_mixed_batch_is_the_base(tiny, images):
    model, processor = tiny
    chats = [[user(images[0], "what?")], [user("only text")]]
    batch = model_inputs(processor, chats)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    bridge = model.generate(**batch, **options)
    with model.disable_adapter():
        base = model.generate(**batch, **options)
    same = torch.stack(bridge.logits)[:, 1], torch.stack(base.logits)[:, 1]
    assert torch.equal(*same)
    changed = torch.stack(bridge.logits)[:, 0], torch.stack(base.logits)[:, 0]
    assert not torch.allclose(*changed, atol=1e-3)


def test_an_image_keeps_the_gate_open_under_the_kv_cache(tiny, images):
    model, processor = tiny
    batch = model_inputs(processor, [[user(images[0], "what?")]])
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    cached = torch.stack(model.generate(**batch, **options, use_cache=True).logits)
    whole = torch.stack(model.generate(**batch, **options, use_cache=False).logits)
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)


def test_gate_none_acts_on_text(make_bridge):
    model, processor = make_bridge("none")
    batch = text_only(model_inputs(processor, [[user("hello")]]))
    bridge = model(**batch).logits
    with model.disable_adapter():
        assert not torch.allclose(bridge, model(**batch).logits, atol=1e-3)


@pytest.mark.parametrize("gate", ["none", "sample"])
def test_disabled_adapter_is_the_base(make_bridge, llm_dir, gate):
    model, processor = make_bridge(gate)
    base = AutoModelForCausalLM.from_pretrained(llm_dir)
    batch = text_only(model_inputs(processor, [[user(t)] for t in TEXTS]))
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_disabling_the_adapter_leaves_what_trains_as_it_was(tiny):
    model, _ = tiny
    model.requires_grad_(False)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_infinite_adapter_output_does_not_leak_through_the_shut_gate(tiny):
    model, processor = tiny
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, float("inf"))
    batch = text_only(model_inputs(processor, [[user("hello")]]))
    assert model(**batch).logits.isfinite().all()


def test_mask_by_hand():
    token_types = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    assert gate_mask("none", token_types) is None
    assert gate_mask("sample", token_types).tolist() == [[True], [False]]
    assert gate_mask("image_tokens", token_types).tolist() == [
        [False, True, True, False],
        [False] * 4,
    ]
    assert gate_mask("after_image", token_types).tolist() == [
        [False, True, True, True],
        [False] * 4,
    ]


def test_mask_behind_a_cached_row_by_hand():
    seen = torch.tensor([[True], [False]])
    assert gate_behind("none", seen) is None
    assert gate_behind("image_tokens", seen).tolist() == [[False], [False]]
    assert gate_behind("after_image", seen).tolist() == gate_behind("sample", seen).tolist()
    assert gate_behind("sample", seen).tolist() == [[True], [False]]


def test_branches_that_do_not_see_an_image_stay_before_it():
    token_types = torch.tensor([[0, 0, 1, 0]])  # a prefix, a branch with an image, one without
    visible = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]).bool()
    mask = gate_mask("after_image", token_types, attention_mask=visible[None, None])
    assert mask.tolist() == [[False, False, True, False]]
    row = PackedRow([Block(0, 1), Block(1, 2, (0, 1), visible[1:3, :3]),
                     Block(3, 1, (0, 1), visible[3:, [0, 3]])], [4])  # fmt: skip
    assert gate_mask("after_image", token_types, row).tolist() == mask.tolist()
    assert gate_mask("image_tokens", token_types, row).tolist() == [[False, False, True, False]]


def test_adapters_that_cannot_be_gated_are_refused(make_bridge):
    adapter = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    with pytest.raises(ValueError, match="gate 'sample' cannot be on .*mlp.* changes the weight"):
        make_bridge("sample", adapter=adapter)
    make_bridge("none", adapter=adapter)


def test_a_mask_of_floats_does_not_say_who_sees_whom():
    mask = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"\(B, 1, T, T\) is torch.float32; gate 'after_image'"):
        gate_mask("after_image", torch.tensor([[1, 0]]), attention_mask=mask)


def test_a_layer_of_peft_that_sees_heads_apart_takes_a_gate_by_rows_alone(llm_dir):
    from peft import LNTuningConfig
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(vocab_size=64, hidden_size=16, intermediate_size=16, head_dim=8,
                              num_hidden_layers=1, num_attention_heads=4,
                              num_key_value_heads=4)  # fmt: skip
    llm = attach_adapter(Gemma3ForCausalLM(config), LNTuningConfig(target_modules=["q_norm"]))
    gate, ids = Gate(llm, "image_tokens"), torch.arange(4)[None]  # as many tokens as heads
    gate.mask = torch.tensor([[False, True, True, False]])
    with pytest.raises(ValueError, match="q_norm.* does not say which dimension counts tokens"):
        llm(input_ids=ids)
    gate.mask = torch.tensor([[False]])
    shut = llm(input_ids=ids).logits
    with llm.disable_adapter():
        assert torch.equal(shut, llm(input_ids=ids).logits)


def test_a_new_adapter_is_in_the_mode_of_the_bridge(tiny):
    model, _ = tiny
    model.eval().replace_adapter(LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    assert not any(module.training for module in model.language_model.modules())


def test_unknown_gate_and_gate_without_adapter(make_bridge):
    with pytest.raises(
        ValueError, match="gate 'smaple' is unknown; choose one of none, sample, image_"
    ):
        make_bridge("smaple")
    with pytest.raises(ValueError, match="needs an adapter"):
        make_bridge("sample", adapter=None)


def test_a_cache_without_the_gates_mask_is_refused(tiny, images):
    model, processor = tiny
    batch = model_inputs(processor, [[user(images[0], "what?")]])
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="pass adapter_mask"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)
