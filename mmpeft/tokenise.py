"""Text with images in it to token ids, exactly as the tokenizer makes them of a whole text.

Many tokenizers treat the start of a text in their own way (a space before the first word), so the
parts around an image are never tokenised one by one. As upstream, an image is one more token of
the vocabulary while the text is split; that token lives in a copy of the tokenizer.
"""

import copy
import secrets
from typing import NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import AddedToken

IMAGE_MARK = f"\ue000image:{secrets.token_hex(8)}\ue001"  # no user can spell it
BLANK = "\ue002"  # stands for a character of a literal while the rest is tokenised

_with_mark = WeakKeyDictionary()  # tokenizer -> (its size, the copy)


class Part(NamedTuple):
    """A piece of a text.

    Attributes:
        text: its characters; those of an image do not matter.
        kind: ``False`` (text in which special tokens are special), ``True`` (an image) or
            ``"literal"`` (text in which they stay text).
        learned: which characters the assistant wrote, as many as ``text`` has.
    """

    text: str
    kind: bool | str
    learned: list[bool]


def tokenise(tokenizer, parts: list[Part], add_special_tokens=False) -> list[tuple]:
    """``(id, learned)`` of each token; an image is one entry with the id ``None``.

    A token is learned when it overlaps what the assistant wrote: a word may bring along the space
    before it. One without characters goes with the character that follows.

    Raises:
        ValueError: the tokenizer makes a special token out of literal text.
    """
    text, blanked, learned, literal = "", "", [], []
    for part in parts:
        written = IMAGE_MARK if part.kind is True else part.text
        if part.kind == "literal":
            literal.append(len(text))
        text += written
        blanked += BLANK * len(written) if part.kind == "literal" else written
        learned += [False] * len(written) if part.kind is True else part.learned
    marked = _copy_with_mark(tokenizer)
    mark = marked.convert_tokens_to_ids(IMAGE_MARK)
    tokens = _encode(marked, blanked, add_special_tokens=add_special_tokens)
    if literal:
        tokens = _restore(marked, tokens, text, blanked, literal)
    special = set(tokenizer.all_special_ids)
    encoded = []
    for token, start, end in tokens:
        width = end - start or int(token not in special)
        own = token != mark and any(learned[start : start + width])
        encoded.append((None if token == mark else token, own))
    return encoded


def _encode(tokenizer, text: str, **options) -> list[tuple[int, int, int]]:
    """``(id, start, end)`` of each token."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(token, start, end) for token, (start, end) in pairs]


def _restore(marked, tokens, text: str, blanked: str, literal: list[int]):
    """``tokens`` with every run between added tokens in which a literal starts tokenised anew."""
    added = marked.added_tokens_decoder
    restored, run, first = [], [], 0
    for token in [*tokens, None]:
        last = len(text) if token is None else token[1]
        if token is not None and not _is_spelt(added, blanked, token):
            run.append(token)
            continue
        if any(first <= start < last for start in literal):
            run = _as_text(marked, added, text, first, last)
        restored += run if token is None else [*run, token]
        run, first = [], last if token is None else token[2]
    return restored


def _as_text(marked, added: dict, text: str, first: int, last: int) -> list[tuple[int, int, int]]:
    """The tokens of a stretch of ``text`` in which special tokens are only spelt."""
    before = IMAGE_MARK if first else ""  # what follows a token is not the start of a text
    run = _encode(
        marked, before + text[first:last], add_special_tokens=False, split_special_tokens=True
    )[int(bool(before)) :]
    shift = first - len(before)
    run = [(token, start + shift, end + shift) for token, start, end in run]
    for token in run:
        if _is_spelt(added, text, token) and added[token[0]].special:
            raise ValueError(
                f"a message spells {text[token[1] : token[2]]!r}, and this tokenizer makes the "
                "special token of it even as plain text; spell it otherwise."
            )
    return run


def _is_spelt(added: dict, text: str, token: tuple[int, int, int]) -> bool:
    """Whether a token is an added one that stands in the text (not, say, for what is unknown)."""
    number, start, end = token
    return number in added and text[start:end].strip() == added[number].content


def _copy_with_mark(tokenizer):
    size, marked = _with_mark.get(tokenizer, (None, None))
    if size != len(tokenizer):
        marked = copy.deepcopy(tokenizer)
        # not special: split_special_tokens is to leave it whole
        marked.add_tokens(AddedToken(IMAGE_MARK, normalized=False))
        _with_mark[tokenizer] = len(tokenizer), marked
    return marked
