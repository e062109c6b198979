"""WebDataset shards: tar files in which neighbouring files of one name are a sample.

Only the headers are read at the start; a sample is read from its shard when it is asked for.
``datasets`` would copy every shard, and drops files of a kind that the first samples lack.
"""

import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmpeft.formats import json_text
from mmpeft.formats.errors import RowError
from mmpeft.formats.schema import NAMES
from mmpeft.formats.table import folder_of, scan
from mmpeft.jsonl import SILENT, list_lengths

BLOCK = 512  # bytes; a tar ends with two blocks of zeros


class Shards(Sequence):
    """Samples as rows: the fields of a ``.json``, the words of a ``.txt`` as ``caption``, pictures
    as ``image`` (in place of what the fields call so) or, if there are several, ``images``. Any
    other file is a column by its ending: its words, or its bytes if it is no UTF-8.

    Args:
        paths: tar files, not compressed.
        file: how errors call them together.
    """

    unit = "row"

    def __init__(self, paths: list[Path], file: str):
        self.file, self.folder, self._paths = file, folder_of(paths), paths
        Image.init()  # fills ``Image.EXTENSION``
        members, samples = array("q"), array("q")  # shard, offset, size, kind; the first members
        kinds: dict[str, int] = {}
        for shard, path in enumerate(tqdm(paths, desc="opening shards", delay=SILENT, leave=False)):
            last = None
            for member in _headers(path):
                folder, name = os.path.split(member.name)
                stem, _, kind = name.partition(".")
                if not member.isfile() or not stem or not kind:
                    continue
                if (folder, stem) != last:
                    samples.append(len(members) // 4)
                    last = folder, stem
                number = kinds.setdefault(kind.lower(), len(kinds))
                members.extend((shard, member.offset_data, member.size, number))
        if not samples:
            raise ValueError(f"{file} has no rows: no file in it has a name and an ending.")
        self._kinds = list(kinds)
        self._members = np.frombuffer(members, np.int64).reshape(-1, 4)
        self._starts = np.append(np.frombuffer(samples, np.int64), len(self._members))

    def number(self, index: int) -> int:
        return index + 1

    def __len__(self):
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        files = self._files(index)
        row, others, pictures = {}, {}, {}
        for kind, data in files.items():
            if kind == "json":
                row = json_text.element(self.file, index + 1, self._text(index, kind, data))
            elif kind == "txt":
                others["caption"] = self._text(index, kind, data)
            elif os.path.splitext(f"x.{kind}")[1] in Image.EXTENSION:
                pictures[kind] = data
            else:
                others.setdefault(kind, _text_or_bytes(data))
        for name, value in others.items():
            if row.get(name, value) not in (None, value):
                ending = "txt" if name == "caption" else name
                problem = f"of .json and .{ending} differ"
                raise self._wrong(index, name, problem, "keep one of them")
            row[name] = value
        if pictures:
            row = {key: value for key, value in row.items() if key not in NAMES["image"]}
            several = [pictures[kind] for kind in sorted(pictures, key=_by_number)]
            row |= {"images": several} if len(several) > 1 else {"image": several[0]}
        return row

    def scan(self, start: int, stop: int) -> Iterator[dict | RowError]:
        """Rows ``start`` to ``stop`` in order; in place of one that is bad, what is wrong."""
        return scan(self, start, stop)

    def lengths(self, column: str) -> np.ndarray:
        """How long the list in a column is, in every row; 1 where there is none."""
        return list_lengths(self.scan(0, len(self)), column)

    def _files(self, index: int) -> dict[str, bytes]:
        members = self._members[self._starts[index] : self._starts[index + 1]].tolist()
        found = {}
        with self._paths[members[0][0]].open("rb") as shard:
            for _, offset, size, number in members:
                kind = self._kinds[number]
                if kind in found:
                    raise self._wrong(index, f".{kind}", "stands twice", "rename one of the files")
                shard.seek(offset)
                found[kind] = shard.read(size)
        return found

    def _text(self, index: int, kind: str, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 ({error.reason} at byte {error.start})"
            raise self._wrong(index, f".{kind}", problem, "save it as UTF-8") from None

    def _wrong(self, index: int, field: str, problem: str, remedy: str) -> RowError:
        return RowError(self.file, index + 1, field, problem, remedy)


def _by_number(kind: str) -> list:
    """Sorts ``2.png`` before ``10.png``."""
    return [(piece.isdigit() and int(piece), piece) for piece in re.split(r"(\d+)", kind)]


def _text_or_bytes(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _check_end(path: Path, end: int) -> None:
    """``tarfile`` takes a damaged header for the end. Raises ``ValueError``."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(BLOCK)
        if len(rest) < BLOCK:
            problem = "ends without the mark of an end, so files at its end may be missing"
        elif any(rest) or any(map(any, iter(lambda: file.read(1 << 20), b""))):
            problem = f"has more behind byte {end:,}, where its files end or one is damaged"
        else:
            return
    raise ValueError(f"{path}: {problem}; fetch or pack it again, as a tar of its own.")


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else it keeps them all
                if member.islnk() or member.issym():
                    raise ValueError(
                        f"{path}: {member.name} is a link to {member.linkname}, not a file; pack "
                        "files themselves (tar --dereference --hard-dereference)."
                    )
                yield member
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar file that can be read ({error}).") from None
