"""Data as people have it: what every form becomes, and one line for what cannot be used."""

import base64
import contextlib
import http.server
import io
import json
import os
import pickle
import random
import string
import tarfile
import threading
import time
from pathlib import Path

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mmpeft import config, jsonl
from mmpeft.data import ConversationDataset
from mmpeft.formats import RowError, open_rows
from mmpeft.formats import pictures as p
from mmpeft.formats.containers import KINDS, METADATA
from mmpeft.formats.json_array import JsonArray
from mmpeft.formats.schema import NAMES, SCHEMAS, detect
from mmpeft.formats.stream import open_stream
from mmpeft.images import load_image
from mmpeft.tasks.messages import Messages

from .conftest import assistant

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MMPEFT_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no data sets at {SHARED}; set MMPEFT_DATA to their folder"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written to the user's caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))


def text(words):
    return {"type": "text", "text": words}


def image(source):
    return {"type": "image", "image": source}


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def png(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "PNG")
    return file.getvalue()


def rows_of(jsonl, rows, **kwargs):
    return [row["messages"] for row in open_rows(jsonl(rows), **kwargs)]


def refusal(call):
    """The error of a call: its one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call()
    line = str(error.value)
    assert line.isprintable() and line.endswith(".") and len(line) < 600, line
    return line


# ----------------------------------------------------------------------------------- one form

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "<image> of a cat"}]


@pytest.mark.parametrize(
    ("row", "options", "schema", "expected"),
    [
        ({"messages": chat("q", "a")}, {}, "messages", chat("q", "a")),
        ({"messages": chat([image("a.png"), text("q")], "a")}, {}, "messages",
         chat([image("F/a.png"), text("q")], "a")),
        ({"messages": chat([{"type": "image"}, text("q")], "a"), "images": ["a.png"]}, {},
         "messages", chat([image("F/a.png"), text("q")], "a")),
        ({"messages": chat([{"type": "image_url", "image_url": {"url": "data:x"}}], "a")}, {},
         "messages", chat([image("data:x")], "a")),
        ({"messages": chat([{"type": "image", "url": "a.png", "path": None}], "a")}, {},
         "messages", chat([image("F/a.png")], "a")),
        ({"messages": chat([{"type": "image", "base64": "iVBO"}], "a")}, {},
         "messages", chat([image("data:;base64,iVBO")], "a")),
        ({"messages": chat([{"type": "video", "video": ["a.png", "b.png"]}], "a")}, {}, "messages",
         chat([{"type": "video", "video": ["F/a.png", "F/b.png"]}], "a")),
        # what a table fills in where other rows have something
        ({"messages": [{"role": "user", "content": [text("q") | {"image": None}], "name": None},
                       assistant("a")], "images": None}, {}, "messages", chat([text("q")], "a")),
        ({"messages": chat([{"type": "image", "index": 0}], "a"), "images": ["a.png"]}, {},
         "messages", chat([image("F/a.png")], "a")),
        ({"messages": chat("<image> tag", "a")}, {}, "messages", chat("<image> tag", "a")),
        ({"image": "a.png", "conversations": TALK}, {}, "llava",
         chat([image("F/a.png"), text("What?")], "<image> of a cat")),
        ({"images": ["a.png", "b.png"], "conversations": [
            {"from": "user", "value": "Is <image> as\n<image>"},
            {"from": "assistant", "value": "No."}]}, {}, "llava",
         chat([text("Is "), image("F/a.png"), text(" as"), image("F/b.png")], "No.")),
        ({"conversations": [{"from": "human", "value": " q\n"}, {"from": "gpt", "value": "a"}]}, {},
         "sharegpt", chat(" q\n", "a")),
        ({"system": "s", "conversations": [
            {"from": "human", "value": "q"}, {"from": "observation", "value": "t"},
            {"from": "gpt", "value": "a"}]}, {}, "sharegpt",
         [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
          {"role": "tool", "content": "t"}, {"role": "assistant", "content": "a"}]),
        ({"messages": chat("<image>q", "a"), "image": "a.png"},
         {"format": "llava", "columns": {"conversations": "messages"}}, "llava",
         chat([image("F/a.png"), text("q")], "a")),
        ({"image": "a.png", "caption": "A cat"}, {}, "caption", chat([image("F/a.png")], "A cat")),
        ({"image": "a.png", "caption": "A cat."}, {"prompt": "Say."}, "caption",
         chat([image("F/a.png"), text("Say.")], "A cat.")),
        ({"file_name": "a.png", "label": 7}, {"columns": {"caption": "label"}}, "caption",
         chat([image("F/a.png")], "7")),
        ({"image": "a.png", "question": "q", "answer": "a"}, {}, "vqa",
         chat([image("F/a.png"), text("q")], "a")),
        ({"question": "q", "answer": "a"}, {"prompt": "True? {question}"}, "vqa",
         chat("True? q", "a")),
        ({"triples": ["x", "y"], "refs": ["a"]},
         {"columns": {"question": "triples", "answer": "refs"}}, "vqa", chat("x\ny", "a")),
    ],
)  # fmt: skip
def test_a_row_becomes_a_chat(jsonl, tmp_path, row, options, schema, expected):
    rows = open_rows(jsonl([row]), **options)
    expected = json.loads(json.dumps(expected).replace("F/", f"{tmp_path}/"))
    assert rows.schema == schema
    (found,) = rows
    assert found["messages"] == expected
    assert found["where"].startswith(f"{tmp_path}/data.jsonl line 1")


def test_rows_may_be_with_and_without_pictures(jsonl, tmp_path):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    chats = rows_of(jsonl, [{"conversations": talk}, {"image": "a.png", "conversations": TALK}])
    assert chats[0] == chat("q", "a")
    assert chats[1][0]["content"][0] == image(f"{tmp_path}/a.png")
    pairs = [{"image": name, "question": "q", "answer": "a"} for name in (None, "a.png")]
    assert [len(one[0]["content"]) for one in rows_of(jsonl, pairs)] == [1, 2]


def test_each_of_several_captions_is_a_row(jsonl):
    data = [{"image": "1.png", "captions": ["a", "b"]}, {"image": "2.png", "captions": []},
            {"image": "3.png", "captions": ["c", "", "d"]}]  # fmt: skip
    path = jsonl(data)
    path.write_text(path.read_text() + "{\n" + json.dumps(data[0]) + "\n")
    rows = open_rows(path, prompt=["one", "two"])
    assert len(rows) == 2 + 1 + 3 + 1 + 2
    found = [row for _, row in rows.scan()]
    answers = [r["messages"][1]["content"] if isinstance(r, dict) else r.field for r in found]
    assert answers == ["a", "b", "captions", "c", "captions[1]", "d", "", "a", "b"]
    assert found[1]["where"].endswith("line 1, captions[1]") and found[2].row == 2
    assert [r["messages"][0]["content"][1]["text"] for r in (rows[0], rows[1], rows[3])] == [
        "one", "two", "two"]  # fmt: skip
    for start in range(9):
        assert [i for i, _ in rows.scan(start, 7)] == list(range(start, 7))
        assert str(dict(rows.scan(start))[8]) == str(rows[8])


@pytest.mark.parametrize(
    ("columns", "format", "mapped", "message"),
    [
        ("a b", "auto", {}, r"fits no known format \(it has a, b; .*columns: \{question: NAME"),
        ("", "auto", {}, "it has nothing"),
        ("messages conversations", "auto", {}, "fits the formats messages and sharegpt"),
        ("image caption question answer", "auto", {}, "fits the formats caption and vqa"),
        ("image caption captions", "auto", {}, "caption and captions, which could both be"),
        ("question answer", "llava", {}, "has no conversations for format llava"),
        ("question answer", "lava", {}, "format is 'lava'; use auto, messages, llava"),
        ("question answer", "auto", {"imgae": "x"}, "columns has imgae; it can name messages"),
        ("question answer", "auto", {"image": "pic"}, "no column 'pic', which columns names for"),
        ("caption text", "auto", {}, "fits no known format"),  # a caption of nothing
    ],
)
def test_what_cannot_be_told_is_named(columns, format, mapped, message):
    with pytest.raises(ValueError, match=message):
        detect(dict.fromkeys(columns.split(), "x"), format, mapped,
               lambda *said: ValueError("; ".join(said)))  # fmt: skip


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"conversations": TALK}, {}, "image has 0 images for 1 <image> in the words; give one"),
        ({"image": ["a.png", "b.png"], "conversations": TALK}, {}, "has 2 images for 1 <image>"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, {},
         r"conversations\[0\].from is 'bot'; use human, user, gpt"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, {}, r"\[0\].from is \"\['gpt'\]\""),
        ({"conversations": [{"value": "x"}]}, {}, r"conversations\[0\].from is missing"),
        ({"conversations": [{"from": "gpt"}]}, {}, r"conversations\[0\].value is missing"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, {}, r"\[0\].value is a int, no text"),
        ({"conversations": ["x"]}, {}, r"conversations\[0\] is no object"),
        ({"conversations": []}, {}, "conversations is empty"),
        ({"conversations": "x"}, {}, "conversations is a str, no list"),
        ({"messages": chat([{"type": "image"}], "a")}, {}, "images has 0 images for 1 image parts"),
        ({"messages": chat([{"type": "image", "index": 1}], "a"), "images": ["a.png"]}, {},
         r"content\[0\] has an index that is not its place"),
        ({"messages": chat([3], "a")}, {}, r"messages\[0\].content\[0\] is no object"),
        ({"messages": chat([image(3)], "a")}, {}, r"messages\[0\].content\[0\] is a int; give a"),
        ({"messages": chat([image("")], "a")}, {}, r"content\[0\] is an empty path; give a path"),
        ({"messages": chat([image("a\0.png")], "a")}, {}, r"content\[0\] has a NUL character"),
        ({"messages": chat([image("http://x/a.png")], "a")}, {},
         r"content\[0\] is the web address 'http://x/a.png'; set allow_urls: true"),
        ({"image": "a.png", "caption": " "}, {}, "caption is empty; write a text"),
        ({"image": "a.png", "caption": None}, {}, "caption is missing"),
        ({"image": "a.png", "caption": True}, {}, "caption is a bool, no text"),
        ({"image": None, "caption": "x"}, {}, "image is missing; give one, or set prompt"),
        ({"image": "a.png", "images": ["a.png"], "caption": "x"}, {},
         "image and images could both be the image; choose one with columns"),
        ({"question": [], "answer": "x"}, {}, "question is empty; write a text"),
        ({"messages": chat("q", "a"), "tools": [{"type": "function"}]}, {}, "tools would not be"),
        ({"conversations": TALK[1:], "tools": '[{"name": "f"}]'}, {}, "tools would not be learned"),
        ({"messages": chat("<image>?", "a"), "images": ["a.png"]}, {},
         "set format: llava, columns: {conversations: messages}"),
        ({"messages": chat([{"type": "image", "base64": "YQ==", "image": "a.png"}], "a")}, {},
         r"content\[0\] has image and base64; keep one"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_field_with_a_remedy(jsonl, row, options, message):
    rows = open_rows(jsonl([row]), **options)
    with pytest.raises(RowError, match=f"data.jsonl line 1: .*{message}") as error:
        rows[0]
    assert error.value.row == 1 and error.value.file.endswith("data.jsonl")
    refusal(lambda: rows[0])
    ((index, found),) = rows.scan()
    assert index == 0 and str(found) == str(error.value)


def test_the_form_of_llama_factory_is_read_as_the_remedy_says(jsonl):
    row = {"messages": chat("<image>\nWhat?", "a"), "images": ["a.png"]}
    path = jsonl([row])
    (row,) = open_rows(path, format="llava", columns={"conversations": "messages"})
    assert row["messages"][0]["content"] == [image(f"{path.parent}/a.png"), text("What?")]


def test_what_a_turn_has_beside_its_words_is_not_lost_on_the_way(jsonl):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
    (messages,) = rows_of(jsonl, [{"conversations": turns}])
    assert messages[1]["weight"] == 0  # for ``chat_problems`` to refuse


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("<image>\nWhat?", [None, "What?"]),
        ("<image>\r\nWhat?", [None, "What?"]),
        ("<image><image>\nWhat?", [None, None, "What?"]),
        ("<image>\n<image>\nWhat?", [None, None, "What?"]),
        ("What?\n<image>", ["What?", None]),
        ("What?\r\n<image>", ["What?", None]),
        ("See\n<image>\nhere", ["See\n", None, "here"]),
        ("One: <image>\nTwo: <image>\nWhich?", ["One: ", None, "\nTwo: ", None, "\nWhich?"]),
    ],
)
def test_only_the_break_that_sets_a_mark_off_belongs_to_it(jsonl, words, expected):
    turns = [{"from": "human", "value": words}, {"from": "gpt", "value": "a"}]
    (messages,) = rows_of(
        jsonl, [{"conversations": turns, "images": ["a.png"] * words.count("<image>")}]
    )
    assert [part.get("text") for part in messages[0]["content"]] == expected


def test_bytes_in_json_are_base64(jsonl):
    data = base64.b64encode(png()).decode()
    (messages,) = rows_of(jsonl, [{"image": {"bytes": data, "path": "a.png"}, "caption": "x"}])
    assert load_image(messages[0]["content"][0]["image"]).size == (8, 6)


def test_a_later_list_is_named(jsonl):
    rows = open_rows(jsonl([{"question": "q", "answer": "a"}, {"question": "q", "answer": ["a"]}]))
    assert "line 2: answer is a list" in refusal(lambda: rows[1])
    assert "only if the first row has one" in refusal(lambda: rows[1])


def test_a_row_error_survives_pickling_and_is_one_line():
    error = RowError("a\nb.jsonl", 3, "f\x1b[0m\n", "is\tbad", "mend it", "line")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and vars(again) == vars(error)
    assert error.problem == "is bad" and "\x1b" not in error.field


@pytest.mark.parametrize("prompt", ["no mark", ["{question}", "none"]])
def test_a_prompt_that_would_lose_the_question_is_refused(jsonl, prompt):
    path = jsonl([{"question": "q", "answer": "a"}])
    assert "format vqa needs {question}" in refusal(lambda: open_rows(path, prompt=prompt))
    path = jsonl([{"messages": chat("q", "a")}])
    assert "has no use for one" in refusal(lambda: open_rows(path, prompt=prompt))


# ------------------------------------------------------------------------------------ containers

CAPTIONS = ["NA", 'a "red", \n cat', "007", "日本 🙂", "None"]


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_jsonl(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_array(folder, rows):
    (folder / "data.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    return folder / "data.json"


def write_table(kind, name):
    def write(folder, rows):
        getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(folder / name)
        return folder / name

    return write


def write_metadata(folder, rows):
    rows = [{"file_name": row["image"], "caption": row["caption"]} for row in rows]
    write_jsonl(folder, rows).rename(folder / "metadata.jsonl")
    return folder


def write_splits(folder, rows):
    (folder / "train").mkdir()
    for row in rows:
        (folder / row["image"]).rename(folder / "train" / row["image"])
    write_metadata(folder / "train", rows)
    return folder


def with_pictures(folder, rows):
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    rows = [row | {"image": str(folder / row["image"])} for row in rows]
    return datasets.Dataset.from_list(rows, features=features)


def write_saved(folder, rows):
    data = datasets.DatasetDict({"train": with_pictures(folder, rows)})
    data.save_to_disk(folder / "saved")
    return folder / "saved"


def write_bytes(folder, rows):
    with_pictures(folder, rows).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def write_ipc(folder, rows):
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(folder / "data.arrow", table.schema) as file:
        file.write_table(table)
    return folder / "data.arrow"


def write_shards(folder, rows):
    for n in (0, 1):
        files = []
        for row in rows[n * 3 : n * 3 + 3]:
            stem = row["image"].split(".")[0]
            files += [(row["image"], (folder / row["image"]).read_bytes()),
                      (f"{stem}.txt", row["caption"].encode())]  # fmt: skip
        write_tar(folder / f"{n}.tar", files)
    return folder / "*.tar"


WRITERS = [
    write_jsonl, write_array, write_table("csv", "data.csv"), write_table("parquet", "a.parquet"),
    write_ipc, write_metadata, write_splits, write_saved, write_bytes, write_shards,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_the_same_rows_come_out_of_every_container(tmp_path, write):
    colors = ["red", "green", "blue", "white", "black"]
    rows = []
    for n, (color, caption) in enumerate(zip(colors, CAPTIONS, strict=True)):
        (tmp_path / f"{n}.png").write_bytes(png(color))
        rows.append({"image": f"{n}.png", "caption": caption})
    found = open_rows(write(tmp_path, rows), "train")
    assert len(found) == 5 and found.schema == "caption"
    for n, row in enumerate(found):
        (part,), answer = row["messages"][0]["content"], row["messages"][1]["content"]
        assert answer == CAPTIONS[n]
        assert load_image(part["image"]).tobytes() == Image.new("RGB", (8, 6), colors[n]).tobytes()
        assert row["where"].endswith((f" line {n + 1}", f" row {n + 1}"))
    again = pickle.loads(pickle.dumps(found))
    assert list(again) == [again[i] for i in range(5)] == [row for _, row in found.scan()]
    assert again[-1] == found[4] and [r for _, r in found.scan(2, 4)] == found[2:4]
    loader = DataLoader(found, batch_size=None, num_workers=1)
    assert list(loader) == list(found)


def nested(generator, depth=0):
    """A random JSON value, rich in what could be taken for structure."""
    kind = generator.randrange(3 if depth > 3 else 5)
    alphabet = '[]{},:"\\ é🙂\n' + string.ascii_letters[:4]
    word = "".join(generator.choice(alphabet) for _ in range(generator.randrange(12)))
    if kind < 2:
        return word if kind else generator.choice([None, True, -1.5e3, 12])
    several = [nested(generator, depth + 1) for _ in range(generator.randrange(4))]
    return several if kind == 3 else {f"{word}{n}": one for n, one in enumerate(several)}


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
def test_the_elements_of_a_list_are_those_that_json_reads(tmp_path, monkeypatch, block):
    from mmpeft.formats import json_array

    monkeypatch.setattr(json_array, "BLOCK", block)
    generator = random.Random(block)
    path = tmp_path / "data.json"
    for turn in range(40):
        rows = [{"x": nested(generator)} for _ in range(1 + generator.randrange(4))]
        path.write_text(json.dumps(rows, indent=generator.choice([None, 1]),
                                   ensure_ascii=generator.random() < 0.5))  # fmt: skip
        found = JsonArray(path, lambda path, number, text: (number, json.loads(text)))
        assert list(found) == list(enumerate(rows, 1)), turn


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[]", "has no rows"),
        ('[{"a": 1}, 3]', "row 2 is not an object"),
        ('[{"a": 1}, [3]]', "row 2 is not an object"),
        ('[{"a": 1} {"a": 2}]', "row 2 has no single comma before it"),
        ('[{"a": 1},, {"a": 2}]', "row 2 has no single comma before it"),
        ('[{"a": 1}, {"a": ', "is cut"),
        ('[{"a": 1}, {"a": "]', "is cut"),
        ('[{"a": 1}', "is cut"),
        ('[{"a": 1}] [{"a": 1}]', "is not one JSON list"),
        ('[{"a": 1}]]', "is not one JSON list"),
        ('[{"a": 1}] x', "is cut|is not one"),
        # the rows up to the next quote that is too many would be one
        ('[{"a": "x"}, {"a": "open}, {"a": "y"}, {"a": "\\"z"}]', "row 2 has .*outside of quotes"),
        ('[{"a": nope}]', "row 1 has 'op.*outside of quotes"),
    ],
)
def test_a_broken_list_is_named(tmp_path, data, message):
    (tmp_path / "data.json").write_text(data)
    with pytest.raises(ValueError, match=f"data.json .*{message}"):
        open_rows(tmp_path / "data.json")
    refusal(lambda: open_rows(tmp_path / "data.json"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list, no object"),
        ('{"question": "q", "question": "r", "answer": "a"}', "'question' stands twice"),
        ('{"question": "\\ud83d", "answer": "a"}', "half of a surrogate pair"),
        ('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"question": ' + "9" * 5000 + "}", "not JSON .*4300"),
        ('{"question": "a\0b", "answer": "a"}', "not JSON .*control character"),
        ('{"question": "q", "answer": "a"} {}', "not JSON .*Extra data"),
    ],
)
def test_json_that_would_lose_something_is_refused(jsonl, line, message):
    path = jsonl([{"question": "q", "answer": "a"}])
    path.write_text(path.read_text() + "\n" + line + "\n" + path.read_text())
    rows = open_rows(path)
    with pytest.raises(RowError, match=f"line 3: .*{message}"):
        rows[1]
    refusal(lambda: rows[1])
    assert [type(row) for _, row in rows.scan()] == [dict, RowError, dict]


def test_an_element_without_end_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft.formats.json_array.LONGEST", 1000)
    monkeypatch.setattr("mmpeft.formats.json_array.BLOCK", 10)
    path = tmp_path / "data.json"
    reads = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    for element in ('{"a": "open' + "x" * 10**5, json.dumps({"a": [1] * 10**4})):
        path.write_text('[{"a": "b"}, ' + element + "]")
        with pytest.raises(ValueError, match="row 2 is longer than 0 MB, or has a quote"):
            open_rows(path)
    monkeypatch.setattr("mmpeft.formats.json_array.LONGEST", 10**9)
    path.write_text(json.dumps([{"question": "x" * 10**5, "answer": "a"}]))
    monkeypatch.setattr(Path, "open", lambda self, mode: Counted(self))
    assert len(JsonArray(path, None)) == 1
    assert len(reads) < 20 and sum(reads) < 10**6  # every read doubles what is looked through


def test_one_object_over_several_lines_is_named(jsonl):
    path = jsonl([])
    path.write_text(json.dumps({"question": "q", "answer": "a"}, indent=2))
    assert "line 1: not JSON in one line (here begins an object over" in refusal(
        lambda: open_rows(path)
    )


def test_a_whole_surrogate_pair_is_a_character(jsonl):
    path = jsonl([])
    path.write_text('{"question": "\\ud83d\\ude42", "answer": "a"}\n')
    assert open_rows(path)[0]["messages"][0]["content"] == "🙂"


@pytest.mark.parametrize(
    "data", ['{"question": "q", "answer": "a"}', '[{"question": 0, "answer": 1}]']
)
def test_the_mark_of_an_encoding_is_no_content(tmp_path, data):
    (tmp_path / "data.json").write_text(data, encoding="utf-8-sig")
    (row,) = open_rows(tmp_path / "data.json")
    assert row["messages"] in (chat("q", "a"), chat("0", "1"))


def test_the_format_is_that_of_the_first_good_row(jsonl):
    path = jsonl([{"question": "q", "answer": "a"}])
    path.write_text("{\n" + path.read_text())
    rows = open_rows(path)
    assert [type(row) for _, row in rows.scan()] == [RowError, dict]
    path.write_text("{\n{\n")
    assert "line 1: not JSON" in refusal(lambda: open_rows(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"question,answer\na,b,c\n", "line 2: has 3 fields, the header names 2 columns"),
        (b'question,answer\n"a\n\nb",b\n\na,b,c\n', "line 6: has 3 fields"),
        (b"question,answer,image\nq,a,\nq,a\n", "line 3: has 2 fields, the header names 3"),
        (b"question,question\na,b\n", "the header is 'question', 'question'; name every"),
        (b"", "the header is missing"),
        (b"question,answer\n", "has no rows"),
        (b"question,answer\n\xff,b\n", "data.csv: .*utf-8"),
    ],
)
def test_a_table_that_would_lose_something_is_refused(tmp_path, data, message):
    path = tmp_path / "data.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_rows(path)
    refusal(lambda: open_rows(path))


def test_a_table_in_text_is_read_to_the_letter(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("\ufeffquestion\tanswer\timage\n1.10\t null \t\n\tNaN\t\n", encoding="utf-8")
    rows = open_rows(path)
    assert rows[0]["messages"] == chat("1.10", " null ")
    assert "row 2: question is missing" in refusal(lambda: rows[1])


def test_blank_lines_and_long_fields_of_a_table_are_fine(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("question,answer\n\nq,a\n  \n" + "x" * 200_000 + ",a\n\n")
    assert [len(row["messages"][0]["content"]) for row in open_rows(path)] == [1, 200_000]


def test_other_files_of_a_shard_are_columns(tmp_path):
    files = [("0.png", png()), ("0.cls", b"cat"), ("0.npy", b"\x93NUMPY\xff")]
    path = write_tar(tmp_path / "a.tar", files)
    assert "it has cls, npy, image" in refusal(lambda: open_rows(path))
    (row,) = open_rows(path, columns={"caption": "cls"})
    assert row["messages"][1]["content"] == "cat"


def test_shards_keep_what_the_first_samples_lack(tmp_path):
    files = [(f"{n}.jpg", png()) for n in range(3)]
    files = [f for n, (name, data) in enumerate(files) for f in ((name, data), (f"{n}.txt", b"x"))]
    files += [("d/9.png", png("blue")), ("d/9.json", b'{"caption": "late", "image": "gone.jpg"}')]
    rows = open_rows(write_tar(tmp_path / "a.tar", [("README", b"-"), *files]))
    assert [row["messages"][1]["content"] for row in rows] == ["x", "x", "x", "late"]
    assert rows[3]["messages"][0]["content"] == [image(png("blue"))]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("0.txt", b"x")], "row 1: fits no known format .it has caption;"),
        ([("0.png", b""), ("0.txt", b"x"), ("0.json", b'{"caption": "y"}')],
         "row 1: caption of .json and .txt differ"),
        ([("0.png", b""), ("0.txt", b"\xff")], "row 1: .txt is not UTF-8"),
        ([("0.png", b""), ("0.json", b"{")], "row 1: not JSON"),
        ([("0.png", b""), ("0.png", b""), ("0.txt", b"x")], "row 1: .png stands twice"),
        ([], "has no rows"),
    ],
)  # fmt: skip
def test_a_bad_shard_is_named(tmp_path, files, message):
    path = write_tar(tmp_path / "a.tar", files)
    assert message.replace(".it", "(it") in refusal(lambda: open_rows(path))


def test_a_cut_shard_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:4000])
    assert "not a tar file that can be read" in refusal(lambda: open_rows(path))
    path.write_bytes(b"PK" * 600)
    assert "not a tar file that can be read" in refusal(lambda: open_rows(path))


def test_class_labels_and_nested_pictures_of_tables(tmp_path):
    features = datasets.Features(
        images=datasets.List(datasets.Image()), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    row = {"images": [{"bytes": png(), "path": None}] * 2, "label": 1}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "saved")
    (found,) = open_rows(tmp_path / "saved", columns={"caption": "label"})
    assert found["messages"] == chat([image(png())] * 2, "dog")


def test_chats_in_a_table_are_those_of_the_lines(tmp_path, jsonl):
    data = [{"messages": chat([image("a.png"), text("q")], [text("a")])},
            {"messages": chat([text("r")], [text("b")])}]  # fmt: skip
    lines = [row["messages"] for row in open_rows(jsonl(data))]
    datasets.Dataset.from_list(data).to_parquet(tmp_path / "data.parquet")
    assert [row["messages"] for row in open_rows(tmp_path / "data.parquet")] == lines


def test_a_folder_of_classes(tmp_path):
    for split, label, name in (("train", "cat", "1.png"), ("train", "dog", "2.PNG"),
                               ("test", "cat", "3.png")):  # fmt: skip
        (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / split / label / name).write_bytes(png())
    options = {"columns": {"caption": "label"}}
    rows = open_rows(tmp_path, "train", **options)
    assert [row["messages"][1]["content"] for row in rows] == ["cat", "dog"]
    assert len(open_rows(f"{tmp_path}#test", "train", **options)) == 1
    for split, said in ((None, "no split is chosen"), ("dev", "it has no split 'dev'")):
        message = refusal(lambda split=split: open_rows(tmp_path, split, **options))
        assert said in message and "it has train, test" in message


def test_a_column_says_which_rows_belong_to_a_split(jsonl):
    data = [{"question": f"{n}", "answer": "a", "split": s}
            for n, s in enumerate(["train", "test", "train", "dev"])]  # fmt: skip
    path = jsonl(data)
    path.write_text("{\n" + path.read_text())

    def questions(source, split=None, **kwargs):
        rows = open_rows(source, split, **kwargs)
        found = [row for _, row in rows.scan()]
        assert [str(found[i]) == str(rows[i]) for i in range(1, len(rows))]
        return [r if isinstance(r, RowError) else r["messages"][0]["content"] for r in found][1:]

    assert questions(path) == ["0", "1", "2", "3"]
    assert questions(path, "train") == ["0", "2"]
    assert questions(f"{path}#dev", "train") == ["3"]
    assert "has train (2), test (1)" in refusal(lambda: open_rows(path, "validation")).replace(
        "validation (1), ", "")  # fmt: skip
    assert open_rows(path, "test")[1]["where"].endswith("line 3")


@pytest.mark.parametrize("values", [[0, 1, 0], [True, False, True], [None, "x", None]])
def test_a_split_may_be_any_value(jsonl, monkeypatch, values):
    rows = [{"question": f"{n}", "answer": "a", "split": v} for n, v in enumerate(values)]
    path = f"{jsonl(rows)}#{values[0]}"
    assert [row["messages"][0]["content"] for row in open_rows(path)] == ["0", "2"]
    data = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: [str(values[0])])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    stream = open_stream("owner/name", str(values[0]))
    assert [row["messages"][0]["content"] for row in stream] == ["0", "2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "none.jsonl", "none.jsonl does not exist"),
        (lambda f: f / "*.tar", "does not exist"),
        (lambda f: (f / "a.txt").write_text("") or f / "a.txt", "ends in '.txt'; what is known"),
        (lambda f: (f / "sub").mkdir() or f / "sub", "is a folder without metadata.jsonl"),
        (lambda f: [(f / n).write_text("") for n in METADATA] and f, "keep one"),
        (lambda f: [(f / n).write_text("{}") for n in ("a.jsonl", "b.jsonl")] and f / "*.jsonl",
         "is 2 files; several can be read together"),
        (lambda f: "nobody/nothing-of-the-kind", "no data set of the hub that could be read"),
    ],
)  # fmt: skip
def test_a_source_that_is_none_is_named(tmp_path, make, message):
    source = make(tmp_path)
    assert message in refusal(lambda: open_rows(source))


def test_names_of_the_hub(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = open_rows("owner/name:some#validation", "test")
    assert asked == [(("owner/name", "some"), {"split": "validation"})]
    assert rows[0]["where"] == "owner/name:some row 1"
    assert "owner/name#train" in refusal(lambda: open_rows("owner/name", "test"))


def from_shards(shards):
    for shard in shards:
        yield from shard


@pytest.fixture(params=["known", "unknown"])
def hub(request, monkeypatch):
    """A data set of the hub that is streamed, in three shards; its features may be unknown."""
    rows = [{"question": f"{n}", "answers": ["a", "b"][: 1 + n % 2]} for n in range(11)]
    rows = [row | {"split": "dev" if row["question"] == "3" else "train"} for row in rows]
    data = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    if request.param == "known":
        data = data.to_iterable_dataset(num_shards=3)
    else:
        shards = [list(data.shard(3, number, contiguous=True)) for number in range(3)]
        data = datasets.IterableDataset.from_generator(from_shards, gen_kwargs={"shards": shards})
    assert bool(data.features) == (request.param == "known")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    return rows


@pytest.mark.parametrize("shuffle", [1, 4, 100])
@pytest.mark.parametrize("remote", [True, False])
def test_a_stream_goes_on_where_it_was(jsonl, hub, shuffle, remote):
    path = "owner/name" if remote else str(jsonl(hub))
    everything = list(open_rows(jsonl(hub), "train"))

    def stream():
        return open_stream(path, "train", shuffle=shuffle, seed=1)

    whole = stream()
    passes = [[row["messages"] for row in whole] for _ in range(2)]
    for found in passes:
        assert sorted(map(str, found)) == sorted(str(row["messages"]) for row in everything)
    assert (passes[0] == [row["messages"] for row in everything]) == (shuffle == 1)
    assert (passes[0] == passes[1]) == (shuffle == 1)
    told = sorted(row["where"].split(maxsplit=2)[2] for row in stream())
    assert told == sorted(row["where"].split(maxsplit=2)[2] for row in everything)
    for stop in range(1, len(passes[0]) + 3):
        first = stream()
        given = []
        while len(given) < stop:
            for row in first:
                given.append(row["messages"])
                if len(given) == stop:
                    break
        again = stream()
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = [row["messages"] for row in again]
        if stop > len(passes[0]):  # in the second pass
            given = given[len(passes[0]) :]
        expected = passes[stop > len(passes[0])]
        assert given + rest == expected or (rest == [] and given == expected)


def test_a_stream_that_breaks_off_says_where(monkeypatch):
    def rows():
        yield from [{"question": "q", "answer": "a"}] * 150
        raise ConnectionError("reset\nby peer")

    data = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    stream = open_stream("owner/name", "train")
    assert "owner/name cannot be read behind row 150 (reset by peer)" in refusal(
        lambda: list(stream)
    )


@pytest.mark.parametrize("shuffle", [1, 4, 100])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_stream_may_be_taken_up_again_and_again(hub, shuffle, steps):
    def stream():
        return open_stream("owner/name", "train", shuffle=shuffle, seed=1)

    whole = stream()
    expected = [row for _ in range(3) for row in whole]
    found, state = [], None
    while len(found) < len(expected):
        again = stream()
        if state is not None:
            again.load_state_dict(json.loads(state))
        rows = (row for _ in range(4) for row in again)
        found += [next(rows) for _ in range(min(steps, len(expected) - len(found)))]
        state = json.dumps(again.state_dict())
    assert found == expected


# -------------------------------------------------------------------------------------- pictures


@pytest.fixture
def root(tmp_path):
    """A root with a picture, a neighbour outside, and links between them."""
    for folder in ("root/sub", "root-not"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(png())
    (tmp_path / "root/in").symlink_to("sub")
    (tmp_path / "root/in.png").symlink_to("sub/a.png")
    (tmp_path / "root/out").symlink_to(tmp_path / "root-not")
    (tmp_path / "root/out.png").symlink_to(tmp_path / "root-not/a.png")
    (tmp_path / "root/twice.png").symlink_to("out.png")
    return tmp_path / "root"


@pytest.mark.parametrize(
    "path", ["sub/a.png", "in/a.png", "in.png", "sub/../in/./a.png", "ROOT/sub/a.png",
             "../root/sub/a.png", "out/../root/sub/a.png", "missing.png", "..a.png"]
)  # fmt: skip
def test_a_path_under_the_root_is_taken(root, path):
    found = p.Pictures(Path("/elsewhere"), str(root)).find(path.replace("ROOT", str(root)))
    assert Path(found).resolve().is_relative_to(root.resolve())
    assert os.path.exists(found) == (path not in ("missing.png", "..a.png"))


@pytest.mark.parametrize(
    "path", ["../root-not/a.png", "out/a.png", "out.png", "twice.png", "/etc/passwd", "..",
             "out/missing.png", "ROOT-not/a.png", "sub/../../root-not/a.png", "in/../../x.png"]
)  # fmt: skip
def test_a_path_out_of_the_root_is_refused(root, jsonl, path):
    path = path.replace("ROOT", str(root))
    rows = open_rows(jsonl([{"image": path, "caption": "x"}]), image_root=str(root))
    assert "lies outside image_root" in refusal(lambda: rows[0])
    parts = [{"messages": chat([image(path)], "a")},
             {"messages": chat([{"type": "video", "video": [path]}], "a")},
             {"messages": chat([{"type": "image"}], "a"), "images": [{"path": path}]}]  # fmt: skip
    for found in [row for _, row in open_rows(jsonl(parts), image_root=str(root)).scan()]:
        assert isinstance(found, RowError) and "outside image_root" in found.problem


def test_a_root_must_be_a_folder(jsonl, tmp_path):
    path = jsonl([{"image": "a.png", "caption": "x"}])
    assert "image_root" in refusal(lambda: open_rows(path, image_root=str(tmp_path / "no")))


@pytest.fixture
def server(monkeypatch):
    """A web server here; ``asked`` lists what it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path == "/none.png":
                return self.send_error(404)
            if self.path == "/no-http":
                return self.wfile.write(b"what?\r\n\r\n")
            self.send_response(302 if self.path == "/away" else 200)
            if self.path == "/away":
                self.send_header("Location", "ftp://127.0.0.1:1/a.png")
            if self.path == "/short.png":
                self.send_header("Content-Length", "9999")
            self.end_headers()
            if self.path in ("/slow", "/short.png"):
                self.wfile.write(png()[:40])
                with contextlib.suppress(OSError):  # once nobody listens
                    for server.dripped in range(100 if self.path == "/slow" else 0):
                        self.wfile.write(b"x")
                        time.sleep(0.05)
                return None
            if self.path == "/cut.png":
                return self.wfile.write(png()[:45])
            self.wfile.write(png() if self.path == "/a.png" else b"x" * 200_000)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.dripped, server.url = [], 0, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched_once_and_only_when_asked_for(server, jsonl):
    path = jsonl([{"image": f"{server.url}/a.png", "caption": "x"}])
    assert "set allow_urls: true" in refusal(lambda: open_rows(path)[0])
    assert not server.asked
    for _ in range(2):
        (part,) = open_rows(path, allow_urls=True)[0]["messages"][0]["content"]
        assert Path(part["image"]).read_bytes() == png()
    assert server.asked == ["/a.png"]


def test_an_address_that_cannot_be_fetched_is_named(server, jsonl, monkeypatch, tmp_path):
    monkeypatch.setattr(p, "MAX_BYTES", 100_000)
    names = ["none.png", "large.png"]
    rows = open_rows(jsonl([{"image": f"{server.url}/{name}", "caption": "x"} for name in names]),
                     allow_urls=True)  # fmt: skip
    assert "cannot be fetched (HTTP Error 404" in refusal(lambda: rows[0])
    assert "MB)" in refusal(lambda: rows[1])
    assert not list((tmp_path / "home").rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short.png", "it broke off after 40 bytes"),
        ("page.html", "what it serves is not an image"),
        ("cut.png", "what it serves is truncated or damaged"),
        ("no-http", "what?"),
        ("a b", "URL can't contain control characters"),
        ("away", "it leads to 'ftp://127.0.0.1:1/a.png'"),
        ("slow", "not done within 0.5 seconds"),
    ],
)
def test_what_is_no_whole_picture_is_not_kept(server, jsonl, monkeypatch, tmp_path, name, message):
    monkeypatch.setattr(p, "TIMEOUT", 0.5)
    url = f"{server.url}/{name}"
    rows = open_rows(jsonl([{"image": url, "caption": "x"}]), allow_urls=True)
    for _ in range(2):
        said = refusal(lambda: rows[0])
        assert message in said and url in said
    assert not list((tmp_path / "home" / "urls").iterdir())
    assert server.dripped < 99  # it is not waited for the end


# ----------------------------------------------------------------------------------- as a task


def test_a_recipe_names_columns_and_prompt(recipe, jsonl, images, tmp_path):
    images[0].save(tmp_path / "one.png")
    path = jsonl([{"pic": "one.png", "label": "shirt"}], "labels.jsonl")
    options = {"train": str(path), "columns": {"image": "pic", "caption": "label"},
               "prompt": ["What is worn?"], "image_root": str(tmp_path)}  # fmt: skip
    args = [f"--data.task.init_args.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in options.items()]  # fmt: skip
    task = config.load(str(recipe), args)[0].data.task
    assert task.columns == options["columns"] and task.prompt == options["prompt"]
    (row,) = task.rows("train")
    assert task.messages(row)[0]["content"][1] == text("What is worn?")
    assert task.where(row, 0) == f"{path} line 1"


@pytest.mark.parametrize("write", [write_array, write_bytes, write_shards])
def test_what_is_learned_is_that_of_the_lines(tiny, tmp_path, write):
    rows = []
    for n, color in enumerate(("red", "blue")):
        (tmp_path / f"{n}.png").write_bytes(png(color))
        rows.append({"image": f"{n}.png", "caption": f"all {color}"})

    def samples(path):
        found = list(ConversationDataset(Messages(train=str(path), prompt="?"), "train", tiny[1]))
        return [[s["input_ids"], s["labels"], s["pixel_values"].tolist()] for s in found]

    assert samples(write(tmp_path, rows)) == samples(write_jsonl(tmp_path, rows))


# --------------------------------------------------------------------------------- the real sets


@needs_data
@pytest.mark.parametrize(
    ("source", "split", "options", "count", "answer"),
    [
        ("images/clothing.jsonl", "train", {"columns": {"caption": "label"}}, 3068, "dress"),
        ("images/clothing.jsonl#validation", "", {"columns": {"caption": "label"}}, 341, "dress"),
        ("images/clothing", "test", {"columns": {"caption": "label"}}, 372, "dress"),
        ("images/coco_captions.jsonl", None, {}, 710,
         "A group of kids posing for a picture on a tennis court."),
        ("images/stamps_captions.jsonl", None, {"image_root": "images"}, 538, "A frog."),
        ("images/nlvr_dev.jsonl", None, {"columns": {"question": "sentence", "answer": "label"}},
         989, "true"),
        ("text/gsm8k_test.jsonl", None, {}, 1319, None),
        ("text/e2e/train_tokenised.csv", None, {"columns": {"question": "mr", "answer": "ref"}},
         42061, None),
        ("text/webnlg/test.jsonl", None, {"columns": {"question": "triples", "answer": "refs"}},
         4928, None),
    ],
)  # fmt: skip
def test_real_sets_load_as_they_are(source, split, options, count, answer):
    if "image_root" in options:
        options = options | {"image_root": str(SHARED / options["image_root"])}
    rows = open_rows(f"{SHARED}/{source}", split, **options)
    found = [row for _, row in rows.scan()]
    assert len(rows) == len(found) == count
    assert all(isinstance(row, dict) for row in found)
    assert answer is None or found[0]["messages"][-1]["content"] == answer
    content = found[-1]["messages"][0]["content"]
    for part in content if isinstance(content, list) else ():
        if part["type"] == "image":
            assert os.path.isfile(part["image"])


# ----------------------------------------------------------------------------------- the guide


def test_the_guide_lists_what_the_code_knows():
    guide = (ROOT / "docs" / "data.md").read_text()
    lines = guide.splitlines()
    for name, schema in SCHEMAS.items():
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        for role in schema.needs:
            assert all(f"`{column}`" in line for column in NAMES[role]), (name, role)
    for ending in (*KINDS, *METADATA):
        assert f"`{ending}`" in guide, ending
    for option in ("format", "columns", "image_root", "allow_urls", "prompt"):
        assert [line for line in lines if line.startswith(f"| `{option}` |")], option
    assert f"{p.MAX_BYTES >> 20} MB" in guide and f"{p.TIMEOUT} seconds" in guide


def test_blank_lines_and_long_files_cost_little(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK", 16)  # the bar's steps do not move the places
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": f"{n}", "answer": "a"}) for n in range(9)]
    path.write_text("\n \n".join(lines))
    numbers = [int(row["where"].split()[-1]) for row in open_rows(path)]
    assert numbers == list(range(1, 18, 2))
