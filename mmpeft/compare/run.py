"""Start the cells that are missing, one process after the other, and keep the table."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from mmpeft import __version__, durable
from mmpeft.compare.cell import read_result, write_json
from mmpeft.compare.figures import draw_front, draw_ranks
from mmpeft.compare.grid import Cell, GridConfig, load_grid
from mmpeft.compare.table import as_csv, as_markdown, cells_as_csv, pool
from mmpeft.config import RunConfig, from_mapping
from mmpeft.stopping import sigterm_raises
from mmpeft.yaml_file import read_yaml

GRID = "grid.json"
SHOWN = 3  # changed cells that an error names
REDRAWN = 30.0  # seconds in which another process has drawn its table
PATIENCE = 1.0  # seconds in which a process that only looks at a lock has let it go


def compare(path, output_dir: str | None = None, redo: bool = False) -> dict:
    """Run what is missing of a grid; its table and figures are written anew after every cell.

    Args:
        path: the grid's YAML file.
        output_dir: instead of the grid's own.
        redo: run cells anew that were run with another configuration.

    Returns:
        the report, see docs/json.md; it stands in the folder as ``compare.json``.

    Raises:
        ValueError: a mistake in the grid, cells in the folder of another configuration, or, at
            the first finished cell, a metric that the task does not have.
    """
    grid, raw, cells = load_grid(path)
    folder = Path(output_dir or grid.output_dir)
    sections = {key: raw[key] for key in ("evaluate", "retain") if raw.get(key) is not None}
    sections["keep_checkpoints"] = grid.keep_checkpoints
    if not redo:
        refuse_changed(folder, cells, sections, path)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    about = {
        "grid": str(path), "recipe": grid.recipe, "seeds": grid.seeds,
        "metric": grid.evaluate.metric,
        "axes": {axis: list(labels) for axis, labels in grid.axes.items()},
        "cells": [{"name": c.name, "labels": c.labels, "seed": c.seed, "hashes": c.hashes}
                  for c in cells],
    }  # fmt: skip
    write_json(folder / GRID, about)  # for `mmpeft compare FOLDER`
    names = {cell.name for cell in cells}
    if others := [one.name for one in (folder / "cells").iterdir() if one.name not in names]:
        print(f"{folder}: {len(others)} cells are not in this grid and left out", file=sys.stderr)
    left = [cell for cell in cells if not is_complete(place(folder, cell.name), cell.hashes)]
    report = redraw(folder, about)
    if left:
        try_measures(grid, cells, path)
    with tqdm(total=len(cells), initial=len(cells) - len(left), unit="cell") as bar:
        for cell in left:
            bar.set_description(cell.name)
            if plan := partly_done(place(folder, cell.name), cell.hashes):
                bar.write(f"{cell.name}: {plan}", file=sys.stderr)
            if problem := run_one(folder, cell, sections):
                bar.write(f"{cell.name}: {problem}", file=sys.stderr)
            bar.update()
            report = redraw(folder, about)
    return report


def try_measures(grid: GridConfig, cells: list[Cell], path) -> None:
    """Read the rows that cells are scored on, and the suite, before any that is left trains.

    Raises:
        FileNotFoundError, ValueError: they cannot be had, or cells would be scored on several
            tasks or different rows, which one table does not hold.
    """
    from mmpeft.evaluate import draw_rows
    from mmpeft.retention.suite import Suite

    tasks = [grid.evaluate.task]
    if grid.evaluate.task is None:
        data = {json.dumps(cell.recipe.get("data"), sort_keys=True): cell.recipe for cell in cells}
        tasks = [from_mapping(RunConfig, recipe, path).data.task for recipe in data.values()]
    if len(names := {task.name for task in tasks}) > 1:
        raise ValueError(
            f"{path}: cells would be scored on {', '.join(sorted(names))}; set evaluate.task, or "
            "write a grid for each."
        )
    settings = grid.evaluate
    chats = [draw_rows(task, settings.samples, settings.seed)[2] for task in tasks]
    if any(own != chats[0] for own in chats):
        raise ValueError(
            f"{path}: cells would be scored on different test rows, which one table does not hold; "
            "set evaluate.task."
        )
    if (text := grid.retain) is not None:
        Suite(text.suite, text.include_path, text.samples, text.seed, text.data_dir)


def redraw(folder, grid: dict | None = None) -> dict:
    """Write table and figures of what the folder of a grid holds, and return the report.

    Args:
        grid: what was last written as ``grid.json``, unless another grid is meant.
    """
    folder = Path(folder)
    if not (folder / GRID).is_file():
        raise FileNotFoundError(f"{folder} is no folder of mmpeft compare: it has no {GRID}.")
    # one process at a time, so what is written last was read last
    with held(folder, REDRAWN):
        return _redraw(folder, grid or json.loads((folder / GRID).read_text()))


def _redraw(folder: Path, grid: dict) -> dict:
    results, failures, missing, running = [], [], [], []
    for cell in grid["cells"]:
        own = place(folder, cell["name"])
        log = own / "log.txt"
        busy = not is_complete(own, cell["hashes"]) and is_running(own)
        if is_complete(own, cell["hashes"]):
            labels = {"labels": cell["labels"], "seed": cell["seed"]}  # an axis may be renamed
            results.append(of_steps(read_result(own), cell["hashes"]) | labels)
        elif busy:
            running.append(cell["name"])
        elif log.is_file() and was_begun(own, cell["hashes"]):
            failures.append({"cell": cell["name"], "error": last_line(log), "log": str(log)})
        else:
            missing.append(cell["name"])
    report = pool(grid, results, failures, missing, running)
    write_json(folder / "compare.json", report)
    tables = {"table.md": as_markdown, "table.csv": as_csv}
    texts = {name: write(report) for name, write in tables.items()}
    for name, text in (texts | {"cells.csv": cells_as_csv(results)}).items():
        durable.write(folder / name, text)
    for name, draw in (("front.png", draw_front), ("rank.png", draw_ranks)):
        (folder / name).unlink(missing_ok=True)
        draw(report, folder / name)
    return report


def run_one(folder: Path, cell: Cell, sections: dict) -> str | None:
    """Run one cell; what went wrong, in one line."""
    own = place(folder, cell.name)
    own.mkdir(exist_ok=True)
    with held(own, PATIENCE) as lock:
        if lock is None:
            return "another process is at work on it"
        if is_complete(own, cell.hashes):  # by another process, in the meantime
            return None
        about = {"labels": cell.labels, "seed": cell.seed, "hashes": cell.hashes}
        about |= {"start": cell.start, "mmpeft": __version__, **sections}
        for name, content in (("cell.yaml", about), ("recipe.yaml", cell.recipe)):
            # JSON is YAML, and says of every word that it is none of YAML's numbers
            write_json(own / name, content)
        with (own / "log.txt").open("w") as log:
            code = start(own, log, lock)
            if code < 0:
                log.write(f"\nkilled by {signal.Signals(-code).name}\n")
    return None if code == 0 else f"{last_line(own / 'log.txt')} ({own / 'log.txt'})"


def start(own: Path, log, lock: int) -> int:
    """The exit code of a cell's process, which holds the lock too."""
    command = [sys.executable, "-m", "mmpeft.compare.cell", str(own)]
    with sigterm_raises():  # which ends the cell too
        return subprocess.run(command, stdout=log, stderr=log, pass_fds=[lock]).returncode


def refuse_changed(folder: Path, cells: list[Cell], sections: dict, path) -> None:
    """Refuse to run cells anew that have results of another configuration, saying what differs."""
    changed = []
    for cell in cells:
        own = place(folder, cell.name)
        done = (read_result(own) or {"hashes": {}})["hashes"]
        if any(done.get(step, key) != key for step, key in cell.hashes.items()):
            if was_begun(own, cell.hashes):  # with --redo, and not ended
                continue
            was = read_yaml(own / "recipe.yaml", "recipe") | {
                key: value for key, value in read_yaml(own / "cell.yaml", "cell").items()
                if key in ("evaluate", "retain", "mmpeft", "start")
            }  # fmt: skip
            now = cell.recipe | {k: v for k, v in sections.items() if k != "keep_checkpoints"}
            now |= {"mmpeft": __version__, "start": cell.start}
            changed.append(f"{cell.name} ({differences(was, now)})")
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ValueError(
            f"{path}: {folder} holds results of another configuration: "
            f"{'; '.join(changed[:SHOWN])}{more}. Run these anew with --redo, or choose another "
            "--output_dir."
        )


def differences(was: dict, now: dict) -> str:
    """``instruct.max_steps: 5 -> 8, ...``"""
    before, after = flat(was), flat(now)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys)


def flat(value, prefix: str = "") -> dict:
    """Nested mappings by dotted key."""
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {k: v for key, one in value.items() for k, v in flat(one, f"{prefix}{key}.").items()}


def place(folder: Path, name: str) -> Path:
    return folder / "cells" / name


def steps_done(own: Path, hashes: dict) -> list[str]:
    """The steps that have a result of this configuration."""
    done = (read_result(own) or {"hashes": {}})["hashes"]
    return [step for step, key in hashes.items() if done.get(step) == key]


def partly_done(own: Path, hashes: dict) -> str | None:
    """What a cell that was begun has, and what it lacks."""
    if not (done := steps_done(own, hashes)):
        return None
    if not (own / "run/checkpoint").is_dir():
        return f"has the results of {', '.join(done)}, but nothing was kept; does all again"
    left = [step for step in hashes if step not in done]
    return f"has the results of {', '.join(done)}; does {', '.join(left)}"


def is_complete(own: Path, hashes: dict) -> bool:
    """Whether every step has a result of this configuration."""
    return len(steps_done(own, hashes)) == len(hashes)


def of_steps(result: dict, hashes: dict) -> dict:
    """A result without what it has of steps that the grid no longer has."""
    return {k: v for k, v in result.items() if k in hashes or k not in result["hashes"]}


def was_begun(own: Path, hashes: dict) -> bool:
    """Whether the last process on the cell had this configuration."""
    return read_yaml(own / "cell.yaml", "cell")["hashes"] == hashes


def is_running(own: Path) -> bool:
    """Whether a process is at work on the cell."""
    if not (own / ".lock").is_file():
        return False
    with held(own) as lock:
        return lock is None


@contextmanager
def held(own: Path, patience: float = 0.0):
    """The number of an open file that locks the cell's folder, for its process too, or ``None``.

    It is tried for ``patience`` seconds: :func:`is_running` has the lock for an instant, too.
    """
    import fcntl

    until = time.monotonic() + patience
    with (own / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    yield None
                    return
                time.sleep(0.02)
        yield file.fileno()


def last_line(log: Path) -> str:
    """The last line of a log that says something; progress bars count as lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no word in its log")
