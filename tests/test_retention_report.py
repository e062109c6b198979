"""Whole reports, on pairs of every kind."""

import json
import math
import shutil
import socket
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpeft.retention import RetentionError, compare, open_sides, render, retain, write
from mmpeft.retention.dial import turn
from mmpeft.retention.modes import Exchange
from mmpeft.retention.plan import Question
from mmpeft.retention.report import exchanges_of, retain_pair, retain_run
from mmpeft.retention.score import Opening, score
from mmpeft.retention.sides import AdapterSides, BridgeSides, CheckpointSides, Sides
from mmpeft.retention.suite import Item, Suite, pair
from mmpeft.tasks.messages import Messages
from tests.conftest import assistant, user

TASKS = """
group: small
task:
  - task: pick
    custom_dataset: !function rows.picks
    test_split: test
    num_fewshot: 0
    output_type: multiple_choice
    doc_to_text: "{{context}}"
    doc_to_choice: choices
    doc_to_target: answer
    metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
    metadata: {version: 3}
  - task: tell
    custom_dataset: !function rows.tells
    test_split: test
    num_fewshot: 0
    output_type: generate_until
    doc_to_text: "{{context}}"
    doc_to_target: "{{answer}}"
    generation_kwargs: {until: ["\\n\\n"], do_sample: false, max_gen_toks: 4}
    metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    metadata: {version: 1, chat: true}
  - task: prose
    custom_dataset: !function rows.prose
    test_split: test
    output_type: loglikelihood_rolling
    doc_to_text: ""
    doc_to_target: "{{text}}"
    metric_list: [{metric: word_perplexity, higher_is_better: false}]
    metadata: {version: 1}
"""
ROWS = """
from datasets import Dataset

PICKS = [("The sky is", " blue", " wool"), ("Snow is", " white", " loud"), ("2 + 2 =", " 4", " 9"),
         ("Rome is in", " Italy", " Chile")]

def picks(**_):
    return {"test": Dataset.from_list(
        [{"context": c, "choices": list(o), "answer": 0} for c, *o in PICKS])}

def tells(**_):
    return {"test": Dataset.from_list(
        [{"context": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)])}

def prose(**_):
    return {"test": Dataset.from_list([{"text": "Once upon a time there was a cat."}])}
"""
DOCUMENTS = {"pick": 4, "tell": 3, "prose": 1}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "small.yaml").write_text(TASKS)
    (folder / "rows.py").write_text(ROWS)
    return folder


@pytest.fixture
def report_of(images, folder):
    """`retain` on a bridge or any sides, with the small suite."""
    chats = [[user(image, "What is it?"), assistant("A hat.")] for image in images[1:]]

    def run(model, processor=None, **options):
        if not isinstance(model, Sides):
            options = {"image_prompts": chats} | options
        defaults = {"suite": "small", "suite_folder": folder, "irrelevant_image": images[0]}
        return retain(model, processor, **{**defaults, "prose_tokens": 60, **options})

    return run


def fill_adapter(model, value: float) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, value)


def no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("retain reached for the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


def check_written(report, items, folder):
    """A report is plain JSON without NaN, and its files say the same."""
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    paths = write(report, items, folder)
    assert sorted(path.name for path in paths) == [
        "items.jsonl", "report.html", "report.json", "report.txt",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.txt").read_text() == render(report)
    lines = (folder / "items.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == items


# ----------------------------------------------------------------------------------------- bridges


def test_a_gated_bridge_on_the_embedded_suite(tiny, images, tmp_path, monkeypatch, capsys):
    no_network(monkeypatch)
    monkeypatch.chdir(tmp_path)  # the suite must be found from anywhere
    model, processor = tiny
    model.train()
    random_state = torch.get_rng_state()
    chats = [[user(image, "What is it?"), assistant("A hat.")] for image in images[1:]]
    report, items = retain(
        model, processor, image_prompts=chats, irrelevant_image=images[0], samples=3,
        modes=["text"], prose_tokens=100,
    )  # fmt: skip
    assert capsys.readouterr().out == ""
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    names = ["grammar", "commonsense", "facts", "reading", "facts_in_words", "instructions"]
    assert [task["name"] for task in report["tasks"]] == names
    assert {task["n"] for task in report["tasks"]} == {3} and len(items) == 18
    check_written(report, items, tmp_path / "run" / "retain")


def test_a_bridge_without_an_adapter_is_its_base_until_it_sees(make_bridge, report_of, tmp_path):
    adapted, processor = make_bridge(gate="none")
    bare, _ = make_bridge(gate="none", adapter=None)
    bare.connector.load_state_dict(adapted.connector.state_dict())
    report, items = report_of(bare, processor)
    check_written(report, items, tmp_path / "out")
    deltas = report["max_abs_dlogit"]
    assert deltas["text"] == 0 < deltas["image"] and deltas["irrelevant_image"] is None
    assert report["kl"]["max"] == 0 and report["modes"]["text"]["certified"]
    assert all(row["exact"] is (row["mode"] == "text") for row in report["tasks"])
    # behind a picture it does what the other bridge does with its adapter off
    seen = {(row["mode"], row["name"]): row["bridge"] for row in report["tasks"]}
    assert all(row["image_control"] is None for row in report["tasks"])
    tasks = report_of(adapted, processor)[0]["tasks"]
    controls = [row for row in tasks if row["image_control"]]
    assert controls and all(
        row["image_control"]["score"] == seen[row["mode"], row["name"]] for row in controls
    )


def test_a_gated_bridge_is_exact_on_text_and_an_estimate_behind_pictures(tiny, report_of, tmp_path):
    report, items = report_of(*tiny)
    check_written(report, items, tmp_path / "out")
    assert report["schema"] == "mmpeft.retain/2" and report["gate"] == "sample"
    assert report["sides"]["kind"] == "bridge"
    deltas = report["max_abs_dlogit"]
    assert deltas["text"] == 0 < min(deltas["irrelevant_image"], deltas["image"])
    assert report["kl"]["max"] == 0 and report["top1_agreement"] == 1
    assert list(report["modes"]) == ["text", "with_image", "after_image"]
    assert report["verdict"] == report["modes"]["text"]["verdict"]
    assert report["overall"] == report["modes"]["text"]["overall"]
    assert report["dial"] is None and report["skipped"] == []

    certified = {name: mode["certified"] for name, mode in report["modes"].items()}
    assert certified["text"]["batches"] == certified["text"]["of"] > 0
    assert certified["with_image"] is certified["after_image"] is None
    pictures = [mode["picture"] for mode in report["modes"].values()]
    assert pictures[0] is None and len(pictures[1]) == 1 and len(pictures[2]) == 2

    assert [(row["mode"], row["name"]) for row in report["tasks"]] == [
        (mode, task) for mode in report["modes"] for task in ("pick", "tell")
    ]
    assert {row["kind"] for row in report["tasks"]} == {"choice", "generation"}
    for row in report["tasks"]:
        assert row["exact"] is (row["mode"] == "text")
        assert row["n"] == DOCUMENTS[row["name"]]
        seen = row["mode"] != "text" and row["name"] == "pick"  # only likelihoods are controlled
        assert (row["image_control"] is not None) is seen
        if row["exact"]:
            assert row["delta"] == 0 and row["ci95"] == [0, 0]
            assert row["flips"] == {"gained": 0, "lost": 0}
    (rolling,) = report["perplexities"]  # running text is measured in mode text only
    assert rolling["mode"] == "text" and rolling["kind"] == "perplexity" and rolling["delta"] == 0

    assert len(items) == 3 * sum(DOCUMENTS.values()) - 2 * DOCUMENTS["prose"]
    for item in items:
        assert set(item) == {
            "mode", "task", "doc_id", "prompt", "choices", "gold", "base", "bridge",
        }  # fmt: skip
        assert "\ue000" not in item["prompt"]
        if item["mode"] == "text":
            assert item["base"] == item["bridge"]
    picked = [item for item in items if item["task"] == "pick"]
    for item in picked:
        values = item["base"]["loglikelihoods"]
        assert item["gold"] == 0 and len(item["choices"]) == len(values) == 2
        assert item["base"]["chosen"] == values.index(max(values))
        assert item["base"]["score"] == (item["base"]["chosen"] == 0)
    assert any(i["base"] != i["bridge"] for i in picked if i["mode"] == "with_image")
    told = [item for item in items if item["task"] == "tell"]
    assert all(item["base"]["reply"] is not None for item in told)
    by_mode = {mode: [i["base"]["reply"] for i in told if i["mode"] == mode] for mode in certified}
    assert by_mode["text"] == by_mode["with_image"]  # the same words, no eyes

    cache = report["provenance"]["cache"]
    assert cache["computed_batches"] > 0 and cache["recovered_lines"] == 0
    assert report["provenance"]["suite"]["versions"] == {"pick": 3, "tell": 1, "prose": 1}
    assert report["provenance"]["engine"]["packed_rows"]


def test_an_open_bridge_is_an_estimate_in_all_modes(make_bridge, report_of):
    report, _ = report_of(*make_bridge(gate="none"))
    assert report["max_abs_dlogit"]["text"] > 0 < report["kl"]["p95"] <= report["kl"]["max"]
    assert not any(row["exact"] for row in report["tasks"])
    assert not any(mode["certified"] for mode in report["modes"].values())
    assert all(row["ci95"][0] < row["delta"] < row["ci95"][1] for row in report["tasks"])


def test_base_answers_do_not_depend_on_the_modes_asked(make_bridge, report_of):
    bridge = make_bridge(gate="none")
    _, items = report_of(*bridge, modes=["text"])
    _, more = report_of(*bridge, modes=["after_image", "text"])
    assert [item for item in more if item["mode"] == "text"] == items


def test_modes_can_be_restricted_and_keep_their_order(tiny, report_of):
    report, items = report_of(*tiny, modes=["after_image", "with_image"])
    assert list(report["modes"]) == ["with_image", "after_image"]
    assert report["verdict"] == report["modes"]["with_image"]["verdict"]
    assert {item["mode"] for item in items} == {"with_image", "after_image"}


def test_a_cache_is_used_again(make_bridge, report_of, tmp_path):
    bridge, cache = make_bridge(gate="none"), tmp_path / "cache"
    first, items = report_of(*bridge, cache=cache)
    again, same = report_of(*bridge, cache=cache)
    assert same == items
    before, after = (r["provenance"]["cache"] for r in (first, again))
    assert after["computed_batches"] == 0
    assert after["reused_batches"] == before["computed_batches"] + before["reused_batches"]
    for report in (first, again):
        del report["provenance"]
    assert first == again
    assert len(list(cache.iterdir())) == 3  # base, bridge, control


def test_one_cache_serves_the_base_of_many_bridges(make_bridge, report_of, tmp_path):
    report_of(*make_bridge(gate="none"), cache=tmp_path / "cache", modes=["text"])
    other = make_bridge(gate="none")
    fill_adapter(other[0], 0.3)
    report, _ = report_of(*other, cache=tmp_path / "cache", modes=["text"])
    cache = report["provenance"]["cache"]
    assert cache["reused_batches"] == cache["computed_batches"] > 0


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("gate", ["sample", "none"])
def test_an_inactive_adapter_is_refused(make_bridge, report_of, gate):
    model, processor = make_bridge(gate=gate)
    fill_adapter(model, 0.0)
    with pytest.raises(RetentionError, match="the adapter is inactive"):
        report_of(model, processor)


def test_nan_is_refused(tiny, report_of):
    model, processor = tiny
    fill_adapter(model, math.nan)
    with pytest.raises(RetentionError, match="bridge on prompts with a photograph are NaN"):
        report_of(model, processor)


def test_missing_image_prompts_are_refused(tiny, report_of):
    with pytest.raises(ValueError, match="image_prompts is empty"):
        report_of(*tiny, image_prompts=[])


def test_sides_that_share_one_file_are_refused(make_bridge, report_of, tmp_path):
    """The base's answers copied over the file of the bridge."""
    bridge, cache = make_bridge(gate="none"), tmp_path / "cache"
    report_of(*bridge, cache=cache, modes=["text"])
    paths = [compare.Store(cache, BridgeSides(*bridge).setting(s)).path for s in ("base", "bridge")]
    shutil.copy(*paths)
    with pytest.raises(RetentionError, match=r"(?s)the two sides would share answers.*Remove"):
        report_of(*bridge, cache=cache, modes=["text"])


def test_sides_that_share_answers_unnoticed_are_refused(make_bridge, report_of, monkeypatch):
    """Whatever mixed them up: logits moved on text, so equal answers are no finding."""
    one = compare.Store(None, {})
    monkeypatch.setattr(compare, "Store", lambda *_: one)
    with pytest.raises(RetentionError, match="one side's answers were used for both"):
        report_of(*make_bridge(gate="none"), modes=["text"])


@pytest.mark.parametrize(
    ("gate", "message"),
    [("none", r"pick: document .* changed"), ("sample", "did not ask the base")],
)
def test_a_task_edited_between_the_passes_is_refused(
    make_bridge, report_of, folder, monkeypatch, gate, message
):
    ask, asked = Suite.ask, []

    def edit_after_the_base(self, lm, **options):
        asked.append(lm.side)
        if asked.count("bridge") == 1:
            rows = folder / "rows.py"
            rows.write_text(rows.read_text().replace('"context": c', '"context": "Think. " + c'))
            forget(folder)
        return ask(self, lm, **options)

    monkeypatch.setattr(Suite, "ask", edit_after_the_base)
    with pytest.raises(RetentionError, match=message):
        report_of(*make_bridge(gate=gate), modes=["text"])


def forget(folder):
    """lm-eval keeps the Python file of a task in memory."""
    import sys

    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "embeded"}, r"unknown suite or task 'embeded'.*embedded"),
        ({"suite": []}, "no task is named"),
        ({"samples": 0}, "samples=0"),
        ({"suite_folder": "/nowhere/at/all"}, "/nowhere/at/all is no folder"),
        ({"modes": ["text", "whith_image"]}, r"mode 'whith_image' is unknown; choose among text"),
    ],
)
def test_bad_options_are_refused_at_once(tiny, report_of, monkeypatch, options, message):
    monkeypatch.setattr("mmpeft.retention.report.prove", None)  # nothing is computed before
    with pytest.raises(ValueError, match=message):
        report_of(*tiny, **options)


def test_a_task_without_documents_is_refused(tiny, report_of, folder):
    rows = folder / "rows.py"
    rows.write_text(rows.read_text() + "\nPICKS = []\n")
    with pytest.raises(ValueError, match=r"small cannot be loaded \(IndexError.*its documents"):
        report_of(*tiny)


def test_a_task_that_needs_the_hub_says_so_when_offline(tiny, report_of, folder, monkeypatch):
    no_network(monkeypatch)
    (folder / "far.yaml").write_text(
        "task: far\ndataset_path: some-org/some-name\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
    )
    with pytest.raises(ValueError, match=r"far cannot be read.*standard_local.*--include_path"):
        report_of(*tiny, suite="far")


def test_a_task_with_a_bug_is_not_blamed_on_the_hub(tiny, report_of, folder):
    rows = folder / "rows.py"
    rows.write_text(rows.read_text().replace('"context": c', '"context": c.missing'))
    with pytest.raises(ValueError, match=r"cannot be loaded \(AttributeError.*missing") as caught:
        report_of(*tiny)
    assert "hub" not in str(caught.value)


ITEM = Item(task="t", doc_id=0, sha256="a", prompt="p", score=1.0)


@pytest.mark.parametrize(
    ("bridge", "message"),
    [
        ({"t": [replace(ITEM, sha256="b")]}, "document 0 or its prompt changed"),
        ({"t": [replace(ITEM, doc_id=1)]}, "different documents"),
        ({"t": [ITEM, ITEM]}, "different documents"),
        ({"other": [ITEM]}, "tasks differ"),
    ],
)
def test_sides_that_answered_different_questions_are_refused(bridge, message):
    assert pair({"t": [ITEM]}, {"t": [replace(ITEM, score=0.0)]})["t"][0][0] is ITEM
    with pytest.raises(RetentionError, match=message):
        pair({"t": [ITEM]}, bridge)
    with pytest.raises(RetentionError, match="different documents"):
        pair({"t": [ITEM, ITEM]}, {"t": [ITEM, ITEM]})


def test_a_suite_takes_a_seeded_choice_of_items():
    one, same, other = (Suite("embedded", samples=20, seed=seed).indices for seed in (0, 0, 1))
    assert one == same != other
    assert all(len(chosen) == 20 and chosen != list(range(20)) for chosen in one.values())


# ----------------------------------------------------------------------------------- other pairs


def saved_adapter(llm_dir, folder, fill=0.5, **options):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llm_dir), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=fill)
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def test_a_peft_adapter_against_its_llm(llm_dir, report_of, tmp_path, monkeypatch, capsys):
    no_network(monkeypatch)
    adapter = saved_adapter(llm_dir, tmp_path / "adapter")
    sides = open_sides(llm_dir, adapter, dtype="float32")
    assert isinstance(sides, AdapterSides) and not sides.sees
    report, items = report_of(sides)
    check_written(report, items, tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert list(report["modes"]) == ["text"] and report["gate"] is None
    assert report["sides"]["base"]["name"] == llm_dir
    assert report["sides"]["bridge"]["name"] == adapter
    assert report["max_abs_dlogit"]["text"] > 0
    assert report["max_abs_dlogit"]["image"] is report["max_abs_dlogit"]["irrelevant_image"] is None
    assert all(row["image_control"] is None for row in report["tasks"])
    # the base is the LLM itself
    plain = CheckpointSides(llm_dir, llm_dir, dtype="float32")
    questions = [Question((5, 6, 7), (8, 9)), Question((9,), (10,))]
    assert score(sides, "base", questions) == score(plain, "base", questions)
    assert score(sides, "bridge", questions) != score(plain, "base", questions)
    for mode in ("with_image", "after_image"):
        with pytest.raises(ValueError, match="needs a tuned model that sees"):
            report_of(sides, modes=[mode])


def test_the_base_of_an_adapter_is_known_by_its_weights(llm_dir, tmp_path):
    one = open_sides(llm_dir, saved_adapter(llm_dir, tmp_path / "one"))
    other = open_sides(llm_dir, saved_adapter(llm_dir, tmp_path / "other", fill=0.4))
    assert one.identity("base")["sha256"] == other.identity("base")["sha256"]
    assert one.identity("bridge")["sha256"] != other.identity("bridge")["sha256"]


def test_an_adapter_that_does_nothing_is_refused(llm_dir, report_of, tmp_path):
    adapter = saved_adapter(llm_dir, tmp_path / "adapter", fill=0.0)
    with pytest.raises(RetentionError, match="the adapter is inactive: on text prompts"):
        report_of(open_sides(llm_dir, adapter))


def test_an_adapter_that_is_not_the_base_when_off_is_refused(llm_dir, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = saved_adapter(llm_dir, tmp_path / "adapter", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="merge it .* and compare the two checkpoints"):
        open_sides(llm_dir, adapter, dtype="float32")
    llm = AutoModelForCausalLM.from_pretrained(llm_dir, dtype=torch.float32)
    merged = PeftModel.from_pretrained(llm, adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "merged")
    sides = open_sides(llm_dir, str(tmp_path / "merged"), dtype="float32")
    questions = [Question((5, 6, 7), (8, 9)), Question((9,), (10,))]
    plain = CheckpointSides(llm_dir, llm_dir, dtype="float32")
    assert score(sides, "base", questions) == score(plain, "base", questions)
    assert score(sides, "bridge", questions) != score(plain, "base", questions)


def test_tasks_in_chat_form_are_skipped_without_a_template(llm_dir, report_of, tmp_path):
    sides = open_sides(llm_dir, saved_adapter(llm_dir, tmp_path / "adapter"))
    sides.tokenizer.chat_template = None
    report, _ = report_of(sides)
    reason = "the tokenizer has no chat template"
    assert report["skipped"] == [{"task": "tell", "reason": reason}]
    assert [row["name"] for row in report["tasks"]] == ["pick"]


@pytest.fixture
def tuned_dir(llm_dir, tmp_path):
    """The tiny LLM after some training."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(llm_dir, tmp_path / "tuned")
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def one_at_a_time(monkeypatch):
    """No two checkpoints are in memory together; returns the names loaded, in order."""
    from transformers import PreTrainedModel

    load, alive, order = PreTrainedModel.from_pretrained.__func__, [], []

    def counted(cls, name, *args, **kwargs):
        assert not any(ref() for ref in alive), f"{name}: another model is in memory"
        model = load(cls, name, *args, **kwargs)
        alive.append(weakref.ref(model))
        order.append(Path(name).name)
        return model

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    return order


def test_two_checkpoints_take_turns_in_memory(
    llm_dir, tuned_dir, folder, tmp_path, one_at_a_time, monkeypatch
):
    no_network(monkeypatch)
    output = tmp_path / "out"
    report = retain_pair(
        llm_dir, tuned_dir, suite="small", suite_folder=folder, prose_tokens=60, output=output,
        dtype="float32", cache=tmp_path / "cache",
    )  # fmt: skip
    assert (output / "items.jsonl").is_file() and (output / "report.html").is_file()
    assert report["sides"]["kind"] == "checkpoints" and list(report["modes"]) == ["text"]
    assert report["max_abs_dlogit"]["text"] > 0
    assert len({*one_at_a_time}) == 2
    assert len(one_at_a_time) <= 8  # identity, proof, prose, suite: both once each at most


def test_checkpoints_give_the_log_likelihoods_of_their_models(llm_dir, tuned_dir):
    from transformers import AutoModelForCausalLM

    sides = CheckpointSides(llm_dir, tuned_dir, dtype="float32")
    question = Question((5, 6, 7), (8, 9))
    for side, name in (("base", llm_dir), ("bridge", tuned_dir)):
        model = AutoModelForCausalLM.from_pretrained(name)
        with torch.inference_mode():
            logs = model(input_ids=torch.tensor([question.tokens])).logits[0, 2:].log_softmax(-1)
        expected = logs[0, 8] + logs[1, 9]
        assert score(sides, side, [question])[question][0] == pytest.approx(
            expected.item(), abs=1e-4
        )


def test_identical_weights_are_refused(llm_dir, report_of, tmp_path):
    copy = str(shutil.copytree(llm_dir, tmp_path / "copy"))
    with pytest.raises(RetentionError, match="hold the same weights"):
        report_of(CheckpointSides(llm_dir, copy))


def test_checkpoints_with_different_vocabularies_are_refused(llm_dir, tuned_dir):
    path = Path(tuned_dir) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"do not share a vocabulary \(token 'a' is"):
        open_sides(llm_dir, tuned_dir)


def test_a_pair_that_cannot_be_loaded_is_named(llm_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no-such-org/no-such-model'.*cannot be had"):
        open_sides(llm_dir, "no-such-org/no-such-model")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty"):
        open_sides(llm_dir, str(empty))


@pytest.fixture(scope="module")
def llava_dir(llm_dir, tmp_path_factory):
    """A random LLaVA around a vocabulary with one more token."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=16,
        vision_feature_select_strategy="default", chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(5)
    text = LlamaConfig.from_pretrained(llm_dir)
    text.vocab_size = len(tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=16,
    )  # fmt: skip
    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, vision_feature_layer=-1,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_a_vlm_checkpoint_against_its_llm(
    llm_dir, llava_dir, report_of, tmp_path, one_at_a_time, capsys
):
    sides = open_sides(llm_dir, llava_dir, dtype="float32")
    assert isinstance(sides, CheckpointSides) and sides.sees
    report, items = report_of(sides)
    check_written(report, items, tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert list(report["modes"]) == ["text", "with_image", "after_image"]
    deltas = report["max_abs_dlogit"]
    assert deltas["text"] > 0 < deltas["image"] and deltas["irrelevant_image"] is None
    assert all(row["image_control"] is None for row in report["tasks"])
    picked = [item for item in items if item["task"] == "pick"]
    bridge = {mode: [i["bridge"]["loglikelihoods"] for i in picked if i["mode"] == mode]
              for mode in report["modes"]}  # fmt: skip
    assert bridge["text"] != bridge["with_image"] != bridge["after_image"]
    assert len(one_at_a_time) <= 8


def test_a_vlm_reads_a_question_behind_a_picture_as_in_one_piece(llm_dir, llava_dir, images):
    from transformers import AutoProcessor

    sides = CheckpointSides(llm_dir, llava_dir, dtype="float32")
    opening = Opening("<|im_start|>user\n", images[0], "0")
    encode = sides.tokenizer.encode
    questions = [Question(tuple(encode(f"Is {i} <image> even?")), (8, 9)) for i in range(3)]
    found = score(sides, "bridge", questions, opening)
    processor = AutoProcessor.from_pretrained(llava_dir)
    inputs = processor(images=images[0], text="<|im_start|>user\n<image>", return_tensors="pt")
    for question in questions:
        tail = torch.tensor([question.tokens])
        with sides.on("bridge") as model:
            logits = model(
                input_ids=torch.cat([inputs["input_ids"], tail], 1),
                pixel_values=inputs["pixel_values"],
            ).logits[0, -2:]
        logs = logits.log_softmax(-1)
        expected = (logs[0, 8] + logs[1, 9]).item()
        assert found[question][0] == pytest.approx(expected, abs=1e-4)


# ----------------------------------------------------------------------------------- run and dial


@pytest.fixture
def vision(images, jsonl, tmp_path):
    """A vision task of three questions."""
    rows = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        parts = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": f"number {i}"}]
        rows.append({"messages": [{"role": "user", "content": parts}, assistant("yes")]})
    path = str(jsonl(rows))
    task = Messages(train=path, test=path)
    task.max_new_tokens = 4
    return task


def dial(bridge, task, scales, folder, images, modes=("text", "with_image"), **options):
    pictures = [Exchange(images[0], "What?", "This.")]
    exchanges = {mode: exchanges_of(mode, pictures, []) for mode in modes}
    return turn(*bridge, task, scales, Suite("small", folder), exchanges, **options)


def scalings(model):
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.language_model.modules() if isinstance(m, LoraLayer)]
    return [dict(layer.scaling) for layer in layers]


def test_the_dial_from_base_to_bridge(make_bridge, report_of, vision, folder, images, tmp_path):
    bridge = make_bridge(gate="none")
    before, cache = scalings(bridge[0]), tmp_path / "cache"
    report, _ = report_of(*bridge, modes=["text", "with_image"], cache=cache)
    found = dial(bridge, vision, [1, 0, 0.5, 1], folder, images, cache=cache)
    assert scalings(bridge[0]) == before
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["vision_task"] == "messages"
    assert [point["scale"] for point in found["points"]] == [0, 0.5, 1]
    for point in found["points"]:
        assert point["vision"]["n"] == 3 and set(point["modes"]) == {"text", "with_image"}
    nothing = found["points"][0]["modes"]["text"]  # no adapter: the base itself
    assert nothing is None or (nothing["delta"], nothing["base"]) == (0, nothing["bridge"])
    # the whole adapter: what the report measured, but for the tasks that generate
    rows = {row["mode"]: row for row in report["tasks"] if row["name"] == "pick"}
    for mode, body in found["points"][2]["modes"].items():
        if body is not None:
            assert body["delta"] == pytest.approx(rows[mode]["delta"])
            assert body["n"] == rows[mode]["n"]


def test_scale_0_is_the_base_to_the_bit(make_bridge, folder, images):
    from peft.helpers import rescale_adapter_scale

    bridge = make_bridge(gate="none")
    exchanges = {"text": []}
    with rescale_adapter_scale(bridge[0].language_model, 0.0):
        found = compare.compare_sides(BridgeSides(*bridge), Suite("small", folder), exchanges)
    assert all(item["base"] == item["bridge"] for item in found.items)
    assert all(row["delta"] == 0 and not any(row["flips"].values()) for row in found.tasks)


def test_scalings_are_put_back_after_an_error(make_bridge, vision, folder, images, monkeypatch):
    bridge = make_bridge(gate="none")
    before = scalings(bridge[0])

    def fail(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr("mmpeft.retention.dial.compare_sides", fail)
    with pytest.raises(RuntimeError, match="killed"):
        dial(bridge, vision, [0.5], folder, images)
    assert scalings(bridge[0]) == before


@pytest.mark.parametrize("scales", [[], [-0.5, 1], [math.nan], [math.inf]])
def test_scales_that_are_none_are_refused(make_bridge, vision, folder, images, scales):
    with pytest.raises(ValueError, match="give scales of 0 or more"):
        dial(make_bridge(gate="none"), vision, scales, folder, images)


def test_a_dial_without_an_adapter_is_refused(make_bridge, vision, folder, images):
    with pytest.raises(ValueError, match="the dial scales an adapter, and there is none"):
        dial(make_bridge("none", adapter=None), vision, [1.0], folder, images)


def test_a_run_keeps_its_report(make_bridge, vision, folder, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmpeft.retention.report.embedded_text", lambda: "Some prose. " * 9)
    model, processor = make_bridge(gate="sample")
    run = tmp_path / "run"
    model.save_pretrained(run / "checkpoint")
    processor.save_pretrained(run / "checkpoint")
    images[0].save(tmp_path / "photograph.png")
    report = retain_run(
        run, vision, image=tmp_path / "photograph.png", suite="small", suite_folder=folder,
        scales=[0, 1], modes=["text"], cache=tmp_path / "cache",
    )  # fmt: skip
    assert capsys.readouterr().out == ""
    assert json.loads((run / "retain" / "report.json").read_text()) == report
    assert len(report["dial"]["points"]) == 2
    bare = retain_run(
        run / "checkpoint", vision, image=tmp_path / "photograph.png", suite="small",
        suite_folder=folder, modes=["text"], cache=tmp_path / "cache",
    )  # fmt: skip
    assert bare["tasks"] == report["tasks"] and bare["dial"] is None
    assert not (run / "checkpoint" / "retain").exists()


def test_a_task_can_be_named_out_of_the_suite_that_defines_it():
    suite = Suite(["facts", "reading"], samples=3)
    assert sorted(suite.kinds) == ["facts", "reading"]
    with pytest.raises(ValueError, match="Did you mean 'reading'"):
        Suite("readng")


@pytest.mark.parametrize("margin", [0, -0.03, 1])
def test_a_margin_that_means_nothing_is_refused_before_anything_runs(tiny, images, margin):
    rows = [[user(images[0], "What?"), assistant("A hat.")]]
    with pytest.raises(ValueError, match="give a loss above 0"):
        retain(*tiny, image_prompts=rows, irrelevant_image=images[1], margin=margin, modes=["nope"])
