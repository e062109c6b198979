"""Tasks: where rows come from, how a row becomes a chat, and what counts as right.

The same task serves training and scoring. To add one, write a file in ``tasks/`` with a dataclass
that subclasses :class:`Task`; its class name is then usable in YAML, its ``name`` on the command
line.
"""

import re
import string
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple


class Metric(NamedTuple):
    """A score of many replies; more is better.

    Attributes:
        rows: a number for each reply, or several that ``of`` needs.
        of: from the rows, an array ``(n,)`` or ``(n, k)``, any of them and any number of times, to
            the score; by default their mean.
        share: rows are 0 or 1, wrong or right (or between, partly right): their mean has the
            interval of a share.
    """

    rows: Sequence
    of: Callable = lambda rows: rows.mean()
    share: bool = False


@dataclass
class Task:
    """One data set with its chat form and its score."""

    name: ClassVar[str]
    score_name: ClassVar[str] = "accuracy"  # what :meth:`score` is of a reply
    max_new_tokens: ClassVar[int] = 32
    # where on, rows to train on come by :meth:`stream`; no ClassVar, which would order fields
    streaming = False

    def rows(self, split: str) -> Sequence[dict]:
        """All rows of ``"train"`` or ``"test"``, in a fixed order."""
        raise NotImplementedError

    def stream(self, split: str, seed: int):
        """A :class:`mmpeft.formats.stream.Stream` of the rows, where ``streaming`` is on."""
        raise NotImplementedError

    def messages(self, row: dict) -> list[dict]:
        """The row as a chat that ends in the assistant's reference answer.

        Content is text, or a list of ``{"type": "text", "text": ...}``, ``{"type": "image",
        "image": path, bytes or PIL image}`` and ``{"type": "video", "video": frames}``.
        """
        raise NotImplementedError

    def where(self, row: dict, index: int) -> str:
        """How an error message points at the row."""
        return f"{self.name} row {index}"

    def group(self, row: dict) -> Hashable | None:
        """Rows of one group share their first messages and image; training may batch them.

        Scores have intervals over groups, since rows of one are alike.
        """
        return None

    def question_type(self, row: dict) -> str:
        """Scores are also reported for each type."""
        return "all"

    def score(self, replies: list[str], rows: Sequence[dict]) -> list[float]:
        """Each reply from 0.0 to 1.0: it is right; by default, it equals the reference answer."""
        return [
            float(normalize(reply) == normalize(words(self.messages(row)[-1])))
            for reply, row in zip(replies, rows, strict=True)
        ]

    def metrics(self, replies: list[str], rows: Sequence[dict]) -> dict[str, Metric]:
        """What ``mmpeft eval`` reports, the metric that stands for the task first.

        By default the mean score, under ``score_name``; ``accuracy`` is a share of right replies.
        """
        share = self.score_name == "accuracy"
        return {self.score_name: Metric(self.score(replies, rows), share=share)}


def parts(message: dict) -> list[dict]:
    """What a message consists of, whichever way it is written."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def words(*messages: dict) -> str:
    """The text of messages, without their pictures."""
    every = [part for message in messages for part in parts(message)]
    return " ".join(part["text"] for part in every if part["type"] == "text")


def pictures(*messages: dict) -> list[dict]:
    """The image and video parts of messages."""
    every = [part for message in messages for part in parts(message)]
    return [part for part in every if part["type"] in ("image", "video")]


def normalize(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text).strip()


def all_tasks() -> dict[str, type[Task]]:
    """Every known task class by name."""
    import mmpeft.tasks  # noqa: F401 (importing it defines the tasks that ship)

    found, queue = {}, [Task]
    while queue:
        for cls in queue.pop().__subclasses__():
            queue.append(cls)
            if "name" in cls.__dict__:
                found[cls.name] = cls
    return found
