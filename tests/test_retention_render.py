"""What a reader sees of a retention report: terminal text, HTML page, figures."""

import copy
import json
import random
import re
from functools import cache
from html.parser import HTMLParser

import matplotlib
import pytest

from mmpeft.retention.page import FLIPS, flipped, leaves, render_page
from mmpeft.retention.plots import forest, front, kl_by_position, minus, svg
from mmpeft.retention.terminal import COLUMNS, ORDER, points, render, worst_first
from tests.retention_sample import MODES, TASKS, bare, sample

VOID = {"meta", "br", "link", "img", "input", "hr"}


@cache
def _samples() -> dict[str, tuple[dict, list[dict]]]:
    return {"sample": sample(), "none": sample("none"), "bare": bare()}


@cache
def _page(name: str) -> str:
    return render_page(*_samples()[name])


def _lines(name: str) -> list[str]:
    return render(_samples()[name][0]).splitlines()


# -------------------------------------------------------------------------------------- terminal


def test_one_verdict_line_a_mode_comes_first():
    lines = _lines("sample")
    assert lines[0] == "text: RETAINED by proof: the two sides are the same function"
    assert re.fullmatch(
        r"with_image: DEGRADED -\d\.\d points \(95% CI -\d\.\d to -\d\.\d\): the bridge answers "
        "worse than its base",
        lines[1],
    )
    assert lines[2].startswith(
        "after_image: INCONCLUSIVE -1.2 points (95% CI -2.9 to +0.5): a loss"
    )
    assert lines[3:5] == ["", "Not everywhere: after_image is degraded on reading."]
    assert _lines("bare")[0].startswith("text: NOT JUDGEABLE: the base itself")


def test_estimated_retention_says_what_is_ruled_out():
    report = copy.deepcopy(_samples()["none"][0])
    report["modes"]["text"]["verdict"] = "retained"
    report["margin"] = 0.025
    first = render(report).splitlines()[0]
    assert first.startswith("text: RETAINED -4.0 points")
    assert first.endswith("a loss of 2.5 points or more is ruled out")


def test_a_one_sided_verdict_beside_a_two_sided_interval_says_so():
    report = copy.deepcopy(_samples()["none"][0])
    overall = report["modes"]["text"]["overall"]
    overall |= {"delta": -0.017, "ci95": [-0.036, 0.002], "bounds95": [-0.033, -0.001]}
    report["modes"]["text"]["verdict"] = "degraded"
    first = render(report).splitlines()[0]
    assert "(95% CI -3.6 to +0.2, one-sided at most -0.1)" in first


@pytest.mark.parametrize("name", ["sample", "none", "bare"])
def test_rows_come_worst_first_whatever_their_order(name):
    report = _samples()[name][0]
    rows = worst_first(report)
    places = [(ORDER.index(row["verdict"]), row["delta"]) for row in rows]
    assert places == sorted(places)
    pooled = sum(body["overall"] is not None for body in report["modes"].values())
    assert len(rows) == len(report["tasks"]) + pooled
    shuffled = random.Random(0).sample(report["tasks"], len(report["tasks"]))
    assert worst_first({**report, "tasks": shuffled}) == rows


def test_table_holds_every_task_and_the_pooled_rows():
    lines = _lines("sample")
    start = next(i for i, line in enumerate(lines) if line.startswith("task "))
    assert re.split(r"\s{2,}", lines[start]) == list(COLUMNS)
    table = [line.split() for line in lines[start + 1 : lines.index("", start)]]
    assert {(row[0], row[1]) for row in table} == {(t, m) for t in (*TASKS, "all") for m in MODES}
    worst = table[0]
    assert worst[:6] == ["facts_in_words", "with_image", "60", "78.3", "58.3", "-20.0"]
    assert worst[-1] == "degraded" and table[-1][-1] == "retained"
    exact = next(row for row in table if row[:2] == ["facts", "text"])
    assert exact[5:9] == ["+0.0", "exact", "0", "0"]
    graded = next(row for row in table if row[:2] == ["summary", "after_image"])
    assert graded[8:11] == ["-", "-", "-"]  # flips and p-value


def test_the_rest_of_the_report_is_said_too():
    text = render(_samples()["sample"][0])
    for said in (
        "Sides (bridge): base starter:smollm2-135m-instruct, bridge runs/quickstart, gate 'sample'",
        "text 0   text after an irrelevant image 28.38   image questions 38.12",
        "text: the bridge ran 8 of 60 batches, equal bit for bit",
        "Prose (16384 tokens):",
        "with_image, facts: 12 of 60 known by likelihood but no longer said in words (base 3)",
        "with_image: ECE 0.061 -> 0.093, Brier 0.184 -> 0.251 (4 tasks)",
        "with_image, novel (bits_per_byte, 20 documents): 0.9511 -> 1.051 (+0.0996)",
        "largest retained scale: 0.5",
        "wiki: asks for perplexities",
        "Holm-corrected",
    ):
        assert said in text
    health = next(
        line.split() for line in text.splitlines() if re.match("with_image +bridge", line)
    )
    assert health[2:] == ["100", "4.31", "2", "61.0", "2.0", "11.7", "1.0"]
    dial = next(line.split() for line in text.splitlines() if line.lstrip().startswith("0.75 "))
    assert dial[1] == "96.2" and dial[-1] == "inconclusive"


def test_text_is_plain_and_without_empty_sections():
    for name in _samples():
        text = render(_samples()[name][0])
        assert "\x1b" not in text and "None" not in text and text.endswith("\n")
        assert "\n\n\n" not in text and not re.search(" $", text, re.MULTILINE)
    for absent in ("Generation health", "Format against", "Calibration", "Dial", "Skipped", "all "):
        assert not any(line.startswith(absent) for line in _lines("bare"))
    assert "no gate" in render(_samples()["bare"][0])


def test_report_without_tasks_prose_or_vision():
    report = copy.deepcopy(_samples()["bare"][0])
    report |= {"tasks": [], "kl": None, "bits_per_byte": None, "top1_agreement": None}
    report["dial"] = copy.deepcopy(_samples()["sample"][0]["dial"])
    report["dial"] |= {"largest_retained": None, "vision_task": None}
    for point in report["dial"]["points"]:
        point["vision"] = None
    text = render(report)
    assert "no scale is retained" in text and "Prose" not in text
    page = render_page(report, [])
    assert "no scale is retained" in page and page.count("<svg") == 1  # the dial alone


def test_dial_where_nothing_could_be_judged():
    report = copy.deepcopy(_samples()["sample"][0])
    report["dial"]["largest_retained"] = None
    report["dial"]["points"][2]["modes"]["with_image"] = None
    assert len(front(report["dial"]).axes[1].texts) == 5
    for point in report["dial"]["points"]:
        point["modes"] = dict.fromkeys(point["modes"])
    assert "96.2  [94.2, 97.7]\n" in render(report)
    assert render_page({**report, "tasks": [], "kl": None}, []).count("<svg") == 0
    with pytest.raises(ValueError, match="no point"):
        front(report["dial"])


def test_zero_has_one_sign():
    assert points(0.0) == points(-0.0) == points(-0.0001) == "+0.0"


# ------------------------------------------------------------------------------------------ page


class Reader(HTMLParser):
    """Collects elements, attributes and text; refuses tags that do not match."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("name", ["sample", "none", "bare"])
def test_page_is_sound_and_holds_nothing_from_elsewhere(name):
    page = _page(name)
    elements = Reader(page).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "base"}
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "style", "action"):
                assert "//" not in value
            if key in ("href", "xlink:href"):
                assert value.removeprefix("#") in ids
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "None" not in "".join(Reader(page).text)


def test_page_is_accessible():
    elements = Reader(_page("sample")).elements
    assert dict(elements)["html"] == {"lang": "en"}
    figures = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(figures) == 3
    assert all(held["role"] == "img" and held["aria-label"] for held in figures)
    assert all(held["scope"] in ("row", "col") for tag, held in elements if tag == "th")
    tables = sum(tag == "table" for tag, _ in elements)
    captions = sum(tag == "caption" for tag, _ in elements)
    choices = _page("sample").count("choice (log-likelihood, nats)")  # these stand below a heading
    assert tables == captions + choices > 5
    assert "prefers-color-scheme: dark" in _page("sample")


def test_page_leads_with_the_verdict_of_every_mode():
    page = _page("sample")
    places = [page.index(f'aria-label="verdict, {mode}"') for mode in MODES]
    assert places == sorted(places) and places[-1] < page.index("<svg")
    text = "".join(Reader(page).text)
    assert "RETAINED by proof: the two sides are the same function" in text
    assert "the two sides are one function, so there is nothing to estimate" in text
    assert "fewer right answers than its base" in text and "too few to tell" in text
    assert text.index("with_image60") < text.index("grammar acc_norm")  # the table, worst first


def test_words_of_models_and_documents_are_escaped():
    report, items = copy.deepcopy(_samples()["none"])
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>--> $x_1$ ' \" {{ 7 * 7 }}"
    for row in report["tasks"]:
        if row["name"] == "reading":
            row["name"] = hostile
    for item in items:
        if item["task"] == "reading":
            item["task"] = hostile
            item["choices"] = [hostile, *item["choices"][1:]]
        item["prompt"] = hostile
        if item["base"]["reply"] is not None:
            item["gold"] = item["base"]["reply"] = item["bridge"]["reply"] = hostile
    report["skipped"] = [{"task": hostile, "reason": hostile}]
    report["sides"]["bridge"]["name"] = report["provenance"]["dtype"] = hostile
    report["gate"] = report["dial"]["vision_task"] = hostile
    reader = Reader(render_page(report, items))
    assert not {tag for tag, _ in reader.elements} & {"script", "img"}
    text = "".join(reader.text)
    assert text.count(hostile) > 100 and "49" not in text.split("Skipped")[1].split("Answers")[0]
    assert "alert('hostile')" in "".join(Reader(_page("sample")).text)


def test_changed_answers_are_counted_and_capped():
    text = " ".join("".join(Reader(_page("sample")).text).split())
    start = text.index("reading, with_image: 31 lost, 10 gained of 196")
    group = text[start : text.index("reading, after_image:", start)]
    assert len(re.findall("lost, document", group)) == FLIPS == 25  # losses before gains
    assert "gained, document" not in group
    assert "16 more are in items.jsonl." in group
    start = text.index("facts, with_image: 21 lost, 9 gained of 218")
    group = text[start : text.index("summary, with_image:", start)]
    assert len(re.findall("lost, document", group)) == 21
    assert len(re.findall("gained, document", group)) == 4
    assert "5 more are in items.jsonl." in group
    assert re.search(r"No score changed: .*reading \(text\)", text)


def test_largest_changes_of_a_graded_task_come_first():
    report, items = copy.deepcopy(_samples()["sample"])
    row = next(r for r in report["tasks"] if (r["mode"], r["name"]) == ("with_image", "summary"))
    graded = [i for i in items if (i["mode"], i["task"]) == ("with_image", "summary")]
    graded[30]["base"]["score"], graded[30]["bridge"]["score"] = 1.0, 0.1
    group = flipped(row, {("with_image", "summary"): graded})
    assert [item["doc_id"] for _, item in group["shown"]] == [30, *range(9), *range(24, 28)]
    assert (group["lost"], group["gained"], group["more"]) == (10, 4, 0)


def test_an_item_shows_choices_gold_and_both_answers():
    text = " ".join("".join(Reader(_page("sample")).text).split())
    start = text.index("facts, with_image: 21 lost")
    item = text[text.index("lost, document 1", start) : text.index("lost, document 2", start)]
    assert "The capital of Italy is" in item and "Rome ✓ right" in item
    assert minus("chosen -2.50") in item and minus("chosen -3.12") in item
    start = text.index("last_word, with_image: 9 lost")
    said = f"log-likelihood {minus('-1.50')} nats; bridge: score 0, log-likelihood {minus('-6.75')}"
    assert said in text[start:]
    words = text[text.index("facts_in_words, with_image: replies") :]
    assert "The capital of Italy is Rome. bridge (score 0) yes" in words
    assert "57 more are in items.jsonl." in words


@pytest.mark.parametrize("name", ["sample", "bare"])
def test_provenance_is_complete(name):
    report = _samples()[name][0]
    text = "".join(Reader(_page(name)).text).split("Provenance")[1]
    wanted = {**report["provenance"], "sides": report["sides"], "schema": report["schema"]}
    flat = dict(leaves(wanted))
    assert flat["cache.reused_batches"] == "12" and flat["suite.versions.facts"] == "2"
    for field, value in flat.items():
        assert f"{field}{value}" in text.replace("\n", "")
    for mode, body in report["modes"].items():
        if body["picture"]:
            assert f"modes.{mode}.picture{json.dumps(body['picture'])}" in text


def test_same_report_same_bytes():
    report, items = _samples()["none"]
    again = json.loads(json.dumps(report))
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "svg.hashsalt": None}):
        assert render_page(again, iter(items)) == _page("none")


# --------------------------------------------------------------------------------------- figures


def _texts(figure) -> list[str]:
    figure.draw_without_rendering()
    kind = matplotlib.text.Text
    return [text.get_text() for text in figure.findobj(kind) if text.get_text()]


def test_forest_draws_every_task_and_marks_the_exact():
    figure = forest(_samples()["sample"][0])
    texts = _texts(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(MODES)
    for axes in figure.axes:
        assert {label.get_text() for label in axes.get_yticklabels()} == {*TASKS, "all"}
    assert texts.count("exact") == len(TASKS) + 2  # text mode with its pooled row, and the legend
    assert minus("margin (-2)") in texts and minus("[-32.7, -7.3]") in texts
    with pytest.raises(ValueError, match="no task"):
        forest({**_samples()["bare"][0], "tasks": []})


def test_kl_figure_keeps_its_heights():
    report = _samples()["none"][0]
    steps = kl_by_position(report).axes[0].patches[0].get_data()
    assert steps.values.tolist() == [part["mean"] for part in report["kl"]["by_position"]]
    assert steps.edges[-1] == 512
    assert any("0 at every position" in t for t in _texts(kl_by_position(_samples()["sample"][0])))
    with pytest.raises(ValueError, match="no KL by position"):
        kl_by_position(_samples()["bare"][0])


def test_front_names_every_scale_and_no_name_covers_another():
    figure = front(_samples()["sample"][0]["dial"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["text", "with_image"]
    figure.draw_without_rendering()
    for axes, count in zip(figure.axes, (4, 6), strict=True):  # three scales share a place in text
        named = ", ".join(text.get_text() for text in axes.texts).split(", ")
        assert sorted(map(float, named)) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == count
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "largest retained scale (0.5)" in _texts(figure)


def test_svg_takes_the_colours_and_the_width_of_the_page():
    text = svg(kl_by_position(_samples()["none"][0]))
    assert text.startswith('<svg role="img" aria-label="KL')
    assert "currentColor" in text and "#1f2329" not in text
    assert "width=" not in text.split(">")[0] and "<!--" not in text and "<metadata" not in text
    assert set(re.findall(r'\bid="(\w+)-', text)) == {"kl"}
