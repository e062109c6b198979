"""Rows of a JSONL file: what reading the whole file gives, without holding it."""

import json
import os
import pickle
import tracemalloc

import pytest
from torch.utils.data import DataLoader

from mmpeft.data import ConversationDataset
from mmpeft.formats import RowError
from mmpeft.formats.json_text import line
from mmpeft.jsonl import JsonLines
from mmpeft.tasks.messages import Messages

from .conftest import assistant, user

TEXTS = ["plain", "é日本語🙂" * 40, "\u2028 separators \x85", "tab\t and \\n", "\ufeffmark", " "]


def parse(path, number, line):
    return number, json.loads(line)


def lines(ending, last=True):
    """Rows between blank lines, as bytes, and what each line holds."""
    texts = [None, *TEXTS, None, "\u00a0", *TEXTS, None]
    spelt = ["  " if t is None else json.dumps({"t": t}, ensure_ascii=False) for t in texts]
    data = ending.join(spelt).encode() + ending.encode() * last
    return data, [(n, {"t": t}) for n, t in enumerate(texts, 1) if t is not None]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_rows_are_those_of_the_whole_file(tmp_path, ending, last):
    path = tmp_path / "data.jsonl"
    data, expected = lines(ending, last)
    path.write_bytes(data)
    rows = JsonLines(path, parse)
    with path.open(encoding="utf-8") as file:  # as read in one go
        assert expected == [parse(path, n, x) for n, x in enumerate(file, 1) if x.strip()]
    assert len(rows) == len(expected) == 13
    assert list(rows) == [rows[i] for i in range(13)] == expected
    assert rows[-1] == expected[-1] and rows[-13] == expected[0]
    assert rows[2:5] == expected[2:5] and rows[::-4] == expected[::-4] and rows[20:] == []
    assert expected[3] in rows and rows.index(expected[3]) == 3
    for outside in (13, -14):
        with pytest.raises(IndexError):
            rows[outside]


def test_a_character_across_the_edge_of_a_read_stays_whole(tmp_path):
    path = tmp_path / "data.jsonl"
    text = [json.dumps({"t": "x" * n + "日" * 5000}, ensure_ascii=False) for n in range(6)]
    path.write_text("\n".join(text), encoding="utf-8")
    assert [row["t"] for _, row in JsonLines(path, parse)] == [json.loads(t)["t"] for t in text]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"t": 1}\n\n{"t": [\n{"t": 2}', "line 3: not JSON"),
        (b'{"t": 1}\r\n\r\n[]\r\n{"t": 2}\r\n', "line 3: a JSON list, no object"),
        (b'\n\n{"t": ["\xff"]}\n{"t": 2}\n', "line 3: not UTF-8 .* byte 8 of the line"),
        (b'\r\n\n\xef\xbb\xbf{"t": 1}\n{"t": 2}\n', "line 3: not JSON"),
    ],
)
def test_a_bad_line_is_named_when_it_is_read_and_spares_the_others(tmp_path, data, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    rows = JsonLines(path, line)
    (bad,) = [i for i, row in enumerate(rows.scan(0, len(rows))) if isinstance(row, RowError)]
    with pytest.raises(RowError, match=f"data.jsonl {message}") as error:
        rows[bad]
    assert "\n" not in str(error.value) and error.value.row == 3
    assert rows[-1] == {"t": 2}


@pytest.mark.parametrize("data", [b"", b" \n\r\n\n"])
def test_a_file_without_rows_is_refused(tmp_path, data):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="data.jsonl has no rows"):
        JsonLines(path, line)


def rewrite_shorter(path):
    path.write_text('{"t": 1}\n')


def rewrite_alike(path):
    before = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("1", "2"))
    os.utime(path, ns=(before + 1, before + 1))


@pytest.mark.parametrize("change", [rewrite_shorter, rewrite_alike])
def test_a_file_that_changes_under_a_run_is_noticed(tmp_path, change):
    path = tmp_path / "data.jsonl"
    path.write_text('{"t": 1}\n{"t": 1}\n')
    rows = JsonLines(path, parse)
    assert rows[1] == (2, {"t": 1})
    change(path)
    for use in (lambda: rows[0], lambda: list(rows), lambda: rows[:1]):
        with pytest.raises(ValueError, match="data.jsonl was changed while it was in use"):
            use()


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"t": 1}\n{"t": 1}\n')
    reading = iter(JsonLines(path, parse))
    assert next(reading) == (1, {"t": 1})
    rewrite_alike(path)
    with pytest.raises(ValueError, match="data.jsonl was changed while it was in use"):
        list(reading)


def chats(jsonl, count):
    return jsonl([{"messages": [user(f"question {n}"), assistant("word " * 100)]}
                  for n in range(count)])  # fmt: skip


def test_start_up_keeps_no_row_in_memory(tiny, jsonl):
    path = chats(jsonl, 3000)
    ConversationDataset(Messages(train=str(path)), "train", tiny[1])  # what is loaded once
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    dataset = ConversationDataset(Messages(train=str(path)), "train", tiny[1], held_out=5)
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(dataset) == 2995
    assert kept < path.stat().st_size / 10
    assert len(pickle.dumps(dataset.rows)) < 20 * 3000  # what a worker may be sent


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same_rows(jsonl, context):
    rows = Messages(train=str(chats(jsonl, 20))).rows("train")
    assert rows[7]["messages"][0]["content"][0]["text"] == "question 7"
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context=context)
    assert list(loader) == list(rows)
