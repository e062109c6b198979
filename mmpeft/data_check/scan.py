"""A range of rows, each read once: what is wrong with it, and its figures as small arrays."""

import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from mmpeft.checks import Problem, chat_problems
from mmpeft.data_check.pictures import look_at, problem_of
from mmpeft.formats import RowError
from mmpeft.task import parts

KINDS = {  # of errors, in the order of a report
    "row": "rows that are no chat",
    "chat": "roles, order, empty turns",
    "image": "pictures",
    "tokens": "tokens",
    "duplicate": "rows that are there twice",
    "leakage": "evaluation rows that are trained on",
}
# columns of the tables, int64: one line for each row that is a chat, each picture in one, and each
# answer in a chat without pictures. A key is a hash; tokens are -1 where nothing was tokenised.
CHATS = ("row", "key", "characters", "fine", "tokens", "learned")
PICTURES = ("row", "key", "height", "width")
QUESTIONS = ("row", "key", "last")


class RowProblem(NamedTuple):
    """What is wrong with the row that is at ``where``: ``FILE line N``."""

    kind: str
    where: str
    problem: Problem


@dataclass
class Found:
    """What a range of rows holds.

    Attributes:
        rows: how many they are.
        errors: the first of each kind.
        counts: how many there are of each kind.
        chats, pictures, questions: tables of ``CHATS``, ``PICTURES``, ``QUESTIONS``: arrays of
            which each column is a field.
    """

    rows: int
    errors: list[RowProblem] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    chats: np.ndarray = field(default_factory=lambda: table((), CHATS))
    pictures: np.ndarray = field(default_factory=lambda: table((), PICTURES))
    questions: np.ndarray = field(default_factory=lambda: table((), QUESTIONS))

    def add(self, error: RowProblem, limit: int) -> None:
        """Count an error, and keep it if there are fewer of its kind than ``limit``."""
        self.counts[error.kind] += 1
        if self.counts[error.kind] <= limit:
            self.errors.append(error)

    @classmethod
    def joined(cls, ranges: list["Found"], limit: int) -> "Found":
        """What neighbouring ranges hold together, in their order."""
        whole = cls(sum(part.rows for part in ranges))
        for part in ranges:
            for error in part.errors:
                whole.add(error, limit)
            whole.counts += part.counts - Counter(error.kind for error in part.errors)
        for name in ("chats", "pictures", "questions"):
            own = [getattr(whole, name), *(getattr(part, name) for part in ranges)]
            setattr(whole, name, np.concatenate(own))
        return whole


def table(numbers, columns: tuple[str, ...]) -> np.ndarray:
    """Numbers, line by line, as a table with named columns."""
    return np.array(numbers, np.int64).view([(name, np.int64) for name in columns])


def scan(rows, start: int, stop: int, processor=None, questions=False, limit: int = 100) -> Found:
    """Read rows ``start`` to ``stop`` (from 0, the last not included) of ``rows``, each once.

    Args:
        rows: as :func:`mmpeft.formats.open_rows` gives them.
        processor: also tokenise, as training will.
        questions: fill the table of questions.
        limit: errors of a kind that are kept; the rest is counted.
    """
    found, chats, pictures, asked = Found(stop - start), array("q"), array("q"), array("q")
    for number, row in rows.scan(start, stop):
        if isinstance(row, RowError):
            problem = Problem(row.field, row.problem, row.remedy)
            found.add(RowProblem("row", row.where, problem), limit)
            continue
        messages, where = row["messages"], row["where"]
        if problems := chat_problems(messages):
            for problem in problems:
                found.add(RowProblem("chat", where, problem), limit)
            continue
        seen, problems = [], []
        for name, one in look_at(messages):
            seen.append(one)
            if one.problem is not None:
                problems.append(("image", Problem(name, *one.problem)))
            else:
                pictures.extend((number, one.key, one.height, one.width))
        tokens = learned = -1
        if processor is not None and not problems:
            tokens, learned, wrong = lengths(processor, messages)
            problems += [("tokens", wrong)] if wrong else []
        for kind, problem in problems:
            found.add(RowProblem(kind, where, problem), limit)
        key, characters = digest(messages, [one.key for one in seen])
        chats.extend((number, key, characters, not problems, tokens, learned))
        if questions and not seen:
            ends = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            for end in ends:
                before = [m for m in messages[:end] if m["role"] != "system"]
                asked.extend((number, digest(before, [])[0], end == ends[-1]))
    found.chats, found.pictures = table(chats, CHATS), table(pictures, PICTURES)
    found.questions = table(asked, QUESTIONS)
    return found


def encode(processor, messages: list[dict]) -> tuple[dict[str, list[int]], list]:
    """A chat as training has it: ``input_ids``, ``mm_token_type_ids`` and ``labels``, (T) each; and
    its pictures, unread."""
    from mmpeft.data import leave_open

    encoded, shown = processor.encode_chat(messages)
    if messages[-1].get("unfinished"):
        leave_open(encoded["labels"], processor.tokenizer)
    return encoded, shown


def lengths(processor, messages: list[dict]) -> tuple[int, int, Problem | None]:
    """Tokens of a chat (those of pictures included), how many of them are learned; and if -1 or
    none are, why."""
    try:
        row, shown = encode(processor, messages)
        processor.instruction_inputs(shown)
    except (ValueError, OSError) as error:
        told = problem_of(error, "messages", "take the row out")
        return -1, -1, told._replace(problem=f"cannot be used: {told.problem}")
    labels = row["labels"]
    learned = len(labels) - labels.count(-100)
    if not learned:
        none = Problem("messages", "have no token to learn from", "give an answer in words")
        return len(labels), 0, none
    return len(labels), learned, None


def digest(messages: list[dict], pictures: list[int]) -> tuple[int, int]:
    """A hash of what a chat says and shows, 64 bits with a sign; and its characters.

    Args:
        pictures: hashes of its pictures, in reading order.
    """
    said, characters = list(map(str, pictures)), 0
    for message in messages:
        said.append(message["role"])
        others = {key: one for key, one in message.items() if key not in ("role", "content")}
        if others:
            said.append(json.dumps(others, sort_keys=True, default=repr))
        for part in parts(message):
            if part["type"] == "text":
                text = part["text"]
                characters += len(text)
                said.append(text.strip())
            else:
                said.append(f"\0{part['type']}")  # where the picture stands
    data = "\x1f".join(said).encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), signed=True), characters
