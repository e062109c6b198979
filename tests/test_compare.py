"""mmpeft compare: what a grid means, cells as processes, resuming, and the table by hand."""

import copy
import csv
import fcntl
import io
import json
import math
import re
import threading
from importlib.resources import files
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

from mmpeft import __version__, checkpoint, cli
from mmpeft.compare import cell as cell_module
from mmpeft.compare import figures, run, table
from mmpeft.compare import grid as grids
from mmpeft.compare.cell import CellConfig, read_result, run_cell
from mmpeft.compare.grid import load_grid, put
from mmpeft.config import from_mapping

SHIPPED = sorted(Path(str(files("mmpeft.configs"))).glob("grids/*.yaml"))
AXES = {
    "method": {
        "lora": None,
        "ia3": {"model.adapter": {"class_path": "IA3Config"}, "model.gate": "none"},
    },
    "rank": {2: {"model.rank": 2}, 4: {"model.rank": 4}},
}


@pytest.fixture
def write_grid(recipe):
    def write(**keys):
        keys = {
            "recipe": recipe.name, "output_dir": str(recipe.parent / "out"), "axes": AXES,
            "overrides": {"align": None, "instruct.max_steps": 2}, "seeds": [0],
            "exclude": [{"method": "ia3", "rank": 4}, {"method": "ia3", "rank": 2}],
            "evaluate": {"samples": 4},
        } | keys  # fmt: skip
        path = recipe.parent / "grid.yaml"
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        return path

    return write


@pytest.fixture
def in_process(monkeypatch):
    """Run cells here; returns the names of those that were run."""
    ran = []

    def start(folder, log, lock):
        ran.append(folder.name)
        run_cell(folder)
        return 0

    monkeypatch.setattr(run, "start", start)
    return ran


# ------------------------------------------------------------------------------------- grids


def test_a_grid_is_every_combination_but_those_left_out(write_grid):
    grid, _, cells = load_grid(
        write_grid(seeds=[3, 5], exclude=[{"method": "ia3", "rank": [4, 2]}])
    )
    assert [cell.name for cell in cells] == ["lora,2,seed3", "lora,4,seed3",
                                             "lora,2,seed5", "lora,4,seed5"]  # fmt: skip
    assert cells[2].recipe["seed"] == 5 and cells[3].recipe["model"]["rank"] == 4
    assert cells[0].recipe["model"]["adapter"]["class_path"] == "LoraConfig"
    assert cells[0].recipe["align"] is None and cells[0].recipe["instruct"]["max_steps"] == 2
    assert len({cell.hashes["train"] for cell in cells}) == 4
    assert grid.axes["rank"] == {"2": {"model.rank": 2}, "4": {"model.rank": 4}}
    method = {"method": AXES["method"]}
    only = [{"method": "ia3"}]
    _, _, cells = load_grid(write_grid(axes=method, only=only, exclude=[]))
    assert [cell.name for cell in cells] == ["ia3,seed0"]
    assert cells[0].recipe["model"]["adapter"] == {"class_path": "IA3Config"}


def test_a_step_is_keyed_by_what_its_result_depends_on(write_grid):
    def keys(**changes):
        return load_grid(write_grid(**changes))[2][0].hashes

    plain = keys()
    steps = keys(overrides={"align": None, "instruct.max_steps": 3})
    fewer, shown = (
        keys(evaluate={"samples": 3}),
        keys(evaluate={"samples": 4, "metric": "accuracy"}),
    )
    assert set(plain) == {"train", "score"} and shown == plain
    assert steps["train"] != plain["train"] and steps["score"] != plain["score"]
    assert fewer["train"] == plain["train"] and fewer["score"] != plain["score"]
    batch = keys(evaluate={"samples": 4, "batch_size": 2})  # rounds otherwise
    assert batch["train"] == plain["train"] and batch["score"] != plain["score"]
    kept = keys(retain={"samples": 3})
    assert {step: kept[step] for step in plain} == plain and "retention" in kept


def test_a_step_is_keyed_by_the_bridge_that_it_starts_from(write_grid, make_bridge, tmp_path):
    def key():
        model = {"model": {"start_from": str(tmp_path / "start")}}
        return load_grid(write_grid(axes={"only": {"one": None}}, exclude=[], overrides=model))[2][
            0
        ].hashes["train"]

    model, processor = make_bridge("none", adapter=None)
    missing = key()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    there = key()
    assert there != missing and key() == there
    with torch.no_grad():
        next(model.connector.parameters()).add_(1)
    model.save_pretrained(tmp_path / "start")
    assert key() not in (there, missing)


def test_results_of_another_version_are_not_taken_for_this_ones(
    write_grid, in_process, monkeypatch
):
    grid = write_grid(axes={"rank": {2: AXES["rank"][2]}}, exclude=[])
    run.compare(grid)
    kept = read_result(grid.parent / "out/cells/2,seed0")
    assert kept["environment"]["packages"].keys() >= {"mmpeft", "torch", "peft"}
    for module in (grids, run):
        monkeypatch.setattr(module, "__version__", "99.0")
    with pytest.raises(ValueError, match=rf"2,seed0 \(mmpeft: {__version__} -> 99.0\)\. Run"):
        run.compare(grid)


def test_a_key_is_put_where_it_belongs():
    recipe = {"a": {"b": 1}, "c": None, "d": 3}
    for key, value in (("a.x.y", [1]), ("c.z", 2), ("a.b", {"k": 1})):
        put(recipe, key, value, "grid")
    assert recipe == {"a": {"b": {"k": 1}, "x": {"y": [1]}}, "c": {"z": 2}, "d": 3}
    with pytest.raises(ValueError, match="grid: d.e cannot be set, d is 3"):
        put(recipe, "d.e", 1, "grid")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"axis": {"rank": 4}}, "Did you mean 'axes'"),
        ({"evaluate": {"sampels": 3}}, "Did you mean 'evaluate.samples'|Did you mean 'samples'"),
        ({"retain": {"mode": ["text"]}}, "Did you mean 'modes'"),
        ({"recipe": "gone.yaml"}, "gone.yaml does not exist"),
        ({"axes": {}}, "axes is empty"),
        ({"axes": {"rank": [4, 8]}}, "axes.rank is .4, 8.; give labels"),
        ({"axes": {"rank": {"4/8": None}}}, "label '4/8' names a folder"),
        ({"axes": {"rank": {4: 4}}}, "axes.rank.4 is 4; give keys"),
        ({"overrides": {"instruct.max_stpes": 3}}, "lora,2: .*Did you mean 'max_steps'"),
        ({"exclude": [{"methd": "lora"}]}, "exclude: axis 'methd' .*Did you mean 'method'"),
        ({"only": [{"method": "loar"}]}, "only: method 'loar' .*Did you mean 'lora'"),
        ({"exclude": [{"rank": [2, 4]}]}, "leave no cell to run"),
        ({"seeds": [1, 1]}, "seeds is .1, 1."),
        ({"evaluate": {"samples": 0}}, "evaluate.samples is 0"),
        ({"retain": {"samples": 0}}, "retain.samples is 0"),
        ({"retain": {"prose_tokens": 0}}, "retain.prose_tokens is 0"),
        ({"retain": {"margin": -1}}, "retain.margin is -1"),
        ({"retain": {"modes": []}}, "retain.modes is empty"),
        ({"overrides": {"seed": 3}}, "seed is set by the grid for every cell; name seeds under"),
        ({"axes": {"at": {"a": {"output_dir": "b"}}}}, "output_dir is set by the grid"),
        ({"axes": {"rank": {4: None, "4": None}}}, "line [0-9]+: key '4' is there twice"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(write_grid, capsys, keys, message):
    assert cli.main(["compare", str(write_grid(**keys))]) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("mmpeft: error: ") and re.search(message, last) and not captured.out


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_grid_resolves_and_opens_with_its_launch_command(path):
    grid, _, cells = load_grid(path)
    assert f"mmpeft compare configs/grids/{path.name}" in path.read_text().split("\n\n")[0]
    assert len(grid.seeds) >= 3 and len(cells) >= 6


def test_the_grids_of_table_1_have_the_same_methods():
    import yaml

    axes = [yaml.safe_load(p.read_text())["axes"] for p in SHIPPED if p.stem.startswith("table1")]
    assert len(axes) == 4 and all(one == axes[0] for one in axes)


# ------------------------------------------------------------------------------- cells


def test_cells_are_processes_and_only_what_failed_is_run_again(write_grid, recipe, capsys):
    lost = recipe.parent / "lost.jsonl"
    axes = {"data": {"here": None, "lost": {"data.task.init_args.train": str(lost)}}}
    grid, out = str(write_grid(axes=axes, exclude=[])), recipe.parent / "out"
    assert cli.main(["compare", grid, "--json"]) == 1
    printed, err = capsys.readouterr()
    report = json.loads(printed)
    assert report == json.loads((out / "compare.json").read_text())
    assert [row["labels"] for row in report["rows"]] == [{"data": "here"}]
    (failure,) = report["failures"]
    assert failure["cell"] == "lost,seed0" and "lost.jsonl does not exist" in failure["error"]
    assert Path(failure["log"]).is_file() and not report["complete"]
    assert f"lost,seed0: {failure['error']}" in err

    result = out / "cells/here,seed0/result.json"
    cell, before = read_result(result.parent), result.stat().st_mtime_ns
    assert cell["train"]["trained_parameters"]["adapter"] == 4 * (32 + 32 + 32 + 16) * 2
    assert 1e8 < cell["train"]["peak_memory_bytes"] < 1e10 and cell["train"]["seconds"] > 0
    assert len((result.parent / "items.jsonl").read_text().splitlines()) == 4
    assert cell["score"]["n"] == 4 and set(cell["score"]["metrics"]) == {"accuracy"}

    lost.write_text((recipe.parent / "data.jsonl").read_text())
    assert cli.main(["compare", grid]) == 0
    table_text, err = capsys.readouterr()
    assert result.stat().st_mtime_ns == before and "1/2" in err  # one was there
    assert "lost" in table_text and "failed" not in table_text

    for name in ("compare.json", "table.md", "table.csv", "cells.csv"):
        (out / name).unlink()
    assert cli.main(["compare", str(out)]) == 0  # draws what is there
    assert capsys.readouterr().out == table_text
    assert (out / "table.md").read_text().startswith("| data | seeds | trained |")
    assert (out / "table.csv").read_text().startswith("data,seeds,trained_parameters,")
    assert (out / "cells.csv").read_text().startswith("data,seed,connector_parameters,")


def test_results_of_another_configuration_are_never_replaced_unasked(
    write_grid, in_process, capsys
):
    fewer = {"axes": {"rank": AXES["rank"]}, "exclude": []}
    run.compare(write_grid(**fewer, keep_checkpoints=False))
    assert in_process == ["2,seed0", "4,seed0"]
    kept = run.compare(write_grid(**fewer, keep_checkpoints=False))
    assert len(in_process) == 2 and kept["complete"]
    cell = Path(kept["grid"]).parent / "out/cells/2,seed0"
    assert not (cell / "run/checkpoint").exists()

    changed = {"rank": {2: AXES["rank"][2], 4: {"model.rank": 4, "instruct.max_steps": 1}}}
    steps = write_grid(axes=changed, exclude=[])
    with pytest.raises(ValueError, match=r"4,seed0 \(instruct.max_steps: 2 -> 1\)\. Run .*--redo"):
        run.compare(steps)
    before = read_result(cell)
    run.compare(steps, redo=True)
    assert in_process[2:] == ["4,seed0"] and read_result(cell) == before

    other = write_grid(axes=changed, exclude=[], evaluate={"samples": 3})
    with pytest.raises(ValueError, match=r"2,seed0 \(evaluate.samples: 4 -> 3\)"):
        run.compare(other)
    trained = (cell.parent / "4,seed0/run/metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    report = run.compare(other, redo=True)
    assert report["n"] == 3 and in_process[3:] == ["2,seed0", "4,seed0"]
    # scored anew from what was kept; trained anew where nothing was
    said = capsys.readouterr().err
    assert "4,seed0: has the results of train; does score\n" in said
    assert "2,seed0: has the results of train; does score, and trains again" in said
    assert (cell.parent / "4,seed0/run/metrics.jsonl").stat().st_mtime_ns == trained
    assert (cell / "run/checkpoint").is_dir()


def test_labels_and_hashes_that_look_like_numbers_stay_words(write_grid, monkeypatch):
    seen = []

    def start(folder, log, lock):
        read = grids.read_yaml(folder / "cell.yaml", "cell")
        seen.append(from_mapping(CellConfig, read, "cell"))
        return 1

    monkeypatch.setattr(grids, "_hash", lambda value: "52194e67")  # a float to a YAML reader
    monkeypatch.setattr(run, "start", start)
    grid = write_grid(axes={"rate": {"1e-3": None}}, exclude=[])
    grid.write_text(grid.read_text().replace("1e-3:", '"1e-3":'))
    run.compare(grid)
    assert seen[0].hashes == {"train": "52194e67", "score": "52194e67"}
    assert seen[0].labels == {"rate": "1e-3"}


def test_a_killed_cell_is_reported_and_the_rest_goes_on(write_grid, monkeypatch):
    def start(folder, log, lock):
        log.write("3/9 steps\rand then")
        return -9

    monkeypatch.setattr(run, "start", start)
    report = run.compare(write_grid(axes={"rank": AXES["rank"]}, exclude=[]))
    assert [f["error"] for f in report["failures"]] == ["killed by SIGKILL"] * 2
    assert not report["rows"] and "killed by SIGKILL" in table.render(report)
    assert "no cell is complete yet" in table.render(report) and "None" not in table.render(report)


def test_a_cell_that_another_process_runs_is_left_to_it(write_grid, in_process, capsys):
    grid = write_grid(axes={"rank": AXES["rank"]}, exclude=[])
    folder = grid.parent / "out/cells/2,seed0"
    folder.mkdir(parents=True)
    with run.held(folder):
        report = run.compare(grid)
        (folder / "log.txt").write_text("1/9 steps")
        again = run.redraw(grid.parent / "out")
    assert in_process == ["4,seed0"] and report["running"] == again["running"] == ["2,seed0"]
    assert not again["failures"] and not again["missing"] and not again["complete"]
    assert "running: 2,seed0" in table.render(again)
    assert "2,seed0: another process is at work on it" in capsys.readouterr().err


def test_a_look_at_a_lock_does_not_cost_a_cell(tmp_path):
    with run.held(tmp_path) as looking:
        assert looking is not None and run.is_running(tmp_path)
        with run.held(tmp_path, patience=0.05) as lock:
            assert lock is None
        threading.Timer(0.1, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with run.held(tmp_path, patience=5) as lock:
            assert lock is not None


def test_nothing_of_another_configuration_stays_when_a_cell_trains_anew(
    write_grid, in_process, monkeypatch
):
    one = {"axes": {"rank": {2: AXES["rank"][2]}}, "exclude": []}
    run.compare(write_grid(**one))
    more = one | {"overrides": {"align": None, "instruct.max_steps": 1}}
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr(cell_module.checkpoint, "load", Mock(side_effect=full))
        with pytest.raises(OSError, match="No space"):
            run.compare(write_grid(**more), redo=True)
    assert read_result(write_grid().parent / "out/cells/2,seed0")["hashes"] == {}
    # the first configuration trains again, and does not take the other's checkpoint for its own
    report = run.compare(write_grid(**one))
    own = write_grid().parent / "out/cells/2,seed0"
    steps = yaml.safe_load((own / "run/config.yaml").read_text())["instruct"]["max_steps"]
    assert report["complete"] and steps == 2


def test_results_belong_to_a_cell_whatever_its_axis_is_called(write_grid, in_process):
    labels = {2: AXES["rank"][2]}
    first = run.compare(write_grid(axes={"rank": labels}, exclude=[]))
    again = run.compare(write_grid(axes={"r": labels}, exclude=[]))
    assert len(in_process) == 1 and again["complete"]
    assert again["rows"] == [first["rows"][0] | {"labels": {"r": "2"}}]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"retain": {"samples": 3, "suite": "embeded"}}, "embeded"),
        ({"evaluate": {"task": {"class_path": "E2E", "init_args": {"test": "no.csv"}}}}, "no.csv"),
        ({"axes": {"on": {"one": None, "two": {"data.task": {
            "class_path": "GSM8K", "init_args": {"test": "GIVEN"}}}}}, "exclude": []},
         "cells would be scored on gsm8k, messages; set evaluate.task"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_training(
    write_grid, in_process, recipe, keys, message
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.compare(write_grid(**keys))
    assert in_process == []


def test_a_log_of_another_configuration_is_no_failure(write_grid, monkeypatch):
    monkeypatch.setattr(run, "start", lambda folder, log, lock: log.write("oh no\n"))
    axes = {"rank": {2: AXES["rank"][2]}}
    run.compare(write_grid(axes=axes, exclude=[]))
    seen = []

    def start(folder, log, lock):
        seen.append(json.loads((grid.parent / "out/compare.json").read_text()))
        return 1

    monkeypatch.setattr(run, "start", start)
    grid = write_grid(axes=axes, exclude=[], overrides={"align": None, "instruct.max_steps": 1})
    run.compare(grid)
    assert seen[0]["missing"] == ["2,seed0"] and not seen[0]["failures"]


def test_the_table_grows_with_every_cell_and_a_wrong_metric_ends_at_the_first(
    write_grid, in_process, monkeypatch
):
    rows, start = [], run.start

    def counted(folder, log, lock):
        rows.append(len(json.loads((grid.parent / "out/compare.json").read_text())["rows"]))
        return start(folder, log, lock)

    monkeypatch.setattr(run, "start", counted)
    axes = {"axes": {"rank": AXES["rank"]}, "exclude": []}
    grid = write_grid(**axes)
    run.compare(grid)
    assert rows == [0, 1]
    grid = write_grid(**axes, evaluate={"samples": 4, "metric": "bleu"})
    with pytest.raises(ValueError, match="evaluate.metric 'bleu': the task has accuracy"):
        run.compare(grid, str(grid.parent / "other"))
    assert len(in_process) == 3


def test_what_a_grid_no_longer_measures_is_not_in_its_table(write_grid, in_process, monkeypatch):
    from mmpeft.compare import cell

    retained = result({}, 0, 0, -0.1)["retention"]
    monkeypatch.setattr(cell, "retain_cell", lambda *args: retained)
    axes = {"axes": {"method": {"lora": None}}, "exclude": []}
    assert run.compare(write_grid(**axes, retain={"modes": ["text"]}))["modes"] == ["text"]
    again = {"axes": {"method": {"lora": None, "ia3": AXES["method"]["ia3"]}}, "exclude": []}
    report = run.compare(write_grid(**again))
    assert in_process == ["lora,seed0", "ia3,seed0"]
    assert report["modes"] == [] and len(report["rows"]) == 2
    assert report["rows"][0]["retention"] == {} and "retention" not in table.render(report)


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_part_of_it(tmp_path, monkeypatch):
    from mmpeft.compare import cell

    kept = tmp_path / "checkpoint"
    kept.mkdir()
    (kept / "weights").write_text("w")

    def killed(path, **_):
        if Path(path).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cell.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            cell.discard(kept)
    assert not kept.exists()
    kept.mkdir()
    cell.discard(kept)
    assert not list(tmp_path.iterdir())


def test_the_search_for_a_rank_is_time_of_training(write_grid, in_process):
    auto = {"model.rank": "auto", "rank_search.candidates": [1, 2], "rank_search.steps": 2,
            "rank_search.validation": 4}  # fmt: skip
    grid = write_grid(axes={"rank": {"auto": auto}}, exclude=[])
    report = run.compare(grid)
    own = grid.parent / "out/cells/auto,seed0/run"
    searched = json.loads((own / "rank_search.json").read_text())["seconds"]
    logged = map(json.loads, (own / "metrics.jsonl").read_text().splitlines())
    trained = sum(row.get("train_runtime", 0) for row in logged)
    assert report["rows"][0]["train_seconds"] == pytest.approx(searched + trained)


def test_retention_is_measured_against_the_base(write_grid, in_process, monkeypatch):
    from mmpeft.retention import statistics

    monkeypatch.setattr(statistics, "above_chance", lambda *args: True)  # a random LLM is not
    axes, retain = {"method": {"lora": None}}, {"samples": 2, "prose_tokens": 60}
    retain |= {"modes": ["text"]}
    report = run.compare(write_grid(axes=axes, exclude=[], retain=retain))
    assert report["modes"] == ["text", "prose"]
    cell = Path(report["grid"]).parent / "out/cells/lora,seed0"
    full = json.loads((cell / "retain/report.json").read_text())
    overall, own = full["modes"]["text"]["overall"], read_result(cell)["retention"]["text"]
    assert own == {key: overall[key] for key in own} and own["verdict"] == "retained"
    assert report["rows"][0]["retention"]["text"]["exact"] and own["exact"]  # gate sample
    assert full["provenance"]["suite"]["samples"] == 2
    assert full["provenance"]["text"]["tokens"] == 60
    prose = read_result(cell)["retention"]["prose"]
    assert prose == {"delta": 0, "ci95": None, "exact": True, "kl": 0}


# ------------------------------------------------------------------------------- the table


def result(labels, seed, accuracy, delta=None, ci95=(0.4, 0.6), exact=False, **train):
    train = {"trained_parameters": {"connector": 100, "adapter": 20}, "peak_memory_bytes": 10**9,
             "seconds": 5.0} | train  # fmt: skip
    metric = {"value": accuracy, "ci95": list(ci95), "controls": {"majority": 0.3}}
    found = {"labels": labels, "seed": seed, "train": train,
             "score": {"task": "t", "n": 50, "metrics": {"accuracy": metric}}}  # fmt: skip
    if delta is not None:
        body = {"delta": delta, "ci95": [delta - 0.1, delta + 0.1], "exact": exact,
                "verdict": "retained"}  # fmt: skip
        found["retention"] = {"text": body}
    return found


def pooled(results, axes, metric=None):
    cells = [{"name": "", "labels": r["labels"], "seed": r["seed"]} for r in results]
    grid = {
        "grid": "g",
        "recipe": "r",
        "axes": axes,
        "seeds": [0],
        "metric": metric,
        "cells": cells,
    }
    return table.pool(grid, results, [], [])


def test_seeds_are_pooled_with_students_t():
    labels = {"method": "lora"}
    report = pooled(
        [result(labels, 0, 0.5, -0.02, peak_memory_bytes=3 * 10**9, seconds=60.0),
         result(labels, 1, 0.6, -0.04), result(labels, 2, 0.7, 0.0)],
        {"method": ["lora"]},
    )  # fmt: skip
    (row,) = report["rows"]
    score, text = row["metrics"]["accuracy"], row["retention"]["text"]
    half = 4.302652730 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5%
    assert score["mean"] == pytest.approx(0.6) and score["interval"] == "seeds"
    assert score["ci95"] == pytest.approx([0.6 - half, 0.6 + half])
    assert text["ci95"] == pytest.approx([-0.02 - half / 5, -0.02 + half / 5])
    assert row["seeds"] == [0, 1, 2] and row["trained_parameters"] == 120
    assert row["peak_memory_bytes"] == 3 * 10**9 and row["train_seconds"] == 5
    assert "60.0 [35.2, 84.8]" in table.render(report) and "Student's t" in table.render(report)


def test_one_seed_has_the_interval_of_its_rows_and_says_so():
    report = pooled([result({"m": "a"}, 0, 0.5, 0.0, exact=True)], {"m": ["a"]})
    score = report["rows"][0]["metrics"]["accuracy"]
    assert (score["ci95"], score["interval"]) == ([0.4, 0.6], "rows")
    text = table.render(report)
    assert "50.0 [40.0, 60.0]*" in text and "says nothing about seeds" in text
    assert "0 (exact)" in text


def test_the_front_is_what_nothing_beats_on_both_axes():
    points = [(0.9, -0.10), (0.8, -0.02), (0.7, -0.02), (0.6, 0.0), (0.6, 0.0), (0.85, -0.2)]
    assert table.front(points) == [True, True, False, True, True, False]
    results = [result({"m": str(i)}, 0, *point) for i, point in enumerate(points)]
    results += [result({"m": "6"}, 0, 0.99)]  # no retention: on no front
    rows = pooled(results, {"m": [str(i) for i in range(7)]})["rows"]
    assert [row["on_front"].get("text") for row in rows] == [*table.front(points), None]


def test_without_an_adapter_the_llm_is_the_base(write_grid, tmp_path):
    from mmpeft.compare.cell import retain_cell
    from mmpeft.compare.grid import RetainConfig
    from mmpeft.config import RunConfig

    axes = {"method": {"connector": {"model.adapter": None, "model.gate": "none"}}}
    _, _, (cell,) = load_grid(write_grid(axes=axes, exclude=[]))
    config = from_mapping(RunConfig, cell.recipe, "cell")
    (tmp_path / "run").mkdir()
    for name in ("config.json", checkpoint.CONNECTOR_FILE):  # and no folder of an adapter
        (tmp_path / "run" / name).touch()
    found = retain_cell(tmp_path, config, RetainConfig(modes=["text"]))
    report = pooled([result({"m": "a"}, 0, 0.5) | {"retention": found}], {"m": ["a"]})
    (row,) = report["rows"]
    assert row["on_front"] == {"text": True, "prose": True}
    assert table.cells(report, row).count("0 (exact)") == 2


def under_columns(report):
    """The table as one mapping of column to cell a row."""
    names = table.columns(report)
    return [dict(zip(names, table.cells(report, row), strict=True)) for row in report["rows"]]


def test_rows_that_lack_something_stay_under_their_columns():
    full = result({"m": "b"}, 0, 0.6, -0.02)
    for other, value in (("meteor", 0.3), ("bleu", 0.2)):
        full["score"]["metrics"][other] = {"value": value, "ci95": [0, 1], "controls": {}}
    half = copy.deepcopy(full)
    del half["score"]["metrics"]["meteor"]
    half |= {"seed": 1, "retention": {"text": full["retention"]["text"]}}
    report = pooled([result({"m": "a"}, 0, 0.5), full, half], {"m": ["a", "b"]}, "accuracy")
    assert report["metrics"] == ["accuracy", "meteor", "bleu"]
    first, second = under_columns(report)
    assert (first["meteor"], first["bleu"], first["retention text"]) == ("-", "-", "-")
    assert first["front"] == "" and second["front"] == "text"
    assert second["meteor"] == "0.300 [0.000, 1.000]* (1 of 2 seeds)"
    assert second["bleu"] == "0.200 [0.200, 0.200]"
    meteor = report["rows"][1]["metrics"]["meteor"]
    assert meteor["seeds"] == [0] and meteor["values"] == [0.3]
    for write in (table.render, table.as_markdown, table.as_csv):
        assert write(report)
    headline = pooled([result({"m": "a"}, 0, 0.5), full], {"m": ["a", "b"]}, "meteor")
    assert [row["on_front"] for row in headline["rows"]] == [{}, {"text": True}]
    assert under_columns(headline)[0]["meteor less first row"] == "-"


def test_a_row_is_compared_with_the_first_seed_by_seed():
    values = {"a": (0.5, 0.6, 0.7), "b": (0.52, 0.63, 0.74), "c": (0.4,)}
    results = [result({"m": m}, seed, value)
               for m, own in values.items() for seed, value in enumerate(own)]  # fmt: skip
    report = pooled(results, {"m": list(values)})
    first, second, third = (row["metrics"]["accuracy"]["difference"] for row in report["rows"])
    half = 4.302652730 * 0.01 / math.sqrt(3)
    assert first is None and second["mean"] == pytest.approx(0.03)
    assert second["ci95"] == pytest.approx([0.03 - half, 0.03 + half])
    assert second["values"] == pytest.approx([0.02, 0.03, 0.04]) and second["seeds"] == [0, 1, 2]
    assert third["mean"] == pytest.approx(-0.1) and third["ci95"] is None
    column = [row["accuracy less first row"] for row in under_columns(report)]
    assert column == ["-", "+3.0 [+0.5, +5.5]", "-10.0"]
    text = table.render(report)
    assert "the difference to a, paired by seed" in text and "rows of a data.fraction" in text
    lines = [line.split(",") for line in table.as_csv(report).splitlines()]
    written = dict(zip(lines[0], lines[2], strict=True))
    assert float(written["accuracy_less_first_low"]) == second["ci95"][0]


def test_a_metric_that_the_task_lacks_is_named():
    with pytest.raises(ValueError, match="evaluate.metric 'bleu': the task has accuracy"):
        pooled([result({"m": "a"}, 0, 0.5)], {"m": ["a"]}, "bleu")


def test_numbers_of_the_files_are_those_of_the_report():
    results = [result({"rank": rank}, seed, 0.1 * int(rank) + 0.01 * seed, -0.01 * int(rank))
               for rank in ("2", "4") for seed in (0, 1)]  # fmt: skip
    report = pooled(results, {"rank": ["2", "4"]})
    lines = table.as_csv(report).splitlines()
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert float(first["accuracy"]) == report["rows"][0]["metrics"]["accuracy"]["mean"]
    assert float(first["retention_text_low"]) == report["rows"][0]["retention"]["text"]["ci95"][0]
    assert (first["rank"], first["seeds"], first["front_text"]) == ("2", "2", "True")
    assert len(lines) == 3 and table.as_markdown(report).count("\n| ") == 3
    cells = list(csv.DictReader(io.StringIO(table.cells_as_csv(results))))
    assert [(one["rank"], one["seed"]) for one in cells] == [
        ("2", "0"), ("2", "1"), ("4", "0"), ("4", "1"),
    ]  # fmt: skip
    assert [float(one["accuracy"]) for one in cells[:2]] == (
        report["rows"][0]["metrics"]["accuracy"]["values"]
    )
    assert float(cells[3]["retention_text"]) == results[3]["retention"]["text"]["delta"]


def test_figures_are_drawn_where_they_have_something_to_show(tmp_path):
    results = [result({"rank": rank, "share": share}, 0, 0.1 * int(rank), -0.01 * int(rank))
               for rank in ("2", "4") for share in ("5%", "100%")]  # fmt: skip
    report = pooled(results, {"rank": ["2", "4"], "share": ["5%", "100%"]})
    figures.draw_front(report, tmp_path / "front.png")
    figures.draw_ranks(report, tmp_path / "rank.png")
    assert {path.name for path in tmp_path.iterdir()} == {"front.png", "rank.png"}
    # no row has a point in a mode: its panel is left out
    for row in report["rows"]:
        row["retention"]["after_image"] = None
    figures.draw_front(report | {"modes": ["text", "after_image"]}, tmp_path / "front.png")
    plain = pooled([result({"m": "a"}, 0, 0.5)], {"m": ["a"]})
    figures.draw_front(plain, tmp_path / "none.png")
    figures.draw_ranks(plain, tmp_path / "none.png")
    figures.draw_ranks(pooled([], {"rank": ["2", "4"]}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_points_have_the_numbers_of_their_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    results = [result({"m": "a"}, 0, 0.5), result({"m": "b"}, 0, 0.6, -0.02)]
    figures.draw_front(pooled(results, {"m": ["a", "b"]}), tmp_path / "front.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert "2" in texts and "2  b" in texts and "1" not in texts
