"""Training on a stream: the samples of a file, in an order that workers and interruptions keep."""

import json
import tracemalloc

import datasets
import pytest
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader

from mmpeft import config
from mmpeft.bad_rows import KEY, BadRows
from mmpeft.data import STREAM, Collator, ConversationDataset
from mmpeft.feature_fill import fill
from mmpeft.streaming import StreamDataset, StreamSampler, some
from mmpeft.tasks.messages import Messages
from mmpeft.train import train

from .conftest import assistant, user
from .test_bad_rows import BAD, file, numbered
from .test_durable import At, assert_same, named
from .test_train import losses

STREAMED = ["--data.task.init_args.streaming", "true"]


def dataset(processor, path, buffer=1, limit=None, seed=0):
    task = Messages(train=str(path), streaming=True, shuffle_buffer=buffer)
    return StreamDataset(task, "train", processor, seed=seed, bad_rows=BadRows(limit))


def batches(rows, samples, workers=0, place=None, size=2):
    """What a loader gives, from a place on as the trainer skips to it."""
    sampler = StreamSampler(rows, samples)
    sampler.place = place
    options = {"collate_fn": Collator(0), "num_workers": workers}
    loader = DataLoader(rows, size, sampler=sampler, **options)
    for batch in skip_first_batches(loader, place["samples"] // size) if place else loader:
        rows.bad_rows.add(batch.pop(KEY, []))
        yield batch["input_ids"].tolist(), batch[STREAM]


# ---------------------------------------------------------------------------- order and samples


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_in_order_trains_as_the_file_in_order_does(recipe, workers):
    """Twelve rows, sixteen samples: into the second pass."""
    order = ["--instruct.train_sampling_strategy", "sequential"]
    of_file = train(recipe, [*order, "--align.train_sampling_strategy", "sequential",
                             *named(recipe, "file")])  # fmt: skip
    more = ["--instruct.dataloader_num_workers", str(workers)]
    in_order = ["--data.task.init_args.shuffle_buffer", "1"]
    streamed = train(recipe, [*STREAMED, *in_order, *more, *named(recipe, "stream")])
    assert_same(of_file, streamed)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("buffer", [1, 4])
def test_bad_rows_stop_or_are_replaced_and_workers_change_nothing(tiny, tmp_path, kind, buffer):
    rows = numbered(9)
    rows[2] = rows[3] = rows[8] = BAD[kind][0]
    path = file(tmp_path, rows)
    with pytest.raises((ValueError, OSError), match="line 3: "):
        list(batches(dataset(tiny[1], path), 9))
    found = []
    for workers in (0, 1, 2):
        skipping = dataset(tiny[1], path, buffer, limit=3)
        found.append([ids for ids, _ in batches(skipping, 18, workers)])
        assert sorted(row["row"] for row in skipping.bad_rows.rows) == [3, 4, 9]
        assert {row["field"] for row in skipping.bad_rows.rows} == {BAD[kind][1]}
    assert found[0] == found[1] == found[2]
    if buffer == 1:  # the next good row, also that of the next pass; as in a data set with a length
        task = Messages(train=str(path))
        counted = ConversationDataset(task, "train", tiny[1], bad_rows=BadRows(3))
        expected = [list(sample["input_ids"]) for sample in counted] * 2
        assert [ids for pair in found[0] for ids in without_padding(pair)] == expected


def without_padding(rows):
    return [[id for id in row if id != 0] for row in rows]


@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_rows_than_the_limit_stop_with_one_line(tiny, tmp_path, workers):
    rows = numbered(6)
    rows[1] = rows[2] = rows[4] = "{nope"
    with pytest.raises(ValueError, match="^3 rows cannot be learned from.* row 5: ") as error:
        list(batches(dataset(tiny[1], file(tmp_path, rows), limit=2), 6, workers))
    assert "\n" not in str(error.value)


def test_a_stream_without_a_good_row_is_an_error_and_no_endless_search(tiny, tmp_path):
    path = file(tmp_path, [BAD["too long"][0]] * 3)
    with pytest.raises(ValueError, match="10 rows one behind the other cannot be learned from"):
        list(batches(dataset(tiny[1], path, limit=9), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_were_made_are_not_made_again(tiny, tmp_path, workers, monkeypatch):
    rows = numbered(7)
    rows[4] = BAD["role"][0]
    path = file(tmp_path, rows)
    whole = list(batches(dataset(tiny[1], path, 3, limit=1), 20))
    made = StreamDataset._made

    def only_new(self, drawn, number):
        assert number >= 12 and drawn.number == number
        return made(self, drawn, number)

    monkeypatch.setattr(StreamDataset, "_made", only_new)
    place = json.loads(json.dumps(whole[5][1]))
    rest = list(batches(dataset(tiny[1], path, 3, limit=1), 20, workers, place))
    assert [ids for ids, _ in rest] == [ids for ids, _ in whole[6:]]
    assert [place for _, place in rest] == [place for _, place in whole[6:]]


def test_the_first_rows_are_those_of_one_pass(tiny, tmp_path):
    rows = dataset(tiny[1], file(tmp_path, numbered(5)))
    for _ in range(2):
        assert [one.rows[0]["where"][-1] for one in some(rows, 9)] == list("12345")
    assert len(list(some(rows, 3))) == 3


@pytest.mark.parametrize("size", [1, 5, 300, 511, 767, 2000])
def test_some_are_of_all_rows(size):
    # 256 of 511 were the first 256
    assert sorted(some(range(size), 4 * size)) == list(range(size))
    chosen = list(some(range(size), 256))
    assert len(set(chosen)) == min(256, size) and some(range(size), 256) == chosen
    for part in (chosen, chosen[:100]):
        tenths = {10 * index // size for index in part}
        assert len(tenths) == min(10, size)


def test_memory_does_not_grow_with_the_stream(tiny, monkeypatch):
    def peak(count):
        def rows():
            for number in range(count):
                yield {"question": f"{number} " + "x" * 5000, "answer": "a"}

        stream = datasets.IterableDataset.from_generator(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
        drawn = dataset(tiny[1], "owner/name", 20, limit=10).drawn()
        tracemalloc.start()
        for _ in range(count):
            next(drawn)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(200), peak(2000)
    assert many < 1.5 * few, (few, many)


# --------------------------------------------------------------------------------- interruption


class Lost(Exception):
    pass


def lose():
    raise Lost


@pytest.fixture
def hard(request, recipe, jsonl, monkeypatch):
    """A recipe on a stream with a shuffle buffer, bad rows, accumulation, dropout, augmentation."""
    rows = [json.loads(line) for line in (recipe.parent / "data.jsonl").read_text().splitlines()]
    rows = [
        {"question": row["messages"][0]["content"][1]["text"], "answer": "no " * (n % 4 + 1),
         "image": str(recipe.parent / f"{n}.png")}
        for n, row in enumerate(rows)
    ]  # fmt: skip
    rows[5]["image"], rows[9]["answer"] = "no.png", " "
    if request.param == "hub":
        source = "owner/name"
        data = datasets.Dataset.from_list(rows)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, **__: data.to_iterable_dataset(num_shards=3)
        )
    else:
        source = str(jsonl(rows, "vqa.jsonl"))
    return [*STREAMED, "--data.task.init_args.train", source, "--align", "null",
            "--data.task.init_args.shuffle_buffer", "5", "--data.on_bad_row", "skip",
            "--data.max_bad_rows", "3", "--instruct.gradient_accumulation_steps", "2",
            "--instruct.per_device_train_batch_size", "1", "--instruct.max_steps", "12",
            "--model.adapter.init_args.lora_dropout", "0.2", "--instruct.save_steps", "3",
            "--data.augmentation", "[{class_path: torchvision.transforms.v2.RandomRotation, "
            "init_args: {degrees: 30}}]"]  # fmt: skip


@pytest.mark.parametrize(("hard", "workers"), [("file", 2), ("hub", 0)], indirect=["hard"])
def test_interrupted_and_resumed_equals_uninterrupted(recipe, hard, workers):
    """Twelve rows, two samples a step: cut in the first and the second pass."""
    whole = train(recipe, [*hard, *named(recipe, "whole")])
    cut = [*hard, *named(recipe, "cut"), "--instruct.dataloader_num_workers", str(workers)]
    for resume, step in ((False, 5), (True, 11)):
        with pytest.raises(Lost):
            train(recipe, cut, resume=resume, callbacks=[At(step, lose)])
    run = train(recipe, cut, resume=True)
    assert_same(whole, run)
    assert len(losses(run)) == 12
    listed = [sorted((one / "bad_rows.jsonl").read_text().splitlines()) for one in (whole, run)]
    assert listed[0] == listed[1] and len(listed[0]) == 2
    # the samples differ from pass to pass, or a wrong pass would not show
    assert len({losses(run)["instruct", step] for step in range(1, 13)}) == 12


def test_stages_begin_at_the_beginning_each(recipe):
    """Also where one of them goes on."""
    own = [*STREAMED, "--data.task.init_args.shuffle_buffer", "5"]
    whole = train(recipe, [*own, *named(recipe, "whole")])
    cut = [*own, *named(recipe, "cut")]
    with pytest.raises(Lost):
        train(recipe, cut, callbacks=[At(4, lose)])
    assert_same(whole, train(recipe, cut, resume=True))


# -------------------------------------------------------------------------- at the start, refused


def test_the_first_rows_are_tried_before_a_run_begins(recipe):
    path = recipe.parent / "data.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = "{nope"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="data.jsonl line 4: not JSON"):
        train(recipe, STREAMED)
    assert not (recipe.parent / "run").exists()
    with pytest.raises(ValueError, match="data.jsonl line 4: not JSON"):  # else when it is drawn
        train(recipe, [*STREAMED, "--data.check_rows", "2"])


def test_a_stream_of_words_does_not_train_a_connector(recipe, jsonl):
    words = jsonl([{"messages": [user("q"), assistant("a")]}] * 3, "words.jsonl")
    with pytest.raises(ValueError, match="none of the first 256 rows of task messages has a pict"):
        train(recipe, [*STREAMED, "--data.task.init_args.train", str(words)])


REPLAY = ["--data.replay", "Messages", "--data.replay.init_args.train", "x.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--instruct.max_steps", "-1"], "instruct.max_steps is missing; a stream has no end"),
        (["--instruct.train_sampling_strategy", "group_by_length"], "is group_by_length, but the"),
        (["--align.train_sampling_strategy", "sequential"], "align.train_sampling_strategy is s"),
        (["--data.fraction", "0.5"], "data.fraction needs rows by number, .* to 1"),
        (["--data.chats_per_sample", "2"], "data.chats_per_sample needs rows by number, .* to 1"),
        (["--model.rank", "auto"], "model.rank needs rows by number"),
        (["--retention", "{}"], "retention needs rows by number.* set retention to null"),
        (["--speed.feature_cache", "on"], "speed.feature_cache needs rows by number"),
        (REPLAY, "data.replay needs rows by number"),
        (["--data.mixture", "[{task: {class_path: Messages, init_args: {train: d, streaming: true}"
          "}}]", "--data.task", "null"], "data.mixture needs rows by number"),
        (["--data.task.init_args.shuffle_buffer", "0"], "shuffle_buffer is 0"),
    ],
)  # fmt: skip
def test_what_cannot_go_with_a_stream_is_one_line(recipe, more, message):
    with pytest.raises(ValueError, match=message) as error:
        config.load(recipe, [*STREAMED, *more])
    assert "\n" not in str(error.value)


def test_a_stage_that_reads_a_file_may_count_it(recipe):
    own = ["--data.align", "Messages", "--data.align.init_args.train", "captions.jsonl"]
    parsed, _ = config.load(recipe, [*own, *STREAMED, "--align.max_steps", "-1"])
    assert parsed.data.streams


def test_nothing_else_reads_the_rows_of_a_stream(recipe):
    with pytest.raises(ValueError, match="rows are streamed, so features of them are not kept"):
        fill(recipe, STREAMED)
    with pytest.raises(ValueError, match="train is streamed, but here its rows are needed by n"):
        Messages(train="owner/name", streaming=True).rows("train")


def test_a_run_on_a_stream_is_scored(recipe):
    from mmpeft.evaluate import evaluate_run

    run = train(recipe, [*STREAMED, "--align", "null", "--instruct.max_steps", "1"])
    report = evaluate_run(run, config.task_of_run(run), samples=2)
    assert set(report["controls"]) == {"image_withheld", "image_shuffled"}


def test_an_adapter_starts_from_the_first_samples(recipe, capsys):
    order = ["--align", "null", "--instruct.max_steps", "2", "--model.adapter.init_args.r", "1",
             "--model.adapter.init_args.init_lora_weights", "eva"]  # fmt: skip
    of_file = ["--instruct.train_sampling_strategy", "sequential", *named(recipe, "file")]
    in_order = ["--data.task.init_args.shuffle_buffer", "1", *named(recipe, "stream")]
    of_file = train(recipe, [*order, *of_file])
    assert_same(of_file, train(recipe, [*order, *STREAMED, *in_order]))
    assert capsys.readouterr().err.count("starts by eva from 12 samples") == 2
