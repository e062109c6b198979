"""Accuracy against training minutes, from the checkpoints a run has kept.

    mmpeft train configs/quickstart.yaml --output_dir runs/curve --instruct.save_total_limit null
    python benchmarks/accuracy_curve.py runs/curve --task easy_vqa --out docs/accuracy.png

Minutes count from the start of the run to the moment a checkpoint was written, so the run must not
have been interrupted.
"""

import argparse
import random
from pathlib import Path

from matplotlib.figure import Figure

from mmpeft import BridgeForConditionalGeneration, BridgeProcessor
from mmpeft.durable import CHECKSUMS
from mmpeft.evaluate import generate_replies
from mmpeft.task import all_tasks


def measure(checkpoint: Path, task, rows) -> dict[str, float]:
    """Accuracy by question type, and over all."""
    model = BridgeForConditionalGeneration.from_pretrained(checkpoint)
    processor = BridgeProcessor.from_model(model)
    prompts = [task.messages(row)[:-1] for row in rows]
    replies = generate_replies(model, processor, prompts, task.max_new_tokens, 64, checkpoint.name)
    by_type = {"all": task.score(replies, rows)}
    for row, right in zip(rows, by_type["all"], strict=True):
        by_type.setdefault(task.question_type(row), []).append(right)
    return {kind: sum(right) / len(right) for kind, right in by_type.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder whose checkpoints were all kept")
    parser.add_argument("--task", default="easy_vqa", help="task to score (easy_vqa)")
    parser.add_argument("--samples", type=int, default=500, help="rows (500)")
    parser.add_argument("--out", type=Path, default=Path("accuracy.png"), help="picture to write")
    arguments = parser.parse_args()

    task = all_tasks()[arguments.task]()
    rows = random.Random(0).sample(task.rows("test"), arguments.samples)
    began = (arguments.run / "config.yaml").stat().st_mtime
    markers = sorted(
        arguments.run.glob(f"stages/instruct/checkpoint-*/{CHECKSUMS}"),
        key=lambda marker: marker.stat().st_mtime,
    )
    minutes = [(marker.stat().st_mtime - began) / 60 for marker in markers]
    points = []
    for minute, marker in zip(minutes, markers, strict=True):
        points.append(measure(marker.parent, task, rows))
        shares = "  ".join(f"{kind} {share:.1%}" for kind, share in points[-1].items())
        print(f"{minute:5.1f} min  {marker.parent.name}: {shares}", flush=True)

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind in points[0]:
        width = 2.5 if kind == "all" else 1.2
        axes.plot(minutes, [p[kind] for p in points], marker="o", linewidth=width, label=kind)
    axes.set(xlabel="training minutes", ylabel=f"accuracy on {task.name}", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
