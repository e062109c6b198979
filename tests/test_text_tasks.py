"""Tasks of text alone: what is learned, how it is scored, and what is refused."""

import csv
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from mmpeft import config
from mmpeft import evaluate as e
from mmpeft import text_metrics as m
from mmpeft.task import Metric, all_tasks
from mmpeft.tasks.coqa import CoQA, among, answer_words, em, f1
from mmpeft.tasks.e2e import E2E, _join
from mmpeft.tasks.gsm8k import GSM8K, final_number
from mmpeft.tasks.webnlg import WebNLG
from mmpeft.train import train

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MMPEFT_TEXT_DATA", ROOT.parent / "shared" / "data" / "text"))

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no data sets at {DATA}; set MMPEFT_TEXT_DATA to their folder"
)


def value(metric) -> float:
    metric = metric if isinstance(metric, Metric) else Metric(metric)
    return metric.of(np.asarray(metric.rows, float))


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("mr", "ref"), *rows])
    return str(path)


@pytest.fixture
def e2e(tmp_path):
    """Forty facts to learn from, two to score on."""
    train = [(f"name[Place {i}], priceRange[£ {i}]", f"Place {i} , cheap .") for i in range(40)]
    test = [
        ("name[A]", "A is a good place."),
        ("name[B]", "See B at the river."),
        ("name[A]", "Try the food of A."),
    ]
    return E2E(write_csv(tmp_path / "train.csv", train), write_csv(tmp_path / "test.csv", test))


# ------------------------------------------------------------------------------------- metrics

# the first of the examples in nltk's documentation of bleu_score and meteor_score
ACTION = "It is a guide to action which ensures that the military always obeys the commands of the "
ACTION += "party"
ACTIONS = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the "
    "command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]


def test_bleu_by_hand():
    # words 3 of 4, pairs 2 of 3, triples 1 of 2, no four of 1, which exp smoothing counts as 1/2
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert value(m.bleu(["a b c x"], [["A b c d"]])) == pytest.approx(expected)
    same = m.bleu(["a b c d", "e f g h"], [["a b c d"], ["e f g h", "e"]])
    assert value(same) == pytest.approx(1)
    # the brevity penalty is of the corpus: 8 words of 10
    short = value(m.bleu(["a b c d", "e f g h"], [["a b c d i"], ["e f g h j"]]))
    assert short == pytest.approx(np.exp(1 - 10 / 8))


def test_bleu_is_sacrebleus_of_a_corpus_with_a_varying_number_of_references():
    from sacrebleu.metrics import BLEU

    replies = [ACTION, "He read the book because he was interested in world history", ""]
    references = [ACTIONS, ["he was interested in world history because he read the book"], ["x"]]
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(3)]
    expected = BLEU(lowercase=True).corpus_score(replies, streams).score / 100
    assert value(m.bleu(replies, references)) == pytest.approx(expected)
    assert 0.3 < expected < 0.9


def test_rouge_l_has_words_of_any_script_and_those_of_rouge_score_in_english():
    from rouge_score import tokenize

    text = "It's a 3-star, child-friendly pub_house near £5 Café!"
    own = m._LettersAndDigits().tokenize(text)
    assert [word.replace("é", "") for word in own] == tokenize.tokenize(text, None)
    for text in ("Москва — столица России", "Suárez ganó"):
        assert m.rouge_l([text], [[text]]) == [1]


def test_rouge_l_by_hand():
    # longest common subsequence "police the gunman": 3 of 4 and 3 of 4 (Lin 2004, section 3.1)
    replies = ["police kill the gunman", "the gunman kill police"]
    references = [["police killed the gunman"]] * 2
    assert m.rouge_l(replies, references) == pytest.approx([3 / 4, 2 / 4])
    both = [["nothing alike", "Police kill the gunman!"]]
    assert m.rouge_l(replies[:1], both) == [1]


def test_cider_by_hand():
    # an n-gram of one of the two rows weighs log 2, of both (a) nothing, and so do equal lengths;
    # there are no triples
    references = [["a c"], ["a y"]]
    first, second = m.cider(["c d", "a y"], references)
    assert first == pytest.approx(10 / 4 / np.sqrt(2))  # c with (c, d), no pair in common
    assert second == pytest.approx(10 / 4 * (1 + 1))
    # three pairs more: y of (y, 3 z), and ay of (ay, yz, 2 zz)
    (_, longer) = m.cider(["c d", "a y z z z"], references)
    penalty = np.exp(-(3**2) / (2 * 6**2))
    assert longer == pytest.approx(10 / 4 * penalty * (1 / np.sqrt(10) + 1 / np.sqrt(6)))


def test_cider_is_that_of_cocos_script():
    # values of pycocoevalcap 1.2, CiderScorer, given the same words
    replies = [ACTION, "The cat sat on the mat.", "A dog runs through tall green grass"]
    references = [
        ACTIONS,
        ["A cat is sitting on the mat.", "The cat sat on a mat, asleep."],
        ["a brown dog is running through tall grass", "A dog runs in the green grass."],
    ]
    expected = [2.7303318491424693, 4.335358654746333, 2.7999290204660934]
    assert m.cider(replies, references) == pytest.approx(expected, abs=1e-9)


def test_scores_of_a_single_or_an_empty_reply_are_numbers():
    for replies, references in ((["a b"], [["a b"]]), (["", "a"], [["a b"], ["a"]])):
        for metric in (m.bleu, m.rouge_l, m.cider):
            assert 0 <= value(metric(replies, references)) <= 10


def test_meteor_is_nltks(capsys):
    found = m.meteor([ACTION], [ACTIONS])
    if found is None:
        pytest.skip("nltk finds no WordNet: " + capsys.readouterr().err)
    assert found.rows == pytest.approx([0.6944], abs=1e-4)  # nltk's documentation


def test_without_wordnet_meteor_is_left_out_and_said_so(monkeypatch, capsys):
    import nltk
    from nltk.corpus.reader import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    nowhere = LazyCorpusLoader("no_such_wordnet", WordNetCorpusReader, None)
    monkeypatch.setattr(nltk.corpus, "wordnet", nowhere)
    assert list(m.generation_metrics(["a"], [["a"]])) == ["bleu", "rouge_l", "cider"]
    assert "meteor left out: nltk finds no WordNet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 left.\n#### 1,234", 1234),
        ("#### 5\nand 7 more", 5),
        ("First 12, then 30.", 30),
        ("It costs $1,000.50.", 1000.5),
        ("That is -4", -4),
        ("a loss of -$3", -3),
        ("a loss of $-3", -3),
        ("#### -3", -3),
        ("#### \u22123", -3),
        ("#### Step 1: 5 + 13 = 18.\nThe answer is 18.", 18),
        ("The answer is 18.\n####", 18),
        ("####18", 18),
        ("#### $18", 18),
        ("It is 18.\n#### 18\n\nQuestion: 5?", 18),
        ("the set 1,2,3", 3),
        ("12,345,678.5 of it", 12345678.5),
        ("It takes 10-12", 12),
        ("$10-$12", 12),
        ("10%-12%", 12),
        ("x - 3", 3),
        ("x-3", 3),
        ("(x)-3", 3),
        ("$ 3", 3),
        ("5 = -.5", -0.5),
        ("18.00", 18),
        (".5 of it", 0.5),
        ("none", None),
        ("####", None),
    ],
)
def test_the_final_number(text, number):
    found = final_number(text)
    assert found is None if number is None else float(found) == number


def test_gsm8k_counts_the_number_alone(jsonl):
    rows = [{"question": "2 + 16?", "answer": "2 + 16 = <<2+16=18>>18 dollars\n#### 18"}]
    task = GSM8K(test=str(jsonl(rows)))
    (row,) = task.rows("test")
    assert task.messages(row)[-1]["content"] == "2 + 16 = 18 dollars\n#### 18"
    replies = ["It is $18.00.", "18 or 19", "no idea"]
    assert task.score(replies, [row] * 3) == [1, 0, 0]
    replies = ["It is 18.", "#### 18", "#### 17", "#### A step\nIt is 18."]
    found = task.metrics(replies, [row] * 4)
    assert {name: list(metric.rows) for name, metric in found.items()} == {
        "accuracy": [1, 1, 0, 1], "strict": [0, 1, 0, 0],
    }  # fmt: skip


def test_answers_are_normalised_as_for_squad():
    assert answer_words("  The Cat's  an   apple-pie, a! ") == ["cats", "applepie"]
    assert answer_words("another theme") == ["another", "theme"]
    assert em("The white cat.", "a White cat") == 1 and em("white", "white cat") == 0
    assert f1("the white cat", "white") == pytest.approx(2 * (1 * 1 / 2) / (1 + 1 / 2))
    assert f1("red red cat", "red dog") == pytest.approx(2 / 5)
    assert (f1("", "the"), f1("", "cat"), f1("dog", "cat")) == (1, 0, 0)


def test_several_answers_are_left_out_in_turn():
    # the reply is one of three answers: without that one the best of the others is 0
    assert among(em, "yes", ["yes", "no", "maybe"]) == pytest.approx(2 / 3)
    assert among(em, "yes", ["yes", "yes", "no"]) == 1
    assert among(f1, "white", ["white cat"]) == pytest.approx(2 / 3)


# --------------------------------------------------------------------------------------- tasks


def test_e2e_learns_every_reference_and_scores_facts_once(e2e):
    train, test = e2e.rows("train"), e2e.rows("test")
    assert [words["content"] for words in e2e.messages(train[3])] == [
        "Describe this place.\nname: Place 3; price range: £3", "Place 3, cheap.",
    ]  # fmt: skip
    assert [row["refs"] for row in test] == [
        ["A is a good place.", "Try the food of A."], ["See B at the river."],
    ]  # fmt: skip
    found = e2e.metrics(["Try the food of A.", "See B at the river."], test)
    assert set(found) >= {"bleu", "rouge_l", "cider"}
    assert value(found["rouge_l"]) == 1 and e2e.score(["Try the food of A", "no"], test) == [1, 0]


def test_webnlg_knows_what_was_not_in_training(jsonl):
    rows = [
        {"category": c, "triples": ["A_B | kindOf | C"], "refs": ["A B is a C.", "C has A B."]}
        for c in ("Airport", "Athlete")
    ]
    path = str(jsonl(rows))
    task = WebNLG(path, path)
    test = task.rows("test")
    assert [task.question_type(row) for row in test] == ["seen", "unseen"]
    assert len(task.rows("train")) == 4 and len({task.group(r) for r in task.rows("train")}) == 1
    assert task.messages(test[0])[0]["content"].endswith("\nA B | kindOf | C")
    assert [task.messages(r)[1]["content"] for r in task.rows("train")[:2]] == rows[0]["refs"]


def story(number, turns=3):
    answers = [{"input_text": f"answer {n}"} for n in range(turns)]
    return {
        "source": "cnn",
        "story": f"Story {number}.",
        "questions": [{"input_text": f"question {n}?"} for n in range(turns)],
        "answers": answers,
        "additional_answers": {"0": [{"input_text": f"reply {n}"} for n in range(turns)]},
    }


def write_coqa(path, stories):
    path.write_text(json.dumps({"data": stories}))
    return str(path)


def test_coqa_asks_each_question_behind_those_before(tmp_path):
    path = write_coqa(tmp_path / "coqa.json", [story(i) for i in range(10)])
    task = CoQA(path, path, held_out=0.2)
    train, test = task.rows("train"), task.rows("test")
    assert len(train) == 8 and len(test) == 2 * 3
    assert {row["story"] for row in train}.isdisjoint(row["story"] for row in test)
    assert [m["content"] for m in task.messages(test[1])] == [
        f"{test[1]['story']}\n\nquestion 0?", "answer 0", "question 1?", "answer 1",
    ]  # fmt: skip
    assert len(task.messages(train[0])) == 6
    found = task.metrics(["Reply 1!\nQ: more"], test[1:2])
    assert {name: value(metric) for name, metric in found.items()} == {"f1": 0.75, "em": 0.5}
    other = CoQA(path, write_coqa(tmp_path / "dev.json", [story(99)]))
    assert len(other.rows("train")) == 10 and len(other.rows("test")) == 3
    assert [task.group(row) for row in test] == [row["story"] for row in test]


def test_two_names_of_one_file_are_one_file(tmp_path, monkeypatch):
    path = write_coqa(tmp_path / "coqa.json", [story(i) for i in range(10)])
    (tmp_path / "link.json").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for other in ("coqa.json", f"{tmp_path}/../{tmp_path.name}/coqa.json", "link.json"):
        task = CoQA(path, other)
        train, test = ({row["story"] for row in task.rows(split)} for split in ("train", "test"))
        assert len(train) == 8 and len(test) == 2 and train.isdisjoint(test)


def test_a_story_that_is_there_twice_is_on_one_side(tmp_path):
    path = write_coqa(tmp_path / "coqa.json", [story(i % 5) for i in range(10)])
    task = CoQA(path, path, held_out=0.4)
    train, test = ({row["story"] for row in task.rows(split)} for split in ("train", "test"))
    assert len(train) == 3 and len(test) == 2 and not train & test
    assert len(task.rows("train")) == 6


@pytest.mark.parametrize("name", ["e2e", "coqa", "gsm8k"])
def test_a_score_of_some_rows_has_its_own_name(name, e2e, jsonl, tmp_path, monkeypatch):
    tasks = {
        "e2e": e2e,
        "coqa": CoQA(None, write_coqa(tmp_path / "dev.json", [story(0), story(1)])),
        "gsm8k": GSM8K(None, str(jsonl([{"question": "q", "answer": "#### 1"}] * 2))),
    }
    monkeypatch.setattr(e, "generate_replies", lambda *given, where: ["1"] * len(given[2]))
    found = e.score_rows(None, None, tasks[name], samples=None)
    score = {"e2e": "rouge_l", "coqa": "f1", "gsm8k": "accuracy"}[name]
    assert found.keys() == {"n", "metric", score, "ci95"} and found["metric"] == score


@pytest.mark.parametrize("name", ["e2e", "webnlg", "gsm8k", "coqa"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_file_is_named(name, split, tmp_path):
    cls = all_tasks()[name]
    with pytest.raises(FileNotFoundError, match=f"task {name}: {split} file .*nope.* does not"):
        cls(**{split: str(tmp_path / "nope")}).rows(split)
    with pytest.raises(ValueError, match=f"task {name} has no {split} file; set {split}"):
        cls(**{split: None}).rows(split)


GOOD = {
    E2E: "mr,ref\nname[A],A is good.\n",
    WebNLG: '{"category": "Airport", "triples": ["a | b | c"], "refs": ["d"]}\n',
    GSM8K: '{"question": "q", "answer": "#### 1"}\n',
}


@pytest.mark.parametrize(
    ("cls", "text", "message"),
    [
        (E2E, "mr,text\nname[A],b\n", "data row 1: field 'ref' is missing"),
        (E2E, GOOD[E2E] + "name[A], \n", "data row 2: field 'ref' is missing, empty"),
        (E2E, GOOD[E2E] + "name[A,b\n", r"data row 2: field 'mr' is 'name\[A'; write name"),
        (E2E, GOOD[E2E] + '"name[A], B",b\n', r"data row 2: field 'mr' is 'name\[A\], B'"),
        (E2E, "mr,ref\n", "data has no rows"),
        (WebNLG, GOOD[WebNLG] + "{", "data line 2: not JSON"),
        (WebNLG, GOOD[WebNLG] + "[1]", "data line 2: field 'triples' is missing"),
        (WebNLG, GOOD[WebNLG].replace('["d"]', "[]"), "line 1: field 'refs' is missing, empty or"),
        (WebNLG, GOOD[WebNLG].replace('"d"', '" "'), "line 1: field 'refs' has an entry that is"),
        (WebNLG, GOOD[WebNLG].replace('"Airport"', "1"), "line 1: field 'category' .* no text"),
        (GSM8K, GOOD[GSM8K].replace("####", ""), "line 1: field 'answer' does not end in '####"),
        (GSM8K, GOOD[GSM8K].replace("#### 1", "#### x"), "line 1: field 'answer' does not end"),
        (GSM8K, GOOD[GSM8K] + '{"answer": "#### 1"}', "line 2: field 'question' is missing"),
        (CoQA, "{", "data: not JSON"),
        (CoQA, '{"stories": []}', "data: field 'data' is missing"),
        (CoQA, json.dumps({"data": [{**story(0), "answers": []}]}), "story 1: field 'answers'"),
        (CoQA, json.dumps({"data": [story(0), {**story(0), "story": None}]}), "story 2: .*'story'"),
        (CoQA, json.dumps({"data": [{**story(0), "questions": story(0, 2)["questions"]}]}),
         "story 1: 2 questions, but 3, 3 answers"),
        (CoQA, json.dumps({"data": [{**story(0), "questions": [{}] * 3}]}),
         "story 1 turn 1: field 'input_text' is missing"),
    ],
)  # fmt: skip
def test_a_bad_row_names_file_row_and_field(cls, text, message, tmp_path):
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        cls(test=str(path)).rows("test")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("mr,ref\nname[A],A is good, and cheap.\n", "line 2.* has 3 fields, the header names 2"),
        ("mr,ref\nname[A]\n", "has 1 fields"),
        ('mr,ref\nname[A],"A is good.\nname[B],B is bad.\n', "data.csv.*(EOF|quote)"),
        ("mr,ref,ref\nname[A],A,B\n", "header is 'mr', 'ref', 'ref'"),
    ],
)
def test_a_table_that_would_lose_words_is_refused(tmp_path, monkeypatch, lines, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    path = tmp_path / "data.csv"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        E2E(train=str(path)).rows("train")


def test_a_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes("mr,ref\nname[Café],A\n".encode("latin-1"))
    with pytest.raises(ValueError, match="data.csv: no table in UTF-8"):
        E2E(test=str(path)).rows("test")


# ---------------------------------------------------------------------------------- evaluation


def test_the_report_has_every_metric_with_an_interval(e2e, monkeypatch):
    asked = []

    def reply(model, processor, prompts, max_new_tokens, *_):
        asked.append(max_new_tokens)
        return ["Try the food of A." if "name: A" in e.words(*p) else "See C at the river"
                for p in prompts]  # fmt: skip

    monkeypatch.setattr(e, "generate_replies", reply)
    monkeypatch.setattr(e, "try_sharing", lambda *_: None)
    e2e.train = None  # not needed: there is no picture, so there are no controls
    report, items = e.evaluate(None, None, e2e)
    assert asked == [96]
    assert "accuracy" not in report and report["n"] == 2
    found = report["metrics"]["rouge_l"]
    assert found["value"] == pytest.approx(0.9) and found["controls"] == {}
    assert found["ci95"] == pytest.approx(
        [0.8, 1]
    )  # of two rows, a quarter of the draws has one of them twice
    low, high = report["metrics"]["bleu"]["ci95"]
    assert low < report["metrics"]["bleu"]["value"] < high
    assert items[1]["scores"]["rouge_l"] == pytest.approx(0.8) and "bleu" not in items[1]["scores"]
    assert report["by_type"]["all"] == {k: report[k] for k in ("n", "metrics")}
    again, _ = e.evaluate(None, None, e2e)
    assert again["metrics"] == report["metrics"]
    table = e.render(json.loads(json.dumps(report)))
    assert "rouge_l" in table and "0.9000" in table and "0.8000 - 1.0000" in table


def test_accuracy_of_words_alone_has_no_controls(jsonl, monkeypatch):
    rows = [{"question": str(i), "answer": f"#### {i % 2}"} for i in range(4)]
    monkeypatch.setattr(e, "generate_replies", lambda *given: ["1"] * len(given[2]))
    monkeypatch.setattr(e, "try_sharing", lambda *_: None)
    report, items = e.evaluate(None, None, GSM8K(train=None, test=str(jsonl(rows))))
    assert report["accuracy"] == report["metrics"]["accuracy"]["value"] == 0.5
    assert report["controls"] == {} and [item["right"] for item in items] == [False, True] * 2
    assert report["ci95"] == pytest.approx([0.15, 0.85], abs=1e-3)  # Wilson, 2 of 4
    assert "majority" not in e.render(report) and "50.0%" in e.render(report)


# ------------------------------------------------------------------------------------ training

TEXT_ONLY = ["--align", "null", "--instruct.freeze_connector", "true", "--model.gate", "none"]


@pytest.fixture
def text_recipe(recipe, e2e):
    """The tiny recipe on words alone."""
    spec = {"class_path": "E2E", "init_args": {"train": e2e.train, "test": e2e.test}}
    return recipe, [*TEXT_ONLY, "--data.task", json.dumps(spec), "--data.chats_per_sample", "2"]


def test_a_run_on_text_alone_learns_and_is_scored(text_recipe, capsys):
    recipe, overrides = text_recipe
    run = train(recipe, overrides)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[-1] < losses[0] - 0.2
    report = e.evaluate_run(run, config.task_of_run(run))
    assert (run / "eval" / "e2e.json").is_file() and report["metrics"]["rouge_l"]["value"] >= 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--instruct.freeze_connector", "false"],
         "stage instruct trains the connector, but no row of task e2e has a picture; set instruct"),
        (["--model.gate", "sample"],
         "gate sample opens at pictures, but no row of task e2e has a picture; set model.gate: "),
        (["--model.gate", "after_image"], "gate after_image opens at pictures"),
        (["--align", '{"max_steps": 1}'],
         "stage align trains the connector, but no row of task e2e has a picture; set align to"),
    ],
)  # fmt: skip
def test_what_pictures_alone_could_teach_is_refused_before_the_run(text_recipe, overrides, message):
    recipe, text_only = text_recipe
    with pytest.raises(ValueError, match=message) as error:
        train(recipe, [*text_only, *overrides])
    assert "\n" not in str(error.value) and not (recipe.parent / "run").exists()


# ------------------------------------------------------------------------------------ the data


@needs_data
def test_joining_gives_back_the_text_that_was_tokenised():
    def read(name):
        with (DATA / "e2e" / name).open(encoding="utf-8", newline="") as file:
            return [" ".join(row["ref"].split()) for row in csv.DictReader(file)]

    raw, tokenised = read("devset.csv"), read("dev_tokenised.csv")
    joined = [_join(text) for text in tokenised]
    same = sum(a == b for a, b in zip(joined, raw, strict=True))
    assert same / len(raw) > 0.97
    before = sum(a == b for a, b in zip(tokenised, raw, strict=True))
    assert before / len(raw) < 0.05


@needs_data
def test_the_sizes_are_those_of_the_papers():
    e2e = E2E(str(DATA / "e2e/train_tokenised.csv"), str(DATA / "e2e/testset_w_refs.csv"))
    test = e2e.rows("test")
    assert len(e2e.rows("train")) == 42061
    assert len(test) == 630 and sum(len(row["refs"]) for row in test) == 4693
    webnlg = WebNLG(str(DATA / "webnlg/train.jsonl"), str(DATA / "webnlg/test.jsonl"))
    kinds = [webnlg.question_type(row) for row in webnlg.rows("test")]
    assert (kinds.count("seen"), kinds.count("unseen")) == (971, 891)  # Gardent et al., table 4
    assert {webnlg.question_type(row) for row in webnlg.rows("train")} == {"seen"}
    gsm8k = GSM8K(str(DATA / "gsm8k_train.jsonl"), str(DATA / "gsm8k_test.jsonl"))
    problems = gsm8k.rows("test")
    assert len(gsm8k.rows("train")) == 7473 and len(problems) == 1319
    assert all(gsm8k.score([row["answer"] for row in problems], problems))
    coqa = CoQA(*[str(DATA / "coqa_test.json")] * 2)
    turns = coqa.rows("test")
    learned = coqa.rows("train")
    stories = [{row["story"] for row in rows} for rows in (learned, turns)]
    # of 700 stories three are there twice
    assert len(learned) == 560 and [*map(len, stories)] == [558, 139]
    assert not stories[0] & stories[1]
    people = [row["turns"][-1][1][1] for row in turns]  # as if a person's answer were the reply
    assert value(coqa.metrics(people, turns)["f1"]) > 0.9
