"""The table of a grid, its files and figures, by hand."""

import copy
import csv
import io
import math

import pytest

from mmpeft.compare import figures, table

from .compare_sample import pooled, result


def test_seeds_are_pooled_with_students_t():
    labels = {"method": "lora"}
    report = pooled(
        [result(labels, 0, 0.5, -0.02, peak_memory_bytes=3 * 10**9, seconds=60.0),
         result(labels, 1, 0.6, -0.04), result(labels, 2, 0.7, 0.0)],
        {"method": ["lora"]},
    )  # fmt: skip
    (row,) = report["rows"]
    score, text = row["metrics"]["accuracy"], row["retention"]["text"]
    half = 4.302652730 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5%
    assert score["mean"] == pytest.approx(0.6) and score["interval"] == "seeds"
    assert score["ci95"] == pytest.approx([0.6 - half, 0.6 + half])
    assert text["ci95"] == pytest.approx([-0.02 - half / 5, -0.02 + half / 5])
    assert row["seeds"] == [0, 1, 2] and row["trained_parameters"] == 120
    assert row["peak_memory_bytes"] == 3 * 10**9 and row["train_seconds"] == 5
    assert "60.0 [35.2, 84.8]" in table.render(report) and "Student's t" in table.render(report)


def test_one_seed_has_the_interval_of_its_rows_and_says_so():
    report = pooled([result({"m": "a"}, 0, 0.5, 0.0, exact=True)], {"m": ["a"]})
    score = report["rows"][0]["metrics"]["accuracy"]
    assert (score["ci95"], score["interval"]) == ([0.4, 0.6], "rows")
    text = table.render(report)
    assert "50.0 [40.0, 60.0]*" in text and "says nothing about seeds" in text
    assert "0 (exact)" in text


def test_percent_is_said_of_tables_with_an_accuracy():
    cell = result({"m": "a"}, 0, 0.5)
    assert "50 test rows; accuracy in percent" in table.notes(pooled([cell], {"m": ["a"]}))[0]
    cell["score"]["metrics"] = {"bleu": cell["score"]["metrics"]["accuracy"]}
    assert table.notes(pooled([cell], {"m": ["a"]}))[0] == "t, 50 test rows"


def test_the_front_is_what_nothing_beats_on_both_axes():
    points = [(0.9, -0.10), (0.8, -0.02), (0.7, -0.02), (0.6, 0.0), (0.6, 0.0), (0.85, -0.2)]
    assert table.front(points) == [True, True, False, True, True, False]
    results = [result({"m": str(i)}, 0, *point) for i, point in enumerate(points)]
    results += [result({"m": "6"}, 0, 0.99)]  # no retention: on no front
    rows = pooled(results, {"m": [str(i) for i in range(7)]})["rows"]
    assert [row["on_front"].get("text") for row in rows] == [*table.front(points), None]


def test_a_score_that_is_no_number_is_not_on_the_front():
    found = [("a", math.nan, -0.01), ("b", 0.8, -0.02)]
    report = pooled([result({"m": m}, 0, value, kept) for m, value, kept in found],
                    {"m": ["a", "b"]})  # fmt: skip
    assert [row["on_front"] for row in report["rows"]] == [{}, {"text": True}]


@pytest.mark.parametrize("axis", ["accuracy", "retention_text"])
def test_an_axis_has_no_name_of_a_measure(axis):
    with pytest.raises(ValueError, match=f"axis {axis} has the name of what is measured; rename"):
        pooled([result({axis: "a"}, 0, 0.5, -0.1)], {axis: ["a"]})


def under_columns(report):
    """The table as one mapping of column to cell a row."""
    names = table.columns(report)
    return [dict(zip(names, table.cells(report, row), strict=True)) for row in report["rows"]]


def test_rows_that_lack_something_stay_under_their_columns():
    full = result({"m": "b"}, 0, 0.6, -0.02)
    for other, value in (("meteor", 0.3), ("bleu", 0.2)):
        full["score"]["metrics"][other] = {"value": value, "ci95": [0, 1], "controls": {}}
    half = copy.deepcopy(full)
    del half["score"]["metrics"]["meteor"]
    half |= {"seed": 1, "retention": {"text": full["retention"]["text"]}}
    report = pooled([result({"m": "a"}, 0, 0.5), full, half], {"m": ["a", "b"]}, "accuracy")
    assert report["metrics"] == ["accuracy", "meteor", "bleu"]
    first, second = under_columns(report)
    assert (first["meteor"], first["bleu"], first["retention text"]) == ("-", "-", "-")
    assert first["front"] == "" and second["front"] == "text"
    assert second["meteor"] == "0.300 [0.000, 1.000]* (1 of 2 seeds)"
    assert second["bleu"] == "0.200 [0.200, 0.200]"
    meteor = report["rows"][1]["metrics"]["meteor"]
    assert meteor["seeds"] == [0] and meteor["values"] == [0.3]
    for write in (table.render, table.as_markdown, table.as_csv):
        assert write(report)
    headline = pooled([result({"m": "a"}, 0, 0.5), full], {"m": ["a", "b"]}, "meteor")
    assert [row["on_front"] for row in headline["rows"]] == [{}, {"text": True}]
    assert under_columns(headline)[0]["meteor less first row"] == "-"


def test_a_row_is_compared_with_the_first_seed_by_seed():
    values = {"a": (0.5, 0.6, 0.7), "b": (0.52, 0.63, 0.74), "c": (0.4,)}
    results = [result({"m": m}, seed, value)
               for m, own in values.items() for seed, value in enumerate(own)]  # fmt: skip
    report = pooled(results, {"m": list(values)})
    first, second, third = (row["metrics"]["accuracy"]["difference"] for row in report["rows"])
    half = 4.302652730 * 0.01 / math.sqrt(3)
    assert first is None and second["mean"] == pytest.approx(0.03)
    assert second["ci95"] == pytest.approx([0.03 - half, 0.03 + half])
    assert second["values"] == pytest.approx([0.02, 0.03, 0.04]) and second["seeds"] == [0, 1, 2]
    assert third["mean"] == pytest.approx(-0.1) and third["ci95"] is None
    column = [row["accuracy less first row"] for row in under_columns(report)]
    assert column == ["-", "+3.0 [+0.5, +5.5]", "-10.0"]
    text = table.render(report)
    assert "the difference to a, paired by seed" in text and "rows of a data.fraction" in text
    lines = [line.split(",") for line in table.as_csv(report).splitlines()]
    written = dict(zip(lines[0], lines[2], strict=True))
    assert float(written["accuracy_less_first_low"]) == second["ci95"][0]


def test_a_metric_that_the_task_lacks_is_named():
    with pytest.raises(ValueError, match="evaluate.metric 'bleu': the task has accuracy"):
        pooled([result({"m": "a"}, 0, 0.5)], {"m": ["a"]}, "bleu")


def test_numbers_of_the_files_are_those_of_the_report():
    results = [result({"rank": rank}, seed, 0.1 * int(rank) + 0.01 * seed, -0.01 * int(rank))
               for rank in ("2", "4") for seed in (0, 1)]  # fmt: skip
    report = pooled(results, {"rank": ["2", "4"]})
    lines = table.as_csv(report).splitlines()
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert float(first["accuracy"]) == report["rows"][0]["metrics"]["accuracy"]["mean"]
    assert float(first["retention_text_low"]) == report["rows"][0]["retention"]["text"]["ci95"][0]
    assert (first["rank"], first["seeds"], first["front_text"]) == ("2", "2", "True")
    assert len(lines) == 3 and table.as_markdown(report).count("\n| ") == 3
    cells = list(csv.DictReader(io.StringIO(table.cells_as_csv(results))))
    assert [(one["rank"], one["seed"]) for one in cells] == [
        ("2", "0"), ("2", "1"), ("4", "0"), ("4", "1"),
    ]  # fmt: skip
    assert [float(one["accuracy"]) for one in cells[:2]] == (
        report["rows"][0]["metrics"]["accuracy"]["values"]
    )
    assert float(cells[3]["retention_text"]) == results[3]["retention"]["text"]["delta"]


def test_figures_are_drawn_where_they_have_something_to_show(tmp_path):
    results = [result({"rank": rank, "share": share}, 0, 0.1 * int(rank), -0.01 * int(rank))
               for rank in ("2", "4") for share in ("5%", "100%")]  # fmt: skip
    report = pooled(results, {"rank": ["2", "4"], "share": ["5%", "100%"]})
    figures.draw_front(report, tmp_path / "front.png")
    figures.draw_ranks(report, tmp_path / "rank.png")
    assert {path.name for path in tmp_path.iterdir()} == {"front.png", "rank.png"}
    # no row has a point in a mode: its panel is left out
    for row in report["rows"]:
        row["retention"]["after_image"] = None
    figures.draw_front(report | {"modes": ["text", "after_image"]}, tmp_path / "front.png")
    plain = pooled([result({"m": "a"}, 0, 0.5)], {"m": ["a"]})
    figures.draw_front(plain, tmp_path / "none.png")
    figures.draw_ranks(plain, tmp_path / "none.png")
    figures.draw_ranks(pooled([], {"rank": ["2", "4"]}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_points_have_the_numbers_of_their_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    results = [result({"m": "a"}, 0, 0.5), result({"m": "b"}, 0, 0.6, -0.02)]
    figures.draw_front(pooled(results, {"m": ["a", "b"]}), tmp_path / "front.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert "2" in texts and "2  b" in texts and "1" not in texts
