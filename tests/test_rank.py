"""``model.rank: auto``: halving and the choice by hand, the search end to end, resuming."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmpeft import config, rank
from mmpeft.config import RankSearchConfig
from mmpeft.train import train

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
    found = {row["rank"]: row for row in rank.rung(9, losses, dict.fromkeys(losses, 1))["tried"]}
    assert found[8]["behind"] == pytest.approx(0.025)
    assert found[8]["standard_error"] == pytest.approx(0.0957427 / 2, rel=1e-5)
    assert found[4]["standard_error"] == pytest.approx(0.025)
    assert [r for r, row in found.items() if row["within_noise"]] == [16, 8]


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


def test_the_search_finds_the_rank_that_a_task_needs(monkeypatch):
    """Losses known in advance: rank 2 falls behind late, 8 and 16 are the same."""
    monkeypatch.setattr(rank, "train_stage", lambda *a, **k: None)
    rng = np.random.default_rng(0)
    base = rng.normal(2, 0.3, 64)

    class Known(rank.ValidationLoss):
        asked = ()

        def __init__(self, dataset):
            of, until = Known.asked
            short = max(0, 8 - of) * 0.02 * until / 40
            self.losses = base + short + rng.normal(0, 0.001, 64) + 1 / until

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
    monkeypatch.setattr(rank, "split", lambda *a: (None, base))
    monkeypatch.setattr(rank, "total_steps", lambda *a: 160)
    settings = Anything()
    settings.rank_search = RankSearchConfig(candidates=[16, 2, 4, 8], steps=None)
    settings.output_dir, settings.seed = "nowhere", 0
    report = rank.search(Anything(), [None] * 64, None, settings, None)
    assert report["rank"] == 8 and [one["steps"] for one in report["rungs"]] == [20, 40]
    assert report["rungs"][0]["kept"] == [8, 16]
    assert report["steps"] == 4 * 20 + 2 * 20 or len(report["rungs"]) == 1


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
