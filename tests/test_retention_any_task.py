"""Tasks of any kind: which are asked, which number counts, which items belong together."""

import math
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from mmpeft.retention.compare import Comparison, _clusters, _row
from mmpeft.retention.engine import SideLM
from mmpeft.retention.modes import Exchange, Mode
from mmpeft.retention.sides import BridgeSides, hash_config
from mmpeft.retention.suite import Item, Suite, _score

from .test_retention_report import ROWS, TASKS


@pytest.fixture
def folder(tmp_path):
    """A suite of one's own."""
    for name, text in (("small.yaml", TASKS), ("rows.py", ROWS)):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_tasks_of_several_suites_are_all_asked(folder):
    # one named out of a suite made all others vanish
    (folder / "alone.yaml").write_text(TASKS.replace("group: small", "group: other"))
    assert sorted(Suite(["facts", "other"], folder, samples=2).kinds) == [
        "facts", "pick", "prose", "tell",
    ]  # fmt: skip
    assert sorted(Suite(["pick", "facts"], folder, samples=2).kinds) == ["facts", "pick"]
    whole = Suite(["embedded", "facts", "pick"], folder, samples=2)
    assert len(whole.kinds) == 7 and "reading" in whole.kinds


METRICS = {"doc_id": 4, "acc": 1.0, "wer": 0.2, "bleu": 31.0, "mcc": (1, 0)}


@pytest.mark.parametrize(
    ("metrics", "metadata", "expected"),
    [
        (["wer", "acc"], {}, "acc"), (["mcc", "bleu"], {}, "bleu"),
        (["wer"], {}, "'wer' counts errors"), (["acc", "wer"], {"metric": "wer"}, "counts errors"),
        (["mcc"], {}, "no metric for a single document"),
        (["acc"], {"metric": "mcc"}, r"names metric 'mcc'; it has \['acc'\]"),
    ],
)  # fmt: skip
def test_the_metric_that_counts(metrics, metadata, expected):
    suite = Suite.__new__(Suite)
    suite.metadata, suite.kinds, suite.errors = (
        {"t": metadata},
        {"t": "generate_until"},
        {"t": {"wer"}},
    )
    row = METRICS | {"metrics": metrics}
    if expected in METRICS:
        assert suite._metric("t", row) == expected
        return
    with pytest.raises(ValueError, match=f"task t.*{expected}"):
        suite._metric("t", row)


def test_a_score_beyond_right_and_wrong_is_named():
    with pytest.raises(ValueError, match="task t: .*'bleu' is 31.0 for document 4; .*Name"):
        _score("t", "bleu", METRICS)
    assert _score("t", "acc", METRICS) == 1
    assert _score("t", "ppl", {"ppl": (-8 * math.log(2), 4)}) == pytest.approx(2)


def test_mutual_information_adds_no_choices(tiny, folder):
    wanted = TASKS.replace(
        "metric_list: [{metric: acc,", "metric_list: [{metric: acc_mutual_info}, {metric: acc,"
    )
    (folder / "small.yaml").write_text(wanted)
    sides = BridgeSides(*tiny)
    found = Suite("pick", folder).ask(SideLM(sides, "base", Mode("text", [], sides.render)))
    assert [item.choices for item in found["pick"]][:2] == [["blue", "wool"], ["white", "loud"]]
    assert all(len(item.loglikelihoods) == 2 for item in found["pick"])


@pytest.mark.parametrize("name", ["with_image", "after_image"])
def test_items_of_a_sample_keep_their_exchange(tiny, images, folder, name):
    # requests count the documents that were drawn, what is logged counts all
    sides = BridgeSides(*tiny)
    exchanges = [Exchange(image, f"What is {n}?", f"Thing {n}.") for n, image in enumerate(images)]
    suite = Suite(["pick", "tell"], folder)
    suite.indices = {task: [0, 2] if task.endswith("pick") else [2] for task in suite.indices}
    found = suite.ask(SideLM(sides, "bridge", Mode(name, exchanges, sides.render)))
    assert [item.doc_id for item in found["pick"]] == [0, 2] and len(found["tell"]) == 1
    assert found["tell"][0].reply is not None
    if name == "after_image":
        assert ["Thing 0." in item.prompt for item in found["pick"]] == [True, False]
        assert "Thing 1." in found["pick"][1].prompt


def test_an_item_and_its_twin_are_one_cluster():
    suite = SimpleNamespace(metadata={
        "facts": {"cluster": "subject"}, "words": {"cluster": "subject", "same_items_as": "facts"},
        "plain": {}, "plain_words": {"same_items_as": "plain"},
    })  # fmt: skip

    def item(task, n, cluster, source=None):
        return Item(task, n, "", "", 1.0, cluster=cluster, source=source)

    tasks = {
        "facts": [item("facts", 0, "France"), item("facts", 5, "Kenya")],
        "words": [item("words", 2, "France", 0), item("words", 3, "Kenya", 99)],  # 99: not drawn
        "plain": [item("plain", 3, "3")],
        "plain_words": [item("plain_words", 0, "0", 3), item("plain_words", 3, "3", 0)],
    }
    pairs = {task: [(one, one) for one in items] for task, items in tasks.items()}
    found = {task: _clusters(suite, pairs, task) for task in tasks}
    assert found["words"] == found["facts"] == ["facts/France", "facts/Kenya"]
    assert found["plain_words"] == ["plain/3", "plain/0"] and found["plain"] == ["plain/3"]


def test_running_text_is_weighted_by_its_length():
    suite = SimpleNamespace(
        kinds={"t": "loglikelihood_rolling"}, metadata={"t": {}}, metrics={"t": "bits_per_byte"}
    )
    short, long = (Item("t", n, "", "", score, units=units)
                   for n, (score, units) in enumerate([(4.0, 10.0), (1.0, 1000.0)]))  # fmt: skip
    found = Comparison()
    _row(suite, "t", "text", [(short, short), (long, long)], 0.02, False, found)
    assert found.perplexities[0]["base"] == pytest.approx(1040 / 1010)


def test_answers_are_kept_apart_by_the_config(llm_dir):
    config = AutoConfig.from_pretrained(llm_dir)
    first = hash_config(config)
    config._name_or_path = "elsewhere"
    assert hash_config(config) == first
    config.rope_parameters = config.rope_parameters | {"rope_theta": 7.0}
    assert hash_config(config) != first
