"""Axes of a tiny grid, and results made up."""

from mmpeft.compare import table

AXES = {
    "method": {
        "lora": None,
        "ia3": {"model.adapter": {"class_path": "IA3Config"}, "model.gate": "none"},
    },
    "rank": {2: {"model.rank": 2}, 4: {"model.rank": 4}},
}


def result(labels, seed, accuracy, delta=None, ci95=(0.4, 0.6), exact=False, **train):
    train = {"trained_parameters": {"connector": 100, "adapter": 20}, "peak_memory_bytes": 10**9,
             "seconds": 5.0} | train  # fmt: skip
    metric = {"value": accuracy, "ci95": list(ci95), "controls": {"majority": 0.3}}
    found = {"labels": labels, "seed": seed, "train": train,
             "score": {"task": "t", "n": 50, "metrics": {"accuracy": metric}}}  # fmt: skip
    if delta is not None:
        body = {"delta": delta, "ci95": [delta - 0.1, delta + 0.1], "exact": exact,
                "verdict": "retained"}  # fmt: skip
        found["retention"] = {"text": body}
    return found


def pooled(results, axes, metric=None):
    cells = [{"name": "", "labels": r["labels"], "seed": r["seed"]} for r in results]
    grid = {
        "grid": "g",
        "recipe": "r",
        "axes": axes,
        "seeds": [0],
        "metric": metric,
        "cells": cells,
    }
    return table.pool(grid, results, [], [])
