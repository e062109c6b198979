"""Figures of a retention report: legible at 700 pixels, colour-blind safe, the same every time.

Colours are of middle lightness, to stand on a light or a dark page; every verdict has a shape too.
"""

import io
import re
from itertools import product
from textwrap import fill

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from mmpeft.retention.terminal import ORDER, dial_modes, interval, points, worst_first

WIDTH = 7.2  # inches
INK, PAPER = "#1f2329", "#fefefe"  # `svg` hands these two over to the page
STYLE = [
    "default",  # whatever the user's matplotlibrc says
    {
        "font.size": 9.0,
        "text.parse_math": False,  # a task's name may hold a dollar sign
        "svg.fonttype": "path",
        "svg.hashsalt": "mmpeft",
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#80868f",
        "grid.alpha": 0.25,
    },
]
LOOKS = {  # of a verdict: colour, marker, filled
    "degraded": ("#d9541a", "v", True),
    "inconclusive": ("#8a6fc0", "D", False),
    "not_judgeable": ("#7f8790", "s", False),
    "retained": ("#2f82bd", "o", True),
}


@matplotlib.style.context(STYLE)
def forest(report: dict) -> Figure:
    """Paired differences with 95% intervals, one panel a mode, worst first; exact ones are bars."""
    rows = worst_first(report)
    panels = {mode: [row for row in rows if row["mode"] == mode] for mode in report["modes"]}
    panels = {mode: held for mode, held in panels.items() if held}
    if not panels:
        raise ValueError("the report holds no task to draw")
    figure = Figure(
        figsize=(WIDTH, 1.1 + 0.45 * len(panels) + 0.25 * len(rows)), layout="constrained"
    )
    figure.set_gid("forest")
    figure.set_label("Forest plot: bridge minus base in points, for every task and mode")
    all_axes = figure.subplots(
        len(panels), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [len(held) + 0.6 for held in panels.values()]},
    )[:, 0]  # fmt: skip
    for axes, (mode, held) in zip(all_axes, panels.items(), strict=True):
        _forest_panel(axes, mode, held, report["margin"])
    beside = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    all_axes[0].annotate("delta", (1, 1), (38, 5), ha="right", **beside)
    all_axes[0].annotate("95% interval", (1, 1), (46, 5), **beside)
    all_axes[-1].set_xlabel(minus("bridge - base, points (left of 0: the bridge answers worse)"))
    seen = {row["verdict"] for row in rows if not row["exact"]}
    handles = [_legend_mark(name) for name in ORDER if name in seen]
    if any(row["exact"] for row in rows):
        handles.append(Line2D([], [], color=INK, marker="|", markersize=10, markeredgewidth=4,
                              linestyle="", label="exact"))  # fmt: skip
    handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 3)), linewidth=1,
                          label=minus(f"margin (-{100 * report['margin']:g})")))  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
                  columnspacing=1.4, handletextpad=0.4)  # fmt: skip
    return figure


def _forest_panel(axes, mode: str, rows: list[dict], margin: float) -> None:
    axes.set_title(mode, loc="left", fontweight="bold", fontsize=10)
    axes.axvline(0, color=INK, linewidth=1)
    axes.axvline(-100 * margin, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.grid(axis="x")
    axes.set(ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
    labels = axes.set_yticklabels([fill(row["name"], 36) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    beside = {
        "xycoords": axes.get_yaxis_transform(), "textcoords": "offset points",
        "va": "center_baseline", "annotation_clip": False,
    }  # fmt: skip
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        weight = "normal"
        if len(row["name"]) > 26:
            label.set_fontsize(6.8)  # two lines of it fit a row
        if "pooled" in row:
            weight = "bold"
            axes.axhspan(y - 0.5, y + 0.5, color="#80868f", alpha=0.13, linewidth=0)
            label.set_fontweight(weight)
        if row["exact"]:
            colour = LOOKS[row["verdict"]][0]
            axes.plot(0, y, "|", color=colour, markersize=12, markeredgewidth=4, zorder=3)
        else:
            low, high = row["ci95"]
            _mark(axes, 100 * row["delta"], y, row["verdict"], [100 * low, 100 * high], [y, y],
                  wide="pooled" in row)  # fmt: skip
        delta, ends = minus(points(row["delta"])), minus(interval(row))
        axes.annotate(delta, (1, y), (38, 0), ha="right", weight=weight, **beside)
        axes.annotate(ends, (1, y), (46, 0), weight=weight, **beside)


@matplotlib.style.context(STYLE)
def kl_by_position(report: dict) -> Figure:
    """Mean KL(base || bridge) of the prose over the position in the window, in nats per token."""
    kl = report["kl"]
    parts = kl["by_position"]
    if not parts:
        raise ValueError("the report holds no KL by position to draw")
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    figure.set_gid("kl")
    figure.set_label("KL divergence between base and bridge by position in the window of prose")
    axes = figure.subplots()
    edges = [part["from"] for part in parts] + [parts[-1]["to"]]
    colour = LOOKS["retained"][0]
    heights = [part["mean"] for part in parts]
    axes.stairs(heights, edges, fill=True, color=colour, alpha=0.25)
    axes.stairs(heights, edges, baseline=None, color=colour, linewidth=1.8)
    axes.axhline(kl["mean"], color=INK, linewidth=1, linestyle=(0, (4, 3)),
                 label=f"mean {kl['mean']:.3g}")  # fmt: skip
    axes.set(
        xlabel="position in the window, tokens",
        ylabel="KL(base‖bridge), nats per token",
        xlim=(edges[0], edges[-1]),
        ylim=(0, 1.12 * max(heights) or 1),
    )
    axes.grid(axis="y")
    if any(heights):
        axes.legend(frameon=False, loc="upper right")
    else:
        axes.set_yticks([0])
        axes.text(0.5, 0.5, "0 at every position: the two sides predict the same",
                  transform=axes.transAxes, ha="center", va="center")  # fmt: skip
    return figure


@matplotlib.style.context(STYLE)
def front(dial: dict) -> Figure:
    """Vision score against text retention, one panel a mode and one labelled point a scale.

    Without a vision score the scale itself is drawn upwards.
    """
    modes = dial_modes(dial)
    if not modes:
        raise ValueError("the dial holds no point to draw")
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    figure.set_gid("front")
    figure.set_label("Vision score against text retention, one point for each scale of the adapter")
    all_axes = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    panels = [(axes, _front_panel(axes, dial, mode))
              for axes, mode in zip(all_axes, modes, strict=True)]  # fmt: skip
    seeing = all(point["vision"] for point in dial["points"])
    metric = next((p["vision"].get("metric") for p in dial["points"] if p["vision"]), None)
    what = f"{metric or 'accuracy'} on {dial['vision_task'] or 'the vision task'}, %"
    all_axes[0].set_ylabel(what if seeing else "scale of the adapter")
    held = [body for point in dial["points"] for body in point["modes"].values() if body]
    seen = {body["verdict"] for body in held}
    handles = [_legend_mark(name) for name in ORDER if name in seen]
    if dial["largest_retained"] is not None:
        best = f"largest retained scale ({dial['largest_retained']:g})"
        handles.append(Line2D([], [], **RING, label=best))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
                  columnspacing=1.4, handletextpad=0.4)  # fmt: skip
    figure.draw_without_rendering()  # places are known only after the layout
    for axes, places in panels:
        _name_scales(axes, places, dial["largest_retained"])
    return figure


RING = {"color": INK, "marker": "o", "markersize": 14, "markerfacecolor": "none", "linestyle": "",
        "markeredgewidth": 1.5}  # fmt: skip


def _front_panel(axes, dial: dict, mode: str) -> list[dict]:
    """Draw one mode; returns its points: scale, x, y and the intervals of both."""
    seeing = all(point["vision"] for point in dial["points"])
    axes.set_title(mode, loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel(minus("bridge - base, points"))
    axes.axvline(0, color=INK, linewidth=1)
    axes.grid()
    axes.margins(0.12)
    places = []
    for point in dial["points"]:
        body = point["modes"].get(mode)
        if body:
            x, y = 100 * body["delta"], point["scale"]
            xs = [100 * end for end in body["ci95"]] if body["ci95"] else [x, x]
            ys = [y, y]
            if seeing:
                y = 100 * point["vision"][point["vision"].get("metric", "accuracy")]
                ys = [100 * end for end in point["vision"]["ci95"]]
            _mark(axes, x, y, body["verdict"], xs, ys)
            if point["scale"] == dial["largest_retained"]:
                axes.plot(x, y, **RING, zorder=4)
            places.append({"scale": point["scale"], "x": x, "y": y, "xs": xs, "ys": ys})
    axes.plot([place["x"] for place in places], [place["y"] for place in places],
              color="#80868f", linewidth=1, zorder=1)  # fmt: skip
    return places


def _name_scales(axes, places: list[dict], best: float | None) -> None:
    """Write each scale beside its point, where it covers no point, interval or other name.

    Points that lie on one another share a name. Lengths here are typographic points.
    """
    unit = axes.figure.dpi / 72

    def spot(x, y):
        return tuple(axes.transData.transform((x, y)) / unit)

    taken, groups = [], []
    for place in places:
        x, y = spot(place["x"], place["y"])
        taken.append((x - 7, y - 7, x + 7, y + 7))
        (west, east), (south, north) = place["xs"], place["ys"]
        taken += [
            (*spot(west, place["y"]), *spot(east, place["y"])),
            (*spot(place["x"], south), *spot(place["x"], north)),
        ]
        for group in groups:
            if abs(group["x"] - x) < 5 and abs(group["y"] - y) < 5:
                group["scales"].append(place["scale"])
                break
        else:
            groups.append({"x": x, "y": y, "at": (place["x"], place["y"]),
                           "scales": [place["scale"]]})  # fmt: skip
    left, bottom, right, top = (edge / unit for edge in axes.bbox.extents)
    zero = spot(0, 0)[0]
    taken.append((zero - 1, bottom, zero + 1, top))
    around = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    for group in groups:
        name = ", ".join(f"{scale:g}" for scale in group["scales"])
        width, height = 6.2 * len(name), 10.0
        for far, (aside, up) in product((3, 8, 14, 20, 28, 40), around):
            reach = far + 7 * (aside == 0 or up == 0)
            x = group["x"] + aside * (reach + width / 2)
            y = group["y"] + up * (reach + height / 2)
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            inside = left < box[0] and box[2] < right and bottom < box[1] and box[3] < top
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "color": "#80868f", "linewidth": 0.8, "shrinkB": 5}
        axes.annotate(
            name, group["at"], (x - group["x"], y - group["y"]), textcoords="offset points",
            ha="center", va="center", weight="bold" if best in group["scales"] else "normal",
            path_effects=[withStroke(linewidth=3, foreground=PAPER)], zorder=5,
            arrowprops=line if far > 8 else None,
        )  # fmt: skip


def _overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _mark(axes, x, y, verdict, xs, ys, wide: bool = False) -> None:
    """A point in the look of its verdict, with its intervals."""
    colour, marker, filled = LOOKS[verdict]
    axes.plot(xs, [y, y], color=colour, linewidth=2.6 if wide else 1.6)
    axes.plot([x, x], ys, color=colour, linewidth=1, alpha=0.7)
    axes.plot(x, y, marker, color=colour, markersize=8 if wide else 6.5, markeredgewidth=1.5,
              markerfacecolor=colour if filled else PAPER, zorder=3)  # fmt: skip


def _legend_mark(verdict: str) -> Line2D:
    colour, marker, filled = LOOKS[verdict]
    return Line2D([], [], color=colour, marker=marker, markersize=6.5, markeredgewidth=1.5,
                  markerfacecolor=colour if filled else PAPER, linestyle="",
                  label=verdict.replace("_", " "))  # fmt: skip


def minus(text: str) -> str:
    """A typographic minus sign in a figure."""
    return text.replace("-", "\N{MINUS SIGN}")


@matplotlib.style.context(STYLE)
def svg(figure: Figure) -> str:
    """The figure as one <svg> element to put into a page, of the page's colours and width."""
    buffer = io.StringIO()
    unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=unnamed)
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->\n?", "", text[text.index("<svg") :], flags=re.DOTALL)
    name = figure.get_gid()  # ids of several figures must not meet in one page
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper, white)")
    return text.replace("<svg", f'<svg role="img" aria-label="{figure.get_label()}"', 1)
