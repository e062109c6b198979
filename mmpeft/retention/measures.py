"""What a side's answers are like beyond right and wrong; no verdict rests on these.

Every function takes the items of one side and one task (objects with the attributes it names).
"""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
from scipy.special import softmax

BINS = 10
SHORT = 3  # tokens
NGRAM = 4


def calibration(items: Sequence) -> dict[str, float]:
    """How far a side's probabilities of multiple-choice answers can be believed.

    The probabilities are the softmax over the summed log-likelihoods of the choices.

    Args:
        items: with `loglikelihoods` (one per choice), `gold` and `chosen` (indices of choices).

    Returns:
        `ece`: expected calibration error, the mean distance of accuracy from confidence (the
        probability of the chosen answer) over 10 bins of equal width, weighted by their items
        (C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2). From 0
        to 1; also a perfect side's is above 0 where a bin holds few items.
        `brier`: the mean over items of the squared differences between probability and outcome,
        summed over the choices (G. Brier, Monthly Weather Review 78, 1950). From 0 to 2.

    Raises:
        ValueError: no items, or one that is not multiple choice.
    """
    confidences, right, squares = [], [], []
    for item in _some(items):
        count = len(item.loglikelihoods or ())
        for name in ("gold", "chosen"):
            index = getattr(item, name)
            if not isinstance(index, Integral) or not 0 <= index < count:
                raise ValueError(f"item {item.doc_id}: {name}={index!r} is none of {count} choices")
        probabilities = softmax(item.loglikelihoods)
        confidences.append(probabilities[item.chosen])
        right.append(item.chosen == item.gold)
        squares.append(((probabilities - np.eye(count)[item.gold]) ** 2).sum())
    # bins are open below and closed above, (0.1, 0.2]
    bins = np.digitize(confidences, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    gaps = np.bincount(bins, weights=np.array(right, dtype=float) - confidences)
    return {"ece": float(np.abs(gaps).sum() / len(items)), "brier": float(np.mean(squares))}


def health(items: Sequence) -> dict[str, float]:
    """How a side writes: too little, in circles, or without an end.

    Args:
        items: with `reply_ids` (tokens of the reply, end token excluded) and `finished` (the reply
            ended by itself, before the limit).

    Returns:
        `replies` (how many), `mean_tokens`, `median_tokens`, and four shares: `short` (at most 3
        tokens), `empty` (no token at all), `unfinished` (cut at the limit), and `repetition`, the
        share of a reply's 4-grams that it has written before (seq-rep-4; S. Welleck et al.,
        "Neural Text Generation with Unlikelihood Training", ICLR 2020), averaged over the replies
        long enough to hold a 4-gram; 0 if none is.

    Raises:
        ValueError: no items, or one that was not generated.
    """
    for item in _some(items):
        if item.reply_ids is None or item.finished is None:
            raise ValueError(f"item {item.doc_id} has no generated reply")
    lengths = np.array([len(item.reply_ids) for item in items])
    repeated = [_repeated(item.reply_ids) for item in items if len(item.reply_ids) >= NGRAM]
    return {
        "replies": len(items),
        "mean_tokens": float(lengths.mean()),
        "median_tokens": float(np.median(lengths)),
        "short": float((lengths <= SHORT).mean()),
        "empty": float((lengths == 0).mean()),
        "repetition": float(np.mean(repeated)) if repeated else 0.0,
        "unfinished": float(np.mean([not item.finished for item in items])),
    }


def format_and_knowledge(likelihood_items: Sequence, generation_items: Sequence) -> dict[str, int]:
    """The same questions answered twice by one side: as a choice by likelihood, and in words.

    A side that knows the answer but has lost the form of a reply is right in the first only.

    Args:
        likelihood_items, generation_items: with `doc_id` and `score` (0 or 1), in any order.

    Returns:
        Counts that add up to `n`: `both` right, `knowledge_only` (right by likelihood alone),
        `words_only` (right in words alone), `neither`.

    Raises:
        ValueError: the two did not answer the same documents, or a score is graded.
    """
    by_likelihood, in_words = (_right(items) for items in (likelihood_items, generation_items))
    if by_likelihood.keys() != in_words.keys():
        odd = sorted(by_likelihood.keys() ^ in_words.keys())
        raise ValueError(
            f"{len(odd)} documents were answered by likelihood or in words, but not both: "
            f"{', '.join(map(str, odd[:5]))}{', ...' if len(odd) > 5 else ''}"
        )
    names = {(True, True): "both", (True, False): "knowledge_only", (False, True): "words_only",
             (False, False): "neither"}  # fmt: skip
    counts = {"n": len(by_likelihood), **dict.fromkeys(names.values(), 0)}
    for doc_id, right in by_likelihood.items():
        counts[names[right, in_words[doc_id]]] += 1
    return counts


def _some(items: Sequence) -> Sequence:
    if not items:
        raise ValueError("no items: a task that was asked has at least one")
    return items


def _repeated(ids: Sequence[int]) -> float:
    ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams)


def _right(items: Sequence) -> dict[int, bool]:
    """Right or wrong by document."""
    right = {}
    for item in _some(items):
        if item.doc_id in right:
            raise ValueError(f"document {item.doc_id} comes twice: give the items of one task")
        if item.score not in (0, 1):
            raise ValueError(f"item {item.doc_id}: score={item.score} is neither right nor wrong")
        right[item.doc_id] = item.score == 1
    return right
