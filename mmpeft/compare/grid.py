"""A grid: a recipe, what varies in it, and what is measured of every cell."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmpeft import __version__, durable
from mmpeft.checkpoint import find_checkpoint
from mmpeft.config import RunConfig, from_mapping
from mmpeft.config_errors import did_you_mean
from mmpeft.task import Task
from mmpeft.yaml_file import read_yaml

LABEL = re.compile(r"[\w.%+=-]+")
COLUMNS = (  # of the tables, beside those of the axes
    "seed", "seeds", "trained_parameters", "connector_parameters", "adapter_parameters",
    "peak_memory_bytes", "train_seconds",
)  # fmt: skip


@dataclass
class ScoreConfig:
    """How a cell is scored.

    Attributes:
        task: the task whose test split is asked; null is that of the recipe.
        samples: rows, drawn with ``seed``, the same in every cell; null takes all.
        seed: draws the rows.
        batch_size: rows at a time.
        metric: of several that the task has, the one that figures show; null is the first.
    """

    task: Task | None = None
    samples: int | None = 500
    seed: int = 0
    batch_size: int = 64
    metric: str | None = None

    def __post_init__(self):
        for name in ("samples", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"evaluate.{name} is {value}; it must be 1 or more.")


@dataclass
class RetainConfig:
    """How the text skills of a cell are measured, see ``mmpeft retain``.

    Attributes:
        suite: lm-eval group or task.
        include_path: folder of further lm-eval YAML files.
        data_dir: data of suite standard_local.
        samples: items of each text task; null takes all.
        prose_tokens: length of the prose that both sides predict.
        modes: text, with_image, after_image.
        seed: draws items and image prompts.
        margin: loss that still counts as retained, as a share.
    """

    suite: str = "embedded"
    include_path: str | None = None
    data_dir: str | None = None
    samples: int | None = None
    prose_tokens: int = 16384
    modes: list[Literal["text", "with_image", "after_image"]] = field(
        default_factory=lambda: ["text", "after_image"]
    )
    seed: int = 0
    margin: float = 0.02

    def __post_init__(self):
        for name in ("samples", "prose_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"retain.{name} is {value}; it must be 1 or more.")
        if not 0 < self.margin < 1:
            raise ValueError(f"retain.margin is {self.margin}; it must lie between 0 and 1.")
        if not self.modes:
            raise ValueError("retain.modes is empty; name at least one, for example [text].")


@dataclass
class GridConfig:
    """What is compared.

    Attributes:
        recipe: the YAML recipe that cells differ from; relative to the grid's file.
        axes: by name of the axis and label on it the keys of the recipe that are set, for example
            ``{rank: {4: {model.rank: 4}, 16: {model.rank: 16}}}``. A key's value is replaced as a
            whole; axes are applied in their order. A label may be null: the recipe as it is.
        overrides: keys set in every cell, before those of the axes.
        seeds: every combination of labels is run once with each.
        only: combinations to run, for example ``[{method: [lora, dora]}, {method: ia3, rank: 4}]``;
            one that fits any of them is. null runs all.
        exclude: combinations to leave out, written likewise.
        evaluate: how a cell is scored.
        retain: how its text skills are measured; null does not.
        keep_checkpoints: keep what was trained; false keeps results and replies alone.
        output_dir: folder of the cells and the table.
    """

    recipe: str
    axes: dict[str, Any]
    output_dir: str
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    only: list[dict[str, Any]] | None = None
    exclude: list[dict[str, Any]] = field(default_factory=list)
    evaluate: ScoreConfig = field(default_factory=ScoreConfig)
    retain: RetainConfig | None = None
    keep_checkpoints: bool = True

    def __post_init__(self):
        if not self.axes:
            raise ValueError("axes is empty; name at least one, with its labels.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; name at least one, and each once.")
        for name in self.axes:
            if name in COLUMNS or not LABEL.fullmatch(name):
                raise ValueError(
                    f"axes.{name} names a column of the table; use letters, digits and _.%+=-, and "
                    f"none of {', '.join(COLUMNS)}."
                )
        self.axes = {name: _labels(name, found) for name, found in self.axes.items()}
        labelled = [keys for labels in self.axes.values() for keys in labels.values()]
        for key, instead in OWN_KEYS.items():
            if any(key in keys for keys in (self.overrides, *labelled)):
                raise ValueError(f"{key} is set by the grid for every cell; {instead}.")
        for key, value in (("only", self.only or []), ("exclude", self.exclude)):
            for rule in value:
                for axis, labels in rule.items():
                    _known(f"{key}: axis", axis, self.axes)
                    for label in _listed(labels):
                        _known(f"{key}: {axis}", label, self.axes[axis])


OWN_KEYS = {  # of a recipe, which belong to the grid
    "seed": "name seeds under seeds",
    "output_dir": "name the grid's folder under output_dir",
}


@dataclass
class Cell:
    """One run of a grid.

    Attributes:
        labels: the cell's label on each axis.
        recipe: the whole recipe, as a mapping, but for ``output_dir``.
        hashes: by step (train, score, retention) a hash of what its result depends on.
        start: a hash of the bridge that training starts from, if that is on disk.
    """

    labels: dict[str, str]
    seed: int
    recipe: dict
    hashes: dict[str, str]
    start: str | None = None

    @property
    def name(self) -> str:
        """``lora,16,seed0``: also the name of its folder."""
        return ",".join([*self.labels.values(), f"seed{self.seed}"])


SECTIONS = {"evaluate.": ScoreConfig, "retain.": RetainConfig, "": GridConfig}


def load_grid(path) -> tuple[GridConfig, dict, list[Cell]]:
    """Read a grid and check the recipe of every cell.

    Returns:
        the grid, its sections as they were written, and its cells, a whole seed after the other.

    Raises:
        FileNotFoundError: no such grid, or no such recipe.
        ValueError: an unknown key, axis or label, a cell whose recipe is refused, or no cell at
            all; one line.
    """
    path = Path(path)
    raw = nested(read_yaml(path, "grid"), path)
    grid = from_mapping(GridConfig, copy.deepcopy(raw), path, SECTIONS)
    recipe_path = path.parent / grid.recipe
    base = nested(read_yaml(recipe_path, f"{path}: recipe"), recipe_path)
    cells, checksums = [], functools.cache(fingerprint)  # once, however many cells start there
    for labels in combinations(grid):
        name = f"{path}: {','.join(labels.values())}"
        recipe = copy.deepcopy(base)
        for keys in (grid.overrides, *(grid.axes[axis][label] for axis, label in labels.items())):
            for key, value in keys.items():
                put(recipe, key, value, path)
        recipe |= {"seed": grid.seeds[0], "output_dir": "run"}
        try:
            json.dumps(recipe, allow_nan=False, default=str)
        except ValueError:
            raise ValueError(
                f"{name}: .inf and .nan do not reach a cell; write a number."
            ) from None
        from_mapping(RunConfig, copy.deepcopy(recipe), name)
        if same := [cell.labels for cell in cells if cell.recipe == recipe]:
            raise ValueError(
                f"{name} is the recipe of {','.join(same[0].values())}, too: what sets them apart "
                "is overridden by an axis that comes later, or set to what it is. Change the order "
                "of axes, or leave one out."
            )
        cells.append(Cell(labels, grid.seeds[0], recipe, {}))
    if not cells:
        raise ValueError(f"{path}: only and exclude leave no cell to run.")
    cells = [
        dataclasses.replace(cell, seed=seed, recipe=cell.recipe | {"seed": seed})
        for seed in grid.seeds for cell in cells
    ]  # fmt: skip
    for cell in cells:
        start = checksums(cell.recipe["model"].get("start_from"))
        cell.start = start and _hash(start)
        cell.hashes = step_hashes(cell.recipe, raw, start)
    return grid, raw, cells


def nested(mapping: dict, where) -> dict:
    """A YAML file's mapping, with sections for dotted keys at its top (``model.rank: 4``)."""
    found = {key: value for key, value in mapping.items() if "." not in str(key)}
    for key, value in mapping.items():
        if "." in str(key):
            section, _, rest = key.partition(".")
            if rest in (found.get(section) or {}):
                raise ValueError(f"{where}: {key} is there twice, under {section} too; leave one.")
            put(found, key, value, where)
    return found


def combinations(grid: GridConfig) -> list[dict[str, str]]:
    """The label on each axis of every combination to run."""

    def fits(labels, rule):
        return all(labels[axis] in _listed(wanted) for axis, wanted in rule.items())

    every = itertools.product(*grid.axes.values())
    every = [dict(zip(grid.axes, labels, strict=True)) for labels in every]
    return [
        labels for labels in every
        if (grid.only is None or any(fits(labels, rule) for rule in grid.only))
        and not any(fits(labels, rule) for rule in grid.exclude)
    ]  # fmt: skip


def put(recipe: dict, key: str, value, where) -> None:
    """Set a dotted key in place; sections that are not there are made."""
    *sections, last = key.split(".")
    at = recipe
    for section in sections:
        if at.get(section) is None:
            at[section] = {}
        at = at[section]
        if not isinstance(at, dict):
            raise ValueError(f"{where}: {key} cannot be set, {section} is {at!r} in the recipe.")
    at[last] = copy.deepcopy(value)


def step_hashes(recipe: dict, raw: dict, start: dict | None) -> dict[str, str]:
    """The recipe, the step's settings and mmpeft's version, hashed. No retention, no key for it.

    ``start`` is the :func:`fingerprint` of a bridge that training starts from.
    """
    train = _hash([__version__, recipe] + ([] if start is None else [start]))
    score = {k: v for k, v in (raw.get("evaluate") or {}).items() if k != "metric"}  # is only shown
    keys = {"train": train, "score": _hash([train, score])}
    if raw.get("retain") is not None:
        keys["retention"] = _hash([train, raw["retain"]])
    return keys


def fingerprint(start: str | None) -> dict | None:
    """Checksums of the files of a bridge on disk; ``None`` where there is none (yet)."""
    if start is None or not Path(start).exists():
        return None
    try:
        return durable.fingerprints(find_checkpoint(start))
    except FileNotFoundError:
        return None


def _hash(value) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _labels(axis: str, found) -> dict[str, dict]:
    if not isinstance(found, dict) or not found:
        raise ValueError(f"axes.{axis} is {found!r}; give labels and the keys each sets.")
    named = {}
    for label, keys in found.items():
        if isinstance(label, bool):
            raise ValueError(f"axes.{axis}: YAML reads a label as {label}; put it in quotes.")
        if not LABEL.fullmatch(str(label)):
            raise ValueError(
                f"axes.{axis}: label {label!r} names a folder; use letters, digits and _.%+=- only."
            )
        if not isinstance(keys, dict | None):
            raise ValueError(f"axes.{axis}.{label} is {keys!r}; give keys of the recipe, or null.")
        named[str(label)] = keys or {}
    return named


def _listed(labels) -> list[str]:
    return [str(label) for label in (labels if isinstance(labels, list) else [labels])]


def _known(where: str, name: str, known) -> None:
    if name not in known:
        raise ValueError(f"{where} {name!r} is not in axes.{did_you_mean(name, list(known))}")
