# ruff: noqa: RUF001 -- sentences in many languages
"""The text suites: what their items are, what the models are asked, how replies are judged."""

import hashlib
import json
import os
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from mmpeft.tasks.retention import generate, local, read, verify, words
from mmpeft.tasks.retention.language import LANGUAGES, is_in

FOLDER = Path(str(files("mmpeft.tasks"))) / "retention"
CHOICES = ["grammar", "commonsense", "facts", "reading"]  # the multiple-choice tasks of `embedded`


def _manager(data_dir: Path | None = None, stock: tuple[Path, ...] = ()) -> TaskManager:
    metadata = {"data_dir": str(data_dir)} if data_dir else None
    # without lm-eval's own tasks, but for some folders of them: scanning all takes long
    return TaskManager(include_path=[*stock, FOLDER], include_defaults=False, metadata=metadata)


def _tasks(group: str, *args, **options) -> dict:
    """The tasks of a group by their short names."""
    loaded = _manager(*args, **options).load([group])["tasks"]
    return {name.rpartition("::")[2]: task for name, task in loaded.items()}


def _run(lm: LM, tasks: list) -> dict:
    return simple_evaluate(
        model=lm, tasks=tasks, task_manager=_manager(), apply_chat_template=True, bootstrap_iters=0
    )["results"]


def _asked(task, number: int) -> list[tuple]:
    """What lm-eval asks about one document: (prompt, continuation or settings) each."""
    doc = task.eval_docs[number]
    requests = task.construct_requests(doc, task.fewshot_context(doc, 0), metadata=("t", 0, 1))
    return [one.arguments for one in (requests if isinstance(requests, list) else [requests])]


# ----------------------------------------------------------------------------- the embedded suite


def test_generator_reproduces_the_shipped_items(tmp_path):
    generate.main(tmp_path)
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == sorted(f"{name}.jsonl" for name in generate.TASKS)
    for path in written:
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("task", "sha256"),
    [
        ("grammar", "cd70415a6794b728"),
        ("commonsense", "f4de902c8e4f0f67"),
        ("facts", "fdd3f664e7d6be53"),
        ("reading", "4ca350f3b748989c"),
    ],
)
def test_items_of_version_1_stay_as_they_were_measured(task, sha256):
    assert hashlib.sha256(generate.text(task).encode()).hexdigest()[:16] == sha256
    assert _tasks("embedded")[task].config.metadata["version"] == 1


def test_items_are_sound():
    rows = [row for name in CHOICES for row in generate.TASKS[name]()]
    assert 600 <= len(rows) <= 1000
    assert len({(row["context"], *sorted(row["choices"])) for row in rows}) == len(rows)
    for row in rows:
        assert 2 <= len(set(row["choices"])) == len(row["choices"]) <= 4, row
        assert all(choice.strip() == choice != "" for choice in row["choices"]), row
    for name in CHOICES:
        answers = [row["answer"] for row in generate.TASKS[name]()]
        shares = [answers.count(i) / len(answers) for i in sorted(set(answers))]
        assert max(shares) < 1.5 / len(shares)  # always choosing one place gets nobody far


def test_facts_in_words_are_facts():
    facts, rows = list(generate.facts()), list(generate.facts_in_words())
    assert 50 <= len(rows) <= 64 and len({row["source"] for row in rows}) == len(rows)
    for row in rows:
        fact = facts[row["source"]]
        assert row["prompt"].endswith(fact["context"])
        assert row["answer"] == fact["choices"][fact["answer"]]
        assert {row["answer"], *row["wrong"]} == set(fact["choices"])


def test_instructions_are_checkable():
    rows = list(generate.instructions())
    assert len({row["request"] for row in rows}) == len(rows) == 48
    for row in rows:
        assert row["prompt"].startswith(row["request"]) and "{" not in row["prompt"]
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            assert verify.mistake(name, arguments) is None
            for word in arguments.get("keywords", [arguments.get("keyword", "")]):
                assert word in row["prompt"].removeprefix(row["request"])


def test_clusters_are_what_items_share():
    tasks = _tasks("embedded")
    fields = {name: task.config.metadata.get("cluster") for name, task in tasks.items()}
    assert {name: field for name, field in fields.items() if field} == {
        "facts": "subject",
        "facts_in_words": "subject",
        "reading": "context",
    }
    for name in ("facts", "facts_in_words"):
        docs = tasks[name].eval_docs
        assert [doc["kind"] for doc in docs if doc["subject"] == "Japan"][:2] == [
            "capital", "continent",
        ]  # fmt: skip
        assert len(set(docs["subject"])) > 0.8 * len(docs)
    assert read.subject({"kind": "opposite", "context": 'The opposite of "hot" is'}) == "hot"


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Bogotá", True),
        ("The capital of Colombia is BOGOTA.", True),
        ("Bogotá, not Buenos Aires.", True),
        ("Buenos Aires? No, Bogotá.", False),
        ("buenos\naires or Bogota", False),
        ("Bogotans live there.", False),
        ("", False),
    ],
)
def test_a_fact_in_words(reply, right):
    doc = {"answer": "Bogotá", "wrong": ["Buenos Aires", "Lima", "Oslo"]}
    assert words.right_answer_first(doc, [reply]) == {"acc": float(right)}


class Parrot(LM):
    """Answers every chat with what `reply` makes of it, and every choice at random."""

    def __init__(self, reply):
        super().__init__()
        self.reply = reply

    def loglikelihood(self, requests):
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        return [self.reply(request) for request in requests]

    tokenizer_name = "parrot"

    def apply_chat_template(self, history, add_generation_prompt=True):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in history)


def test_chats_are_scored():
    tasks = _tasks("embedded")
    chats = {name: task for name, task in tasks.items() if task.config.metadata.get("chat")}
    assert list(chats) == ["facts_in_words", "instructions"]

    def reply(request):
        assert request.args[0] == "<user>" + request.doc["prompt"]
        assert request.args[1]["max_gen_toks"] <= 64 and request.args[1]["do_sample"] is False
        return request.doc.get("answer", "Say.")  # one sentence of one word, without commas

    results = _run(Parrot(reply), list(chats.values()))
    assert results["embedded::facts_in_words"]["acc,none"] == 1
    assert results["embedded::instructions"]["acc,none"] == 16 / 48  # 4 of the 12 instructions


# ------------------------------------------------------------------- instructions: the 25 of IFEval

LESS, MORE = "less than", "at least"
# instruction, arguments, replies that follow it, replies that do not
CASES = [
    ("keywords:existence", {"keywords": ["Sea", "red sand"]},
     ["the sea, RED SAND.", "Overseas red sandals"], ["the sea", "red, sea, sand"]),
    ("keywords:frequency", {"keyword": "sea ", "frequency": 2, "relation": MORE},
     ["Sea and sea.", "seasea"], ["One sea."]),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": LESS},
     ["One sea.", "None."], ["Sea and sea."]),
    ("keywords:forbidden_words", {"forbidden_words": ["sea", "sand"]},
     ["Overseas.", "Sandy"], ["The SEA.", "sand-coloured"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": MORE},
     ["Eee", "even green"], ["tea", "even"]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 1, "let_relation": LESS},
     ["No such letter."], ["Quick."]),
    ("language:response_language", {"language": "de"},
     ["Das Buch auf dem Tisch ist von meiner Schwester."],
     ["The book on the table is my sister's.", "Книга на столе.", "123"]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": MORE},
     ["One. Two! Three?", "One. Two.\nAnd three"], ["One. Two.", "Dr. J. Smith came, e.g. today."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS},
     ["Only one.", "only one without a full stop", 'She said: "Yes."'],
     ["One. Two.", "Wait... No!"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["One\n***\nTwo", "***\nOne\n***\nTwo\n***"], ["One", "One\n***\n***\nTwo", "1 *** 2 *** 3"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": MORE},
     ["one two three", "it's two-fold"], ["one two", "one, two!"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS},
     ["one two", "one - two"], ["one two three"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Sea"},
     ["Hello.\n\nSea, sand", 'Hello.\n\n"sea" it is'],
     ["Sea.\n\nHello.", "Hello.\n\nSea.\n\nSand.", "Sea", "Hello.\n\nSeaside"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[name] [your city]"], ["[name]", "[two\nlines] [one]", "(a) (b)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Bye.\nP.S. One more thing", "bye p. s. more"], ["Bye.", "PS: more", "P.S"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"},
     ["Bye.\nP.P.S More", "p. p. s. more"], ["P.S. More"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* one\n* two", "- one\n  - two", "Here:\n* one\n- two\nDone."],
     ["* one", "* one\n* two\n* three", "**Title**\n* one", "1. one\n2. two"]),
    ("detectable_format:constrained_response", {},
     ["My answer is no.", " Well: My answer is maybe. "], ["my answer is no.", "No."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*one* and *two*", "**one** and *two*"], ["*one*", "* one\n* two", "** ** * *", "**one**"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     ["Section 1\nA\nSection 2\nB", "Section1 Section2 Section3"],
     ["Section 1\nA", "SECTION 1 SECTION 2", "Section A Section B"]),
    ("detectable_format:json_format", {},
     ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "```\n[]\n```", "```JSON\n{}```"],
     ["{'a': 1}", 'Here: {"a": 1}', '{"a": 1', "yes"]),
    ("detectable_format:title", {},
     ["<<My title>>\nText", "Text <<a>>"], ["<My title>", "<< >>", "<<two\nlines>>"]),
    ("combination:two_responses", {},
     ["One\n******\nTwo", "******\nOne ****** Two"],
     ["One", "One ****** One", "1 ****** 2 ****** 3", "One ****** ", "1 ****** ****** 2"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say Hi. "},
     ["Say hi. Hi", "\nsay hi.\nHi"], ["Hi. Say hi.", "Say, hi."]),
    ("startend:end_checker", {"end_phrase": "That is all."},
     ["Hi. That is all.", '"Hi. that is ALL."\n'], ["That is all. Bye.", "That is all"]),
    ("startend:quotation", {},
     ['"Hi."', ' "" '], ['"', "'Hi.'", '"Hi." she said', "“Hi.”"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": MORE},
     ["HELLO there YOU", "I say NO.", "THE U.S. won"], ["Hello You", "WELL-KNOWN", "ONE 2 3"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": LESS},
     ["Hello You"], ["I am"]),
    ("change_case:english_capital", {},
     ["THIS IS THE SEA.", "YES!"], ["This is the sea.", "DAS IST NICHT DAS MEER.", "123"]),
    ("change_case:english_lowercase", {},
     ["this is the sea.", "yes"], ["This is the sea.", "das ist nicht das meer.", "123"]),
    ("punctuation:no_comma", {},
     ["No commas; none."], ["One, two", "1,000"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_instruction(name, arguments, good, bad):
    assert verify.unsupported(name, arguments) is verify.mistake(name, arguments) is None
    # a table of many instructions gives each the others' arguments as None
    doc = {"instruction_id_list": [name], "kwargs": [{**arguments, "other": None}]}
    assert [verify.followed(doc, reply) for reply in good] == [[True]] * len(good)
    assert [verify.followed(doc, reply) for reply in bad] == [[False]] * len(bad)
    for reply in (" \n", "[" * 2000, "*" * 2000, "." * 2000):  # nothing breaks on a bad reply
        verify.loosely_followed(doc, reply)
    assert verify.followed(doc, " \n") == [False]  # whatever "less than" says


def test_all_instructions_of_ifeval_are_there():
    assert {case[0] for case in CASES} == set(verify.CHECKS) and len(verify.CHECKS) == 25


@pytest.fixture
def lm_evals_own(monkeypatch):
    """lm-eval's port of the published code, without what it needs for sentences and languages."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda *_: None)
    monkeypatch.setitem(sys.modules, "langdetect", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "immutabledict", SimpleNamespace(immutabledict=dict))
    before = set(sys.modules)
    from lm_eval.tasks.ifeval import utils

    yield utils
    for name in set(sys.modules) - before:
        if name.startswith("lm_eval.tasks.ifeval"):
            del sys.modules[name]


def test_checks_agree_with_lm_evals_own(lm_evals_own):
    needs_more = ("language:", "change_case:", "length_constraints:number_sentences")
    cases = [case for case in CASES if not case[0].startswith(needs_more)]
    replies = {reply for *_, good, bad in CASES for reply in (*good, *bad)}
    for name, arguments, *_ in cases:
        doc = {"instruction_id_list": [name], "kwargs": [arguments]}
        example = lm_evals_own.InputExample(0, [name], "", [arguments])
        for reply in sorted(replies):
            strict = lm_evals_own.test_instruction_following_strict(example, reply)
            loose = lm_evals_own.test_instruction_following_loose(example, reply)
            assert verify.followed(doc, reply) == strict.follow_instruction_list, (name, reply)
            assert verify.loosely_followed(doc, reply) == loose.follow_instruction_list, (
                name, reply,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. two. three", 3),
        ("Mr. Smith met J. R. Tolkien at 5 p.m. in St. Ives.", 1),
        ("So did I. It rained.", 2),
        ("1. First one.\n2. Second one.", 2),
        ("It costs 3.50 at shop.com. Good!", 2),
        ('"Go!" she said. (He went.) *Why?*', 4),
        ("Really?! Yes... no.", 3),
        ("よい。わるい。", 2),
        ("यह है। वह है।", 2),
    ],
)
def test_sentences(text, count):
    assert verify.sentences(text) == count


def test_loose_takes_off_a_first_and_a_last_line_and_asterisks():
    quotation = {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    for reply in (
        'Sure:\n"Hi."',
        '"Hi."\nBye',
        'Sure:\n"Hi."\nBye',
        '**"Hi."**',
        'So:\n*"Hi."*\n!',
    ):
        assert verify.followed(quotation, reply) == [False], reply
        assert verify.loosely_followed(quotation, reply) == [True], reply
    assert verify.loosely_followed(quotation, 'One\nTwo\n"Hi."') == [False]


def test_scores_of_ifeval():
    doc = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }
    assert verify.ifeval(doc, ['Here\n"so, so"']) == {
        "prompt_level_strict_acc": 0.0,
        "inst_level_strict_acc": [False, False],
        "prompt_level_loose_acc": 1.0,  # without its last line, without its first
        "inst_level_loose_acc": [True, True],
    }
    assert verify.all_followed(doc, ['"so so"']) == {"acc": 1.0}
    assert verify.all_followed(doc, ["so so"]) == {"acc": 0.0}
    assert verify.share_of_instructions([[True, False], [True]]) == pytest.approx(2 / 3)


SENTENCES = {
    "en": "There are many books in this library, but I have read only a few of them.",
    "es": "El libro que está sobre la mesa es de mi hermana y no lo he leído.",
    "pt": "O livro que está em cima da mesa é da minha irmã e ainda não foi lido.",
    "fr": "Le livre qui est sur la table est à ma sœur et je ne l'ai pas lu.",
    "de": "Das Buch auf dem Tisch ist von meiner Schwester und ich habe es nicht gelesen.",
    "it": "Il libro che è sul tavolo è di mia sorella e non l'ho ancora letto.",
    "pl": "Książka, która leży na stole, jest mojej siostry i nie czytałem jej.",
    "vi": "Cuốn sách ở trên bàn là của chị tôi và tôi không đọc nó.",
    "sw": "Kitabu hiki ni cha dada yangu na si cha mwalimu wa shule.",
    "fi": "Kirja on pöydällä, mutta se ei ole minun, ja en ole lukenut sitä.",
    "ru": "Книга, которая лежит на столе, не моя, и я её ещё не читал.",
    "uk": "Книга, яка лежить на столі, не моя, і я її ще не читав.",
    "bg": "Книгата, която е на масата, не е моя и аз не съм я чел.",
    "ar": "هذا الكتاب الذي على الطاولة هو كتاب أختي ولم أقرأه بعد.",
    "fa": "این کتاب که روی میز است برای خواهر من است و آن را نخوانده‌ام.",
    "ur": "یہ کتاب میری بہن کی ہے اور میں نے اس کو نہیں پڑھا۔",
    "hi": "यह किताब मेरी बहन की है और मैंने इसे नहीं पढ़ा है।",
    "mr": "हे पुस्तक माझ्या बहिणीचे आहे आणि मी ते वाचले नाही.",
    "ne": "यो किताब मेरी बहिनीको हो र मैले यो पढेको छैन।",
    "bn": "আমি আমার কুকুরের সাথে পার্কে হাঁটতে ভালোবাসি।",
    "th": "ฉันชอบเดินเล่นในสวนสาธารณะกับสุนัขของฉัน",
    "ta": "நான் என் நாயுடன் பூங்காவில் நடக்க விரும்புகிறேன்.",
    "te": "నాకు నా కుక్కతో పార్కులో నడవడం ఇష్టం.",
    "ko": "나는 강아지와 함께 공원에서 산책하는 것을 좋아합니다.",
    "he": "אני אוהב לטייל בפארק עם הכלב שלי כשיש שמש.",
    "kn": "ನನಗೆ ನನ್ನ ನಾಯಿಯೊಂದಿಗೆ ಉದ್ಯಾನದಲ್ಲಿ ನಡೆಯುವುದು ಇಷ್ಟ.",
    "gu": "મને મારા કૂતરા સાથે બગીચામાં ફરવું ગમે છે.",
    "pa": "ਮੈਨੂੰ ਆਪਣੇ ਕੁੱਤੇ ਨਾਲ ਪਾਰਕ ਵਿੱਚ ਸੈਰ ਕਰਨਾ ਪਸੰਦ ਹੈ।",
    "ml": "എനിക്ക് എന്റെ നായയോടൊപ്പം പാർക്കിൽ നടക്കാൻ ഇഷ്ടമാണ്.",
    "ja": "私は天気のいい日に犬と公園を散歩するのが好きです。",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_languages_are_told_apart(code):
    assert [other for other in LANGUAGES if is_in(SENTENCES[code], other)] == [code]


def test_text_without_a_language_is_in_none():
    assert set(SENTENCES) == set(LANGUAGES)
    for text in ("", "123 !?", "Ελληνικά", "中文", "zgr " * 12):
        assert not any(is_in(text, code) for code in LANGUAGES), text


# ------------------------------------------------------------------------------ standard benchmarks

IFEVAL = {"prompt": "Say hi, no commas.", "instruction_id_list": ["punctuation:no_comma"]}
# of each task of `standard`: its file, a row of it, and the same item as it is on the hub
SAME = {
    "arc_easy": ("arc_easy.jsonl",
        {"query": "Question: What is ice?", "choices": ["Water", "Iron"], "gold": 1},
        {"question": "What is ice?", "choices": {"text": ["Water", "Iron"], "label": ["A", "B"]},
         "answerKey": "B"}),
    "piqa": ("piqa.jsonl",
        {"query": "Question: To cool tea,\n", "choices": ["wait", "  boil it"], "gold": 0},
        {"goal": "To cool tea,", "sol1": "wait", "sol2": "  boil it", "label": 0}),
    "openbookqa": ("openbook_qa.jsonl",
        {"query": "Predators eat", "choices": ["lions", "bunnies"], "gold": 1},
        {"question_stem": "Predators eat", "answerKey": "B",
         "choices": {"text": ["lions", "bunnies"], "label": ["A", "B"]}}),
    "hellaswag": ("hellaswag_val_first5000.jsonl",
        {"query": "Roof: A man sits. He", "choices": ["sings.", "flies. Up."], "gold": 0},
        {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "label": "0",
         "endings": ["sings.", "flies [title] Up."]}),
    "winogrande": ("winogrande.jsonl",
        {"context_options": ["Sam saw Ann so Sam", "Sam saw Ann so Ann"],
         "continuation": "waved.", "gold": 1},
        {"sentence": "Sam saw Ann so _ waved.", "option1": "Sam", "option2": "Ann",
         "answer": "2"}),
    "lambada_openai": ("lambada_openai.jsonl",
        {"context": "She rang the", "continuation": "bell"}, {"text": "She rang the bell"}),
    "copa": ("copa.jsonl",
        {"query": "It rained, because", "choices": ["it was hot.", "it was wet."], "gold": 0},
        {"premise": "It rained.", "question": "cause", "choice1": "It was hot.",
         "choice2": "It was wet.", "label": 0}),
    "ifeval": ("ifeval.jsonl", {**IFEVAL, "kwargs": [{}]}, {**IFEVAL, "kwargs": [{"n": None}]}),
}  # fmt: skip


@pytest.fixture
def local_data(tmp_path):
    for file, row, _ in SAME.values():
        (tmp_path / file).write_text(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture
def standard(monkeypatch):
    """The stock tasks of lm-eval on one item each, without the hub."""
    import lm_eval.tasks

    rows = {
        "allenai/ai2_arc": "arc_easy", "baber/piqa": "piqa", "allenai/openbookqa": "openbookqa",
        "Rowan/hellaswag": "hellaswag", "EleutherAI/lambada_openai": "lambada_openai",
        "aps/super_glue": "copa", "allenai/winogrande": "winogrande", "google/IFEval": "ifeval",
    }  # fmt: skip

    def load_dataset(path, name=None, split=None, **_):
        data = datasets.Dataset.from_list([SAME[rows[path]][2]])
        return data if split else {"train": data, "validation": data, "test": data}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    folders = ["arc", "piqa", "openbookqa", "hellaswag", "lambada", "super_glue", "winogrande"]
    stock = Path(lm_eval.tasks.__file__).parent
    return _tasks("standard", stock=tuple(stock / folder for folder in folders))


@pytest.mark.parametrize("name", SAME)
def test_local_files_ask_what_lm_eval_asks(name, standard, local_data):
    theirs = standard["ifeval_checked" if name == "ifeval" else name]
    ours = _tasks("standard_local", local_data)[f"{name}_local"]
    expected = _asked(theirs, 0)
    if name == "copa":  # the file has a comma, and lm-eval two spaces
        expected = [("It rained, because", answer[1:]) for _, answer in expected]
    assert _asked(ours, 0) == expected
    assert ours.config.metadata["metric"] == theirs.config.metadata.get("metric", "acc")
    assert ours.config.metadata.get("chat") == theirs.config.metadata.get("chat")
    assert ours.config.metadata["metric"] in ours.aggregation()
    if ours.config.output_type == "multiple_choice":
        for scores in ([(-1.0, False), (-9.0, False)], [(-9.0, False), (-1.0, False)]):
            results = [task.process_results(task.eval_docs[0], scores) for task in (ours, theirs)]
            assert results[0]["acc"] == results[1]["acc"]  # the same answer is right


def test_stock_tasks_keep_their_version(standard):
    import lm_eval.tasks

    own = {"arc_easy": "arc", "piqa": "piqa", "openbookqa": "openbookqa", "hellaswag": "hellaswag"}
    for name, folder in own.items():
        text = (Path(lm_eval.tasks.__file__).parent / folder / f"{name}.yaml").read_text()
        assert f"version: {standard[name].config.metadata['version']}\n" in text


def test_every_task_name_is_used_once():
    names = [name for group in ("embedded", "standard_local") for name in _names(group)]
    assert len(set(names)) == len(names)


def _names(group: str) -> list[str]:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return [
        task["task"] for task in yaml.load((FOLDER / f"{group}.yaml").read_text(), Loader)["task"]
    ]


def test_ifeval_is_scored(local_data):
    task = _tasks("standard_local", local_data)["ifeval_local"]
    for reply, score in (("Hi", 1), ("Hi, you", 0)):
        run = _run(Parrot(lambda _, reply=reply: reply), [task])
        results = run["standard_local::ifeval_local"]
        for level in ("prompt", "inst"):
            for kind in ("strict", "loose"):
                assert results[f"{level}_level_{kind}_acc,none"] == score


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("file", "form", "text", "message"),
    [
        ("a.jsonl", "choices", "", "is empty"),
        ("a.jsonl", "choices", [GOOD, "{"], "a.jsonl, row 2 is not JSON"),
        ("a.jsonl", "choices", [GOOD, "", GOOD], "row 2 is not JSON"),
        ("a.jsonl", "choices", ["[1]"], "row 1 has to be a JSON object"),
        ("a.jsonl", "choices", [{"query": "q", "gold": 0}], "row 1 has no field `choices`.*query"),
        ("a.jsonl", "choices", [{**GOOD, "choices": ["a"]}], "row 1: `choices` has to be a list"),
        ("a.jsonl", "choices", [{**GOOD, "choices": ["a", " "]}], "`choices` has to be"),
        ("a.jsonl", "choices", [{**GOOD, "gold": 2}], "`gold` has to be the index.*not 2"),
        ("a.jsonl", "choices", [{**GOOD, "gold": "0"}], "`gold` has to be .* not '0'"),
        ("a.jsonl", "choices", [{**GOOD, "gold": True}], "`gold` has to be .* not True"),
        ("a.jsonl", "last_word", [{"context": "", "continuation": "x"}], "`context` has to be a t"),
        ("a.jsonl", "contexts", [{"context_options": "ab", "continuation": "x", "gold": 0}],
         "`context_options` has to be a list"),
        ("a.jsonl", "ifeval", [{"prompt": "p"}], "row 1: `instruction_id_list` and `kwargs`"),
        ("a.jsonl", "ifeval", [{**IFEVAL, "kwargs": []}], "row 1: 1 in .* 0 in `kwargs`"),
        ("a.jsonl", "ifeval", [{**IFEVAL, "kwargs": [{"n": 1}]}], "takes the arguments"),
    ],
)  # fmt: skip
def test_malformed_files_are_named(tmp_path, file, form, text, message):
    rows = [row if isinstance(row, str) else json.dumps(row) for row in text]
    (tmp_path / file).write_text("\n".join(rows))
    with pytest.raises(ValueError, match=message):
        local.documents(file, form, data_dir=str(tmp_path))


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"piqa.jsonl .*data_dir"):
        local.documents("piqa.jsonl", "choices")
    with pytest.raises(ValueError, match=r"piqa.jsonl does not exist; `data_dir`"):
        local.documents("piqa.jsonl", "choices", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "at least"),
        ("length_constraints:number_words", {"num_words": "3", "relation": MORE}, "num_words='3'"),
        ("length_constraints:number_words", {"num_words": 3}, "takes the arguments"),
        ("keywords:existence", {"keywords": "sea"}, "keywords='sea'"),
        ("keywords:forbidden_words", {"forbidden_words": []}, "forbidden_words="),
        ("startend:quotation", {"mark": "x"}, "takes the arguments"),
    ],
)
def test_mistaken_arguments_are_named(name, arguments, message):
    row = {"prompt": "p", "instruction_id_list": [name], "kwargs": [arguments]}
    with pytest.raises(ValueError, match=rf"here, row 1, `kwargs`: {name} .*{message}"):
        local.judgeable([row], "here")


def test_what_cannot_be_judged_is_left_out_and_counted():
    def row(name, **arguments):
        return {"prompt": name, "instruction_id_list": [name], "kwargs": [arguments]}

    rows = [
        row("punctuation:no_comma"),
        row("poetry:rhyme", feet=5),
        row("language:response_language", language="tlh"),
        row("language:response_language", language="fr"),
    ]
    with pytest.warns(UserWarning, match=r"here: 2 of 4 items .* 'tlh'; .*'poetry:rhyme'"):
        splits = local.judgeable(rows, "here")
    assert splits["test"]["prompt"] == ["punctuation:no_comma", "language:response_language"]
    assert len(splits["excluded"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(local.judgeable(rows[:1], "here")["excluded"]) == 0
    with pytest.raises(ValueError, match="no item that can be judged: .*rhyme"):
        local.judgeable(rows[1:2], "here")


@pytest.mark.skipif(
    "MMPEFT_TEXT_DATA" not in os.environ,
    reason="set MMPEFT_TEXT_DATA to the folder of the files README.md lists for standard_local",
)
def test_real_files_give_the_expected_prompts():
    folder = Path(os.environ["MMPEFT_TEXT_DATA"])
    tasks = _tasks("standard_local", folder)
    expected = {
        "arc_easy": lambda r: [(r["query"] + "\nAnswer:", " " + c) for c in r["choices"]],
        "piqa": lambda r: [(r["query"] + "Answer:", " " + c) for c in r["choices"]],
        "openbookqa": lambda r: [(r["query"], " " + c) for c in r["choices"]],
        "hellaswag": lambda r: [(r["query"], " " + c) for c in r["choices"]],
        "copa": lambda r: [(r["query"], " " + c) for c in r["choices"]],
        "winogrande": lambda r: [(c, " " + r["continuation"]) for c in r["context_options"]],
        "lambada_openai": lambda r: [(r["context"], " " + r["continuation"])],
    }
    assert set(tasks) == {f"{name}_local" for name in [*expected, "ifeval"]}
    for name, (file, _, _) in SAME.items():
        task = tasks[f"{name}_local"]
        rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
        assert (len(task.eval_docs) == len(rows) and "excluded" not in task.dataset) or (
            len(task.dataset["excluded"]) == 0
        )
        for number in range(20):
            row = rows[number]
            if name == "ifeval":
                assert _asked(task, number)[0][0] == row["prompt"]
            else:
                assert _asked(task, number) == expected[name](row)
