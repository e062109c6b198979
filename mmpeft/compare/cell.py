"""One cell of a grid, as its own process: ``python -m mmpeft.compare.cell FOLDER``.

FOLDER holds ``cell.yaml`` (what to measure) and ``recipe.yaml``. Each step's result is written into
``result.json`` as soon as it is there; what is there already with the same key is not done again.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmpeft import adapters, checkpoint, durable
from mmpeft.cache import cache_home
from mmpeft.compare.grid import RetainConfig, ScoreConfig
from mmpeft.compare.table import PROSE
from mmpeft.config import STAGES, RunConfig, from_mapping, load
from mmpeft.evaluate import evaluate
from mmpeft.yaml_file import read_yaml

SCHEMA = "mmpeft.compare.cell/1"
RESULT = "result.json"
ITEMS = "items.jsonl"


@dataclass
class CellConfig:
    """``cell.yaml``.

    Attributes:
        labels: the cell's label on each axis.
        seed: of training.
        hashes: by step, a hash of what its result depends on.
        start: a hash of the bridge that training starts from, if that is on disk.
        mmpeft: the version that is in these.
        evaluate, retain, keep_checkpoints: as in the grid.
    """

    labels: dict[str, str]
    seed: int
    hashes: dict[str, str]
    start: str | None = None
    mmpeft: str | None = None
    evaluate: ScoreConfig = field(default_factory=ScoreConfig)
    retain: RetainConfig | None = None
    keep_checkpoints: bool = True


def run_cell(folder) -> dict:
    """Do what the cell's result lacks.

    Returns:
        ``result.json``, see docs/json.md.
    """
    from mmpeft.run_folder import environment

    folder = Path(folder)
    cell = from_mapping(CellConfig, read_yaml(folder / "cell.yaml", "cell"), folder / "cell.yaml")
    config, _ = load(folder / "recipe.yaml", ["--output_dir", str(folder / "run")])
    result = read_result(folder) or {"schema": SCHEMA, "hashes": {}}
    missing = [step for step, key in cell.hashes.items() if result["hashes"].get(step) != key]
    kept = (folder / "run" / "checkpoint").is_dir()
    if "train" in missing or (missing and not kept):  # nothing of another training stays
        missing = list(cell.hashes)
        result = {"schema": SCHEMA, "hashes": {}}
        write_json(folder / RESULT, result)
        (folder / ITEMS).unlink(missing_ok=True)
        discard(folder / "retain")
    result |= {"labels": cell.labels, "seed": cell.seed}
    steps = {
        "train": lambda: train_cell(folder, config),
        "score": lambda: score_cell(folder, config, cell.evaluate),
        "retention": lambda: retain_cell(folder, config, cell.retain),
    }
    for step in missing:
        result[step] = steps[step]()
        result["hashes"][step] = cell.hashes[step]
        result["environment"] = environment()
        write_json(folder / RESULT, result)
    if not cell.keep_checkpoints:
        for name in ("checkpoint", "best"):
            discard(folder / "run" / name)
    return result


def discard(folder: Path) -> None:
    """Remove a folder; a kill on the way leaves no part of it under its name."""
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # of a kill
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def read_result(folder) -> dict | None:
    """What a cell has so far; ``None`` is nothing.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / RESULT
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to run the cell anew.") from None


def train_cell(folder: Path, config: RunConfig) -> dict:
    """Train from the start; what an interrupted process left is removed.

    Returns:
        ``trained_parameters`` of each part, ``peak_memory_bytes`` of the process up to the end of
        training (of the device on CUDA), ``seconds`` in the training loops, those of the search
        for a rank included.
    """
    from mmpeft.rank import FILE
    from mmpeft.train import train

    run = folder / "run"
    discard(run)
    stages = [stage for stage in STAGES if getattr(config, stage) is not None]
    # a cell begins anew, so nothing is saved on the way
    unsaved = [word for stage in stages for word in (f"--{stage}.save_strategy", "no")]
    train(folder / "recipe.yaml", ["--output_dir", str(run), *unsaved])
    memory = peak_memory()
    shutil.rmtree(run / "stages", ignore_errors=True)
    logged = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    seconds = sum(row.get("train_runtime", 0) for row in logged)
    if (run / FILE).is_file():
        seconds += json.loads((run / FILE).read_text())["seconds"]
    model, _ = checkpoint.load(run, is_trainable=True)
    adapters.set_trainable(model, **config.trained_parts(stages[-1]))
    parts = {row.part: row.trained for row in adapters.freeze_plan(model)}
    return {
        "trained_parameters": {part: parts[part] for part in ("connector", "adapter")},
        "peak_memory_bytes": memory,
        "seconds": seconds,
    }


def peak_memory() -> int:
    """Bytes: the most that this process, or on CUDA its tensors on the device, held at a time."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss may be that of the process that started this one
        line = next(text for text in status.read_text().splitlines() if text.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def score_cell(folder: Path, config: RunConfig, settings: ScoreConfig) -> dict:
    """The report of ``mmpeft eval``; every row with its reply is kept as ``items.jsonl``."""
    model, processor = checkpoint.load(folder / "run")
    report, items = evaluate(
        model, processor, settings.task or config.data.task, samples=settings.samples,
        seed=settings.seed, batch_size=settings.batch_size,
    )  # fmt: skip
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    durable.write(folder / ITEMS, lines)
    return {key: report[key] for key in ("task", "n", "metrics")}


def retain_cell(folder: Path, config: RunConfig, settings: RetainConfig) -> dict:
    """The report of ``mmpeft retain``, kept in ``retain/``: the pooled difference in each mode.

    Under ``prose`` the share by which the bits per byte of prose are fewer than the base's
    (negative where they are more).
    """
    from mmpeft.retention import retain_run

    report = retain_run(
        folder / "run", config.data.task, suite=settings.suite, modes=settings.modes,
        suite_folder=settings.include_path, data_dir=settings.data_dir, samples=settings.samples,
        prose_tokens=settings.prose_tokens, seed=settings.seed, margin=settings.margin,
        output=folder / "retain", cache=cache_home() / "retention",
    )  # fmt: skip
    kept = ("delta", "ci95", "base", "n", "exact", "verdict")
    found = {
        mode: body["overall"] and {key: body["overall"][key] for key in kept}
        for mode, body in report["modes"].items()
    }
    bits = report["bits_per_byte"]
    found[PROSE] = {
        "delta": 1 - bits["bridge"] / bits["base"],
        "ci95": None,
        "exact": report["provenance"]["text"]["max_abs_dlogit"] == 0,
    }
    return found


def write_json(path: Path, value: dict) -> None:
    """Write whole or not at all; several processes may."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


if __name__ == "__main__":
    try:
        run_cell(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
