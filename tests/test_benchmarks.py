"""The benchmarks' own arithmetic; what they measure is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scaling, stacks, train
from mmpeft.packing import Block, PackedRow

ROOT = Path(__file__).resolve().parent.parent


def turns(*seconds, losses=(2.0, 1.0)):
    return [{"seconds": s, "losses": list(losses), "peak_bytes": 10**9} for s in seconds]


def test_the_ratio_is_the_median_over_neighbouring_turns():
    assert train.ratio(turns(6.0, 20.0, 9.0), turns(2.0, 2.0, 3.0)) == 3.0


def test_stacks_that_do_other_work_are_refused():
    class Done:
        learned = 7

    same = {"ours": Done, "theirs": Done}
    train.check_equal_work(same, {"ours": turns(1.0), "theirs": turns(9.0)})
    with pytest.raises(RuntimeError, match="not the same work"):
        train.check_equal_work(same, {"ours": turns(1.0), "theirs": turns(1.0, losses=(2.2, 1.0))})

    class More:
        learned = 8

    with pytest.raises(RuntimeError, match="'ours': 7, 'theirs': 8"):
        train.check_equal_work(same | {"theirs": More}, {"ours": turns(1.0), "theirs": turns(1.0)})


def test_the_share_of_attention_that_is_seen():
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    packed = PackedRow([Block(0, 1), Block(1, 2, (0, 1), mask)], [3])
    assert stacks.seen_share(packed) == pytest.approx((1 + 4) / (1 + 6))


def test_both_stacks_begin_with_the_same_weights():
    def model(*names):
        made = torch.nn.Module()
        for name in names:
            owner = made
            for part in name.split("."):
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.weight = torch.nn.Parameter(torch.zeros(3, 2))
        return made

    ours = model(
        "connector.0", "llm.layers.0.attn.q_proj.lora_A", "llm.layers.1.attn.q_proj.lora_A"
    )
    theirs = model("projector", "x.layers.1.attn.q_proj.lora_A", "x.layers.0.attn.q_proj.lora_A")
    for made in (ours, theirs):
        stacks.same_start(made, seed=0)
    assert torch.equal(ours.connector.get_submodule("0").weight, theirs.projector.weight)
    for layer in "01":
        own = ours.get_submodule(f"llm.layers.{layer}.attn.q_proj.lora_A").weight
        other = theirs.get_submodule(f"x.layers.{layer}.attn.q_proj.lora_A").weight
        assert own.abs().sum() > 0 and torch.equal(own, other)


def test_reports_can_be_read_and_drawn(tmp_path):
    names = {"ours": 1.0, "theirs": 2.0}
    report = {
        "setting": {"questions": 8},
        "throughput_ratio": {
            "first_epoch": 2.0, "steady": 4.0, "one_question_a_row": 3.0,
            "theirs_one_chat_an_image": 1.5,
        },
        "samples_per_second": names, "supervised_tokens_per_second": names,
        "first_epoch_seconds": names, "peak_memory_gb": names, "memory_ratio": 0.5,
        "loss_by_seed": {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 2.0]},
        "body": {"positions": 320, "flops": 1e11, "share": 0.5, "ceiling": 2e11, "shapes": 2e11},
        "levers": [{"name": "packing", "ratio": 1.25, "alone": 1.5}],
        "losses": {name: [3.0, 2.0, 1.0, 0.5] for name in names},
        "epoch_seconds": {name: [1.0, 0.5] for name in names},
    }  # fmt: skip
    report |= train.loss_gap(report["loss_by_seed"])
    text = train.render(report)
    assert "+0.3333 (standard error 0.8819)" in text  # of -1, 0 and 2
    assert "4.00x" in text and "1.25x" in text and "50% of the machine's 200" in text
    train.draw(report, tmp_path / "train.png")
    report = {
        "image_tokens": [{"value": 16, "ms": 5.0}], "length": [{"value": 128, "ms": 5.0}],
        "batch_size": [{"value": 1, "ms": 5.0}],
        "rows": [{"rows": 1000, "file_mb": 0.3, "start_s": 0.1, "start_mb": 0.1,
                  "samples_mb": 0.1, "sample_ms": 1.5}],
    }  # fmt: skip
    assert "| 1,000 |" in scaling.render(report)
    scaling.draw(report, tmp_path / "scaling.png")
    assert {path.name for path in tmp_path.glob("*.png")} == {"train.png", "scaling.png"}


@pytest.mark.parametrize("name", ["", "train", "scaling", "aids", "eval", "retain"])
def test_every_benchmark_tells_how_to_run_it(name):
    command = [sys.executable, "-m", "benchmarks", *([name] if name else []), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--json" in done.stdout


def test_an_unknown_benchmark_names_those_there_are():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "tran"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode and "train, scaling, aids, eval, retain" in done.stderr


def test_a_part_of_the_data_has_every_question_of_its_pictures(starter_path, tmp_path):
    starter_path("easy-vqa")
    folder = Path(train.easy_vqa(tmp_path, images=3, questions=4))
    rows = json.loads((folder / "train" / "questions.json").read_text())
    assert len(rows) == 12 and len({row[2] for row in rows}) == 3
    assert len(list((folder / "train" / "images").glob("*.png"))) == 3
