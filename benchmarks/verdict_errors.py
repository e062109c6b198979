"""How often the verdicts of `mmpeft retain` are wrong, by simulation.

    python benchmarks/verdict_errors.py                       the table, and docs/verdict_errors.png
    python benchmarks/verdict_errors.py --runs 100 --json     a quick look, for a machine

Answers of two sides are drawn at random around a drop that is known, and judged with the rules of
mmpeft/retention/statistics.py (margin: 2 points). The claims that can fail:

    no change         called "degraded" in about 5% of the cases or fewer
    drop = margin     called "retained" in about 5% of the cases or fewer
    a family          any of five tasks called so, after Holm's correction: 5% again

Between the two no verdict is wrong, and it takes items to reach one: the columns of a drop of 3
points, and the picture, which has the share of each verdict against the true drop. Items of a
cluster flip together; graded scores move by half a point of score on average.
"""

import argparse
import gc
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mmpeft.retention.statistics import (
    ALPHA,
    MARGIN,
    compare,
    decide,
    design_effect,
    score_p_values,
)

SIZES = (200, 800, 2000)
FLIPS = (0.03, 0.1, 0.2)
GRADED = ((200, 0.3), (800, 0.3), (800, 0.05))  # items, share of them whose score changes
DROP = 0.03
CLUSTER, CORRELATION = 5, 0.3
FAMILY = 5
VERDICTS = ("retained", "degraded", "inconclusive")


@cache
def verdict(gained: float, lost: float, n: float) -> str:
    """The verdict of `compare` on right and wrong answers, from their (effective) counts."""
    p_degraded, p_retained = score_p_values(gained, lost, n, MARGIN)
    if p_retained < ALPHA:
        return "retained"
    return "degraded" if p_degraded < ALPHA else "inconclusive"


def flip_shares(drop: float, flips: float) -> list[float]:
    """Shares of items gained, lost and unchanged."""
    return [(flips - drop) / 2, (flips + drop) / 2, 1 - flips]


def shares(said: list[str]) -> dict[str, float]:
    return {word: said.count(word) / len(said) for word in VERDICTS}


def independent(n: int, drop: float, flips: float, runs: int, seed: int = 0) -> dict[str, float]:
    """Share of each verdict if `drop` is true and `flips` of the answers flip."""
    draws = np.random.default_rng(seed).multinomial(n, flip_shares(drop, flips), size=runs)
    return shares([verdict(int(gained), int(lost), n) for gained, lost, _ in draws])


def clustered_flips(
    n: int, drop: float, flips: float, size: int, correlation: float, runs: int, seed: int = 0
) -> np.ndarray:
    """(runs, n) of 1 (gained), -1 (lost) and 0, in clusters of `size` neighbours.

    An item copies a draw its cluster shares with the probability sqrt(correlation), and has its own
    otherwise; so any two items of a cluster correlate by `correlation`.
    """
    random = np.random.default_rng(seed)
    edges = np.cumsum(flip_shares(drop, flips))[:2]
    copies = random.random((runs, n)) < math.sqrt(correlation)
    shared = np.repeat(random.random((runs, n // size)), size, axis=1)
    draws = np.where(copies, shared, random.random((runs, n)))
    return np.select([draws < edges[0], draws < edges[1]], [1, -1], 0)


def clustered(
    n: int, drop: float, flips: float, size: int, correlation: float, runs: int,
    effect=design_effect, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Share of each verdict for items in clusters; `effect(flips, clusters)` counts for less."""
    clusters = np.arange(n) // size
    said = []
    for row in clustered_flips(n, drop, flips, size, correlation, runs, seed):
        divisor = effect(row, clusters)
        gained, lost = (int((row == sign).sum()) for sign in (1, -1))
        said.append(verdict(gained / divisor, lost / divisor, n / divisor))
    return shares(said)


def plain_ratio(values: np.ndarray, clusters: np.ndarray) -> float:
    """The design effect as textbooks have it, without the added cluster."""
    residuals = values - values.mean()
    robust = (np.bincount(clusters, weights=residuals) ** 2).sum()
    return max(1.0, robust / (residuals**2).sum()) if residuals.any() else 1.0


def graded(n: int, drop: float, changed: float, runs: int, seed: int = 0) -> dict[str, float]:
    """Share of each verdict on scores like F1: `changed` of them move, by 0.5 on average."""
    random = np.random.default_rng(seed)
    said = []
    for _ in range(runs):
        signs = random.choice([1, -1, 0], p=flip_shares(2 * drop, changed), size=n)
        base = np.where(signs > 0, 0.0, 1.0)
        bridge = base + signs * random.beta(2, 2, size=n)
        said.append(compare(base, bridge, chance=0)["verdict"])
    return shares(said)


@cache
def task_row(gained: int, lost: int, n: int) -> dict:
    kept = n - gained - lost
    return compare(
        [0] * gained + [1] * (lost + kept), [1] * gained + [0] * lost + [1] * kept, chance=0
    )


def family(
    n: int, drop: float, flips: float, tasks: int, runs: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """How often any of several tasks is called degraded or retained, before and after Holm."""
    draws = np.random.default_rng(seed).multinomial(n, flip_shares(drop, flips), size=(runs, tasks))
    words = {"degraded": 0, "retained": 0}
    result = {"uncorrected": {**words}, "holm": {**words}}
    gc.freeze()  # statsmodels collects all garbage in every call; let it find none
    for run in draws:
        rows = [{**task_row(int(gained), int(lost), n)} for gained, lost, _ in run]
        for stage in result:
            if stage == "holm":
                decide(rows, MARGIN)
            for word in words:
                result[stage][word] += any(row["verdict"] == word for row in rows) / runs
    gc.unfreeze()
    return result


def measure(runs: int) -> dict:
    """All error rates, and the power curves of the picture."""
    rates = []
    for n in SIZES:
        for flips in FLIPS:
            for size in (1, CLUSTER):
                more = {} if size == 1 else {"size": size, "correlation": CORRELATION}
                draw = independent if size == 1 else clustered
                rates.append({
                    "n": n, "flips": flips, "cluster_size": size,
                    "no_change": draw(n=n, drop=0.0, flips=flips, runs=runs, **more),
                    "drop_of_margin": draw(n=n, drop=MARGIN, flips=flips, runs=runs, **more),
                    "planted_drop": draw(n=n, drop=DROP, flips=flips, runs=runs, **more),
                })  # fmt: skip
    few = {"n": 1000, "flips": 0.03, "size": 50, "correlation": CORRELATION}
    effects = {
        "items taken as independent": lambda *_: 1.0,
        "textbook design effect": plain_ratio,
        "as mmpeft does": design_effect,
    }
    drops = [point / 200 for point in range(17)]
    return {
        "runs": runs,
        "margin": MARGIN,
        "planted_drop": DROP,
        "correlation": CORRELATION,
        "rates": rates,
        "graded": [
            {
                "n": n, "changed": changed,
                "no_change": graded(n, 0.0, changed, runs),
                "drop_of_margin": graded(n, MARGIN, changed, runs),
            }
            for n, changed in GRADED
        ],
        "family": {
            "tasks": FAMILY, "n": 800, "flips": 0.1,
            "no_change": family(800, 0.0, 0.1, FAMILY, runs),
            "drop_of_margin": family(800, MARGIN, 0.1, FAMILY, runs),
        },
        "few_clusters": {
            **few,
            "falsely_retained": {
                name: clustered(drop=MARGIN, runs=runs, effect=effect, **few)["retained"]
                for name, effect in effects.items()
            },
        },
        "power": {
            "flips": 0.1,
            "drops": drops,
            "n": {n: [independent(n, drop, 0.1, runs) for drop in drops] for n in SIZES},
        },
    }  # fmt: skip


def percent(share: float) -> str:
    return f"{100 * share:6.1f}"


def render(report: dict) -> str:
    points, drop = 100 * report["margin"], 100 * report["planted_drop"]
    lines = [
        f"Percent of {report['runs']} simulations; margin {points:g} points; clusters correlate by "
        f"{report['correlation']}",
        "",
        f"   items  flips  cluster | no change  drop {points:g}    |        drop {drop:g}",
        "                  of     | degraded   retained  | degraded  inconclusive  retained",
    ]
    for rate in report["rates"]:
        planted = rate["planted_drop"]
        lines.append(
            f"  {rate['n']:6d} {rate['flips']:6.2f} {rate['cluster_size']:8d} |  "
            f"{percent(rate['no_change']['degraded'])}    "
            f"{percent(rate['drop_of_margin']['retained'])}   |  {percent(planted['degraded'])}"
            f"       {percent(planted['inconclusive'])}    {percent(planted['retained'])}"
        )
    for rate in report["graded"]:
        lines.append(
            f"  {rate['n']:6d} {rate['changed']:6.2f}   graded |  "
            f"{percent(rate['no_change']['degraded'])}    "
            f"{percent(rate['drop_of_margin']['retained'])}   |"
        )
    group = report["family"]
    lines += ["", f"Any of {group['tasks']} tasks ({group['n']} items, flips {group['flips']}):"]
    for stage in ("uncorrected", "holm"):
        lines.append(
            f"  {stage:12s} no change: degraded "
            f"{percent(group['no_change'][stage]['degraded'])}   drop {points:g}: retained "
            f"{percent(group['drop_of_margin'][stage]['retained'])}"
        )
    few = report["few_clusters"]
    lines += [
        "",
        f"{few['n']} items in clusters of {few['size']}, flips {few['flips']}, drop {points:g} "
        "called retained:",
        *(f"  {name:28s}{percent(rate)}" for name, rate in few["falsely_retained"].items()),
    ]
    return "\n".join(lines)


def draw_curves(power: dict, margin: float, path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    points = [100 * drop for drop in power["drops"]]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, word in zip(panels, ("retained", "degraded"), strict=True):
        for n, rates in power["n"].items():
            axes.plot(points, [rate[word] for rate in rates], label=f"n = {n}")
        axes.axvline(100 * margin, color="gray", linewidth=0.8)
        axes.axhline(ALPHA, color="gray", linewidth=0.8, linestyle=":")
        axes.set(xlabel="true drop (points)", title=f'called "{word}"', ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of simulations")
    figure.axes[1].legend()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000, help="simulations of each case (1000)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/verdict_errors.png"), help="picture to write"
    )
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs {arguments.runs}: simulate at least once")
    report = measure(arguments.runs)
    draw_curves(report["power"], report["margin"], arguments.out)
    print(json.dumps(report) if arguments.json else render(report))


if __name__ == "__main__":
    main()
