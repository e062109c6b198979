"""Scoring: the right replies to the right rows, and controls that control."""

import json
import shutil
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import t
from statsmodels.api import OLS
from statsmodels.stats.proportion import proportion_confint

import mmpeft
from mmpeft import evaluate as e
from mmpeft.checkpoint import is_run_folder
from mmpeft.task import Metric, Task, all_tasks, normalize
from mmpeft.tasks.coqa import CoQA
from mmpeft.tasks.gsm8k import GSM8K

from .conftest import assistant, user


@dataclass
class Planted(Task):
    """Test questions about pictures; a train split with known majorities."""

    name = "planted"
    max_new_tokens = 4
    pictures: list = None

    def rows(self, split):
        if split == "train":
            return [{"q": "colour?", "a": a, "image": None} for a in ("red", "red", "blue")]
        return [
            {"q": q, "a": a, "image": self.pictures[i % 3]}
            for i, (q, a) in enumerate([("colour?", "red"), ("colour?", "blue"), ("new?", "red")])
        ]

    def messages(self, row):
        parts = [row["image"]] if row["image"] is not None else []
        return [user(*parts, row["q"]), assistant(row["a"])]

    def question_type(self, row):
        return row["q"]


@pytest.fixture
def seen(monkeypatch):
    """Replace generation: answer "Red." with a picture, "blue" without; keep the prompts."""
    calls = {}

    def reply(model, processor, prompts, max_new_tokens, batch_size, name, sharing, where):
        calls[name] = prompts
        calls["sharing"] = sharing
        return ["Red." if e.pictures(*p) else "blue" for p in prompts]

    monkeypatch.setattr(e, "generate_replies", reply)
    monkeypatch.setattr(e, "try_sharing", lambda *_: "shared")
    return calls


def test_report(seen, images):
    report, items = e.evaluate(None, None, Planted(pictures=images))
    assert report["schema"] == "mmpeft.eval/1" and report["task"] == "planted"
    assert report["n"] == 3 and report["accuracy"] == pytest.approx(2 / 3)
    assert report["controls"] == pytest.approx(
        {"majority": 2 / 3, "image_withheld": 1 / 3, "image_shuffled": 2 / 3}
    )
    assert report["by_type"]["new?"]["n"] == 1
    assert report["by_type"]["colour?"]["controls"]["majority"] == 0.5
    assert [item["right"] for item in items] == [True, False, True]
    json.dumps(report)


def test_interval_is_wilsons(seen, images):
    report, _ = e.evaluate(None, None, Planted(pictures=images))
    # Wilson score interval for 2 of 3, by hand: centre (2/3 + z2/6) / (1 + z2/3)
    assert report["ci95"] == pytest.approx([0.2077, 0.9385], abs=1e-3)


def interval(rows, groups, share=False):
    rows = np.asarray(rows, float)
    return e._interval(rows, Metric(rows, share=share), np.asarray(groups), 0)


def test_the_kind_of_interval_is_that_of_the_metric_not_of_its_values():
    assert interval([0.0] * 5, range(5)) == [0, 0]  # as that of any other constant
    assert interval([0.0] * 5, range(5), share=True) == pytest.approx([0, 0.434482], abs=1e-5)


def test_what_is_right_or_wrong_has_the_interval_of_a_share():
    row = {"q": "?", "a": "4", "image": None, "answer": "#### 4", "turns": [("?", ["4"])]}
    shares = [task.metrics(["4"], [row]) for task in (Planted(pictures=[]), GSM8K(), CoQA())]
    found = {name: one.share for metrics in shares for name, one in metrics.items()}
    assert found == {"accuracy": True, "strict": True, "em": True, "f1": False}


def test_rows_of_a_group_are_drawn_together():
    values = np.random.default_rng(0).random(40)
    alone = interval(values, range(40))
    apart = interval(np.repeat(values, 10), range(400))
    together = interval(np.repeat(values, 10), np.repeat(np.arange(40)[::-1] * 2, 10))
    width = [high - low for low, high in (alone, apart, together)]
    assert width[2] == pytest.approx(width[0], rel=0.15)  # ten times the same says no more
    assert width[1] == pytest.approx(width[0] / np.sqrt(10), rel=0.15)


def test_rows_that_are_alike_in_groups_count_for_fewer():
    random = np.random.default_rng(0)
    groups = random.permutation(np.repeat(np.arange(60), 5))
    rows = (random.random(300) < random.random(60)[groups]).astype(float)  # alike in a group
    model = OLS(rows, np.ones(300))
    plain, robust = (
        model.fit(**kind).bse[0] ** 2
        for kind in ({}, {"cov_type": "cluster", "cov_kwds": {"groups": groups}})
    )
    few = t.ppf(0.975, 299) / t.ppf(0.975, 59)
    assert robust > 1.5 * plain
    assert e.effective_rows(rows, groups) == pytest.approx(300 * plain / robust * few**2)
    low, high = interval(rows, groups, share=True)
    by_rows = interval(rows, range(300), share=True)
    assert by_rows == pytest.approx(proportion_confint(rows.sum(), 300, method="wilson"))
    assert low < by_rows[0] < by_rows[1] < high


def test_no_group_makes_rows_count_for_more():
    opposed = np.tile([1.0, 0.0], 50)
    assert e.effective_rows(opposed, np.repeat(np.arange(50), 2)) == 100
    assert e.effective_rows(np.ones(100), np.repeat(np.arange(50), 2)) == 50
    assert e.effective_rows(opposed, np.zeros(100, int)) == 1


def test_withheld_has_no_image_and_shuffled_has_anothers(seen, images):
    e.evaluate(None, None, Planted(pictures=images))
    assert all(not e.pictures(*p) for p in seen["image withheld"])
    own = [e.pictures(*p)[0] for p in seen["bridge"]]
    other = [e.pictures(*p)[0] for p in seen["image shuffled"]]
    assert all(a is not b for a, b in zip(own, other, strict=True))
    assert {id(i) for i in own} == {id(i) for i in other}


@dataclass
class Mixed(Task):
    """A clip, an image and words alone; the answer is written in parts."""

    name = "mixed"
    pictures: list = None

    def rows(self, split):
        return [*self.pictures, None]

    def messages(self, row):
        seen = [] if row is None else [row]
        content = [*seen, {"type": "text", "text": "What?"}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "Red"}]}
        return [{"role": "user", "content": content}, answer]


def test_clips_are_withheld_and_shuffled_too_and_text_rows_take_no_part(seen, images):
    clip = {"type": "video", "video": images}
    image = {"type": "image", "image": images[0]}
    report, items = e.evaluate(None, None, Mixed(pictures=[clip, image]))
    assert [e.pictures(*p) for p in seen["bridge"]] == [[clip], [image], []]
    assert [e.pictures(*p) for p in seen["image withheld"]] == [[], [], []]
    assert [e.pictures(*p) for p in seen["image shuffled"]] == [[image], [clip], []]
    assert report["accuracy"] == pytest.approx(2 / 3)
    assert report["controls"]["majority"] == 1
    assert items[0]["reference"] == "Red"


def test_samples_are_drawn_by_seed(seen, images):
    _, items = e.evaluate(None, None, Planted(pictures=images), samples=2, seed=1)
    _, again = e.evaluate(None, None, Planted(pictures=images), samples=2, seed=1)
    assert [i["row"] for i in items] == [i["row"] for i in again] and len(items) == 2


def test_replies_come_back_in_order_whatever_the_batching(tiny, images):
    model, processor = tiny
    prompts = [[user(images[i % 3], "q" * (1 + 7 * i % 5))] for i in range(5)]
    one = e.generate_replies(model, processor, prompts, 5, 1, None)
    assert e.generate_replies(model, processor, prompts, 5, 3, None) == one
    assert len(set(one)) > 1


@pytest.mark.parametrize("size", [1, 2])
def test_prompts_are_encoded_a_few_batches_at_a_time(tiny, images, monkeypatch, size):
    model, processor = tiny
    prompts = [[user(images[i % 3], "q" * (1 + i))] for i in range(12)]
    alone = e.generate_replies(model, processor, prompts, 5, 1, None, False)
    make, made, most, met = e.Prompt.of, [], [], []

    def encode(*given):
        prompt = make(*given)
        made.append(weakref.ref(prompt))
        most.append(sum(one() is not None for one in made))
        if not met or met[-1] != prompt.pictures[0][0]:
            met.append(prompt.pictures[0][0])
        return prompt

    monkeypatch.setattr(e, "ENCODED", 3)
    monkeypatch.setattr(e.Prompt, "of", encode)
    assert e.generate_replies(model, processor, prompts, 5, size, None) == alone
    assert len(made) == 12 and max(most) == 3 * size
    assert len(met) == 3  # rows of a picture follow each other


@pytest.mark.parametrize("sharing", [True, False])
def test_a_reply_ends_where_training_teaches_it_to(llm_dir, make_bridge, tmp_path, sharing):
    """Base LLMs with a chat template end a text otherwise than the template ends a turn."""
    llm = shutil.copytree(llm_dir, tmp_path / "llm")
    for name, key, end in (
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
        ("config.json", "eos_token_id", 0), ("generation_config.json", "eos_token_id", 0),
    ):  # fmt: skip
        written = json.loads((llm / name).read_text()) | {key: end}
        (llm / name).write_text(json.dumps(written))
    model, processor = make_bridge("none", language_model=str(llm))
    row, _ = processor.encode_chat([user("hi"), assistant("yes")])
    taught = [token for token in row["labels"] if token != -100]
    assert model.generation_config.eos_token_id == [0, 2] and 2 in taught
    assert model.language_model.generation_config.eos_token_id == 0
    said = iter([*taught[: taught.index(2) + 1], *processor.tokenizer("x" * 20).input_ids])

    def speak(module, args, logits):
        return torch.zeros_like(logits).index_fill_(-1, torch.tensor([next(said)]), 9.0)

    model.get_output_embeddings().register_forward_hook(speak)
    replies = e.generate_replies(model, processor, [[user("hi")]], 8, 1, None, sharing)
    assert replies == ["yes"]
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert mmpeft.load(tmp_path / "saved")[0].generation_config.eos_token_id == [0, 2]


def test_sharing_can_be_switched_off(seen, images):
    e.evaluate(None, None, Planted(pictures=images))
    assert seen["sharing"] == "shared"
    e.evaluate(None, None, Planted(pictures=images), share_prefix=False)
    assert seen["sharing"] is False


@pytest.mark.parametrize("sharing", [True, False])
def test_a_prompt_that_does_not_fit_is_named(tiny, images, sharing):
    class Long(Planted):
        def messages(self, row):
            words = row["q"] * (100 if row["a"] == "blue" and row["image"] is not None else 1)
            return [user(words), assistant(row["a"])]

    with pytest.raises(ValueError, match=r"^planted row 1: 7\d\d tokens .* context of 512"):
        e.evaluate(*tiny, Long(pictures=images), share_prefix=sharing)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_picture_that_cannot_be_read_is_named(tiny, images, tmp_path, sharing):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG and no more")

    class Broken(Planted):
        def messages(self, row):
            question, answer = super().messages(row)
            if row["q"] == "new?":
                question["content"][0]["image"] = str(broken)
            return [question, answer]

    task = Broken(pictures=images)
    with pytest.raises(ValueError, match=r"^planted row 2: image 1: .*broken.png is not an image"):
        e.evaluate(*tiny, task, share_prefix=sharing)


def test_a_missing_train_split_is_found_before_any_reply(seen, jsonl):
    from mmpeft.tasks.messages import Messages

    question = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    task = Messages(test=str(jsonl([{"messages": [question, assistant("a")]}])))
    with pytest.raises(ValueError, match="has no train file"):
        e.evaluate(None, None, task)
    assert not seen


def test_normalize():
    assert normalize("  A  Red-Circle. ") == "a redcircle"


@pytest.mark.starter
def test_easy_vqa_rows(starter_path):
    task = all_tasks()["easy_vqa"](path=starter_path("easy-vqa"))
    rows = task.rows("test")
    assert len(rows) == 9673 and len(task.rows("train")) == 38575
    kinds = [task.question_type(row) for row in rows]
    assert kinds.count("yes/no") == 7136 and set(kinds) == {"yes/no", "shape", "colour"}
    assert task.score(["Yes.", "no"], [{**rows[0], "answer": "yes"}] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("counts", [(6, 3), (2, 1), (1, 1), (4,), (3, 1, 1)])
def test_no_row_is_shown_its_own_picture_where_there_is_another(images, counts):
    shown = [picture for picture, n in zip(images, counts, strict=False) for _ in range(n)]
    prompts = [[user(picture, "what?")] for picture in shown]
    own, found = (
        [e.pictures(*prompt)[0] for prompt in each]
        for each in (prompts, e._shuffle_pictures(prompts, 0))
    )
    kept = [one == before for one, before in zip(found, own, strict=True)]
    assert not any(kept) if len(counts) > 1 else all(kept)


def test_only_a_run_here_holds_its_reports(tiny, tmp_path):
    model, processor = tiny
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run/checkpoint")
    assert is_run_folder(tmp_path / "run") and not is_run_folder(tmp_path / "run/checkpoint")
    assert not is_run_folder("someone/bridge")
