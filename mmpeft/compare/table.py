"""Pool the seeds of every combination, find the front, and write the table."""

import csv
import io
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.stats import t

SCHEMA = "mmpeft.compare/1"
PROSE = "prose"  # beside the modes of retention: what a cell predicts of running text


def pool(
    grid: dict, results: list[dict], failures: list[dict], missing: list[str],
    running: Sequence[str] = (),
) -> dict:  # fmt: skip
    """The report of a grid.

    Args:
        grid: what ``grid.json`` holds.
        results: of the complete cells, as :func:`mmpeft.compare.cell.run_cell` returns them.
        failures: ``{"cell", "error", "log"}`` of cells that ended without a result.
        missing: names of cells that were not run.
        running: of those that another process is at work on.
    """
    combinations = [cell["labels"] for cell in grid["cells"]]
    combinations = [labels for i, labels in enumerate(combinations)
                    if labels not in combinations[:i]]  # fmt: skip
    groups = [(labels, [r for r in results if r["labels"] == labels]) for labels in combinations]
    rows = [row(labels, cells) for labels, cells in groups if cells]
    scored = {(one["score"]["task"], one["score"]["n"]) for one in results}
    if len(scored) > 1:
        found = ", ".join(f"{n} of {task}" for task, n in sorted(scored))
        raise ValueError(
            f"cells were scored on different test rows ({found}), which one table does not hold; "
            "set evaluate.task."
        )
    metrics = list(dict.fromkeys(name for one in rows for name in one["metrics"]))
    metric = grid["metric"] or (metrics[0] if metrics else None)
    if rows and metric not in metrics:
        raise ValueError(f"evaluate.metric {metric!r}: the task has {', '.join(metrics)}.")
    modes = list(dict.fromkeys(mode for one in rows for mode in one["retention"]))
    taken = {*metrics, *(f"retention_{mode}" for mode in modes)}
    if both := [axis for axis in grid["axes"] if axis in taken]:
        raise ValueError(f"axis {both[0]} has the name of what is measured; rename it, which runs "
                         "no cell anew.")  # fmt: skip
    for one in rows:
        one["on_front"] = {}
        for name, found in one["metrics"].items():
            reference = None if one is rows[0] else rows[0]["metrics"].get(name)
            found["difference"] = reference and difference(found, reference)
    for mode in modes:
        measured = [one for one in rows if one["retention"].get(mode) and metric in one["metrics"]
                    and math.isfinite(one["metrics"][metric]["mean"])]  # fmt: skip
        points = [(one["metrics"][metric]["mean"], one["retention"][mode]["mean"])
                  for one in measured]  # fmt: skip
        for one, best in zip(measured, front(points), strict=True):
            one["on_front"][mode] = best
    return {
        "schema": SCHEMA,
        **{key: grid[key] for key in ("grid", "recipe", "axes", "seeds")},
        "task": results[0]["score"]["task"] if results else None,
        "n": results[0]["score"]["n"] if results else None,
        "metrics": metrics,
        "metric": metric,
        "modes": modes,
        "rows": rows,
        "failures": failures,
        "missing": missing,
        "running": list(running),
        "complete": not failures and not missing and not running,
    }


def row(labels: dict[str, str], cells: list[dict]) -> dict:
    """One combination over its seeds."""
    trained = [cell["train"] for cell in cells]
    modes = dict.fromkeys(mode for cell in cells for mode in cell.get("retention", {}))
    metrics = {}
    for name in dict.fromkeys(name for cell in cells for name in cell["score"]["metrics"]):
        having = [cell for cell in cells if name in cell["score"]["metrics"]]
        found = [cell["score"]["metrics"][name] for cell in having]
        metrics[name] = interval([one["value"] for one in found], found[0]["ci95"]) | {
            "seeds": [cell["seed"] for cell in having],
            "controls": {
                control: statistics.mean(one["controls"][control] for one in found)
                for control in found[0]["controls"]
            },
        }
    retention = {}
    for mode in modes:
        found = [cell.get("retention", {}).get(mode) for cell in cells]
        retention[mode] = None  # the base is not above chance on these tasks
        if all(found):
            retention[mode] = interval([one["delta"] for one in found], found[0]["ci95"]) | {
                "exact": all(one["exact"] for one in found),
                "verdicts": [one["verdict"] for one in found if "verdict" in one],
            }
    return {
        "labels": labels,
        "seeds": [cell["seed"] for cell in cells],
        # the most: a rank that is looked for may differ from seed to seed
        "trained_parameters": max(sum(one["trained_parameters"].values()) for one in trained),
        "adapter_parameters": max(one["trained_parameters"]["adapter"] for one in trained),
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in trained),
        # the median: the first cell may fill the feature cache for all
        "train_seconds": statistics.median(one["seconds"] for one in trained),
        "metrics": metrics,
        "retention": retention,
    }


def interval(values: list[float], over_rows: list[float]) -> dict:
    """Mean of the seeds' values and its 95% interval.

    ``interval`` says which one: ``seeds``, Student's t over the seeds, which answered the same
    rows; or, of a single seed, ``rows``: ``over_rows``, the interval over the rows it answered.
    """
    mean, ci95 = statistics.mean(values), students(values)
    if ci95 is None:
        return {"mean": mean, "ci95": over_rows, "interval": "rows", "values": values}
    return {"mean": mean, "ci95": ci95, "interval": "seeds", "values": values}


def students(values: list[float]) -> list[float] | None:
    """95% interval of their mean by Student's t; a single value has none."""
    n = len(values)
    if n == 1:
        return None
    mean = statistics.mean(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return [mean - half, mean + half]


def difference(found: dict, reference: dict) -> dict | None:
    """A row's metric less that of the first row, paired by seed, over the seeds of both."""
    theirs = dict(zip(reference["seeds"], reference["values"], strict=True))
    pairs = zip(found["seeds"], found["values"], strict=True)
    behind = {seed: value - theirs[seed] for seed, value in pairs if seed in theirs}
    if not behind:
        return None
    values = list(behind.values())
    return {
        "mean": statistics.mean(values), "ci95": students(values), "seeds": list(behind),
        "values": values,
    }  # fmt: skip


def front(points: list[tuple[float, float]]) -> list[bool]:
    """Of each point, whether no other is as good in both and better in one."""
    found = np.asarray(points, float).reshape(-1, 2)
    return [not ((found >= p).all(1) & (found > p).any(1)).any() for p in found]


def columns(report: dict) -> list[str]:
    return [
        *report["axes"], "seeds", "trained", "memory GB", "train s",
        *report["metrics"], *([f"{report['metric']} less first row"] if report["rows"] else []),
        *(f"retention {mode}" for mode in report["modes"]),
        *(["front"] if report["modes"] else []),
    ]  # fmt: skip


def cells(report: dict, row: dict) -> list[str]:
    """A row of the report under :func:`columns`; ``-`` is what it lacks."""
    metrics = [scored(row, name) for name in report["metrics"]]
    less = row["metrics"].get(report["metric"], {}).get("difference")
    factor, form = scale(report["metric"])
    return [
        *row["labels"].values(), str(len(row["seeds"])), f"{row['trained_parameters']:,}",
        f"{row['peak_memory_bytes'] / 1e9:.2f}", f"{row['train_seconds']:.0f}", *metrics,
        with_interval(less, factor, f"+{form}") if less else "-",
        *(retained(row["retention"].get(mode)) for mode in report["modes"]),
        *([", ".join(mode for mode, on in row["on_front"].items() if on)]
          if report["modes"] else []),
    ]  # fmt: skip


def scored(row: dict, metric: str) -> str:
    """The metric of a row, saying of how many seeds if some lack it."""
    if metric not in row["metrics"]:
        return "-"
    one = row["metrics"][metric]
    have, every = len(one["values"]), len(row["seeds"])
    some = "" if have == every else f" ({have} of {every} seeds)"
    return with_interval(one, *scale(metric)) + some


def scale(metric: str) -> tuple[float, str]:
    """Factor and form in which a metric is shown: accuracy in percent."""
    return (100, ".1f") if metric == "accuracy" else (1, ".3f")


def with_interval(one: dict, factor: float, form: str) -> str:
    mean = format(factor * one["mean"], form)
    if one["ci95"] is None:
        return mean
    low, high = (format(factor * end, form) for end in one["ci95"])
    return f"{mean} [{low}, {high}]" + ("*" if one.get("interval") == "rows" else "")


def retained(one: dict | None) -> str:
    if one is None:
        return "-"
    return "0 (exact)" if one["exact"] else with_interval(one, 100, "+.1f")


def notes(report: dict) -> list[str]:
    """What the reader of the table has to know."""
    measured = (one for row in report["rows"] for part in ("metrics", "retention")
                for one in row[part].values())  # fmt: skip
    kinds = {one["interval"] for one in measured if one is not None}
    said = ["no cell is complete yet"]
    if report["rows"]:
        unit = "; accuracy in percent" if "accuracy" in report["metrics"] else ""
        said = [f"{report['task']}, {report['n']} test rows{unit}"]
    if "seeds" in kinds:
        said.append("[95% interval]: Student's t over the seeds, all on the same test rows")
    if "rows" in kinds:
        said.append("[95% interval]*: one seed, so over the test rows; says nothing about seeds")
    if "seeds" in kinds:
        said.append(
            "seeds vary the start and order of training and the rows of a data.fraction; the test "
            "rows are the same for all"
        )
    if len(report["rows"]) > 1:
        first = " ".join(report["rows"][0]["labels"].values())
        said.append(
            f"less first row: the difference to {first}, paired by seed, with Student's t (none of "
            "a single seed), not corrected for the number of rows"
        )
    if report["modes"]:
        said.append(
            "retention: bridge - base, points of accuracy on the text suite; of prose, percent by "
            "which its bits per byte are fewer than the base's; front: no other is as good in "
            f"{report['metric']} and retention and better in one"
        )
    said.append(
        "memory: most that the process held until the end of training; train s: median over the "
        "seeds of the seconds in the training loops, the search for a rank included"
    )
    for one in report["failures"]:
        said.append(f"failed: {one['cell']}: {one['error']} ({one['log']})")
    if report["running"]:
        said.append(f"running: {', '.join(report['running'])}")
    if report["missing"]:
        said.append(f"not run: {', '.join(report['missing'])}")
    return said


def render(report: dict) -> str:
    """The table for a terminal."""
    table = [columns(report), *(cells(report, row) for row in report["rows"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip()
             for line in table]  # fmt: skip
    return "\n".join([*lines, *notes(report)])


def as_markdown(report: dict) -> str:
    """The table for a document."""
    head = columns(report)
    lines = [head, ["---"] * len(head), *(cells(report, row) for row in report["rows"])]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "\n" + "".join(f"- {note}\n" for note in notes(report))


def as_csv(report: dict) -> str:
    """The table in full precision, one column a number."""
    lines = []
    for row in report["rows"]:
        line = {**row["labels"], "seeds": len(row["seeds"])}
        names = ("trained_parameters", "adapter_parameters", "peak_memory_bytes", "train_seconds")
        line |= {name: row[name] for name in names}
        measured = row["metrics"] | {f"retention_{m}": one for m, one in row["retention"].items()}
        for name, one in measured.items():
            low, high = (None, None) if one is None else one["ci95"] or (None, None)
            line |= {name: one and one["mean"], f"{name}_low": low, f"{name}_high": high}
            line[f"{name}_interval"] = one and one["interval"]
            if less := one and one.get("difference"):
                low, high = less["ci95"] or (None, None)
                line |= {f"{name}_less_first": less["mean"]}
                line |= {f"{name}_less_first_low": low, f"{name}_less_first_high": high}
        line |= {f"front_{mode}": on for mode, on in row["on_front"].items()}
        lines.append(line)
    return _csv(lines)


def cells_as_csv(results: list[dict]) -> str:
    """One line a cell, in full precision, for statistics of your own."""
    lines = []
    for cell in results:
        trained = cell["train"]
        line = {**cell["labels"], "seed": cell["seed"]}
        line |= {f"{part}_parameters": n for part, n in trained["trained_parameters"].items()}
        line |= {
            "peak_memory_bytes": trained["peak_memory_bytes"],
            "train_seconds": trained["seconds"],
        }
        line |= {name: one["value"] for name, one in cell["score"]["metrics"].items()}
        for mode, one in cell.get("retention", {}).items():
            line[f"retention_{mode}"] = one and one["delta"]
        lines.append(line)
    return _csv(lines)


def _csv(lines: list[dict]) -> str:
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
