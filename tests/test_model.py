"""The bridge as a transformers model."""

import pytest
import torch
import torch.nn.functional as F
from peft import MontecloraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

import mmpeft
from mmpeft import adapters

from .conftest import assistant, model_inputs, user

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(tiny, images, side):
    model, processor = tiny
    processor.tokenizer.padding_side = side
    chats = [
        [user("no image at all")],
        [user(images[0], "one")],
        [user("first ", images[1], " then ", images[2], " compare")],
    ]
    batch = model_inputs(processor, chats)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = model(**batch, position_ids=positions).logits
    for row, chat in enumerate(chats):
        alone = model(**model_inputs(processor, [chat])).logits[0]
        real = together[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(real, alone, atol=2e-5, rtol=1e-4)


def test_generation_in_a_batch_equals_generation_alone(tiny, images):
    model, processor = tiny
    chats = [[user("x")], [user(images[0], "one")], [user(images[1], images[2], "a longer one")]]
    batch = model_inputs(processor, chats)
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, chat in enumerate(chats):
        single = model_inputs(processor, [chat])
        alone = model.generate(**single, **GREEDY)[0, single["input_ids"].shape[1] :]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_images_are_encoded_once_in_generation(tiny, images, monkeypatch):
    model, processor = tiny
    calls = []
    encode = type(model.vision_encoder).forward
    monkeypatch.setattr(
        type(model.vision_encoder),
        "forward",
        lambda self, x: calls.append(len(x)) or encode(self, x),
    )
    batch = model_inputs(processor, [[user(images[0], "a")], [user(images[1], images[2], "b")]])
    model.generate(**batch, **GREEDY)
    model.generate(**batch, **GREEDY, num_beams=3)
    assert calls == [3, 3]


def test_beams_keep_each_rows_images(tiny, images):
    """One beam group of a mixed batch equals the same row searched alone."""
    model, processor = tiny
    chats = [[user("none")], [user(images[0], images[1], "two")], [user(images[2], "one")]]
    options = GREEDY | {"num_beams": 2}
    batch = model_inputs(processor, chats)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, chat in enumerate(chats):
        single = model_inputs(processor, [chat])
        alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_logits_to_keep(tiny, images):
    model, processor = tiny
    batch = model_inputs(processor, [[user(images[0], "what?")]])
    full = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, full[:, -3:])


def test_loss_is_the_mean_cross_entropy_of_supervised_tokens(tiny, images):
    model, processor = tiny
    chats = [[user(images[0], "a"), assistant("yes")], [user("b"), assistant("a longer answer")]]
    processor.tokenizer.padding_side = "right"
    batch = model_inputs(
        processor, chats, add_generation_prompt=False, return_assistant_tokens_mask=True
    )
    mask = batch.pop("assistant_masks")
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    logits = model(**batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for training in (False, True):
        model.train(training)
        out = model(**batch, labels=labels)
        torch.testing.assert_close(out.loss, expected)
        assert (out.logits is None) == training
    halved = model(**batch, labels=labels, num_items_in_batch=2 * int(mask.sum())).loss
    torch.testing.assert_close(halved, expected / 2)


def test_the_vocabulary_projection_runs_at_supervised_positions_only(tiny):
    model, processor = tiny
    batch = model_inputs(processor, [[user("question"), assistant("yes")]])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -4:] = batch["input_ids"][0, -4:]
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape[:2])))
    model.train()
    model(**batch, labels=labels)
    assert seen == [(1, 4)]


def test_gradient_reaches_connector_and_adapter_and_nothing_else(tiny, images):
    model, processor = tiny
    adapters.set_trainable(model, connector=True, adapter=True)
    model.train()
    batch = model_inputs(processor, [[user(images[0], "what?")]])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    allowed = {n for n, _ in model.named_parameters() if n.startswith("connector") or "lora_" in n}
    assert moved == allowed


def test_no_graph_when_nothing_trains(tiny, images):
    model, processor = tiny
    model.requires_grad_(False)
    batch = model_inputs(processor, [[user(images[0], "what?")]])
    assert not model(**batch).logits.requires_grad
    assert not model.vision_encoder(batch["pixel_values"]).requires_grad


def test_frozen_parts_stay_in_eval_mode(make_bridge):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    model, _ = make_bridge(adapter=adapter)
    model.train()
    training = {n for n, m in model.named_modules() if m.training and not list(m.children())}
    assert training
    assert all(n.startswith("connector") or "lora_" in n for n in training)


def test_vocabulary_and_embeddings_are_untouched(tiny, llm_dir):
    model, processor = tiny
    base = AutoModelForCausalLM.from_pretrained(llm_dir)
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert len(processor.tokenizer) == base.config.vocab_size
    with pytest.raises(ValueError, match="never touched"):
        model.resize_token_embeddings(500)


def test_lora_lands_on_full_paths_inside_the_llm_only(tiny):
    model, _ = tiny
    hit = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert hit == {
        f"language_model.base_model.model.model.layers.{i}.self_attn.{p}"
        for i in range(2) for p in ("q_proj", "v_proj")
    }  # fmt: skip


def test_a_target_that_hits_nothing_is_an_error(make_bridge):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="'q_porj' names no linear layer.*Did you mean q_proj"):
        make_bridge(adapter=LoraConfig(target_modules=["q_porj"]))


@pytest.mark.parametrize(("option", "value"), [
    ("init_lora_weights", "lora_ga"), ("bias", "lora_only"),
    ("modules_to_save", ["lm_head"]), ("layers_to_transform", [0]), ("layer_replication", [(0, 2)]),
    ("trainable_token_indices", [1]), ("use_qalora", True), ("alora_invocation_tokens", [1]),
    ("layers_to_transform", 0), ("monteclora_config", MontecloraConfig()),
])  # fmt: skip
def test_an_adapter_that_is_more_than_an_addition_is_refused(make_bridge, option, value):
    from peft import LoraConfig

    adapter = LoraConfig(target_modules=["q_proj"], **{option: value})
    with pytest.raises(ValueError, match=f"^adapter: {option} .*; (leave it out|set|write) ?.*$"):
        make_bridge("none", adapter=adapter)


def test_an_option_that_wants_its_own_training_loop_is_refused(make_bridge):
    from peft import AdamssConfig

    adapter = AdamssConfig(target_modules=["q_proj"], use_asa=True)
    with pytest.raises(ValueError, match="^adapter: use_asa True moves subspaces .*; leave it out"):
        make_bridge("none", adapter=adapter)


def test_prompts_that_nothing_here_stands_for_are_refused(make_bridge):
    from peft import MultitaskPromptTuningConfig

    adapter = MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2)
    with pytest.raises(ValueError, match="puts prompts of its own kind.*PromptConfig"):
        make_bridge("none", adapter=adapter)


def test_an_adapters_config_serves_a_second_deeper_llm():
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from mmpeft.adapters import adapter_parameters, attach_adapter

    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    for layers in (1, 3):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        llm = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=8))
        assert len(adapter_parameters(attach_adapter(llm, adapter))) == 2 * layers
    assert adapter.target_modules == {"q_proj"}


def test_images_and_marked_positions_must_agree(tiny, images):
    model, processor = tiny
    batch = model_inputs(processor, [[user(images[0], "what?")]])
    twice = batch["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="image_sizes stands for 1 tiles, pixel_values has 2"):
        model(**{**batch, "pixel_values": twice})
    with pytest.raises(ValueError, match="give 32 image tokens, but.*marks 16"):
        model(**{**batch, "pixel_values": twice, "image_sizes": None})
    with pytest.raises(ValueError, match="no image was passed"):
        model(input_ids=batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"])
    with pytest.raises(ValueError, match="make the inputs with BridgeProcessor"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])


def test_images_are_not_cut_into_chunks(tiny, images):
    model, processor = tiny
    batch = model_inputs(processor, [[user(images[0], "what?")]])
    with pytest.raises(ValueError, match="images enter in one piece: leave out prefill_chunk_size"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=8)
    batch = model_inputs(processor, [[user("a text of some words")]])
    whole = model.generate(**batch, max_new_tokens=4, do_sample=False)
    cut = model.generate(**batch, max_new_tokens=4, do_sample=False, prefill_chunk_size=8)
    assert cut.equal(whole)


def test_merged_equals_base_plus_adapter(make_bridge, images):
    model, processor = make_bridge("none")
    batch = model_inputs(processor, [[user(images[0], "what?")], [user("text")]])
    before = model(**batch).logits
    torch.testing.assert_close(model.merge_adapter()(**batch).logits, before, atol=1e-4, rtol=1e-4)


def test_a_gated_adapter_does_not_merge(tiny):
    with pytest.raises(ValueError, match="cannot be merged"):
        tiny[0].merge_adapter()


def test_pipeline_and_auto_classes(tiny, images, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), mmpeft.BridgeConfig)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    auto_processor = AutoProcessor.from_pretrained(tmp_path)
    chat = [user(images[0], "what is this?")]
    answer = pipeline("image-text-to-text", model=loaded, processor=auto_processor)
    (result,) = answer(text=chat, max_new_tokens=6, return_full_text=False, do_sample=False)
    batch = model_inputs(processor, [chat])
    new = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    assert result["generated_text"] == processor.tokenizer.decode(new[0], skip_special_tokens=True)


def test_activation_checkpointing_gives_the_same_gradient(tiny, images):
    model, processor = tiny
    adapters.set_trainable(model, connector=True, adapter=True)
    model.train()
    batch = model_inputs(processor, [[user(images[0], "what?")], [user("text")]])
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
