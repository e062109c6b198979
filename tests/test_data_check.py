"""`mmpeft data check`: what it finds, what it counts, what it shows, and what it never does."""

import json
import random
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from mmpeft import cli
from mmpeft.config import load
from mmpeft.data import ConversationDataset
from mmpeft.data_check import check_data, engine, pictures, render, scan, write
from mmpeft.data_check.plots import DOTS, draw
from mmpeft.data_check.processor import processor_of
from mmpeft.data_check.repeats import duplicates, leaked
from mmpeft.data_check.samples import Run, Sample, token_runs
from mmpeft.data_check.text import shown
from mmpeft.tasks.messages import Messages
from mmpeft.train import build

from .conftest import assistant, user


def chat(question, answer="an answer", picture=None):
    content = [{"type": "text", "text": question}]
    if picture is not None:
        content.insert(0, {"type": "image", "image": picture})
    return {"messages": [{"role": "user", "content": content}, assistant(answer)]}


@pytest.fixture
def pictured(tmp_path, images):
    """Three pictures on disk, their names."""
    names = [f"{n}.png" for n in range(3)]
    for name, image in zip(names, images, strict=True):
        image.save(tmp_path / name)
    return names


def found(checked, *keys):
    return [tuple(error[key] for key in keys) for error in checked.report["errors"]]


# ------------------------------------------------------------------------------------ what it finds


def test_every_kind_of_fault_is_told_by_file_row_field_and_remedy(tiny, jsonl, pictured, tmp_path):
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:3000])
    rows = [
        chat("good", picture="0.png"),
        {"messages": [user("q")], "images": ["0.png"]},
        {"messages": [user("q"), {"role": "bot", "content": "a"}]},
        {"messages": [user("q"), assistant("a"), assistant("b")]},
        {"messages": [user(""), assistant("a")]},
        chat("gone", picture="gone.png"),
        chat("cut", picture="cut.png"),
        chat("long" * 200),
        chat("good", picture="0.png"),
    ]
    path = jsonl(rows)
    path.write_text(path.read_text() + "{broken\n")
    scored = jsonl([chat("other words", picture="0.png"), chat("fresh")], "test.jsonl")
    checked = check_data([path], [scored], processor=tiny[1], workers=0)
    assert found(checked, "row", "kind", "field") == [
        (2, "row", "images"),
        (3, "chat", "messages[1].role"),
        (4, "chat", "messages[2].role"),
        (5, "chat", "messages[0].content"),
        (6, "image", "image 1"),
        (7, "image", "image 1"),
        (8, "tokens", "messages"),
        (10, "row", ""),
        (9, "duplicate", "messages"),
        (1, "leakage", "messages"),
    ]
    assert [error["file"] for error in checked.report["errors"]] == [str(path)] * 9 + [str(scored)]
    assert all(error["problem"] and error["remedy"] for error in checked.report["errors"])
    said = {error["kind"]: error["problem"] for error in checked.report["errors"]}
    assert "1 images for 0 image parts" in checked.report["errors"][0]["problem"]
    assert "truncated" in said["image"] and "do not fit the context of 512" in said["tokens"]
    assert said["duplicate"].endswith("data.jsonl line 1")
    assert said["leakage"].endswith("data.jsonl line 1")
    assert checked.report["counts"] == {
        "row": 2, "chat": 3, "image": 2, "tokens": 1, "duplicate": 1, "leakage": 1,
    }  # fmt: skip
    assert checked.report["rows"] == 12
    assert [(f["use"], f["rows"], f["errors"]) for f in checked.report["files"]] == [
        ("train", 10, 9), ("eval", 2, 1),
    ]  # fmt: skip


def test_good_data_has_no_error(jsonl, pictured):
    path = jsonl([chat(f"q{n}", picture=name) for n, name in enumerate(pictured * 2)])
    checked = check_data([path], workers=0)
    assert checked.report["errors"] == [] and checked.report["rows"] == 6
    assert checked.report["pictures"]["count"] == 6
    assert checked.report["pictures"]["different"] == 3
    assert checked.report["pictures"]["height"]["median"] == 48
    assert checked.report["pictures"]["width"]["median"] == 80
    assert render(checked.report).startswith("6 rows, no error\n")


def test_an_answer_that_no_token_is_learned_from_is_told(tiny, jsonl, monkeypatch):
    processor = tiny[1]
    encode = scan.encode

    def nothing(*chat):
        row, shown = encode(*chat)
        return row | {"labels": [-100] * len(row["labels"])}, shown

    monkeypatch.setattr(scan, "encode", nothing)
    checked = check_data([jsonl([chat("q")])], processor=processor, workers=0)
    assert found(checked, "kind", "problem") == [("tokens", "have no token to learn from")]
    assert checked.report["learned_tokens"]["max"] == 0 and not checked.samples


def test_the_words_are_those_of_training(tiny, jsonl):
    path = jsonl([{"messages": [user("q"), assistant("a"), user("q")]}])
    (error,) = check_data([path], workers=0).report["errors"]
    with pytest.raises(ValueError) as refused:
        ConversationDataset(Messages(train=str(path)), "train", tiny[1])[0]
    said = f"{error['file']} line {error['row']}: {error['field']} {error['problem']}; "
    assert str(refused.value) == f"{said}{error['remedy']}."


def test_what_is_not_kept_is_counted(jsonl, tmp_path, capsys):
    path = jsonl([{"messages": [user("q"), {"role": "bot", "content": "a"}]}] * 7 + [chat("q")] * 4)
    checked = check_data([path], workers=0, max_errors=2)
    assert Counter(kind for (kind,) in found(checked, "kind")) == {"chat": 2, "duplicate": 2}
    assert checked.report["counts"]["chat"] == 7 and checked.report["counts"]["duplicate"] == 3
    assert "and 5 more" in render(checked.report)
    output = str(tmp_path / "out")
    code = cli.main(["data", "check", str(path), "--max_errors", "0", "--output", output, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 1 and report["errors"] == [] and report["counts"]["chat"] == 7


def test_processes_change_nothing(monkeypatch, tiny, jsonl, pictured):
    monkeypatch.setattr(engine, "RANGE", 7)
    draw = random.Random(0)
    rows = []
    for number in range(60):
        row = chat(f"q{draw.randint(0, 20)}", picture=draw.choice([None, *pictured, "gone.png"]))
        if number % 9 == 0:
            row["messages"][1]["role"] = "bot"
        rows.append(row)
    paths = [jsonl(rows[:41], "a.jsonl"), jsonl(rows[41:], "b.jsonl")]
    scored = jsonl([chat("q3"), chat("q", picture="1.png")], "test.jsonl")
    alone, two = (
        check_data(paths, [scored], processor=tiny[1], workers=n, max_errors=3) for n in (0, 2)
    )
    for checked in (alone, two):
        assert checked.report.pop("seconds") > 0
    assert alone.report == two.report and alone.report["counts"]["duplicate"] > 3
    assert [sample.runs for sample in alone.samples] == [sample.runs for sample in two.samples]
    by_brute_force, seen = 0, set()
    for row in rows:
        if row["messages"][1]["role"] == "bot":
            continue
        key = json.dumps(row)
        by_brute_force += key in seen
        seen.add(key)
    assert alone.report["counts"]["duplicate"] == by_brute_force


def test_a_process_that_dies_is_one_line(jsonl, monkeypatch):
    monkeypatch.setattr(engine, "_scan", lambda *_: __import__("os")._exit(9))
    with pytest.raises(ValueError, match="a process that checked rows died.*--workers 0"):
        check_data([jsonl([chat("q")])], workers=2)


def test_a_picture_is_read_once_however_many_rows_show_it(jsonl, pictured, monkeypatch):
    read = []
    load = pictures.load_image
    monkeypatch.setattr(pictures, "load_image", lambda s, *a: read.append(s) or load(s, *a))
    pictures._see_file.cache_clear()
    check_data([jsonl([chat(f"q{n}", picture=pictured[n % 3]) for n in range(30)])], workers=0)
    assert len(read) == 3


# ----------------------------------------------------------------------------- repeats and leakage


@pytest.mark.parametrize("seed", range(5))
def test_repeats_by_hand(seed):
    draw = np.random.default_rng(seed)
    keys, others = draw.integers(-9, 9, 40), draw.integers(-9, 99, 40)
    first = {}
    expected = [(n, first[k]) for n, k in enumerate(keys.tolist()) if first.setdefault(k, n) != n]
    assert list(zip(*(side.tolist() for side in duplicates(keys)), strict=True)) == expected
    expected = [(n, first[k]) for n, k in enumerate(others.tolist()) if k in first]
    assert list(zip(*(side.tolist() for side in leaked(others, keys)), strict=True)) == expected
    none = np.empty(0, np.int64)
    for side in (*duplicates(none), *leaked(none, keys), *leaked(keys, none)):
        assert len(side) == 0


def test_a_duplicate_has_the_same_words_and_the_same_pictures(jsonl, pictured, tmp_path):
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    turned = {"messages": [user("a", "b"), assistant("c")]}
    path = jsonl([
        chat("q", picture="0.png"),
        chat("q", picture="1.png"),  # the same words about another picture
        chat("q", "another answer", picture="0.png"),
        chat(" q\n", picture="copy.png"),  # line 4: white space and names do not count
        chat("q"),
        {"messages": [{"role": "user", "content": "q"}, assistant("an answer")]},  # line 6
        turned,
        {"messages": [user("a"), assistant("b"), user("c"), assistant("c")]},
    ])  # fmt: skip
    checked = check_data([path], workers=0)
    assert found(checked, "row", "kind") == [(4, "duplicate"), (6, "duplicate")]
    assert [p.rpartition(" line ")[2] for (p,) in found(checked, "problem")] == ["1", "5"]


def test_rows_that_differ_in_a_field_of_a_message_are_no_duplicates(jsonl):
    named = [user("q") | {"name": name} for name in ("a", "b", "a")]
    path = jsonl([{"messages": [one, assistant("x")]} for one in named])
    assert found(check_data([path], workers=0), "row", "kind") == [(3, "duplicate")]


def test_duplicates_are_found_across_files(jsonl):
    first, second = jsonl([chat("q"), chat("p")], "a.jsonl"), jsonl([chat("p")], "b.jsonl")
    checked = check_data([first, second], workers=0)
    ((file, row, problem),) = found(checked, "file", "row", "problem")
    assert (file, row) == (str(second), 1) and problem.endswith("a.jsonl line 2")


def test_leakage_is_by_picture_and_without_pictures_by_question(jsonl, pictured, tmp_path):
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    system = {"role": "system", "content": "Be brief."}
    hello = [user("hello"), assistant("hi")]
    trained = jsonl([
        chat("what is it?", picture="0.png"),
        {"messages": [system, user("1 + 1?"), assistant("2")]},
        {"messages": [*hello, user("and 2 + 2?"), assistant("4")]},
    ])  # fmt: skip
    scored = jsonl([
        chat("what is it?", picture="1.png"),  # a question about another picture
        chat("something else", picture="copy.png"),  # line 2
        chat("1 + 1?", "two"),  # line 3
        {"messages": [*hello, user("and 3 + 3?"), assistant("6")]},  # its first turn is greeting
        {"messages": [*hello, user("and 2 + 2?"), assistant("four")]},  # line 5
        chat("2 + 2?"),
        {"messages": [user("and 2 + 2?"), assistant("4")]},  # asked in another place
    ], "test.jsonl")  # fmt: skip
    checked = check_data([trained], [scored], workers=0)
    assert found(checked, "file", "row", "kind") == [
        (str(scored), row, "leakage") for row in (2, 3, 5)
    ]
    lines = [problem.rpartition(" line ")[2] for (problem,) in found(checked, "problem")]
    assert lines == ["1", "2", "3"]


def test_an_entry_of_a_list_is_named(jsonl, pictured):
    path = jsonl([{"image": "0.png", "caption": ["a cat", "a dog", "a cat"]}])
    checked = check_data([path], workers=0)
    assert checked.report["rows"] == 3
    assert found(checked, "row", "kind", "field") == [(1, "duplicate", "caption[2] messages")]


# ---------------------------------------------------------------------------- figures and samples


def test_lengths_are_those_of_training(tiny, jsonl, pictured):
    rows = [chat("q" * n, "a" * (n + 1), pictured[n] if n < 3 else None) for n in range(9)]
    rows[0]["messages"][0]["content"][-1]["text"] = "x"
    rows[8]["messages"][-1]["unfinished"] = True
    path = jsonl(rows)
    checked = check_data([path], processor=tiny[1], workers=0)
    samples = list(ConversationDataset(Messages(train=str(path)), "train", tiny[1]))
    lengths = [len(sample["input_ids"]) for sample in samples]
    learned = [sum(label != -100 for label in sample["labels"]) for sample in samples]
    for name, values in (("tokens", lengths), ("learned_tokens", learned)):
        summary = checked.report[name]
        assert summary["min"] == min(values) and summary["max"] == max(values)
        assert summary["median"] == sorted(values)[4] and summary["total"] == sum(values)
    assert [sample.count() for sample in checked.samples] == lengths
    assert [sample.count("learned") for sample in checked.samples] == learned


def test_rows_are_drawn_from_good_ones_with_the_seed(tiny, jsonl):
    rows = [chat(f"q{n}") for n in range(30)]
    rows[3]["messages"][1]["role"] = "bot"
    rows[4] = chat("too long" * 99)
    path = jsonl(rows)

    def drawn(seed, count=5):
        checked = check_data([path], processor=tiny[1], samples=count, seed=seed, workers=0)
        return [sample.where.rpartition(" ")[2] for sample in checked.samples]

    assert drawn(0) == drawn(0) != drawn(1) and len(drawn(0)) == 5
    assert drawn(0, 99) == [str(n + 1) for n in range(30) if n not in (3, 4)]
    assert drawn(0, 0) == []


def test_runs_spell_the_whole_text_and_count_every_token(tiny, images):
    processor = tiny[1]
    messages = [
        {"role": "system", "content": "Sei kurz, ä 👋."},
        user(images[0], "<|im_end|> <image> ", images[1], "?"), assistant("It's <|im_start|> 👋"),
        user("again"), assistant(" a"),
    ]  # fmt: skip
    runs = token_runs(processor, messages)
    row, _ = processor.encode_chat(messages)
    assert sum(run.tokens for run in runs) == len(row["input_ids"])
    assert [run.kind for run in runs] == [
        "read", "image", "read", "image", "read", "learned", "read", "learned", "read",
    ]  # fmt: skip
    assert [run.tokens for run in runs if run.kind == "image"] == [16, 16]
    turns = [
        "<|im_start|>system\nSei kurz, ä 👋.<|im_end|>\n<|im_start|>user\n", "",
        "<|im_end|> <image> ", "", "?<|im_end|>\n<|im_start|>assistant\n",
        "It's <|im_start|> 👋<|im_end|>", "\n<|im_start|>user\nagain<|im_end|>\n"
        "<|im_start|>assistant\n", " a<|im_end|>", "\n",
    ]  # fmt: skip
    assert [run.text for run in runs] == turns


def test_neighbouring_pictures_are_a_mark_each(tiny, images):
    messages = [user(images[0], images[1], "?", images[2]), assistant("a")]
    runs = token_runs(tiny[1], messages)
    assert [run.tokens for run in runs if run.kind == "image"] == [16, 16, 16]


def test_the_end_of_an_unfinished_answer_is_shown_as_not_learned(tiny):
    whole, cut = (
        token_runs(tiny[1], [user("q"), assistant("a b") | more])
        for more in ({}, {"unfinished": 1})
    )
    assert whole[1].text == "a b<|im_end|>" and cut[1].text == "a b"
    assert "".join(r.text for r in whole) == "".join(r.text for r in cut)


def test_a_space_between_runs_is_kept(tiny, llm_dir):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    processor = tiny[1]
    words = {w: n for n, w in enumerate(["<s>", "</s>", "<u>", "▁q", "▁a", "▁b", "▁U:", "▁A:"])}
    backend = Tokenizer(models.WordLevel(words, "<u>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()  # drops the first space of what it is given
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<u>",
        pad_token="</s>",
    )  # fmt: skip
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %} U: {{ m.content }} A:{% else %}"
        "{% generation %} {{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    runs = token_runs(processor, [user("q"), assistant("a b")])
    assert [(run.kind, run.text) for run in runs] == [("read", "U: q A:"), ("learned", " a b")]


class Text(HTMLParser):
    """The text of marked runs, and every address that the page names."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.marked, self._mark = Counter(), [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        values = dict(attributes)
        self.addresses += [v for k, v in values.items() if k in ("src", "href", "xlink:href")]
        self._mark = values.get("class") if tag == "mark" else None
        if self._mark:
            self.marked.append([self._mark, ""])

    def handle_data(self, data):
        if self._mark:
            self.marked[-1][1] += data

    def handle_endtag(self, tag):
        self._mark = None


def test_the_page_shows_data_as_text_and_loads_nothing(tiny, jsonl, pictured, tmp_path):
    hostile = "<script>alert(1)</script>\x1b[31m & <b>"
    path = jsonl([chat(hostile, picture="0.png"), {"messages": [user("q"), {"role": hostile}]}])
    checked = check_data([path], processor=tiny[1], workers=0)
    folder = write(checked, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["data.png", "report.html", "report.json"]
    assert json.loads((folder / "report.json").read_text()) == checked.report
    source = (folder / "report.html").read_text()
    page = Text(source)
    assert not page.tags["script"] and page.tags["svg"] == 1 and page.tags["img"] == 1
    assert all(a.startswith(("data:image/jpeg;base64,", "#")) for a in page.addresses)
    assert "default-src 'none'" in source and "\x1b" not in source
    texts = "".join(text for _, text in page.marked)
    assert "<script>alert(1)</script>?[31m & <b><|im_end|>" in texts
    assert ["learned", "an answer<|im_end|>"] in page.marked
    assert ["image", "<image x 16>"] in page.marked


@pytest.mark.parametrize("colour", [True, False])
def test_the_terminal_is_not_commanded_by_data(tiny, jsonl, colour):
    hostile = "\x1b[2J\x07\u202e\x9b" + "long " * 30
    wrong = [{"role": "\x1b[2J"}, {"role": "user", "content": [{"type": "\x1b"}, {"type": 3}]}]
    path = jsonl([chat(hostile), {"messages": wrong}], "a\x1bb.jsonl")
    checked = check_data([path], processor=tiny[1], workers=0)
    text = render(checked.report, checked.samples, colour)
    ours = re.sub(r"\x1b\[[\d;]*m", "", text) if colour else text
    assert all(c.isprintable() or c == "\n" for c in ours)
    assert ("\x1b[1;32man answer<|im_end|>\x1b[0m" in text) == colour
    assert ("[[an answer<|im_end|>]]" in text) == (not colour)


def test_a_long_run_says_what_is_left_out():
    run = Run("read", "a" * 1000 + "b" * 1000, 2000)
    assert shown(run, None) == run.text
    assert shown(run, 100) == "a" * 50 + " (... 1,900 characters ...) " + "b" * 50
    sample = Sample("f row 1", [], [run, Run("learned", "x", 1), Run("image", "", 9)])
    assert (sample.count(), sample.count("learned", "image")) == (2010, 10)


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [([1], [(5, 5)]), ([0, 3, 900], [(4, 4000), (4000, 4)]), (range(5000), [(7, 9)] * 3),
     ([5] * 9, [(n, 2 * n) for n in range(1, DOTS + 9)]), ([0], [])],
)  # fmt: skip
@pytest.mark.parametrize("limit", [None, 4, 10**6])
def test_figures_of_any_sizes_can_be_drawn(lengths, sizes, limit):
    lengths, sizes = np.array(lengths), np.array(sizes, int).reshape(-1, 2)
    figure = draw(lengths, "tokens", lengths, sizes[:, 0], sizes[:, 1], limit)
    figure.draw_without_rendering()
    assert len(figure.axes) == 3 - (len(sizes) == 0)
    drawn = figure.axes[0].patches[0].get_data().values
    assert drawn.sum() == len(lengths)  # no row is outside


# ----------------------------------------------------------------------------------------- the rest


def test_a_recipes_processor_is_that_of_its_training(recipe, images):
    config, _ = load(recipe)
    ours, theirs = processor_of(recipe), build(config)[1]
    messages = [user(images[0], "what <|im_end|> is it?"), assistant("A thing.")]
    assert ours.encode_chat(messages)[0] == theirs.encode_chat(messages)[0]
    assert ours.max_length == theirs.max_length == 512
    assert processor_of(recipe, ["--data.max_length", "99"]).max_length == 99
    assert processor_of() is None
    with pytest.raises(ValueError, match="--recipe or --run, not both"):
        processor_of(recipe, run="runs/x")


def test_a_runs_processor_is_its_own(tiny, tmp_path, images):
    model, processor = tiny
    processor.max_length = 77
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    again = processor_of(run=tmp_path / "run")
    messages = [user(images[0], "q"), assistant("a")]
    assert again.encode_chat(messages)[0] == processor.encode_chat(messages)[0]
    assert again.max_length == 77


def test_the_command_says_it_all_and_its_json_stands_alone(recipe, jsonl, tmp_path, capsys):
    path, output = jsonl([chat("q"), chat("p")], "own.jsonl"), tmp_path / "out"
    common = ["data", "check", str(path), "--recipe", str(recipe), "--output", str(output)]
    assert cli.main([*common, "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert out.count("\n") == 1 and report["schema"] == "mmpeft.data/1"
    assert report["rows"] == 2 and report["errors"] == [] and report["max_length"] == 512
    assert cli.main([*common, "--eval", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("4 rows, 2 errors: 2 leakage\n")
    assert "[[an answer<|im_end|>]]" in captured.out and f"{output}/report.html" in captured.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["gone.jsonl"], "gone.jsonl"),
        (["FILE", "--columns", "image"], "--columns image: write WHAT=NAME"),
        (["FILE", "--samples", "-1"], "--samples is -1; it must be 0 or more"),
        (["FILE", "--workers", "-1"], "--workers is -1"),
        (["FILE", "--format", "lava"], "lava"),
        (["FILE", "--run", "nowhere"], "no run at nowhere"),
        (["FILE", "--recipe", "gone.yaml"], "recipe gone.yaml does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(more, message, jsonl, tmp_path, capsys):
    more = [str(jsonl([chat("q")])) if word == "FILE" else word for word in more]
    code = cli.main(["data", "check", *more, "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and not (tmp_path / "out").exists()
    assert last.startswith("mmpeft: error: ") and message in last


def test_a_file_without_one_good_row_is_a_report(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("{broken\n")
    checked = check_data([path], workers=0)
    assert found(checked, "row", "kind") == [(1, "row")] and checked.figure is None
    assert render(checked.report).startswith("0 rows, 1 error: 1 row\n")
    write(checked, tmp_path / "out")
    assert not (tmp_path / "out" / "data.png").exists()


def test_help_teaches(capsys):
    for words in (["data", "--help"], ["data", "check", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        examples = capsys.readouterr().out.split("\nexample")[1]
        assert stop.value.code == 0 and "mmpeft data check" in examples
    assert cli.main(["data"]) == 0 and "check" in capsys.readouterr().out
