"""Training samples: supervision, shared prefixes, refusals that name the row."""

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mmpeft.data import Collator, ConversationDataset, hold_out
from mmpeft.layout import ResolutionConfig
from mmpeft.mixture import with_replay
from mmpeft.packing import share_prefix
from mmpeft.task import Task
from mmpeft.tasks.messages import Messages

from .conftest import assistant, user


@dataclass
class InMemory(Task):
    """Rows given as chats; all rows with the same key form a group."""

    name = "in_memory"
    chats: list = None
    keys: list = None

    def rows(self, split):
        return [{"chat": c, "key": k} for c, k in zip(self.chats, self.keys, strict=True)]

    def messages(self, row):
        return row["chat"]

    def group(self, row):
        return row["key"]


def per_token_losses(model, sample, pad=0):
    batch = Collator(pad)([sample])
    labels = batch.pop("labels")
    logits = model(**batch).logits[0, :-1]
    keep = labels[0, 1:] != -100
    return F.cross_entropy(logits[keep], labels[0, 1:][keep], reduction="none")


@pytest.mark.parametrize("answers", [["yes", "a longer answer", "no"], ["same prompt"] * 3])
def test_a_chats_loss_does_not_change_with_its_neighbours(tiny, images, answers):
    model, processor = tiny
    questions = ["red?", "how many, please?", "x"] if answers[0] == "yes" else ["what?"] * 3
    chats = [
        [user(images[0], q), assistant(a + str(i))]
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    task = InMemory(chats=chats, keys=["picture"] * 3)
    (together,) = ConversationDataset(task, "train", processor, chats_per_sample=3)
    alone = [s for s in ConversationDataset(task, "train", processor, chats_per_sample=1)]
    assert len(together["input_ids"]) < sum(len(s["input_ids"]) for s in alone) - 2 * 16
    expected = torch.cat([per_token_losses(model, sample) for sample in alone])
    torch.testing.assert_close(per_token_losses(model, together), expected, atol=1e-4, rtol=1e-4)


def test_neighbours_in_the_batch_do_not_matter_either(tiny, images):
    model, processor = tiny
    chats = [[user(images[i % 3], "q" * (i + 1)), assistant("answer")] for i in range(4)]
    chats.append([user("text only"), assistant("fine")])
    dataset = ConversationDataset(
        InMemory(chats=chats, keys=["a", "a", "b", None, None]), "train", processor, 2
    )
    # a group may only share one picture, so the two of "a" must be the same one
    dataset.rows[1]["chat"][0]["content"][0]["image"] = images[0]
    samples = list(dataset)
    assert len(samples) == 4
    batch = Collator(0)(samples)
    model.train()
    together = model(**batch, num_items_in_batch=1).loss
    alone = sum(model(**Collator(0)([s]), num_items_in_batch=1).loss for s in samples)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)


KEYS = [
    ["a"] * 5 + [None, "b", None, "a", "c", "b", "c", "a"],
    [None] * 6,
    [("a", 1), ("a", 2)] * 3,
    [0, None, 1, 0],  # a key like a row's number is no row's number
    [],
]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize("held_out", [0, 1, 2])
def test_samples_are_cut_from_groups_in_the_order_of_the_file(tiny, keys, size, held_out):
    if held_out and not keys:
        return
    task = InMemory(chats=[[]] * len(keys), keys=keys)
    dataset = ConversationDataset(task, "train", tiny[1], size, held_out, seed=3)
    groups = {}
    for number, key in enumerate(keys):
        if number not in dataset.held_out:
            name = ("row", number) if key is None or size == 1 else ("key", key)
            groups.setdefault(name, []).append(number)
    expected = [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]
    assert list(dataset.samples) == expected and len(dataset) == len(expected)
    assert expected == [] or dataset.samples[-1] == expected[-1]


@pytest.mark.parametrize("size", [1, 4])
def test_shares_are_nested_seeded_and_of_whole_groups(tiny, size):
    chats = [[user(f"number {i}"), assistant("yes")] for i in range(40)]
    chats[25] = [user("number 25"), user("twice")]
    task = InMemory(chats=chats, keys=[f"picture {i // 4}" for i in range(40)])

    def chosen(fraction, seed=0, held_out=0):
        dataset = ConversationDataset(task, "train", tiny[1], size, held_out, seed,
                                      fraction=fraction)  # fmt: skip
        numbers = getattr(dataset.rows, "numbers", np.arange(40))
        assert sorted(i for sample in dataset.samples for i in sample) == [
            i for i in range(len(dataset.rows)) if i not in dataset.held_out
        ]
        return dataset, numbers.tolist()

    shares = [chosen(f)[1] for f in (0.001, 0.1, 0.3, 1.0)]
    assert [len(share) for share in shares] == ([1, 4, 12, 40] if size == 1 else [4, 4, 12, 40])
    for small, large in pairwise(shares):
        assert set(small) <= set(large) and small == sorted(small)
    if size > 1:
        assert all({i - i % 4 + k for k in range(4)} <= set(shares[2]) for i in shares[2])
    assert chosen(0.3)[1] == shares[2] != chosen(0.3, seed=1)[1]
    dataset, _ = chosen(0.3, held_out=4)
    assert len(dataset.rows) == 12 and len(dataset.held_out) >= 4
    seed = next(seed for seed in range(99) if 25 in chosen(0.3, seed)[1])
    with pytest.raises(ValueError, match="in_memory row 25"):  # named as in the file
        list(chosen(0.3, seed)[0])


def test_the_same_rows_are_held_out_as_ever():
    keys = [number // 3 if number % 7 else None for number in range(40)]
    task = InMemory(chats=[[]] * 40, keys=keys)
    groups = {}
    for number, key in enumerate(keys):
        groups.setdefault(("row", number) if key is None else key, []).append(number)
    order, expected = list(groups.values()), []
    random.Random(5).shuffle(order)
    while len(expected) < 11:
        expected += order.pop()
    assert hold_out(task, task.rows("train"), 11, seed=5) == sorted(expected)


class Unread(list):
    """Rows that must not be looked at."""

    def __getitem__(self, index):
        raise AssertionError(f"row {index} was read")

    __iter__ = None


def test_rows_without_groups_are_not_read_at_the_start(tiny):
    class Plain(InMemory):
        group = Task.group

        def rows(self, split):
            return Unread([None] * 9)

    for size in (1, 4):
        dataset = ConversationDataset(Plain(), "train", tiny[1], size, held_out=2)
        assert len(dataset) == 7


@pytest.mark.parametrize("replay", [False, True])
def test_a_bad_sample_of_a_worker_is_the_same_one_line(tiny, jsonl, images, replay):
    content = [{"type": "image", "image": "no.png"}, {"type": "text", "text": "q"}]
    path = jsonl([{"messages": [{"role": "user", "content": content}, assistant("a")]}])
    dataset = ConversationDataset(Messages(train=str(path)), "train", tiny[1])
    if replay:
        task = InMemory(chats=[[user("q"), assistant("a")]], keys=[None])
        good = ConversationDataset(task, "train", tiny[1])
        dataset = with_replay(good, dataset, 0.5)
    with pytest.raises(FileNotFoundError, match="line 1: image 1: .*no.png") as here:
        list(dataset)
    with pytest.raises(ValueError, match="line 1: image 1: .*no.png") as there:
        list(DataLoader(dataset, collate_fn=Collator(0), num_workers=1))
    assert str(there.value) == str(here.value) and "\n" not in str(there.value)


def test_an_error_of_ours_keeps_its_traceback_in_a_worker(tiny, images):
    class Broken:
        def image_inputs(self, *_):
            return np.ones(2) @ np.ones(3)

    task = InMemory(chats=[[user(images[0], "q"), assistant("a")]], keys=[None])
    dataset = ConversationDataset(task, "train", tiny[1])
    dataset.store = Broken()
    with pytest.raises(ValueError, match=r"Traceback(.|\n)*in image_inputs"):
        list(DataLoader(dataset, collate_fn=Collator(0), num_workers=1))


def row(ids, labels, marks=None):
    return {"input_ids": ids, "labels": labels, "mm_token_type_ids": marks or [0] * len(ids)}


def test_shared_prefix_by_hand():
    sample = share_prefix([row([1, 2, 3, 4], [-100, -100, -100, 4]),
                           row([1, 2, 5, 6], [-100, -100, -100, 6])])  # fmt: skip
    assert sample["input_ids"] == [1, 2, 3, 4, 5, 6]
    assert sample["position_ids"] == [0, 1, 2, 3, 2, 3]
    assert sample["branch_ids"] == [-1, -1, 0, 0, 1, 1]
    mask = Collator(0)([sample])["attention_mask"][0, 0].int().tolist()
    assert mask[4] == [1, 1, 0, 0, 1, 0] and mask[3] == [1, 1, 1, 1, 0, 0]


def test_the_token_that_predicts_an_answer_stays_in_its_branch():
    sample = share_prefix([row([1, 2, 3], [-100, -100, 3]), row([1, 2, 4], [-100, -100, 4])])
    assert sample["input_ids"] == [1, 2, 3, 2, 4]
    assert sample["branch_ids"] == [-1, 0, 0, 1, 1]


def test_rows_of_one_group_with_other_images_are_refused():
    a = row([1, 0, 0, 2, 3], [-100] * 4 + [3], [0, 1, 1, 0, 0])
    b = row([9, 0, 0, 2, 4], [-100] * 4 + [4], [0, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="must share their images"):
        share_prefix([a, b])


def test_a_group_with_two_pictures_is_refused_by_row(tiny, images):
    chats = [[user(picture, "same words"), assistant("a")] for picture in images[:2]]
    task = InMemory(chats=chats, keys=["group"] * 2)
    with pytest.raises(ValueError, match="in_memory row 1: its group has rows with other images"):
        list(ConversationDataset(task, "train", tiny[1], chats_per_sample=2))


@pytest.mark.parametrize("gate", ["none", "sample"])
def test_text_rows_may_stand_beside_packed_pictures(make_bridge, images, gate):
    model, processor = make_bridge(gate)
    chats = [[user(images[0], q), assistant("yes")] for q in ("red?", "round?")]
    chats += [[user("hello"), assistant("a longer answer")]]
    dataset = ConversationDataset(
        InMemory(chats=chats, keys=["a", "a", None]), "train", processor, 2
    )
    model.train()
    batch = Collator(0)(list(dataset))
    assert batch["attention_mask"].dim() == 4 and len(batch["pixel_values"]) == 1
    together = model(**batch, num_items_in_batch=1).loss
    alone = sum(model(**Collator(0)([s]), num_items_in_batch=1).loss for s in dataset)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)
    model(**Collator(0)([dataset[1]])).loss.backward()  # a batch of text alone can be learned from
    learned = sum(p.grad.abs().sum() for n, p in model.named_parameters() if p.grad is not None)
    assert (learned > 0) == (gate == "none")


def test_the_end_of_an_unfinished_answer_is_not_learned(tiny):
    finished = [user("q<|im_end|>"), assistant("words <|im_end|> and")]
    cut = [finished[0], finished[1] | {"unfinished": True}]
    dataset = ConversationDataset(
        InMemory(chats=[finished, cut], keys=[None, None]), "train", tiny[1]
    )
    whole, open_end = dataset
    assert whole["input_ids"] == open_end["input_ids"]
    differ = [n for n, pair in enumerate(zip(whole["labels"], open_end["labels"], strict=True))
              if pair[0] != pair[1]]  # fmt: skip
    assert [whole["labels"][n] for n in differ] == [tiny[1].tokenizer.eos_token_id]
    assert [open_end["labels"][n] for n in differ] == [-100]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "line 2: messages is empty"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
         r"line 2: messages\[1\].content \(assistant\) is empty"),
        ({"messages": [{"role": "human", "content": "q"}]}, r"messages\[0\].role is 'human'; use"),
        ({"messages": [{"role": "user", "content": "q"}]}, "last message is the user's"),
        ({"messages": [{"role": "user", "content": "q" * 600},
                       {"role": "assistant", "content": "a"}]}, "line 2: .*do not fit.*512"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]},
                       {"role": "assistant", "content": "a"}]}, "line 2: image 1: .*no.png does"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]},
                       {"role": "assistant", "content": "a"}], "images": []},
         "line 2: images has 0 images for 1 image parts"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
          "images": ["a.png"]}, "line 2: images has 1 images for 0 image parts"),
        ({"text": "q"}, "line 2: messages is missing"),
        ({"messages": ["q"]}, r"line 2: messages\[0\] is no object"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]},
         r"line 2: messages\[0\].content \(user\) is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]},
                       {"role": "assistant", "content": "a"}]}, "line 2: .*type 'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]},
                       {"role": "assistant", "content": "a"}]}, "line 2: .*'video' has no clip"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["no.png"]}]},
                       {"role": "assistant", "content": "a"}]}, "line 2: clip, frame 1: .*no.png"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_by_line_and_field(tiny, jsonl, row, message):
    good = {"messages": [user("q"), assistant("a")]}
    path = jsonl([good, row])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        list(ConversationDataset(Messages(train=str(path)), "train", tiny[1]))
    assert "data.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_picture_is_named_by_line_where_its_size_counts(make_bridge, jsonl):
    _, processor = make_bridge(resolution=ResolutionConfig("tiles"))
    path = jsonl([{"messages": [user("no.png"), assistant("a")]}])
    path.write_text(path.read_text().replace('"type": "text", "text"', '"type": "image", "image"'))
    with pytest.raises(FileNotFoundError, match="line 1: image: .*no.png does not exist"):
        list(ConversationDataset(Messages(train=str(path)), "train", processor))


def test_broken_json_names_the_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{}]}\n{"messages": [\n')
    with pytest.raises(ValueError, match=r"data.jsonl line 2: not JSON"):
        Messages(train=str(path)).rows("train")[1]


def test_image_paths_are_beside_the_file(tiny, jsonl, images):
    path = jsonl([{"messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        assistant("a")], "images": ["one.png"]}])  # fmt: skip
    images[0].save(path.parent / "one.png")
    (sample,) = ConversationDataset(Messages(train=str(path)), "train", tiny[1])
    assert sample["pixel_values"].shape == (1, 3, 64, 64)


def test_other_names_of_a_picture_and_clips_are_beside_the_file_too(tiny, jsonl, images):
    content = [{"type": "image", "path": "one.png"}, {"type": "video", "path": "clip.gif"},
               {"type": "video", "video": ["one.png", "two.png"]}]  # fmt: skip
    path = jsonl([{"messages": [{"role": "user", "content": content}, assistant("a")]}])
    images[0].save(path.parent / "one.png")
    images[1].save(path.parent / "two.png")
    images[0].save(path.parent / "clip.gif", save_all=True, append_images=images[1:])
    (sample,) = ConversationDataset(Messages(train=str(path)), "train", tiny[1])
    assert sample["pixel_values"].shape == (1 + 3 + 2, 3, 64, 64)
