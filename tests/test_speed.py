"""Every lever of ``speed:`` can be switched off and changes nothing but the time."""

import json

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from mmpeft import adapters, config, speed
from mmpeft.data import Collator, ConversationDataset
from mmpeft.train import train

from .conftest import assistant, user
from .test_data import InMemory
from .test_packing import gradients, samples_of
from .test_train import losses


@pytest.fixture
def group_recipe(recipe, tmp_path):
    """The tiny recipe without stage align."""
    recipe.write_text(recipe.read_text().replace("align: {", "align: null #{"))
    return recipe


LEVERS = {
    "packing": ["--speed.packing", "false"],
    "pad_to_multiple_of": ["--speed.pad_to_multiple_of", "1"],
    "supervised_logits": ["--speed.supervised_logits", "false"],
    "logits_chunk": ["--speed.logits_chunk", "2"],
    "compile": ["--speed.compile", "on"],
    "workers": ["--instruct.dataloader_num_workers", "1"],
}


@pytest.fixture
def plain_losses(group_recipe):
    return losses(train(group_recipe))


class Spy(TrainerCallback):
    """What training does, as its model and its data loader tell."""

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        batch = next(iter(train_dataloader))
        self.seen = {
            "packing": "packed" in batch,
            "pad_to_multiple_of": batch["input_ids"].shape[1] % 32 == 0,
            "supervised_logits": model.supervised_logits,
            "logits_chunk": model.logits_chunk,
            "compile": model.compiled_layers,
            "workers": train_dataloader.num_workers,
        }


def test_levers_are_on_unless_switched_off(group_recipe):
    spy = Spy()
    train(group_recipe, callbacks=[spy])
    assert spy.seen == {
        "packing": True, "pad_to_multiple_of": True, "supervised_logits": True,
        "logits_chunk": 2048, "compile": 0, "workers": 0,
    }  # fmt: skip


SWITCHED = {
    "packing": False, "pad_to_multiple_of": False, "supervised_logits": False, "logits_chunk": 2,
    "compile": 2, "workers": 1,
}  # fmt: skip


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_no_loss(group_recipe, plain_losses, lever):
    output, spy = ["--output_dir", str(group_recipe.parent / lever)], Spy()
    changed = losses(train(group_recipe, [*LEVERS[lever], *output], callbacks=[spy]))
    assert spy.seen[lever] == SWITCHED[lever]
    assert changed.keys() == plain_losses.keys() and len(changed) == 8
    for step, loss in changed.items():
        assert loss == pytest.approx(plain_losses[step], rel=2e-3)


def test_layers_compile_only_in_stages_long_enough(make_bridge):
    model, _ = make_bridge("none")
    assert not speed.compile_layers(model, "auto", steps=199)
    assert not speed.compile_layers(model, "off", steps=10_000)
    assert speed.compile_layers(model, "auto", steps=200)


def test_without_a_compiler_auto_says_so_and_on_is_an_error(make_bridge, monkeypatch, capsys):
    model, _ = make_bridge("none")
    monkeypatch.setattr(speed, "_compiler_problem", lambda device: "No working C++ compiler found.")
    assert not speed.compile_layers(model, "auto", steps=10_000)
    assert "compile off: torch cannot compile here: No working" in capsys.readouterr().err
    with pytest.raises(ValueError, match="set speed.compile: off"):
        speed.compile_layers(model, "on", steps=1)


def test_layers_that_are_not_compiled_are_told(make_bridge, capsys):
    model, _ = make_bridge("none")
    assert speed.compile_layers(model, "auto", steps=10_000, packed_checkpointing=True)
    assert "layers with activation checkpointing are not compiled" in capsys.readouterr().err


def test_samples_longer_than_a_window_are_not_packed(make_bridge, capsys):
    model, _ = make_bridge("none")
    model.language_model.config.sliding_window = 64
    assert speed.can_pack(model, 64)
    assert not speed.can_pack(model, 65)
    assert "packing off: samples may be longer than the window of 64" in capsys.readouterr().err


def graph_of(model, batch):
    """Whether each layer of the LLM, first to last, gave out something with a gradient."""
    seen, hooks = [], []
    for layer in model.language_model.get_base_model().model.layers:
        hook = layer.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
        hooks.append(hook)
    model.train()
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("connector", "expected"), [(False, [False, True]), (True, [True, True])])
def test_no_graph_below_the_first_trained_layer(make_bridge, images, connector, expected):
    from peft import LoraConfig

    model, processor = make_bridge("none", LoraConfig(r=2, target_modules=r".*layers\.1.*q_proj"))
    adapters.set_trainable(model, connector=connector, adapter=True)
    chat = [user(images[0], "what?"), assistant("this")]
    dataset = ConversationDataset(InMemory(chats=[chat], keys=[None]), "train", processor)
    assert graph_of(model, Collator(0)(list(dataset))) == expected
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any("lora_" in name for name in touched)
    assert any(name.startswith("connector") for name in touched) == connector
    assert not any(name.startswith("vision_encoder") for name in touched)


def test_a_frozen_connector_is_not_trained(group_recipe):
    from safetensors.torch import load_file

    still = train(group_recipe, ["--instruct.freeze_connector", "true"])
    (path,) = (still / "checkpoint").glob("connector*.safetensors")
    frozen = load_file(path)
    moved = train(group_recipe, ["--output_dir", str(group_recipe.parent / "moved")])
    trained = load_file(moved / "checkpoint" / path.name)
    assert any(not torch.equal(frozen[key], trained[key]) for key in frozen)
    again = train(group_recipe, ["--instruct.freeze_connector", "true", "--instruct.max_steps", "1",
                                 "--output_dir", str(group_recipe.parent / "again")])  # fmt: skip
    other = load_file(again / "checkpoint" / path.name)
    assert all(torch.equal(frozen[key], other[key]) for key in frozen)
    rows = [json.loads(line) for line in (still / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] > 0


def test_optimizer_states_only_for_what_trains(group_recipe):
    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.states = {id(p) for p in optimizer.optimizer.state}
            self.trained = {id(p) for p in model.parameters() if p.requires_grad}
            self.fused = optimizer.param_groups[0]["fused"]

    look = Look()
    train(group_recipe, callbacks=[look])
    assert look.states == look.trained and look.fused


def test_what_cannot_work_is_refused_by_name(recipe):
    for option, value, message in (
        ("speed.pad_to_multiple_of", "0", "it must be 1 or more"),
        ("speed.logits_chunk", "-1", "it must be 1 or more"),
        ("instruct.torch_compile", "true", "set speed.compile: on"),
    ):
        with pytest.raises(ValueError, match=message):
            config.load(recipe, [f"--{option}", value])


def test_autocast_runs_where_there_is_a_cpu_alone(group_recipe, plain_losses):
    run = train(group_recipe, ["--instruct.bf16", "true", "--output_dir",
                               str(group_recipe.parent / "bf16")])  # fmt: skip
    for step, loss in losses(run).items():
        assert loss == pytest.approx(plain_losses[step], rel=0.05)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("compiling", ["off", "on"])
def test_layers_may_recompute_their_activations(group_recipe, plain_losses, every, compiling):
    run = train(
        group_recipe,
        ["--instruct.activation_checkpointing", "true", "--speed.compile", compiling,
         "--instruct.activation_checkpointing_kwargs", json.dumps({"every_n_layers": every}),
         "--output_dir", str(group_recipe.parent / "recompute")],
    )  # fmt: skip
    for step, loss in losses(run).items():
        assert loss == pytest.approx(plain_losses[step], rel=2e-3)


def test_a_compiled_gate_treats_samples_apart(tiny, images):
    model, processor = tiny
    speed.can_pack(model, None)
    samples = samples_of(processor, images)
    collate = Collator(0, packing=True, pad_to_multiple_of=32)
    batches = [collate(samples), collate(samples[:1]), collate(samples[-1:]), collate(samples[1:])]
    with speed.compiled(model, False):
        expected = gradients(model, batches)
    speed.compile_layers(model, "on", 1)
    before = counters["stats"]["unique_graphs"]
    with speed.compiled(model, True):
        loss, found = gradients(model, batches)
    assert counters["stats"]["unique_graphs"] > before
    torch.testing.assert_close(loss, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, expected[1], atol=1e-3, rtol=1e-3)
