"""Paired statistics on the scores of two sides, and the verdicts drawn from them.

Both sides answer the same items; `delta` is the mean score of the bridge minus that of the base.

Right or wrong (scores 0 and 1): Tango's score test and interval for the difference of paired
proportions (T. Tango, "Equivalence test and confidence interval for the difference in proportions
for the paired-sample design", Statistics in Medicine 17, 1998). It keeps an honest width when no
answer flips. McNemar's exact test (two-sided) is reported beside it and decides nothing; it takes
every item as independent, clusters or not.

Graded (any other score between 0 and 1, such as F1): the paired t test and interval. Where fewer
than 20 items (or clusters) changed, a t interval would be too narrow (empty, if none did), and the
score test takes its place with the sums of all gains and of all losses for its counts: as if whole
answers had flipped, which is the widest reading.

Clusters (several items about one passage): the counts of the score test are divided by a design
effect (J. Rao and A. Scott, "A simple method for the analysis of clustered binary data", Biometrics
48, 1992): the cluster-robust variance of delta over its variance if all items were independent, at
least 1. For matched pairs cf. N. Obuchowski, Statistics in Medicine 17, 1998, and Z. Yang, X. Sun,
J. Hardin, Biometrical Journal 52, 2010. The t test multiplies its variance by the same number and
has (clusters - 1) degrees of freedom. Few flips say little about how flips cluster, and the plain
ratio then claims far too much (`python benchmarks/verdict_errors.py` shows it). So one more
cluster, of average size, whose items all flip the same way is added to the data when the ratio is
estimated. If nothing flips the effective number of items is therefore the number of clusters.

The verdict of one comparison, with lower and upper the one-sided 95% bounds of delta:

    not_judgeable   the base is not above chance (one-sided 5%)
    retained        lower > -margin: a loss as large as the margin is ruled out (p_retained < 5%)
    degraded        otherwise, if upper < 0: some loss is certain (p_degraded < 5%)
    inconclusive    otherwise: more items are needed

A loss that is certain but certainly smaller than the margin is "retained": that is what the margin
says. A true loss of exactly the margin is called "retained", and no change at all "degraded", in
about 5% of the cases or fewer (up to 8% of graded tasks in which few items change, all one way);
both rates are simulated in tests/test_retention_statistics.py and benchmarks/verdict_errors.py.

Several tasks are a family: `decide` corrects the p-values of all its judgeable tasks, those for
"retained" and those for "degraded" each on their own (S. Holm, "A simple sequentially rejective
multiple test procedure", Scandinavian Journal of Statistics 6, 1979). Then the chance that any task
at all is falsely called retained is about 5% at most, and so is the chance of any false degraded.
The intervals in the rows stay uncorrected.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, norm, t
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

MARGIN = 0.02
ALPHA = 0.05
POWER = 0.80
MIN_CHANGED = 20  # items or clusters in which something changed that a t test needs


def score_statistic(delta: float, gained: float, lost: float, n: float) -> float:
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


def paired_interval(gained: float, lost: float, n: float, confidence: float) -> tuple[float, float]:
    """Two-sided score interval for (gained - lost) / n, the paired difference of proportions."""
    z = norm.ppf((1 + confidence) / 2)
    estimate = (gained - lost) / n
    edge = 1 - 1e-12

    def bound(target: float, low: float, high: float) -> float:
        return brentq(lambda d: score_statistic(d, gained, lost, n) - target, low, high, xtol=1e-12)

    lower = -1.0 if estimate <= -edge else bound(z, -edge, estimate)
    upper = 1.0 if estimate >= edge else bound(-z, estimate, edge)
    return lower, upper


def score_p_values(gained: float, lost: float, n: float, margin: float) -> tuple[float, float]:
    """One-sided p-values: of "the difference is 0 or more", of "it is -margin or less"."""
    degraded = norm.cdf(score_statistic(0.0, gained, lost, n))
    retained = norm.sf(score_statistic(-margin, gained, lost, n))
    return float(degraded), float(retained)


def smallest_detectable_drop(flips: float, n: float) -> float:
    """The drop whose upper bound falls below 0 with 80% power, at the flip rate that was seen.

    A drop cannot exceed the share of answers that flip, hence the second term.
    """
    reach = norm.ppf(1 - ALPHA) + norm.ppf(POWER)
    return float(max(reach * math.sqrt(flips / n / n), reach**2 / (n + reach**2)))


def design_effect(values: np.ndarray, clusters: np.ndarray) -> float:
    """How many times wider clusters make the variance of the mean of `values`, at least 1.

    The ratio of the cluster-robust variance of a mean to the variance of independent items, with
    one cluster added to either (see this module's docstring). It is 1 if every item is a cluster
    of its own, k if every item comes k times, and items / clusters if all values are 0.

    Args:
        values: (N,), differences (0: the item did not change) or scores.
        clusters: (N,), the number of each item's cluster, from 0.
    """
    residuals = values - values.mean()
    robust = (np.bincount(clusters, weights=residuals) ** 2).sum()
    independent = (residuals**2).sum()
    changed = values[values != 0]
    square = (changed**2).mean() if len(changed) else 1.0  # of an item in the added cluster
    size = len(values) / (clusters.max() + 1)
    return float(max(1.0, (robust + size**2 * square) / (independent + size * square)))


def above_chance(scores: np.ndarray, clusters: np.ndarray, chance: float) -> bool:
    """Whether the mean of `scores` is above `chance`, one-sided 5%.

    Right or wrong: the exact binomial test, on counts divided by the design effect (E. Korn and
    B. Graubard, Survey Methodology 24, 1998; the beta distribution extends it to counts that are
    not whole). Graded: t test.
    """
    effect = design_effect(scores, clusters)
    error, degrees = _standard_error(scores, clusters, effect)
    if _is_graded(scores) and error > 0:
        p_value = t.sf((scores.mean() - chance) / error, degrees)
    else:
        right, n = scores.sum() / effect, len(scores) / effect
        p_value = beta.cdf(chance, right, n - right + 1) if right else 1.0
    return bool(p_value < ALPHA)


def verdict(lower: float, upper: float, margin: float) -> str:
    """The rule of this module's docstring for one-sided 95% bounds `lower` and `upper`."""
    if lower > -margin:
        return "retained"
    return "degraded" if upper < 0 else "inconclusive"


def compare(
    base: Sequence[float],
    bridge: Sequence[float],
    *,
    chance: float,
    margin: float = MARGIN,
    clusters: Sequence[Hashable] | None = None,
    exact: bool = False,
) -> dict:
    """Base against bridge on the same items, taken as the only test (several: see `decide`).

    Args:
        base, bridge: scores item by item, 0 or 1 (bool will do) or graded in between.
        chance: score of guessing on these items; 0 where nothing can be guessed.
        margin: largest loss (a share, 0.02 is two points) that still counts as retained.
        clusters: item by item, equal for items that share a passage (None: all independent).
        exact: the sides were shown to be the same function on this text, so the difference is 0
            by proof and not an estimate.

    Returns:
        `n`, `clusters` (how many); `base`, `bridge` (means), `chance`, `delta`; `ci95` (two-sided),
        `bounds95` (one-sided each); `flips` {gained, lost} and `mcnemar_p`, counted over items
        and None for graded scores; `p_degraded`, `p_retained` (one-sided, uncorrected);
        `smallest_detectable_drop` (a share; one-sided 5%, 80% power); `judgeable`, `exact`,
        `verdict`.

    Raises:
        ValueError: sides or clusters of different length, a score outside [0, 1], a bad margin or
            chance, or `exact` although a score changed.
    """
    n = len(base)
    if n == 0 or n != len(bridge):
        raise ValueError(f"{n} base answers and {len(bridge)} bridge answers: need the same items")
    if not 0 < margin < 1:
        raise ValueError(f"margin={margin}: give it as a share between 0 and 1 (0.02 is 2 points)")
    if not 0 <= chance < 1:
        raise ValueError(f"chance={chance}: give the score of guessing, from 0 up to below 1")
    base, bridge = _scores("base", base), _scores("bridge", bridge)
    groups = _numbered(range(n) if clusters is None else clusters, n)
    difference = bridge - base
    gained, lost = (float(side[side > 0].sum()) for side in (difference, -difference))
    graded = _is_graded(base) or _is_graded(bridge)

    effect = design_effect(difference, groups)
    error, degrees = _standard_error(difference, groups, effect)
    changed = len(np.unique(groups[difference != 0]))
    delta = (gained - lost) / n
    if exact:
        if gained or lost:
            raise ValueError("answers flipped, so the sides are not the same function")
        interval = bounds = (0.0, 0.0)
        p_degraded, p_retained, detectable = 1.0, 0.0, 0.0
    elif graded and error > 0 and changed >= MIN_CHANGED:
        interval = t.interval(1 - ALPHA, degrees, delta, error)
        bounds = t.interval(1 - 2 * ALPHA, degrees, delta, error)
        p_degraded = t.cdf(delta / error, degrees)
        p_retained = t.sf((delta + margin) / error, degrees)
        detectable = (norm.ppf(1 - ALPHA) + norm.ppf(POWER)) * error
    else:
        counts = gained / effect, lost / effect, n / effect
        interval = paired_interval(*counts, 1 - ALPHA)
        bounds = paired_interval(*counts, 1 - 2 * ALPHA)
        p_degraded, p_retained = score_p_values(*counts, margin)
        detectable = smallest_detectable_drop((gained + lost) / effect, n / effect)

    judgeable = above_chance(base, groups, chance)
    flips = None if graded else {"gained": round(gained), "lost": round(lost)}
    table = None if graded else [[n - sum(flips.values()), flips["gained"]], [flips["lost"], 0]]
    return {
        "n": n,
        "clusters": int(groups.max()) + 1,
        "base": float(base.sum()) / n,
        "bridge": float(bridge.sum()) / n,
        "chance": chance,
        "delta": delta,
        "ci95": [float(bound) for bound in interval],
        "bounds95": [float(bound) for bound in bounds],
        "flips": flips,
        "mcnemar_p": None if graded else float(mcnemar(table, exact=True).pvalue),
        "p_degraded": float(p_degraded),
        "p_retained": float(p_retained),
        "smallest_detectable_drop": float(detectable),
        "judgeable": judgeable,
        "exact": exact,
        "verdict": verdict(*bounds, margin) if judgeable else "not_judgeable",
    }


def decide(rows: Sequence[dict], margin: float) -> None:
    """Correct a family of rows of `compare` for its size (Holm) and decide again, in place.

    Adds `p_degraded_holm` and `p_retained_holm` and replaces `verdict`. Rows that are not judgeable
    are no part of the family: theirs are None. An exact row has the p-values 1 and 0, its
    difference being 0 by proof, and so is always retained.

    Raises:
        ValueError: a row was compared with another margin.
    """
    family = [row for row in rows if row["judgeable"]]
    if any((row["bounds95"][0] > -margin) != (row["p_retained"] < ALPHA) for row in family):
        raise ValueError(f"margin={margin}: these rows were compared with another margin")
    for row in rows:
        row.update(p_degraded_holm=None, p_retained_holm=None, verdict="not_judgeable")
    for name in ("p_degraded", "p_retained") if family else ():
        corrected = multipletests([row[name] for row in family], ALPHA, method="holm")[1]
        for row, p_value in zip(family, corrected, strict=True):
            row[f"{name}_holm"] = float(p_value)
    for row in family:
        if row["p_retained_holm"] < ALPHA:
            row["verdict"] = "retained"
        else:
            row["verdict"] = "degraded" if row["p_degraded_holm"] < ALPHA else "inconclusive"


def _scores(side: str, values: Sequence[float]) -> np.ndarray:
    scores = np.asarray(values, dtype=float)
    for row in np.flatnonzero(~((scores >= 0) & (scores <= 1)))[:1]:
        raise ValueError(f"{side} score {scores[row]} of item {row}: scores lie between 0 and 1")
    return scores


def _is_graded(scores: np.ndarray) -> bool:
    return not np.isin(scores, (0, 1)).all()


def _numbered(clusters: Sequence[Hashable], n: int) -> np.ndarray:
    """(N,) numbers of the clusters, from 0, in the order in which they appear."""
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} items: give one for each item")
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([numbers[cluster] for cluster in clusters])


def _standard_error(values: np.ndarray, clusters: np.ndarray, effect: float) -> tuple[float, int]:
    """Standard error of the mean and its degrees of freedom; (0, 0) for a single cluster."""
    count = int(clusters.max()) + 1
    if count == 1:
        return 0.0, 0
    return math.sqrt(values.var() / len(values) * effect * count / (count - 1)), count - 1
