"""What the rows of some files hold, as one report: errors, figures, and rows to look at."""

import io
import json
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmpeft.bad_rows import place
from mmpeft.data_check.engine import Source, read
from mmpeft.data_check.page import render_page
from mmpeft.data_check.plots import draw
from mmpeft.data_check.repeats import find_duplicates, find_leaks
from mmpeft.data_check.samples import Sample, sample
from mmpeft.data_check.scan import KINDS, Found, RowProblem

QUANTILES = {"min": 0, "median": 0.5, "p95": 0.95, "max": 1}


class Checked(NamedTuple):
    """What :func:`check_data` found.

    Attributes:
        report: ``mmpeft.data/1``, see ``docs/json.md``.
        samples: rows drawn at random, as the model sees them.
        figure: a matplotlib ``Figure`` of lengths and sizes; ``None`` if no row is a chat.
    """

    report: dict
    samples: list[Sample]
    figure: object


def check_data(
    files: list, evaluation: list = (), *, processor=None, samples: int = 10, seed: int = 0,
    workers: int | None = None, max_errors: int = 100, **options,
) -> Checked:  # fmt: skip
    """Read every row of ``files`` and ``evaluation`` once, and say what is wrong.

    Args:
        files: what is trained on, each a source of :func:`mmpeft.formats.open_rows`.
        evaluation: what is scored on; none of it may occur in ``files``.
        processor: also tokenise every row, as training will.
        samples: good rows of ``files``, drawn with ``seed``, to look at; needs a processor.
        workers: processes that read; ``None`` is one for each CPU core.
        max_errors: errors of each kind and file that are kept in full; the others are counted.
        options: for ``open_rows``.

    Raises:
        ValueError, OSError: a file that cannot be opened at all, or an option out of range.
    """
    for name, value in (("samples", samples), ("max_errors", max_errors)):
        if value < 0:
            raise ValueError(f"--{name} is {value}; it must be 0 or more.")
    began = time.perf_counter()
    uses = [(str(file), "train") for file in files] + [(str(file), "eval") for file in evaluation]
    sources = read(uses, options, processor, max_errors, workers)
    trained = [source for source in sources if source.use == "train"]
    evaluated = [source for source in sources if source.use == "eval"]
    find_duplicates(trained, max_errors)
    find_duplicates(evaluated, max_errors)
    find_leaks(trained, evaluated, max_errors)
    figures = Figures.of(sources)
    report = {
        "schema": "mmpeft.data/1",
        "rows": sum(source.found.rows for source in sources),
        "errors": [_as_json(error) for source in sources for error in source.found.errors],
        "counts": {kind: sum(s.found.counts[kind] for s in sources) for kind in KINDS},
        "max_errors": max_errors,
        "files": [_describe(source) for source in sources],
        "max_length": getattr(processor, "max_length", None),
        **figures.summaries(),
        "seconds": round(time.perf_counter() - began, 3),
    }
    shown = draw_samples(trained, processor, samples, seed)
    return Checked(report, shown, figures.draw(report["max_length"]))


def _describe(source: Source) -> dict:
    return {
        "file": source.file,
        "use": source.use,
        "format": getattr(source.rows, "schema", None),
        "rows": source.found.rows,
        "errors": source.found.counts.total(),
    }


def _as_json(error: RowProblem) -> dict:
    """With the parts of ``FILE line N`` apart; of ``FILE line N, ENTRY``, the entry is a field."""
    file, _, row, entry = place(error.where)
    problem = error.problem._replace(field=entry + error.problem.field)
    return {"file": file, "row": row, "kind": error.kind, **problem._asdict()}


class Figures(NamedTuple):
    """Sizes of all that was read: one entry a chat, a tokenised chat, a different picture.

    ``pictures`` is how many pictures the rows have, the same one as often as it occurs.
    """

    characters: np.ndarray
    tokens: np.ndarray
    learned_tokens: np.ndarray
    height: np.ndarray
    width: np.ndarray
    pictures: int

    @classmethod
    def of(cls, sources: list[Source]) -> "Figures":
        chats = np.concatenate([Found(0).chats, *(source.found.chats for source in sources)])
        seen = np.concatenate([Found(0).pictures, *(source.found.pictures for source in sources)])
        tokenised = chats[chats["tokens"] >= 0]
        still = seen[seen["height"] > 0]  # a clip in one file has no size here
        one_each = still[np.unique(still["key"], return_index=True)[1]]
        return cls(
            chats["characters"], tokenised["tokens"], tokenised["learned"],
            one_each["height"], one_each["width"], len(seen),
        )  # fmt: skip

    def summaries(self) -> dict:
        """The figures of the report."""
        return {
            "characters": summary(self.characters),
            "tokens": summary(self.tokens),
            "learned_tokens": summary(self.learned_tokens),
            "pictures": {
                "count": self.pictures,
                "different": len(self.height),
                "height": summary(self.height),
                "width": summary(self.width),
            },
        }

    def draw(self, max_length: int | None):
        """Their picture; ``None`` where no row is a chat."""
        if not len(self.characters):
            return None
        unit = "tokens" if len(self.tokens) else "characters"
        return draw(
            getattr(self, unit), unit, self.learned_tokens, self.height, self.width,
            max_length if unit == "tokens" else None,
        )  # fmt: skip


def summary(values: np.ndarray) -> dict | None:
    """Quantiles, mean and total; ``None`` of nothing."""
    if not len(values):
        return None
    ends = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    found = dict(zip(QUANTILES, ends.tolist(), strict=True))
    return found | {"mean": round(float(values.mean()), 2), "total": int(values.sum())}


def draw_samples(sources: list[Source], processor, count: int, seed: int) -> list[Sample]:
    """Good rows, in the order of the files, as the model sees them; none without a processor."""
    if processor is None:
        return []
    good = [
        (number, int(row))
        for number, source in enumerate(sources)
        for row in source.found.chats["row"][source.found.chats["fine"] == 1]
    ]
    drawn = sorted(random.Random(seed).sample(good, min(count, len(good))))
    return [sample(processor, sources[number].rows[row]) for number, row in drawn]


def write(checked: Checked, folder: str | Path) -> Path:
    """Write ``report.json``, ``report.html`` and ``data.png``; a reader never sees half a file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = render_page(checked.report, checked.samples, checked.figure)
    bodies = {
        "report.json": (json.dumps(checked.report, indent=2, allow_nan=False) + "\n").encode(),
        "report.html": page.encode("utf-8", "replace"),
    }
    if checked.figure is not None:
        buffer = io.BytesIO()
        checked.figure.savefig(buffer, dpi=120)
        bodies["data.png"] = buffer.getvalue()
    for name, body in bodies.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(body)
        os.replace(partial, folder / name)
    return folder
