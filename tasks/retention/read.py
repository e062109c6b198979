"""How lm-eval gets the items: from the file beside this one, wherever the package is installed."""

import json
from pathlib import Path

from datasets import Dataset

from mmpeft.tasks.retention.generate import RELATIONS

TEMPLATES = {kind: template.split("{}") for kind, template, _ in RELATIONS}


def items(file: str, **metadata) -> dict[str, Dataset]:
    """The `test` split of one task. lm-eval passes the task's `metadata` as well; not needed."""
    return {"test": Dataset.from_list(rows(file))}


def facts(file: str, **metadata) -> dict[str, Dataset]:
    """The same with a field `subject`: France, for its capital and for its language."""
    return {"test": Dataset.from_list([{**row, "subject": subject(row)} for row in rows(file)])}


def rows(file: str) -> list[dict]:
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def subject(row: dict) -> str:
    """What a fact is about: the word that its kind's template was filled with."""
    sentence = row.get("context") or row["prompt"]
    if row["kind"] not in TEMPLATES:
        return sentence  # a month or a day: nothing else is asked about it
    before, after = TEMPLATES[row["kind"]]
    return sentence.split(before, 1)[1].removesuffix(after)
