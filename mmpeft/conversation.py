"""One conversation on its way through a chat template.

The template sees sentinels where images and spelt special tokens stand, and what it renders is cut
at them again. Their key is drawn anew in every process and never shown: whatever a user writes
stays text.
"""

import functools
import json
import re
import secrets
from collections.abc import Mapping
from reprlib import repr as shown  # a value may be megabytes long
from typing import NamedTuple

from mmpeft.images import load_frames

IMAGE_TOKEN = "<image>"  # marks an image in raw text given to ``__call__``; no vocabulary entry
KEY = secrets.token_hex(8)  # of the sentinels


class Picture(NamedTuple):
    """One image of a chat: where it comes from, and the user's words beside it."""

    source: object
    instruction: str = ""


class Chat:
    """One conversation with its images and literal special tokens swapped for sentinels.

    Raises:
        ValueError: a message is not of the form that templates read, with its number and field.
    """

    def __init__(self, messages, special_tokens: list[str], num_frames: int, image_mark=None):
        self.pictures, self._replaced, self._num_frames = [], [], num_frames
        self._aside = set()  # sentinels in fields that a template may leave out or repeat
        self._image_mark, self._num_marks = image_mark, 0
        self._special = _spelt(tuple(special_tokens))
        self._sentinel = _sentinels(image_mark)
        if not isinstance(messages, (list, tuple)):
            raise ValueError(f"messages is {type(messages).__name__}; give a list of turns.")
        self.messages = [self._message(m, f"messages[{n}]") for n, m in enumerate(messages)]

    def _message(self, message, field: str) -> dict:
        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise ValueError(f"{field} is {kind}; give an object with role and content.")
        role = message.get("role")
        if not isinstance(role, str) or self._special.whole.search(role):
            raise ValueError(f"{field}.role is {shown(role)}; use system, user, assistant or tool.")
        try:
            others = {
                key: self._other(value)
                for key, value in message.items()
                if key not in ("role", "content")
            }
        except RecursionError:
            raise ValueError(f"{field} is nested too deeply; make it flatter.") from None
        content = self._content(message.get("content"), f"{field}.content")
        return others | {"role": role, "content": content}

    def _swap(self, kind, text: str) -> str:
        self._replaced.append((text, kind))
        return f"\ue000{KEY}:{len(self._replaced) - 1}\ue001"

    def _other(self, value):
        """Any other field, such as tool calls: special tokens in it stay text, too."""
        if isinstance(value, str):
            first = len(self._replaced)
            value = self._text(value)
            self._aside.update(range(first, len(self._replaced)))
        elif isinstance(value, Mapping):
            value = {self._other(key): self._other(one) for key, one in value.items()}
        elif isinstance(value, (list, tuple)):
            value = [self._other(one) for one in value]
        return value

    def _text(self, text: str) -> str:
        """A text with its special tokens swapped, and what might be part of one at its ends.

        The other part may stand in the next text or in the template.
        """
        end = self._special.head_length(text)
        start = self._special.tail_length(text[: len(text) - end])
        middle = text[start : len(text) - end]
        swapped = self._special.whole.sub(lambda m: self._swap("literal", m.group()), middle)
        return text and "".join(
            (
                self._swap("literal", text[:start]) if start else "",
                swapped,
                self._swap("literal", text[len(text) - end :]) if end else "",
            )
        )

    def _content(self, content, field: str):
        if content is None or isinstance(content, str):
            content = [{"type": "text", "text": content or ""}]
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"{field} is {type(content).__name__}; give text or a list of parts.")
        for number, part in enumerate(content):
            if not isinstance(part, Mapping):
                kind = type(part).__name__
                raise ValueError(f"{field}[{number}] is {kind}; give an object with a type.")
            if part.get("type") == "text" and not isinstance(part.get("text"), str):
                kind = type(part.get("text")).__name__
                raise ValueError(f"{field}[{number}].text is {kind}; write a string.")
        words = " ".join(part["text"] for part in content if part.get("type") == "text")
        pieces = [piece for part in content for piece in self._part(part, words)]
        self._num_marks += pieces.count(None)
        if self._image_mark is None:
            return "".join(self._swap(True, IMAGE_TOKEN) if p is None else p for p in pieces)
        return [{"type": "image"} if p is None else {"type": "text", "text": p} for p in pieces]

    def _part(self, part: dict, words: str) -> list:
        """Text with its special tokens swapped; ``None`` for every image."""
        if part.get("type") == "text":
            return [self._text(part["text"])]
        if part.get("type") == "image":
            if (source := _source(part, "image")) is not None:
                self.pictures.append(Picture(source, words))
            return [None]
        if part.get("type") == "video":
            if (clip := _source(part, "video")) is None:
                raise ValueError(
                    "a message part of type 'video' has no clip; give its frames, or an animated "
                    "image file, as 'video'."
                )
            frames = load_frames(clip, self._num_frames)
            self.pictures += [Picture(frame, words) for frame in frames]
            return [None] * len(frames)
        kind = part.get("type")
        raise ValueError(f"message part of type {shown(kind)}; use 'text', 'image' or 'video'.")

    def _found(self, match) -> tuple[str, bool | str]:
        """What a sentinel, or an image mark of the template, stands for: text and kind."""
        return (IMAGE_TOKEN, True) if match[1] is None else self._replaced[int(match[1])]

    def segments(self, rendered: str):
        """The rendered text as ``(text, kind, width in rendered characters)``."""
        if self._num_marks != len(self.pictures):
            raise ValueError(
                f"the chat has {self._num_marks} image parts but {len(self.pictures)} images."
            )
        matches = list(self._sentinel.finditer(rendered))
        found = [int(match[1]) for match in matches if match[1] is not None]
        found = [number for number in found if number not in self._aside]
        expected = [n for n in range(len(self._replaced)) if n not in self._aside]
        shown = [n for n in found if self._replaced[n][1] is True]
        if shown != sorted(shown):
            raise ValueError(
                "the chat template puts pictures in another order than the messages have them; "
                "give them in the messages of the user."
            )
        images = sum(self._found(match)[1] is True for match in matches)
        whole = rendered.count(KEY) == sum(match[1] is not None for match in matches)
        if sorted(found) != expected or images != self._num_marks or not whole:
            raise ValueError(
                "the chat template drops or repeats a part of this chat that holds an image or a "
                "special token; check the roles and their order."
            )
        position = 0
        for match in matches:
            before = rendered[position : match.start()]
            if before:
                yield before, False, len(before)
            yield *self._found(match), len(match[0])
            position = match.end()
        if position < len(rendered):
            yield rendered[position:], False, len(rendered) - position

    def check_learned(self, rendered: str, spans: list[tuple[int, int]]) -> None:
        """Refuse a rendered chat that leaves words out, or whose marks miss what is learned.

        Args:
            spans: character ranges of ``rendered`` that the assistant wrote.
        """
        learned = _squeezed("".join(rendered[start:end] for start, end in spans))
        everything, place = _squeezed(rendered), 0
        for number, message in enumerate(self.messages):
            for text in _texts(message["content"]):
                said = _squeezed(text)
                # some templates write what a tool says as JSON
                if said not in everything and not any(
                    _as_json(text, ascii) in everything for ascii in (True, False)
                ):
                    raise ValueError(
                        f"the chat template leaves out or changes words of messages[{number}] "
                        f"({message['role']}); set model.chat_template to one that writes them."
                    )
                if message["role"] != "assistant":
                    continue
                if (place := learned.find(said, place)) < 0:
                    raise ValueError(
                        "the chat template's {% generation %} blocks do not hold what the "
                        f"assistant says in messages[{number}]; write them outside of macros, "
                        "{% set %}, {% filter %} and {% call %}, around the content itself."
                    )
                place += len(said)

    def as_text(self, rendered: str) -> str:
        """The rendered text for a reader or for ``BridgeProcessor.__call__``."""
        text = self._sentinel.sub(lambda m: self._found(m)[0], rendered)
        if text.count(IMAGE_TOKEN) != self._num_marks:
            raise ValueError(
                f"a message spells {IMAGE_TOKEN}, which plain text could not tell from an image; "
                "use tokenize=True."
            )
        return text


def _texts(content: str | list[dict]) -> list[str]:
    """The words of a swapped message, by parts."""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def _as_json(text: str, ascii: bool) -> str:
    return _squeezed(json.dumps(text, ensure_ascii=ascii)[1:-1])


def _squeezed(text: str) -> str:
    """A text without blanks, which templates strip and add."""
    return "".join(text.split())


class _Spelt(NamedTuple):
    """Where a text spells one of some tokens, or might begin or end one.

    Attributes:
        whole: finds any of the tokens, the longest first.
        heads: what they begin with, up to no blank: templates strip those.
        tails: what they end with, from no blank on.
        longest: characters of the longest of these.
    """

    whole: re.Pattern
    heads: frozenset[str]
    tails: frozenset[str]
    longest: int

    def head_length(self, text: str) -> int:
        """How many characters at the end of a text may begin a token; the most."""
        lengths = range(min(self.longest, len(text)), 0, -1)
        return next((n for n in lengths if text[-n:] in self.heads), 0)

    def tail_length(self, text: str) -> int:
        """How many characters at the start of a text may end a token; the most."""
        lengths = range(min(self.longest, len(text)), 0, -1)
        return next((n for n in lengths if text[:n] in self.tails), 0)


@functools.lru_cache(64)
def _spelt(tokens: tuple[str, ...]) -> _Spelt:
    longest_first = sorted(tokens, key=len, reverse=True)
    cuts = [(token[:n], token[n:]) for token in tokens for n in range(1, len(token))]
    heads = frozenset(head for head, _ in cuts if not head[-1].isspace())
    tails = frozenset(tail for _, tail in cuts if not tail[0].isspace())
    whole = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    return _Spelt(whole, heads, tails, max(map(len, tokens), default=1) - 1)


@functools.lru_cache(64)
def _sentinels(image_mark: str | None) -> re.Pattern:
    """Finds sentinels, and what the template itself writes for an image."""
    mark = "" if image_mark is None else f"|{re.escape(image_mark)}"
    return re.compile(f"\ue000{KEY}:(\\d+)\ue001{mark}")


def _source(part: dict, kind: str):
    """Where the picture or clip of a part is, under any of the names transformers has for it."""
    if "base64" in part:
        return f"data:;base64,{part['base64']}"
    return next((part[key] for key in (kind, "path", "url") if key in part), None)
