"""lm-eval asks, one side answers."""

import hashlib
import json
import math
import random
from collections import defaultdict

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mmpeft.retention.modes import Mode, without_mark
from mmpeft.retention.plan import Question
from mmpeft.retention.replies import write
from mmpeft.retention.score import Opening, planned, run, score
from mmpeft.retention.sides import RetentionError, Sides, start_token

UNBOUNDED = 2048  # tokens of a window where the LLM sets no bound
GENERATE_ROWS = 32


class SideLM(TemplateLM):
    """One side in one mode, as lm-eval knows models.

    Args:
        sides, side: which model answers ("base", "bridge" or "control").
        mode: what stands before the prompts.
        store: keeps finished batches; None computes all.
        copied: an LM of the base whose answers are this side's too (see `certify`).
    """

    def __init__(self, sides: Sides, side: str, mode: Mode, store=None, copied=None):
        super().__init__()
        self.sides, self.side, self.mode, self.store, self.copied = sides, side, mode, store, copied
        self.tokenizer = sides.tokenizer
        self.sees = side != "base" and mode.name != "text"
        self.openings: dict = {}
        self.scored: dict[tuple[Opening | None, Question], tuple[float, bool]] = {}
        self.replies: dict[tuple[str, str], tuple[str, list[int], bool]] = {}
        self.asked: list[list[Question]] = []  # without a picture, as planned together

    # ----------------------------------------------------------------- what lm-eval wants to know

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return start_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.mode.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False  # a chat template wrote it already
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def _placed(self, request) -> str:
        return self.mode.place(request.args[0], request.doc_id)

    # ---------------------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        asked = [self._question(self._placed(one), one.args[1]) for one in requests]
        self._score(asked)
        return [self.scored[pair] for pair in asked]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        longest = self.sides.context() or UNBOUNDED
        texts = []
        for request in requests:
            before, number, words = self.mode.split(self._placed(request))
            opening = self._opening(before, number)
            ids = self.tok_encode(words, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, longest // 2, 1)
            texts.append([
                (opening, Question(tuple(context), tuple(answer)))
                for context, answer in map(make_disjoint_window, windows)
            ])  # fmt: skip
        self._score([window for text in texts for window in text])
        return [sum(self.scored[pair][0] for pair in text) for text in texts]

    def _loglikelihood_tokens(self, requests, **_):
        raise NotImplementedError("loglikelihood is overridden; lm-eval never comes here")

    def _score(self, asked) -> None:
        by_opening = defaultdict(list)
        for opening, question in asked:
            by_opening[opening].append(question)
        total = sum(len(set(questions)) for questions in by_opening.values())
        label = f"{self.mode.name}: {self.side}"
        with tqdm(total=total, desc=label, unit="answer", leave=False) as bar:
            for opening, questions in by_opening.items():
                if opening is None:
                    self.asked.append(questions)
                if self.copied is not None:
                    found = {question: self._copy(None, question) for question in questions}
                else:
                    found = score(self.sides, self.side, questions, opening, self.store, bar)
                self.scored |= {(opening, question): value for question, value in found.items()}

    def _copy(self, *asked):
        """What the base answered, to a question (None, question) or a prompt (words, options)."""
        given = self.copied.replies if isinstance(asked[0], str) else self.copied.scored
        if asked not in given:
            raise RetentionError(
                "the tasks ask the bridge something that they did not ask the base; leave the task "
                "files alone while a comparison runs"
            )
        return given[asked]

    def _question(self, context: str, continuation: str) -> tuple[Opening | None, Question]:
        """As lm-eval encodes a pair: together, cut where the context alone ends."""
        before, number, words = self.mode.split(context)
        opening = self._opening(before, number)
        special = None
        if opening is not None:
            special, words = False, words if before else "\n" + words
        else:
            words = before + words
        if not words:
            answer = self.tok_encode(continuation, add_special_tokens=False)
            start = self.prefix_token_id
            if answer[0] == start and len(answer) > 1:
                return None, Question((start,), tuple(answer[1:]))
            return None, Question((start,), tuple(answer))
        kept = words.rstrip() or words
        whole = self.tok_encode(words + continuation, add_special_tokens=special)
        length = len(self.tok_encode(kept, add_special_tokens=special))
        if length in (0, len(whole)):
            raise RetentionError(f"nothing to score: context {words[-60:]!r}, {continuation!r}")
        return opening, Question(tuple(whole[:length]), tuple(whole[length:]))

    def _opening(self, before: str, number: int | None) -> Opening | None:
        """What the picture and the words before it are to this side; one object for each."""
        if number is None or not self.sees:
            return None
        exchange = self.mode.exchanges[number]
        return self.openings.setdefault(
            (before, number), Opening(before, exchange.picture, exchange.sha256)
        )

    # --------------------------------------------------------------------------------- generation

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        """Greedy replies. Raises RetentionError for tasks that sample."""
        by_options = defaultdict(list)
        for request in requests:
            options = json.dumps(request.args[1], sort_keys=True)
            by_options[options].append(self._placed(request))
        label = f"{self.mode.name}: {self.side} writes"
        with tqdm(total=len(requests), desc=label, unit="reply", leave=False) as bar:
            for options, contexts in by_options.items():
                for rows in _row_groups(contexts):
                    replies = self._write(rows, options)
                    self.replies |= {
                        (context, options): reply
                        for context, reply in zip(rows, replies, strict=True)
                    }
                    bar.update(len(rows))
        return [self.reply(self._placed(one), one.args[1])[0] for one in requests]

    def reply(self, context: str, options: dict) -> tuple[str, list[int], bool]:
        """(text, token ids, ended by itself) of a reply that was written to a placed prompt."""
        return self.replies[context, json.dumps(options, sort_keys=True)]

    def _write(self, contexts: list[str], options: str) -> list[tuple[str, list[int], bool]]:
        if self.copied is not None:
            return [self._copy(context, options) for context in contexts]
        prompts = [self._prompt(context) for context in contexts]
        asked = [[opening and [opening.before, opening.sha256], ids] for opening, ids in prompts]
        key = hashlib.sha256(json.dumps([asked, options]).encode()).hexdigest()
        replies = self.store.get(key) if self.store is not None else None
        if replies is None:
            replies = write(self.sides, self.side, prompts, json.loads(options))
            if self.store is not None:
                self.store.put(key, replies)
        return [tuple(reply) for reply in replies]

    def _prompt(self, context: str) -> tuple[Opening | None, list[int]]:
        before, number, words = self.mode.split(context)
        opening = self._opening(before, number)
        if opening is None:
            return None, self.tok_encode(before + words) or [self.prefix_token_id]
        words = words if before else "\n" + words  # as in _question
        return opening, self.tok_encode(words, add_special_tokens=False)


def certify(base: SideLM, seed: int = 0, share: float = 0.1, least: int = 8) -> dict | None:
    """Whether the bridge answers a sample of the base's batches with the same bits.

    Meant for a gate that keeps the adapter out of text, where the proof has found no difference:
    then the bridge need not be asked everything again.

    Returns:
        `{"batches", "of", "answers"}`, or None if an answer differs.
    """
    batches = [batch for questions in base.asked for batch in planned(base.sides, questions)]
    count = min(len(batches), max(least, math.ceil(share * len(batches))))
    answers = 0
    for batch in random.Random(seed).sample(batches, count):
        found = run(base.sides, "bridge", batch, None, {})
        if [tuple(answer) for answer in found] != [base.scored[None, q] for q in batch.questions]:
            return None
        answers += len(found)
    for options in sorted({options for _, options in base.replies}):
        contexts = [context for context, own in base.replies if own == options]
        some = random.Random(seed).choice(_row_groups(contexts))  # the same rows share the batch
        again = SideLM(base.sides, "bridge", base.mode)._write(some, options)
        if again != [base.replies[context, options] for context in some]:
            return None
        answers += len(some)
    return {"batches": count, "of": len(batches), "answers": answers}


def _row_groups(contexts) -> list[list[str]]:
    """Prompts of about one length, as many as are written together."""
    ordered = sorted(set(contexts), key=lambda context: (len(without_mark(context)), context))
    return [ordered[i : i + GENERATE_ROWS] for i in range(0, len(ordered), GENERATE_ROWS)]
