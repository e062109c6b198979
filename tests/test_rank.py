"""``model.rank: auto``: halving and the choice by hand, the search end to end, resuming."""

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmpeft import config, rank
from mmpeft.config import RankSearchConfig
from mmpeft.stopping import Stopped
from mmpeft.train import train

from .test_durable import At, signalled

AUTO = ["--model.rank", "auto", "--rank_search.candidates", "[1, 2, 4]",
        "--rank_search.steps", "4", "--rank_search.validation", "4"]  # fmt: skip


def adapter(run):
    return load_file(run / "checkpoint/adapter/adapter_model.safetensors")


def ranks(run):
    return {len(v) for k, v in adapter(run).items() if "lora_A" in k}


@pytest.mark.parametrize(
    ("candidates", "steps", "ladder"),
    [(2, 40, [40]), (3, 40, [20, 40]), (4, 40, [20, 40]), (6, 40, [10, 20, 40]), (8, 2, [1, 2])],
)
def test_the_steps_double_up_to_the_last(candidates, steps, ladder):
    settings = RankSearchConfig(candidates=list(range(1, candidates + 1)))
    assert rank.rung_steps(settings, steps) == ladder


def test_half_goes_on_but_never_fewer_than_two():
    losses = {
        r: np.array([loss, loss]) for r, loss in zip(range(1, 7), (6, 5, 4, 1, 2, 3), strict=True)
    }
    assert rank.better_half(losses) == [4, 5, 6]
    assert rank.better_half({r: losses[r] for r in (4, 5, 6)}) == [4, 5]
    assert rank.better_half({r: losses[r] for r in (4, 5)}) == [4, 5]


def test_noise_is_one_standard_error_of_paired_differences():
    best = np.array([1.0, 2.0, 3.0, 4.0])
    losses = {
        16: best,
        8: best + np.array([0.1, -0.1, 0.1, 0.0]),  # mean .025, sd .0957, error .0479
        4: best + np.array([0.1, 0.1, 0.1, 0.0]),  # mean .075, sd .05, error .025
    }
    tried = rank.rung(9, losses, dict.fromkeys(losses, 1), np.arange(4))["tried"]
    found = {row["rank"]: row for row in tried}
    assert found[8]["behind"] == pytest.approx(0.025)
    assert found[8]["standard_error"] == pytest.approx(0.0957427 / 2, rel=1e-5)
    assert found[4]["standard_error"] == pytest.approx(0.025)
    assert [r for r, row in found.items() if row["within_noise"]] == [16, 8]


def test_samples_of_a_group_are_no_independent_ones():
    values = np.array([0.1, -0.1, 0.1, 0.0])
    assert rank.standard_error(values, np.arange(4)) == pytest.approx(0.0957427 / 2, rel=1e-5)
    # each sample four times over says no more than once
    often = rank.standard_error(np.repeat(values, 4), np.repeat([7, 3, 5, 9], 4))
    assert often == pytest.approx(0.0957427 / 2, rel=1e-5)
    # groups of 3 and 1: mean 3, sums less the mean -3 and 3; sqrt(2/1 * 18) / 4
    uneven = rank.standard_error(np.array([1.0, 2.0, 3.0, 6.0]), np.array([0, 0, 0, 1]))
    assert uneven == pytest.approx(1.5)


@pytest.mark.parametrize("gone", [np.nan, np.inf])
def test_a_candidate_that_diverged_is_dropped_and_reported(gone):
    ok, seconds = np.array([1.0, 2.0, 3.0]), dict.fromkeys((2, 4, 8, 16), 1.0)
    losses = {2: np.array([gone, 1.0, 1.0]), 4: ok + np.eye(3)[0] / 9, 8: ok, 16: ok + 9}
    rung = rank.rung(5, losses, seconds, np.arange(3))
    first, second, third, _ = rung["tried"]
    assert first["diverged"] and first["loss"] is None and not first["within_noise"]
    assert not third["diverged"] and third["behind"] == 0 and second["within_noise"]
    json.dumps(rung, allow_nan=False)
    assert rank.better_half(losses) == [4, 8]
    assert rank.better_half({2: losses[2], 8: ok}) == [8]
    report = {"validation_samples": 3, "rungs": [rung | {"kept": [4, 8]}], "rank": 4, "steps": 20,
              "reason": "so", "share_of_stage": 0.5, "seconds": 1}  # fmt: skip
    assert "diverged" in rank.render(report).splitlines()[2]
    with pytest.raises(ValueError, match=r"candidate \(2, 4\) diverged within 5 steps; lower"):
        rank.rung(5, {2: losses[2], 4: losses[2]}, seconds, np.arange(3))


def test_no_group_is_on_both_sides_and_retention_keeps_its_rows(recipe):
    from mmpeft.data import ConversationDataset
    from mmpeft.train import build

    class Pictures:
        """Twelve rows about four pictures."""

        def rows(self, split):
            return list(range(12))

        def group(self, row):
            return row // 3

    parsed, _ = config.load(recipe, [*AUTO, "--rank_search.validation", "2"])
    _, processor = build(parsed)
    parsed.data.chats_per_sample = 2
    dataset = ConversationDataset(Pictures(), "train", processor, 2, held_out=2, seed=0)
    learned, held_out = rank.split(dataset, parsed)
    rows = [{n for sample in part.samples for n in sample} for part in (learned, held_out)]
    pictures = [{n // 3 for n in part} for part in (*rows, dataset.held_out)]
    assert len(rows[1]) >= 4 and sum(map(len, pictures)) == 4
    assert set.union(*pictures) == {0, 1, 2, 3}
    groups = rank.groups_of(held_out)
    assert len(groups) == len(held_out.samples) and len(set(groups)) == len(pictures[1])
    held_out.samples = [held_out.samples[0]] * 2
    held_out.task.name = "pictures"
    with pytest.raises(ValueError, match="all 2 samples held out .* one group of task pictures"):
        rank.groups_of(held_out)


def test_the_rank_is_found_before_instruct_and_the_connector_left_alone(recipe, capsys):
    run = train(recipe, AUTO)
    report = json.loads((run / "rank_search.json").read_text())
    assert [one["steps"] for one in report["rungs"]] in ([2, 4], [2])
    assert [row["rank"] for row in report["rungs"][0]["tried"]] == [1, 2, 4]
    spent = 3 * 2 + (2 * 2 if len(report["rungs"]) == 2 else 0)
    assert report["steps"] == spent and report["share_of_stage"] == spent / 8
    assert ranks(run) == {report["rank"]}
    assert f"rank {report['rank']}: " in capsys.readouterr().err
    assert not (run / "rank_search").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r and r["stage"] == "instruct"] == list(
        range(1, 9)
    )

    # the search left no trace in what stage instruct starts from: its result is that of the rank
    given = ["--model.rank", str(report["rank"]), "--output_dir", str(recipe.parent / "given")]
    plain = train(recipe, given)
    first = [
        next(r["loss"] for r in map(json.loads, (path / "metrics.jsonl").open())
             if r["stage"] == "instruct")
        for path in (run, plain)
    ]  # fmt: skip
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_a_search_that_is_stopped_says_that_it_begins_anew(recipe, monkeypatch):
    """No step of a candidate is one that the stage goes on from."""
    stop = At(2, signalled(signal.SIGTERM)).on_step_begin
    monkeypatch.setattr("mmpeft.metrics_file.MetricsFile.on_step_begin", stop)
    with pytest.raises(Stopped, match="^with --resume, the search for a rank begins anew.$"):
        train(recipe, [*AUTO, "--align", "null"])


def test_a_resumed_run_keeps_the_rank_it_found(recipe, monkeypatch):
    steps = ["--instruct.max_steps", "4"]
    run = train(recipe, [*AUTO, *steps])
    whole = adapter(run)
    for path in (run / "checkpoint").rglob("*"):
        if path.is_file():
            path.unlink()
    (run / "checkpoint").rename(run / "gone")
    monkeypatch.setattr(rank, "search", lambda *args: pytest.fail("searched again"))
    train(recipe, [*AUTO, *steps], resume=True)
    assert all(torch.equal(whole[key], value) for key, value in adapter(run).items())
    train(recipe, [*AUTO, *steps], resume=True)  # complete: nothing to do


@pytest.fixture
def search_known(monkeypatch):
    """The search where training gives losses known in advance, of a rank and its steps."""
    monkeypatch.setattr(rank, "train_stage", lambda *a, **k: None)

    class Known(rank.ValidationLoss):
        asked = ()

        def __init__(self, losses):
            self.losses = losses(*Known.asked)

    def candidate(config, of, until, steps):
        Known.asked = of, until
        return config

    class Anything:
        def __getattr__(self, name):
            return Anything()

        def __call__(self, *args, **kwargs):
            return {}

        def __len__(self):
            return 64

    monkeypatch.setattr(rank, "ValidationLoss", Known)
    monkeypatch.setattr(rank, "candidate", candidate)

    class Losses:
        def __init__(self, of):
            self.of = of

        def __call__(self, *asked):
            return self.of(*asked)

        def __len__(self):
            return 64

    monkeypatch.setattr(rank, "groups_of", lambda held_out: np.arange(64))
    monkeypatch.setattr(rank, "total_steps", lambda stage, samples: samples * 5 // 2)

    def search(losses, samples=64, **given):
        monkeypatch.setattr(rank, "split", lambda *a: (None, Losses(losses)))
        settings = Anything()
        settings.rank_search = RankSearchConfig(**given)
        settings.output_dir, settings.seed = "nowhere", 0
        return rank.search(Anything(), [None] * 64, samples, None, settings, None)

    return search


def test_the_search_finds_the_rank_that_a_task_needs(search_known):
    """Rank 2 falls behind late, 8 and 16 are the same."""
    rng = np.random.default_rng(0)
    base = rng.normal(2, 0.3, 64)

    def losses(of, until):
        short = max(0, 8 - of) * 0.02 * until / 40
        return base + short + rng.normal(0, 0.001, 64) + 1 / until

    report = search_known(losses, candidates=[16, 2, 4, 8], steps=None)
    assert report["rank"] == 8 and [one["steps"] for one in report["rungs"]] == [20, 40]
    assert report["rungs"][0]["kept"] == [8, 16]
    assert report["steps"] == 4 * 20 + 2 * 20 or len(report["rungs"]) == 1


def test_what_is_alike_at_half_of_odd_steps_is_not_trained_on(search_known):
    report = search_known(lambda of, until: np.arange(64.0), candidates=[2, 4, 8], steps=5)
    assert [one["steps"] for one in report["rungs"]] == [2] and report["rank"] == 2


def test_the_share_is_that_of_the_stage_with_all_that_is_mixed_in(search_known):
    given = {"candidates": [2, 4], "steps": 40}
    plain = search_known(lambda of, until: np.arange(64.0), **given)
    mixed = search_known(lambda of, until: np.arange(64.0), samples=80, **given)
    assert plain["share_of_stage"] == 80 / 160 and mixed["share_of_stage"] == 80 / 200


def test_a_rank_that_is_alone_left_is_taken(search_known):
    def losses(of, until):
        return np.full(64, np.nan if of > 2 else 1.0)

    report = search_known(losses, candidates=[2, 4, 8], steps=8)
    assert report["rank"] == report["best"] == 2
    assert report["reason"] == "the loss of 2 alone did not diverge"
    assert [row["rank"] for row in report["rungs"][-1]["tried"]] == [2]
    with pytest.raises(ValueError, match="diverged within 4 steps"):
        search_known(lambda of, until: np.full(64, np.inf), candidates=[2, 4, 8], steps=8)


def test_a_rank_is_set_on_any_adapter_that_has_one(recipe):
    parsed, resolved = config.load(recipe, ["--model.rank", "7"])
    assert parsed.model.adapter.r == 7 and "rank: 7" in resolved
    lokr = ["--model.adapter", "LoKrConfig", "--model.adapter.init_args.target_modules", "[q_proj]"]
    assert config.load(recipe, ["--model.rank", "3", *lokr])[0].model.adapter.r == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.rank", "0"], "model.rank is 0; it must be 1 or more"),
        (["--model.rank", "auto", "--model.adapter", "IA3Config"], "IA3Config has no rank r"),
        (
            [
                "--model.rank",
                "4",
                "--model.adapter",
                "AdaLoraConfig",
                "--model.adapter.init_args.total_step",
                "10",
            ],
            "moves ranks from init_r",
        ),
        (["--model.rank", "auto", "--model.adapter", "RandLoraConfig"], "fewer weights the larger"),
        (
            [
                "--model.rank",
                "4",
                "--model.adapter",
                "DyLoraConfig",
                "--model.adapter.init_args.rank",
                "2",
            ],
            "the adapter's rank set ranks; leave one out",
        ),
        (["--model.rank", "auto", "--instruct", "null"], "no stage instruct to find it for"),
        (["--rank_search.candidates", "[8]"], "name two ranks or more"),
        (["--rank_search.steps", "1"], "rank_search.steps is 1"),
        (["--rank_search.candidate", "[8, 4]"], "Did you mean 'candidates'"),
        (["--rank_search.validation", "12", "--model.rank", "auto"], "cannot be held out"),
    ],
)
def test_a_mistake_is_named(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        train(recipe, options)


def test_a_rank_beside_a_pattern_of_ranks_is_refused():
    from peft import LoraConfig

    from mmpeft.config import of_rank
    from mmpeft.tuners.dylora import DyLoraConfig

    with pytest.raises(ValueError, match="rank_pattern set ranks"):
        of_rank(LoraConfig(rank_pattern={"q_proj": 2}), 4)
    with pytest.raises(ValueError, match="the adapter's rank set ranks"):
        of_rank(DyLoraConfig(r=16, rank=8), 4)
    assert of_rank(LoraConfig(r=16, lora_alpha=3), 4).lora_alpha == 3


def test_a_rank_is_not_looked_for_with_a_start_out_of_data(recipe):
    from mmpeft.train import train

    options = ["--model.rank", "auto", "--model.adapter.init_lora_weights", "eva"]
    with pytest.raises(ValueError, match="rank: auto tries ranks of plain starts.*'eva'"):
        train(recipe, options)
