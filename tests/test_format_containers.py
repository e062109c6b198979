"""The same rows out of lists, tables, tar shards, folders and streams."""

import io
import json
import pickle
import random
import string
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mmpeft.formats import RowError, open_rows
from mmpeft.formats.containers import METADATA
from mmpeft.formats.json_array import JsonArray
from mmpeft.formats.stream import open_stream
from mmpeft.images import load_image

from .formats_sample import (  # noqa: F401 (a fixture)
    CAPTIONS,
    WRITERS,
    chat,
    image,
    own_cache,
    png,
    refusal,
    text,
    write_bytes,
    write_tar,
)


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
        (b"question,answer\nq,a\n\r,b\n", "line 3: is blank and ends in a lone carriage return"),
        (b"question,answer\nq,a\n \r,b\n", "line 3: is blank and ends in a lone carriage return"),
        (b'question,answer\nq,a\n" "\n', "line 3: is white space in quotes"),
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


def test_a_shard_that_ends_without_its_end_is_refused(tmp_path):
    files = [(f"{n}.{kind}", data) for n in range(6) for kind, data in
             (("png", png()), ("txt", b"x"))]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", files)
    whole = path.read_bytes()
    assert len(open_rows(path)) == 6
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    path.write_bytes(whole[: offsets[4]])
    assert "ends without the mark of an end" in refusal(lambda: open_rows(path))
    damaged = bytearray(whole)
    damaged[offsets[4] + 148] ^= 1  # in the header's checksum
    path.write_bytes(damaged)
    assert f"has more behind byte {offsets[4]:,}" in refusal(lambda: open_rows(path))
    path.write_bytes(whole + whole)
    assert "has more behind byte" in refusal(lambda: open_rows(path))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_shard_is_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"x")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = kind, "0.png"
        tar.addfile(link)
    assert "1.png is a link to 0.png, not a file" in refusal(lambda: open_rows(path))


def test_many_pictures_of_a_sample_are_in_the_order_of_their_numbers(tmp_path):
    files = [(f"s.{n}.png", f"{n}".encode()) for n in (10, 2, 0, 9, 1)]
    (row,) = open_rows(write_tar(tmp_path / "a.tar", [*files, ("s.txt", b"x")]))
    shown = [part["image"] for part in row["messages"][0]["content"]]
    assert shown == [b"0", b"1", b"2", b"9", b"10"]


def test_pictures_of_files_in_several_folders_need_a_root(tmp_path):
    rows = [{"image": "0.png", "caption": "x"}]
    for name in "ab":
        (tmp_path / name).mkdir()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name / "p.parquet")
    found = open_rows(str(tmp_path / "*/p.parquet"))
    assert "image is '0.png', but the files of these rows lie in several folders" in refusal(
        lambda: found[1]
    )
    rooted = open_rows(str(tmp_path / "*/p.parquet"), image_root=str(tmp_path))
    assert rooted[1]["messages"][0]["content"] == [image(str(tmp_path / "0.png"))]


def test_a_name_is_no_pattern(tmp_path):
    for name, answer in (("d1.csv", "wrong"), ("d[1].csv", "right")):
        (tmp_path / name).write_text(f"question,answer\nq,{answer}\n")
    (row,) = open_rows(tmp_path / "d[1].csv")
    assert row["messages"][1]["content"] == "right"


def test_files_named_after_splits_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        rows = [{"question": "q", "answer": split}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    (row,) = open_rows(tmp_path, "test")
    assert row["messages"][1]["content"] == "test"
    assert "no split is chosen; it has train, test" in refusal(lambda: open_rows(tmp_path))


def test_metadata_beside_folders_of_splits_is_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "train/0.png", "caption": "x"}')
    (tmp_path / "train").mkdir()
    assert len(open_rows(tmp_path, "train")) == 1
    (tmp_path / "test").mkdir()
    assert "metadata.jsonl beside the folders train and test" in refusal(
        lambda: open_rows(tmp_path, "train")
    )


def test_a_linked_folder_of_a_class_counts_once(tmp_path):
    for folder in ("set/dog", "cats"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(png())
    (tmp_path / "set/cat").symlink_to(tmp_path / "cats")
    (tmp_path / "set/dog/circle").symlink_to(tmp_path / "set")
    rows = open_rows(tmp_path / "set", columns={"caption": "label"})
    assert [row["messages"][1]["content"] for row in rows] == ["cat", "dog"]


def test_a_row_without_its_label_is_bad(tmp_path):
    features = datasets.Features(
        question=datasets.Value("string"), answer=datasets.ClassLabel(names=["cat"])
    )
    data = [{"question": "q", "answer": -1}, {"question": "q", "answer": 0}]
    datasets.Dataset.from_list(data, features=features).save_to_disk(tmp_path / "saved")
    rows = open_rows(tmp_path / "saved")
    assert "row 1: answer is missing" in refusal(lambda: rows[0])
    assert rows[1]["messages"][1]["content"] == "cat"


def test_a_stream_reads_json_as_a_table_does(jsonl, monkeypatch):
    path = jsonl([{"messages": chat([text("look")], "fine")}, {"messages": chat("hello", "yes")}])
    data = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
    assert isinstance(data.features["messages"].feature["content"], datasets.Json)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    streamed = [row["messages"] for row in open_stream("owner/name", "train")]
    assert streamed == [chat([text("look")], "fine"), chat("hello", "yes")]


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
