"""A folder of pictures without metadata: the folder that a picture is in is its label."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def pictures_in(folder: Path) -> list[str]:
    """Paths of all pictures below a folder, relative to it, sorted."""
    Image.init()  # fills ``Image.EXTENSION``
    found, seen = [], set()
    for top, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(top)) in seen:  # a link in a circle, or a folder twice
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(top, name), folder)
            for name in names
            if os.path.splitext(name)[1].lower() in Image.EXTENSION
        ]
    return sorted(found)


class ImageFolder(Sequence):
    """Rows of ``image`` and ``label``."""

    unit = "row"

    def __init__(self, folder: Path, file: str, pictures: list[str]):
        self.folder, self.file = folder, file
        self._pictures = np.array(pictures)

    def number(self, index: int) -> int:
        return index + 1

    def __len__(self):
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict:
        path = str(self._pictures[index])
        return {"image": path, "label": os.path.basename(os.path.dirname(path)) or None}

    def scan(self, start: int, stop: int) -> Iterator[dict]:
        """Rows ``start`` to ``stop`` in order."""
        return (self[index] for index in range(start, stop))

    def lengths(self, column: str) -> np.ndarray:
        """One label each."""
        return np.ones(len(self), np.int64)
