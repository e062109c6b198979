"""A chat as the model sees it: its tokens as text again, told apart by what becomes of them."""

from itertools import accumulate
from typing import NamedTuple

from mmpeft.data_check.scan import encode
from mmpeft.task import pictures

KINDS = {  # of tokens
    "learned": "learned: the loss is taken of these",
    "read": "only read",
    "image": "positions of a picture",
}


class Run(NamedTuple):
    """Neighbouring tokens of one kind, see ``KINDS``; every picture is a run of its own.

    Attributes:
        text: what they spell, special tokens included; empty for a picture.
        tokens: how many they are.
    """

    kind: str
    text: str
    tokens: int


class Sample(NamedTuple):
    """One row: where it is, its picture parts, its tokens in runs."""

    where: str
    pictures: list[dict]
    runs: list[Run]

    def count(self, *kinds: str) -> int:
        """How many tokens are of these kinds, of none how many they are in all."""
        return sum(run.tokens for run in self.runs if not kinds or run.kind in kinds)


def sample(processor, row: dict) -> Sample:
    """A row of :func:`mmpeft.formats.open_rows` as the model sees it."""
    messages = row["messages"]
    return Sample(row["where"], pictures(*messages), token_runs(processor, messages))


def token_runs(processor, messages: list[dict]) -> list[Run]:
    """The tokens of a chat, from the first to the last; their texts joined are the whole text."""
    row, shown = encode(processor, messages)
    kinds = [
        "image" if is_image else "read" if label == -100 else "learned"
        for is_image, label in zip(row["mm_token_type_ids"], row["labels"], strict=True)
    ]
    ends = {n for n in range(1, len(kinds)) if kinds[n] != kinds[n - 1]} | {len(kinds)}
    places = [n for n, kind in enumerate(kinds, 1) if kind == "image"]
    ends.update(places[n - 1] for n in accumulate(processor._counts(shown)))
    found, words, before, start = [], [], "", 0
    for end in sorted(ends):
        text = ""
        if kinds[start] != "image":
            # decoded behind all that stands before: alone, some tokenizers drop a first space
            words += row["input_ids"][start:end]
            spelt = processor.tokenizer.decode(words, clean_up_tokenization_spaces=False)
            text, before = spelt[len(before) :], spelt
        found.append(Run(kinds[start], text, end - start))
        start = end
    return found
