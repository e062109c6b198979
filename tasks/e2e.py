"""E2E NLG: a description of a restaurant from up to eight facts about it.

42,061 / 4,693 pairs of facts and sentence; the test facts are 630 different ones, none of them in
the training data, each with several references. Files are the challenge's own, CSV with the columns
``mr`` and ``ref`` (https://github.com/tuetschek/e2e-dataset).
Source: Novikova, Dušek and Rieser 2017 (arXiv 1706.09254), CC BY-SA 4.0.
"""

import re
from dataclasses import dataclass

from mmpeft.text_task import GenerationTask, field, read_csv

# how tokenised text is joined again: of the 4,672 development references, which exist both ways,
# 97% come out exactly
JOINED = [
    (r" ([,.!?;:%)])", r"\1"),
    (r"\( ", "("),
    (r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1"),
    (r"n 't\b", "n't"),
    (r"([£$€]) (?=\d)", r"\1"),
    (r"(?<=\w) ?- ?(?=\w)", "-"),
]


@dataclass
class E2E(GenerationTask):
    """
    Attributes:
        train: CSV file; a tokenised one (``centre , family - friendly .``) is joined again, since
            the test references are ordinary text.
        test: CSV file; rows about the same facts become one with several references.
    """

    name = "e2e"
    max_new_tokens = 96
    request = "Describe this place."

    train: str | None = "data/e2e/trainset.csv"
    test: str | None = "data/e2e/testset_w_refs.csv"

    def read(self, path, split):
        rows, references = [], {}
        for where, row in read_csv(path):
            facts, text = _facts(field(row, "mr", str, where), where), field(row, "ref", str, where)
            if split == "train":
                text = _join(text)
            elif facts in references:
                references[facts].append(text)
                continue
            refs = references[facts] = [text]
            rows.append({"facts": facts, "answer": text, "refs": refs, "where": where})
        return rows


def _facts(mr: str, where: str) -> str:
    """``name[The Mill], priceRange[more than £ 30]`` as ``name: The Mill; price range: ...``."""
    pair = r"\s*([\w ]+)\[([^\]]*)\](?:,|$)"
    pairs = re.findall(pair, mr)
    if re.sub(pair, "", mr).strip():
        raise ValueError(f"{where}: field 'mr' is {mr!r}; write name[value], name[value].")
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name, _ in pairs]
    names = [name.replace("customerrating", "customer rating") for name in names]
    return "; ".join(f"{n}: {_join(value)}" for n, (_, value) in zip(names, pairs, strict=True))


def _join(text: str) -> str:
    for found, joined in JOINED:
        text = re.sub(found, joined, text)
    return " ".join(text.split())
