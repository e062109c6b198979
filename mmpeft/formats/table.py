"""Tables that ``datasets`` reads: CSV, Parquet, Arrow, what it saved to disk, the hub.

They are memory-mapped; CSV and Parquet are written once as Arrow into its cache. Pictures stay
encoded until the processor opens them.
"""

import csv
import glob
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets.features.features import ClassLabel, LargeList, List
from pandas.errors import ParserWarning

from mmpeft.formats.errors import RowError, one_line
from mmpeft.jsonl import list_lengths

BLOCK = 256  # rows read at a time by ``scan``


class Table(Sequence):
    """Rows of a ``datasets.Dataset`` as plain objects; a class label becomes its name.

    Args:
        folder: where relative paths of pictures start; ``None`` if there may be none.
        empty_is_null: a CSV file can say nothing but "" where there is no value.
    """

    unit = "row"

    def __init__(self, data, file: str, folder: Path | None, empty_is_null: bool = False):
        self.file, self.folder, self._empty_is_null = file, folder, empty_is_null
        if not len(data):
            raise ValueError(f"{file} has no rows.")
        self._features = undecoded(data.features)
        self._data = data.with_format("arrow")

    def number(self, index: int) -> int:
        return index + 1

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        return self._row(self._data[index].to_pylist()[0])

    def scan(self, start: int, stop: int) -> Iterator[dict]:
        """Rows ``start`` to ``stop`` in order."""
        for first in range(start, stop, BLOCK):
            for row in self._data[first : min(first + BLOCK, stop)].to_pylist():
                yield self._row(row)

    def lengths(self, column: str) -> np.ndarray:
        """How long the list in a column is, in every row; 1 where there is none."""
        only = Table(self._data.select_columns([column]), self.file, self.folder)
        return list_lengths(only.scan(0, len(self)), column)

    def _row(self, row: dict) -> dict:
        row = self._features.decode_example(row)
        if self._empty_is_null:
            row = {key: None if value == "" else value for key, value in row.items()}
        return named(self._features, row)


def undecoded(feature):
    """Features whose pictures, clips and so on are left as bytes or path; JSON is read."""
    if isinstance(feature, dict):
        return type(feature)({key: undecoded(value) for key, value in feature.items()})
    if isinstance(feature, (List, LargeList)):
        return type(feature)(undecoded(feature.feature))
    if isinstance(feature, datasets.Json):
        return datasets.Json()
    if getattr(feature, "decode", False):
        feature = type(feature)(decode=False)
    return feature


def named(feature, value):
    """Class labels, numbers in a table, as the names that they stand for; -1 is none."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: named(feature.get(key), one) for key, one in value.items()}
    if isinstance(feature, (List, LargeList)) and isinstance(value, list):
        return [named(feature.feature, one) for one in value]
    if isinstance(feature, ClassLabel) and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else None
    return value


def scan(rows, start: int, stop: int) -> Iterator[dict | RowError]:
    """Rows ``start`` to ``stop`` in order; in place of one that is bad, what is wrong."""
    for index in range(start, stop):
        try:
            yield rows[index]
        except RowError as error:
            yield error


def read_csv(path: Path, file: str, separator: str) -> Table:
    """A table in text with a header, every field as it is written: no number, no null."""
    limit = csv.field_size_limit(2**31 - 1)  # fields may hold pictures
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            header = _check_lines(lines, separator, file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: no table in UTF-8 ({one_line(str(error))}).") from None
    finally:
        csv.field_size_limit(limit)
    if len(set(header)) < len(header) or not header or not all(header):
        raise ValueError(
            f"{file}: the header is {', '.join(map(repr, header)) or 'missing'}; name every "
            "column once."
        )
    features = datasets.Features({name: datasets.Value("string") for name in header})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # a row with more fields would be cut
        data = _load(file, "csv", path, features=features, sep=separator, keep_default_na=False,
                     na_filter=False, index_col=False, encoding="utf-8-sig")  # fmt: skip
    return Table(data, file, path.parent, empty_is_null=True)


def _check_lines(lines: Iterable[str], separator: str, file: str) -> list[str]:
    """The header of a table whose every row ``datasets`` will read as it is written.

    It would fill up a row with too few fields, and lose an empty first field behind a blank line
    that a lone carriage return ends; of white space in quotes it has a row, ``csv`` none.
    """
    last = ""

    def remembered() -> Iterator[str]:
        nonlocal last
        for line in lines:
            last = line
            yield line

    table = csv.reader(remembered(), delimiter=separator)
    header = next(table, [])
    line = table.line_num
    for fields in table:
        problem = None
        if len(fields) < 2 and not last.strip():  # blank, which is none
            if last.endswith("\r"):
                problem, remedy = "is blank and ends in a lone carriage return", "leave it out"
        elif len(fields) == 1 and fields[0].isspace():
            problem, remedy = "is white space in quotes", "leave it out"
        elif len(fields) != len(header):
            problem = f"has {len(fields)} fields, the header names {len(header)} columns"
            remedy = "write every separator, and quotes around a text that holds one"
        if problem:
            raise RowError(file, line + 1, "", problem, remedy, "line")
        line = table.line_num
    return header


def read_tables(kind: str, paths: list[Path], file: str) -> Table:
    """Parquet or Arrow files, one behind the other."""
    return Table(_load(file, kind, paths), file, folder_of(paths))


def folder_of(paths: list[Path]) -> Path | None:
    """The folder that files have in common; ``None`` if they lie in several."""
    return paths[0].parent if len({path.parent for path in paths}) == 1 else None


def _load(file: str, kind: str, paths, **options):
    paths = paths if isinstance(paths, list) else [paths]
    paths = [glob.escape(str(path)) for path in paths]  # ``datasets`` takes patterns
    try:
        return datasets.load_dataset(kind, data_files=paths, split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if any(said in str(cause) for said in ("corresponds to no data", "BatchSize must be")):
            raise ValueError(f"{file} has no rows.") from None
        raise ValueError(f"{file}: cannot be read as {kind} ({one_line(str(cause))}).") from None


def read_saved(path: Path, file: str, split: str | None) -> Table:
    """A folder that ``save_to_disk`` of ``datasets`` wrote."""
    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        data = data[choose_split(file, list(data), split)]
    return Table(data, file, path)


def read_hub(name: tuple[str, str | None], file: str, split: str | None) -> Table:
    """A data set of the hub, by its name and config."""
    split = choose_hub_split(name, file, split)
    return Table(datasets.load_dataset(*name, split=split), file, Path())


def choose_hub_split(name: tuple[str, str | None], file: str, split: str | None) -> str:
    """The split of a data set of the hub. Raises ``FileNotFoundError``, ``ValueError``."""
    try:
        return choose_split(file, datasets.get_dataset_split_names(*name), split)
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"{file} is no file or folder here, and no data set of the hub that could be read "
            f"({one_line(str(error))})."
        ) from None


def choose_split(file: str, found: list[str], split: str | None) -> str:
    """The split that is asked for, or the only one. Raises ``ValueError``."""
    if split in found:
        return split
    if split is None and len(found) == 1:
        return found[0]
    asked = "no split is chosen" if split is None else f"it has no split {split!r}"
    raise ValueError(
        f"{file}: {asked}; it has {', '.join(found)}. Name one behind it: {file}#{found[0]}."
    )
