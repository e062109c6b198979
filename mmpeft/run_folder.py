"""The folder of a run: what it was begun with, and what may change when it goes on."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from mmpeft import durable
from mmpeft.yaml_file import read_yaml

ENVIRONMENT = "environment.json"
# what may change when a run goes on: no loss depends on it
FREE = (
    "output_dir",  # by which the run was found
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "save_steps", "save_strategy", "save_total_limit",
    "feature_cache_dir", "feature_cache_gb", "on_bad_row", "max_bad_rows", "check_rows",
)  # fmt: skip


def check_run_folder(run: Path, resolved: str, resume: bool) -> None:
    """Refuse to write into another run's folder, or to resume with another configuration."""
    recorded = run / "config.yaml"
    if not resume:
        if run.exists():
            raise FileExistsError(
                f"run folder {run} exists; continue it with --resume, choose another "
                "--output_dir, or remove it."
            )
    elif not recorded.is_file():
        raise FileNotFoundError(f"nothing to resume: {recorded} does not exist.")
    else:
        for mark in run.glob("stages/*/*/complete"):  # what stood for checksums.json then
            if not (mark.parent / durable.CHECKSUMS).exists():
                raise ValueError(
                    f"{run} was begun with an older mmpeft, which drew samples in another order; "
                    "finish it with that one, or begin anew with another --output_dir."
                )
        read_yaml(recorded, "config")  # says so where it is none
        keys = differing(yaml.safe_load(recorded.read_text()), yaml.safe_load(resolved))
        if keys:
            raise ValueError(
                f"{run} was begun with another configuration: {', '.join(keys)} differ."
            )


def differing(was, now) -> list[str]:
    """Dotted names of what differs between two configurations, ``FREE`` apart."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [key for key in was | now if key not in FREE]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        keys, was, now = range(len(was)), dict(enumerate(was)), dict(enumerate(now))
    else:
        return [] if was == now else [""]
    below = [(key, differing(was.get(key, ...), now.get(key, ...))) for key in keys]
    return [f"{key}.{name}".removesuffix(".") for key, names in below for name in names]


def start_run_folder(run: Path, resolved: str, cache) -> None:
    """Create the run folder with the resolved configuration and the environment."""
    found = environment() | {"features_kept": cache is not None and cache.store is not None}
    with durable.whole_folder(run, checksums=False, replace=False) as new:
        (new / ENVIRONMENT).write_text(json.dumps(found, indent=2) + "\n")
        (new / "config.yaml").write_text(resolved)


def keeps_features(run: Path) -> bool | None:
    """Whether the run kept features when it began, ``None`` if unknown.

    It was decided by the clock then, and features that are made anew may be rounded otherwise.
    """
    path = run / ENVIRONMENT
    return json.loads(path.read_text()).get("features_kept") if path.is_file() else None


def finished(final: Path) -> bool:
    """Whether a stage has its last checkpoint; a torn one is said to be made again."""
    if not final.exists():
        return False
    if not (final / durable.CHECKSUMS).is_file() or (why := durable.problem(final)) is None:
        return True
    print(f"{final} is torn: {why}; its stage goes on from its own checkpoints.", file=sys.stderr)
    return False


def environment() -> dict:
    """Versions and hardware that a result depends on."""
    packages = ("mmpeft", "torch", "transformers", "peft", "timm", "open_clip_torch", "accelerate")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in packages},
    }
