"""Whether the pictures of a chat can be read, how large they are, and what tells them apart."""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmpeft.checks import Problem
from mmpeft.formats.errors import one_line
from mmpeft.images import content_hash, load_frames, load_image
from mmpeft.task import pictures

REMEMBERED = 1 << 16  # files: rows that share a picture do so near one another
FRAMES = 8  # of a clip in one file


class Seen(NamedTuple):
    """A picture that was looked at.

    Attributes:
        key: 64 bits of its content; of a picture that cannot be read, of its name.
        height, width: pixels of the upright picture; 0 of one that cannot be read, and of clips.
        problem: what is wrong and what to do, or ``None``.
    """

    key: int
    height: int
    width: int
    problem: tuple[str, str] | None


def look_at(messages: list[dict]) -> Iterator[tuple[str, Seen]]:
    """Each picture of a chat under the name that error messages have for it: ``image 2``.

    The frames of a clip are pictures of their own, a clip in one file is one.
    """
    images = clips = 0
    for part in pictures(*messages):
        source = source_of(part)
        if part["type"] == "image":
            images += 1
            yield f"image {images}", see(source)
        elif isinstance(source, (list, tuple)):
            clips += 1
            for n, frame in enumerate(source, 1):
                yield f"clip {clips}, frame {n}", see(frame)
        else:
            clips += 1
            yield f"clip {clips}", see(source, clip=True)


def source_of(part: dict):
    """Where the picture or clip of a message part is."""
    if "base64" in part:
        return f"data:;base64,{part['base64']}"
    keys = (part["type"], "path", "url")  # as transformers also writes it
    return next((part[key] for key in keys if part.get(key) is not None), None)


def see(source, clip: bool = False) -> Seen:
    """Read a picture to its last pixel; files are remembered by their path."""
    if isinstance(source, (str, Path)) and len(str(source)) < 4096:  # not a data URL
        return _see_file(str(source), clip)
    return _see(source, clip)


def _see(source, clip: bool) -> Seen:
    try:
        key = _signed(bytes.fromhex(content_hash(source, "")))
        if clip:
            load_frames(source, FRAMES, "")
            return Seen(key, 0, 0, None)
        width, height = load_image(source, "").size
        return Seen(key, height, width, None)
    except (ValueError, OSError) as error:
        name = hashlib.blake2b(repr(source).encode("utf-8", "replace")).digest()
        told = problem_of(error, "", "replace the file, or take the row out")
        return Seen(_signed(name), 0, 0, (told.problem, told.remedy))


def _signed(digest: bytes) -> int:
    """The first 64 bits as a number that int64 holds."""
    return int.from_bytes(digest[:8], signed=True)


_see_file = functools.lru_cache(REMEMBERED)(_see)


def problem_of(error: Exception, field: str, remedy: str) -> Problem:
    """An error message of one line as a problem; ``remedy`` is for one that tells none."""
    message = one_line(str(error)).removeprefix(field).lstrip(": ,").rstrip(".")
    problem, found, told = message.rpartition("; ")
    return Problem(field, problem, told) if found else Problem(field, message, remedy)
