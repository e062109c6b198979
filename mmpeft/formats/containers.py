"""What holds the rows: which reader a file, a folder or a name asks for.

A container is a ``Sequence`` of dicts with ``file`` and ``unit`` (how errors call it and its rows),
``folder`` (where relative paths start), ``number(index)``, ``scan(start, stop)`` and
``lengths(column)``.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mmpeft.formats import json_text
from mmpeft.jsonl import JsonLines

TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".json", ".ndjson")
KINDS = (*LINES, *TABLES, ".parquet", ".arrow", ".tar")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as imagefolder of ``datasets``
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def open_container(source, split: str | None) -> tuple[Sequence[dict], str | None]:
    """The container that a source is, and the split that is asked for.

    The split counts where the source has several.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of a kind that is known.
    """
    source, split = split_of(source, split)
    return _open(source, split), split


def split_of(source, split: str | None) -> tuple[str, str | None]:
    """A source without its ``#SPLIT``, and the split that it asks for."""
    source = str(source)
    if not os.path.exists(source) and "#" in source:
        source, _, split = source.rpartition("#")
    return source, split


def hub_name(source: str) -> tuple[str, str | None] | None:
    """Name and config on the hub, of what is no file and cannot be meant for one."""
    path = Path(source).expanduser()
    if path.exists() or path.suffix.lower() in KINDS or not HUB.fullmatch(source):
        return None
    name, _, config = source.partition(":")
    return name, config or None


def _open(source: str, split: str | None) -> Sequence[dict]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, source, split)
    if path.is_file():
        return _files([path], source)
    if (name := hub_name(source)) is not None:
        from mmpeft.formats.table import read_hub

        return read_hub(name, source, split)
    if found := sorted(glob.glob(str(path), recursive=True)):
        return _files([Path(one) for one in found], source)
    raise FileNotFoundError(f"{source} does not exist.")


def _files(paths: list[Path], file: str) -> Sequence[dict]:
    kind = {path.suffix.lower() for path in paths}
    kind = kind.pop() if len(kind) == 1 else None
    if kind == ".tar":
        from mmpeft.formats.shards import Shards

        return Shards(paths, file)
    if kind in (".parquet", ".arrow"):
        from mmpeft.formats.table import read_tables

        return read_tables(kind[1:], paths, file)
    if len(paths) > 1:
        raise ValueError(
            f"{file} is {len(paths)} files; several can be read together where all of them are "
            ".parquet, .arrow or .tar."
        )
    if kind in TABLES:
        from mmpeft.formats.table import read_csv

        return read_csv(paths[0], file, TABLES[kind])
    if kind in LINES:
        return _json(paths[0])
    raise ValueError(f"{file} ends in {kind or 'nothing'!r}; what is known: {', '.join(KINDS)}.")


def _json(path: Path) -> Sequence[dict]:
    from mmpeft.formats.json_array import JsonArray, is_array

    if is_array(path):
        return JsonArray(path, json_text.element)
    return JsonLines(path, json_text.line)


def _of_split(paths: list[Path], file: str, split: str | None) -> list[Path]:
    """The files of a split, where the name of each begins with one, as ``train-00000.parquet``."""
    from mmpeft.formats.table import choose_split

    begins = [re.split(r"[-_.]", path.name)[0] for path in paths]
    if len(set(begins)) < 2 or not set(begins) <= set(SPLITS):
        return paths
    chosen = choose_split(file, [name for name in SPLITS if name in begins], split)
    return [path for path, begin in zip(paths, begins, strict=True) if begin == chosen]


def _folder(path: Path, file: str, split: str | None) -> Sequence[dict]:
    """What ``datasets`` saved, pictures with metadata (or classes), or files of one kind."""
    from mmpeft.formats.table import choose_split, read_saved

    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return read_saved(path, file, split)
    if metadata := [path / name for name in METADATA if (path / name).is_file()]:
        if len(metadata) > 1:
            raise ValueError(f"{file} has {' and '.join(m.name for m in metadata)}; keep one.")
        splits = [name for name in SPLITS if (path / name).is_dir()]
        if len(splits) > 1:
            raise ValueError(
                f"{file} has {metadata[0].name} beside the folders {' and '.join(splits)}, whose "
                "rows it would mix; put a file of its own into each."
            )
        return _files(metadata, str(metadata[0]))
    if splits := [name for name in SPLITS if (path / name).is_dir()]:
        return _folder(path / choose_split(file, splits, split), file, None)
    for kind in (".parquet", ".arrow", ".tar"):
        if found := sorted(path.glob(f"*{kind}")):
            return _files(_of_split(found, file, split), file)
    from mmpeft.formats.image_folder import ImageFolder, pictures_in

    if found := pictures_in(path):
        return ImageFolder(path, file, found)
    raise ValueError(
        f"{file} is a folder without {', '.join(METADATA)}, pictures, .parquet, .arrow or .tar "
        "files, and nothing that datasets saved; name the file itself."
    )
