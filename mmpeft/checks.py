"""What is wrong with a chat, field by field, before any tokenizer or picture is needed.

``mmpeft data check``, the start of training and every row drawn while training ask here, so a row
is refused in the same words everywhere.
"""

from reprlib import repr as shown  # a value may be megabytes long
from typing import NamedTuple

ROLES = ("system", "user", "assistant", "tool")
KINDS = ("text", "image", "video")
BEFORE = {  # role -> what may stand right before it; None is the start of the chat
    "system": (None,),
    "user": (None, "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# what some chat templates write, each in a way of its own, and others leave out without a word
ASIDE = ("tool_calls", "function_call", "reasoning_content", "thinking")
BESIDE = ("image", "images", "video", "videos", "audio", "audios")  # no part of content


class Problem(NamedTuple):
    """One thing wrong; ``field problem; remedy.`` reads as a sentence."""

    field: str
    problem: str
    remedy: str

    def __str__(self):
        return f"{self.field} {self.problem}; {self.remedy}."


def chat_problems(messages) -> list[Problem]:
    """All that keeps a chat from being learned from, in the order of its messages.

    Looked at are roles and their order, empty turns, parts, the last turn, and whether the
    assistant says anything; not whether pictures can be read. Tool calls, thoughts and weights that
    a message has beside its content are refused: they would not be learned as they are written.
    A chat in order has none.
    """
    if not isinstance(messages, list):
        kind = type(messages).__name__
        return [Problem("messages", f"is no list but {kind}", "give a list of turns")]
    if not messages:
        return [Problem("messages", "is empty", "give at least a question and its answer")]
    found, before, said = [], None, False
    for n, message in enumerate(messages):
        field = f"messages[{n}]"
        if not isinstance(message, dict):
            found.append(
                Problem(field, "is no object with role and content", "write one for each turn")
            )
            before = ...
            continue
        role = message.get("role")
        if role not in ROLES:
            found.append(Problem(f"{field}.role", f"is {shown(role)}", f"use {', '.join(ROLES)}"))
            before = ...  # what may follow it cannot be said
        else:
            if before is not ... and before not in BEFORE[role]:
                found.append(_out_of_order(field, role, before))
            before = role
        wrong, has_words = _content_problems(field, role, message.get("content"))
        # a message that only calls a tool is not empty; what it says is just not in its content
        found += _aside_problems(field, role, message) or wrong
        said |= role == "assistant" and has_words
        if message.get("unfinished") and (role != "assistant" or n < len(messages) - 1):
            found.append(
                Problem(
                    f"{field}.unfinished",
                    "marks a message that is not the assistant's last",
                    "only the last answer of a chat may be unfinished",
                )
            )
    if before not in ("assistant", ...):
        found.append(
            Problem(
                f"messages[{len(messages) - 1}].role",
                f"says that the last message is the {before}'s",
                "a training chat ends with the assistant's answer",
            )
        )
    elif not said and not found:
        found.append(
            Problem("messages", "has no assistant words to learn from", "give an answer in words")
        )
    return found


def _out_of_order(field: str, role: str, before: str | None) -> Problem:
    if role == "system":
        remedy = "a chat has one system message, its first"
    elif role == "tool":
        remedy = "a tool answers what an assistant asked"
    elif role == before:
        remedy = "join the two, or write the turn that is missing between them"
    else:
        remedy = "an assistant answers a user or a tool"
    after = "at the start of the chat" if before is None else f"right after {before!r}"
    return Problem(f"{field}.role", f"is {role!r} {after}", remedy)


def _aside_problems(field: str, role, message: dict) -> list[Problem]:
    """Problems of what a message has beside its role and content."""
    found = [
        Problem(
            f"{field}.{key}", "would not be learned: chat templates may leave it out",
            "write it into content as the model is to say it, or take the row out",
        )
        for key in ASIDE
        if message.get(key)
    ]  # fmt: skip
    found += [
        Problem(
            f"{field}.{key}", "would not be shown: it stands beside the content",
            "write it into content, as a part of its type",
        )
        for key in BESIDE
        if message.get(key)
    ]  # fmt: skip
    for key in ("weight", "train", "loss"):
        value = message.get(key)
        if value is not None and value != (role == "assistant"):
            found.append(
                Problem(
                    f"{field}.{key}",
                    f"is {shown(value)}, but all that the assistant says is learned, and no more",
                    "leave the field out if that is meant, else take the row out",
                )
            )
    return found


def _content_problems(field: str, role, content) -> tuple[list[Problem], bool]:
    """Problems of a message's content, and whether it has words."""
    field = f"{field}.content"
    empty = f"({role}) is empty" if role in ROLES else "is empty"
    if isinstance(content, str):
        if content and not content.isspace():
            return _text_problems(field, content), True
        content = None
    if not content and (content is None or isinstance(content, list)):
        return [Problem(field, empty, "fill or drop it")], False
    if not isinstance(content, list):
        kind = type(content).__name__
        return [Problem(field, f"is {kind}", "give text or a list of parts")], False
    found, words, seen = [], False, False
    for k, part in enumerate(content):
        own = f"{field}[{k}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict):
            found.append(Problem(own, "is no object with a type", "write {type: text, text: ...}"))
        elif kind not in KINDS:
            found.append(
                Problem(own, f"is a part of type {shown(kind)}", f"use {', '.join(KINDS)}")
            )
        elif kind == "text":
            text = part.get("text")
            if isinstance(text, str):
                found += _text_problems(f"{own}.text", text)
                words |= bool(text) and not text.isspace()
            else:
                found.append(
                    Problem(
                        f"{own}.text", f"is no text but {type(text).__name__}", "write a string"
                    )
                )
        else:
            seen = True
            problem = _picture_problem(part, kind)
            found += [Problem(own, *problem)] if problem else []
    if not (found or words or seen):
        return [Problem(field, empty, "fill or drop it")], False
    return found, words


def _text_problems(field: str, text: str) -> list[Problem]:
    if text.isascii():
        return []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = f"{ord(text[error.start]):04x}"
        return [
            Problem(
                field,
                f"holds half a character (the lone surrogate \\u{broken} at {error.start})",
                "write the whole character",
            )
        ]
    return []


def _picture_problem(part: dict, kind: str) -> tuple[str, str] | None:
    """What is missing in an image or video part, and the remedy."""
    keys = (kind, "path", "url", "base64")
    source = next((part[key] for key in keys if part.get(key) is not None), None)
    if source is None:
        what = "image" if kind == "image" else "clip"
        return f"of type {kind!r} has no {what}", f"give it as {kind!r}"
    if isinstance(source, (str, bytes, list, tuple)) and not source:
        return f"of type {kind!r} holds nothing ({source!r})", f"give it as {kind!r}"
    return None
