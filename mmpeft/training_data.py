"""The data sets of a recipe, stage by stage."""

import sys
from dataclasses import dataclass

from mmpeft.config import RunConfig
from mmpeft.data import ConversationDataset, WithReplay
from mmpeft.language_model import branch_limit


@dataclass
class TrainingData:
    """
    Attributes:
        vision: rows of the recipe's task.
        align: what stage align learns from: ``data.align`` where there is one, else ``vision``.
        replay: rows of ``data.replay``, or ``None``.
        instruct: what stage instruct learns from: ``vision``, with the replay mixed in.
        sources: every data set that some stage reads, once, replay apart.
    """

    vision: ConversationDataset
    align: ConversationDataset
    replay: ConversationDataset | None
    instruct: ConversationDataset | WithReplay
    sources: list[ConversationDataset]

    @classmethod
    def load(cls, model, processor, config: RunConfig) -> "TrainingData":
        """Read and check them.

        Raises:
            ValueError: a bad row, or data that this LLM or connector cannot learn from.
        """
        data, size = config.data, config.data.chats_per_sample
        limit = branch_limit(model) if size > 1 else None

        def dataset(task, chats_per_sample=size, held_out=0):
            return ConversationDataset(
                task, "train", processor, chats_per_sample, held_out=held_out, seed=config.seed,
                branch_limit=limit, augmentation=data.augmentation,
            )  # fmt: skip

        vision = dataset(
            data.task, held_out=config.retention.vision_samples if config.retention else 0
        )
        another = data.align is not None and config.align is not None
        align = dataset(data.align) if another else vision
        replay, instruct = None, vision
        if data.replay is not None:
            replay = dataset(data.replay, chats_per_sample=1)
            instruct = WithReplay(vision, replay, data.replay_share)
            print(instruct, file=sys.stderr)
        read = [align] if config.align is not None else []
        read += [vision, replay] if config.instruct is not None else []
        sources = {id(found): found for found in read if found is not None}
        loaded = cls(vision, align, replay, instruct, list(sources.values()))
        refuse_idle_parts(loaded, config, model.config.gate)
        return loaded


def refuse_idle_parts(data: TrainingData, config: RunConfig, gate: str) -> None:
    """Refuse a stage in which something trains that only pictures reach, where no row has one.

    A task of text alone trains the adapter, everywhere; the vision parts then stay as they are.

    Raises:
        ValueError: it would train the connector, or the adapter behind a gate that never opens.
    """
    for stage, rows in (("align", data.align), ("instruct", data.vision)):
        if getattr(config, stage) is None or any(rows.pictures(i)[0] for i in range(len(rows))):
            continue
        none = f"no row of task {rows.task.name} has a picture"
        if stage == "align":
            raise ValueError(f"stage align trains the connector, but {none}; set align to null.")
        if config.trained_parts(stage)["connector"]:
            raise ValueError(
                f"stage instruct trains the connector, but {none}; set instruct.freeze_connector: "
                "true."
            )
        if gate != "none":
            raise ValueError(f"gate {gate} opens at pictures, but {none}; set model.gate: none.")
