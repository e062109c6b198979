"""Run configuration: dataclasses, and the one loader of YAML and command line.

This is the one place that knows all parts. Parts are named by class (``class_path`` may be the
short name) with ``init_args``; misspelt keys are refused with the nearest valid one.
"""

import contextlib
import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_type_hints

from peft import PeftConfig
from torchvision.transforms.v2 import Transform

import mmpeft.connectors
import mmpeft.tasks
import mmpeft.tuners  # noqa: F401 (importing them makes their classes known by short name)
from mmpeft.config_errors import Known, bad_part, explain, no_mapping, unknown_key
from mmpeft.connector import ConnectorConfig
from mmpeft.encoder import VisionEncoderConfig
from mmpeft.layout import ResolutionConfig
from mmpeft.spec import from_spec
from mmpeft.speed import SpeedConfig
from mmpeft.stage import StageConfig
from mmpeft.task import Task
from mmpeft.yaml_file import read_yaml


@dataclass
class ModelConfig:
    """What the bridge is made of.

    Attributes:
        vision_encoder: the frozen vision encoder.
        connector: the trained connector.
        language_model: name or directory of a causal LM with a chat template, or starter:NAME.
        start_from: instead of these three, a bridge (run, checkpoint or hub name; see ``mmpeft
            import``) whose parts and trained weights the run starts from.
        revision: revision of the language model on the hub.
        dtype: floating type of the frozen language model; null is float32, or that of start_from.
        adapter: peft config for the language model; null trains the connector alone, or the
            adapter that start_from has.
        rank: rank of the adapter, instead of its ``r``; all else of it stays, lora_alpha too. auto
            looks for one before stage instruct, see ``rank_search``.
        gate: where the adapter acts: none (everywhere), sample (only rows with an image),
            image_tokens (only image positions) or after_image (from the first image on); null is
            none, or that of start_from.
        resolution: how the size and shape of a picture are served, and its budget of tokens.
        chat_template: packaged chat template or a jinja file; null takes the language model's own,
            or that of start_from.
    """

    vision_encoder: VisionEncoderConfig | None = None
    connector: ConnectorConfig | None = None
    language_model: str | None = None
    start_from: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    adapter: PeftConfig | None = None
    rank: Literal["auto"] | int | None = None
    gate: Literal["none", "sample", "image_tokens", "after_image"] | None = None
    resolution: ResolutionConfig = field(default_factory=ResolutionConfig)
    chat_template: str | None = None

    def __post_init__(self):
        if self.rank == "auto":
            of_rank(self.adapter, 1)  # it must have one
        elif self.rank is not None:
            self.adapter = of_rank(self.adapter, self.rank)
        parts = ("vision_encoder", "connector", "language_model")
        if self.start_from is None:
            if missing := [name for name in parts if getattr(self, name) is None]:
                raise ValueError(
                    f"model lacks {', '.join(missing)}; set it, or model.start_from to a bridge."
                )
            return
        own = [name for name in (*parts, "revision") if getattr(self, name) is not None]
        own += ["resolution"] if self.resolution != ResolutionConfig() else []
        if own:
            raise ValueError(
                f"model.start_from brings the parts of {self.start_from}; leave out "
                f"{', '.join(own)}."
            )


def of_rank(adapter: PeftConfig | None, rank: int) -> PeftConfig:
    """The adapter with another rank. ``lora_alpha`` stays, as in LoRA's paper (2106.09685, 4.1).

    Raises:
        ValueError: it has no rank that could be set.
    """
    name = type(adapter).__name__
    if rank < 1:
        raise ValueError(f"model.rank is {rank}; it must be 1 or more, auto or null.")
    if not hasattr(adapter, "r") or name in SETS_NO_RANK:
        reason = SETS_NO_RANK.get(name, "has no rank r")
        raise ValueError(
            f"model.rank is set, but "
            f"{f'adapter {name} {reason}' if adapter else 'there is no model.adapter'}; set "
            "model.rank to null."
        )
    for option in ("rank_pattern", "rank"):  # the latter is DyLoRA's
        if getattr(adapter, option, None):
            raise ValueError(f"model.rank and the adapter's {option} set ranks; leave one out.")
    return dataclasses.replace(adapter, r=rank)


SETS_NO_RANK = {
    "AdaLoraConfig": "moves ranks from init_r to target_r while it trains",
    "OFTConfig": "counts blocks by r",
    "RandLoraConfig": "has fewer weights the larger its r",
}


@dataclass
class SourceConfig:
    """A part of a mixture.

    Attributes:
        task: the task whose train split is used.
        weight: its share of the samples, in proportion to the other sources' weights; null (for
            all of them) shows every row once a pass.
    """

    task: Task
    weight: float | None = None

    def __post_init__(self):
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(
                f"data.mixture: the weight of task {self.task.name} is {self.weight}; it must be "
                "above 0. Leave out a source that is not wanted."
            )


@dataclass
class DataConfig:
    """What it learns from.

    Attributes:
        task: the task whose train split is used, and which is scored. With a mixture, one of its
            tasks; null is then the first.
        mixture: several sources to learn from by weight, as [{task: ..., weight: 3}, {task: ...,
            weight: 1}]; null is task alone. A pass has as many samples as all sources together.
            What is held out is of task, and so is what a rank is looked for with.
        align: the task of stage align where it is another (captions before chats, as in LLaVA);
            null is task.
        max_length: longest sample in tokens; null is the language model's context. Longer chats
            are an error, never cut.
        chats_per_sample: chats about one image that share its tokens in one training row.
        fraction: share of the rows of every task but replay that is used, above 0 and up to 1; with
            several chats a sample, of the images with all their chats. Drawn by the seed; of one
            seed a smaller share is part of every larger one.
        replay: a task whose text rows are mixed into stage instruct, so that the adapter keeps
            the LLM's words (see ``mmpeft replay``); null mixes in none. Under a gate text
            never reaches the adapter: then it is refused, or read for a start by corda kpm alone.
        replay_share: share of the samples (not of their tokens) that are replay, between 0 and 1.
        start_samples: samples that an adapter's start out of data (init_lora_weights eva or corda)
            is made from.
        augmentation: transforms of training pictures, as [{class_path: RandomHorizontalFlip}]; any
            Transform of torchvision.transforms.v2, or your own, from PIL image to PIL image. Every
            picture is then encoded each time (no feature cache). null changes nothing.
        on_bad_row: a row that cannot be learned from (no JSON, roles out of order, a picture that
            cannot be read, too long) stops the run, or is passed over (skip), its place taken by
            the next good row of its task. Rows passed over are listed in bad_rows.jsonl.
        max_bad_rows: with skip, more different bad rows than this stop the run.
        check_rows: rows of each task, drawn by the seed, that are tried before training begins; the
            others are when they are drawn. 0 tries none.
    """

    task: Task | None = None
    mixture: list[SourceConfig] | None = None
    align: Task | None = None
    max_length: int | None = None
    chats_per_sample: int = 1
    fraction: float = 1.0
    replay: Task | None = None
    replay_share: float = 0.25
    start_samples: int = 256
    augmentation: list[Transform] | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_bad_rows: int = 100
    check_rows: int = 64

    def __post_init__(self):
        for name, low in (
            ("start_samples", 1), ("max_bad_rows", 1), ("check_rows", 0), ("chats_per_sample", 1),
            ("max_length", 1),
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"data.{name} is {value}; it must be {low} or more.")
        self._choose_task()
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"data.fraction is {self.fraction}; it must lie above 0 and be 1 or less."
            )
        if not 0 < self.replay_share < 1:
            raise ValueError(
                f"data.replay_share is {self.replay_share}; it must lie above 0 and below 1. "
                "Set data.replay to null to train without replay."
            )

    @property
    def streams(self) -> bool:
        """Whether the rows of any task are read one behind the other."""
        tasks = [self.task, self.align, self.replay, *(one.task for one in self.mixture or ())]
        return any(task is not None and task.streaming for task in tasks)

    def _choose_task(self):
        if self.mixture is None:
            if self.task is None:
                raise ValueError("data.task is missing; name a task, or several as data.mixture.")
            return
        if not self.mixture:
            raise ValueError("data.mixture is empty; name its sources, or set it to null.")
        if len({source.weight is None for source in self.mixture}) > 1:
            raise ValueError("data.mixture: give every source a weight, or none.")
        tasks = [source.task for source in self.mixture]
        if self.task is None:
            self.task = tasks[0]
        elif self.task not in tasks:
            raise ValueError(
                f"data.task {self.task.name} is no source of data.mixture, so it would not be "
                "learned; add it there, or leave out data.task."
            )


@dataclass
class RetentionConfig:
    """Text skills while training: a mini-suite every few steps of stage instruct.

    The loss of text is how many points of accuracy the bridge is behind its base on the suite, in
    the worst of the modes; the vision score is measured on training rows that are held out.

    Attributes:
        every_steps: steps between two measurements.
        suite: lm-eval group or task; its tasks that generate are left out.
        include_path: folder with YAML files of further tasks.
        samples: items of each task; null takes all.
        modes: text, with_image, after_image. Under gate sample, text cannot change.
        vision_samples: training rows held out for the vision score.
        max_drop: largest loss of text (a share: 0.02 is two points) of a checkpoint kept as best.
        stop: end training when a larger loss is certain (one-sided 95%).
    """

    every_steps: int = 100
    suite: str = "embedded"
    include_path: str | None = None
    samples: int | None = 50
    modes: list[Literal["text", "with_image", "after_image"]] = field(
        default_factory=lambda: ["text"]
    )
    vision_samples: int = 100
    max_drop: float = 0.02
    stop: bool = False

    def __post_init__(self):
        for name, low in (("every_steps", 1), ("vision_samples", 1), ("max_drop", 0)):
            if getattr(self, name) < low:
                raise ValueError(
                    f"retention.{name} is {getattr(self, name)}; it must be {low} or more."
                )
        if not self.modes:
            raise ValueError("retention.modes is empty; name at least one, for example [text].")


@dataclass
class RankSearchConfig:
    """How ``model.rank: auto`` looks for a rank: by successive halving, see :mod:`mmpeft.rank`.

    Attributes:
        candidates: the ranks to try.
        steps: steps that the last ones left are trained; null is a quarter of stage instruct.
        validation: samples held out of the search's training, in whole groups where the
            task knows some (messages takes rows as single); at least so many.
    """

    candidates: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32, 64])
    steps: int | None = None
    validation: int = 64

    def __post_init__(self):
        if len(set(self.candidates)) < 2 or min(self.candidates) < 1:
            raise ValueError(
                f"rank_search.candidates is {self.candidates}; name two ranks or more, from 1 on."
            )
        for name in ("steps", "validation"):
            if (value := getattr(self, name)) is not None and value < 2:
                raise ValueError(f"rank_search.{name} is {value}; it must be 2 or more.")


STAGES = ("align", "instruct")


@dataclass
class RunConfig:
    """A whole run.

    Attributes:
        output_dir: the run folder; must not exist yet, unless the run is resumed.
        model: what the bridge is made of.
        data: what it learns from.
        align: first stage, trains the connector alone; null skips it.
        instruct: second stage, trains connector and adapter; null skips it.
        retention: watch text skills during stage instruct; null does not.
        rank_search: how ``model.rank: auto`` looks for a rank.
        speed: what is skipped because its result is known.
        seed: seeds initialisation, shuffling and dropout.
    """

    output_dir: str
    model: ModelConfig
    data: DataConfig
    align: StageConfig | None = None
    instruct: StageConfig | None = None
    retention: RetentionConfig | None = None
    rank_search: RankSearchConfig = field(default_factory=RankSearchConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    seed: int = 0

    def __post_init__(self):
        if self.align is None and self.instruct is None:
            raise ValueError("there is no stage to train; set align, instruct or both.")
        if self.speed.feature_cache == "on" and self.data.augmentation:
            raise ValueError(
                "speed.feature_cache is on, but data.augmentation shows each picture differently "
                "every time; set one of them to null or off."
            )
        if self.data.streams:
            self._check_stream()
        if self.model.rank == "auto" and self.instruct is None:
            raise ValueError("model.rank is auto, but there is no stage instruct to find it for.")
        for name, part in (("data.replay", self.data.replay), ("retention", self.retention)):
            adapter = self.model.adapter or self.model.start_from
            if part is not None and None in (adapter, self.instruct):
                raise ValueError(
                    f"{name} is about the adapter in stage instruct; set model.adapter and "
                    f"instruct, or set {name} to null."
                )

    def _check_stream(self):
        """Refuse beside a stream what needs rows by number, or how many they are."""
        for name, is_set, off in (
            ("data.mixture", self.data.mixture, "null"),
            ("data.replay", self.data.replay, "null"),
            ("data.chats_per_sample", self.data.chats_per_sample > 1, "1"),
            ("data.fraction", self.data.fraction < 1, "1"),
            ("retention", self.retention, "null"),
            ("model.rank", self.model.rank == "auto", "a number"),
            ("speed.feature_cache", self.speed.feature_cache == "on", "auto or off"),
        ):
            if is_set:
                raise ValueError(
                    f"{name} needs rows by number, and streaming reads them one behind the other; "
                    f"set {name} to {off}, or streaming to false."
                )
        tasks = {"align": self.data.align or self.data.task, "instruct": self.data.task}
        for name in STAGES:
            stage = getattr(self, name)
            if stage is None or not tasks[name].streaming:
                continue
            if stage.max_steps <= 0:
                raise ValueError(f"{name}.max_steps is missing; a stream has no end, so set it.")
            if (order := stage.train_sampling_strategy) != "random":
                raise ValueError(
                    f"{name}.train_sampling_strategy is {order}, but the order of a stream is that "
                    "of shuffle_buffer (1: in order); leave it out."
                )

    def trained_parts(self, stage: str) -> dict[str, bool]:
        """What a stage trains: ``{"connector", "adapter"}``."""
        frozen = getattr(self, stage).freeze_connector
        return {"connector": not frozen, "adapter": stage == "instruct"}


def parser(cls: type = RunConfig):
    """The jsonargparse parser of a configuration dataclass."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(
        subclasses_enabled=list(_BASES.values()), instantiate_subclass_spec_in_any=False
    )
    result = ArgumentParser(prog="mmpeft train", exit_on_error=False, allow_abbrev=False)
    result.add_argument("--config", action="config", help="YAML recipe")
    result.add_class_arguments(cls, as_group=False)
    return result


def load(path, overrides: list[str] = ()) -> tuple[RunConfig, str]:
    """Read a YAML recipe and command-line overrides.

    Returns:
        the configuration and its resolved form as YAML.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown key or part, or a value of the wrong type; one line, with the
            nearest valid name.
    """
    recipe = read_yaml(path, "recipe")
    words = ["--config", str(path), *_replacing(overrides, recipe)]
    return _parsed(RunConfig, recipe, path, _SECTIONS, lambda own: own.parse_args(words))


def _replacing(overrides: list[str], recipe: dict) -> list[str]:
    """Overrides by which a part of another class than the recipe's has that class's defaults.

    jsonargparse would keep what the recipe sets of the options that both classes have; it still
    does where ``class_path`` alone is set.
    """
    words = []
    for number, word in enumerate(overrides):
        option, given, value = word.partition("=")
        key = option.removeprefix("--")
        section, _, name = key.partition(".")
        if name in _BASES and not any(before.startswith(f"--{key}") for before in words):
            value = value if given else "".join(overrides[number + 1 : number + 2])
            was = (recipe.get(section) or {}).get(name)
            if _class_name(was) != _class_name(value):
                words += [f"--{key}", "null"]
        words.append(word)
    return words


def _class_name(part) -> str | None:
    """Of a part as a recipe or a command line has it, without its module."""
    import yaml

    with contextlib.suppress(yaml.YAMLError):
        part = yaml.safe_load(part) if isinstance(part, str) else part
    path = part.get("class_path") if isinstance(part, dict) else part
    return path.rpartition(".")[2] if isinstance(path, str) else None


def from_mapping(cls: type, mapping: dict, where, sections: dict | None = None):
    """A configuration dataclass of what a YAML file holds.

    Args:
        where: what an error message begins with.
        sections: the dataclasses that its keys come from, by the prefix of the key; those of a
            recipe by default.

    Raises:
        ValueError: as :func:`load`.
    """
    sections = _SECTIONS if sections is None else sections
    return _parsed(cls, mapping, where, sections, lambda own: own.parse_object(mapping))[0]


def _parsed(cls: type, mapping: dict, where, sections: dict, parse) -> tuple:
    """An instance and its resolved form."""
    from jsonargparse import ArgumentError, Namespace

    if problem := bad_part(mapping):
        raise ValueError(f"{where}: {problem}")
    run_parser = parser(cls)
    try:
        with warnings.catch_warnings():
            # the resolved recipe spells out every default, of which peft then warns
            warnings.filterwarnings("ignore", message=".*loftq_config")
            namespace = parse(run_parser)
            # of these mistakes jsonargparse says nothing, or nothing that helps
            for key in _unknown(mapping, namespace):
                raise ValueError(f"{where}: {unknown_key(key, _known(sections))}")
            for key in _sections_of(cls):
                if not isinstance(value := namespace.get(key), Namespace):
                    raise ValueError(f"{where}: {no_mapping(key, value)}")
            resolved = run_parser.dump(namespace)
            parts = vars(run_parser.instantiate(namespace))
            parts.pop("config", None)
            return cls(**parts), resolved
    except ArgumentError as error:
        raise ValueError(f"{where}: {explain(str(error), _known(sections))}") from None
    except ValueError as error:
        if not str(error).startswith("Does not validate"):
            raise
        raise ValueError(f"{where}: {explain(str(error), _known(sections))}") from None


def _unknown(mapping: dict, namespace, prefix: str = ""):
    """The dotted keys of a mapping that hold nothing and are not in what it was parsed into."""
    for key, value in mapping.items():
        if value == {} and key not in namespace:
            yield f"{prefix}{key}"
        elif isinstance(value, dict) and isinstance(below := namespace.get(key), type(namespace)):
            yield from _unknown(value, below, f"{prefix}{key}.")


def _sections_of(cls: type, prefix: str = ""):
    """The dotted keys of a configuration that are sections, and none of them null."""
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield f"{prefix}{name}"
            yield from _sections_of(kind, f"{prefix}{name}.")


def _known(sections: dict) -> Known:
    return Known(
        sections={prefix: _keys(cls) for prefix, cls in sections.items()},
        options={c.__name__: _keys(c) for c in _all_parts() if dataclasses.is_dataclass(c)},
        classes={name: [c.__name__ for c in _subclasses(base)] for name, base in _BASES.items()},
    )


_SECTIONS = {
    "align.": StageConfig, "instruct.": StageConfig, "retention.": RetentionConfig,
    "data.mixture.": SourceConfig, "data.": DataConfig,
    "speed.": SpeedConfig, "rank_search.": RankSearchConfig,
    "model.resolution.": ResolutionConfig, "model.": ModelConfig, "": RunConfig,
}  # fmt: skip
_BASES = {
    "vision_encoder": VisionEncoderConfig,
    "connector": ConnectorConfig,
    "adapter": PeftConfig,
    "task": Task,
    "align": Task,
    "replay": Task,
    "augmentation": Transform,
}


def _subclasses(cls):
    return [s for direct in cls.__subclasses__() for s in (direct, *_subclasses(direct))]


def _all_parts():
    return [cls for base in _BASES.values() for cls in (base, *_subclasses(base))]


def _keys(*classes) -> set[str]:
    return {f.name for c in classes if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)}


def task_of_run(run) -> Task | None:
    """The task a run was trained on; ``None`` for a bare checkpoint folder."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return None
    data = read_yaml(path, "config").get("data")
    if data is None:
        raise ValueError(f"{path} has no key data; it is not as training wrote it.")
    return from_spec(data.get("task") or data["mixture"][0]["task"], Task)
