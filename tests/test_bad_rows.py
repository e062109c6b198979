"""Rows that cannot be learned from: they stop a run, or are passed over, counted and listed."""

import json

import pytest
from torch.utils.data import DataLoader

from mmpeft.bad_rows import KEY, BadRows, described
from mmpeft.data import Collator, ConversationDataset
from mmpeft.formats.errors import RowError
from mmpeft.sampling import PassSampler
from mmpeft.tasks.messages import Messages
from mmpeft.train import train

from .conftest import assistant, user
from .test_data import InMemory

GOOD = {"messages": [user("q"), assistant("a")]}
MISSING = {"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]},
                        assistant("a")]}  # fmt: skip
BAD = {
    "not JSON": ("{nope", "", "not JSON"),
    "role": ({"messages": [{"role": "human", "content": "q"}, assistant("a")]},
             "messages[0].role", "'human'"),
    "too long": ({"messages": [user("q" * 600), assistant("a")]}, "messages", "do not fit"),
    "no picture": (MISSING, "image 1", "no.png does not exist"),
}  # fmt: skip


def file(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def numbered(count):
    return [{"messages": [user(f"q{i}"), assistant("a")]} for i in range(count)]


def dataset(processor, path, limit=None, **options):
    task = Messages(train=str(path))
    return ConversationDataset(task, "train", processor, bad_rows=BadRows(limit), **options)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_stops_or_gives_its_place_to_the_next_good_one(tiny, tmp_path, kind):
    bad, field, problem = BAD[kind]
    rows = numbered(5)
    rows[2] = rows[4] = bad
    path = file(tmp_path, rows)
    with pytest.raises((ValueError, OSError), match="line 3: "):
        list(dataset(tiny[1], path))
    skipping = dataset(tiny[1], path, limit=2)
    samples = [sample["input_ids"] for sample in skipping]
    good = [dataset(tiny[1], path)[i]["input_ids"] for i in (0, 1, 3)]
    assert samples == [good[0], good[1], good[2], good[2], good[0]]
    assert [row["row"] for row in skipping.bad_rows.rows] == [3, 5]
    row = skipping.bad_rows.rows[0]
    assert row.keys() == {"file", "row", "field", "problem", "remedy"}
    assert row["file"] == str(path) and row["field"] == field and problem in row["problem"]


def test_more_bad_rows_than_the_limit_stop_the_run(tiny, tmp_path):
    rows = numbered(6)
    rows[1] = rows[3] = rows[5] = "{nope"
    skipping = dataset(tiny[1], file(tmp_path, rows), limit=2)
    assert skipping[1] and skipping[1] and skipping[3]  # the same row counts once
    with pytest.raises(ValueError, match="3 rows cannot .*max_bad_rows is 2; the last, .*row 6: n"):
        skipping[5]


def test_too_many_in_a_worker_are_one_line_too(tiny, tmp_path):
    rows = numbered(4)
    rows[1] = rows[2] = "{nope"
    skipping = dataset(tiny[1], file(tmp_path, rows), limit=1)
    with pytest.raises(ValueError, match="^2 rows cannot be learned from") as error:
        list(DataLoader(skipping, collate_fn=Collator(0), num_workers=1))
    assert "\n" not in str(error.value)


def test_a_file_of_bad_rows_alone_is_an_error_and_no_endless_search(tiny, tmp_path):
    with pytest.raises(ValueError, match="task messages has no row that can be learned from"):
        dataset(tiny[1], file(tmp_path, [BAD["too long"][0]] * 3), limit=9)[1]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_hand_on_what_they_passed_over(tiny, tmp_path, workers):
    rows = numbered(12)
    rows[0] = rows[7] = rows[8] = "{nope"
    skipping = dataset(tiny[1], file(tmp_path, rows), limit=3)
    loader = DataLoader(
        skipping, 2, sampler=PassSampler(skipping, 1), collate_fn=Collator(0), num_workers=workers
    )
    batches = list(loader)
    for batch in batches:
        skipping.bad_rows.add(batch.pop(KEY, []))
    assert sorted(row["row"] for row in skipping.bad_rows.rows) == [1, 8, 9]
    tokens = [batch["input_ids"].tolist() for batch in batches]
    plain = DataLoader(skipping, 2, sampler=PassSampler(skipping, 1), collate_fn=Collator(0))
    assert tokens == [batch["input_ids"].tolist() for batch in plain]


def test_only_the_bad_chat_of_a_sample_is_left_out(tiny, images):
    chats = [[user(images[0], f"q{i}"), assistant("a" if i != 1 else " ")] for i in range(3)]
    task = InMemory(chats=chats, keys=["one"] * 3)
    good = InMemory(chats=[chats[0], chats[2]], keys=["one"] * 2)
    bad_rows = BadRows(1)
    (sample,) = ConversationDataset(task, "train", tiny[1], 3, bad_rows=bad_rows)
    (expected,) = ConversationDataset(good, "train", tiny[1], 3)
    assert sample["input_ids"] == expected["input_ids"]
    assert [(row["row"], row["field"]) for row in bad_rows.rows] == [(1, "messages[1].content")]


def test_every_chat_about_a_picture_that_cannot_be_read_is_counted(tiny, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    chats = [[user("q"), assistant("a")] for _ in range(4)]
    for chat in chats[:3]:
        chat[0]["content"] = [{"type": "image", "image": str(broken)}]
    task = InMemory(chats=chats, keys=["one"] * 3 + [None])
    bad_rows = BadRows(3)
    samples = list(ConversationDataset(task, "train", tiny[1], 3, bad_rows=bad_rows))
    assert samples[0]["input_ids"] == samples[1]["input_ids"]
    assert [row["row"] for row in bad_rows.rows] == [0, 1, 2]
    assert {row["field"] for row in bad_rows.rows} == {"image 1"}


@pytest.mark.parametrize("error", [ValueError("operands"), RuntimeError("data.jsonl line 1: x")])
def test_a_mistake_of_ours_is_never_passed_over(tiny, tmp_path, error):
    class Broken:
        def image_inputs(self, *_):
            raise error

    task = InMemory(chats=[[user("q"), assistant("a")]], keys=[None])
    task.chats[0][0]["content"] = [{"type": "image", "image": "x"}]
    skipping = ConversationDataset(task, "train", tiny[1], bad_rows=BadRows(9))
    skipping.store = Broken()
    with pytest.raises(type(error), match=str(error)):
        skipping[0]


def test_a_file_that_changed_is_never_passed_over(tiny, tmp_path):
    path = file(tmp_path, numbered(3))
    skipping = dataset(tiny[1], path, limit=9)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="was changed while it was in use"):
        skipping[0]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        skipping[0]


def test_pictures_of_a_data_set_that_skips_can_all_be_read(tiny, tmp_path, images):
    rows = [MISSING, *numbered(2)]
    rows[1]["messages"][0]["content"] = [{"type": "image", "image": "one.png"}]
    images[0].save(tmp_path / "one.png")
    path = file(tmp_path, rows)
    skipping = dataset(tiny[1], path, limit=1)
    pictures, where = skipping.pictures(0)
    assert len(pictures) == 1 and where == f"{path} line 2"
    assert skipping.good_rows([0, 1, 2]) == [skipping.rows[1], skipping.rows[2]]
    assert len(skipping.bad_rows.rows) == 1
    with pytest.raises(FileNotFoundError, match="line 1: image 1: "):
        dataset(tiny[1], path).good_rows([1, 0])


def test_the_list_is_kept_over_starts_and_mends_a_torn_line(tmp_path):
    def row(number):
        return {"file": "f", "row": number, "field": "", "problem": "p", "remedy": "r"}

    first = BadRows(3)
    first.add([row(1), row(2), row(1)])
    first.keep_in(tmp_path)
    again = BadRows(3)
    again.add([row(2)])
    again.keep_in(tmp_path)
    assert [r["row"] for r in again.rows] == [1, 2]
    again.add([row(3)])
    lines = (tmp_path / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["bad_rows.jsonl"]
    with pytest.raises(ValueError, match="4 rows"):
        again.add([row(4)])


def test_errors_without_parts_are_taken_apart():
    error = ValueError("a b.jsonl line 12: image 2: x.png is truncated (oh); replace the file.")
    assert described(error, "a b.jsonl line 12") == {
        "file": "a b.jsonl", "row": 12, "field": "image 2", "problem": "x.png is truncated (oh)",
        "remedy": "replace the file",
    }  # fmt: skip
    error = RowError("f", 3, "messages", "is missing", "write it", "line")
    assert described(error) == {
        "file": "f", "row": 3, "field": "messages", "problem": "is missing", "remedy": "write it",
    }  # fmt: skip


def test_rows_are_tried_before_a_run_begins(recipe):
    """Also one that the single step of the run would never draw."""
    data = recipe.parent / "data.jsonl"
    lines = data.read_text().splitlines()
    lines[5] = "{nope"
    data.write_text("\n".join(lines))
    options = ["--align", "null", "--instruct.max_steps", "1"]
    with pytest.raises(ValueError, match=r"data.jsonl line 6: .*not JSON"):
        train(recipe, options)
    assert not (recipe.parent / "run").exists()


def test_a_run_that_skips_lists_what_it_skipped(recipe, capsys):
    data = recipe.parent / "data.jsonl"
    data.write_text(data.read_text().replace("3.png", "gone.png"))
    run = train(recipe, ["--data.on_bad_row", "skip", "--align", "null"])
    (line,) = (run / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 4 and "gone.png" in json.loads(line)["problem"]
    assert "bad rows: 1 passed over so far (at most 100)" in capsys.readouterr().err
