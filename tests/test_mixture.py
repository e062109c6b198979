"""Several data sets as one: shares, order, and runs that go on where they were cut."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmpeft import config
from mmpeft.data import ConversationDataset
from mmpeft.mixture import Mixture, shared_out, with_replay
from mmpeft.sampling import PassSampler
from mmpeft.tasks.messages import Messages
from mmpeft.train import train

from .conftest import assistant, user
from .test_config import write_recipe
from .test_data import InMemory
from .test_train import losses


def text(processor, count, word="say"):
    chats = [[user(f"{word} {i}"), assistant("a")] for i in range(count)]
    task = InMemory(chats=chats, keys=[None] * count)
    return ConversationDataset(task, "train", processor)


def drawn(mixture, passes, seed=0):
    """Which row of which data set every sample of each pass is of."""
    sampler = PassSampler(mixture, seed)
    for turn in range(passes):
        sampler.set_epoch(turn)
        own = [mixture.place(index) for index in sampler]
        yield [(number, index % len(mixture.datasets[number])) for number, index in own]


def test_shares_are_those_of_the_weights():
    assert shared_out([100, 300], [3, 1]) == [300, 100]
    assert shared_out([100, 300], [None, None]) == [100, 300]
    assert shared_out([10, 10], [1e-6, 1]) == [1, 20]  # never none


@pytest.mark.parametrize("counts", [(3, 12), (7, 1), (5, 9), (20, 10)])
def test_rows_are_seen_equally_often_whatever_their_share(tiny, counts):
    mixture = Mixture([text(tiny[1], 5), text(tiny[1], 9)], counts, seed=3)
    seen = Counter()
    for turn, rows in enumerate(drawn(mixture, 4), 1):
        assert Counter(number for number, _ in rows) == dict(enumerate(counts))
        seen.update(rows)
        for number, dataset in enumerate(mixture.datasets):
            times = [seen[number, row] for row in range(len(dataset))]
            assert max(times) - min(times) <= 1, turn


def test_the_order_is_that_of_seed_and_pass_and_of_nothing_else(tiny):
    def order(seed, mixed=0):
        mixture = Mixture([text(tiny[1], 5), text(tiny[1], 9)], (6, 8), seed=mixed)
        return list(drawn(mixture, 2, seed))

    assert order(1) == order(1) != order(2) != order(1, mixed=5)
    first, second = order(1)
    assert first != second


def test_a_short_training_sees_a_source_from_all_over_its_file(tiny):
    mixture = Mixture([text(tiny[1], 400), text(tiny[1], 4)], (20, 20))
    (rows,) = drawn(mixture, 1)
    own = [row for number, row in rows if number == 0]
    assert max(own) > 200 and min(own) < 200


@pytest.mark.parametrize(("share", "replayed"), [(0.25, 2), (0.5, 6), (0.7, 14), (0.001, 1)])
def test_the_share_of_replay_is_kept(tiny, images, share, replayed):
    chats = [[user(images[0], f"q{i}"), assistant("a")] for i in range(6)]
    seen = ConversationDataset(InMemory(chats=chats, keys=[None] * 6), "train", tiny[1])
    mixed = with_replay(seen, text(tiny[1], 4), share)
    samples = list(mixed)
    assert ["pixel_values" in sample for sample in samples] == [True] * 6 + [False] * replayed
    line = f"in_memory: {replayed} of them ({replayed / (6 + replayed):.1%}), from 4 rows, each"
    assert line in str(mixed)
    both = with_replay(Mixture([seen, text(tiny[1], 3)], (6, 6)), text(tiny[1], 4), share)
    assert both.counts.tolist() == [6, 6, max(1, round(12 * share / (1 - share)))]


def test_sizes_follow_the_samples(tiny, images):
    short, long = text(tiny[1], 5), text(tiny[1], 9, "a much longer request, number")
    chats = [[user(images[0], f"q{i}"), assistant("a")] for i in range(3)]
    seeing = ConversationDataset(InMemory(chats=chats, keys=[None] * 3), "train", tiny[1])
    mixture = Mixture([short, long, seeing], (4, 7, 5), seed=1)
    for turn in range(3):
        sizes = mixture.sizes(turn)
        assert (sizes[:, 1] > 0).tolist() == [False] * 11 + [True] * 5
        for index in range(len(mixture)):
            exact = len(mixture[turn * len(mixture) + index]["input_ids"])
            assert sizes[index, 0] == pytest.approx(exact, rel=0.15)


MIXTURE = """
  mixture:
    - {{task: {{class_path: Messages, init_args: {{train: {a}}}}}, weight: 3}}
    - {{task: {{class_path: Messages, init_args: {{train: {b}}}}}, weight: 1}}
"""


def mixed_recipe(recipe, jsonl, rows=5):
    """The tiny recipe with text rows mixed in, in place of its task."""
    words = jsonl(
        [{"messages": [user(f"say {i}"), assistant("so " * i + ".")]} for i in range(rows)],
        "words.jsonl",
    )
    lines = recipe.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("  task:"))
    lines[at] = MIXTURE.format(a=recipe.parent / "data.jsonl", b=words).strip("\n")
    recipe.write_text("\n".join(lines).replace("gate: sample", "gate: none") + "\n")
    return recipe


def test_a_mixture_is_read_from_a_recipe(tmp_path, recipe, jsonl):
    parsed, resolved = config.load(mixed_recipe(recipe, jsonl))
    assert [source.weight for source in parsed.data.mixture] == [3, 1]
    assert parsed.data.task is parsed.data.mixture[0].task
    (tmp_path / "again").mkdir()
    (tmp_path / "again/config.yaml").write_text(resolved)
    assert config.load(tmp_path / "again/config.yaml")[1] == resolved
    assert config.task_of_run(tmp_path / "again") == parsed.data.task


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: 3", "weight: 0", "weight of task messages is 0.*must be above 0"),
        (", weight: 3", "", "give every source a weight, or none"),
        ("weight: 3", "wieght: 3", "Did you mean 'weight'"),
        ("  mixture:", "  task: {class_path: EasyVQA}\n  mixture:", "no source of data.mixture"),
        ("data:\n", "data:\n  max_bad_rows: 0\n", "max_bad_rows is 0; it must be 1 or more"),
    ],
)
def test_a_bad_mixture_is_refused_in_one_line(recipe, jsonl, old, new, message):
    path = mixed_recipe(recipe, jsonl)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        config.load(path)
    assert "\n" not in str(error.value)


def test_there_must_be_something_to_learn_from(tmp_path):
    path = write_recipe(tmp_path)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("  task:")]
    path.write_text("\n".join(lines).replace("data:", "data: {max_length: 64}"))
    with pytest.raises(ValueError, match="data.task is missing; name a task, or several"):
        config.load(path)


class CutAt(TrainerCallback):
    """Ends a run as if it had died."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and "instruct" in args.output_dir:
            raise RuntimeError("cut")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_cut_and_resumed_equals_the_uninterrupted_run(recipe, jsonl, capsys, workers):
    """Grouped by length, over several passes, accumulating, augmented, with bad rows."""
    path = mixed_recipe(recipe, jsonl)
    data = recipe.parent / "data.jsonl"
    data.write_text(data.read_text().replace("3.png", "gone.png") + '{"messages": [}\n')
    options = [
        "--data.on_bad_row", "skip", "--instruct.train_sampling_strategy", "group_by_length",
        "--instruct.max_steps", "12", "--instruct.gradient_accumulation_steps", "2",
        "--instruct.save_steps", "3", "--align", "null", "--data.check_rows", "2",
        "--data.augmentation", "[{class_path: RandomHorizontalFlip}]",
        "--instruct.dataloader_num_workers", str(workers),
    ]  # fmt: skip
    whole = train(path, [*options, "--output_dir", str(recipe.parent / "whole")])
    said = capsys.readouterr().err
    assert "messages: 14 of them (77.8%), from 13 rows, each seen 1.08 times a pass" in said
    assert "bad rows: 2 passed over so far (at most 100)" in said
    cut = [*options, "--output_dir", str(recipe.parent / "cut")]
    with pytest.raises(RuntimeError, match="cut"):
        train(path, cut, callbacks=[CutAt(8)])  # in the second pass; the last checkpoint is of 6
    resumed = train(path, [*cut, "--data.max_bad_rows", "7"], resume=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 12
    files = "connector.safetensors", "adapter/adapter_model.safetensors"
    for one, other in [
        (load_file(run / "checkpoint" / f) for run in (whole, resumed)) for f in files
    ]:
        assert all(torch.equal(one[key], other[key]) for key in one)
    listed = [(run / "bad_rows.jsonl").read_text().splitlines() for run in (whole, resumed)]
    assert set(listed[0]) == set(listed[1]) and len(listed[1]) == 2
    assert {json.loads(line)["row"] for line in listed[1]} == {4, 13}


def test_the_number_of_workers_changes_nothing(recipe, jsonl):
    path = mixed_recipe(recipe, jsonl)
    options = ["--align", "null", "--data.augmentation", "[{class_path: RandomHorizontalFlip}]"]
    runs = [
        train(path, [*options, "--instruct.dataloader_num_workers", str(workers), "--output_dir",
                     str(recipe.parent / str(workers))])
        for workers in (0, 1, 2)
    ]  # fmt: skip
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])


def test_stage_align_takes_only_sources_with_pictures(recipe, jsonl, capsys):
    train(mixed_recipe(recipe, jsonl), ["--instruct.max_steps", "1"])
    said = capsys.readouterr().err
    align, instruct = said[said.index("stage align: ") :].split("stage instruct: ")[:2]
    assert align.startswith("stage align: mixture: 12 samples") and align.count("messages:") == 1
    assert instruct.startswith("mixture: 17 samples a pass") and instruct.count(" rows") == 2


def test_a_source_is_looked_through_for_pictures_once(recipe, jsonl, monkeypatch):
    from mmpeft.train import build
    from mmpeft.training_data import TrainingData

    looked, pictures = Counter(), ConversationDataset.pictures

    def counted(self, index):
        looked[Path(self.task.train).name, index] += 1
        return pictures(self, index)

    monkeypatch.setattr(ConversationDataset, "pictures", counted)
    parsed, _ = config.load(mixed_recipe(recipe, jsonl))
    TrainingData.load(*build(parsed), parsed)
    assert looked == {("data.jsonl", 0): 1} | {("words.jsonl", i): 1 for i in range(5)}
    looked.clear()
    parsed, _ = config.load(recipe, ["--align", "null"])  # in which one of both is enough
    TrainingData.load(*build(parsed), parsed)
    assert looked == {("data.jsonl", 0): 1}


def test_a_batch_of_text_alone_teaches_a_connector_nothing_and_stops_nothing(recipe, jsonl):
    """Stage align, whose batches of one sample are of pictures or of text."""
    data = recipe.parent / "data.jsonl"
    words = [{"messages": [user(f"say {i}"), assistant("so")]} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in words) + data.read_text())
    options = ["--instruct", "null", "--align.max_steps", "6", "--align.logging_steps", "1",
               "--align.per_device_train_batch_size", "1", "--align.weight_decay", "0",
               "--align.train_sampling_strategy", "sequential"]  # fmt: skip
    run = train(recipe, [*options, "--align.save_steps", "1", "--align.save_total_limit", "9"])
    folders = [run / f"stages/align/checkpoint-{step}" for step in (1, 5)]
    states = [load_file(folder / "connector.safetensors") for folder in folders]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert np.isfinite(list(losses(run).values())).all()


def test_held_out_rows_are_in_no_mixture(recipe, jsonl):
    from mmpeft.train import build
    from mmpeft.training_data import TrainingData

    parsed, _ = config.load(mixed_recipe(recipe, jsonl), ["--retention.vision_samples", "4"])
    model, processor = build(parsed)
    data = TrainingData.load(model, processor, parsed)
    seeing, words = data.instruct.datasets
    assert seeing is data.vision and len(seeing.held_out) == 4 and words.held_out == []
    assert len(seeing) == 8 and len(words) == 5 and isinstance(words.task, Messages)
    every = map(data.instruct.place, range(3 * len(data.instruct)))
    rows = {row for number, index in every if number == 0 for row in seeing.samples[index % 8]}
    assert rows == set(range(12)) - set(seeing.held_out)
