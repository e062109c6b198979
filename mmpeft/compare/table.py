"""Pool the seeds of every combination, find the front, and write the table."""

import csv
import io
import math
import statistics

import numpy as np
from scipy.stats import t

SCHEMA = "mmpeft.compare/1"


def pool(grid: dict, results: list[dict], failures: list[dict], missing: list[str]) -> dict:
    """The report of a grid.

    Args:
        grid: what ``grid.json`` holds.
        results: of the complete cells, as :func:`mmpeft.compare.cell.run_cell` returns them.
        failures: ``{"cell", "error", "log"}`` of cells that ended without a result.
        missing: names of cells that were not run.
    """
    combinations = [cell["labels"] for cell in grid["cells"]]
    combinations = [labels for i, labels in enumerate(combinations)
                    if labels not in combinations[:i]]  # fmt: skip
    groups = [(labels, [r for r in results if r["labels"] == labels]) for labels in combinations]
    rows = [row(labels, cells) for labels, cells in groups if cells]
    metrics = list(rows[0]["metrics"]) if rows else []
    metric = grid["metric"] or (metrics[0] if metrics else None)
    if rows and metric not in metrics:
        raise ValueError(f"evaluate.metric {metric!r}: the task has {', '.join(metrics)}.")
    modes = list(dict.fromkeys(mode for one in rows for mode in one["retention"]))
    for one in rows:
        one["on_front"] = {}
    for mode in modes:
        measured = [one for one in rows if one["retention"].get(mode)]
        points = [(one["metrics"][metric]["mean"], one["retention"][mode]["mean"])
                  for one in measured]  # fmt: skip
        for one, best in zip(measured, front(points), strict=True):
            one["on_front"][mode] = best
    return {
        "schema": SCHEMA,
        **{key: grid[key] for key in ("grid", "recipe", "axes", "seeds")},
        "task": results[0]["score"]["task"] if results else None,
        "n": results[0]["score"]["n"] if results else None,
        "metric": metric,
        "modes": modes,
        "rows": rows,
        "failures": failures,
        "missing": missing,
        "complete": not failures and not missing,
    }


def row(labels: dict[str, str], cells: list[dict]) -> dict:
    """One combination over its seeds."""
    trained = [cell["train"] for cell in cells]
    modes = dict.fromkeys(mode for cell in cells for mode in cell.get("retention", {}))
    metrics = {}
    for name in cells[0]["score"]["metrics"]:
        found = [cell["score"]["metrics"][name] for cell in cells]
        metrics[name] = interval([one["value"] for one in found], found[0]["ci95"]) | {
            "controls": {
                control: statistics.mean(one["controls"][control] for one in found)
                for control in found[0]["controls"]
            }
        }
    retention = {}
    for mode in modes:
        found = [cell["retention"][mode] for cell in cells]
        retention[mode] = None  # no adapter, or the base is not above chance on these tasks
        if all(found):
            retention[mode] = interval([one["delta"] for one in found], found[0]["ci95"]) | {
                "exact": all(one["exact"] for one in found),
                "verdicts": [one["verdict"] for one in found],
            }
    return {
        "labels": labels,
        "seeds": [cell["seed"] for cell in cells],
        "trained_parameters": sum(trained[0]["trained_parameters"].values()),
        "adapter_parameters": trained[0]["trained_parameters"]["adapter"],
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
    n = len(values)
    mean = statistics.mean(values)
    if n == 1:
        return {"mean": mean, "ci95": over_rows, "interval": "rows", "values": values}
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "ci95": [mean - half, mean + half], "interval": "seeds", "values": values}


def front(points: list[tuple[float, float]]) -> list[bool]:
    """Of each point, whether no other is as good in both and better in one."""
    found = np.asarray(points, float).reshape(-1, 2)
    return [not ((found >= p).all(1) & (found > p).any(1)).any() for p in found]


def columns(report: dict) -> list[str]:
    return [
        *report["axes"], "seeds", "trained", "memory GB", "train s",
        *(report["rows"][0]["metrics"] if report["rows"] else []),
        *(f"retention {mode}" for mode in report["modes"]),
        *(["front"] if report["modes"] else []),
    ]  # fmt: skip


def cells(row: dict) -> list[str]:
    """A row of the report under :func:`columns`."""
    metrics = [with_interval(one, *scale(name)) for name, one in row["metrics"].items()]
    return [
        *row["labels"].values(), str(len(row["seeds"])), f"{row['trained_parameters']:,}",
        f"{row['peak_memory_bytes'] / 1e9:.2f}", f"{row['train_seconds']:.0f}", *metrics,
        *(retained(one) for one in row["retention"].values()),
        *([", ".join(mode for mode, on in row["on_front"].items() if on)]
          if row["retention"] else []),
    ]  # fmt: skip


def scale(metric: str) -> tuple[float, str]:
    """Factor and form in which a metric is shown: accuracy in percent."""
    return (100, ".1f") if metric == "accuracy" else (1, ".3f")


def with_interval(one: dict, factor: float, form: str) -> str:
    low, high = (format(factor * end, form) for end in one["ci95"])
    return f"{format(factor * one['mean'], form)} [{low}, {high}]" + (
        "*" if one["interval"] == "rows" else ""
    )


def retained(one: dict | None) -> str:
    if one is None:
        return "-"
    return "0 (exact)" if one["exact"] else with_interval(one, 100, "+.1f")


def notes(report: dict) -> list[str]:
    """What the reader of the table has to know."""
    measured = (one for row in report["rows"] for part in ("metrics", "retention")
                for one in row[part].values())  # fmt: skip
    kinds = {one["interval"] for one in measured if one is not None}
    said = [f"{report['task']}, {report['n']} test rows; accuracy in percent"]
    if "seeds" in kinds:
        said.append("[95% interval]: Student's t over the seeds, all on the same test rows")
    if "rows" in kinds:
        said.append("[95% interval]*: one seed, so over the test rows; says nothing about seeds")
    if report["modes"]:
        said.append(
            "retention: bridge - base, points of accuracy on the text suite; front: no other is as "
            f"good in {report['metric']} and retention and better in one"
        )
    said.append(
        "memory: most that the process held until the end of training; train s: median over the "
        "seeds of the seconds in the training loops"
    )
    for one in report["failures"]:
        said.append(f"failed: {one['cell']}: {one['error']} ({one['log']})")
    if report["missing"]:
        said.append(f"not run: {', '.join(report['missing'])}")
    return said


def render(report: dict) -> str:
    """The table for a terminal."""
    table = [columns(report), *map(cells, report["rows"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip()
             for line in table]  # fmt: skip
    return "\n".join([*lines, *notes(report)])


def as_markdown(report: dict) -> str:
    """The table for a document."""
    head = columns(report)
    lines = [head, ["---"] * len(head), *map(cells, report["rows"])]
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
            low, high = (None, None) if one is None else one["ci95"]
            line |= {name: one and one["mean"], f"{name}_low": low, f"{name}_high": high}
            line[f"{name}_interval"] = one and one["interval"]
        line |= {f"front_{mode}": on for mode, on in row["on_front"].items()}
        lines.append(line)
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
