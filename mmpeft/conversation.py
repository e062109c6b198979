"""One conversation on its way through a chat template.

The template sees sentinels where images and spelt special tokens stand, and what it renders is cut
at them again. Their key is drawn anew in every process and never shown: whatever a user writes
stays text.
"""

import functools
import re
import secrets
from typing import NamedTuple

from mmpeft.images import load_frames

IMAGE_TOKEN = "<image>"  # marks an image in raw text given to ``__call__``; no vocabulary entry
KEY = secrets.token_hex(8)  # of the sentinels


class Picture(NamedTuple):
    """One image of a chat: where it comes from, and the user's words beside it."""

    source: object
    instruction: str = ""


class Chat:
    """One conversation with its images and literal special tokens swapped for sentinels."""

    def __init__(self, messages, special_tokens: list[str], num_frames: int, image_mark=None):
        self.pictures, self._replaced, self._num_frames = [], [], num_frames
        self._image_mark, self._num_marks = image_mark, 0
        self._special = _any_of(tuple(special_tokens))
        self.messages = [m | {"content": self._content(m.get("content"))} for m in messages]
        self._sentinel = _sentinels(image_mark)

    def _swap(self, kind, text: str) -> str:
        self._replaced.append((text, kind))
        return f"\ue000{KEY}:{len(self._replaced) - 1}\ue001"

    def _content(self, content):
        if content is None or isinstance(content, str):
            content = [{"type": "text", "text": content or ""}]
        words = " ".join(part["text"] for part in content if part.get("type") == "text")
        pieces = [piece for part in content for piece in self._part(part, words)]
        self._num_marks += pieces.count(None)
        if self._image_mark is None:
            return "".join(self._swap(True, IMAGE_TOKEN) if p is None else p for p in pieces)
        return [{"type": "image"} if p is None else {"type": "text", "text": p} for p in pieces]

    def _part(self, part: dict, words: str) -> list:
        """Text with its special tokens swapped; ``None`` for every image."""
        if part.get("type") == "text":
            return [self._special.sub(lambda m: self._swap("literal", m.group()), part["text"])]
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
        raise ValueError(f"message part of type {kind!r}; use 'text', 'image' or 'video'.")

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
        found = sorted(int(match[1]) for match in matches if match[1] is not None)
        images = sum(self._found(match)[1] is True for match in matches)
        if found != list(range(len(self._replaced))) or images != self._num_marks:
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

    def as_text(self, rendered: str) -> str:
        """The rendered text for a reader or for ``BridgeProcessor.__call__``."""
        text = self._sentinel.sub(lambda m: self._found(m)[0], rendered)
        if text.count(IMAGE_TOKEN) != self._num_marks:
            raise ValueError(
                f"a message spells {IMAGE_TOKEN}, which plain text could not tell from an image; "
                "use tokenize=True."
            )
        return text


@functools.lru_cache(64)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern:
    """Finds any of the tokens, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


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
