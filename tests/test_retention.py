"""The retention report: proof, statistics, engine, suite."""

import json
import math
import shutil
import socket
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmpeft.retention import RetentionError, render, retain, write
from mmpeft.retention.engine import Answers, Item, SideLM, Suite, pair
from mmpeft.retention.report import judge
from mmpeft.retention.statistics import (
    compare,
    paired_interval,
    smallest_detectable_drop,
    verdict,
)
from mmpeft.retention.text import compare_text, embedded_text
from mmpeft.tasks.retention import generate
from tests.conftest import assistant, user

# ------------------------------------------------------------------------------------ statistics


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


def test_compare_by_hand():
    base = [True] * 80 + [False] * 20
    bridge = [False] * 5 + [True] * 75 + [True] * 1 + [False] * 19
    row = compare(base, bridge, chance=0.5)
    assert (row["n"], row["base"], row["bridge"]) == (100, 0.80, 0.76)
    assert row["delta"] == pytest.approx(-0.04)
    assert row["flips"] == {"gained": 1, "lost": 5}
    assert row["mcnemar_p"] == pytest.approx(2 * (1 + 6) / 2**6)  # two binomial(6, 1/2) tails
    assert row["ci95"][0] < row["bounds95"][0] < -0.04 < row["bounds95"][1] < row["ci95"][1]


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


def test_base_at_chance_is_not_judged():
    answers = [True, False] * 100
    assert compare(answers, answers, chance=0.5)["verdict"] == "not_judgeable"
    assert compare(answers, answers, chance=0.25)["verdict"] == "retained"


def test_exact_needs_equal_answers():
    assert compare([True] * 9, [True] * 9, chance=0.5, exact=True)["ci95"] == [0.0, 0.0]
    with pytest.raises(ValueError, match="flipped"):
        compare([True] * 9, [True] * 8 + [False], chance=0.5, exact=True)
    with pytest.raises(ValueError, match="margin=2"):
        compare([True], [True], chance=0.5, margin=2)


@cache
def _verdict(gained: int, lost: int, n: int) -> str:
    return verdict(*paired_interval(gained, lost, n, 0.90), margin=0.02)


def _rates(n: int, drop: float, flips: float, runs: int = 1000) -> dict[str, float]:
    """How often each verdict falls when `drop` is true and `flips` of the answers flip."""
    shares = [(flips - drop) / 2, (flips + drop) / 2, 1 - flips]
    draws = np.random.default_rng(0).multinomial(n, shares, size=runs)
    said = [_verdict(int(gained), int(lost), n) for gained, lost, _ in draws]
    return {word: said.count(word) / runs for word in ("retained", "degraded", "inconclusive")}


@pytest.mark.parametrize("flips", [0.03, 0.1, 0.2])
@pytest.mark.parametrize("n", [200, 800, 2000])
def test_verdict_errs_no_more_often_than_it_claims(n, flips):
    claimed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)  # three standard errors of the simulation
    assert _rates(n, 0.0, flips)["degraded"] <= claimed
    assert _rates(n, 0.02, flips)["retained"] <= claimed


def test_verdict_finds_a_planted_drop_when_it_can():
    assert _rates(2000, 0.03, 0.1)["degraded"] > 0.95
    few = _rates(200, 0.03, 0.1)
    assert few["retained"] < 0.05 and few["inconclusive"] > 0.5
    drop = smallest_detectable_drop(80, 800)
    assert _rates(800, drop, 0.1)["degraded"] == pytest.approx(0.8, abs=0.05)


# ---------------------------------------------------------------------------------------- engine


def _requests(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


REQUESTS = _requests(
    ("The capital of France is", " Paris"),
    ("The capital of France is", " P"),
    ("The capital of France is", " Q"),
    ("", "A whole sentence without any context."),
    ("a context that ends in a space ", "word"),
    ("short", " and a much longer continuation than the context"),
    ("Café für", " zwölf"),
)


def test_log_likelihoods_equal_those_of_lm_eval_itself(make_bridge, llm_dir):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, processor = make_bridge(gate="none")
    ours = SideLM(model, processor.tokenizer, "base").loglikelihood(REQUESTS)
    reference = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(llm_dir),
        tokenizer=AutoTokenizer.from_pretrained(llm_dir),
        batch_size=1,
        device="cpu",
    ).loglikelihood(REQUESTS, disable_tqdm=True)
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
        assert mine[1] == theirs[1]


@pytest.mark.parametrize(("gate", "equal"), [("sample", True), ("none", False)])
def test_sides_differ_only_where_the_gate_lets_them(make_bridge, gate, equal):
    model, processor = make_bridge(gate=gate)
    sides = [SideLM(model, processor.tokenizer, name) for name in ("base", "bridge")]
    base, bridge = (lm.loglikelihood(REQUESTS) for lm in sides)
    assert (base == bridge) is equal
    assert sides[0].batches.digest() == sides[1].batches.digest()


def test_too_long_item_is_refused_not_cut(tiny):
    model, processor = tiny
    lm = SideLM(model, processor.tokenizer, "base")
    with pytest.raises(RetentionError, match="never cut"):
        lm.loglikelihood(_requests(("word " * 200, " end")))


def test_nan_in_the_suite_is_refused(make_bridge):
    model, processor = make_bridge(gate="none")
    _fill_adapter(model, math.nan)
    SideLM(model, processor.tokenizer, "base").loglikelihood(REQUESTS)
    with pytest.raises(RetentionError, match="bridge on the suite are NaN"):
        SideLM(model, processor.tokenizer, "bridge").loglikelihood(REQUESTS)


ITEM = Item(doc_id=0, sha256="a", correct=True, loglikelihoods=[-1.0, -2.0])


@pytest.mark.parametrize(
    ("bridge", "batches", "message"),
    [
        ({"t": [replace(ITEM, sha256="b")]}, "x", "document 0 or its prompt changed"),
        ({"t": [replace(ITEM, doc_id=1)]}, "x", "different documents"),
        ({"t": [ITEM, ITEM]}, "x", "different documents"),
        ({"other": [ITEM]}, "x", "tasks differ"),
        ({"t": [ITEM]}, "y", "different batches"),
    ],
)
def test_sides_that_saw_different_things_are_refused(bridge, batches, message):
    base = Answers({"t": [ITEM]}, "x")
    assert pair(base, Answers({"t": [ITEM]}, "x")) == {"t": [(ITEM, ITEM)]}
    with pytest.raises(RetentionError, match=message):
        pair(base, Answers(bridge, batches))


def test_task_file_edited_between_the_passes_is_refused(tiny, tmp_path):
    model, processor = tiny
    folder = shutil.copytree(_suite_folder(), tmp_path / "suite")
    suite = Suite(folder=folder, samples=3)
    base = suite.ask(model, processor.tokenizer, "base")
    file = folder / "facts.jsonl"
    file.write_text(file.read_text().replace('"context": "', '"context": "Think. '))
    with pytest.raises(RetentionError, match=r"facts: document .* changed"):
        pair(base, suite.ask(model, processor.tokenizer, "bridge"))


def test_suite_takes_a_seeded_choice_of_items():
    one, same, other = (Suite(samples=20, seed=seed).indices for seed in (0, 0, 1))
    assert one == same != other
    assert all(len(chosen) == 20 and chosen != list(range(20)) for chosen in one.values())


def test_unusable_suites_are_named():
    with pytest.raises(ValueError, match=r"unknown suite 'embeded'.*embedded"):
        Suite("embeded")
    with pytest.raises(ValueError, match="samples=0"):
        Suite(samples=0)


# ----------------------------------------------------------------------------- the embedded suite


def _suite_folder() -> Path:
    return Path(str(files("mmpeft.tasks"))) / "retention"


def test_generator_reproduces_the_shipped_items(tmp_path):
    generate.main(tmp_path)
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == sorted(f"{name}.jsonl" for name in generate.TASKS)
    for path in written:
        assert path.read_bytes() == (_suite_folder() / path.name).read_bytes(), path.name


def test_items_are_sound():
    rows = [row for build in generate.TASKS.values() for row in build()]
    assert 600 <= len(rows) <= 1000
    assert len({(row["context"], *sorted(row["choices"])) for row in rows}) == len(rows)
    for row in rows:
        assert 2 <= len(set(row["choices"])) == len(row["choices"]) <= 4, row
        assert all(choice.strip() == choice != "" for choice in row["choices"]), row
    for build in generate.TASKS.values():
        answers = [row["answer"] for row in build()]
        shares = [answers.count(i) / len(answers) for i in sorted(set(answers))]
        assert max(shares) < 1.5 / len(shares)  # always choosing one place gets nobody far


# ------------------------------------------------------------------------------------------ prose


def test_bits_per_byte_and_divergence_by_hand(make_bridge):
    model, processor = make_bridge(gate="none")
    text = "Grüße! " + "The quick brown fox jumps over the lazy dog. " * 3
    result = compare_text(model, processor.tokenizer, text, window=40)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    nats, kl, agree = {"base": 0.0, "bridge": 0.0}, [], []
    for start in range(0, len(ids), 40):
        piece = ids[start : start + 40]
        inputs = torch.tensor([[processor.tokenizer.bos_token_id, *piece[:-1]]])
        with torch.no_grad():
            q = model(input_ids=inputs).logits[0].double().log_softmax(-1)
            with model.disable_adapter():
                p = model(input_ids=inputs).logits[0].double().log_softmax(-1)
        for name, logs in (("base", p), ("bridge", q)):
            nats[name] -= logs[range(len(piece)), piece].sum().item()
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    size = len(text.encode())
    assert result["source"]["tokens"] == len(ids) and result["source"]["bytes"] == size
    for name in nats:
        expected = nats[name] / math.log(2) / size
        assert result["bits_per_byte"][name] == pytest.approx(expected, rel=1e-5)
    assert result["kl"]["mean"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert result["kl"]["p95"] == pytest.approx(np.percentile(kl, 95), rel=1e-4)
    assert result["kl"]["max"] == pytest.approx(max(kl), rel=1e-4)
    assert result["top1_agreement"] == pytest.approx(np.mean(agree))


def test_closed_gate_leaves_prose_untouched(tiny):
    model, processor = tiny
    result = compare_text(model, processor.tokenizer, embedded_text(), max_tokens=300, window=64)
    assert result["max_abs_dlogit"] == 0 and result["kl"] == {"mean": 0, "p95": 0, "max": 0}
    assert result["bits_per_byte"]["base"] == result["bits_per_byte"]["bridge"] > 0
    assert result["top1_agreement"] == 1 and result["source"]["tokens"] == 300


# ----------------------------------------------------------------------------------- whole report


def _fill_adapter(model, value: float) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, value)


def _retain(model, processor, images, **options):
    rows = [[user(image, "What is it?"), assistant("A hat.")] for image in images[1:]]
    defaults = {"image_prompts": rows, "irrelevant_image": images[0], "samples": 5}
    return retain(model, processor, **{"max_tokens": 100, **defaults, **options})


def test_report_of_a_gated_bridge_is_exact(tiny, images, tmp_path, monkeypatch, capsys):
    def no_network(*_):
        raise AssertionError("retain reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)  # the suite must be found from anywhere
    model, processor = tiny
    model.train()
    random_state = torch.get_rng_state()
    report = _retain(model, processor, images)
    assert capsys.readouterr().out == ""
    assert model.training and torch.equal(torch.get_rng_state(), random_state)

    assert report["schema"] == "mmpeft.retain/1" and report["gate"] == "sample"
    deltas = report["max_abs_dlogit"]
    assert deltas["text"] == 0 and deltas["irrelevant_image"] > 0 and deltas["image"] > 0
    assert set(report["bits_per_byte"]) == {"base", "bridge"}
    assert set(report["kl"]) == {"mean", "p95", "max"}
    assert [task["name"] for task in report["tasks"]] == list(generate.TASKS)
    for task in report["tasks"]:
        assert task["exact"] and task["ci95"] == [0.0, 0.0] and task["n"] == 5
        assert task["flips"] == {"gained": 0, "lost": 0} and task["delta"] == 0
        assert {"base", "bridge", "mcnemar_p", "verdict"} <= set(task)
    assert {"suite", "text", "prompts_sha256", "versions"} <= set(report["provenance"])

    written = write(report, tmp_path / "run" / "retain")
    assert sorted(path.name for path in written[0].parent.iterdir()) == [
        "report.json",
        "report.txt",
    ]
    assert json.loads(written[0].read_text()) == report
    assert written[1].read_text() == render(report)


def test_report_of_an_open_bridge_is_an_estimate(make_bridge, images):
    report = _retain(*make_bridge(gate="none"), images)
    assert report["max_abs_dlogit"]["text"] > 0
    assert report["kl"]["max"] >= report["kl"]["p95"] > 0
    assert not any(task["exact"] for task in report["tasks"])
    assert all(task["ci95"][0] < 0 < task["ci95"][1] for task in report["tasks"])


def test_equal_answers_alone_are_no_proof():
    same = [(True, True, 0.5, True)] * 50
    assert judge(same, 0.02, unchanged=True)["exact"]
    assert not judge(same, 0.02, unchanged=False)["exact"]
    assert not judge([*same, (True, True, 0.5, False)], 0.02, unchanged=True)["exact"]


@pytest.mark.parametrize("gate", ["sample", "none"])
def test_inactive_adapter_is_refused(make_bridge, images, gate):
    model, processor = make_bridge(gate=gate)
    _fill_adapter(model, 0.0)
    with pytest.raises(RetentionError, match="the adapter is inactive"):
        _retain(model, processor, images)


def test_bridge_without_an_adapter_is_refused(make_bridge, images):
    with pytest.raises(RetentionError, match="the adapter is inactive"):
        _retain(*make_bridge(gate="none", adapter=None), images)


def test_nan_is_refused(tiny, images):
    model, processor = tiny
    _fill_adapter(model, math.nan)
    with pytest.raises(RetentionError, match="bridge on prompts with a photograph are NaN"):
        _retain(model, processor, images)


def test_missing_image_prompts_are_refused(tiny, images):
    with pytest.raises(ValueError, match="image_prompts is empty"):
        _retain(*tiny, images, image_prompts=[])


def test_rendered_report_leads_with_the_verdict():
    worse = compare([True] * 500, [True] * 440 + [False] * 60, chance=0.5)
    same = compare([True] * 500, [True] * 500, chance=0.5)
    report = {
        "verdict": "retained",
        "gate": "none",
        "margin": 0.02,
        "max_abs_dlogit": {"text": 1.5, "irrelevant_image": 2.0, "image": 3.0},
        "bits_per_byte": {"base": 1.0, "bridge": 1.1},
        "kl": {"mean": 0.1, "p95": 0.2, "max": 0.3},
        "top1_agreement": 0.9,
        "tasks": [{"name": "facts", **worse}, {"name": "grammar", **same}],
        "overall": same,
        "provenance": {"text": {"tokens": 100}},
    }
    lines = render(report).splitlines()
    assert lines[0].startswith("RETAINED: a loss of 2 points")
    assert lines[1] == "Not everywhere: degraded on facts."
    row = next(line for line in lines if line.startswith("facts"))
    assert row.split()[:5] == ["facts", "500", "100.0", "88.0", "-12.0"] and "degraded" in row
