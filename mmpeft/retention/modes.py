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
# private-use characters stand for what a document's exchange will put there
PICTURE, QUESTION, ANSWER = "\ue000", "\ue002", "\ue003"
_MARK = PICTURE + "{}\ue001"  # the picture of exchange {}
_MARKED = re.compile(_MARK.format("(\\d+)"))


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
    """How a mode words a prompt. Which exchange precedes it is settled by the document asked about.

    All prompts of a document have the same one; the documents of a task take them in turn.

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
        """Messages of lm-eval as one string, in which marks stand for an exchange."""
        if self.name != "text":
            first = next(i for i, m in enumerate(messages) if m["role"] == "user")
            if self.name == "with_image":
                opened = messages[first] | {"content": PICTURE + messages[first]["content"]}
                messages = [*messages[:first], opened, *messages[first + 1 :]]
            else:
                spoken = [{"role": "user", "content": PICTURE + QUESTION},
                          {"role": "assistant", "content": ANSWER}]  # fmt: skip
                messages = [*messages[:first], *spoken, *messages[first:]]
        return self._chat(messages, add_generation_prompt)

    def place(self, context: str, item: int) -> str:
        """A prompt with the exchange of its item; one that is no chat has it first.

        Args:
            item: number of the document among those of its task that are asked, which is what
                lm-eval has its requests call ``doc_id``.
        """
        if self.name == "text":
            return context
        number = item % len(self.exchanges)
        exchange = self.exchanges[number]
        if PICTURE not in context:
            context = PICTURE + context
        context = context.replace(PICTURE, _MARK.format(number), 1)
        return context.replace(QUESTION, exchange.question, 1).replace(ANSWER, exchange.answer, 1)

    def split(self, context: str) -> tuple[str, int | None, str]:
        """Of a placed prompt (words before the picture, number of the exchange or None, after)."""
        if found := _MARKED.search(context):
            return context[: found.start()], int(found[1]), context[found.end() :]
        return "", None, context


def without_mark(context: str) -> str:
    """The words alone."""
    return _MARKED.sub("", context)
