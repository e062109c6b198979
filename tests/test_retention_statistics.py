"""Intervals, p-values and verdicts against published and hand-worked figures, and by simulation."""

import json
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest, norm, ttest_rel
from sklearn.metrics import brier_score_loss
from statsmodels.api import OLS

from benchmarks import verdict_errors
from mmpeft.retention.measures import calibration, format_and_knowledge, health
from mmpeft.retention.statistics import (
    above_chance,
    compare,
    decide,
    design_effect,
    paired_interval,
    smallest_detectable_drop,
    verdict,
)

# ------------------------------------------------------------------------------- score interval


@pytest.mark.parametrize(
    ("gained", "lost", "n", "confidence", "expected"),
    [
        # airway hyper-responsiveness, Bentur et al. 2009: 1, 1, 7, 12 pairs; interval as published
        # in Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables (2017), ch. 8
        (1, 7, 21, 0.95, (-0.517, -0.026)),
        # R, PropCIs::scoreci.mp(25, 28, 618, 0.90)
        (28, 25, 618, 0.90, (-0.0148, 0.0247)),
    ],
)
def test_interval_agrees_with_published_values(gained, lost, n, confidence, expected):
    low, high = paired_interval(gained, lost, n, confidence)
    digits = len(str(expected[0]).split(".")[1])
    assert (round(low, digits), round(high, digits)) == expected
    mirrored = paired_interval(lost, gained, n, confidence)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_interval_without_flips_is_not_empty():
    # with no discordant pair the score equation is n d / (1 - d) = z^2, so d = z^2 / (n + z^2)
    z2 = 1.959963984540054**2
    for n in (50, 200):
        assert paired_interval(0, 0, n, 0.95) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)))


@pytest.mark.parametrize(("gained", "lost"), [(5, 0), (0, 5)])
def test_interval_reaches_the_edge(gained, lost):
    low, high = paired_interval(gained, lost, 5, 0.95)
    assert -1 <= low < high <= 1 and (high == 1 if gained else low == -1)


# --------------------------------------------------------------------------------- right or wrong


def test_compare_by_hand():
    base = [True] * 80 + [False] * 20
    bridge = [False] * 5 + [True] * 75 + [True] * 1 + [False] * 19
    row = compare(base, bridge, chance=0.5)
    assert (row["n"], row["clusters"], row["base"], row["bridge"]) == (100, 100, 0.80, 0.76)
    assert row["delta"] == pytest.approx(-0.04)
    assert row["flips"] == {"gained": 1, "lost": 5}
    assert row["mcnemar_p"] == pytest.approx(2 * (1 + 6) / 2**6)  # two binomial(6, 1/2) tails
    assert row["p_degraded"] == pytest.approx(0.051235, abs=1e-6)  # normal tail of 4 / sqrt(6)
    assert row["ci95"][0] < row["bounds95"][0] < -0.04 < row["bounds95"][1] < row["ci95"][1]
    assert json.loads(json.dumps(row)) == row  # plain numbers only


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        (-0.015, 0.01, "retained"),
        (-0.015, -0.001, "retained"),  # certainly worse, certainly by less than the margin
        (-0.02, 0.0, "inconclusive"),
        (-0.05, 0.01, "inconclusive"),
        (-0.05, -0.001, "degraded"),
    ],
)
def test_verdict_rule(lower, upper, expected):
    assert verdict(lower, upper, margin=0.02) == expected


def _answers(gained: int, lost: int, n: int, order: random.Random | None = None):
    """Base and bridge with these flips; of the answers that stay, the first half is right."""
    kept = n - gained - lost
    pairs = [(0, 1)] * gained + [(1, 0)] * lost + [(1, 1)] * (kept - kept // 2)
    pairs += [(0, 0)] * (kept // 2)
    if order:
        order.shuffle(pairs)
    return [list(side) for side in zip(*pairs, strict=True)]


def _random_comparisons(count: int):
    """Random scores, right-or-wrong and graded in turn, most of them in clusters."""
    order = random.Random(0)
    for number in range(count):
        n = order.choice([20, 60, 300])
        clusters = [order.randrange(max(2, n // order.choice([1, 3, 10]))) for _ in range(n)]
        base, bridge = _answers(order.randrange(6), order.randrange(10), n, order)
        if number % 2:
            bridge = [abs(score - order.random() * order.choice([0, 0.3])) for score in bridge]
        yield base, bridge, clusters if number % 3 else None


def test_p_values_agree_with_the_bounds():
    rows = []
    for base, bridge, clusters in _random_comparisons(300):
        row = compare(base, bridge, chance=0, clusters=clusters, margin=0.05)
        lower, upper = row["bounds95"]
        assert (row["p_retained"] < 0.05) == (lower > -0.05)
        assert (row["p_degraded"] < 0.05) == (upper < 0)
        rows.append(row)
    by_verdict = {row["verdict"]: row for row in rows}
    assert by_verdict.keys() == {"retained", "degraded", "inconclusive"}
    for word, row in by_verdict.items():
        decide([row], 0.05)
        assert row["verdict"] == word  # a family of one is not corrected


def test_swapping_the_sides_mirrors_the_row():
    for base, bridge, clusters in _random_comparisons(60):
        row = compare(base, bridge, chance=0, clusters=clusters)
        mirror = compare(bridge, base, chance=0, clusters=clusters)
        for name in ("ci95", "bounds95"):
            assert mirror[name] == pytest.approx([-row[name][1], -row[name][0]], abs=1e-9)
        assert mirror["delta"] == -row["delta"]
        assert mirror["p_degraded"] == pytest.approx(1 - row["p_degraded"])


def test_base_at_chance_is_not_judged():
    answers = [True, False] * 100
    row = compare(answers, answers, chance=0.5)
    assert row["verdict"] == "not_judgeable" and not row["judgeable"]
    assert compare(answers, answers, chance=0.25)["verdict"] == "retained"
    wrong = [False] * 200
    assert not compare(wrong, wrong, chance=0)["judgeable"]  # generation: nothing right at all
    assert compare([*wrong, True], [*wrong, True], chance=0)["judgeable"]


@pytest.mark.parametrize(("n", "chance"), [(20, 0.5), (97, 0.25), (200, 0.4)])
def test_chance_is_the_binomial_test(n, chance):
    for right in range(n + 1):
        expected = binomtest(right, n, chance, alternative="greater").pvalue < 0.05
        scores = (np.arange(n) < right).astype(float)
        assert above_chance(scores, np.arange(n), chance) == expected, right


def test_exact_needs_equal_answers():
    row = compare([True] * 9, [True] * 9, chance=0.5, exact=True)
    assert row["ci95"] == row["bounds95"] == [0.0, 0.0] and row["verdict"] == "retained"
    assert (row["p_degraded"], row["p_retained"]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="flipped"):
        compare([True] * 9, [True] * 8 + [False], chance=0.5, exact=True)


@pytest.mark.parametrize(
    ("base", "bridge", "options", "message"),
    [
        ([1], [1, 0], {}, "1 base answers and 2 bridge answers"),
        ([], [], {}, "0 base answers"),
        ([1], [1], {"margin": 2}, "margin=2"),
        ([1], [1], {"chance": 1}, "chance=1"),
        ([1, 1.5], [1, 1], {}, "base score 1.5 of item 1"),
        ([1, 1], [math.nan, 1], {}, "bridge score nan of item 0"),
        ([1, 1], [1, 1], {"clusters": ["a"]}, "1 clusters for 2 items"),
    ],
)
def test_unusable_scores_are_named(base, bridge, options, message):
    with pytest.raises(ValueError, match=message):
        compare(base, bridge, **{"chance": 0.5, **options})


# --------------------------------------------------------------------------------------- clusters

# PET and SPECT scans of the glands of 21 patients, N. Obuchowski, Statistics in Medicine 17, 1998,
# table: both right, PET alone, SPECT alone, both wrong
THYROIDS = [
    (0, 0, 2, 1), (2, 0, 1, 0), (3, 0, 0, 0), (1, 0, 0, 0), (2, 0, 1, 0), (4, 0, 0, 0),
    (3, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 0, 0), (2, 0, 0, 1), (2, 0, 0, 0),
    (3, 0, 0, 0), (2, 0, 0, 0), (0, 0, 2, 0), (2, 0, 0, 1), (2, 0, 0, 1), (2, 0, 1, 0),
    (2, 0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0),
]  # fmt: skip


def test_design_effect_agrees_with_published_tests():
    values = np.array([v for row in THYROIDS for v, k in zip((0, -1, 1, 0), row, strict=True)
                       for _ in range(k)])  # fmt: skip
    patients = np.repeat(np.arange(21), [sum(row) for row in THYROIDS])
    size, residuals = len(values) / 21, values - values.mean()
    # our ratio without the added cluster, whose items all flip
    robust = design_effect(values, patients) * ((residuals**2).sum() + size) - size**2
    # the tests of Obuchowski 1998 and of Yang, Sun, Hardin 2010: 2.86 and 3.13, as published there
    # and in V. Durkalski et al., Statistics in Medicine 22, 2003 (McNemar: 4.5)
    around_zero = (np.bincount(patients, weights=values) ** 2).sum()
    square = values.sum() ** 2 * 20 / 21
    assert values.sum() ** 2 / (values**2).sum() == 4.5
    assert round(square / around_zero, 2) == 2.86
    assert round(square / ((around_zero + robust) / 2), 2) == 3.13


def test_design_effect_agrees_with_statsmodels():
    random_ = np.random.default_rng(0)
    clusters = np.unique(random_.integers(0, 40, 200), return_inverse=True)[1]
    copies = random_.random(200) < 0.7
    values = np.where(
        copies, random_.choice([-1, 0, 1], 40)[clusters], random_.choice([-1, 0], 200)
    )
    model = OLS(values, np.ones(200))
    options = {"groups": clusters, "use_correction": False}
    robust = model.fit(cov_type="cluster", cov_kwds=options).cov_params()[0, 0]
    alone = model.fit(cov_type="HC0").cov_params()[0, 0]
    size = 200 / (clusters.max() + 1)
    # the added cluster: of average size, every item flipped
    expected = (robust * 200**2 + size**2) / (alone * 200**2 + size)
    assert design_effect(values, clusters) == pytest.approx(expected)
    assert expected > 1.5


def test_design_effect_by_hand():
    # clusters of 2 with sums -2, 1, -1, 0, 0 around a mean of -0.2: residual sums -1.6, 1.4, -0.6,
    # 0.4, 0.4 (squares 5.2) against squares 1.28 + 1.48 + 0.68 + 0.08 + 0.08 = 3.6 of the items
    values = np.array([-1, -1, 1, 0, -1, 0, 0, 0, 0, 0])
    assert design_effect(values, np.arange(10) // 2) == pytest.approx((5.2 + 4) / (3.6 + 2))
    # flips that cancel within every cluster do not make an interval narrower
    assert design_effect(np.array([1, -1] * 5), np.arange(10) // 2) == 1.0
    # of graded scores the added items change as much as those that changed: here by 0.5
    assert design_effect(values / 2, np.arange(10) // 2) == pytest.approx((1.3 + 1) / (0.9 + 0.5))


def test_clusters_of_one_change_nothing():
    for base, bridge, _ in _random_comparisons(40):
        row = compare(base, bridge, chance=0.1)
        assert compare(base, bridge, chance=0.1, clusters=range(len(base))) == row


@pytest.mark.parametrize("times", [2, 7])
def test_asking_again_adds_nothing(times):
    for base, bridge, _ in _random_comparisons(40):
        row = compare(base, bridge, chance=0.1)
        again = compare(
            base * times, bridge * times, chance=0.1, clusters=[*range(len(base))] * times
        )
        assert again["n"] == times * row["n"] and again["clusters"] == row["clusters"]
        for name in ("ci95", "bounds95", "p_degraded", "p_retained", "smallest_detectable_drop"):
            assert again[name] == pytest.approx(row[name], abs=1e-9), name
        assert (again["judgeable"], again["verdict"]) == (row["judgeable"], row["verdict"])


def test_order_and_names_of_clusters_do_not_matter():
    order = random.Random(1)
    for base, bridge, clusters in _random_comparisons(30):
        clusters = clusters or range(len(base))
        row = compare(base, bridge, chance=0.1, clusters=clusters)
        shuffled = list(zip(base, bridge, [("passage", c) for c in clusters], strict=True))
        order.shuffle(shuffled)
        base, bridge, clusters = zip(*shuffled, strict=True)
        other = compare(base, bridge, chance=0.1, clusters=clusters)
        for name, value in row.items():
            same = value == other[name] if name == "flips" else pytest.approx(value) == other[name]
            assert same, name


def test_without_flips_the_clusters_are_what_counts():
    answers = [1] * 300
    row = compare(answers, answers, chance=0.5, clusters=[i // 10 for i in range(300)])
    assert row["ci95"] == pytest.approx(paired_interval(0, 0, 30, 0.95))
    assert row["verdict"] == "inconclusive"
    assert compare(answers, answers, chance=0.5)["verdict"] == "retained"
    one = compare(answers, answers, chance=0.5, clusters=["a passage"] * 300)
    assert not one["judgeable"]  # a single passage shows nothing


# ----------------------------------------------------------------------------------------- graded


def _graded(n: int = 60):
    random_ = np.random.default_rng(3)
    base = random_.random(n)
    return base, np.clip(base + random_.normal(-0.05, 0.1, n), 0, 1)


def test_graded_scores_get_the_paired_t_test():
    base, bridge = _graded()
    row = compare(base, bridge, chance=0)
    known = ttest_rel(bridge, base, alternative="less")
    assert row["p_degraded"] == pytest.approx(known.pvalue)
    interval = ttest_rel(bridge, base).confidence_interval(0.95)
    assert row["ci95"] == pytest.approx([interval.low, interval.high])
    above_margin = ttest_rel(bridge + 0.02, base, alternative="greater")
    assert row["p_retained"] == pytest.approx(above_margin.pvalue)
    assert row["flips"] is None and row["mcnemar_p"] is None and row["judgeable"]


def test_graded_clusters_agree_with_statsmodels():
    base, bridge = _graded(400)
    clusters = np.arange(400) // 4
    bridge = np.clip(bridge + np.repeat(np.random.default_rng(4).normal(0, 0.2, 100), 4), 0, 1)
    row = compare(base, bridge, chance=0, clusters=clusters.tolist())
    fit = OLS(bridge - base, np.ones(400)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    low, high = fit.conf_int(0.05)[0]
    # ours is a little wider: one cluster more, of 4 items that all change alike
    assert high - low < row["ci95"][1] - row["ci95"][0] < 1.05 * (high - low)
    assert np.mean(row["ci95"]) == pytest.approx(fit.params[0])


def test_graded_scores_that_hardly_change_are_not_trusted_blindly():
    base = [0.5] * 40
    assert compare(base, base, chance=0)["ci95"] == pytest.approx(
        paired_interval(0, 0, 40, 0.95)
    )  # a t interval would be empty
    row = compare([*base, 0.9], [*base, 0.4], chance=0)
    assert row["ci95"] == pytest.approx(paired_interval(0, 0.5, 41, 0.95))
    steady = compare([0.9] * 40, [0.8] * 40, chance=0)  # all change, all by the same amount
    assert steady["ci95"] == pytest.approx(paired_interval(0, 4, 40, 0.95))


def test_graded_base_near_chance_is_not_judged():
    scores = np.random.default_rng(0).beta(2, 2, 100).tolist()  # mean 0.5, standard error 0.02
    for chance, judgeable in ((0.4, True), (0.45, True), (0.5, False)):
        assert compare(scores, scores, chance=chance)["judgeable"] == judgeable
    # nothing is known of the spread of a single passage
    assert not compare(scores, scores, chance=0.4, clusters=["a"] * 100)["judgeable"]


# --------------------------------------------------------------------------------------- families


def test_holm_by_hand():
    rows = [compare(*_answers(0, lost, n), chance=0) for lost, n in ((3, 200), (8, 400), (0, 200))]
    rows.append(compare([1, 0] * 200, [1, 0] * 200, chance=0.5))
    uncorrected = [row["verdict"] for row in rows]
    assert uncorrected == ["degraded", "degraded", "retained", "not_judgeable"]
    worse = [norm.sf(math.sqrt(3)), norm.sf(math.sqrt(8)), 0.5]  # score test: lost / sqrt(lost)
    assert [row["p_degraded"] for row in rows[:3]] == pytest.approx(worse)
    fine = [row["p_retained"] for row in rows[:3]]
    assert fine[2] < 0.05 < fine[0] < fine[1]
    decide(rows, 0.02)
    # of three p-values the smallest times 3, the next times 2, the last as it is; none above 1
    corrected = [2 * worse[0], 3 * worse[1], worse[2]]
    assert [row["p_degraded_holm"] for row in rows[:3]] == pytest.approx(corrected)
    corrected = [2 * fine[0], max(2 * fine[0], fine[1]), 3 * fine[2]]  # and none below the last
    assert [row["p_retained_holm"] for row in rows[:3]] == pytest.approx(corrected)
    assert [row["verdict"] for row in rows[:3]] == ["inconclusive", "degraded", "inconclusive"]
    assert rows[3]["p_degraded_holm"] is None and rows[3]["p_retained_holm"] is None
    assert rows[3]["verdict"] == "not_judgeable"


def test_exact_rows_stay_retained_in_any_family():
    same = [1] * 50
    rows = [compare(same, same, chance=0.5, exact=True) for _ in range(3)]
    rows.append(compare(*_answers(0, 40, 200), chance=0))
    decide(rows, 0.02)
    assert [row["verdict"] for row in rows] == ["retained"] * 3 + ["degraded"]
    assert (rows[0]["p_degraded_holm"], rows[0]["p_retained_holm"]) == (1.0, 0.0)


def test_family_without_a_judgeable_row():
    rows = [compare([0] * 9, [0] * 9, chance=0)]
    decide(rows, 0.02)
    assert rows[0]["verdict"] == "not_judgeable" and rows[0]["p_retained_holm"] is None
    decide([], 0.02)


def test_family_of_another_margin_is_refused():
    with pytest.raises(ValueError, match="another margin"):
        decide([compare([1] * 200, [1] * 200, chance=0)], margin=0.001)


# ------------------------------------------------------------------------------------- simulation

RUNS = 1000
CLAIMED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / RUNS)  # three standard errors of the simulation


@pytest.mark.parametrize("flips", verdict_errors.FLIPS)
@pytest.mark.parametrize("n", verdict_errors.SIZES)
def test_verdict_errs_no_more_often_than_it_claims(n, flips):
    assert verdict_errors.independent(n, 0.0, flips, RUNS)["degraded"] <= CLAIMED
    assert verdict_errors.independent(n, 0.02, flips, RUNS)["retained"] <= CLAIMED


@pytest.mark.parametrize(
    ("n", "flips", "size", "correlation"),
    [
        (200, 0.1, 5, 0.3),
        (800, 0.03, 5, 0.9),
        (800, 0.2, 5, 0.3),
        (2000, 0.1, 20, 0.3),
        (1000, 0.03, 50, 0.3),  # 20 clusters: a textbook design effect errs here in 40%
        (200, 0.2, 20, 0.9),
    ],
)
def test_clusters_do_not_add_errors(n, flips, size, correlation):
    case = {"flips": flips, "size": size, "correlation": correlation, "runs": RUNS}
    assert verdict_errors.clustered(n, 0.0, **case)["degraded"] <= CLAIMED
    assert verdict_errors.clustered(n, 0.02, **case)["retained"] <= CLAIMED


def test_clusters_taken_as_independent_would_add_errors():
    case = {"flips": 0.1, "size": 5, "correlation": 0.3, "runs": RUNS}
    naive = verdict_errors.clustered(800, 0.02, **case, effect=lambda *_: 1.0)
    assert naive["retained"] > 0.1


def test_verdict_finds_a_planted_drop_when_it_can():
    assert verdict_errors.independent(2000, 0.03, 0.1, RUNS)["degraded"] > 0.95
    few = verdict_errors.independent(200, 0.03, 0.1, RUNS)
    assert few["retained"] < 0.05 and few["inconclusive"] == max(few.values()) > 0.5
    drop = smallest_detectable_drop(80, 800)
    found = verdict_errors.independent(800, drop, 0.1, RUNS)["degraded"]
    assert found == pytest.approx(0.8, abs=0.05)


def test_graded_verdict_errs_no_more_often_than_it_claims():
    claimed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert verdict_errors.graded(200, 0.0, 0.3, 300)["degraded"] <= claimed
    assert verdict_errors.graded(200, 0.02, 0.3, 300)["retained"] <= claimed


def test_family_errs_no_more_often_than_one_test():
    no_change = verdict_errors.family(200, 0.0, 0.1, 5, RUNS)
    assert no_change["holm"]["degraded"] <= CLAIMED < no_change["uncorrected"]["degraded"]
    margin = verdict_errors.family(200, 0.02, 0.1, 5, RUNS)
    assert margin["holm"]["retained"] <= CLAIMED < margin["uncorrected"]["retained"]


def test_simulated_verdicts_are_those_of_compare():
    for flips in verdict_errors.clustered_flips(200, 0.05, 0.1, 5, 0.5, 50):
        base = (flips <= 0).astype(int)
        clusters = np.arange(200) // 5
        row = compare(base, base + flips, chance=0, clusters=clusters.tolist())
        effect = design_effect(flips, clusters)
        counts = row["flips"]["gained"] / effect, row["flips"]["lost"] / effect, 200 / effect
        assert verdict_errors.verdict(*counts) == row["verdict"]


def test_simulated_clusters_correlate_as_they_should():
    flips = verdict_errors.clustered_flips(200, 0.0, 0.5, 2, 0.4, 1000)
    pairs = flips.reshape(-1, 2)
    assert np.corrcoef(pairs.T)[0, 1] == pytest.approx(0.4, abs=0.02)
    assert (flips != 0).mean() == pytest.approx(0.5, abs=0.01)


def test_benchmark_prints_one_json_object(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["", "--json", "--runs", "2", "--out", str(picture)])
    verdict_errors.main()
    report = json.loads(capsys.readouterr().out)
    assert len(report["rates"]) == 18 and picture.stat().st_size > 0
    assert "Any of 5 tasks" in verdict_errors.render(report)


# --------------------------------------------------------------------------------------- measures


def _choice(probabilities, gold, chosen=None):
    logs = [math.log(p) - 3.0 for p in probabilities]  # softmax does not mind the constant
    chosen = probabilities.index(max(probabilities)) if chosen is None else chosen
    return SimpleNamespace(doc_id=0, loglikelihoods=logs, gold=gold, chosen=chosen)


def test_calibration_by_hand():
    items = [
        _choice([0.75, 0.25], 0),  # right and 0.75 sure
        _choice([0.22, 0.78], 0),  # wrong and 0.78 sure: same bin, (0.7, 0.8]
        _choice([0.6, 0.3, 0.1], 0),  # right and 0.6 sure
        _choice([0.5, 0.2, 0.3], 2, chosen=2),  # by length the third wins, at 0.3
    ]
    result = calibration(items)
    bins = [abs(1 - (0.75 + 0.78)), abs(1 - 0.6), abs(1 - 0.3)]
    assert result["ece"] == pytest.approx(sum(bins) / 4)
    brier = [2 * 0.25**2, 2 * 0.78**2, 0.4**2 + 0.3**2 + 0.1**2, 0.5**2 + 0.2**2 + 0.7**2]
    assert result["brier"] == pytest.approx(sum(brier) / 4)


def test_bins_are_closed_above():
    # 0.25 and 0.75 and their like are exact in binary, but the edges are tenths: use 0.5
    items = [_choice([0.5, 0.5], 0, chosen=0), _choice([0.45, 0.55], 0, chosen=1)]
    # 0.5 belongs to (0.4, 0.5], 0.55 to (0.5, 0.6]: two bins, |1 - 0.5| and |0 - 0.55|
    assert calibration(items)["ece"] == pytest.approx((0.5 + 0.55) / 2)


def test_brier_of_two_choices_is_twice_that_of_sklearn():
    random_ = np.random.default_rng(0)
    probabilities, gold = random_.uniform(0.01, 0.99, 50), random_.integers(0, 2, 50)
    items = [_choice([1 - p, p], int(g)) for p, g in zip(probabilities, gold, strict=True)]
    assert calibration(items)["brier"] == pytest.approx(2 * brier_score_loss(gold, probabilities))


def test_perfectly_calibrated_side_has_a_small_error():
    random_ = np.random.default_rng(0)
    sure = random_.uniform(0.5, 1, 5000)
    items = [_choice([p, 1 - p], int(random_.random() > p)) for p in sure]
    assert calibration(items)["ece"] < 0.03
    bluffing = [_choice([0.99, 0.01], int(random_.random() > p)) for p in sure]
    assert calibration(bluffing)["ece"] == pytest.approx(0.99 - 0.75, abs=0.03)


def test_calibration_wants_choices():
    with pytest.raises(ValueError, match="no items"):
        calibration([])
    with pytest.raises(ValueError, match="gold=2 is none of 2 choices"):
        calibration([_choice([0.5, 0.5], 2)])
    written = SimpleNamespace(doc_id=7, loglikelihoods=None, gold="Paris", chosen=None)
    with pytest.raises(ValueError, match="item 7: gold='Paris'"):
        calibration([written])


def _reply(*ids, finished=True):
    return SimpleNamespace(doc_id=1, reply_ids=list(ids), finished=finished)


def test_health_by_hand():
    items = [
        _reply(),
        _reply(1, 2, 3),
        _reply(1, 1, 1, 1),  # one 4-gram
        _reply(*[7] * 9, finished=False),  # 7777 six times: five of six repeated
    ]
    assert health(items) == {
        "replies": 4, "mean_tokens": 4.0, "median_tokens": 3.5, "short": 0.5, "empty": 0.25,
        "repetition": pytest.approx((0 + 5 / 6) / 2), "unfinished": 0.25,
    }  # fmt: skip
    assert health([_reply(1)])["repetition"] == 0.0
    assert json.dumps(health(items))
    with pytest.raises(ValueError, match="item 1 has no generated reply"):
        health([SimpleNamespace(doc_id=1, reply_ids=None, finished=None)])


def test_format_and_knowledge_are_told_apart():
    def items(scores):
        return [SimpleNamespace(doc_id=i, score=score) for i, score in enumerate(scores)]

    known, said = items([1, 1, 1, 0, 0.0, 1]), items([1, 0, 0, 1, 0, 1.0])
    counts = {"n": 6, "both": 2, "knowledge_only": 2, "words_only": 1, "neither": 1}
    assert format_and_knowledge(known, said[::-1]) == counts
    with pytest.raises(ValueError, match=r"2 documents .* not both: 4, 5"):
        format_and_knowledge(known, said[:4])
    with pytest.raises(ValueError, match="document 0 comes twice"):
        format_and_knowledge(known + known[:1], said)
    with pytest.raises(ValueError, match="score=0.5 is neither"):
        format_and_knowledge(items([0.5]), items([1]))
