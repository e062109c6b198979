"""What users of other trainers complain about most, pain by pain; each is impossible here.

Where another file holds the test already, the pain is a further name of it.
"""

import importlib.metadata
import json

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file

from mmpeft import adapters
from mmpeft.bad_rows import BadRows
from mmpeft.data import ConversationDataset
from mmpeft.encoder import TransformersEncoderConfig
from mmpeft.tasks.messages import Messages
from mmpeft.train import train

from . import test_durable, test_model, test_packing, test_processing
from . import test_encoder_transformers as towers
from .conftest import assistant, model_inputs, user

test_image_tokens_that_are_not_the_image_features = (
    test_model.test_images_and_marked_positions_must_agree
)
test_truncation_that_cuts_image_tokens = test_processing.test_too_long_is_an_error_never_cut
test_labels_that_are_not_the_assistants_words = (
    test_processing.test_labels_are_exactly_what_the_assistant_wrote
)
test_resuming_from_a_partial_checkpoint = (
    test_durable.test_the_last_good_checkpoint_is_found_and_torn_ones_are_named
)
test_text_and_image_rows_in_one_batch = (
    test_model.test_a_mixed_batch_gives_each_row_what_it_gets_alone
)
test_packed_samples_that_attend_to_each_other = (
    test_packing.test_a_samples_loss_does_not_change_with_its_neighbours
)
test_lora_on_the_vision_tower = test_model.test_lora_lands_on_full_paths_inside_the_llm_only
test_merged_is_not_base_plus_adapter = test_model.test_merged_equals_base_plus_adapter
test_a_frozen_tower_that_builds_a_graph = test_model.test_no_graph_when_nothing_trains


def chats_file(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Messages(train=str(path))


def refused(task, processor, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        list(ConversationDataset(task, "train", processor))


GOOD = {"messages": [user("q"), assistant("a")]}


def test_a_run_in_which_nothing_is_learned(tiny, tmp_path):
    """A template that marks no words would train with loss 0, or on the wrong tokens."""
    _, processor = tiny
    processor.chat_template = processor.chat_template.replace(
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] + '<|im_end|>' }}{% generation %}{% endgeneration %}",
    )
    refused(chats_file(tmp_path, [GOOD]), processor, "line 1: .*blocks do not hold what")


def test_more_images_than_placeholders_without_the_row(tiny, tmp_path):
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": turns, "images": ["a.png", "b.png"]}]
    refused(chats_file(tmp_path, rows), tiny[1], "line 1: images has 2 images for 1 <image>")
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}]
    row = {"messages": [{"role": "user", "content": parts}, assistant("a")], "images": ["a.png"]}
    refused(chats_file(tmp_path, [GOOD, row]), tiny[1], "line 2: images has 1 images for 2 image")


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG no picture", "cut"])
def test_a_missing_picture_replaced_by_grey(tiny, tmp_path, images, content):
    images[0].save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    if content is None:
        (tmp_path / "a.jpg").unlink()
    else:
        (tmp_path / "a.jpg").write_bytes(whole[:-200] if content == "cut" else content)
    picture = {"type": "image", "image": "a.jpg"}
    row = {"messages": [{"role": "user", "content": [picture]}, assistant("a")]}
    task = chats_file(tmp_path, [GOOD, row])
    refused(task, tiny[1], r"line 2: image 1: .*a\.jpg .*(exist|damaged|not an image)")


def test_over_long_samples_dropped_without_a_word(tiny, tmp_path):
    task = chats_file(tmp_path, [GOOD, {"messages": [user("x" * 600), assistant("a")]}])
    refused(task, tiny[1], "line 2: .* tokens .*do not fit the context of 512")
    skipping = BadRows(limit=1)  # where it is asked for, it is counted and listed
    dataset = ConversationDataset(task, "train", tiny[1], bad_rows=skipping)
    assert len(list(dataset)) == 2
    (listed,) = skipping.rows
    assert listed["row"] == 2 and "do not fit the context of 512" in str(listed)


def test_a_checkpoint_in_the_middle_without_the_connector(recipe):
    """With LoRA, others save the adapter alone until the end."""
    run = train(
        recipe, ["--align", "null", "--instruct.max_steps", "4", "--instruct.save_steps", "2"]
    )
    saved = sorted((run / "stages/instruct").glob("checkpoint-*"))
    assert saved
    final = load_file(run / "checkpoint/connector.safetensors")
    for folder in saved:
        there = load_file(folder / "connector.safetensors")
        assert there.keys() == final.keys() and (folder / "adapter").is_dir()
    last = load_file(run / "stages/instruct/checkpoint-4/connector.safetensors")
    assert all(torch.equal(last[key], final[key]) for key in final)


def test_a_hang_when_text_and_image_batches_mix_over_processes(recipe, monkeypatch):
    """Each process would wait for gradients that the other does not have."""
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="training runs in one process .* here are 2 processes"):
        train(recipe)


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_the_first_patch_of_siglip_dropped_as_if_it_were_a_class_token(tmp_path, name):
    from transformers import ViTImageProcessor

    cls, config, prefix = towers.TOWERS[name]
    model = towers.random(cls, config)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    encoder = TransformersEncoderConfig(str(tmp_path)).build()
    with torch.no_grad():
        states = model(towers.pixels()).last_hidden_state
    assert encoder(towers.pixels()).shape[1] == 16 == states.shape[1] - prefix
    torch.testing.assert_close(encoder(towers.pixels())[:, 0], states[:, prefix])


@pytest.mark.parametrize("gate", ["none", "sample"])
def test_types_that_clash_under_a_frozen_llm_of_16_bits(make_bridge, images, gate):
    model, processor = make_bridge(gate, dtype="bfloat16")
    adapters.set_trainable(model, connector=True, adapter=True)
    model.train()
    batch = model_inputs(processor, [[user(images[0], "what?")], [user("text")]])
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert loss.isfinite() and {p.dtype for p in trained} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    model.eval()
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 2


def test_a_demo_broken_by_the_next_release_of_its_web_framework():
    """Held below the next major version; tests/test_chat.py talks to the page as it is served."""
    wanted = [Requirement(line) for line in importlib.metadata.requires("mmpeft")]
    (gradio,) = [one for one in wanted if one.name == "gradio"]
    assert gradio.specifier.contains("6.1") and not gradio.specifier.contains("7.0")
