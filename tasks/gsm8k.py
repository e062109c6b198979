"""GSM8K: grade-school maths in words; the final number of the reply counts.

7,473 / 1,319 problems. Each line of a file is ``{"question": ..., "answer": ...}``, the answer with
its steps and ``#### NUMBER`` at the end (https://github.com/openai/grade-school-math). Notes for a
calculator, as ``<<48/2=24>>``, are taken out: none runs.
Source: Cobbe et al. 2021 (arXiv 2110.14168), MIT licence.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from mmpeft.task import Metric
from mmpeft.text_task import TextTask, field, read_jsonl

# a minus stands directly before the number, and behind no other: 10-12 and x - 3 have none
NUMBER = re.compile(
    r"(?:(?<![\w)\]}%])[-\u2212])?(?:\$\s?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
MARKED = re.compile(rf"####\s*({NUMBER.pattern})")


@dataclass
class GSM8K(TextTask):
    """
    Attributes:
        train: JSONL file.
        test: JSONL file.
    """

    name = "gsm8k"
    max_new_tokens = 320

    train: str | None = "data/gsm8k/train.jsonl"
    test: str | None = "data/gsm8k/test.jsonl"

    def read(self, path, split):
        rows = []
        for where, entry in read_jsonl(path):
            answer = field(entry, "answer", str, where)
            if not MARKED.search(answer):
                raise ValueError(f"{where}: field 'answer' does not end in '#### NUMBER'.")
            answer = re.sub(r"<<.*?>>", "", answer)
            question = field(entry, "question", str, where)
            rows.append({"question": question, "answer": answer, "where": where})
        return rows

    def messages(self, row):
        return [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]

    def score(self, replies, rows):
        """1.0 where the final number is the reference's, however it is written."""
        return [
            float(final_number(reply) == final_number(row["answer"]))
            for reply, row in zip(replies, rows, strict=True)
        ]

    def metrics(self, replies, rows) -> dict[str, Metric]:
        """``accuracy`` of the final number; ``strict``: only where it stands behind ``####``.

        lm-eval's ``flexible-extract`` takes the last number even behind an answer that is marked,
        its ``strict-match`` none that is written with ``$`` or right behind the mark.
        """
        right = self.score(replies, rows)
        marked = [
            one * bool(MARKED.search(reply)) for one, reply in zip(right, replies, strict=True)
        ]
        return {"accuracy": Metric(right, share=True), "strict": Metric(marked, share=True)}


def final_number(text: str) -> Decimal | None:
    """The first right behind ``####``, else the last in the text; ``None`` if there is none.

    Commas, a dollar sign and trailing zeros do not matter.
    """
    found = MARKED.findall(text)[:1] or NUMBER.findall(text)[-1:]
    if not found:
        return None
    number = found[0].replace("\u2212", "-")
    return Decimal(re.sub(r"[$,\s]", "", number))
