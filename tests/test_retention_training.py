"""Text skills watched while training: logged, the best step kept, no step of training changed."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import mmpeft
from mmpeft import config
from mmpeft.data import hold_out
from mmpeft.train import train

WATCH = ["--retention.every_steps", "4", "--retention.samples", "3",
         "--retention.vision_samples", "3"]  # fmt: skip


class Groups:
    """A task whose rows belong to pictures."""

    def group(self, row):
        return row


def logged(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "retention/vision" in row}


def test_it_is_logged_beside_the_loss_and_the_best_step_is_kept(recipe):
    open_gate = ["--model.gate", "none", "--retention.max_drop", "1"]
    run = train(recipe, [*WATCH, *open_gate])
    front = json.loads((run / "front.json").read_text())
    assert [point["step"] for point in front] == [4, 8]
    rows = logged(run)
    for point in front:
        assert rows[point["step"]]["retention/vision"] == point["vision"]
        assert rows[point["step"]]["retention/text"] == point["modes"]["text"]["delta"]
    assert [point["best"] for point in front].count(True) == 1
    best = next(point for point in front if point["best"])
    assert best["vision"] == max(point["vision"] for point in front)
    model, _ = mmpeft.load(run / "best")
    assert model.config.gate == "none"


def test_a_step_that_lost_too_much_is_not_kept(recipe, monkeypatch):
    from mmpeft.retention.callback import RetentionCallback

    monkeypatch.setattr(RetentionCallback, "within", lambda self, point: point["step"] == 4)
    run = train(recipe, [*WATCH, "--model.gate", "none"])
    front = json.loads((run / "front.json").read_text())
    assert [point["best"] for point in front] == [True, False]


def watcher(points=(), modes=("text",)):
    """A callback without a model, whose measurements are given."""
    from mmpeft.retention.callback import RetentionCallback

    found = object.__new__(RetentionCallback)
    found.config = config.RetentionConfig(every_steps=1, max_drop=0.1)
    found.exchanges, found.unmeasured, found.kept = dict.fromkeys(modes), set(), None
    found.points = list(points)
    return found


def point(step, vision, best=False, delta=0.0):
    return {"step": step, "vision": vision, "best": best, "modes": {"text": {"delta": delta}}}


def test_a_mode_that_tells_nothing_keeps_no_step(capsys):
    one = watcher(modes=("text", "after_image"))
    assert not one.within(point(4, 0.5)) and watcher().within(point(4, 0.5))
    one._say_unmeasured(point(4, 0.5))
    one._say_unmeasured(point(8, 0.5))
    assert capsys.readouterr().err.count("above chance in no task of mode after_image") == 1


def test_a_resumed_run_keeps_its_best_step():
    # step 300 was the best when the run was killed behind it; it goes on from step 200
    one = watcher([point(100, 0.5), point(300, 0.6, best=True)])
    one.on_train_begin(None, SimpleNamespace(global_step=200), None)
    assert [p["step"] for p in one.points] == [100] and one.kept["step"] == 300
    assert not one.beats(point(250, 0.55)) and one.kept  # best/ holds step 300
    assert one.beats(point(250, 0.65))
    assert one.beats(point(300, 0.58)) and one.kept is None  # measured again
    assert not one.beats(point(350, 0.4))  # less than step 100, which no longer has the flag


@pytest.mark.parametrize(("upper", "steps"), [(-0.03, [4]), (-0.01, [4, 8])])
def test_training_stops_when_a_loss_is_certain(recipe, monkeypatch, capsys, upper, steps):
    from mmpeft.retention import callback

    compare_sides = callback.compare_sides

    def worse(*args, **kwargs):
        found = compare_sides(*args, **kwargs)
        found.modes["text"]["overall"] = {"delta": -0.04, "bounds95": [-0.05, upper], "n": 9}
        return found

    monkeypatch.setattr(callback, "compare_sides", worse)
    run = train(recipe, [*WATCH, "--model.gate", "none", "--retention.stop", "true"])
    assert [point["step"] for point in json.loads((run / "front.json").read_text())] == steps
    assert ("certainly lost" in capsys.readouterr().err) == (steps == [4])
    assert not (run / "best").exists()  # 4 points are more than max_drop


def test_a_run_that_stopped_has_ended_for_resume_too(recipe, monkeypatch):
    from mmpeft.retention.callback import RetentionCallback

    stop = [*WATCH, "--retention.every_steps", "2", "--retention.stop", "true", "--align", "null"]
    stop += ["--model.gate", "none"]
    monkeypatch.setattr(RetentionCallback, "certain", lambda self, point: point["step"] == 4)
    whole = train(recipe, [*stop, "--output_dir", str(recipe.parent / "whole")])
    save = mmpeft.BridgeForConditionalGeneration.save_pretrained

    def killed(model, folder, **options):
        if "checkpoint-" in str(folder) or "best" in str(folder):
            return save(model, folder, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mmpeft.BridgeForConditionalGeneration, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, stop)
    run = train(recipe, stop, resume=True)
    one, other = (load_file(r / "checkpoint/connector.safetensors") for r in (whole, run))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_would_never_be_measured_is_refused(recipe):
    with pytest.raises(ValueError, match="every_steps is 9, but stage instruct has 8 steps"):
        train(recipe, [*WATCH, "--retention.every_steps", "9"])
    assert not (recipe.parent / "run").exists()


def test_rows_held_out_are_learned_in_no_stage(recipe, make_bridge):
    """However the task of stage align is spelt."""
    from mmpeft.tasks.messages import Messages
    from mmpeft.training_data import TrainingData, reads_the_same

    model, processor = make_bridge("none")
    parsed, _ = config.load(recipe, [*WATCH, "--model.gate", "none"])
    parsed.data.align = Messages(train=parsed.data.task.train)
    data = TrainingData.load(model, processor, parsed)
    assert data.vision.held_out and data.align.held_out == data.vision.held_out
    assert not reads_the_same(Messages(train="a"), Messages(train="b"))
    assert not reads_the_same(Messages(train="a", prompt="x"), Messages(train="a"))


def test_watching_changes_no_step_of_training(recipe):
    held_out = [*WATCH[:2], "--retention.samples", "2", "--retention.vision_samples", "3"]
    seldom = train(recipe, [*held_out, "--retention.every_steps", "8"])
    often = train(recipe, [*WATCH, "--retention.every_steps", "1", "--output_dir",
                           str(recipe.parent / "often")])  # fmt: skip
    assert len(logged(often)) == 8 and len(logged(seldom)) == 1
    for file in ("connector.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(run / "checkpoint" / file) for run in (seldom, often))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_held_out_rows_are_whole_groups_and_never_learned():
    rows = [number // 3 for number in range(30)]
    chosen = hold_out(Groups(), rows, 7, seed=0)
    assert len(chosen) == 9  # three pictures of three rows
    assert {rows[number] for number in chosen}.isdisjoint(
        rows[number] for number in range(30) if number not in chosen
    )
    assert chosen == hold_out(Groups(), rows, 7, seed=0) != hold_out(Groups(), rows, 7, seed=1)
    assert hold_out(Groups(), rows, 0, seed=0) == []
    with pytest.raises(ValueError, match="nothing would be left"):
        hold_out(Groups(), rows, 29, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--retention.every_steps", "0"], "every_steps is 0"),
        (["--retention.max_drop", "-1"], "max_drop is -1"),
        (["--retention.mdoes", "[text]"], "Did you mean 'modes'"),
        (["--retention.every_steps", "1", "--instruct", "null"], "retention is about the adapter"),
    ],
)
def test_a_bad_setting_is_named(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        config.load(recipe, options)


def test_a_misspelt_suite_leaves_no_run_folder(recipe):
    with pytest.raises(ValueError, match="Did you mean 'embedded'"):
        train(recipe, [*WATCH, "--retention.suite", "embeded"])
    assert not (recipe.parent / "run").exists()
