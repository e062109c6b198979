"""easy-VQA: questions on shape and colour of one shape in a 64 x 64 picture.

4,000 / 1,000 pictures, 38,575 / 9,673 questions, 13 answers. Synthetic, and easy for any trained
encoder: a high score shows that the bridge is wired right, not that it sees well.
Source: package ``easy-vqa`` 1.0 by Victor Zhou, MIT licence.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from mmpeft.task import Task

SHAPES = ("circle", "rectangle", "triangle")


@dataclass
class EasyVQA(Task):
    """
    Attributes:
        path: directory with ``train/`` and ``test/``, each with ``questions.json`` and ``images/``.
    """

    name = "easy_vqa"
    max_new_tokens = 8

    path: str = "starter:easy-vqa"

    def rows(self, split):
        from mmpeft.starter import resolve

        folder = Path(resolve(self.path)) / split
        questions = json.loads((folder / "questions.json").read_text())
        return [
            {"question": q, "answer": a, "image": str(folder / "images" / f"{i}.png")}
            for q, a, i in questions
        ]

    def messages(self, row):
        question = [
            {"type": "image", "image": row["image"]},
            {"type": "text", "text": row["question"]},
        ]
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["answer"]},
        ]

    def group(self, row):
        return row["image"]

    def question_type(self, row):
        if row["answer"] in ("yes", "no"):
            return "yes/no"
        return "shape" if row["answer"] in SHAPES else "colour"
