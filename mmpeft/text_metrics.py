"""How close generated texts are to references, of which each may have several.

Every score is a :class:`~mmpeft.task.Metric`, so that it has an interval. Words are what spaces and
punctuation part, so texts of scripts without spaces do not score. NIST is left out: nltk's takes
the best reference for each order of n-gram, where the definition (Doddington 2002) counts over all
of them.
"""

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmpeft.task import Metric

ORDER = 4  # longest n-gram, of BLEU and CIDEr
SPREAD = 6.0  # of CIDEr-D's penalty on a difference in length, in words


def generation_metrics(
    replies: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Metric]:
    """``bleu``, ``meteor``, ``rouge_l`` (0 to 1) and ``cider`` (0 to 10) of replies.

    ``meteor`` is left out, with a line on stderr, where nltk finds no WordNet.

    Args:
        references: those of each reply, at least one.
    """
    found = {
        "bleu": bleu(replies, references),
        "meteor": meteor(replies, references),
        "rouge_l": Metric(rouge_l(replies, references)),
        "cider": Metric(cider(replies, references)),
    }
    return {name: metric for name, metric in found.items() if metric is not None}


def bleu(replies, references) -> Metric:
    """BLEU-4 of the corpus (Papineni et al. 2002), case ignored, words of mteval-v13a.

    As the scripts of the E2E challenge compute it; by sacrebleu, signature
    ``case:lc|eff:no|tok:13a|smooth:exp``.
    """
    from sacrebleu.metrics import BLEU

    counter = BLEU(lowercase=True, effective_order=True)  # which only quiets a warning here
    counted = [counter.sentence_score(*one) for one in zip(replies, references, strict=True)]

    def of(rows: np.ndarray) -> float:  # (n, 2 + 2 * ORDER)
        reply, reference, *counts = rows.sum(0).astype(int).tolist()
        score = BLEU.compute_bleu(
            counts[:ORDER], counts[ORDER:], reply, reference, smooth_method="exp"
        )
        return score.score / 100

    return Metric([(c.sys_len, c.ref_len, *c.counts, *c.totals) for c in counted], of)


def rouge_l(replies, references) -> list[float]:
    """ROUGE-L of each reply (Lin 2004): F1 with the best reference, by rouge_score, no stemming.

    Words are of letters and digits of any script; rouge_score's own are of a to z alone, the same
    in English. COCO's script weights recall more (beta 1.2), so its values are a little different.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_LettersAndDigits())
    return [
        scorer.score_multi(own, reply)["rougeL"].fmeasure
        for reply, own in zip(replies, references, strict=True)
    ]


class _LettersAndDigits:
    """As rouge_score's tokenizer, of any script."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def meteor(replies, references) -> Metric | None:
    """METEOR of each reply (Banerjee and Lavie 2005) with the best reference, by nltk.

    Words match by form, stem, or as a WordNet synonym, for which nltk looks up the stems. METEOR
    1.5, the Java program, has other weights and paraphrase tables; its values do not compare.

    Returns:
        ``None``, with a line on stderr, where nltk finds no WordNet.
    """
    import nltk
    from nltk.translate.meteor_score import meteor_score

    try:
        nltk.corpus.wordnet.ensure_loaded()
    except LookupError:
        print(
            "meteor left out: nltk finds no WordNet, for synonyms; run python -m nltk.downloader "
            "wordnet",
            file=sys.stderr,
        )
        return None
    return Metric(
        [
            meteor_score([words(text) for text in own], words(reply))
            for reply, own in zip(replies, references, strict=True)
        ]
    )


def cider(replies, references) -> list[float]:
    """CIDEr-D of each reply, 0 to 10, as COCO's script reports it under the name CIDEr.

    Vedantam et al. 2015 (arXiv 1411.5726), equations 1 to 4 with the clipping and the length
    penalty of their section 7; of mteval-v13a's words, where the script has PTB's. How rare an
    n-gram is, is counted over these references: scores of different sets of rows do not compare,
    and a single row scores 0.
    """
    grams = [[_grams(words(text)) for text in own] for own in references]
    seen = Counter(gram for own in grams for gram in set().union(*own))
    rows = math.log(len(grams))

    def vectors(counts):
        found = [{} for _ in range(ORDER)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * (rows - math.log(max(1, seen[gram])))
        return found, [math.hypot(*vector.values()) for vector in found]

    def length(counts):  # in pairs of words, as the script has it
        return sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for reply, own in zip(replies, grams, strict=True):
        counts = _grams(words(reply))
        mine, norms = vectors(counts)
        total = 0.0
        for other in own:
            theirs, other_norms = vectors(other)
            penalty = math.exp(-((length(counts) - length(other)) ** 2) / (2 * SPREAD**2))
            for a, b, norm_a, norm_b in zip(mine, theirs, norms, other_norms, strict=True):
                if norm_a and norm_b:
                    common = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys())
                    total += penalty * common / (norm_a * norm_b)
        scores.append(10 * total / ORDER / len(own))
    return scores


def words(text: str) -> list[str]:
    """Lower-case words of mteval-v13a, without punctuation."""
    found = _tokenizer()(text.lower()).split()
    return [word for word in found if any(character.isalnum() for character in word)]


@functools.cache
def _tokenizer():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _grams(tokens: list[str]) -> Counter:
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(tokens) - n + 1)
    )
