"""Your own data: a JSONL file of chats with images.

Each line is ``{"messages": [...]}`` with the roles and typed parts of transformers and TRL:

    {"messages": [
      {"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                   {"type": "text", "text": "What is this?"}]},
      {"role": "assistant", "content": "A cat."}]}

A clip is ``{"type": "video", "video": [frame, ...]}`` or one animated image file; its frames are
images. Paths are relative to the file. Alternatively parts say only ``{"type": "image"}`` and the
line has ``"images": [...]``, one for each part in reading order.

A last assistant message with ``"unfinished": true`` was cut by a limit (``mmpeft replay`` writes
such): its words are learned, the end of the turn behind them is not.

All lines are parsed at the start; a row is read from the file when it is used, so the file must
stay as it is while it is in use.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from mmpeft.task import Task


@dataclass
class Messages(Task):
    """
    Attributes:
        train: JSONL file to train on.
        test: JSONL file to score on; the last assistant message is the reference.
    """

    name = "messages"

    train: str | None = None
    test: str | None = None

    def rows(self, split):
        from mmpeft.jsonl import JsonLines

        path = getattr(self, split)
        if path is None:
            raise ValueError(f"task messages has no {split} file; set {split}: FILE.jsonl.")
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"task messages: {split} file {path} does not exist.")
        return JsonLines(path, _read)

    def where(self, row, index):
        return row["where"]

    def messages(self, row):
        given = None if row["images"] is None else iter(row["images"])
        chat, missing, marks = [], 0, 0
        for message in row["messages"]:
            content = message.get("content")
            if isinstance(content, list):
                content = [dict(part) for part in content]
                for part in content:
                    kind = part.get("type")
                    if kind not in ("image", "video"):
                        continue
                    for other in ("path", "url"):  # as transformers also writes it
                        if other in part:
                            part.setdefault(kind, part.pop(other))
                    if kind == "image":
                        marks += 1
                        if given is not None:
                            part["image"] = next(given, None)
                            missing += part["image"] is None
                    if kind in part:
                        part[kind] = _beside(row["folder"], part[kind])
            chat.append(message | {"content": content})
        if given is not None and (missing or marks != len(row["images"])):
            raise ValueError(
                f"{row['where']}: images: {len(row['images'])} images for {marks} image parts in "
                "the messages; give one for each part."
            )
        return chat


def _read(path: Path, number: int, line: str) -> dict:
    where = f"{path} line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); write one object a line.") from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError(f"{where}: field 'messages' is missing or no list.")
    for n, message in enumerate(row["messages"]):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: messages[{n}] is no object with role and content.")
    return {
        "messages": row["messages"],
        "images": row.get("images"),
        "folder": str(path.parent),
        "where": where,
    }


def _beside(folder: str, image):
    if isinstance(image, list):  # frames of a clip
        return [_beside(folder, frame) for frame in image]
    if not isinstance(image, str) or image.startswith(("data:", "http://", "https://")):
        return image
    return str(Path(folder) / image)
