"""Files that are whole or not there, whatever happens while they are written.

What is written goes under a temporary name, to the disk, and only then under its own. A folder gets
``checksums.json`` last (SHA-256 and size of every file), so that one which was torn later is told
from one which is as it was written.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

CHECKSUMS = "checksums.json"
TORN = "torn-"  # what a torn checkpoint is called, until there is a newer one
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPARE = 1_000_000  # a disk with fewer bytes free is full
_WINDOWS = os.name == "nt"


class NotWritten(OSError):
    """Something could not be written; what was there before is as it was.

    Attributes:
        errno: one of ``NO_ROOM`` where the disk is full; ``None`` where it is not known.
    """

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.errno = errno


def write(path: Path, data: str | bytes) -> None:
    """Write a file all or nothing, over an older one.

    Raises:
        NotWritten: the disk is full, or the folder cannot be written to.
    """
    partial = _partial(path)
    with _explained(path):
        try:
            with partial.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)


@contextmanager
def whole_folder(path: Path, checksums: bool = True, replace: bool = True) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` with its checksums when the block ends well.

    It has the same name, in a folder beside ``path``, until then, and is gone if the block fails.

    Args:
        replace: whether it takes the place of one that exists when the block ends.

    Raises:
        FileExistsError: there is one that may not be replaced.
        NotWritten: the disk is full, or a folder cannot be written to.
    """
    staging = _partial(path)
    new, old = staging / path.name, staging / f"{path.name}.old"

    def clear():
        if old.exists() and not path.exists():  # it ended between the two renames
            old.rename(path)
        shutil.rmtree(staging, ignore_errors=True)

    clear()  # after a process that was killed
    try:
        with _explained(path):
            new.mkdir(parents=True)
            yield new
            seal(new, checksums)
            if path.exists():
                if not replace:
                    raise _Exists(
                        f"{path} was made by another process meanwhile; choose another folder."
                    )
                path.rename(old)
            new.rename(path)
            _sync(path.parent)
    finally:
        clear()


class _Exists(FileExistsError):
    """Not a failure to write."""


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (NotWritten, _Exists):
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise theirs
        number = getattr(error, "errno", None)
        if number is None and _is_full(path):
            number = errno.ENOSPC
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = reason if number is None else os.strerror(number)
        raise NotWritten(f"{path} could not be written: {reason}", number) from error


def _is_full(path: Path) -> bool:
    there = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(there).free < _SPARE


def no_room(error: BaseException) -> bool:
    """Whether a disk or a quota is full."""
    return getattr(error, "errno", None) in NO_ROOM


# ------------------------------------------------------------------------------------ checksums


def seal(folder: Path, checksums: bool = True) -> None:
    """Put a filled folder on disk, with the checksums of all its files."""
    for path in folder.rglob("*"):
        _sync(path)
    if checksums:
        write(folder / CHECKSUMS, json.dumps(fingerprints(folder), indent=1) + "\n")
    _sync(folder)


def fingerprints(folder: Path) -> dict[str, dict]:
    """SHA-256 and size of every file, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): _fingerprint(path) for path in _files(folder)}


def problem(folder: Path) -> str | None:
    """Why a folder is not as it was written; ``None`` where it is."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for name, written in checksums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["bytes"]:
                return f"{name} has {path.stat().st_size} of its {written['bytes']} bytes"
            if _fingerprint(path) != written:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}, which is written last"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"{CHECKSUMS} or a file cannot be read: {error}"
    return None


def verify(folder: Path) -> None:
    """Refuse a folder whose files are not those that its checksums were made of.

    One without checksums (of ``save_pretrained``) passes.

    Raises:
        ValueError: a file is torn, changed or missing, with its name.
    """
    if (folder / CHECKSUMS).is_file() and (why := problem(folder)):
        raise ValueError(
            f"{folder} is torn or was changed: {why}. Take another checkpoint, or, if the change "
            f"was yours, remove {CHECKSUMS}."
        )


def unseal(folder: Path) -> None:
    """Take the checksums out of a folder that is written to again."""
    (folder / CHECKSUMS).unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """All that holds something: a model card may be edited, and temporary names are no files."""
    return sorted(
        path for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".md" and path.name != CHECKSUMS
    )  # fmt: skip


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    if _WINDOWS and path.is_dir():  # which cannot be opened there
        return
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------- checkpoints of one stage


def step_of(checkpoint: Path) -> int:
    """Optimizer steps of ``checkpoint-N``."""
    return int(Path(checkpoint).name.rsplit("-", 1)[1])


def checkpoints(folder: Path) -> list[Path]:
    """``checkpoint-N`` in a folder, the newest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of, reverse=True)


def last_good(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; torn ones are renamed and named."""
    torn = []
    for checkpoint in checkpoints(folder):
        if (why := problem(checkpoint)) is None:
            break
        torn.append(f"{checkpoint} is torn: {why}")
        aside = checkpoint.with_name(f"{TORN}{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    else:
        checkpoint = None
    if torn:
        where = "the stage's beginning" if checkpoint is None else checkpoint.name
        print(f"{'; '.join(torn)}; going on from {where}.", file=sys.stderr)
    return checkpoint


def prune(folder: Path, limit: int | None) -> None:
    """Keep the newest ``limit`` checkpoints, all without one; call it behind a good new one."""
    surplus = checkpoints(folder)[limit:] if limit else []
    for path in surplus:  # a kill while it is removed leaves no part of it under its name
        path.rename(path.with_name(f"{TORN}{path.name}"))
    for path in [*folder.glob(f"{TORN}checkpoint-*"), *folder.glob(".checkpoint-*.partial")]:
        shutil.rmtree(path, ignore_errors=True)
