"""The data sets of a recipe, stage by stage."""

import dataclasses
import random
import sys
from dataclasses import dataclass

from tqdm import tqdm

from mmpeft.bad_rows import BadRows
from mmpeft.config import RunConfig
from mmpeft.data import ConversationDataset
from mmpeft.language_model import branch_limit
from mmpeft.mixture import Mixture, shared_out, with_replay
from mmpeft.starts import preserves
from mmpeft.streaming import FIRST, StreamDataset
from mmpeft.task import Task


@dataclass
class TrainingData:
    """
    Attributes:
        vision: rows of the recipe's task; some may be held out.
        align: what stage align learns from: ``data.align`` where there is one, else the mixture's
            sources with pictures, else ``vision``.
        replay: rows of ``data.replay``, or ``None``.
        instruct: what stage instruct learns from: the mixture or ``vision``, with the replay mixed
            in where the gate lets it through.
        sources: every data set that some stage reads, once.
        bad_rows: what was passed over of any of them.
    """

    vision: ConversationDataset
    align: ConversationDataset | Mixture
    replay: ConversationDataset | None
    instruct: ConversationDataset | Mixture
    sources: list[ConversationDataset]
    bad_rows: BadRows

    @classmethod
    def load(cls, model, processor, config: RunConfig) -> "TrainingData":
        """Open them, and try ``data.check_rows`` rows of each.

        Raises:
            ValueError: a bad row, or data that this LLM or connector cannot learn from.
        """
        data, size = config.data, config.data.chats_per_sample
        limit = branch_limit(model) if size > 1 else None
        bad_rows = BadRows(data.max_bad_rows if data.on_bad_row == "skip" else None)

        def dataset(task):
            replayed = task is data.replay
            scored = reads_the_same(task, data.task)
            watched = config.retention if scored else None
            kind = StreamDataset if task.streaming else ConversationDataset
            return kind(
                task, "train", processor, 1 if replayed else size, seed=config.seed,
                branch_limit=limit, held_out=watched.vision_samples if watched else 0,
                augmentation=data.augmentation, bad_rows=bad_rows,
                fraction=1.0 if replayed else data.fraction,
            )  # fmt: skip

        parts = data.mixture or []
        mixed = [dataset(source.task) for source in parts]
        vision = next((own for own in mixed if own.task == data.task), None)
        vision = vision or dataset(data.task)
        weights = [source.weight for source in parts]
        rows = mixture_of(mixed, weights, config.seed) if mixed else vision
        if data.align is not None and config.align is not None:
            align = dataset(data.align)
        elif mixed and config.align is not None:
            seeing = [(own, w) for own, w in zip(mixed, weights, strict=True) if has_pictures(own)]
            align = mixture_of(*zip(*seeing, strict=True), config.seed) if seeing else rows
        else:
            align = rows
        replay = None if data.replay is None else dataset(data.replay)
        instruct = rows
        if replay is not None and teaches(replay, config, model.config.gate):
            instruct = with_replay(rows, replay, data.replay_share, config.seed)
        read = {"align": align, "instruct": instruct}
        for stage in list(read):
            if getattr(config, stage) is None:
                del read[stage]
            elif isinstance(read[stage], Mixture):
                print(f"stage {stage}: {read[stage]}", file=sys.stderr)
        sources = {id(own): own for rows in read.values() for own in parts_of(rows)}
        loaded = cls(vision, align, replay, instruct, list(sources.values()), bad_rows)
        for own in loaded.sources:
            try_rows(own, data.check_rows, config.seed)
        refuse_idle_parts(loaded, config, model.config.gate)
        return loaded


def reads_the_same(task: Task, other: Task) -> bool:
    """Whether two tasks train on the same rows, whatever they are scored on."""
    if hasattr(task, "test") and type(task) is type(other):
        task = dataclasses.replace(task, test=other.test)
    return task == other


def mixture_of(datasets, weights, seed: int) -> Mixture:
    """Data sets in shares by weight, as many samples a pass as they have together."""
    return Mixture(datasets, shared_out([len(own) for own in datasets], weights), seed)


def parts_of(rows: ConversationDataset | Mixture) -> list[ConversationDataset]:
    """What a data set is mixed of: itself, where it is no mixture."""
    return rows.datasets if isinstance(rows, Mixture) else [rows]


def try_rows(dataset: ConversationDataset, count: int, seed: int) -> None:
    """Make some samples, so that what is wrong shows before training begins.

    They are drawn with ``seed``; of a stream they are the first.

    Raises:
        ValueError: a bad row, where none may be passed over.
    """
    if isinstance(dataset, StreamDataset):
        drawn = dataset.first(count)
    else:
        drawn = random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))
        drawn.sort()
    for one in tqdm(drawn, desc=f"trying rows of {dataset.task.name}", delay=3, leave=False):
        dataset[one]


def has_pictures(dataset: ConversationDataset) -> bool:
    """Whether any row has one, of a stream any of the first; if none has, reads all rows, once."""
    if dataset.seeing is not None:
        return dataset.seeing
    stream = isinstance(dataset, StreamDataset)
    every = dataset.first(FIRST) if stream else range(len(dataset))
    every = tqdm(every, desc=f"pictures of {dataset.task.name}", delay=3, leave=False)
    dataset.seeing = any(dataset.pictures(one)[0] for one in every)
    return dataset.seeing


def teaches(replay: ConversationDataset, config: RunConfig, gate: str) -> bool:
    """Whether stage instruct can learn from replay, or else only the adapter's start reads it.

    Raises:
        ValueError: nothing does: it is text alone, which a gate keeps from the adapter.
    """
    if gate == "none" or config.instruct is None or has_pictures(replay):
        return True
    idle = f"under gate {gate!r} text never reaches the adapter and stays the base's to the bit"
    if preserves(config.model.adapter):
        print(f"data.replay is read for the adapter's start alone: {idle}.", file=sys.stderr)
        return False
    raise ValueError(
        f"data.replay has no picture, and {idle}, so nothing would be learned from it; leave it "
        "out, or set model.gate to none."
    )


def refuse_idle_parts(data: TrainingData, config: RunConfig, gate: str) -> None:
    """Refuse a stage in which something trains that only pictures reach, where no row has one.

    A task of text alone trains the adapter, everywhere; the vision parts then stay as they are.

    Raises:
        ValueError: it would train the connector, or the adapter behind a gate that never opens.
    """
    for stage, rows in (("align", data.align), ("instruct", data.instruct)):
        if getattr(config, stage) is None:
            continue
        trains = config.trained_parts(stage)["connector"]
        own = [part for part in parts_of(rows) if part is not data.replay]
        own.sort(key=lambda part: not part.seeing)  # what is known to have some need not be read
        if (not trains and gate == "none") or any(map(has_pictures, own)):
            continue
        streamed = any(isinstance(part, StreamDataset) for part in own)
        none = f"none of the first {FIRST} rows" if streamed else "no row"
        none += f" of task {', '.join(part.task.name for part in own)} has a picture"
        if stage == "align":
            raise ValueError(f"stage align trains the connector, but {none}; set align to null.")
        if trains:
            raise ValueError(
                f"stage instruct trains the connector, but {none}; set instruct.freeze_connector: "
                "true."
            )
        raise ValueError(f"gate {gate} opens at pictures, but {none}; set model.gate: none.")
