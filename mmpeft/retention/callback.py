"""Retention while training: a few text items and a few pictures every so many steps."""

import json
import sys
from pathlib import Path

from transformers import TrainerCallback

from mmpeft import durable
from mmpeft.config import RetentionConfig
from mmpeft.evaluate import generate_replies
from mmpeft.retention.compare import compare_sides
from mmpeft.retention.report import check_modes, exchanges_of, photographs
from mmpeft.retention.sides import BridgeSides, evaluation
from mmpeft.retention.store import Store
from mmpeft.retention.suite import Suite


class RetentionCallback(TrainerCallback):
    """Logs `retention/vision` and `retention/MODE` (bridge - base, shares) beside the loss.

    `retention/vision` is the task's mean score, of the kind that `front.json` names as `metric`;
    this file in the run folder lists what was measured. `best/` is a whole checkpoint: the step
    with the best vision score among those whose loss of text stays within `max_drop`.

    Args:
        run: the run folder.
        task: the vision task; `rows` are training rows that training never sees.
    """

    def __init__(self, config: RetentionConfig, run: Path, model, processor, task, rows, seed: int):
        self.config, self.run, self.task, self.rows = config, Path(run), task, rows
        self.model, self.processor = model, processor
        self.suite = Suite(config.suite, config.include_path, config.samples, seed)
        self.chats = [task.messages(row) for row in rows]
        sides = BridgeSides(model, processor)
        modes = check_modes(config.modes, sides)
        pictures = photographs() if modes != ["text"] else []
        self.exchanges = {mode: exchanges_of(mode, pictures, self.chats) for mode in modes}
        self.base = Store(None, sides.setting("base"))
        self.trainer = None  # set when there is one
        path = self.run / "front.json"
        self.points = json.loads(path.read_text()) if path.is_file() else []
        self.kept = None  # the point whose weights are in best/, where it is to be measured again
        self.unmeasured: set[str] = set()  # modes that were said to tell nothing

    def on_train_begin(self, args, state, control, **kwargs):
        # resumed: what was measured behind the last complete checkpoint is measured again
        again = [point for point in self.points if point["step"] > state.global_step]
        self.kept = next((point for point in again if point["best"]), None)
        self.points = [point for point in self.points if point["step"] <= state.global_step]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.config.every_steps == 0:
            point = self.measure(state.global_step)
            self.trainer.log(
                {"retention/vision": point["vision"]}
                | {f"retention/{mode}": body["delta"] for mode, body in point["modes"].items()}
            )
            if self.config.stop and self.certain(point):
                print(
                    f"stopped at step {point['step']}: more than {self.config.max_drop:.1%} of the "
                    "text answers are certainly lost (retention.max_drop)",
                    file=sys.stderr,
                )
                control.should_training_stop = True

    def has_stopped(self, step: int) -> bool:
        """Whether it ended the stage at ``step`` or before."""
        ended = (one["step"] <= step and self.certain(one) for one in self.points)
        return self.config.stop and any(ended)

    def measure(self, step: int) -> dict:
        """One point of the front; keeps the checkpoint if it is the best so far."""
        with evaluation(self.model):
            replies = generate_replies(
                self.model, self.processor, [chat[:-1] for chat in self.chats],
                self.task.max_new_tokens, 64, None,
            )  # fmt: skip
        right = self.task.score(replies, self.rows)
        found = compare_sides(
            BridgeSides(self.model, self.processor), self.suite, self.exchanges, generated=False,
            control=False, stores={"base": self.base},
        )  # fmt: skip
        modes = {mode: {key: body["overall"][key] for key in ("delta", "bounds95", "n")}
                 for mode, body in found.modes.items() if body["overall"]}  # fmt: skip
        point = {
            "step": step, "metric": self.task.score_name, "vision": sum(right) / len(right),
            "modes": modes, "best": False,
        }  # fmt: skip
        self._say_unmeasured(point)
        if self.beats(point):
            for other in self.points:
                other["best"] = False
            point["best"] = True
            self._keep()
        self.points.append(point)
        durable.write(self.run / "front.json", json.dumps(self.points, indent=1) + "\n")
        return point

    def beats(self, point: dict) -> bool:
        """It may be kept, and sees better than all that might have been, and what `best/` holds."""
        if self.kept is not None and point["step"] >= self.kept["step"]:
            self.kept = None
        others = [other for other in self.points if self.within(other)]
        others += [] if self.kept is None else [self.kept]
        return self.within(point) and all(point["vision"] > other["vision"] for other in others)

    def within(self, point: dict) -> bool:
        """Every mode was measured, and none has lost more than `max_drop`."""
        measured = point["modes"].keys() >= self.exchanges.keys()
        return measured and all(
            -body["delta"] <= self.config.max_drop for body in point["modes"].values()
        )

    def _say_unmeasured(self, point: dict) -> None:
        """A mode in which the base is above chance in no task tells nothing; say so once."""
        for mode in self.exchanges:
            if mode in point["modes"] or mode in self.unmeasured:
                continue
            self.unmeasured.add(mode)
            print(
                f"retention: the base is above chance in no task of mode {mode}, so no step is "
                "kept as best; raise retention.samples, or leave the mode out of retention.modes.",
                file=sys.stderr,
            )

    def certain(self, point: dict) -> bool:
        """Some mode has lost more than `max_drop`, with one-sided 95% confidence."""
        return any(body["bounds95"][1] < -self.config.max_drop for body in point["modes"].values())

    def _keep(self) -> None:
        with durable.whole_folder(self.run / "best") as new:
            self.model.save_pretrained(new)
            self.processor.save_pretrained(new)
