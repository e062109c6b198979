"""mmpeft compare: cells as processes, and resuming."""

import fcntl
import json
import os
import signal
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

from mmpeft import cli
from mmpeft.compare import cell as cell_module
from mmpeft.compare import grid as grids
from mmpeft.compare import run, table
from mmpeft.compare.cell import CellConfig, read_result
from mmpeft.config import from_mapping

from .compare_sample import AXES, result


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
    assert "2,seed0: has the results of train, but nothing was kept; does all again" in said
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


def test_a_stopped_compare_stops_its_cell(tmp_path, monkeypatch):
    cell = tmp_path / "cell.sh"
    cell.write_text("#!/bin/sh\necho at work\nexec sleep 30\n")
    cell.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(cell))
    log = tmp_path / "log.txt"

    def stop():
        while "at work" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with log.open("w") as file, run.held(tmp_path) as lock:
        threading.Thread(target=stop).start()
        with pytest.raises(KeyboardInterrupt) as stopped:
            run.start(tmp_path, file, lock)
    assert stopped.value.code == 143 and not run.is_running(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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


def test_a_table_is_drawn_by_one_process_at_a_time(write_grid, in_process):
    grid = write_grid(axes={"rank": {2: AXES["rank"][2]}}, exclude=[])
    run.compare(grid)
    out = grid.parent / "out"
    result = out / "cells/2,seed0/result.json"
    away = result.rename(out / "away.json")
    with run.held(out) as drawing:

        def end_a_cell():
            away.rename(result)
            fcntl.flock(drawing, fcntl.LOCK_UN)

        threading.Timer(0.2, end_a_cell).start()
        assert run.redraw(out)["complete"]


def test_a_redo_that_was_killed_goes_on(write_grid, in_process, monkeypatch):
    one = {"axes": {"rank": {2: AXES["rank"][2]}}, "exclude": []}
    run.compare(write_grid(**one))
    other = write_grid(**one, evaluate={"samples": 3})
    with monkeypatch.context() as patch:
        patch.setattr(run, "start", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.compare(other, redo=True)
    assert run.compare(other)["n"] == 3 and len(in_process) == 2


def test_a_start_that_changed_is_named(write_grid, in_process, make_bridge, tmp_path):
    model, processor = make_bridge("none", adapter=None)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    start = {"model": {"start_from": str(tmp_path / "start")}, "align": None,
             "instruct.max_steps": 1}  # fmt: skip
    grid = write_grid(axes={"only": {"one": None}}, exclude=[], overrides=start)
    run.compare(grid)
    with torch.no_grad():
        next(model.connector.parameters()).add_(1)
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"one,seed0 \(start: \w{16} -> \w{16}\)\. Run"):
        run.compare(grid)


def test_a_damaged_result_is_named(write_grid, in_process):
    grid = write_grid(axes={"rank": {2: AXES["rank"][2]}}, exclude=[])
    run.compare(grid)
    kept = grid.parent / "out/cells/2,seed0/result.json"
    kept.write_text("")
    with pytest.raises(ValueError, match=r"2,seed0/result.json is damaged .*; remove it"):
        run.compare(grid)
    kept.unlink()
    assert run.compare(grid)["complete"] and len(in_process) == 2


def test_a_grid_draws_its_own_cells_though_another_is_in_its_folder(write_grid, in_process):
    axes = {"rank": AXES["rank"]}
    grid = write_grid(axes=axes, exclude=[])
    run.compare(grid)
    ours = json.loads((grid.parent / "out/grid.json").read_text())
    run.compare(write_grid(axes={"r": {8: {"model.rank": 8}}}, exclude=[]))
    assert list(run.redraw(grid.parent / "out")["axes"]) == ["r"]
    assert run.redraw(grid.parent / "out", ours)["axes"] == {"rank": ["2", "4"]}


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
    own = write_grid().parent / "out/cells/2,seed0"
    assert read_result(own)["hashes"] == {} and not (own / "items.jsonl").exists()
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
        ({"axes": {"on": {"one": None, "two": {"data.task.init_args.test": "fewer.jsonl"}}},
          "exclude": []}, "cells would be scored on different test rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_training(
    write_grid, in_process, recipe, monkeypatch, keys, message
):
    monkeypatch.chdir(recipe.parent)
    data = Path(yaml.safe_load(recipe.read_text())["data"]["task"]["init_args"]["test"])
    Path("fewer.jsonl").write_text("".join(data.read_text().splitlines(True)[:8]))
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


def test_score_and_retention_are_of_one_training(write_grid, in_process, monkeypatch):
    scored = Mock(wraps=cell_module.score_cell)
    monkeypatch.setattr(cell_module, "score_cell", scored)
    retained = result({}, 0, 0, -0.1)["retention"]
    monkeypatch.setattr(cell_module, "retain_cell", lambda *args: retained)
    one = {"axes": {"method": {"lora": None}}, "exclude": [], "keep_checkpoints": False}
    run.compare(write_grid(**one))
    run.compare(write_grid(**one, retain={"modes": ["text"]}))  # which trains again
    assert scored.call_count == 2


def test_a_label_that_comes_later_is_scored_on_the_same_rows(write_grid, in_process, recipe):
    data = Path(yaml.safe_load(recipe.read_text())["data"]["task"]["init_args"]["test"])
    fewer = recipe.parent / "fewer.jsonl"
    fewer.write_text("".join(data.read_text().splitlines(True)[1:]))
    first = {"on": {"one": None}}
    run.compare(write_grid(axes=first, exclude=[]))
    later = {"on": first["on"] | {"two": {"data.task.init_args.test": str(fewer)}}}
    with pytest.raises(ValueError, match="cells would be scored on different test rows"):
        run.compare(write_grid(axes=later, exclude=[]))
    assert in_process == ["one,seed0"]


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
    assert prose == {"delta": 0, "ci95": None, "exact": True}


def test_a_connector_alone_is_exact_on_text_and_measured_behind_pictures(
    write_grid, in_process, monkeypatch
):
    from mmpeft.retention import statistics

    monkeypatch.setattr(statistics, "above_chance", lambda *args: True)  # a random LLM is not
    axes = {"method": {"connector": {"model.adapter": None, "model.gate": "none"}}}
    retain = {"samples": 2, "prose_tokens": 60, "modes": ["text", "after_image"]}
    report = run.compare(write_grid(axes=axes, exclude=[], retain=retain))
    (row,) = report["rows"]
    assert {mode: own["exact"] for mode, own in row["retention"].items()} == {
        "text": True, "after_image": False, "prose": True,
    }  # fmt: skip
    assert table.cells(report, row).count("0 (exact)") == 2
