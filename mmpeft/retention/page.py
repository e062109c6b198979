"""A retention report as one HTML file: no script, no network, nothing outside it."""

import json
from collections.abc import Iterable, Iterator
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmpeft.retention.plots import forest, front, kl_by_position, minus, svg
from mmpeft.retention.terminal import (
    CLAIMS,
    COLUMNS,
    HEALTH,
    cells,
    certified_line,
    dial_modes,
    dial_rows,
    format_lines,
    headline,
    health_rows,
    largest_retained,
    not_everywhere,
    percent,
    perplexity_lines,
    points,
    worst_first,
)

FLIPS = 25  # items of one task and mode whose score changed
REPLIES = 3  # documents of one task and mode whose replies are shown
MODES = {
    "text": "no image in the chat",
    "with_image": "each task after an irrelevant photograph",
    "after_image": "each task as the second turn, after an exchange about an image",
}
MEANINGS = {  # {margin} in points
    "degraded": "On the same questions the bridge gives fewer right answers than its base, and "
    "chance alone does not explain it.",
    "inconclusive": "These items are too few to tell: the bridge may have lost {margin} points or "
    "more, or nothing at all.",
    "not_judgeable": "The base itself does no better than guessing here, so nothing could be lost. "
    "This is no sign that anything was kept.",
    "retained": "Whatever the bridge lost here, it is less than {margin} points.",
    "exact": "On this text the two sides are one function, so there is nothing to estimate.",
}


def render_page(report: dict, items: Iterable[dict]) -> str:
    """The report ("mmpeft.retain/2") and its items (lines of items.jsonl) as an HTML document.

    Whatever comes from a model or a document is escaped. The same input gives the same bytes.
    """
    by_task: dict[tuple[str, str], list[dict]] = {}
    for item in items:
        by_task.setdefault((item["mode"], item["task"]), []).append(item)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"points": points, "percent": percent, "minus": minus}
    source = files("mmpeft.retention").joinpath("report.html.jinja").read_text(encoding="utf-8")
    margin, dial, kl = report["margin"], report["dial"], report["kl"]
    return environment.from_string(source).render(
        report=report,
        modes=MODES,
        headlines={mode: headline(body, margin) for mode, body in report["modes"].items()},
        meanings={mode: meaning(body, margin) for mode, body in report["modes"].items()},
        claims={name: claim.format(margin=f"{100 * margin:g}") for name, claim in CLAIMS.items()},
        not_everywhere=not_everywhere(report),
        certified_line=certified_line,
        columns=COLUMNS,
        rows=[({"metric": None, **row}, cells(row)) for row in worst_first(report)],
        forest=_inline(forest(report)) if report["tasks"] else None,
        flips=[flipped(row, by_task) for row in worst_first(report) if "pooled" not in row],
        kl=_inline(kl_by_position(report)) if kl and kl["by_position"] else None,
        replies=[group for row in report["tasks"] if (group := replies(row, by_task))],
        health_columns=HEALTH,
        health=health_rows(report),
        format_lines=format_lines(report),
        perplexity_lines=perplexity_lines(report),
        front=_inline(front(dial)) if dial and dial_modes(dial) else None,
        dial=dial_rows(dial) if dial else None,
        largest_retained=largest_retained(dial) if dial else None,
        provenance=[*leaves({"schema": report["schema"], "sides": report["sides"]}),
                    *pictures(report), *leaves(report["provenance"])],
    )  # fmt: skip


def meaning(mode: dict, margin: float) -> str:
    """A plain sentence on what the verdict of a mode means."""
    exact = mode["overall"] is not None and mode["overall"]["exact"]
    verdict = "exact" if exact and mode["verdict"] == "retained" else mode["verdict"]
    return MEANINGS[verdict].format(margin=f"{100 * margin:g}")


def flipped(row: dict, by_task: dict) -> dict:
    """Items of a task whose score changed: the largest losses first, then the largest gains."""
    changed = [
        (item["bridge"]["score"] - item["base"]["score"], item)
        for item in by_task.get((row["mode"], row["name"]), [])
        if item["bridge"]["score"] != item["base"]["score"]
    ]
    changed.sort(key=lambda pair: (pair[0] > 0, -abs(pair[0]), pair[1]["doc_id"]))
    return {
        "row": row,
        "lost": sum(change < 0 for change, _ in changed),
        "gained": sum(change > 0 for change, _ in changed),
        "shown": changed[:FLIPS],
        "more": len(changed[FLIPS:]),
    }


def replies(row: dict, by_task: dict) -> dict | None:
    """The first documents of a task that was answered in words; None for other tasks."""
    items = by_task.get((row["mode"], row["name"]), [])
    said = [item for item in items if item["base"]["reply"] is not None]
    said.sort(key=lambda item: item["doc_id"])
    return {"row": row, "shown": said[:REPLIES], "more": len(said[REPLIES:])} if said else None


def pictures(report: dict) -> Iterator[tuple[str, str]]:
    for mode, body in report["modes"].items():
        if body["picture"] is not None:
            yield from leaves(body["picture"], f"modes.{mode}.picture")


def leaves(value, name: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a nested JSON object with its path, as text."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _inline(figure) -> Markup:
    return Markup(svg(figure))
