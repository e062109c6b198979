"""Which questions are asked: lm-eval tasks, ours or anybody's, and what each answer was worth."""

import contextlib
import hashlib
import json
import logging
import math
import random
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from mmpeft.config_errors import did_you_mean
from mmpeft.retention.engine import SideLM
from mmpeft.retention.modes import without_mark
from mmpeft.retention.sides import RetentionError

UNREACHABLE = (ConnectionError, DatasetsError, HfHubHTTPError, EntryNotFoundError)
NORMALISED = "acc_norm"  # lm-eval's accuracy by log-likelihood per character


@dataclass
class Item:
    """What one side made of one document. `score` is 0 or 1, or graded between them."""

    task: str
    doc_id: int
    sha256: str  # of the document and the words of every prompt made from it
    prompt: str
    score: float
    loglikelihoods: list[float] | None = None
    choices: list[str] | None = None
    gold: int | str | None = None
    chosen: int | None = None
    reply: str | None = None
    reply_ids: list[int] | None = None
    finished: bool | None = None
    cluster: str = ""
    source: int | None = None  # the document of another task that asks the same
    units: float = 1.0  # of running text, that its score is the mean of


class Suite:
    """Tasks of lm-eval with a seeded choice of their documents.

    Args:
        names: groups or tasks.
        folder: where their YAML files are; None: those that come with mmpeft, then lm-eval's own.
        samples: how many documents of each task to use (None: all).
        seed: which ones.
        data_dir: folder of local data, for tasks that read it (`standard_local`).

    Raises:
        ValueError: an unknown name, an empty suite, or data that cannot be had.
    """

    def __init__(
        self, names: str | list[str] = "embedded", folder: str | Path | None = None,
        samples: int | None = None, seed: int = 0, data_dir: str | Path | None = None,
    ):  # fmt: skip
        self.names = [names] if isinstance(names, str) else list(names)
        if not self.names:
            raise ValueError("no task is named: give a suite or at least one task")
        if samples is not None and samples < 1:
            raise ValueError(
                f"samples={samples}: use at least 1 item of each task, or None for all"
            )
        self.only: set[str] = set()  # tasks that were named out of a group that defines them
        self.groups: list[str] = []  # these groups, where they were not named themselves
        self.data = {} if data_dir is None else {"data_dir": str(Path(data_dir).absolute())}
        self.manager = self._manager(folder)
        tasks = self.load()
        self.indices = {
            name: choose(len(task.eval_docs), samples, f"{seed} {name}")
            for name, task in tasks.items()
        }
        if empty := [short(name) for name, chosen in self.indices.items() if not chosen]:
            raise ValueError(f"nothing to ask: {', '.join(empty)} has no documents")
        self.metadata = {short(name): task.config.metadata or {} for name, task in tasks.items()}
        self.kinds = {short(name): task.OUTPUT_TYPE for name, task in tasks.items()}
        self.errors = {  # metrics that count errors
            short(name): {m for m, better in task.higher_is_better().items() if better is False}
            for name, task in tasks.items()
        }
        self.skipped = [
            {"task": short(name), "reason": f"{len(left)} documents cannot be judged"}
            for name, task in tasks.items()
            if (left := (task.dataset or {}).get("excluded"))
        ]
        self.metrics: dict[str, str] = {}  # known when the first document is scored

    def _manager(self, folder) -> TaskManager:
        paths = [Path(str(files("mmpeft.tasks"))) / "retention"]
        if folder is not None:
            if not Path(folder).is_dir():
                raise ValueError(f"--include_path {folder} is no folder")
            paths.append(Path(folder))
        paths = [str(path) for path in paths]
        with quiet():
            # lm-eval's own tasks only when needed: scanning them takes longer than our whole suite
            manager = TaskManager(
                include_path=paths, include_defaults=False, metadata=self.data or None
            )
            inside = _inline(manager)
            self.only = {name for name in self.names if name in inside}
            groups = dict.fromkeys(inside[name] for name in self.names if name in inside)
            self.names = [name for name in self.names if name not in inside]
            self.groups = [name for name in groups if name not in self.names]
            if self._complete(manager):
                return manager
            manager = TaskManager(include_path=paths, metadata=self.data or None)
        known = [*manager.all_groups, *manager.all_tasks, *manager.all_tags]
        for name in self.names:
            if name not in known:
                raise ValueError(
                    f"unknown suite or task {name!r}.{did_you_mean(name, [*known, *inside])}"
                )
        return manager

    def _complete(self, manager: TaskManager) -> bool:
        """All names are known, and so is all that they are made of."""
        known = {*manager.all_groups, *manager.all_tasks}
        for name in [*self.names, *self.groups]:
            if name not in known:
                return False
            group = manager.task_index[name].cfg or {}
            parts = group.get("task")
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict) and _has_data(group | part):
                    continue
                if (part if isinstance(part, str) else part.get("task")) not in known:
                    return False
        return True

    def load(self) -> dict:
        """{name: lm-eval task}, read anew, so that a document that changes is noticed."""
        try:
            with quiet():
                whole = self.manager.load(self.names)["tasks"] if self.names else {}
                parts = self.manager.load(self.groups)["tasks"] if self.groups else {}
            only = {name: task for name, task in parts.items() if short(name) in self.only}
            return whole | only
        except ValueError:
            raise
        except Exception as error:  # lm-eval, datasets and the hub client raise many kinds
            named = ", ".join([*self.names, *self.only])
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error)
            if not isinstance(error, UNREACHABLE):
                raise ValueError(
                    f"{named} cannot be loaded ({type(error).__name__}: {reason}); "
                    "look at the YAML file of the task, its functions and its documents"
                ) from error
            raise ValueError(
                f"the data of {named} cannot be read: it is not on this machine "
                f"and cannot be had from the hub ({reason}). Fetch it once while online, or name a "
                "task that reads local files (--suite standard_local --data_dir FOLDER, or your "
                "own YAML with --include_path)."
            ) from error

    def ask(self, lm: SideLM, generated: bool = True) -> dict[str, list[Item]]:
        """What one side makes of every chosen document, in order of documents.

        `generated`: ask also the tasks that generate.
        """
        tasks = {
            name: task
            for name, task in self.load().items()
            if (generated or task.OUTPUT_TYPE != "generate_until")
            # running text has no place for a picture before it
            and (lm.mode.name == "text" or task.OUTPUT_TYPE != "loglikelihood_rolling")
        }
        found: dict[str, list[Item]] = {}
        if not lm.sides.chats:
            silent = [name for name in tasks if self.metadata[short(name)].get("chat")]
            silenced = [{"task": short(name), "reason": "the tokenizer has no chat template"}
                        for name in silent]  # fmt: skip
            self.skipped += [row for row in silenced if row not in self.skipped]
            tasks = {name: task for name, task in tasks.items() if name not in silent}
        for chat in (False, True):
            own = {
                name: task
                for name, task in tasks.items()
                if chat == (lm.mode.always_chat or bool(self.metadata[short(name)].get("chat")))
            }
            if own:
                found |= self._ask(lm, own, chat)
        return {short(name): found[short(name)] for name in tasks}

    def _ask(self, lm: SideLM, tasks: dict, chat: bool) -> dict[str, list[Item]]:
        with quiet():
            # never lm-eval's cache: its key leaves the model out, so the sides would share answers
            # and not its simple_evaluate: that starts a dozen processes to describe the machine
            for task in tasks.values():
                task.set_fewshot_seed(DEFAULT_OTHER_SEED)
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
            results = evaluate(
                lm=lm, task_dict={"tasks": tasks, "groups": {}}, log_samples=True,
                samples={name: self.indices[name] for name in tasks}, bootstrap_iters=0,
                apply_chat_template=chat, fewshot_as_multiturn=True,
            )  # fmt: skip
        found = {}
        for name, rows in results["samples"].items():
            first = rows[0]["filter"]  # several filters read the same reply in several ways
            places = {doc_id: place for place, doc_id in enumerate(self.indices[name])}
            items = [self._read(name, row, lm, places[row["doc_id"]])
                     for row in rows if row["filter"] == first]  # fmt: skip
            found[short(name)] = sorted(items, key=lambda item: item.doc_id)
        return found

    def _metric(self, task: str, row: dict) -> str:
        """The metric that counts: the task's `metadata: {metric: ...}`, else its first number.

        Raises:
            ValueError: it has none for a single document, or one that is better when it is lower.
        """
        wanted = self.metadata[task].get("metric")
        rolling = self.kinds[task] == "loglikelihood_rolling"
        kinds = tuple if rolling else (int, float)
        usable = [m for m in row["metrics"] if isinstance(row.get(m), kinds)]
        if wanted is not None and wanted not in usable:
            raise ValueError(f"task {task}: metadata names metric {wanted!r}; it has {usable}")
        if not usable:
            raise ValueError(f"task {task} has no metric for a single document: {row['metrics']}")
        better = usable if rolling else [m for m in usable if m not in self.errors[task]]
        found = wanted or ("acc" if "acc" in better else (better or usable)[0])
        if found not in better:
            raise ValueError(
                f"task {task}: its metric {found!r} counts errors, and a loss would look like a "
                "gain; name another in the task's metadata: {metric: ...}."
            )
        return found

    def _read(self, name: str, row: dict, lm: SideLM, place: int) -> Item:
        """One logged sample of lm-eval as an Item; its ``place`` is that among those asked."""
        task, arguments = short(name), row["arguments"]
        asked = json.dumps([row["doc_hash"], arguments], sort_keys=True, default=str)
        metric = self.metrics.setdefault(task, self._metric(task, row))
        field = self.metadata[task].get("cluster")
        if field is not None and field not in row["doc"]:
            raise ValueError(f"task {task}: metadata clusters by {field!r}, which documents lack")
        if "acc_mutual_info" in row["metrics"]:  # behind the choices, the same without a question
            arguments = arguments[: len(arguments) // 2]
        placed = [lm.mode.place(context, place) for context, *_ in arguments]
        item = Item(
            task, row["doc_id"], hashlib.sha256(asked.encode()).hexdigest(),
            prompt=without_mark(placed[0]), score=_score(task, metric, row),
            cluster=str(row["doc"][field]) if field else str(row["doc_id"]),
            source=row["doc"].get("source") if isinstance(row["doc"], dict) else None,
        )  # fmt: skip
        kind = self.kinds[task]
        if kind == "generate_until":
            item.reply, item.reply_ids, item.finished = lm.reply(placed[0], arguments[0][1])
            item.gold = str(row["target"])
            return item
        item.loglikelihoods = [float(answer[0]) if isinstance(answer, (tuple, list)) else answer
                               for answer in row["filtered_resps"][: len(arguments)]]  # fmt: skip
        if kind == "multiple_choice":
            several = len({context for context, _ in arguments}) > 1
            item.choices = [
                (without_mark(context) if several else argument[1]).strip()
                for context, argument in zip(placed, arguments, strict=True)
            ]
            lengths = [len(c) if metric == NORMALISED else 1 for c in item.choices]
            weighed = [v / length for v, length in zip(item.loglikelihoods, lengths, strict=True)]
            item.chosen = weighed.index(max(weighed))
            item.gold = _gold(row["target"], item)
        elif kind == "loglikelihood":
            item.gold = arguments[0][1].strip()
        elif kind == "loglikelihood_rolling":
            item.units = float(row[metric][1])
        return item


def _gold(target, item: Item) -> int | None:
    if isinstance(target, int):
        return target
    if target in item.choices:
        return item.choices.index(target)
    return item.chosen if item.score == 1 else None  # the choices are contexts: only this is known


def _score(task: str, metric: str, row: dict) -> float:
    """A document's score; perplexities come as (log-likelihood, length): bits per unit.

    Raises:
        ValueError: it lies outside 0 and 1, where right and wrong and what is between them lie.
    """
    value = row[metric]
    if isinstance(value, tuple):
        likelihood, length = value
        return -likelihood / length / math.log(2) if length else 0.0
    if not 0 <= value <= 1:
        raise ValueError(
            f"task {task}: its metric {metric!r} is {value} for document {row['doc_id']}; a score "
            "lies between 0 and 1. Name another in the task's metadata: {metric: ...}."
        )
    return float(value)


def _inline(manager: TaskManager) -> dict[str, str]:
    """{task: the group whose file defines it}; lm-eval knows such tasks by their group only."""
    found = {}
    for name in manager.all_groups:
        group = manager.task_index[name].cfg or {}
        for part in group.get("task") or ():
            if isinstance(part, dict) and _has_data(group | part):
                found[part["task"]] = name
    return found


def _has_data(config: dict) -> bool:
    """It defines a task, and does not only name one that is defined elsewhere."""
    return bool(config.get("dataset_path") or config.get("custom_dataset"))


def short(task: str) -> str:
    """lm-eval calls a task that is defined inside a group "group::task"."""
    return task.rpartition("::")[2]


def choose(available: int, wanted: int | None, seed: str) -> list[int]:
    """A seeded choice of document numbers (lm-eval's own `limit` takes the first ones)."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return sorted(random.Random(seed).sample(range(available), wanted))


def pair(base: dict, bridge: dict) -> dict[str, list[tuple[Item, Item]]]:
    """Items of both sides matched by document number.

    Raises:
        RetentionError: the sides did not answer the same questions.
    """
    if base.keys() != bridge.keys():
        raise RetentionError(f"tasks differ: base {sorted(base)}, bridge {sorted(bridge)}")
    pairs = {}
    for task, items in base.items():
        others = bridge[task]
        ids = [item.doc_id for item in items]
        if ids != [item.doc_id for item in others] or len(set(ids)) != len(ids):
            raise RetentionError(f"{task}: base and bridge answered different documents")
        pairs[task] = list(zip(items, others, strict=True))
        for one, other in pairs[task]:
            if one.sha256 != other.sha256:
                raise RetentionError(
                    f"{task}: document {one.doc_id} or its prompt changed between base and "
                    "bridge; leave the task files alone while a comparison runs"
                )
    return pairs


@contextlib.contextmanager
def quiet():
    """Keep standard output free for the report, and lm-eval's advice out of the way."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
