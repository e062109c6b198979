"""Rows that are chats already: ``messages`` as transformers and TRL write them, and
``conversations`` as LLaVA and ShareGPT do."""

import re

from mmpeft.checks import ASIDE, BESIDE
from mmpeft.formats.pictures import shown

IMAGE_MARK = "<image>"
# the line break that sets marks off from the words: behind a line of marks, or before the last one
_BREAK = re.compile(r"(?<![^\n])((?:<image>)+)\r?\n|\r?\n((?:<image>)+)\Z")
_JUDGED = (
    *ASIDE,
    *BESIDE,
    "weight",
    "train",
    "loss",
    "unfinished",
)  # fields of a turn that are judged later

_FROM_VALUE = ("from", "value")
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


def from_messages(row) -> list[dict]:
    """``messages``: role and content, a text or typed parts; ``image(s)`` for parts without one."""
    _refuse_tools(row)
    row.refuse(("system",), "would not be learned from", "write it as the first message")
    chat, given = [], row.pictures()
    waiting = iter(given)
    marks = 0
    for n, message in enumerate(row.list("messages")):
        at = f"{row.column('messages')}[{n}]"
        if not isinstance(message, dict):
            raise row.error(at, "is no object with role and content", "write it as one")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for k, part in enumerate(content):
                if not isinstance(part, dict):
                    raise row.error(f"{at}.content[{k}]", "is no object with a type", "write one")
                part = _part(row, part, f"{at}.content[{k}]")
                if part.get("type") == "image" and "image" not in part:
                    if part.pop("index", marks) != marks:  # some say which of ``images`` it is
                        problem = "has an index that is not its place among the images"
                        raise row.error(f"{at}.content[{k}]", problem, "order the images so")
                    marks += 1
                    if (picture := next(waiting, None)) is not None:
                        part["image"] = picture
                parts.append(part)
            message["content"] = parts
        chat.append(message)
    if marks != len(given):
        remedy = "give one for each part"
        texts = [said["content"] for said in chat if isinstance(said.get("content"), str)]
        if any(IMAGE_MARK in text for text in texts):
            name = row.column("messages")
            remedy += f", or if {IMAGE_MARK} stands for one, set format: llava, "
            remedy += f"columns: {{conversations: {name}}}"
        raise row.error(
            row.image_column or "images",
            f"has {len(given)} images for {marks} image parts without one in the messages",
            remedy,
        )
    return chat


def _refuse_tools(row) -> None:
    """No template is told of tools while training, so an answer would call what nobody named."""
    remedy = "write them into the system message, or take the column out"
    problem = "would not be learned from: tools are not written out"
    row.refuse(("tools", "functions"), problem, remedy)


def _part(row, part: dict, at: str) -> dict:
    """A part under one name for its source, and that found; without nulls, which tables fill in."""
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "image_url":  # as OpenAI writes it
        url = part.get("image_url")
        part = {"type": "image", "image": url.get("url") if isinstance(url, dict) else url}
        kind = "image"
    if kind not in ("image", "video"):
        return part
    sources = [key for key in (kind, "base64", "path", "url") if key in part]
    if len(sources) > 1:
        raise row.error(at, f"has {' and '.join(sources)}", "keep one of them")
    if "base64" in part:
        part[kind] = f"data:;base64,{part.pop('base64')}"
    for other in ("path", "url"):  # as transformers also writes it
        if other in part:
            part.setdefault(kind, part.pop(other))
    if kind in part:
        part[kind] = row.clip(part[kind], at) if kind == "video" else row.picture(part[kind], at)
    return part


def from_conversations(row) -> list[dict]:
    """``conversations``: from and value (or role and content), ``<image>`` for a picture.

    Only what the user, the system or a tool says is searched for marks; what the assistant says
    are words.
    """
    _refuse_tools(row)
    given, marks, chat = row.pictures(), 0, []
    if row.data.get("system"):
        chat.append({"role": "system", "content": row.text("system")})
    for n, turn in enumerate(row.list("conversations")):
        at = f"{row.column('conversations')}[{n}]"
        if not isinstance(turn, dict):
            raise row.error(at, "is no object with from and value", "write it as one")
        who, said = ("role", "content") if "from" not in turn and "role" in turn else _FROM_VALUE
        speaker, text = turn.get(who), turn.get(said)
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            problem = "is missing" if speaker is None else f"is {shown(str(speaker))}"
            raise row.error(f"{at}.{who}", problem, f"use {', '.join(SPEAKERS)}")
        if not isinstance(text, str):
            problem = "is missing" if text is None else f"is a {type(text).__name__}, no text"
            raise row.error(f"{at}.{said}", problem, "write a text")
        pieces = [text]
        if role != "assistant":
            pieces = re.split(f"({IMAGE_MARK})", _BREAK.sub(r"\1\2", text))
        marks += len(pieces) // 2  # by turns words and marks
        if len(pieces) > 1:
            text = []
            for k, piece in enumerate(pieces):
                if k % 2:
                    text.append({"type": "image", "image": None})
                elif piece:
                    text.append({"type": "text", "text": piece})
        beside = {key: turn[key] for key in _JUDGED if turn.get(key) is not None}
        chat.append({"role": role, "content": text} | beside)
    if marks != len(given):
        raise row.error(
            row.image_column or "image",
            f"has {len(given)} images for {marks} {IMAGE_MARK} in the words",
            f"give one for each {IMAGE_MARK}, or name their column with columns: {{image: NAME}}",
        )
    pictures = iter(given)
    for message in chat:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = next(pictures)
    return chat
