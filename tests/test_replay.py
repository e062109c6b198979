"""Replay: chats an LLM writes itself, counted, reproducible, and good to train on."""

import copy
import json
import shutil
import string
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from mmpeft import cli, replay
from mmpeft.data import ConversationDataset
from mmpeft.replay import load_writer, sample, user_turn, write_replay
from mmpeft.tasks.messages import Messages

LIMITS = {"samples": 12, "max_new_tokens": 64, "dtype": "float32"}


@pytest.fixture(scope="module")
def tokenizer(llm_dir):
    return AutoTokenizer.from_pretrained(llm_dir, padding_side="left")


def test_the_template_shows_where_a_user_speaks(tokenizer):
    opening, closing = user_turn(tokenizer, "tiny")
    assert opening == "<|im_start|>user\n"
    assert closing == "<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template, kept = "{{ bos_token }}Hi", tokenizer.chat_template
    with pytest.raises(ValueError, match="tiny leaves out what the user says"):
        user_turn(tokenizer, "tiny")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tiny has no chat template"):
        user_turn(tokenizer, "tiny")
    tokenizer.chat_template = kept


class Says:
    """A model that continues every prompt with the same text."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, text):
        self.ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        self.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id])

    def generate(self, input_ids, **kwargs):
        return torch.cat([input_ids, self.ids.expand(len(input_ids), -1)], dim=1)


@pytest.mark.parametrize(
    ("text", "closing", "expected"),
    [
        (" why?<|im_end|><|endoftext|><|endoftext|>", "", ("why?", None)),
        ("two\nlines<|im_end|>\n", "", ("two\nlines", None)),
        ("no end in sig", "", ("no end in sig", "unfinished")),
        (" \n<|im_end|>", "", ("", "empty")),
        ("a<|im_start|>b<|im_end|>", "", ("a<|im_start|>b", "malformed")),
        ("why? [/INST] so", " [/INST]", ("why?", None)),  # an end without a token of its own
        ("why? [/IN", " [/INST]", ("why? [/IN", "unfinished")),
    ],
)
def test_what_was_sampled_is_judged(tokenizer, text, closing, expected):
    found = sample(Says(tokenizer, text), tokenizer, ["prompt", "longer prompt"], closing)
    assert found == [expected] * 2


def test_an_answer_stands_where_it_will_be_learned(tokenizer):
    from mmpeft.chat_template import load_template

    own = copy.deepcopy(tokenizer)
    own.chat_template = load_template("qwen3")
    asked = replay._render(own, "why?", **replay.UNTHINKING)
    assert asked.endswith("assistant\n<think>\n\n</think>\n\n")
    assert replay._is_read_as_written(own, "why?", asked, "Because.")
    # a thought that was begun would be learned behind an empty one, a whole one be refused
    begun = replay._render(own, "why?")
    assert not replay._is_read_as_written(own, "why?", begun, "<think>\nOkay, the user")
    assert not replay._is_read_as_written(own, "why?", begun, "<think>\nOkay</think>Because.")


@pytest.mark.parametrize(
    "name", ["llama2", "mistral", "mistral_v0_2", "vicuna", "plain", "mplug_owl", "chatml", "gemma"]
)
def test_a_space_before_what_is_said_is_the_templates(tokenizer, name):
    from mmpeft.chat_template import load_template

    own = copy.deepcopy(tokenizer)
    own.chat_template = load_template(name)
    asked = replay._render(own, "why?", **replay.UNTHINKING)
    assert replay._is_read_as_written(own, "why?", asked, "Because.")
    assert not replay._is_read_as_written(own, "why?", asked + "Well, ", "Because.")


def test_what_would_be_learned_elsewhere_is_thrown_away(llm_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "_is_read_as_written", lambda _, question, *__: len(question) % 2)
    report = write_replay(llm_dir, tmp_path / "replay.jsonl", **LIMITS)
    assert report["dropped"]["malformed answer"] > 0
    rows = map(json.loads, (tmp_path / "replay.jsonl").read_text().splitlines())
    assert all(len(row["messages"][0]["content"]) % 2 for row in rows)


def test_rows_are_written_counted_and_learned_from(llm_dir, tiny, tmp_path):
    path = tmp_path / "new" / "replay.jsonl"
    counts = write_replay(llm_dir, path, **LIMITS)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert len(rows) == counts["kept"] == 12
    assert len({question["content"] for question, _ in rows}) == 12
    assert counts["unfinished"] == sum("unfinished" in answer for _, answer in rows) > 0
    assert counts["dropped"]["unfinished question"] > 0
    assert [p.name for p in path.parent.iterdir()] == ["replay.jsonl"]
    learned = ConversationDataset(Messages(train=str(path)), "train", tiny[1])
    assert len(learned) == 12 and not any("pixel_values" in row for row in learned)


def test_the_seed_decides(llm_dir, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_replay(llm_dir, tmp_path / name, seed=seed, **LIMITS)
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c


def test_what_is_drawn_is_the_llms_own_distribution(llm_dir, tmp_path):
    """Nothing is cut from it, and a longer neighbour in the batch does not change it."""
    published = tmp_path / "llm"
    shutil.copytree(llm_dir, published)
    cuts = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, eos_token_id=[0])
    cuts.save_pretrained(published)
    model, tokenizer = load_writer(str(published), "float32", 1, 1.0)
    assert model.generation_config.eos_token_id == [0, tokenizer.eos_token_id]
    torch.manual_seed(0)
    found = sample(model, tokenizer, ["short"] * 3000 + ["a longer prompt"])
    drawn = Counter(text for text, _ in found[:3000])
    with torch.no_grad():
        ids = tokenizer("short", return_tensors="pt", add_special_tokens=False)["input_ids"]
        expected = model(ids.to(model.device)).logits[0, -1].softmax(-1)
    for letter in string.ascii_letters:
        probability = expected[tokenizer.convert_tokens_to_ids(letter)].item()
        assert abs(drawn[letter] / 3000 - probability) < 0.015


def test_an_llm_that_never_ends_a_turn_is_given_up_on(llm_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "sample", lambda m, t, prompts, *_, **__: [
        ("endless", "unfinished") for _ in prompts])  # fmt: skip
    with pytest.raises(ValueError, match="0 kept, thrown away: 208 unfinished questions"):
        write_replay(llm_dir, tmp_path / "replay.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_batch_far_larger_than_needed_is_no_failure(llm_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "sample", lambda m, t, prompts, *_: [
        (f"text {n}", None) for n in range(len(prompts))])  # fmt: skip
    counts = write_replay(llm_dir, tmp_path / "replay.jsonl", samples=1, batch_size=300)
    assert counts == {"kept": 1, "unfinished": 0, "dropped": {"surplus chat": 299}}


def test_mistakes(llm_dir, tmp_path, capsys):
    path = tmp_path / "replay.jsonl"
    path.write_text("mine")
    assert cli.main(["replay", llm_dir, "--output", str(path)]) == 2
    assert f"{path} exists; choose another --output" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert cli.main(["replay", "nobody/nothing", "--output", str(tmp_path / "other")]) == 2
    assert "language_model 'nobody/nothing' cannot be loaded" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be above 0"):
        write_replay(llm_dir, tmp_path / "other", samples=0)


def test_the_command_tells_what_it_threw_away(llm_dir, tmp_path, capsys):
    path = tmp_path / "replay.jsonl"
    arguments = ["--samples", "4", "--max_new_tokens", "64", "--batch_size", "32"]
    assert cli.main(["replay", llm_dir, "--output", str(path), *arguments]) == 0
    out = capsys.readouterr().out
    assert "4 chats" in out and "unfinished questions" in out and "surplus chat" in out
