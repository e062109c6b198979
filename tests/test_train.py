"""Training end to end on tiny parts: stages, run folder, kill -9 and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import mmpeft
from mmpeft import adapters
from mmpeft.train import train

from .conftest import assistant, user


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["stage"], row["step"]): row["loss"] for row in rows if "loss" in row}


def test_a_run_leaves_everything_needed(recipe):
    run = train(recipe)
    model, _ = mmpeft.load(run)
    assert model.config.gate == "sample"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "loss.png", "checkpoint"):
        assert (run / name).exists()
    assert [s for (stage, s) in losses(run) if stage == "instruct"] == list(range(1, 9))
    size = sum(f.stat().st_size for f in (run / "checkpoint").rglob("*") if f.is_file())
    assert size < 20e6
    values = list(losses(run).values())
    assert values[-1] < values[0]


def test_align_trains_the_connector_and_leaves_the_adapter(recipe, capsys):
    overrides = ["--instruct", "null", "--output_dir", str(recipe.parent / "align")]
    run = train(recipe, overrides)
    state = load_file(run / "checkpoint/adapter/adapter_model.safetensors")
    assert all(v.eq(0).all() for k, v in state.items() if "lora_B" in k)
    assert "stage align" in capsys.readouterr().err


def test_each_part_has_its_learning_rate(recipe):
    from mmpeft import config
    from mmpeft.data import Collator, ConversationDataset
    from mmpeft.train import build
    from mmpeft.trainer import BridgeTrainer

    parsed, _ = config.load(recipe)
    model, processor = build(parsed)
    from mmpeft.adapters import set_trainable

    set_trainable(model, connector=True, adapter=True)
    parsed.instruct.output_dir = str(recipe.parent / "t")
    dataset = ConversationDataset(parsed.data.task, "train", processor)
    trainer = BridgeTrainer(
        model=model, args=parsed.instruct, train_dataset=dataset, data_collator=Collator(0)
    )
    parsed.instruct.weight_decay = 0.1
    groups = trainer.create_optimizer().param_groups
    assert {g["lr"] for g in groups} == {1e-4, 1e-2}
    for group in groups:  # biases and norms do not decay, as in transformers
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} == trained


@pytest.fixture
def replay(jsonl):
    """Overrides that mix in three text rows, as half of all samples."""
    text = [{"messages": [user(f"say {i}"), assistant("words " * 8)]} for i in range(3)]
    return ["--data.replay", "Messages", "--data.replay.init_args.train",
            str(jsonl(text, "replay.jsonl")), "--data.replay_share", "0.5"]  # fmt: skip


def test_replay_joins_stage_instruct_and_only_that(recipe, replay, capsys):
    plain = train(recipe, ["--model.gate", "none"])
    mixed = train(
        recipe, ["--model.gate", "none", *replay, "--output_dir", str(recipe.parent / "mixed")]
    )
    assert "12 of them (50.0%), from 3 rows, each seen 4 times a pass" in capsys.readouterr().err
    same = [losses(plain)[key] == losses(mixed)[key] for key in losses(plain)]
    assert same == [stage == "align" for stage, _ in losses(plain)]
    with pytest.raises(FileNotFoundError, match="gone.jsonl does not exist"):
        train(recipe, [*replay[:3], "gone.jsonl", "--output_dir", str(recipe.parent / "gone")])
    assert not (recipe.parent / "gone").exists()


def test_replay_that_a_gate_keeps_from_the_adapter_is_refused(recipe, replay):
    for gate in ("sample", "image_tokens", "after_image"):
        with pytest.raises(ValueError, match=f"no picture, and under gate '{gate}' text never"):
            train(recipe, [*replay, "--model.gate", gate])
    assert not (recipe.parent / "run").exists()


def test_stage_align_learns_from_its_own_task(recipe, jsonl, capsys):
    picture = {"type": "image", "image": "0.png"}
    captions = [{"messages": [user(), assistant("an owl " * i)]} for i in (1, 2)]
    for row in captions:
        row["messages"][0]["content"] = [picture]
    own = ["--data.align", "Messages", "--data.align.init_args.train"]
    plain = train(recipe)
    aligned = train(recipe, [*own, str(jsonl(captions, "captions.jsonl")),
                             "--output_dir", str(recipe.parent / "aligned")])  # fmt: skip
    assert losses(plain).keys() == losses(aligned).keys()
    assert losses(plain)["instruct", 1] != losses(aligned)["instruct", 1]
    with pytest.raises(FileNotFoundError, match="gone.jsonl does not exist"):
        train(recipe, [*own, "gone.jsonl", "--output_dir", str(recipe.parent / "gone")])
    without = ["--align", "null", "--output_dir", str(recipe.parent / "without")]
    assert train(recipe, [*own, "gone.jsonl", *without]).is_dir()


@pytest.mark.parametrize("cut", [["--instruct.per_device_train_batch_size", "1",
                                  "--instruct.gradient_accumulation_steps", "2"]])  # fmt: skip
@pytest.mark.parametrize("adapter", [[], ["--model.adapter", json.dumps(
    {"class_path": "AdaMixConfig", "init_args": {"consistency": 100.0}})]])  # fmt: skip
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(recipe, cut, adapter):
    whole = train(recipe, adapter)
    pieces = train(recipe, [*adapter, *cut, "--output_dir", str(recipe.parent / "cut")])
    torch.testing.assert_close(
        list(losses(whole).values()), list(losses(pieces).values()), atol=1e-4, rtol=1e-4
    )


def test_an_existing_run_folder_is_never_written_to(recipe):
    train(recipe)
    with pytest.raises(FileExistsError, match="exists; continue it with --resume"):
        train(recipe)
    with pytest.raises(ValueError, match="begun with another .*: instruct.max_steps differ"):
        train(recipe, ["--instruct.max_steps", "9"], resume=True)


def test_nothing_to_resume(recipe):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(recipe, resume=True)


@pytest.mark.parametrize("kill_after", [("align", 2), ("instruct", 10)])
def test_killed_and_resumed_equals_uninterrupted(recipe, replay, kill_after):
    steps = ["--instruct.max_steps", "24", "--instruct.logging_steps", "1", "--model.gate", "none",
             *replay]  # fmt: skip
    reference = train(recipe, [*steps, "--output_dir", str(recipe.parent / "whole")])

    killed = recipe.parent / "killed"
    arguments = [str(recipe), *steps, "--output_dir", str(killed)]
    command = [sys.executable, "-m", "mmpeft", "train", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    stage, step = kill_after
    waiting_for = killed / "stages" / stage / f"checkpoint-{step}"
    deadline = time.time() + 120
    while not waiting_for.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert waiting_for.exists() and not (killed / "checkpoint").exists()

    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert losses(killed) == losses(reference)
    for file in ("connector.safetensors", "adapter/adapter_model.safetensors"):
        whole = load_file(reference / "checkpoint" / file)
        resumed = load_file(killed / "checkpoint" / file)
        assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_mistake_is_named_and_leaves_no_run_folder(recipe):
    data = recipe.parent / "data.jsonl"
    data.write_text(data.read_text().replace("3.png", "gone.png"))
    with pytest.raises(FileNotFoundError, match=r"data.jsonl line 4: image 1: .*gone.png"):
        train(recipe)
    with pytest.raises(ValueError, match="language_model 'nobody/nothing' cannot be loaded"):
        train(recipe, ["--model.language_model", "nobody/nothing"])
    assert not (recipe.parent / "run").exists()


def test_a_run_starts_from_another_bridge(recipe, make_bridge, tmp_path):
    """Connector from the bridge, a new adapter on top; nothing is calibrated again."""
    from peft import LoraConfig

    from mmpeft import BridgeProcessor

    start, processor = make_bridge("none", adapter=None)
    start.connector.output_scale.fill_(0.7)
    start.save_pretrained(tmp_path / "start")
    processor.chat_template = "{# its own #}" + processor.chat_template
    processor.save_pretrained(tmp_path / "start")
    text = recipe.read_text()
    own = [line for line in text.splitlines() if "TimmEnc" in line or "MLPConn" in line]
    for line in [*own, next(line for line in text.splitlines() if "language_model" in line)]:
        text = text.replace(line + "\n", "")
    recipe.write_text(text.replace("model:", f"model:\n  start_from: {tmp_path / 'start'}"))
    run = train(recipe, ["--instruct.max_steps", "1", "--align", "null"])
    model, processor = mmpeft.load(run)
    assert isinstance(model.language_model.peft_config["default"], LoraConfig)
    assert processor.chat_template.startswith("{# its own #}") and processor.max_length == 512
    assert model.connector.output_scale == torch.tensor(0.7) and model.config.gate == "sample"
    moved = (model.connector.layers[0].weight - start.connector.layers[0].weight).abs().max()
    assert 0 < moved < 1e-2
    assert isinstance(BridgeProcessor.from_model(model), BridgeProcessor)

    again = recipe.with_name("again.yaml")  # goes on with the adapter it finds
    again.write_text(recipe.read_text().replace(str(tmp_path / "start"), str(run)))
    options = ["--align", "null", "--output_dir", str(tmp_path / "next")]
    with pytest.raises(ValueError, match="has an adapter already, trained with gate 'sample'"):
        train(again, options)
    train(again, [*options, "--model.adapter", "null"])
    with pytest.raises(ValueError, match="brings the parts of .*; leave out language_model"):
        train(again, [*options, "--model.language_model", "other"])


def test_a_run_goes_on_under_another_spelling_and_in_another_place(recipe, monkeypatch):
    run = train(recipe)
    moved = run.rename(run.with_name("moved"))
    for folder in (f"{moved}/", str(moved)):
        assert train(recipe, ["--output_dir", folder], resume=True) == moved
    (moved / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"moved/config.yaml holds no keys"):
        train(recipe, ["--output_dir", str(moved)], resume=True)


def test_a_stage_without_a_step_leaves_no_run_folder(recipe):
    words = ["--instruct.dataloader_drop_last=true", "--instruct.per_device_train_batch_size=50"]
    with pytest.raises(ValueError, match="instruct: 12 samples are less than a batch of 50"):
        train(recipe, words)
    assert not (recipe.parent / "run").exists()


def test_samples_longer_than_a_table_of_positions_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    from mmpeft.language_model import check_context

    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=32))
    opt = OPTForCausalLM(OPTConfig(
        hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=32,
        max_position_embeddings=16, word_embed_proj_dim=8,
    ))  # fmt: skip
    for llm in (gpt, opt):
        check_context(llm, 16)
        check_context(llm, None)
        with pytest.raises(ValueError, match="max_length is 17, .* has learned 16 positions"):
            check_context(llm, 17)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_that_train_alone_move_in_any_type(recipe, capsys, dtype):
    adapter = ["--model.adapter", "LNTuningConfig", "--model.gate", "none", "--align", "null"]
    rate = ["--instruct.adapter_learning_rate", "2e-4", "--model.dtype", dtype]
    model, _ = mmpeft.load(train(recipe, [*adapter, *rate]))
    moved = 0
    for layer in model.language_model.modules():
        if isinstance(layer, BaseTunerLayer):
            (name,) = layer.adapter_layer_names
            (own,) = list(getattr(layer, name).parameters())
            moved += not torch.equal(own.float(), layer.base_layer.weight.float())
    assert moved == 5  # two norms a layer, and the last
    said = "taken as FullTuningConfig" in capsys.readouterr().err
    assert said == (dtype == "bfloat16")


def test_schedules_start_from_rates_of_the_stage(recipe):
    """Polynomial decay divides by the optimizer's own, which Adafactor has none of."""
    words = ["--instruct.lr_scheduler_type", "polynomial", "--instruct.optim", "adafactor"]
    train(recipe, [*words, "--align", "null"])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"side_effect": ImportError("install lomo-optim")}, "instruct.optim lomo: install lomo"),
        ({"return_value": (None, {"lr": 1, "model": 0})}, "instruct.optim lomo groups parameters"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_before_the_run_has_a_folder(
    recipe, tmp_path, monkeypatch, found, message
):
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", Mock(**found))
    words = ["--align", "null", "--instruct.optim", "lomo", "--output_dir", str(tmp_path / "new")]
    with pytest.raises(ValueError, match=message):
        train(recipe, words)
    assert not (tmp_path / "new").exists()


def test_a_schedule_ends_at_its_share_of_each_rate(recipe):
    ends = {}

    class Ends(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            ends.update({group["initial_lr"]: group["lr"] for group in optimizer.param_groups})

    train(recipe, [
        "--align", "null", "--instruct.lr_scheduler_type", "cosine_with_min_lr",
        "--instruct.lr_scheduler_kwargs", '{"min_lr_rate": 0.8}', "--model.gate", "none",
    ], callbacks=[Ends()])  # fmt: skip
    assert ends == {1e-4: pytest.approx(8e-5), 1e-2: pytest.approx(8e-3)}


def test_a_frozen_adapter_drops_out_nothing(make_bridge):
    model, _ = make_bridge("none", adapter=LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    for connector, adapter in ((True, False), (True, True)):
        adapters.set_trainable(model, connector=connector, adapter=adapter)
        model.train()
        dropouts = [m for m in model.language_model.modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts and all(m.training == adapter for m in dropouts)
