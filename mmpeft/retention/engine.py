"""lm-eval asks, our model answers: one pass over a suite for each side."""

import contextlib
import hashlib
import json
import logging
import random
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from torch.nn.functional import log_softmax
from tqdm import tqdm

from mmpeft.retention.sides import RetentionError, check_finite, evaluation, positions, side
from mmpeft.retention.text import start_token

BATCH_TOKENS = 2048


class SideLM(TemplateLM):
    """One side of the model for lm-eval: log-likelihoods of continuations.

    Requests are put in an order that depends on their tokens alone, so the two sides run
    batches of the same content and shape; `batches` is the hash of all of them. Requests that
    feed the model the same tokens (single-token choices of one question) share a forward.
    """

    def __init__(self, model, tokenizer, name: str):
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._device = model.device
        self.batches = hashlib.sha256()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return start_token(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """requests: ((context, continuation), context ids, continuation ids) each."""
        by_input: dict[tuple[int, ...], list[int]] = {}
        for i, ((context, _), context_ids, answer_ids) in enumerate(requests):
            self._check_length(context, len(context_ids) + len(answer_ids) - 1)
            by_input.setdefault((*context_ids, *answer_ids[:-1]), []).append(i)
        inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))

        results: list = [None] * len(requests)
        bar = tqdm(total=len(requests), desc=f"suite: {self.name}", unit="choice", leave=False)
        with evaluation(self.model), side(self.model, self.name):
            start = 0
            while start < len(inputs):
                rows = inputs[start : start + max(1, BATCH_TOKENS // len(inputs[start]))]
                start += len(rows)
                keep = max(len(requests[i][2]) for row in rows for i in by_input[row])
                for row, logits in zip(rows, self._logits(rows, keep), strict=True):
                    for i in by_input[row]:
                        results[i] = self._score(logits, requests[i][2])
                        bar.update()
        bar.close()
        return results

    def _check_length(self, context: str, length: int) -> None:
        longest = self.model.config.get_text_config().max_position_embeddings
        if length > longest:
            raise RetentionError(
                f"a suite item of {length} tokens is longer than the model's context of {longest} "
                f"and is never cut: {context[:60]!r}..."
            )

    def _logits(self, rows: list[tuple[int, ...]], keep: int) -> torch.Tensor:
        """Logits (B, keep, V) of the last `keep` positions; rows are padded on the left."""
        width = len(rows[0])
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.batches.update(json.dumps([rows, keep]).encode())
        ids, mask = ids.to(self.device), mask.to(self.device)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            # an index makes a contiguous copy; a slice (an int) sends a frozen projection down a
            # path that copies the vocabulary matrix once for every row
            logits_to_keep=torch.arange(width - keep, width, device=self.device),
        ).logits

    def _score(self, logits: torch.Tensor, answer_ids: list[int]) -> tuple[float, bool]:
        """logits (keep, V) end where the answer ends."""
        logits = logits[-len(answer_ids) :]
        check_finite(logits, f"{self.name} on the suite")
        answer = torch.tensor(answer_ids, device=logits.device)
        chosen = log_softmax(logits.float(), dim=-1).gather(1, answer[:, None])
        return chosen.sum().item(), bool((logits.argmax(-1) == answer).all())

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        raise RetentionError(
            "this suite asks for perplexities; only choices can be compared so far"
        )

    def generate_until(self, requests, disable_tqdm: bool = False):
        raise RetentionError("this suite asks for generation; only choices can be compared so far")


@dataclass
class Item:
    """What one side made of one document."""

    doc_id: int
    sha256: str  # of the document and every prompt made from it
    correct: bool
    loglikelihoods: list[float]


@dataclass
class Answers:
    """One side's pass over a suite."""

    tasks: dict[str, list[Item]]
    batches: str


class Suite:
    """A group of lm-eval tasks read from local files, with a seeded choice of its documents.

    Args:
        name: an lm-eval group or task below `folder`.
        folder: where the YAML files are; by default those that come with mmpeft.
        samples: how many documents of each task to use (None: all).
        seed: which ones.
    """

    def __init__(
        self,
        name: str = "embedded",
        folder: str | Path | None = None,
        samples: int | None = None,
        seed: int = 0,
    ):
        self.name = name
        if samples is not None and samples < 1:
            raise ValueError(
                f"samples={samples}: use at least 1 item of each task, or None for all"
            )
        folder = (
            Path(folder) if folder is not None else Path(str(files("mmpeft.tasks"))) / "retention"
        )
        with quiet():
            # without lm-eval's own tasks: scanning them takes longer than the whole suite
            self.manager = TaskManager(include_path=str(folder), include_defaults=False)
            known = [*self.manager.all_groups, *self.manager.all_tasks]
            if name not in known:
                raise ValueError(
                    f"unknown suite {name!r}; {folder} holds: {', '.join(sorted(known))}"
                )
            loaded = self.manager.load([name])["tasks"]
        self.indices = {
            task: choose(len(body.eval_docs), samples, f"{seed} {task}")
            for task, body in loaded.items()
        }
        self.versions = {
            short(task): (body.config.metadata or {}).get("version")
            for task, body in loaded.items()
        }

    def ask(self, model, tokenizer, name: str) -> Answers:
        """Score the suite with one side ("base" or "bridge")."""
        lm = SideLM(model, tokenizer, name)
        with quiet():
            # never lm-eval's cache: its key leaves the model out, so the sides would share answers
            results = simple_evaluate(
                model=lm,
                tasks=[self.name],
                samples=self.indices,
                task_manager=self.manager,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        tasks = {
            short(task): sorted((read(task, row) for row in rows), key=lambda item: item.doc_id)
            for task, rows in results["samples"].items()
        }
        return Answers(tasks, lm.batches.hexdigest())


def short(task: str) -> str:
    """lm-eval calls a task that is defined inside a group "group::task"."""
    return task.rpartition("::")[2]


def choose(available: int, wanted: int | None, seed: str) -> list[int]:
    """A seeded choice of document numbers (lm-eval's own `limit` takes the first ones)."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return sorted(random.Random(seed).sample(range(available), wanted))


def read(task: str, row: dict) -> Item:
    """One logged sample of lm-eval as an Item."""
    if row.get("acc") not in (0, 1):
        raise RetentionError(
            f"task {task} has no right-or-wrong `acc`; it reports {row['metrics']}"
        )
    asked = json.dumps([row["doc_hash"], row["arguments"]], sort_keys=True)
    return Item(
        doc_id=row["doc_id"],
        sha256=hashlib.sha256(asked.encode()).hexdigest(),
        correct=bool(row["acc"]),
        loglikelihoods=[float(answer[0]) for answer in row["filtered_resps"]],
    )


def pair(base: Answers, bridge: Answers) -> dict[str, list[tuple[Item, Item]]]:
    """Items of both sides matched by document number.

    Raises:
        RetentionError: the sides did not answer the same questions in the same batches.
    """
    pairs = {}
    if base.tasks.keys() != bridge.tasks.keys():
        raise RetentionError(
            f"tasks differ: base {sorted(base.tasks)}, bridge {sorted(bridge.tasks)}"
        )
    for task, items in base.tasks.items():
        others = bridge.tasks[task]
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
    if base.batches != bridge.batches:
        raise RetentionError(
            "base and bridge ran different batches, so small differences mean nothing"
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
