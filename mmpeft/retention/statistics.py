"""Paired statistics on right/wrong answers, and the verdict drawn from them.

The interval is Tango's score interval for the difference of paired proportions (T. Tango,
"Equivalence test and confidence interval for the difference in proportions for the paired-sample
design", Statistics in Medicine 17, 1998). It keeps an honest width when no answer flips.

The verdict, with lower and upper the two one-sided 95% bounds of bridge - base (a 90% interval):

    not_judgeable   the base is not above chance (exact binomial test, one-sided 5%)
    retained        lower > -margin: a loss as large as the margin is ruled out
    degraded        otherwise, if upper < 0: some loss is certain
    inconclusive    otherwise: more items are needed

A loss that is certain but certainly smaller than the margin is "retained": that is what the margin
says. Each of "retained" and "degraded" is wrong in at most about 5% of the cases in which it could
be wrong.
"""

import math
from collections.abc import Sequence

from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from statsmodels.stats.contingency_tables import mcnemar

MARGIN = 0.02
ALPHA = 0.05
POWER = 0.80


def score_statistic(delta: float, gained: int, lost: int, n: int) -> float:
    """Tango's z for the hypothesis that the true difference is `delta`, falling in delta."""
    distance = gained - lost - n * delta
    if distance == 0:
        return 0.0
    # the share of lost items that is most likely if the difference were delta
    b = (2 * n - gained + lost) * delta - gained - lost
    c = -lost * delta * (1 - delta)
    share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * share + delta * (1 - delta))
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def paired_interval(gained: int, lost: int, n: int, confidence: float) -> tuple[float, float]:
    """Two-sided score interval for (gained - lost) / n, the paired difference of proportions."""
    z = norm.ppf((1 + confidence) / 2)
    estimate = (gained - lost) / n
    edge = 1 - 1e-12

    def bound(target: float, low: float, high: float) -> float:
        return brentq(lambda d: score_statistic(d, gained, lost, n) - target, low, high, xtol=1e-12)

    lower = -1.0 if estimate == -1 else bound(z, -edge, estimate)
    upper = 1.0 if estimate == 1 else bound(-z, estimate, edge)
    return lower, upper


def smallest_detectable_drop(flips: int, n: int) -> float:
    """The drop whose upper bound falls below 0 with 80% power, at the flip rate that was seen.

    A drop cannot exceed the share of answers that flip, hence the second term.
    """
    reach = norm.ppf(1 - ALPHA) + norm.ppf(POWER)
    return max(reach * math.sqrt(flips / n / n), reach**2 / (n + reach**2))


def above_chance(correct: int, n: int, chance: float) -> bool:
    return bool(binomtest(correct, n, chance, alternative="greater").pvalue < ALPHA)


def verdict(lower: float, upper: float, margin: float) -> str:
    """The rule of this module's docstring for one-sided 95% bounds `lower` and `upper`."""
    if lower > -margin:
        return "retained"
    return "degraded" if upper < 0 else "inconclusive"


def compare(
    base: Sequence[bool],
    bridge: Sequence[bool],
    *,
    chance: float,
    margin: float = MARGIN,
    exact: bool = False,
) -> dict:
    """Base against bridge on the same items.

    Args:
        base, bridge: right or wrong, item by item.
        chance: accuracy of guessing on these items.
        margin: largest loss (a share, 0.02 is two points) that still counts as retained.
        exact: the sides were shown to be the same function on this text, so the difference is 0
            by proof and not an estimate.
    """
    n = len(base)
    if n == 0 or n != len(bridge):
        raise ValueError(f"{n} base answers and {len(bridge)} bridge answers: need the same items")
    if not 0 < margin < 1:
        raise ValueError(f"margin={margin}: give it as a share between 0 and 1 (0.02 is 2 points)")
    right = [sum(base), sum(bridge)]
    gained = sum(after and not before for before, after in zip(base, bridge, strict=True))
    lost = sum(before and not after for before, after in zip(base, bridge, strict=True))
    if exact:
        if gained or lost:
            raise ValueError("answers flipped, so the sides are not the same function")
        interval = bounds = (0.0, 0.0)
        detectable = 0.0
    else:
        interval = paired_interval(gained, lost, n, 1 - ALPHA)
        bounds = paired_interval(gained, lost, n, 1 - 2 * ALPHA)
        detectable = smallest_detectable_drop(gained + lost, n)
    judgeable = above_chance(right[0], n, chance)
    both = n - gained - lost
    return {
        "n": n,
        "base": right[0] / n,
        "bridge": right[1] / n,
        "chance": chance,
        "delta": (gained - lost) / n,
        "ci95": list(interval),
        "bounds95": list(bounds),
        "flips": {"gained": gained, "lost": lost},
        "mcnemar_p": float(mcnemar([[both, gained], [lost, 0]], exact=True).pvalue),
        "smallest_detectable_drop": detectable,
        "exact": exact,
        "verdict": verdict(*bounds, margin) if judgeable else "not_judgeable",
    }
