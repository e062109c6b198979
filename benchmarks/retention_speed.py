"""Speed of the engine of `mmpeft retain` against lm-eval's own (HFLM), on equal answers.

    python benchmarks/retention_speed.py                    the table: `embedded`, and few-shot
    python benchmarks/retention_speed.py --data_dir FOLDER  and 40 items of each `standard_local`
    python benchmarks/retention_speed.py --json             one JSON object in place of the table

Both engines answer the multiple-choice tasks of each suite with the same model and documents,
through the same call of lm-eval's evaluator. HFLM runs once at each batch size, then its fastest
and ours take turns; the seconds are medians, and the ratio is to that fastest. `few_shot` is
`reading` behind 16 solved examples (500 tokens), as many benchmarks are asked; HFLM encodes them
anew for every item and choice. Nothing else may run on the machine.

Before the clock starts, both answer some items of each task in float32: every choice has to be the
same and every log-likelihood equal to 0.001 nats, or to 1e-5 of itself if that is more. In
bfloat16 the stacks round differently (HFLM rounds its log-probabilities, too), so up to 2% of the
timed answers may differ.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmpeft.retention.engine import SideLM
from mmpeft.retention.modes import Mode
from mmpeft.retention.sides import Sides, default_device, evaluation, with_padding
from mmpeft.retention.suite import Suite, pair, quiet
from mmpeft.starter import resolve

SHOTS = 16
EQUAL = {"abs_tol": 1e-3, "rel_tol": 1e-5}  # log-likelihoods in float32, which has 7 digits
DIFFERING = 0.02  # share of choices that rounding to bfloat16 may change


class OneModel(Sides):
    """A causal LM that is compared with nothing."""

    kind = "adapter"

    def __init__(self, name: str, dtype: str, device: str):
        folder = str(resolve(name))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.tokenizer = self.chat = with_padding(AutoTokenizer.from_pretrained(folder))

    @contextmanager
    def on(self, side):
        with evaluation(self.model):
            yield self.model


class Theirs(HFLM):
    """lm-eval's own model of the same weights, with what a Suite reads from ours."""

    def __init__(self, sides: OneModel, batch_size: int):
        with quiet():
            super().__init__(
                pretrained=sides.model, tokenizer=sides.tokenizer, batch_size=batch_size
            )
        self.sides, self.mode, self.replies = sides, text_mode(sides), {}

    def generate_until(self, requests, disable_tqdm=False):
        texts = super().generate_until(requests, disable_tqdm)
        self.replies |= {r.args[0]: text for r, text in zip(requests, texts, strict=True)}
        return texts

    def reply(self, context, options):
        return self.replies[context], None, None


def text_mode(sides: Sides) -> Mode:
    return Mode("text", [], sides.render)


def our_lm(sides: OneModel) -> SideLM:
    sides.packs = None  # what it costs to find out belongs to the time
    return SideLM(sides, "base", text_mode(sides))


def few_shot(folder: str) -> str:
    """Write `reading` with solved examples in front as a task of lm-eval, and name it."""
    path = Path(str(files("mmpeft.tasks"))) / "retention" / "reading.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (Path(folder) / path.name).write_text("".join(rows[SHOTS:]), encoding="utf-8")
    config = {
        "task": f"reading_{SHOTS}_shot",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(Path(folder) / path.name)},
            "cache_dir": folder,
        },
        "test_split": "test",
        "num_fewshot": SHOTS,
        "fewshot_config": {"sampler": "first_n", "samples": [*map(json.loads, rows[:SHOTS])]},
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    # JSON is YAML
    (Path(folder) / "few_shot.yaml").write_text(json.dumps(config), encoding="utf-8")
    return config["task"]


def agreement(ours: dict, theirs: dict) -> dict:
    """{task: items, both scores, answers that differ, how far log-likelihoods (nats) are apart}."""
    rows = {}
    for task, pairs in pair(ours, theirs).items():
        values = [
            each
            for one, other in pairs
            for each in zip(one.loglikelihoods, other.loglikelihoods, strict=True)
        ]
        rows[task] = {
            "items": len(pairs),
            "ours": statistics.mean(one.score for one, _ in pairs),
            "theirs": statistics.mean(other.score for _, other in pairs),
            "differing": sum(
                (one.chosen, one.score) != (other.chosen, other.score) for one, other in pairs
            ),
            "unequal": sum(not math.isclose(a, b, **EQUAL) for a, b in values),
            "max_abs_difference": max(abs(a - b) for a, b in values),
        }
    return rows


def differing(rows: dict) -> float:
    """Share of the answers."""
    return sum(r["differing"] for r in rows.values()) / sum(r["items"] for r in rows.values())


def check(sides: OneModel, suite: Suite) -> dict:
    """Agreement of both engines in float32.

    Raises AssertionError: they do not do the same work.
    """
    rows = agreement(
        suite.ask(our_lm(sides), generated=False),
        suite.ask(Theirs(sides, batch_size=16), generated=False),
    )
    for task, row in rows.items():
        assert row["differing"] == row["unequal"] == 0, (task, row)
    return rows


def measure(suite: Suite, sides: OneModel, batch_sizes: list[int], repeats: int) -> dict:
    """Seconds of ours and of theirs, and how the answers in the model's dtype agree.

    Raises AssertionError: more answers differ than rounding explains.
    """
    runs: dict[str, list[float]] = {}
    answers = {}

    def ask(name, lm):
        began = time.perf_counter()
        answers[name] = suite.ask(lm, generated=False)
        runs.setdefault(name, []).append(time.perf_counter() - began)

    ask("ours", our_lm(sides))
    for size in batch_sizes:
        ask(f"hflm_{size}", Theirs(sides, size))
    size = min(batch_sizes, key=lambda size: runs[f"hflm_{size}"])
    best = f"hflm_{size}"
    for _ in range(repeats - 1):
        ask("ours", our_lm(sides))
        ask(best, Theirs(sides, size))
    seconds = {name: statistics.median(values) for name, values in runs.items()}
    rows = agreement(answers["ours"], answers[best])
    assert differing(rows) < DIFFERING, f"{differing(rows):.1%} of the answers differ: {rows}"
    return {
        "items": sum(row["items"] for row in rows.values()),
        "ratio": seconds[best] / seconds["ours"],
        "seconds": seconds,
        "runs": runs,
        "differing": differing(rows),
    }


def render(report: dict) -> str:
    names = list(next(iter(report["suites"].values()))["seconds"])
    lines = [
        f"{report['model']}, {report['dtype']}, {report['device']}, {report['threads']} threads; "
        f"seconds, median of {report['repeats']}",
        "",
        f"  {'suite':16s} {'items':>5s}  "
        + "  ".join(f"{name:>8s}" for name in names)
        + "   ratio  answers that differ",
    ]
    for name, suite in report["suites"].items():
        lines.append(
            f"  {name:16s} {suite['items']:5d}  "
            + "  ".join(f"{suite['seconds'][key]:8.1f}" for key in names)
            + f"  {suite['ratio']:5.1f}x  {suite['differing']:.1%}"
        )
    checked = [row for rows in report["equal_items"].values() for row in rows.values()]
    return "\n".join([
        *lines,
        "",
        f"float32: {sum(row['items'] for row in checked)} items answered alike, log-likelihoods "
        f"within {max(row['max_abs_difference'] for row in checked):.1g} nats",
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="starter:smollm2-135m-instruct", help="causal LM: folder or hub name"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the timed runs (bfloat16)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each engine (3)")
    parser.add_argument(
        "--their_batch_size", type=int, nargs="+", default=[1, 16, 64], metavar="N",
        help="batch sizes of HFLM (1 16 64)",
    )  # fmt: skip
    parser.add_argument("--check", type=int, default=40, help="items a task in float32 (40)")
    parser.add_argument(
        "--samples", type=int, default=40, help="items of few_shot and of a local task (40)"
    )
    parser.add_argument("--data_dir", help="folder of the files of `standard_local`")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: measure at least once")

    device = default_device()
    with tempfile.TemporaryDirectory(prefix="mmpeft-speed-") as folder:
        shown = few_shot(folder)
        suites = {"embedded": ("embedded", None, None), "few_shot": (shown, folder, None)}
        if arguments.data_dir:
            suites["standard_local"] = ("standard_local", None, arguments.data_dir)
        exact = OneModel(arguments.model, "float32", device)
        equal_items = {
            name: check(exact, Suite(task, where, arguments.check, data_dir=data))
            for name, (task, where, data) in suites.items()
        }
        del exact
        sides = OneModel(arguments.model, arguments.dtype, device)
        measured = {}
        for name, (task, where, data) in suites.items():
            samples = None if name == "embedded" else arguments.samples
            suite = Suite(task, where, samples, data_dir=data)
            measured[name] = measure(suite, sides, arguments.their_batch_size, arguments.repeats)
    report = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "ratios": {name: suite["ratio"] for name, suite in measured.items()},
        "seconds": {name: suite["seconds"] for name, suite in measured.items()},
        "equal_items": equal_items,
        "suites": measured,
    }
    print(json.dumps(report) if arguments.json else render(report))


if __name__ == "__main__":
    main()
