"""``model.rank: auto``: the rank that a task needs, found by successive halving.

All candidates start from the same connector, data order and seed. They train for a few steps, the
better half by validation loss goes on for as many steps again and more, and so on (K. Jamieson, A.
Talwalkar 2016, arXiv 1502.07943). Of those trained longest, the smallest is chosen whose loss lies
within one standard error of the best: the one-standard-error rule (L. Breiman et al.,
"Classification and Regression Trees", 1984, section 3.4.3), here on losses paired by sample, with
the error over groups of samples (see ``Task.group``). From half of the steps on the search also
ends where all that are left are so close. A candidate whose loss is not finite is dropped.

The validation samples are held out of the search alone: stage instruct learns from them later.
"""

import copy
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import SchedulerType, TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from mmpeft import durable
from mmpeft.config import RunConfig, of_rank
from mmpeft.data import ConversationDataset, Samples, hold_out, row_groups
from mmpeft.nonfinite import NonFinite
from mmpeft.retention.sides import evaluation
from mmpeft.train import train_stage
from mmpeft.trainer import total_steps

SCHEMA = "mmpeft.rank/1"
FILE = "rank_search.json"
SHARE = 4  # the search's longest training is this part of the stage's


def settle_rank(model, data, collator, config: RunConfig, cache) -> None:
    """Put an untrained adapter of the rank that the task needs on ``model``.

    A rank once found is kept in the run folder as ``rank_search.json`` (see docs/json.md), and not
    looked for again.

    Args:
        data: the :class:`~mmpeft.training_data.TrainingData`; candidates learn from ``vision``.

    Raises:
        ValueError: no candidate has a finite loss, or too few samples can be held out.
    """
    kept = Path(config.output_dir) / FILE
    if not kept.is_file():
        report = search(model, data.vision, len(data.instruct), collator, config, cache)
        durable.write(kept, json.dumps(report, indent=2) + "\n")
        print(render(report), file=sys.stderr)
    rank = json.loads(kept.read_text())["rank"]
    set_seed(config.seed)
    model.replace_adapter(of_rank(config.model.adapter, rank))


def search(model, dataset, samples: int, collator, config: RunConfig, cache) -> dict:
    """Train the candidates, and say which rank to take and why; the connector is left as it was.

    Args:
        dataset: what they learn from.
        samples: of a pass of stage instruct, whatever else is mixed into it.
    """
    settings, work = config.rank_search, Path(config.output_dir) / "rank_search"
    shutil.rmtree(work, ignore_errors=True)  # of a search that was interrupted
    learned, held_out = split(dataset, config)
    groups = groups_of(held_out)
    whole = total_steps(config.instruct, samples)
    steps = settings.steps or max(2, whole // SHARE)
    start = {key: value.clone() for key, value in model.connector.state_dict().items()}
    left, rungs, ladder = sorted(set(settings.candidates)), [], rung_steps(settings, steps)
    for number, until in enumerate(ladder):
        losses, seconds = {}, {}
        for rank in left:
            began = time.perf_counter()
            print(f"\nsearch for a rank: {rank}, to step {until}", file=sys.stderr)
            own = candidate(config, rank, until, steps)
            set_seed(config.seed)
            model.connector.load_state_dict(start)
            model.replace_adapter(own.model.adapter)
            watch = ValidationLoss(held_out)
            folder = work / f"r{rank}/stages/instruct"
            begun = durable.last_good(folder) if number else None
            try:
                train_stage(
                    model, learned, collator, own, "instruct", folder, begun, cache, [watch]
                )
            except NonFinite:
                watch.losses = np.full(len(held_out), np.nan)
            losses[rank], seconds[rank] = watch.losses, time.perf_counter() - began
        rungs.append(rung(until, losses, seconds, groups))
        near = [row["rank"] for row in rungs[-1]["tried"] if row["within_noise"]]
        if until == ladder[-1] or (len(near) == len(left) and until >= steps // 2):
            break
        left = rungs[-1]["kept"] = better_half(losses)
    model.connector.load_state_dict(start)
    shutil.rmtree(work, ignore_errors=True)
    finite = [row for row in rungs[-1]["tried"] if not row["diverged"]]
    best = min(finite, key=lambda row: row["loss"])["rank"]
    spent = sum(
        (r["steps"] - before) * len(r["tried"])
        for r, before in zip(rungs, [0, *(r["steps"] for r in rungs)], strict=False)
    )
    return {
        "schema": SCHEMA,
        "rank": min(near),
        "best": best,
        "reason": reason(min(near), best, near, len(finite)),
        "candidates": sorted(set(settings.candidates)),
        "validation_samples": len(held_out),
        "rungs": rungs,
        "steps": spent,
        "seconds": sum(row["seconds"] for r in rungs for row in r["tried"]),
        "share_of_stage": spent / whole,
    }


def split(dataset: ConversationDataset, config: RunConfig) -> tuple:
    """What the search learns from and what it is judged by; no group lies in both."""
    size, already = config.data.chats_per_sample, dataset.held_out
    count = config.rank_search.validation * size + len(already)
    drawn = hold_out(dataset.task, dataset.rows, count, config.seed)
    every = np.arange(len(dataset.rows))
    groups = every if size == 1 else row_groups(dataset.task, dataset.rows)
    learned, held_out = copy.copy(dataset), copy.copy(dataset)
    learned.samples = Samples(groups, size, drawn)
    others = np.setdiff1d(every, np.setdiff1d(drawn, already))
    held_out.samples, held_out.augment = Samples(groups, size, others.tolist()), None
    return learned, held_out


def groups_of(held_out: ConversationDataset) -> np.ndarray:
    """Number of each sample's group, int64 ``(samples,)``.

    Raises:
        ValueError: there is one group alone, whose error could not be told.
    """
    groups = row_groups(held_out.task, held_out.rows)[[sample[0] for sample in held_out.samples]]
    if len(set(groups.tolist())) == 1:
        raise ValueError(
            f"all {len(groups)} samples held out for the rank search are of one group of task "
            f"{held_out.task.name}; raise rank_search.validation until there are two."
        )
    return groups


def rung_steps(settings, steps: int) -> list[int]:
    """Steps from the start at which halves are dropped: doubling up to ``steps``."""
    halvings = max(1, math.ceil(math.log2(len(set(settings.candidates)))))
    return sorted({max(1, steps // 2**i) for i in range(halvings)})


def candidate(config: RunConfig, rank: int, until: int, steps: int) -> RunConfig:
    """The run's configuration for a part of one candidate's training.

    Its learning rate is constant after warm-up, so that it does not depend on where a part ends.
    """
    own = copy.copy(config)
    own.model, own.instruct, own.speed = map(
        copy.copy, (config.model, config.instruct, config.speed)
    )
    own.model.adapter = of_rank(config.model.adapter, rank)
    own.speed.compile = "off"
    stage = own.instruct
    stage.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
    stage.warmup_steps = min(stage.get_warmup_steps(steps), max(1, steps // 10))
    stage.max_steps = stage.save_steps = until
    stage.save_strategy, stage.save_total_limit = SaveStrategy.STEPS, 1
    return own


class ValidationLoss(TrainerCallback):
    """At the end of training, the loss of each sample: nats a token, ``(samples,)``."""

    def __init__(self, dataset: ConversationDataset):
        self.dataset = dataset
        self.trainer = self.losses = None

    def on_train_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        with evaluation(trainer.model), trainer.compute_loss_context_manager():
            samples = tqdm(self.dataset, desc="held-out loss", unit="sample")
            batches = (trainer.data_collator([sample]) for sample in samples)
            losses = [trainer.model(**trainer._prepare_inputs(batch)).loss for batch in batches]
            self.losses = np.array([loss.item() for loss in losses])


def rung(
    steps: int, losses: dict[int, np.ndarray], seconds: dict[int, float], groups: np.ndarray
) -> dict:
    """What was measured at one number of steps.

    Args:
        losses: by rank, on the same samples ``(samples,)``.
        groups: number of each sample's group ``(samples,)``.

    Raises:
        ValueError: no loss is finite.
    """
    order = ranked(losses)
    if not order:
        raise ValueError(
            f"rank search: the loss of every candidate ({', '.join(map(str, losses))}) diverged "
            f"within {steps} steps; lower instruct.adapter_learning_rate."
        )
    tried = []
    for rank, own in losses.items():
        row = {"rank": rank, "diverged": not np.isfinite(own.mean()), "loss": None, "behind": None,
               "standard_error": None, "within_noise": False, "seconds": seconds[rank]}  # fmt: skip
        if not row["diverged"]:
            behind = own - losses[order[0]]
            row |= {"loss": float(own.mean()), "behind": float(behind.mean())}
            row["standard_error"] = standard_error(behind, groups)
            row["within_noise"] = row["behind"] <= row["standard_error"]
        tried.append(row)
    return {"steps": steps, "tried": tried, "kept": None}


def standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """Of their mean ``(n,)``, where values of a group may be alike; of single ones, the usual.

    The mean is taken as a ratio of sums over groups (W. Cochran, "Sampling Techniques", 3rd
    edition, 1977, chapter 6).
    """
    _, numbers = np.unique(groups, return_inverse=True)
    sums = np.bincount(numbers, values - values.mean())
    n = len(sums)
    return float(math.sqrt(n / (n - 1) * (sums**2).sum()) / len(values))


def ranked(losses: dict[int, np.ndarray]) -> list[int]:
    """Ranks by their mean loss, the lowest first; those that diverged are left out."""
    finite = [rank for rank, own in losses.items() if np.isfinite(own.mean())]
    return sorted(finite, key=lambda rank: losses[rank].mean())


def better_half(losses: dict[int, np.ndarray]) -> list[int]:
    """Ranks with the lower mean loss, at least two (the last two are compared by their noise).

    Fewer where others diverged.
    """
    return sorted(ranked(losses)[: max(2, math.ceil(len(losses) / 2))])


def reason(chosen: int, best: int, near: list[int], compared: int) -> str:
    """Why this rank, in words."""
    if compared == 1:
        return f"the loss of {best} alone did not diverge"
    if near == [best]:
        return f"the {compared} trained longest differ by more than noise, and {best} is the best"
    if chosen == best:
        return f"{best} is the best, and the smallest of those it cannot be told from ({near})"
    return (
        f"the best, {best}, is ahead of {chosen} by less than one standard error, so the smaller "
        "one is taken"
    )


def render(report: dict) -> str:
    """The search as a table."""
    lines = [
        f"rank search on {report['validation_samples']} held-out samples",
        f"{'steps':>6}{'rank':>6}{'loss':>9}{'behind the best':>22}{'seconds':>9}",
    ]
    for one in report["rungs"]:
        for row in one["tried"]:
            loss, behind = "diverged", ""
            if not row["diverged"]:
                loss = f"{row['loss']:.4f}"
                behind = f"{row['behind']:.4f} ± {row['standard_error']:.4f}"
            lines.append(
                f"{one['steps']:>6}{row['rank']:>6}{loss:>9}{behind:>22}"
                f"{row['seconds']:>9.1f}"
                + ("" if one["kept"] is None or row["rank"] in one["kept"] else "  dropped")
            )
    lines.append(
        f"rank {report['rank']}: {report['reason']}. It cost {report['steps']} steps "
        f"({report['share_of_stage']:.0%} of stage instruct) and {report['seconds']:.0f} s."
    )
    return "\n".join(lines)
