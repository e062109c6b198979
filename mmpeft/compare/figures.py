"""The front of score and text retention, and the score over the rank."""

from itertools import cycle
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mmpeft.compare.table import PROSE, scale
from mmpeft.retention.plots import INK, STYLE, minus

ON, OFF = "#d9541a", "#2f82bd"
MARKERS = "osD^vP*X"
COLOURS = ("#2f82bd", "#d9541a", "#8a6fc0", "#2e8b57", "#b8860b", "#7f8790")


@matplotlib.style.context(STYLE)
def draw_front(report: dict, path: Path) -> None:
    """Score against text retention, a panel a mode; nothing is drawn without retention.

    Points are numbered in the order of the table, those on the front filled.
    """
    rows = [(number, row) for number, row in enumerate(report["rows"], 1) if row["on_front"]]
    modes = [mode for mode in report["modes"] if any(mode in row["on_front"] for _, row in rows)]
    if not rows:
        return
    height = max(3.8, 0.17 * len(rows) + 1.2)
    figure = Figure(figsize=(3.6 * len(modes) + 2.4, height), layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    factor, _ = scale(report["metric"])
    for axes, mode in zip(panels, modes, strict=True):
        _front_panel(axes, report, rows, mode, factor)
    unit = ", %" if factor == 100 else ""
    panels[0].set_ylabel(f"{report['metric']} on {report['task']}{unit}")
    names = [f"{number}  {' '.join(row['labels'].values())}" for number, row in rows]
    panels[-1].annotate(
        "\n".join(names), (1.03, 1), xycoords="axes fraction", va="top", fontsize=7.5,
        linespacing=1.35,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _front_panel(axes, report: dict, rows: list[tuple], mode: str, factor: float) -> None:
    axes.set_title(mode, loc="left", fontweight="bold", fontsize=10)
    unit = "bits per byte saved, %" if mode == PROSE else "text: bridge - base, points"
    axes.set_xlabel(minus(unit))
    axes.axvline(0, color=INK, linewidth=1)
    axes.grid()
    axes.margins(0.1)
    best = []
    for number, row in rows:
        if mode not in row["on_front"]:
            continue
        text, score = row["retention"][mode], row["metrics"][report["metric"]]
        x, y = 100 * text["mean"], factor * score["mean"]
        on = row["on_front"][mode]
        colour = ON if on else OFF
        ends = text["ci95"] or [text["mean"]] * 2  # of one seed, prose has none
        axes.plot([100 * end for end in ends], [y, y], color=colour, alpha=0.45, lw=1)
        axes.plot([x, x], [factor * end for end in score["ci95"]], color=colour, alpha=0.45, lw=1)
        axes.plot(x, y, "o", color=colour, markersize=11, zorder=3 + on,
                  markerfacecolor=colour if on else "#fefefe")  # fmt: skip
        axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=6.5, zorder=6,
                      color="#fefefe" if on else INK)  # fmt: skip
        if on:
            best.append((x, y))
    best.sort()
    axes.step(*zip(*best, strict=True), where="pre", color=ON, linewidth=1.2, zorder=2)
    majority = rows[0][1]["metrics"][report["metric"]]["controls"].get("majority")
    if majority is not None:
        axes.axhline(factor * majority, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "commonest answers, no picture", (0.02, factor * majority), (0, 2), fontsize=7,
            xycoords=axes.get_yaxis_transform(), textcoords="offset points",
        )  # fmt: skip


@matplotlib.style.context(STYLE)
def draw_ranks(report: dict, path: Path) -> None:
    """Score over the rank, a line for each combination of the other axes.

    Drawn where an axis is named ``rank`` and has two labels or more that are numbers.
    """
    ranks = [label for label in report["axes"].get("rank", []) if label.isdecimal()]
    if len(ranks) < 2:
        return
    factor, _ = scale(report["metric"])
    lines: dict[str, list] = {}
    for row in report["rows"]:
        others = [label for axis, label in row["labels"].items() if axis != "rank"]
        if row["labels"]["rank"] in ranks and report["metric"] in row["metrics"]:
            point = int(row["labels"]["rank"]), row["metrics"][report["metric"]]
            lines.setdefault(" ".join(others), []).append(point)
    if not lines:
        return
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    looks = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    for shift, (name, points) in enumerate(lines.items()):
        colour, marker = next(looks)
        points.sort(key=lambda point: point[0])
        aside = 1.012 ** (shift - (len(lines) - 1) / 2)  # so that error bars stand side by side
        xs = [rank * aside for rank, _ in points]
        ys = [factor * one["mean"] for _, one in points]
        below, above = (
            [abs(factor * one["ci95"][side] - y) for (_, one), y in zip(points, ys, strict=True)]
            for side in (0, 1)
        )
        axes.errorbar(xs, ys, (below, above), color=colour, marker=marker, markersize=5,
                      linewidth=1.4, elinewidth=0.9, capsize=2, label=name or None)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(rank) for rank in ranks], ranks)
    axes.xaxis.set_minor_locator(NullLocator())
    unit = ", %" if factor == 100 else ""
    axes.set(xlabel="rank", ylabel=f"{report['metric']} on {report['task']}{unit}")
    axes.grid()
    if any(lines):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
