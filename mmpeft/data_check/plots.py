"""The figure of a data set: lengths, tokens that are learned, sizes of pictures."""

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from mmpeft.retention.plots import INK, LOOKS, STYLE, WIDTH

BLUE, ORANGE = LOOKS["retained"][0], LOOKS["degraded"][0]
BINS = 40
WIDE = 50  # largest by median, from which on an axis of lengths is logarithmic
SPREAD = 20  # largest by smallest, from which on axes of sizes are
DOTS = 500  # different sizes that are drawn one by one


@matplotlib.style.context(STYLE)
def draw(lengths, unit: str, learned, heights, widths, max_length: int | None = None) -> Figure:
    """One panel for each that is not empty; each an int array, one entry a row or a picture.

    Args:
        unit: what ``lengths`` counts.
        heights, widths: pixels of the different pictures.
        max_length: longest chat that training takes, drawn as a line.
    """
    panels = [lambda axes: _histogram(axes, lengths, f"{unit} of a row", BLUE, max_length)]
    if len(learned):
        panels.append(lambda axes: _histogram(axes, learned, "learned tokens of a row", ORANGE))
    if len(heights):
        panels.append(lambda axes: _sizes(axes, heights, widths))
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    figure.set_gid("data")
    figure.set_label("Lengths of rows, tokens that are learned, and sizes of pictures")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
    return figure


def _histogram(axes, values, name: str, colour: str, limit: int | None = None) -> None:
    low, high = int(values.min()), int(values.max()) + 1
    if high > WIDE * max(1, np.median(values)):
        edges = np.unique(np.geomspace(max(1, low), high, BINS + 1).round())
        axes.set_xscale("log")
    else:  # of whole numbers each, or bars would differ for no reason
        step = -(-(high - low) // BINS)
        edges = np.arange(low, high + step, step)
    counts, _ = np.histogram(np.maximum(values, edges[0]), edges)
    axes.stairs(counts, edges, fill=True, color=colour, alpha=0.8)
    if limit is not None:
        name += f" (limit {limit:,})"
        if limit < 2 * high:  # farther away, the line would leave no room for the rows
            axes.axvline(limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlabel=name, ylabel="rows")
    axes.grid(axis="y")


def _sizes(axes, heights, widths) -> None:
    sizes, counts = np.unique(np.stack([widths, heights], 1), axis=0, return_counts=True)
    scale = "log" if sizes.max() > SPREAD * sizes.min() else "linear"
    if len(sizes) > DOTS:
        axes.hexbin(widths, heights, gridsize=30, mincnt=1, bins="log", xscale=scale,
                    yscale=scale, cmap="viridis_r", linewidths=0.2)  # fmt: skip
    else:
        area = 12 + 120 * counts / counts.max()
        axes.scatter(sizes[:, 0], sizes[:, 1], area, color=BLUE, alpha=0.6, linewidths=0)
        axes.set(xscale=scale, yscale=scale)
    if scale == "linear":
        axes.set(xlim=(0, None), ylim=(0, None))
    axes.set(xlabel="width, pixels", ylabel="height, pixels")
    axes.grid()
