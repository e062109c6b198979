"""Answers on disk: a killed report goes on, damage is recovered, no two sides share a file."""

import json
import shutil

import pytest
import torch
from peft.helpers import rescale_adapter_scale

from mmpeft.retention import engine, score
from mmpeft.retention.engine import SideLM
from mmpeft.retention.modes import Mode
from mmpeft.retention.sides import BridgeSides, RetentionError
from mmpeft.retention.store import Store
from tests.test_retention_engine import requests

IDENTITY = {"side": "base", "name": "llm", "sha256": "a", "dtype": "torch.float32", "threads": 1}
ANSWERS = {"one": [[-1.5, True], [-2.25, False]], "two": [[-0.1, False]],
           "three": [["a reply", [1, 2], True]]}  # fmt: skip


def filled(folder):
    store = Store(folder, IDENTITY)
    for batch, answers in ANSWERS.items():
        store.put(batch, answers)
    assert (store.computed, store.reused, store.damaged) == (3, 0, 0)
    return store.path


def kept(folder):
    """What a store opened anew holds."""
    store = Store(folder, IDENTITY)
    return {batch: found for batch in ANSWERS if (found := store.get(batch)) is not None}, store


def test_answers_are_found_again(tmp_path):
    path = filled(tmp_path / "cache")
    found, store = kept(tmp_path / "cache")
    assert found == ANSWERS and store.get("four") is None
    assert (store.computed, store.reused, store.damaged) == (0, 3, 0)
    assert [path] == list((tmp_path / "cache").iterdir())


def test_a_store_without_a_folder_keeps_answers_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(None, IDENTITY)
    store.put("one", ANSWERS["one"])
    assert store.get("one") == ANSWERS["one"] and store.get("two") is None
    assert (store.computed, store.reused) == (1, 1)
    assert Store(None, IDENTITY).get("one") is None
    assert not list(tmp_path.iterdir())


def damage(path, how):
    lines = path.read_bytes().splitlines(keepends=True)  # identity, one, two, three
    changed = {
        "torn last line": [*lines[:3], lines[3][:-7]],
        "torn newline": [*lines[:3], lines[3][:-1]],
        "corrupt middle line": [*lines[:2], lines[2].replace(b"0.1", b"0.2"), lines[3]],
        "garbage in the middle": [*lines[:2], b"\x00\xff garbage\n", *lines[2:]],
        "garbage header": [b"\x00\x01\x02\n", *lines[1:]],
        "header gone": lines[1:],
        "torn header": [lines[0][:10]],
        "header without newline": [lines[0][:-1]],
        "empty file": [],
    }
    path.write_bytes(b"".join(changed[how]))


@pytest.mark.parametrize(
    ("how", "left", "damaged"),
    [
        ("torn last line", ["one", "two"], 1),
        ("torn newline", ["one", "two", "three"], 0),
        ("corrupt middle line", ["one", "three"], 1),
        ("garbage in the middle", ["one", "two", "three"], 1),
        ("garbage header", [], 4),
        ("header gone", [], 3),
        ("torn header", [], 1),
        ("header without newline", [], 0),
        ("empty file", [], 1),
    ],
)
def test_damage_is_dropped_counted_and_computed_again(tmp_path, capsys, how, left, damaged):
    path = filled(tmp_path)
    damage(path, how)
    found, store = kept(tmp_path)
    assert found == {batch: ANSWERS[batch] for batch in left}
    assert store.damaged == damaged
    out, err = capsys.readouterr()
    assert out == "" and (f"{damaged} damaged lines dropped" in err) is (damaged > 0)
    for batch in ANSWERS.keys() - set(left):
        store.put(batch, ANSWERS[batch])
    found, store = kept(tmp_path)  # the file is whole again
    assert found == ANSWERS and store.damaged == 0
    assert [path] == list(tmp_path.iterdir())


def test_a_file_copied_over_that_of_another_side_is_refused(tmp_path):
    path = filled(tmp_path)
    other = Store(tmp_path, {**IDENTITY, "side": "bridge", "sha256": "b"}).path
    assert other != path
    shutil.copy(path, other)
    with pytest.raises(RetentionError, match=r"sha256: 'a', not 'b', side: 'base', not"):
        Store(tmp_path, {**IDENTITY, "side": "bridge", "sha256": "b"})
    with pytest.raises(RetentionError, match="Remove the file"):
        Store(tmp_path, {**IDENTITY, "side": "bridge", "sha256": "b"})


@pytest.mark.parametrize("key", ["side", "sha256", "dtype", "threads"])
def test_another_setting_has_another_file(tmp_path, key):
    path = filled(tmp_path)
    other = Store(tmp_path, {**IDENTITY, key: "other"})
    assert other.path != path and not other.answers


def test_another_engine_has_another_file(tmp_path, monkeypatch):
    path = filled(tmp_path)
    monkeypatch.setattr("mmpeft.retention.store.ENGINE", 1000)
    assert Store(tmp_path, IDENTITY).path != path


def test_nan_is_never_kept(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path, IDENTITY).put("one", [[float("nan"), False]])


# ------------------------------------------------------------------------- settings of real models


def paths(sides, folder):
    return [Store(folder, sides.setting(side)).path for side in ("base", "bridge", "control")]


def test_what_answers_depend_on_is_in_the_name_of_the_file(make_bridge, tmp_path):
    model, processor = make_bridge(gate="sample")
    sides = BridgeSides(model, processor)
    first = paths(sides, tmp_path)
    assert len(set(first)) == 3
    assert paths(BridgeSides(*make_bridge(gate="sample")), tmp_path) == first
    gated = paths(BridgeSides(*make_bridge(gate="none")), tmp_path)
    assert gated[0] == first[0] and gated[1] != first[1]  # a base is asked once for all bridges
    half = paths(BridgeSides(*make_bridge(gate="sample", dtype="bfloat16")), tmp_path)
    assert not set(half) & set(first)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] += 1
    tuned = paths(sides, tmp_path)
    assert tuned[0] == first[0] and tuned[1] != first[1] and tuned[2] != first[2]
    with rescale_adapter_scale(model.language_model, 0.5):
        assert paths(sides, tmp_path)[1] != tuned[1]
    assert paths(sides, tmp_path) == tuned


def test_threads_count(tiny, tmp_path):
    sides, threads = BridgeSides(*tiny), torch.get_num_threads()
    first = paths(sides, tmp_path)
    try:
        torch.set_num_threads(threads + 1)
        assert not set(paths(sides, tmp_path)) & set(first)
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------ resume


class Killed(BaseException):
    pass


def killed_after(monkeypatch, module, name, count):
    """`module.name` works `count` times, then the process is killed. Returns the calls made."""
    real, calls = getattr(module, name), []

    def sometimes(*args, **kwargs):
        if len(calls) == count:
            raise Killed
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, sometimes)
    return calls


# 300 tokens of each are its own: one in a row, six rows in a batch
LONG = [(f"{i} " + chr(97 + i) * 300, " end") for i in range(16)]


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_killed_pass_goes_on_where_it_was(tiny, tmp_path, monkeypatch, finished):
    sides = BridgeSides(*tiny)

    def lm(cache):
        return SideLM(sides, "base", Mode("text", [], None), Store(cache, sides.setting("base")))

    whole = lm(tmp_path / "whole")
    expected = whole.loglikelihood(requests(*LONG))
    assert whole.store.computed == 3
    with monkeypatch.context() as patch:
        killed_after(patch, score, "run", finished)
        with pytest.raises(Killed):
            lm(tmp_path / "cut").loglikelihood(requests(*LONG))
    with monkeypatch.context() as patch:
        calls = killed_after(patch, score, "run", 100)
        again = lm(tmp_path / "cut")
        assert again.loglikelihood(requests(*LONG)) == expected
        assert len(calls) == again.store.computed == 3 - finished
        assert again.store.reused == finished
    assert lm(tmp_path / "cut").store.answers == whole.store.answers


def test_replies_go_on_too(tiny, tmp_path, monkeypatch):
    sides = BridgeSides(*tiny)
    asked = requests(*[(f"Say {i}", {"until": [], "max_gen_toks": 2}) for i in range(40)])

    def lm():
        return SideLM(sides, "base", Mode("text", [], None), Store(tmp_path, sides.setting("base")))

    with monkeypatch.context() as patch:
        killed_after(patch, engine, "write", 1)
        with pytest.raises(Killed):
            lm().generate_until(asked)
    again = lm()
    replies = again.generate_until(asked)
    assert (again.store.reused, again.store.computed) == (1, 1)
    third = lm()
    assert third.generate_until(asked) == replies and third.store.computed == 0
    # the same object whether computed or read: text, ids, finished
    assert third.replies == again.replies and len(replies) == 40


def test_a_batch_is_known_by_all_that_it_feeds_the_model(tiny, tmp_path):
    """The picture and the words before it included."""
    question = score.Question((5, 6), (7,))
    (batch,) = score.plan([question])
    (other,) = score.plan([score.Question((5, 6), (8,))])
    openings = [None, *(score.Opening(before, None, sha) for before in ("", "x") for sha in "ab")]
    keys = {score.batch_key(one, opening) for one in (batch, other) for opening in openings}
    assert len(keys) == 10
    assert json.dumps(sorted(keys))
