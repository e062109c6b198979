"""Training throughput against the usual stack, on the same model, rows, precision and machine.

The model is a LLaVA of the starter models (ViT-S/14, two-layer projector, SmolLM2-135M with LoRA on
its attention), the data easy-VQA with several questions a picture. Theirs is
``LlavaForConditionalGeneration``, peft and ``transformers.Trainer`` with a collator that pads; ours
is ``mmpeft train``. Both begin with the same weights and see the same rows in the same order. Each
runs in its own process, in turns, an epoch at a time; the first epoch's time has everything since
the process began in it (imports, loading, compiling). Nothing else may run on the machine.

Then each lever: ours without it against ours with all, and with it alone against none.
"""

import argparse
import contextlib
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.stacks import Setting, Stack

# lever: what switches it off. Several questions about one image in a row is off with one question a
# row, and then as many rows a step.
SHARING = "questions share their image"
LEVERS = {
    "feature cache": {"speed.feature_cache": "off"},
    SHARING: {"data.chats_per_sample": "1"},
    "packing": {"speed.packing": "false"},
    "few lengths": {"speed.pad_to_multiple_of": "1"},
    "supervised logits": {"speed.supervised_logits": "false"},
    "compile": {"speed.compile": "off"},
    "autocast": {"instruct.bf16": "false"},
}


def easy_vqa(folder: Path, images: int, questions: int) -> str:
    """A part of easy-VQA: pictures with as many questions, drawn with a seed."""
    from mmpeft.starter import path

    source = path("easy-vqa") / "train"
    rows = {}
    for row in json.loads((source / "questions.json").read_text()):
        rows.setdefault(row[2], []).append(row)
    full = sorted(image for image, own in rows.items() if len(own) >= questions)
    chosen = random.Random(0).sample(full, images)
    (folder / "train" / "images").mkdir(parents=True)
    for image in chosen:
        name = f"images/{image}.png"
        shutil.copy(source / name, folder / "train" / name)
    kept = [row for image in chosen for row in rows[image][:questions]]
    (folder / "train" / "questions.json").write_text(json.dumps(kept))
    return str(folder)


def race(stacks: dict[str, Stack], steps: int, rounds: int, bar) -> dict[str, list[dict]]:
    """Every stack trains ``steps`` steps in turn, ``rounds`` times, in changing order."""
    results = {name: [] for name in stacks}
    for number in range(rounds):
        for name in list(stacks) if number % 2 == 0 else reversed(stacks):
            results[name].append(stacks[name].run(steps))
            bar.update(1)
    return results


def lever_overrides(setting: Setting, off) -> dict:
    overrides = {key: value for name in off for key, value in LEVERS[name].items()}
    if "data.chats_per_sample" in overrides:
        overrides["instruct.per_device_train_batch_size"] = str(setting.questions * setting.images)
    return overrides


def measure_levers(make, setting: Setting, rounds: int, names) -> tuple[list[dict], float]:
    """``{"name", "ratio", "alone"}``: throughput of all by all but it, and of it alone by none.

    And the throughput of all by that of the usual stack when it gets the questions about an image
    as turns of one chat. A turn is an epoch; one before the first makes caches and kernels warm.
    """
    steps = setting.steps

    def start(off, stack="ours", **options):
        made = make(stack, overrides=lever_overrides(setting, off), **options)
        made.run(steps)
        return made

    found = []
    with tqdm(total=4 * rounds * len(names) + 2 * rounds, desc="levers", unit="turn") as bar:
        everything, nothing = start([]), start(names)
        chats = start([], "theirs", chats=True)
        turns = race({"all": everything, "chats": chats}, steps, rounds, bar)
        by_chats = ratio(turns["chats"], turns["all"])
        chats.close()
        for name in names:
            own = {"without": start([name]), "alone": start([n for n in names if n != name])}
            turns = race({"all": everything, "none": nothing} | own, steps, rounds, bar)
            found.append({
                "name": name,
                "ratio": ratio(turns["without"], turns["all"]),
                "alone": ratio(turns["none"], turns["alone"]),
            })  # fmt: skip
            for stack in own.values():
                stack.close()
        everything.close()
        nothing.close()
    return found, by_chats


def ratio(slow: list[dict], fast: list[dict]) -> float:
    """Median of the ratios of turns that followed each other."""
    pairs = zip(slow, fast, strict=True)
    return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)


def bench(arguments, keep) -> dict:
    """The report that ``--json`` prints; ``keep`` gets it as soon as both stacks are done."""
    names = [] if arguments.no_levers else list(LEVERS)
    if arguments.dtype == "float32":
        names = [name for name in names if name != "autocast"]
    per_epoch, few = arguments.images, arguments.lever_images
    with tempfile.TemporaryDirectory(prefix="mmpeft-bench-") as folder:
        folder, count = Path(folder), itertools.count()

        def make(stack, images=few, **options):
            data = folder / f"data-{images}"
            if not data.exists():
                easy_vqa(data, images, arguments.questions)
            return Stack(Setting(
                stack, str(data), str(folder / f"{next(count)}-{stack}"), arguments.image_size,
                arguments.questions, steps=100_000, dtype=arguments.dtype, **options,
            ))  # fmt: skip

        stacks, loading = {}, {}
        for name in ("ours", "theirs"):
            began = time.perf_counter()
            stacks[name] = make(name, per_epoch, measure_body=name == "ours")
            loading[name] = time.perf_counter() - began
        with tqdm(total=2 * arguments.epochs, desc="both stacks", unit="epoch") as bar:
            turns = race(stacks, per_epoch, arguments.epochs, bar)
        body, _ = (stacks[name].close() for name in ("ours", "theirs"))
        check_equal_work(stacks, turns)
        report = summary(arguments, stacks, loading, turns, body)
        seeds = report["loss_by_seed"]
        for seed in range(1, arguments.seeds):
            for name in stacks:
                stack = make(name, per_epoch, seed=seed)
                losses = stack.run(per_epoch * arguments.epochs)["losses"]
                seeds[name].append(statistics.mean(losses[-per_epoch:]))
                stack.close()
        report |= loss_gap(seeds)
        keep(report)
        if names:
            setting = Setting("ours", "", "", questions=arguments.questions, steps=few)
            levers, by_chats = measure_levers(make, setting, arguments.repeats, names)
            (unshared,) = (row["ratio"] for row in levers if row["name"] == SHARING)
            report["levers"] = levers
            report["throughput_ratio"] |= {
                "one_question_a_row": report["throughput_ratio"]["steady"] / unshared,
                "theirs_one_chat_an_image": by_chats,
            }
            keep(report)
    return report


def loss_gap(seeds: dict[str, list[float]]) -> dict:
    """Ours less theirs, mean over seeds, and the standard error of that; ``None`` of one seed."""
    gaps = [ours - theirs for ours, theirs in zip(*seeds.values(), strict=True)]
    several = len(gaps) > 1
    return {
        "loss_gap": statistics.mean(gaps),
        "loss_gap_standard_error": statistics.stdev(gaps) / len(gaps) ** 0.5 if several else None,
    }


def summary(arguments, stacks, loading, turns, body) -> dict:
    """The report without the levers and further seeds."""
    import torch

    from mmpeft.run_folder import environment

    per_epoch = arguments.images
    first = {name: loading[name] + turns[name][0]["seconds"] for name in turns}
    losses = {name: [loss for turn in turns[name] for loss in turn["losses"]] for name in turns}
    late = {name: statistics.mean(curve[-per_epoch:]) for name, curve in losses.items()}
    seconds = {name: statistics.median(t["seconds"] for t in turns[name][1:]) for name in turns}
    rows = per_epoch * arguments.questions
    return {
        "schema": "mmpeft.bench.train/1",
        "setting": {key: value for key, value in vars(arguments).items() if key != "json"},
        "environment": environment(),
        "steps": arguments.epochs * per_epoch,
        "throughput_ratio": {
            "first_epoch": first["theirs"] / first["ours"],
            "steady": ratio(turns["theirs"][1:], turns["ours"][1:]),
        },
        "samples_per_second": {name: rows / seconds[name] for name in seconds},
        "supervised_tokens_per_second": {
            name: stacks[name].learned / seconds[name] for name in seconds
        },
        "peak_memory_gb": {name: turns[name][-1]["peak_bytes"] / 1e9 for name in turns},
        "memory_ratio": turns["ours"][-1]["peak_bytes"] / turns["theirs"][-1]["peak_bytes"],
        "ceiling_share": body["share"],
        "body": body,
        "loss_by_seed": {name: [loss] for name, loss in late.items()},
        "levers": [],
        "first_epoch_seconds": first,
        "epoch_seconds": {name: [turn["seconds"] for turn in turns[name]] for name in turns},
        "losses": losses,
        "threads": torch.get_num_threads(),
    }


def check_equal_work(stacks: dict[str, Stack], turns: dict[str, list[dict]]) -> None:
    """Both learn the same tokens, and begin at the same loss (to a rounding of 2%).

    Raises:
        RuntimeError: they do not.
    """
    learned = {name: stack.learned for name, stack in stacks.items()}
    first = {name: turns[name][0]["losses"][0] for name in turns}
    apart = abs(first["ours"] / first["theirs"] - 1)
    if len(set(learned.values())) > 1 or apart > 0.02:
        raise RuntimeError(f"not the same work: {learned} learned tokens, first losses {first}.")


def render(report: dict) -> str:
    """The report as tables."""
    ours, theirs = (report["samples_per_second"][name] for name in ("ours", "theirs"))
    memory, body = report["peak_memory_gb"], report["body"]
    loss = {name: statistics.mean(values) for name, values in report["loss_by_seed"].items()}
    error = report["loss_gap_standard_error"]
    faster, tokens = report["throughput_ratio"], report["supervised_tokens_per_second"]
    lines = [
        f"{'':24}{'ours':>12}{'usual stack':>14}{'ratio':>9}",
        f"{'questions/s, steady':24}{ours:>12.2f}{theirs:>14.2f}{faster['steady']:>8.2f}x",
        f"{'learned tokens/s':24}{tokens['ours']:>12.1f}{tokens['theirs']:>14.1f}",
        f"{'first epoch, s':24}{report['first_epoch_seconds']['ours']:>12.1f}"
        f"{report['first_epoch_seconds']['theirs']:>14.1f}{faster['first_epoch']:>8.2f}x",
        f"{'peak memory, GB':24}{memory['ours']:>12.2f}{memory['theirs']:>14.2f}"
        f"{report['memory_ratio']:>8.2f}x",
        f"{'loss, last epoch':24}{loss['ours']:>12.4f}{loss['theirs']:>14.4f}"
        f"{report['loss_gap']:>+9.4f}" + (f" (standard error {error:.4f})" if error else ""),
        "",
        f"LLM layers, {body['positions']} positions, forward and backward: "
        f"{body['flops'] / 1e9:.0f} GFLOP/s, {body['share']:.0%} of the machine's "
        f"{body['ceiling'] / 1e9:.0f} (products of the layers' own shapes: "
        f"{body['shapes'] / 1e9:.0f})",
    ]
    if report["levers"]:
        lines += [
            "",
            "against the usual stack, steady: one question a row on both sides "
            f"{faster['one_question_a_row']:.2f}x; theirs with one chat of "
            f"{report['setting']['questions']} turns an image "
            f"{faster['theirs_one_chat_an_image']:.2f}x",
        ]
        lines += ["", f"{'lever':30}{'with all / without it':>23}{'alone / none':>15}"]
        lines += [
            f"{row['name']:30}{row['ratio']:>22.2f}x{row['alone']:>14.2f}x"
            for row in report["levers"]
        ]
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """Both loss curves over the steps, and over the time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for name, label, style in (("theirs", "usual stack", "-"), ("ours", "mmpeft", "--")):
        curve, turns = report["losses"][name], report["epoch_seconds"][name]
        before = report["first_epoch_seconds"][name] - turns[0]
        each = len(curve) / len(turns)
        minutes = [
            (before + sum(turns[: int(i // each)]) + turns[int(i // each)] * (i % each) / each) / 60
            for i in range(len(curve))
        ]
        by_step.plot(range(1, len(curve) + 1), curve, style, label=label, linewidth=1)
        by_time.plot(minutes, curve, style, label=label, linewidth=1)
    by_step.set(xlabel="step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    by_time.set(xlabel="minutes since the process began")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50, help="pictures, one a step (50)")
    parser.add_argument("--questions", type=int, default=8, help="questions a picture (8)")
    parser.add_argument("--epochs", type=int, default=4, help="times through the pictures (4)")
    parser.add_argument("--seeds", type=int, default=2, help="losses of both with so many (2)")
    parser.add_argument("--image_size", type=int, default=168, help="pixels a side (168)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--no_levers", action="store_true", help="the two stacks alone")
    parser.add_argument(
        "--lever_images", type=int, default=8, help="pictures, and steps of a turn, of levers (8)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns of each lever (3)")
    parser.add_argument("--output", default="benchmarks/results", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, only that")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs: the first is measured apart, give 2 or more")
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)

    def keep(report):
        (output / "train.json").write_text(json.dumps(report, indent=2) + "\n")
        draw(report, output / "train.png")

    with contextlib.redirect_stdout(sys.stderr):
        report = bench(arguments, keep)
    print(json.dumps(report) if arguments.json else render(report))


if __name__ == "__main__":
    main()
