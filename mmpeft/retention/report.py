"""Put proof, prose and suite together; say the verdict in JSON and in words."""

import hashlib
import json
import os
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path

import mmpeft
from mmpeft.checkpoint import find_checkpoint, load
from mmpeft.images import load_image
from mmpeft.retention.engine import Suite, pair
from mmpeft.retention.proof import prompts_sha256, prove
from mmpeft.retention.sides import SIDES
from mmpeft.retention.statistics import MARGIN, compare
from mmpeft.retention.text import compare_text, embedded_text

SCHEMA = "mmpeft.retain/1"
IMAGE_PROMPTS = 16  # rows of the vision task that show the adapter at work
PACKAGES = ("lm_eval", "torch", "transformers", "peft")


def retain(
    model,
    processor,
    *,
    image_prompts: list[list[dict]],
    irrelevant_image=None,
    suite: str = "embedded",
    suite_folder: str | Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    margin: float = MARGIN,
    text: str | None = None,
    max_tokens: int = 16384,
) -> dict:
    """Compare a bridge with its own base (the same weights, adapter disabled) on text.

    Args:
        model, processor: a bridge and its processor; the model is left in the mode it came in.
        image_prompts: conversations with images, on which the adapter must show an effect.
        irrelevant_image: path or picture put before the text prompts; default: a photograph from
            the starter assets.
        suite, suite_folder: an lm-eval group and the folder of its YAML files (default: ours).
        samples: items of each task, chosen by `seed` (None: all).
        margin: loss that still counts as retained, as a share (0.02 is two points).
        text, max_tokens: the prose to predict (default: Python's own) and how much of it.

    Returns:
        The report, a JSON object of schema "mmpeft.retain/1" (fields: docs/json.md).

    Raises:
        RetentionError: the report would prove nothing (inactive adapter, NaN logits, sides that saw
            different questions).
    """
    if not image_prompts:
        raise ValueError(
            "image_prompts is empty: without an image nobody can tell an unchanged model from an "
            "adapter that is switched off. Pass the messages of a few rows of a vision task."
        )
    start = time.perf_counter()
    questions = Suite(suite, suite_folder, samples, seed)  # first: it fails at once if misspelt
    irrelevant_image = photograph() if irrelevant_image is None else irrelevant_image
    deltas = prove(model, processor, image_prompts, irrelevant_image)
    prose = compare_text(
        model,
        processor.tokenizer,
        embedded_text() if text is None else text,
        max_tokens=max_tokens,
    )
    base, bridge = (questions.ask(model, processor.tokenizer, name) for name in SIDES)

    gate = model.config.gate
    unchanged = gate != "none" and deltas["text"] == 0 and prose["max_abs_dlogit"] == 0
    rows = {
        task: [
            (a.correct, b.correct, 1 / len(a.loglikelihoods), a.loglikelihoods == b.loglikelihoods)
            for a, b in pairs
        ]
        for task, pairs in pair(base, bridge).items()
    }
    tasks = [{"name": task, **judge(items, margin, unchanged)} for task, items in rows.items()]
    judged = [
        item for task in tasks if task["verdict"] != "not_judgeable" for item in rows[task["name"]]
    ]
    overall = judge(judged, margin, unchanged) if judged else None
    return {
        "schema": SCHEMA,
        "verdict": overall["verdict"] if overall else "not_judgeable",
        "gate": gate,
        "margin": margin,
        "max_abs_dlogit": deltas,
        "bits_per_byte": prose["bits_per_byte"],
        "kl": prose["kl"],
        "top1_agreement": prose["top1_agreement"],
        "tasks": tasks,
        "overall": overall,
        "provenance": {
            "suite": {
                "name": suite,
                "versions": questions.versions,
                "sha256": items_sha256(base),
                "samples": samples,
                "seed": seed,
            },
            "text": {
                "name": "pydoc_data.topics" if text is None else "given",
                **prose["source"],
                "max_abs_dlogit": prose["max_abs_dlogit"],
            },
            "prompts_sha256": prompts_sha256(image_prompts),
            "image_prompts": len(image_prompts),
            "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
            "device": str(model.device),
            "versions": {
                "mmpeft": mmpeft.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in PACKAGES},
            },
            "seconds": round(time.perf_counter() - start, 1),
        },
    }


def retain_run(run, task, *, image=None, samples: int | None = None, seed: int = 0) -> dict:
    """Load a run, measure its retention, and keep the report in the run folder.

    Args:
        task: the vision task whose test rows serve as image prompts.
        image: path of the irrelevant picture (default: a starter photograph).
        samples: items of each text task, chosen by `seed` (None: all).
    """
    rows = task.rows("test")
    chosen = random.Random(seed).sample(range(len(rows)), min(IMAGE_PROMPTS, len(rows)))
    image_prompts = [task.messages(rows[number])[:-1] for number in chosen]
    irrelevant_image = None if image is None else load_image(image, "irrelevant image")
    model, processor = load(run)
    report = retain(
        model, processor, image_prompts=image_prompts, irrelevant_image=irrelevant_image,
        samples=samples, seed=seed,
    )  # fmt: skip
    if find_checkpoint(run) != Path(run):  # a bare checkpoint is left as it is
        write(report, Path(run) / "retain")
    return report


def judge(items: list[tuple], margin: float, unchanged: bool) -> dict:
    """Statistics of items (base right, bridge right, chance, same log-likelihoods).

    `unchanged`: a gate kept the adapter out of every text that was looked at. Then, if every
    log-likelihood here is the same bit for bit too, the difference is 0 by proof.
    """
    base, bridge, chances, same = zip(*items, strict=True)
    return compare(
        base,
        bridge,
        chance=sum(chances) / len(chances),
        margin=margin,
        exact=unchanged and all(same),
    )


def items_sha256(answers) -> str:
    """Hash of all documents and prompts of the suite, in order."""
    asked = [[task, [item.sha256 for item in items]] for task, items in answers.tasks.items()]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def photograph() -> Path:
    """A real photograph that has nothing to do with any prompt."""
    from mmpeft import starter

    folder = starter.path("photographs")
    return min(path for path in folder.rglob("*") if path.suffix in {".jpg", ".png"})


def write(report: dict, folder: str | Path) -> list[Path]:
    """Write report.json and report.txt below `folder`; a reader never sees half a file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bodies = {
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.txt": render(report),
    }
    for name, body in bodies.items():
        partial = folder / f".{name}.partial"
        partial.write_text(body, encoding="utf-8")
        os.replace(partial, folder / name)
    return [folder / name for name in bodies]


VERDICTS = {
    "retained": "RETAINED: a loss of {margin} points or more on this text is ruled out",
    "degraded": "DEGRADED: the bridge answers worse than its base",
    "inconclusive": "INCONCLUSIVE: neither a loss nor its absence ({margin} points) is shown",
    "not_judgeable": "NOT JUDGEABLE: the base itself answers no better than chance",
}


def points(share: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * share:+.1f}"


def render(report: dict) -> str:
    """The report as plain text, verdict first."""
    overall, deltas = report["overall"], report["max_abs_dlogit"]
    bpb, kl = report["bits_per_byte"], report["kl"]
    lines = [VERDICTS[report["verdict"]].format(margin=f"{100 * report['margin']:g}")]
    if overall and overall["exact"]:
        lines.append("Shown by proof, not estimated: on text the two sides are the same function.")
    worse = [task["name"] for task in report["tasks"] if task["verdict"] == "degraded"]
    if worse and report["verdict"] != "degraded":
        lines.append(f"Not everywhere: degraded on {', '.join(worse)}.")
    lines += [
        "",
        f"Gate {report['gate']!r}, largest change of any logit when the adapter is switched on:",
        f"  text {deltas['text']:.4g}   text after an irrelevant image "
        f"{deltas['irrelevant_image']:.4g}   image questions {deltas['image']:.4g}",
        f"Prose ({report['provenance']['text']['tokens']} tokens): "
        f"bits per byte {bpb['base']:.4f} -> {bpb['bridge']:.4f}, "
        f"KL mean {kl['mean']:.4g}, p95 {kl['p95']:.4g}, max {kl['max']:.4g} nats, "
        f"same top token {100 * report['top1_agreement']:.2f}%",
        "",
    ]
    header = ("task", "n", "base %", "bridge %", "delta", "95% interval", "gained", "lost",
              "McNemar p", "visible drop", "verdict")  # fmt: skip
    rows = [header]
    for task in [*report["tasks"], *([{"name": "all", **overall}] if overall else [])]:
        low, high = task["ci95"]
        rows.append((
            task["name"], str(task["n"]), f"{100 * task['base']:.1f}",
            f"{100 * task['bridge']:.1f}", points(task["delta"]),
            "exact" if task["exact"] else f"[{points(low)}, {points(high)}]",
            str(task["flips"]["gained"]), str(task["flips"]["lost"]),
            f"{task['mcnemar_p']:.3g}", f"{100 * task['smallest_detectable_drop']:.1f}",
            task["verdict"],
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        first, *middle, last = (
            cell.ljust(width) if i in (0, len(header) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *middle, last]).rstrip())
    lines += [
        "",
        "Prose and tasks hold no image. After an image the adapter is at work, whatever the gate.",
        "delta, interval: points, bridge - base, same items; gained, lost: answers that flipped",
        "visible drop: the smallest loss this n shows with 80% power, at this rate of flips",
        "all: the tasks whose base is above chance, pooled; the verdict on top is theirs",
    ]
    return "\n".join(lines) + "\n"
