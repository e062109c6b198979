"""mmpeft compare: what a grid means, and what it refuses."""

import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from mmpeft import __version__, cli
from mmpeft.compare import grid as grids
from mmpeft.compare import run
from mmpeft.compare.cell import read_result
from mmpeft.compare.grid import load_grid, put

from .compare_sample import AXES

SHIPPED = sorted(Path(str(files("mmpeft.configs"))).glob("grids/*.yaml"))


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
        ({"retain": True}, "retain is .*; use keys below it .{} takes the defaults. or null"),
        ({"retain": {"samples": 0}}, "retain.samples is 0"),
        ({"retain": {"prose_tokens": 0}}, "retain.prose_tokens is 0"),
        ({"retain": {"margin": -1}}, "retain.margin is -1"),
        ({"retain": {"modes": []}}, "retain.modes is empty"),
        ({"overrides": {"seed": 3}}, "seed is set by the grid for every cell; name seeds under"),
        ({"axes": {"at": {"a": {"output_dir": "b"}}}}, "output_dir is set by the grid"),
        ({"axes": {"rank": {4: None, "4": None}}}, "line [0-9]+: key '4' is there twice"),
        ({"axes": {"on": {True: None}}}, "YAML reads a label as True; put it in quotes"),
        ({"axes": {"seed": {"a": None}}}, "axes.seed names a column of the table"),
        ({"axes": {"m|x": {"a": None}}}, "axes.m.x names a column"),
        ({"axes": {"at": {"a": None, "b": {"instruct.max_steps": 2}}}, "exclude": []},
         "b is the recipe of a, too"),
        ({"axes": {"rank": {1: {"model.adapter.init_args.r": 1}, 2: None},
                   "how": {"lora": {"model.adapter": {"class_path": "LoraConfig"}}}},
          "exclude": []}, "2,lora is the recipe of 1,lora, too"),
        ({"overrides": {"instruct.data_seed": 2}}, "data_seed of a stage is 2; leave it out"),
        ({"overrides": {"instruct.max_grad_norm": math.inf}}, "write a number"),
        ({"evaluate.samples": 3}, "evaluate.samples is there twice, under evaluate too"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(write_grid, capsys, keys, message):
    assert cli.main(["compare", str(write_grid(**keys))]) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("mmpeft: error: ") and re.search(message, last) and not captured.out


def test_dotted_keys_at_the_top_of_a_file_are_sections(write_grid, recipe):
    grid = write_grid(axes={"steps": {n: {"instruct.max_steps": n} for n in (1, 3)}}, exclude=[],
                      seeds=[1, 0])  # fmt: skip
    plain = load_grid(grid)
    recipe.write_text(recipe.read_text() + "\ndata.max_length: 900\nalign.warmup_steps: 7\n")
    written = yaml.safe_load(grid.read_text())
    del written["evaluate"], written["overrides"]
    grid.write_text(yaml.safe_dump(written | {"evaluate.samples": 4, "retain.samples": 5}))
    found, raw, cells = load_grid(grid)
    assert (found.evaluate.samples, found.retain.samples) == (4, 5)
    assert raw["evaluate"] == {"samples": 4} and raw["retain"] == {"samples": 5}
    assert [cell.recipe["instruct"]["max_steps"] for cell in cells] == [1, 3, 1, 3]
    assert all(cell.recipe["data"]["max_length"] == 900 for cell in cells)
    assert all(cell.recipe["align"]["warmup_steps"] == 7 for cell in cells)
    assert [list(cell.hashes) for cell in plain[2]] == [["train", "score"]] * 4
    assert [list(cell.hashes) for cell in cells] == [["train", "score", "retention"]] * 4
    # whether a seed is the first changes nothing
    again = {c.name: c.hashes for c in load_grid(write_grid(seeds=[0, 1]))[2]}
    assert again == {c.name: c.hashes for c in load_grid(write_grid(seeds=[1, 0]))[2]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_grid_resolves_and_opens_with_its_launch_command(path):
    grid, _, cells = load_grid(path)
    assert f"mmpeft compare configs/grids/{path.name}" in path.read_text().split("\n\n")[0]
    assert len(grid.seeds) >= 3 and len(cells) >= 6


def test_the_grids_of_table_1_have_the_same_methods():

    axes = [yaml.safe_load(p.read_text())["axes"] for p in SHIPPED if p.stem.startswith("table1")]
    assert len(axes) == 4 and all(one == axes[0] for one in axes)
