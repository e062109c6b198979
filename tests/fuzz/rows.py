"""Files of rows in every schema, whole or damaged: a good row comes out as it was written.

What damage touches is refused by row in one line, or is read; pictures never lie outside the root.
"""

import csv
import functools
import io
import json
import os
import tempfile
from pathlib import Path
from random import Random
from typing import NamedTuple

from mmpeft.checks import chat_problems
from mmpeft.formats import RowError, open_rows

from .runner import READ, REFUSALS, REFUSED, refusal

WORDS = ["a", "Is it?", " ", "\n", '"', "'", ",", ";", "\t", "\\", "\\n", "{", "]", "é", "漢", "🙂",
         "</s>", "<|im_end|>", "<img>", "&lt;", "\u2028", "\x85", "\ufeff", "null", "1", "=1+1",
         "#", "\r", "\r\n", "\x1c", "\x0b"]  # fmt: skip
PATHS = ["a.png", "b", "..", ".", "/", "link", "~", "é", " ", "sub", "%2e%2e", "\\", "*", "link2"]
DEEP, HUGE = "[" * 100_000 + "]" * 100_000, "9" * 5000
RAW = [DEEP, HUGE, "-" + HUGE, "1e999", "NaN", "-Infinity", '"\\ud800"', '"\\u0000"',
       '{"a":1,"a":2}', "tru", "'a'", '"\\x"', '"a', "{}", "[]", "[[]]", "null", "3", "true", '""',
       '"x"', "[null]",
       '{"type": "image"}', '[{"type": "image"}]', '[{"type": "text", "text": 3}]', '["a", ["b"]]',
       '{"bytes": "a"}', '"data:image/png;base64,é"', '"http://[::1"', '"//a"', '"\\ud83d\\ude42"',
       '{"role": "user"}', '[{"from": 3}]', '"<image>"', "1.5",
       '[{"role": {}, "content": {}}]']  # fmt: skip


class File(NamedTuple):
    """A file, its rows as chats where they are untouched (else ``None``), and how it is opened."""

    name: str
    data: bytes
    chats: list
    options: dict


_temporary = functools.cache(tempfile.TemporaryDirectory)  # removed when the process ends


@functools.cache
def _folder() -> Path:
    """A folder with a root inside, a secret beside it and links from the one to the other."""
    folder = Path(_temporary().name).resolve()
    (folder / "root/sub").mkdir(parents=True)
    (folder / "secret").mkdir()
    for file in ("root/a.png", "root/sub/a.png", "secret/a.png"):
        (folder / file).write_bytes(b"")
    (folder / "root/link").symlink_to(folder / "secret")
    (folder / "root/link2").symlink_to(folder / "secret/a.png")
    return folder


def make(random: Random) -> File:
    schema = random.choice(["messages", "llava", "sharegpt", "caption", "vqa"])
    pairs = schema in ("caption", "vqa")
    kind = random.choice(["jsonl", "jsonl", "json"])
    if pairs and random.random() < 0.02:  # these are slow
        kind = random.choice(["csv", "tsv"])
    made = [_row(random, schema) for _ in range(random.randint(1, 4))]
    rows, chats = [row for row, _ in made], [chat for _, chat in made]
    options = {"image_root": str(_folder() / "root")} if random.random() < 0.3 else {}
    if kind in ("csv", "tsv"):
        data = _table(rows, "," if kind == "csv" else "\t")
    else:
        lines = [json.dumps(row, ensure_ascii=random.random() < 0.5) for row in rows]
        if random.random() < 0.4:
            damaged = random.randrange(len(rows))
            lines[damaged] = _damaged(random, rows[damaged])
            chats[damaged] = None
        if kind == "json":
            data = "[" + random.choice([",", ", ", ",\n"]).join(lines) + "]"
        else:
            data = "".join(line + "\n" for line in lines)
        data = data.encode("utf-8", "surrogatepass")
    if random.random() < 0.3:
        data, chats = _mutated(random, data), None
    return File(f"rows.{kind}", data, chats, options)


def _text(random: Random) -> str:
    return "x" + "".join(random.choices(WORDS, k=random.randint(0, 5)))


def _path(random: Random) -> str:
    if random.random() < 0.5:
        return "a.png"
    return random.choice(["", "", "/"]) + "/".join(random.choices(PATHS, k=random.randint(1, 5)))


def _row(random: Random, schema: str) -> tuple[dict, list]:
    """A row, and the chat it stands for."""
    question, answer, path = _text(random), _text(random), _path(random)
    picture = {"type": "image", "image": path}
    said = {"role": "assistant", "content": answer}
    asked = {"role": "user", "content": [picture, {"type": "text", "text": question}]}
    extra = {"id": 3} if random.random() < 0.5 else {}
    if schema == "caption":
        return {"image": path, "caption": answer}, [{"role": "user", "content": [picture]}, said]
    if schema == "vqa":
        return {"image": path, "question": question, "answer": answer} | extra, [asked, said]
    if schema == "messages":
        if random.random() < 0.5:
            return {"messages": [asked, said]} | extra, [asked, said]
        bare = {"role": "user", "content": [{"type": "image"}, asked["content"][1]]}
        return {"messages": [bare, said], "images": [path]}, [asked, said]
    names = ("human", "gpt") if schema == "llava" else ("user", "assistant")
    turns = [
        {"from": names[0], "value": "<image>\n" + question},
        {"from": names[1], "value": answer},
    ]
    return {"conversations": turns, "image": path} | extra, [asked, said]


def _damaged(random: Random, row: dict) -> str:
    """The row as JSON with something else in one place."""
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    row = json.loads(json.dumps(row))
    walk(row)
    inside, key = random.choice(places)
    kind = random.random()
    if kind < 0.15:
        del inside[key]
        return json.dumps(row)
    if kind < 0.25 and isinstance(inside, dict):
        inside[random.choice(["image", "images", "messages", "index", "video", "url"])] = inside[
            key
        ]
        return json.dumps(row)
    inside[key] = "HERE"
    return json.dumps(row).replace('"HERE"', random.choice(RAW), 1)


def _mutated(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        place = random.randint(0, len(changed))
        kind = random.choice(["set", "cut", "insert", "drop", "repeat"])
        if kind == "set":
            changed[place : place + 1] = random.choice([b"\0", b"\xff", b'"', b"\n", b"{", b"\xc3"])
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = random.randbytes(random.randint(1, 3))
        elif kind == "drop":
            del changed[place : place + random.randint(1, 9)]
        else:
            changed[place:place] = changed[place : place + random.randint(1, 30)]
    return bytes(changed)


def _table(rows: list[dict], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(k for row in rows for k in row)), delimiter=delimiter
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def check(example: File) -> str:
    path = _folder() / example.name
    path.write_bytes(example.data)
    try:
        rows = open_rows(path, **example.options)
        found = [row for _, row in rows.scan()]
    except REFUSALS as error:
        assert str(path) in str(error), str(error)
        return refusal(error)
    assert len(found) == len(rows)
    outcome = READ
    for row in found:
        if isinstance(row, RowError):
            refusal(row)
            assert row.file == str(path) and row.row >= 1 and row.problem, vars(row)
            outcome = REFUSED
        else:
            json.dumps(row["messages"], default=repr)
            [str(problem) for problem in chat_problems(row["messages"])]
            _check_paths(row["messages"], example.options)
    if example.chats is not None and None in example.chats and len(found) != len(example.chats):
        # a list of captions makes as many rows; an open quote in an array takes the next ones in,
        # and is then refused
        assert len(found) > len(example.chats) or outcome == REFUSED
        return outcome
    if example.chats is not None:
        assert len(found) == len(example.chats)
        for row, chat in zip(found, example.chats, strict=True):
            if chat is not None and not isinstance(row, RowError):
                assert row["messages"] == _placed(chat, example.options), (row["messages"], chat)
            elif chat is not None:
                assert example.options and "outside image_root" in str(row), str(row)
    return outcome


def _check_paths(messages, options) -> None:
    root = options.get("image_root")
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            source = part.get("image") if part.get("type") == "image" else None
            if root and isinstance(source, str) and not source.startswith("data:"):
                assert os.path.realpath(source).startswith(root), source


def _placed(chat, options) -> list[dict]:
    """The chat with its paths as they are found from the folder or the root."""
    chat = json.loads(json.dumps(chat))
    part = chat[0]["content"][0]
    if options:
        part["image"] = os.path.realpath(os.path.join(options["image_root"], part["image"]))
    else:
        part["image"] = os.path.join(str(_folder()), part["image"])
    return chat
