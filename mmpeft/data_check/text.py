"""A report on data as plain text: the verdict first, then errors by kind, figures, rows."""

import os
import sys

from mmpeft.data_check.samples import Run, Sample
from mmpeft.data_check.scan import KINDS
from mmpeft.formats.errors import one_line

SHOWN = 10  # errors of a kind
LONGEST = 1500  # characters of one run of tokens
COLOURS = {"learned": "\033[1;32m", "read": "\033[2m", "image": "\033[36m"}
PLAIN = {"learned": "[[{}]]", "read": "{}", "image": "{}"}  # where there are no colours
FIGURES = {
    "characters": ("characters",),
    "tokens": ("tokens",),
    "learned tokens": ("learned_tokens",),
    "picture height": ("pictures", "height"),
    "picture width": ("pictures", "width"),
}
COLUMNS = ("min", "median", "p95", "max", "mean")


def render(report: dict, samples: list[Sample] = (), colour: bool | None = None) -> str:
    """The report ("mmpeft.data/1") and rows for a reader.

    Args:
        colour: paint the tokens; ``None`` does on a terminal, unless ``NO_COLOR`` is set.
    """
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    sections = [
        [verdict(report), *map(file_line, report["files"])],
        *(_errors(report, kind) for kind in KINDS),
        figures(report),
        *(sample_lines(sample, colour) for sample in samples),
        [legend(colour)] if samples else [],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def verdict(report: dict) -> str:
    """One line: how many rows, how many errors of which kinds."""
    errors = sum(report["counts"].values())
    rows, errors = report["rows"], sum(report["counts"].values())
    if not errors:
        return f"{_many(rows, 'row')}, no error"
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in report["counts"].items() if n)
    return f"{_many(rows, 'row')}, {_many(errors, 'error')}: {kinds}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def file_line(file: dict) -> str:
    use = ", for evaluation" if file["use"] == "eval" else ""
    form = "" if file["format"] is None else f" ({file['format']}{use})"
    counts = f"{_many(file['rows'], 'row')}, {_many(file['errors'], 'error')}"
    return f"  {one_line(file['file'])}{form}: {counts}"


def error_line(error: dict) -> str:
    """``data.jsonl 3: messages is empty; give ...`` (the number is that of the line or row)."""
    said = " ".join(filter(None, (error["field"], error["problem"])))
    return one_line(f"{error['file']} {error['row']}: {said}; {error['remedy']}")


def of_kind(report: dict, kind: str) -> list[dict]:
    return [error for error in report["errors"] if error["kind"] == kind]


def _errors(report: dict, kind: str) -> list[str]:
    if not (count := report["counts"][kind]):
        return []
    shown = of_kind(report, kind)[:SHOWN]
    lines = [f"{kind} ({KINDS[kind]}): {count:,}", *(f"  {error_line(error)}" for error in shown)]
    if count > len(shown):
        lines.append(f"  and {count - len(shown):,} more")
    return lines


def figures(report: dict) -> list[str]:
    """Quantiles as a table, and how many pictures there are."""
    rows = figure_rows(report)
    if not rows:
        return []
    lines = [f"{'':<16}" + "".join(f"{name:>10}" for name in COLUMNS)]
    lines += [f"{name:<16}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in rows]
    if pictures := report["pictures"]["count"]:
        lines.append(f"{pictures:,} pictures, {report['pictures']['different']:,} different ones")
    return lines


def figure_rows(report: dict) -> list[tuple[str, ...]]:
    """Name and cells under ``COLUMNS`` of each figure there is."""
    rows = []
    for name, path in FIGURES.items():
        values = report
        for key in path:
            values = values[key]
        if values is not None:
            rows.append((name, *(f"{values[c]:,.1f}" if c == "mean" else f"{values[c]:,}"
                                 for c in COLUMNS)))  # fmt: skip
    return rows


def sample_head(sample: Sample) -> str:
    counts = f"{sample.count():,} tokens, {sample.count('learned'):,} learned"
    images = sample.count("image")
    return f"{one_line(sample.where)}: {counts}" + (f", {images:,} of pictures" if images else "")


def sample_lines(sample: Sample, colour: bool) -> list[str]:
    """A row as the model sees it; long runs lose their middle, and say how much of it."""
    painted = (
        f"{COLOURS[run.kind]}{shown(run)}\033[0m" if colour else PLAIN[run.kind].format(shown(run))
        for run in sample.runs
    )
    return [sample_head(sample), *(f"  {line}" for line in "".join(painted).split("\n"))]


def legend(colour: bool) -> str:
    if colour:
        return f"{COLOURS['learned']}learned\033[0m {COLOURS['read']}only read\033[0m"
    return "[[learned]], the rest is only read"


def shown(run: Run, longest: int | None = LONGEST) -> str:
    """What is shown of a run: its text, without characters that a terminal would act on."""
    if run.kind == "image":
        return f"<image x {run.tokens}>"
    text = run.text
    if longest is not None and len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} (... {len(text) - 2 * half:,} characters ...) {text[-half:]}"
    return "\n".join(map(one_line, text.split("\n")))
