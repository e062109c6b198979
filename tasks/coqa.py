"""CoQA: a conversation of questions about a story; short answers in free words.

A story with its whole conversation is one row to learn from; scored is each question by itself,
behind the questions and reference answers before it. Files are those of the data set
(https://stanfordnlp.github.io/coqa/). Where ``train`` and ``test`` name the same file, its stories
are split, and the scores compare with no published ones.
Source: Reddy, Chen and Manning 2019 (arXiv 1808.07042); licences differ by kind of story.
"""

import os
import random
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmpeft.task import Metric
from mmpeft.text_task import TextTask, field, read_json


@dataclass
class CoQA(TextTask):
    """
    Attributes:
        train: JSON file of CoQA's form.
        test: JSON file of CoQA's form.
        held_out: share of the stories that is for scoring where both are the same file; drawn once
            for all, whatever the seed.
    """

    name = "coqa"
    score_name = "f1"
    max_new_tokens = 48

    train: str | None = "data/coqa/coqa-train-v1.0.json"
    test: str | None = "data/coqa/coqa-dev-v1.0.json"
    held_out: float = 0.2

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"task coqa: held_out is {self.held_out}; it must lie between 0 and 1."
            )

    def read(self, path, split):
        stories = [
            _story(entry, f"{path} story {number}")
            for number, entry in enumerate(field(read_json(path), "data", list, str(path)), 1)
        ]
        if self._in_one_file():
            stories = self._part(stories, split)
        if split == "train":
            return stories
        return [
            story | {"turns": turns[: n + 1], "where": f"{story['where']} turn {n + 1}"}
            for story in stories
            for turns in [story["turns"]]
            for n in range(len(turns))
        ]

    def _in_one_file(self) -> bool:
        paths = [self.train, self.test]
        here = all(path is not None and Path(path).is_file() for path in paths)
        return here and os.path.samefile(*paths)

    def _part(self, stories: list[dict], split: str) -> list[dict]:
        texts = list(dict.fromkeys(story["story"] for story in stories))  # one may be there twice
        random.Random(0).shuffle(texts)
        count = max(1, round(self.held_out * len(texts)))
        chosen = set(texts[:count] if split == "test" else texts[count:])
        return [story for story in stories if story["story"] in chosen]

    def messages(self, row):
        chat = []
        for n, (question, answers) in enumerate(row["turns"]):
            asked = question if n else f"{row['story']}\n\n{question}"
            chat += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answers[0]},
            ]
        return chat

    def group(self, row):
        return row["story"]

    def question_type(self, row):
        return row["source"]

    def score(self, replies, rows):
        """F1, see :meth:`metrics`."""
        return [among(f1, reply, row["turns"][-1][1]) for reply, row in _pairs(replies, rows)]

    def metrics(self, replies, rows) -> dict[str, Metric]:
        """``f1`` and ``em`` of the first line of each reply, as CoQA's script has them."""
        pairs = list(_pairs(replies, rows))
        exact = [among(em, reply, row["turns"][-1][1]) for reply, row in pairs]
        return {"f1": Metric(self.score(replies, rows)), "em": Metric(exact, share=True)}


def _pairs(replies, rows):
    first_lines = [reply.strip().partition("\n")[0] for reply in replies]
    return zip(first_lines, rows, strict=True)


def among(measure: Callable[[str, str], float], reply: str, answers: list[str]) -> float:
    """The mean over leaving out one answer of the best of the others, as people are scored."""
    if len(answers) == 1:
        return measure(reply, answers[0])
    values = [measure(reply, answer) for answer in answers]
    return sum(max(values[:i] + values[i + 1 :]) for i in range(len(values))) / len(values)


def em(reply: str, answer: str) -> float:
    """1.0 where they are the same words."""
    return float(answer_words(reply) == answer_words(answer))


def f1(reply: str, answer: str) -> float:
    """Harmonic mean of the shares of words that each has of the other; none equals only none."""
    ours, theirs = answer_words(reply), answer_words(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def answer_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles: SQuAD's rule, which CoQA took over."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _story(entry: dict, where: str) -> dict:
    """A story with ``turns``: each question and its answers, the main one first."""
    questions = field(entry, "questions", list, where)
    lists = [field(entry, "answers", list, where)]
    more = entry.get("additional_answers") or {}
    lists += [field(more, key, list, f"{where}: additional_answers") for key in sorted(more)]
    if any(len(answers) != len(questions) for answers in lists):
        counts = ", ".join(str(len(answers)) for answers in lists)
        raise ValueError(
            f"{where}: {len(questions)} questions, but {counts} answers; give one each."
        )
    turns = []
    for n, (question, *answers) in enumerate(zip(questions, *lists, strict=True), 1):
        turn = f"{where} turn {n}"
        found = [field(answer, "input_text", str, turn) for answer in answers]
        turns.append((field(question, "input_text", str, turn), found))
    return {
        "story": field(entry, "story", str, where),
        "source": field(entry, "source", str, where),
        "turns": turns,
        "where": where,
    }
