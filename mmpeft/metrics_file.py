"""What a run has logged, as a file and as a picture."""

import io
import json
from pathlib import Path

from transformers import TrainerCallback

from mmpeft import durable


class MetricsFile(TrainerCallback):
    """Keeps ``metrics.jsonl`` and ``loss.png`` of the run up to date."""

    def __init__(self, run: Path, stage: str):
        self.run, self.stage = run, stage

    def write(self, state):
        """Everything that was logged, and the picture of it."""
        path = self.run / "metrics.jsonl"
        others = []
        if path.is_file():
            others = [r for r in map(json.loads, path.open()) if r["stage"] != self.stage]
        rows = others + [{"stage": self.stage, **entry} for entry in state.log_history]
        durable.write(path, "".join(json.dumps(row) + "\n" for row in rows))
        draw_loss(rows, self.run / "loss.png")

    def on_save(self, args, state, control, **kwargs):
        self.write(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.write(state)


def draw_loss(rows: list[dict], path: Path) -> None:
    """The loss of every stage over its steps, one after the other; text skills below it."""
    from matplotlib.figure import Figure

    watched = sorted({key for row in rows for key in row if key.startswith("retention/")})
    figure = Figure(figsize=(7, 6 if watched else 3.5), layout="constrained")
    axes, *below = figure.subplots(2 if watched else 1, sharex=True, squeeze=False).flat
    offset = 0
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        points = [(r["step"], r["loss"]) for r in own if "loss" in r]
        for key in watched:
            seen = [(offset + r["step"], 100 * r[key]) for r in own if key in r]
            if seen:
                below[0].plot(*zip(*seen, strict=True), "o-", label=key.removeprefix("retention/"))
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot([offset + step for step in steps], losses, label=stage)
            offset += steps[-1]
    axes.set(ylabel="loss, with penalties\n(nats per supervised token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if offset:
        axes.legend()
    if watched:
        below[0].set(ylabel="vision: score, %\ntext: bridge - base, points")
        below[0].axhline(0, color="grey", linewidth=0.8)
        below[0].grid(alpha=0.3)
        below[0].legend()
    figure.axes[-1].set(xlabel="step")
    figure.savefig(picture := io.BytesIO(), dpi=120, format="png")
    durable.write(path, picture.getvalue())
