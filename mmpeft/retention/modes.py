"""The three modes of text: alone, after an irrelevant photograph, after a real image exchange.

Only the tuned side has eyes, so only it gets the picture; the words are the same on both sides, and
the base gives its answer as the LLM it was. The `control` side (adapter off, picture in) tells what
the picture alone does.
"""

import hashlib
import io
import re
from dataclasses import dataclass
from functools import cached_property

MODES = ("text", "with_image", "after_image")
_MARK = "\ue000{}\ue001"  # private-use characters: where the picture of exchange {} stands
_MARKED = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Exchange:
    """A picture, and what was said about it."""

    picture: object  # PIL image
    question: str = ""
    answer: str = ""

    @cached_property
    def sha256(self) -> str:
        buffer = io.BytesIO()
        self.picture.save(buffer, format="PNG")
        return hashlib.sha256(buffer.getvalue()).hexdigest()


class Mode:
    """How a mode words a prompt. Which exchange precedes it is settled by the prompt's words.

    Args:
        name: one of MODES.
        exchanges: pictures to stand before the prompts; none in mode text.
        chat: renders a list of messages, `(messages, add_generation_prompt) -> str`.
    """

    def __init__(self, name: str, exchanges: list[Exchange], chat):
        if name not in MODES:
            raise ValueError(f"mode {name!r} is unknown; choose among {', '.join(MODES)}.")
        self.name, self.exchanges, self._chat = name, exchanges, chat

    @property
    def always_chat(self) -> bool:
        return self.name == "after_image"

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """Messages of lm-eval as one string in which a mark stands for the picture."""
        if self.name != "text":
            number = self._number(messages[-1]["content"])
            mark, exchange = _MARK.format(number), self.exchanges[number]
            first = next(i for i, m in enumerate(messages) if m["role"] == "user")
            if self.name == "with_image":
                opened = messages[first] | {"content": mark + messages[first]["content"]}
                messages = [*messages[:first], opened, *messages[first + 1 :]]
            else:
                spoken = [{"role": "user", "content": mark + exchange.question},
                          {"role": "assistant", "content": exchange.answer}]  # fmt: skip
                messages = [*messages[:first], *spoken, *messages[first:]]
        return self._chat(messages, add_generation_prompt)

    def split(self, context: str) -> tuple[str, int | None, str]:
        """(words before the picture, number of the exchange or None, words after)."""
        if found := _MARKED.search(context):
            return context[: found.start()], int(found[1]), context[found.end() :]
        if self.name == "text":
            return "", None, context
        return "", self._number(context), context

    def _number(self, words: str) -> int:
        return int(hashlib.sha256(words.encode()).hexdigest(), 16) % len(self.exchanges)


def without_mark(context: str) -> str:
    """The words alone."""
    return _MARKED.sub("", context)
