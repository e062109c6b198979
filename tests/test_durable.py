"""What breaks while it is written, and runs that end before their time: whole, said, resumed."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

import mmpeft
from mmpeft import cli, durable, feature_cache, feature_setup, nonfinite
from mmpeft.feature_store import FeatureStore
from mmpeft.run_folder import differing, start_run_folder
from mmpeft.stopping import Stopped, worker_died
from mmpeft.tasks.messages import Messages
from mmpeft.train import train
from mmpeft.trainer import BridgeTrainer, total_steps

from .conftest import assistant, user
from .test_train import losses

HARD = ["--instruct.gradient_accumulation_steps", "2", "--instruct.per_device_train_batch_size",
        "1", "--instruct.logging_steps", "3", "--align", "null", "--instruct.save_steps", "4",
        "--model.adapter.init_args.lora_dropout", "0.2", "--model.gate", "none",
        "--data.augmentation", "[{class_path: torchvision.transforms.v2.RandomRotation, "
        "init_args: {degrees: 30}}]", "--data.replay_share", "0.4",
        "--instruct.kl_weight", "0.1"]  # fmt: skip
SHORT = ["--align", "null", "--instruct.max_steps", "6"]


@pytest.fixture
def hard(jsonl):
    """Everything that is drawn or summed up on the way: dropout, order, augmentation, loss, KL."""
    text = [{"messages": [user(f"say {i}"), assistant("words " * 4)]} for i in range(3)]
    replay = ["--data.replay", "Messages", "--data.replay.init_args.train"]
    return [*HARD, *replay, str(jsonl(text, "replay.jsonl"))]


def named(recipe, name):
    return ["--output_dir", str(recipe.parent / name)]


def assert_same(run, other):
    assert losses(run) == losses(other)
    for file in ("connector.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(folder / "checkpoint" / file) for folder in (run, other))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


class At(TrainerCallback):
    """Does something once, when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and self.action:
            action, self.action = self.action, None
            action()


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def full(monkeypatch):
    """``full(n)``: the disk is full from the n-th file on that is put on it."""

    def fill(number):
        fsync, calls = os.fsync, []

        def fsync_or_fail(handle):
            calls.append(handle)
            if len(calls) >= number:
                raise OSError(errno.ENOSPC, "")
            return fsync(handle)

        monkeypatch.setattr(os, "fsync", fsync_or_fail)
        return lambda: monkeypatch.setattr(os, "fsync", fsync)

    return fill


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, full):
    path = tmp_path / "f.json"
    durable.write(path, "old")
    full(1)
    with pytest.raises(durable.NotWritten, match=r"f.json could not be written: No space left"):
        durable.write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path, full):
    path = tmp_path / "best"
    with durable.whole_folder(path) as new:
        (new / "a").write_text("1")
    room = full(2)
    with (
        pytest.raises(durable.NotWritten, match="No space left"),
        durable.whole_folder(path) as new,
    ):
        (new / "a").write_text("2")
        (new / "b").write_text("2")
    assert (path / "a").read_text() == "1" and list(tmp_path.iterdir()) == [path]
    assert durable.problem(path) is None
    room()
    with durable.whole_folder(path) as new:
        (new / "b").write_text("2")
    assert {file.name for file in path.iterdir()} == {"b", durable.CHECKSUMS}
    refused = pytest.raises(durable.NotWritten, match="best could not be written: write failed$")
    with refused, durable.whole_folder(path):
        raise RuntimeError("write failed\nand where in C++")  # as torch says it
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    left = tmp_path / ".checkpoint-2.partial" / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "half").touch()
    with durable.whole_folder(tmp_path / "checkpoint-2") as new:
        assert not list(new.iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint-2"]


def test_a_folder_is_never_lost_between_its_two_renames(tmp_path, monkeypatch):
    path, rename = tmp_path / "best", Path.rename

    def write(what):
        with durable.whole_folder(path) as new:
            (new / "a").write_text(what)

    def renamed_but_new(self, target):
        if self.parent.name == ".best.partial" and self.name == "best":
            raise OSError(errno.EIO, "")
        return rename(self, target)

    write("1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renamed_but_new)
        with pytest.raises(durable.NotWritten):
            write("2")
    assert (path / "a").read_text() == "1" and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".best.partial").mkdir()
    path.rename(tmp_path / ".best.partial" / "best.old")  # as a kill there leaves it
    with pytest.raises(KeyError), durable.whole_folder(path):
        raise KeyError
    assert (path / "a").read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "run"
    with (
        pytest.raises(FileExistsError, match="run was made by another process meanwhile"),
        durable.whole_folder(path, replace=False),
    ):
        path.mkdir()
        (path / "metrics.jsonl").touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]
    with pytest.raises(FileExistsError):
        start_run_folder(path, "", None)
    assert [file.name for file in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]


def test_no_folder_is_opened_where_the_system_refuses_that(tmp_path, monkeypatch):
    """On Windows, where a file must be open for writing, besides."""
    opened, open_ = [], os.open

    def recorded(path, flags, *args, **kwargs):
        if not Path(path).name.startswith(".") and flags in (os.O_RDONLY, os.O_RDWR):
            opened.append((Path(path).name, flags))
        return open_(path, flags, *args, **kwargs)

    monkeypatch.setattr(durable, "_WINDOWS", True)
    monkeypatch.setattr(os, "open", recorded)
    with durable.whole_folder(tmp_path / "c") as new:
        (new / "a").mkdir()
        (new / "a" / "w").write_text("1")
    assert opened == [("w", os.O_RDWR)]
    assert list(json.loads((tmp_path / "c" / durable.CHECKSUMS).read_text())) == ["a/w"]


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("tear", "file", "message"),
    [
        (cut, "a/w.bin", r"a/w.bin has 8 of its 9 bytes"),
        (flip, "a/w.bin", "a/w.bin is not what was written"),
        (os.unlink, "a/w.bin", "a/w.bin is missing"),
        (os.unlink, durable.CHECKSUMS, "it has no checksums.json"),
        (cut, durable.CHECKSUMS, None),
        (lambda path: path.write_text("{"), durable.CHECKSUMS, "cannot be read"),
        (lambda path: path.write_text("[1]"), durable.CHECKSUMS, "cannot be read"),
        (lambda path: path.write_text("edited"), "README.md", None),
    ],
)  # fmt: skip
def test_every_kind_of_damage_is_seen_and_named(tmp_path, tear, file, message):
    with durable.whole_folder(tmp_path / "c") as new:
        (new / "a").mkdir()
        (new / "a" / "w.bin").write_bytes(b"123456789")
        (new / "README.md").write_text("a card")
    tear(tmp_path / "c" / file)
    found = durable.problem(tmp_path / "c")
    if message is None:  # the last newline of the checksums, a model card
        assert found is None
    else:
        assert re.search(message, found)


def checkpoint(folder, step):
    with durable.whole_folder(folder / f"checkpoint-{step}") as new:
        (new / "w").write_text(str(step))


def test_the_last_good_checkpoint_is_found_and_torn_ones_are_named(tmp_path, capsys):
    assert durable.last_good(tmp_path / "none") is None
    (tmp_path / "checkpoint-4-backup").mkdir()  # somebody's own
    for step in (2, 10, 12, 14):
        checkpoint(tmp_path, step)
    cut(tmp_path / "checkpoint-12" / "w")
    (tmp_path / "checkpoint-14" / durable.CHECKSUMS).unlink()
    assert durable.last_good(tmp_path).name == "checkpoint-10"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("going on from checkpoint-10.\n")
    assert "checkpoint-14 is torn: it has no checksums.json" in said and "w has 1 of its 2" in said
    assert durable.last_good(tmp_path).name == "checkpoint-10" and not capsys.readouterr().err
    for step in (2, 10):
        cut(tmp_path / f"checkpoint-{step}" / "w")
    assert durable.last_good(tmp_path) is None
    assert "going on from the stage's beginning" in capsys.readouterr().err


def test_old_checkpoints_go_only_when_there_is_a_good_new_one(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-4-backup").mkdir()
    cut(tmp_path / "checkpoint-8" / "w")
    assert durable.last_good(tmp_path).name == "checkpoint-6"
    assert (tmp_path / "torn-checkpoint-8").exists() and len(durable.checkpoints(tmp_path)) == 3
    checkpoint(tmp_path, 7)
    durable.prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-4-backup", "checkpoint-6", "checkpoint-7",
    }  # fmt: skip
    durable.prune(tmp_path, None)
    assert len(durable.checkpoints(tmp_path)) == 2


# ----------------------------------------------------------------------------------- checkpoints


def test_what_is_in_a_checkpoint_and_that_nothing_else_is_pickled(recipe):
    run = train(recipe, [*SHORT, "--instruct.save_steps", "2"])
    kept = run / "stages" / "instruct"
    assert {path.name for path in kept.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    pickles = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for folder in (kept / "checkpoint-4", run / "checkpoint"):
        assert durable.problem(folder) is None
        files = {path.name for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin")}
        assert files == (pickles if folder.parent == kept else set())
    for name in pickles:  # nothing in them can run
        with safe_globals():
            torch.load(kept / "checkpoint-4" / name, weights_only=True)


def test_a_torn_bridge_is_refused_and_an_edited_one_says_what_to_do(tiny, tmp_path):
    model, processor = tiny
    with durable.whole_folder(tmp_path / "bridge") as new:
        model.save_pretrained(new)
        processor.save_pretrained(new)
    file = tmp_path / "bridge" / "connector.safetensors"
    whole = file.read_bytes()
    flip(file)
    with pytest.raises(ValueError, match=r"bridge is torn or was changed: connector.safetensors is "
                       r"not what was written.*remove checksums.json"):  # fmt: skip
        mmpeft.load(tmp_path / "bridge")
    file.write_bytes(whole)
    loaded, processor = mmpeft.load(tmp_path / "bridge")
    loaded.save_pretrained(tmp_path / "bridge")  # written to again, its checksums do not hold
    processor.save_pretrained(tmp_path / "bridge")
    assert not (tmp_path / "bridge" / durable.CHECKSUMS).exists()
    mmpeft.load(tmp_path / "bridge")


def test_a_torn_checkpoint_falls_back_to_the_one_before(recipe, capsys, monkeypatch):
    whole = train(recipe, [*SHORT, "--instruct.save_steps", "2"])
    with pytest.raises(Stopped):
        train(recipe, [*SHORT, "--instruct.save_steps", "2", *named(recipe, "torn")],
              callbacks=[At(5, signalled(signal.SIGTERM))])  # fmt: skip
    torn = recipe.parent / "torn"
    folder = torn / "stages" / "instruct"
    assert [path.name for path in durable.checkpoints(folder)] == ["checkpoint-5", "checkpoint-4"]
    flip(folder / "checkpoint-5" / "optimizer.pt")
    read, problem = [], durable.problem
    monkeypatch.setattr(durable, "problem", lambda path: read.append(path.name) or problem(path))
    train(recipe, [*SHORT, "--instruct.save_steps", "2", *named(recipe, "torn")], resume=True)
    assert read == ["checkpoint-5", "checkpoint-4"]  # each once: they may be large
    assert "checkpoint-5 is torn: optimizer.pt" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert_same(torn, whole)


def test_a_stage_whose_last_step_is_saved_makes_no_further_one(recipe, capsys):
    """Killed behind the last step, or its result torn: no step may be made twice."""
    run = train(recipe)
    whole = recipe.parent / "whole"
    (run / "checkpoint").rename(whole)
    train(recipe, resume=True)
    for tear in (cut, flip):
        tear(run / "checkpoint" / "connector.safetensors")
        tear(run / "stages" / "align" / "final" / "connector.safetensors")
        train(recipe, resume=True)
    assert "checkpoint is torn: connector.safetensors is not what was" in capsys.readouterr().err
    for file in ("connector.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(folder / file) for folder in (whole, run / "checkpoint"))
        assert all(torch.equal(one[key], other[key]) for key in one)


# --------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_in_the_middle_of_everything_and_resumed_is_the_same(recipe, hard, workers):
    """Between two logged losses, in and between passes of 10 steps, with other workers."""
    hard += ["--instruct.max_steps", "14"]
    whole = train(recipe, [*hard, *named(recipe, "whole")])
    options = [*hard, *named(recipe, "stopped")]
    for step in (2, 10, 12):
        with pytest.raises(Stopped, match=f"stage instruct goes on from step {step}"):
            train(recipe, options, step > 2, [At(step, signalled(signal.SIGTERM))])
        options = [*options, "--instruct.dataloader_num_workers", str(workers)]
    assert_same(train(recipe, options, resume=True), whole)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (whole, recipe.parent / "stopped")]  # fmt: skip
    for name in ("kl_to_base", "learning_rate", "grad_norm"):
        one, other = ([row[name] for row in run if name in row] for run in rows)
        assert one == other and one


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_in_a_line(recipe, monkeypatch, capfd, number, code):
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(
        "mmpeft.metrics_file.MetricsFile.on_step_begin", At(3, signalled(number)).on_step_begin
    )
    assert cli.main(["train", str(recipe), *SHORT]) == code
    said = capfd.readouterr().err
    assert f"{number.name}: ending the step, then saving." in said
    assert said.endswith("interrupted; with --resume, stage instruct goes on from step 3.\n")
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    assert cli.main(["train", str(recipe), *SHORT, "--resume"]) == 0


def test_a_second_signal_does_not_wait(recipe):
    def twice():
        signalled(signal.SIGINT)()
        signalled(signal.SIGINT)()

    with pytest.raises(Stopped, match="stopped at once; with --resume, stage instruct goes on from "
                       "step 2"):  # fmt: skip
        train(recipe, SHORT, callbacks=[At(4, twice)])


def test_a_signal_to_all_processes_leaves_the_workers_to_the_trainer(recipe):
    def to_workers():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)

    train(recipe, [*SHORT, "--instruct.dataloader_num_workers", "2"], callbacks=[At(2, to_workers)])


def test_a_dead_worker_ends_training_in_a_line_that_can_be_followed(recipe, capsys):
    whole = train(recipe, SHORT)
    options = [*SHORT, *named(recipe, "dead"), "--instruct.dataloader_num_workers"]

    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(ValueError, match=r"a process that makes samples is gone .*fewer "
                       r"dataloader_num_workers.*goes on from step \d"):  # fmt: skip
        train(recipe, [*options, "2"], callbacks=[At(4, kill)])
    assert_same(train(recipe, [*options, "0"], resume=True), whole)


FAILING = """
import sys
from mmpeft.train import train
from tests.test_durable import At

def fail():
    raise RuntimeError("CUDA out of memory")

train(sys.argv[1], sys.argv[2:], callbacks=[At(2, fail)])
"""


def test_an_error_beside_workers_ends_the_process(recipe):
    options = [*SHORT, "--instruct.dataloader_num_workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(recipe), *options],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1 and "RuntimeError: CUDA out of memory\n" in done.stderr


class Mistaken(Messages):
    def messages(self, row):
        if multiprocessing.parent_process() is not None:
            return len(None)
        return super().messages(row)


def test_a_mistake_in_a_worker_is_no_dead_worker(recipe):
    own = ["--data.task.class_path", "tests.test_durable.Mistaken"]
    with pytest.raises(TypeError, match="has no len"):
        train(recipe, [*SHORT, *own, "--instruct.dataloader_num_workers", "1"])
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("nth", [1, 9, 24])
def test_a_full_disk_ends_training_with_the_run_intact(recipe, full, nth, monkeypatch):
    whole = train(recipe, SHORT)
    options, room = [*SHORT, *named(recipe, "full")], []
    with pytest.raises(durable.NotWritten) as caught:
        train(recipe, options, callbacks=[At(3, lambda: room.append(full(nth)))])
    said = str(caught.value)
    assert "No space left on device. Make room; with --resume, stage instruct" in said
    assert "\n" not in said
    run = recipe.parent / "full"
    assert not list(run.rglob("*.partial"))
    for folder in run.rglob("checkpoint-*"):
        assert durable.problem(folder) is None
    room[0]()
    assert_same(train(recipe, options, resume=True), whole)


def test_a_disk_full_under_torch_is_told_too(recipe, monkeypatch):
    def save(*args):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(durable.NotWritten, match="-2 could not be written: .*pos 64 vs 0; "
                           "with --resume, stage instruct begins"):  # fmt: skip
            train(recipe, SHORT)
        patch.setattr(durable, "_SPARE", float("inf"))
        with pytest.raises(durable.NotWritten, match="No space left on device. Make room"):
            train(recipe, SHORT, resume=True)
    train(recipe, SHORT, resume=True)


def test_only_a_full_disk_asks_for_room(recipe, monkeypatch):
    def save(*args):
        raise PermissionError(errno.EACCES, "")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(durable.NotWritten, match="written: Permission denied; with --resume, "):
        train(recipe, SHORT)


def test_a_disk_full_at_the_last_save_says_how_to_go_on(recipe, monkeypatch):
    seal = durable.seal

    def full(folder, *args):
        if folder.name == "checkpoint":
            raise OSError(errno.ENOSPC, "")
        return seal(folder, *args)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "seal", full)
        with pytest.raises(durable.NotWritten, match="/checkpoint could not be written: No space "
                           "left on device. Make room; with --resume, .* from step 6"):  # fmt: skip
            train(recipe, SHORT)
    train(recipe, SHORT, resume=True)


def test_a_kill_while_the_run_folder_is_made_leaves_none(recipe, full):
    full(2)
    with pytest.raises(durable.NotWritten, match="run could not be written"):
        train(recipe, SHORT)
    assert not (recipe.parent / "run").exists()


# -------------------------------------------------------------------------------------- no number


def spoil(monkeypatch, step, weight):
    """At a step, the loss goes through ``weight``."""
    compute = BridgeTrainer.compute_loss

    def spoilt(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        return weight(loss) if self.state.global_step + 1 == step else loss

    monkeypatch.setattr(BridgeTrainer, "compute_loss", spoilt)


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


@pytest.mark.parametrize(
    ("what", "weight", "batches"),
    [("loss", lambda loss: loss * float("nan"), 1), ("loss", lambda loss: loss + torch.inf, 1),
     ("gradient", InfiniteGradient.apply, 2)],
)  # fmt: skip
def test_no_number_stops_training_and_keeps_the_rows(recipe, monkeypatch, what, weight, batches):
    options = [*SHORT, "--instruct.gradient_accumulation_steps", "2"]
    whole = train(recipe, options)
    options += named(recipe, "spoilt")
    with monkeypatch.context() as patch:
        spoil(patch, 4, weight)
        with pytest.raises(
            ValueError,
            match=rf"instruct, step 4: the {what} is (nan|inf); its "
            r"rows are in .*/nonfinite_instruct_step_4.json. .*goes on from step 2",
        ):
            train(recipe, options)
    run = recipe.parent / "spoilt"
    found = json.loads((run / "nonfinite_instruct_step_4.json").read_text())
    assert (found["schema"], found["what"], found["step"]) == (nonfinite.SCHEMA, what, 4)
    assert found["weights_finite"] and len(found["rows"]) == 2 * batches
    for row in found["rows"]:
        (where,) = row["where"]
        line = int(where.rpartition(" ")[2])
        asked = f"number {line - 1}"
        assert asked in row["text"] and row["learned_text"].startswith(
            "yes" if (line - 1) % 2 else "a longer no"
        )
        assert row["image_tokens"] == 16 and row["tokens"] == len(row["input_ids"])
    assert {path.name for path in (run / "stages/instruct").iterdir()} == {"checkpoint-2"}
    assert_same(train(recipe, options, resume=True), whole)


# --------------------------------------------------------------------------------- feature cache


def test_a_run_goes_on_with_the_cache_as_it_began(recipe, monkeypatch, tmp_path):
    """Whether ``auto`` keeps features is measured by the clock; new ones may round otherwise."""
    cache = ["--speed.feature_cache", "auto", "--speed.feature_cache_dir", str(tmp_path / "c")]
    auto = [*SHORT, *cache]
    for times, kept in (((1, 0), True), ((0, 1), False)):
        monkeypatch.setattr(feature_setup, "measure", lambda *args, times=times: times)
        options = [*auto, *named(recipe, str(kept))]
        with pytest.raises(Stopped):
            train(recipe, options, callbacks=[At(2, signalled(signal.SIGTERM))])
        run = recipe.parent / str(kept)
        assert json.loads((run / "environment.json").read_text())["features_kept"] is kept
        monkeypatch.setattr(feature_setup, "measure", None)
        train(recipe, options, resume=True)


def test_features_are_on_disk_when_a_checkpoint_is(recipe, tmp_path, monkeypatch):
    """Else a resumed run would encode them again, in other batches, and round them otherwise."""
    monkeypatch.setattr(feature_cache, "SHARD_PICTURES", 1)  # but never a part of a batch
    cache = tmp_path / "c"
    options = [*SHORT, "--speed.feature_cache", "on", "--speed.feature_cache_dir", str(cache),
               "--instruct.save_steps", "1", "--model.connector.init_args", "{}"]  # fmt: skip
    seen = []

    def look():
        (folder,) = (path.parent for path in cache.glob("*/meta.json"))
        seen.append(len(FeatureStore(folder, torch.bfloat16, (64, 64))))

    whole = train(recipe, options, callbacks=[At(2, look)])
    assert seen[0] > 0
    again = [*options, "--speed.feature_cache_dir", str(tmp_path / "d"), *named(recipe, "again")]
    with pytest.raises(Stopped):
        train(recipe, again, callbacks=[At(2, signalled(signal.SIGINT))])
    assert_same(train(recipe, again, resume=True), whole)


def test_what_no_loss_depends_on_may_change_when_a_run_goes_on(recipe):
    with pytest.raises(Stopped):
        train(recipe, SHORT, callbacks=[At(2, signalled(signal.SIGTERM))])
    with pytest.raises(ValueError, match="another configuration: instruct.weight_decay differ"):
        train(
            recipe, [*SHORT, "--instruct.save_steps", "3", "--instruct.weight_decay", "0.1"], True
        )
    train(recipe, [*SHORT, "--instruct.save_steps", "3", "--instruct.save_total_limit", "1"], True)


def test_values_that_changed_places_are_another_configuration(recipe):
    rates = ["--align.connector_learning_rate", "0.1", "--instruct.connector_learning_rate", "0.2"]
    short = ["--align.max_steps", "2", "--instruct.max_steps", "2"]
    train(recipe, [*short, *rates])
    rates[1::2] = rates[:0:-2]
    with pytest.raises(ValueError, match="configuration: align.connector_learning_rate, "
                       "instruct.connector_learning_rate differ"):  # fmt: skip
        train(recipe, [*short, *rates], resume=True)


def test_differences_are_named_by_where_they_are():
    one = {"a": [{"w": 3, "save_steps": 1}, {"w": 1}], "b": {"c": 1, "d": None}}
    two = {"a": [{"w": 1}, {"w": 3}], "b": {"c": 1}}
    assert differing(one, two) == ["a.0.w", "a.1.w", "b.d"] and not differing(one, one)
    assert differing(one, one | {"a": []}) == ["a"]


def test_a_run_of_an_older_version_is_refused_and_left_alone(recipe):
    with pytest.raises(Stopped):
        train(recipe, SHORT, callbacks=[At(3, signalled(signal.SIGTERM))])
    folder = recipe.parent / "run" / "stages" / "instruct"
    for checkpoint in durable.checkpoints(folder):
        (checkpoint / durable.CHECKSUMS).unlink()
        (checkpoint / "complete").touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="run was begun with an older mmpeft, .*; finish it with "):
        train(recipe, SHORT, resume=True)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "steps"),
    [(12, 5, 1, 3, 9), (12, 5, 2, 3, 6), (12, 2, 4, 2, 4), (12, 4, 1, 1.5, 5), (3, 8, 4, 2, 2)],
)
def test_a_stage_has_the_steps_that_trainer_makes(rows, batch, accumulation, epochs, steps):
    stage = SimpleNamespace(
        max_steps=-1, train_batch_size=batch, gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs, dataloader_drop_last=False,
    )  # fmt: skip
    assert total_steps(stage, rows) == steps


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 9), (2, 6)])
def test_the_last_step_of_a_stage_in_passes_is_made_when_it_goes_on(recipe, accumulation, steps):
    """12 rows in batches of 5: the last of each pass, and of each step, is smaller."""
    options = ["--align", "null", "--instruct.max_steps", "-1", "--instruct.num_train_epochs", "3",
               "--instruct.per_device_train_batch_size", "5",
               "--instruct.gradient_accumulation_steps", str(accumulation)]  # fmt: skip
    whole = train(recipe, options)
    assert len(losses(whole)) == steps
    options += named(recipe, "stopped")
    with pytest.raises(Stopped, match=f"from step {steps - 1}"):
        train(recipe, options, callbacks=[At(steps - 1, signalled(signal.SIGTERM))])
    assert_same(train(recipe, options, resume=True), whole)


def test_a_sealed_folder_holds_what_safetensors_wrote(tmp_path):
    """The checksum is of the bytes on disk, not of those in memory."""
    with durable.whole_folder(tmp_path / "c") as new:
        save_file({"a": torch.arange(4)}, new / "w.safetensors")
    written = json.loads((tmp_path / "c" / durable.CHECKSUMS).read_text())["w.safetensors"]
    assert written["bytes"] == (tmp_path / "c" / "w.safetensors").stat().st_size
    save_file({"a": torch.arange(4) + 1}, tmp_path / "c" / "w.safetensors")
    assert durable.problem(tmp_path / "c") == "w.safetensors is not what was written"


def test_a_worker_gone_is_seen_behind_what_other_code_made_of_it():
    """torch raises it out of a signal handler: jinja2, for one, makes a syntax error of it."""
    try:
        try:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")
        except RuntimeError:
            raise KeyError("Killed.") from None
    except KeyError as error:
        assert worker_died(error)
    assert not worker_died(RuntimeError("CUDA out of memory"))
    caught = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback")
    assert not worker_died(caught)
