"""Download one pinned wheel with pip and check it: nothing is installed, nothing is run."""

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


class StarterError(OSError):
    """A starter asset could not be made; the message says why and what to do."""


class DownloadError(StarterError):
    """pip found no way to the wheel: no network, or no index that serves it."""


@dataclass(frozen=True)
class Wheel:
    """A published wheel file, pinned to its bytes. `size` in bytes; `pip_options` choose the
    file where a release has several (otherwise the hash would depend on the machine)."""

    package: str
    version: str
    sha256: str
    size: int
    pip_options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def download(wheel: Wheel, folder: Path, progress: bool = True) -> Path:
    """Fetch `wheel` into the existing `folder` and return the verified file.

    pip does the transfer, so the user's own index, proxy and `PIP_*` settings apply; a wheel
    that lies in a folder named by `PIP_FIND_LINKS` is found without a network.

    Raises DownloadError when pip cannot get the file, StarterError when pip is missing or the
    bytes are not the pinned ones, OSError when the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise StarterError(
            f"{wheel} is downloaded with pip, and {sys.executable} has none: "
            "run `python -m ensurepip`, or `uv pip install pip` in an environment made by uv"
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    log = folder / "pip.log"
    code = _pip_download(wheel, requirements, folder, log, progress)
    output = log.read_text(errors="replace")
    if got := re.search(r"\bGot\s+([0-9a-f]{64})", output):
        raise _wrong_hash(wheel, got[1])
    if "No space left on device" in output:  # pip shows a traceback with it
        raise OSError(errno.ENOSPC, f"no space left to download {wheel}")
    if code:
        reason = output.strip().rpartition("\n")[2]
        raise DownloadError(
            f"pip could not download {wheel} (exit code {code}): {reason}. Check the network, "
            "or put the wheel file into a folder and set PIP_FIND_LINKS to that folder"
        )
    (file,) = folder.glob("*.whl")
    # pip checked this too; we do not want to depend on a setting or a bug of pip for it.
    if (digest := sha256(file)) != wheel.sha256:
        raise _wrong_hash(wheel, digest)
    return file


def sha256(file: Path) -> str:
    """Hex digest of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pip_download(wheel: Wheel, requirements: Path, folder: Path, log: Path, progress: bool) -> int:
    from tqdm import tqdm

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", *wheel.pip_options]
    command += ["--dest", str(folder), "--require-hashes", "-r", str(requirements)]
    # pip's temporary files land in our folder, so that one clean-up removes all of them and the
    # growing file can be watched.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    scale = {"total": wheel.size, "unit": "B", "unit_scale": True}
    bar = tqdm(desc=f"download {wheel}", **scale, file=sys.stderr, disable=not progress)
    with bar, log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                with contextlib.suppress(FileNotFoundError):  # pip moves files while we look
                    for file in folder.rglob("*.whl"):
                        bar.update(max(0, file.stat().st_size - bar.n))
            return process.returncode
        finally:
            process.kill()
            process.wait()


def _wrong_hash(wheel: Wheel, got: str) -> StarterError:
    return StarterError(
        f"the downloaded file of {wheel} is not the published one: expected sha256 "
        f"{wheel.sha256}, got {got}. Nothing was kept; check which package index pip uses"
    )
