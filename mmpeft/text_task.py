"""What tasks of text alone share: files, and errors that name the row."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmpeft.task import Metric, Task


@dataclass
class TextTask(Task):
    """Rows from files; a subclass says how one is read, and may draw several rows from an entry.

    Attributes:
        train: file to learn from.
        test: file to score on.
    """

    train: str | None = None
    test: str | None = None

    def read(self, path: Path, split: str) -> list[dict]:
        """The rows of a file, each with ``"where"``: how errors point at it."""
        raise NotImplementedError

    def rows(self, split):
        path = getattr(self, split)
        if path is None:
            raise ValueError(f"task {self.name} has no {split} file; set {split}: FILE.")
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"task {self.name}: {split} file {path} does not exist; set {split} to where it is."
            )
        rows = self.read(Path(path), split)
        if not rows:
            raise ValueError(f"{path} has no rows.")
        return rows

    def where(self, row, index):
        return row["where"]


@dataclass
class GenerationTask(TextTask):
    """Facts to be put into words. A row has ``facts``, the ``answer`` to learn and all ``refs``."""

    score_name = "rouge_l"
    request: ClassVar[str]  # what is asked for, above the facts

    def messages(self, row):
        return [
            {"role": "user", "content": f"{self.request}\n{row['facts']}"},
            {"role": "assistant", "content": row["answer"]},
        ]

    def group(self, row):
        return row["facts"]

    def score(self, replies, rows):
        """ROUGE-L, see :mod:`mmpeft.text_metrics`."""
        from mmpeft.text_metrics import rouge_l

        return rouge_l(replies, [row["refs"] for row in rows])

    def metrics(self, replies, rows) -> dict[str, Metric]:
        """``bleu``, ``meteor``, ``rouge_l`` and ``cider``, see :mod:`mmpeft.text_metrics`."""
        from mmpeft.text_metrics import generation_metrics

        return generation_metrics(replies, [row["refs"] for row in rows])


def read_csv(path: Path) -> list[tuple[str, dict]]:
    """``(where, row)`` of a CSV file with a header, in UTF-8; rows count from 1."""
    from mmpeft.formats.table import read_csv as read

    table = read(path, str(path), ",")
    return [(f"{path} row {n}", row) for n, row in enumerate(table.scan(0, len(table)), 1)]


def read_json(path: Path) -> Any:
    """A JSON file in UTF-8."""
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None


def read_jsonl(path: Path) -> list[tuple[str, dict]]:
    """``(where, row)`` of a file with one JSON object a line, in UTF-8."""
    from mmpeft.jsonl import JsonLines

    def parse(path, number, line):
        where = f"{path} line {number}"
        try:
            return where, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}); write one object a line.") from None

    return list(JsonLines(path, parse))


def field(row: Any, name: str, kind: type, where: str):
    """A field that must be there, of that kind (``str`` or ``list``) and not empty."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or not (value.strip() if kind is str else value):
        what = "text" if kind is str else "list"
        raise ValueError(f"{where}: field {name!r} is missing, empty or no {what}.")
    return value


def texts(row: Any, name: str, where: str) -> list[str]:
    """A field that must be a list of texts, none of them empty."""
    found = field(row, name, list, where)
    if not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"{where}: field {name!r} has an entry that is empty or no text.")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8."
        ) from None
