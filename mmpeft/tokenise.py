"""Text with images in it to token ids, exactly as the tokenizer makes them of a whole text.

Many tokenizers treat the start of a text in their own way (a space before the first word), so the
parts around an image are never tokenised one by one. As upstream, an image is one more token of
the vocabulary while the text is split; that token lives in a copy of the tokenizer.

A tokenizer takes its added tokens out of a text before anything else, so what stands between two
of them does not depend on the rest. Chats repeat most such stretches (system prompt, openings of
turns, common questions): each is tokenised once and remembered.
"""

import copy
import functools
import re
import secrets
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import AddedToken

IMAGE_MARK = f"\ue000image:{secrets.token_hex(8)}\ue001"  # no user can spell it
BLANK = "\ue002"  # stands for a character of a literal while the rest is tokenised
REMEMBERED = 4096  # stretches of text, of at most as many characters as follow
LONGEST = 1000

_with_mark = WeakKeyDictionary()  # tokenizer -> (its size, its copy)


class Part(NamedTuple):
    """A piece of a text.

    Attributes:
        text: its characters; those of an image do not matter.
        kind: ``False`` (text in which special tokens are special), ``True`` (an image) or
            ``"literal"`` (text in which they stay text).
        learned: which characters the assistant wrote, bool ``(len(text),)``.
    """

    text: str
    kind: bool | str
    learned: np.ndarray


class Tokens(NamedTuple):
    """Ids of tokens and the characters each covers, int64 ``(N,)``."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def tokenise(
    tokenizer, parts: list[Part], add_special_tokens=False
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the tokens, int64 ``(N,)``, and which are learned, bool ``(N,)``.

    An image is one entry with the id -1. A token is learned when it overlaps what the assistant
    wrote: a word may bring along the space before it. One without characters goes with the
    character that follows.

    Raises:
        ValueError: the tokenizer makes a special token out of literal text, or of a text that only
            looks like one; or the text holds half a character.
    """
    text, blanked, learned, literal = "", "", [np.zeros(1, bool)], []
    for part in parts:
        written = IMAGE_MARK if part.kind is True else part.text
        if part.kind == "literal":
            literal.append(len(text))
        text += written
        blanked += BLANK * len(written) if part.kind == "literal" else written
        learned.append(np.zeros(len(written), bool) if part.kind is True else part.learned)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "the text holds half a character (the lone surrogate "
            f"\\u{ord(text[error.start]):04x}); write the whole character."
        ) from None
    marked = _copy_with_mark(tokenizer)
    tokens = marked.encode(blanked, add_special_tokens)
    if literal:
        tokens = _restore(marked, tokens, text, blanked, literal)
    ids, starts, ends = tokens
    for where in np.flatnonzero(np.isin(ids, marked.special) & (ends > starts)):
        if text[starts[where] : ends[where]].strip() != marked.added[ids[where]].content.strip():
            _refuse_special(text[starts[where] : ends[where]])
    if not (ends > starts).all():
        special = np.isin(ids, tokenizer.all_special_ids)
        ends = np.where(ends > starts, ends, starts + ~special)
    before = np.concatenate(learned).cumsum()  # (characters + 1,) learned ones before each
    is_image = ids == marked.mark
    own = before[np.minimum(ends, len(text))] > before[starts]
    return np.where(is_image, -1, ids), own & ~is_image


class _Marked:
    """A copy of a tokenizer in which the image mark is a token, with a memory of its own."""

    def __init__(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        # not special: split_special_tokens is to leave it whole
        tokenizer.add_tokens(AddedToken(IMAGE_MARK, normalized=False))
        self.added = tokenizer.added_tokens_decoder
        self.mark = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        # those that are written, not what stands for anything unknown
        self.special = [
            id for id, token in self.added.items()
            if token.special and id != tokenizer.unk_token_id
        ]  # fmt: skip
        self._spelt = bool(tokenizer.split_special_tokens)
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        # two, set once: threads may tokenise at the same time
        self._backends = {spelt: copy.deepcopy(backend) for spelt in (False, True)}
        for spelt, own in self._backends.items():
            own.encode_special_tokens = spelt
        # As the tokenizer looks for them: all at once, the longest first. Those that take spaces
        # along are no place to cut; where some must stand alone, what is before them matters, and
        # the mark is the only one.
        exact = [token for token in self.added.values() if not token.normalized]
        self._cuts = {token.content for token in exact if not (token.lstrip or token.rstrip)}
        if any(token.single_word for token in exact):
            self._cuts = {IMAGE_MARK}
        longest_first = sorted((token.content for token in exact), key=len, reverse=True)
        self._exact = re.compile("|".join(map(re.escape, longest_first)))
        self._remembered = functools.lru_cache(REMEMBERED)(self._stretch)

    def encode(self, text: str, add_special_tokens: bool) -> Tokens:
        """The tokens of a whole text."""
        if add_special_tokens or self._spelt:
            return self.encode_once(text, self._spelt, add_special_tokens)
        ends = [m.end() for m in self._exact.finditer(text) if m.group() in self._cuts]
        if not ends or ends[-1] < len(text):
            ends.append(len(text))
        starts, parts = [0, *ends[:-1]], []
        for start, end in zip(starts, ends, strict=True):
            encode = self._remembered if end - start <= LONGEST else self._stretch
            parts.append(encode(text[start:end], start > 0))
        if len(parts) == 1:
            return parts[0]
        shift = np.repeat(starts, [len(part.ids) for part in parts])
        ids, starts, ends = map(np.concatenate, zip(*parts, strict=True))
        return Tokens(ids, starts + shift, ends + shift)

    def encode_once(self, text: str, spelt=False, add_special_tokens=False) -> Tokens:
        """The tokens of a text; with ``spelt``, special tokens in it are only spelt."""
        # a batch of one would wake threads, after which worker processes cannot be forked quietly
        encoded = self._backends[spelt].encode(text, add_special_tokens=add_special_tokens)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        return Tokens(np.array(encoded.ids, np.int64), offsets[:, 0], offsets[:, 1])

    def behind_a_token(self, text: str, spelt=False) -> Tokens:
        """As :meth:`encode_once`, for a text that does not begin the whole."""
        tokens = self.encode_once(IMAGE_MARK + text, spelt)
        shift = len(IMAGE_MARK)
        return Tokens(tokens.ids[1:], tokens.starts[1:] - shift, tokens.ends[1:] - shift)

    def _stretch(self, text: str, behind: bool) -> Tokens:
        return self.behind_a_token(text) if behind else self.encode_once(text)


def _restore(marked: _Marked, tokens: Tokens, text: str, blanked: str, literal: list[int]):
    """``tokens`` with every run between added tokens in which a literal starts tokenised anew."""
    restored, run, first = [], [], 0
    for token in [*_triples(tokens), None]:
        last = len(text) if token is None else token[1]
        if token is not None and not _is_spelt(marked.added, blanked, token):
            run.append(token)
            continue
        if any(first <= start < last for start in literal):
            front, back = _unwritten(marked, run)
            run = [*front, *_as_text(marked, text, first, last), *back]
        restored += run if token is None else [*run, token]
        run, first = [], last if token is None else token[2]
    return Tokens(*np.array(restored, np.int64).reshape(-1, 3).T)


def _unwritten(marked: _Marked, run: list) -> tuple[list, list]:
    """What the tokenizer itself puts before and behind a text, as its BOS."""
    own = [a == b and token in marked.special for token, a, b in run]
    front = own.index(False) if False in own else len(own)
    back = own[front:].index(True) + front if True in own[front:] else len(own)
    return run[:front], run[back:]


def _as_text(marked: _Marked, text: str, first: int, last: int) -> list[tuple[int, int, int]]:
    """The tokens of a stretch of ``text`` in which special tokens are only spelt."""
    encode = marked.behind_a_token if first else marked.encode_once
    run = [
        (token, a + first, b + first) for token, a, b in _triples(encode(text[first:last], True))
    ]
    for token in run:
        if _is_spelt(marked.added, text, token) and marked.added[token[0]].special:
            _refuse_special(text[token[1] : token[2]])
    return run


def _refuse_special(spelt: str):
    raise ValueError(
        f"a message spells {spelt!r}, and this tokenizer makes the special token of it even as "
        "plain text; spell it otherwise."
    )


def _triples(tokens: Tokens) -> list[tuple[int, int, int]]:
    """``(id, start, end)`` of each token."""
    return list(zip(*(column.tolist() for column in tokens), strict=True))


def _is_spelt(added: dict, text: str, token: tuple[int, int, int]) -> bool:
    """Whether a token is an added one that stands in the text (not, say, for what is unknown)."""
    number, start, end = token
    return number in added and text[start:end].strip() == added[number].content


def _copy_with_mark(tokenizer) -> _Marked:
    size, marked = _with_mark.get(tokenizer, (None, None))
    if size != len(tokenizer):
        marked = _Marked(tokenizer)
        _with_mark[tokenizer] = len(tokenizer), marked
    return marked
