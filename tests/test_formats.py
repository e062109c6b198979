"""Data as people have it: what every form becomes, and one line for what cannot be used."""

import base64
import json
import os
import pickle
from pathlib import Path

import pytest

from mmpeft import config, jsonl
from mmpeft.checks import chat_problems
from mmpeft.data import ConversationDataset
from mmpeft.formats import RowError, open_rows
from mmpeft.formats import pictures as p
from mmpeft.formats.containers import KINDS, METADATA
from mmpeft.formats.schema import NAMES, SCHEMAS, detect
from mmpeft.images import load_image
from mmpeft.tasks.messages import Messages

from .conftest import assistant
from .formats_sample import (  # noqa: F401 (a fixture)
    chat,
    image,
    own_cache,
    png,
    refusal,
    rows_of,
    text,
    write_array,
    write_bytes,
    write_jsonl,
    write_shards,
)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MMPEFT_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no data sets at {SHARED}; set MMPEFT_DATA to their folder"
)


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
        ({"messages": chat("q", "a"), "system": "Be kind."}, {}, "system would not be learned"),
        ({"messages": chat("<video>", "a"), "video": "a.gif"}, {}, "video would not be shown"),
        ({"question": "q", "answer": "a", "audios": ["a.wav"]}, {}, "audios would not be shown"),
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
    assert [str(one) for one in chat_problems(messages)] == [
        "messages[1].weight is 0, but all that the assistant says is learned, and no more; leave "
        "the field out if that is meant, else take the row out."
    ]
    messages = [{"role": "user", "content": "what?", "images": ["a.png"]},
                {"role": "assistant", "content": "a cat", "loss": False}]  # fmt: skip
    found = [str(one) for one in chat_problems(messages)]
    assert found[0].startswith("messages[0].images would not be shown: it stands beside the ")
    assert found[1].startswith("messages[1].loss is False, but all that the assistant says is ")


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
