"""kill -9 at random moments; what is started again ends as if it had never been killed.

``make soak`` runs it. ``SOAK_KILLS`` is the number of kills (90 of training, two scenarios, 60 of a
cache build, 60 of a retention report by default), ``SOAK_SEED`` draws the moments.
"""

import json
import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmpeft import durable, feature_cache, feature_fill
from mmpeft.feature_store import FeatureStore
from mmpeft.retention.report import retain_run
from mmpeft.train import train

from ..conftest import assistant, user
from .forked import until_done

KILLS = int(os.environ.get("SOAK_KILLS", 0))
SEED = int(os.environ.get("SOAK_SEED", 0))
MOST = 12  # kills of one run

SAVING = ["--align.save_steps", "2", "--instruct.save_steps", "2", "--instruct.max_steps", "14",
          "--align.logging_steps", "3", "--instruct.logging_steps", "3",
          "--model.adapter.init_args.lora_dropout", "0.1"]  # fmt: skip
CACHED = ["--speed.feature_cache", "on", "--instruct.per_device_train_batch_size", "1",
          "--instruct.gradient_accumulation_steps", "2"]  # fmt: skip
WORKERS = ["--instruct.dataloader_num_workers", "2", "--model.gate", "none",
           "--data.augmentation", "[{class_path: torchvision.transforms.v2.RandomHorizontalFlip},"
           " {class_path: torchvision.transforms.v2.RandomRotation, init_args: {degrees: 20}}]",
           "--data.replay", "Messages", "--data.replay.init_args.train", "{replay}",
           "--data.replay_share", "0.4", "--instruct.kl_weight", "0.1"]  # fmt: skip


def uninterrupted(work) -> float:
    """Seconds that it takes; here and not in a child, so that children find everything imported."""
    began = time.time()
    work()
    return time.time() - began


def rounds(kills: int):
    """``(round, its kills)`` until there were so many in all; whoever loops sends back how many."""
    number = 0
    while kills > 0:
        kills -= yield number, min(MOST, kills)
        number += 1


def logged(run: Path) -> list:
    """All of it but the summary of a stage, which is of the steps since it last went on."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train_runtime" not in row]


def whole(folder: Path) -> None:
    """No file is torn and nothing half-written has the name of something whole."""
    for sealed in folder.rglob(durable.CHECKSUMS):
        assert durable.problem(sealed.parent) is None
    for file in folder.rglob("*.safetensors"):
        load_file(file)
    for file in folder.rglob("*.json"):
        json.loads(file.read_text())


def halves(since: float, *folders: Path) -> bool:
    with suppress(FileNotFoundError):  # it became whole, or was removed, while we looked
        paths = (path for folder in folders for path in folder.rglob("*.partial"))
        return any(path.stat().st_mtime >= since for path in paths)
    return False


def report(name: str, kills: int, torn: int, runs: int, began: float) -> None:
    found = {"what": name, "kills": kills, "half_written": torn, "runs": runs,
             "seconds": round(time.time() - began)}  # fmt: skip
    print(json.dumps(found), flush=True)


@pytest.mark.parametrize("scenario", ["cached", "workers"])
def test_training(recipe, jsonl, tmp_path, scenario, monkeypatch):
    # drawing would be most of the work; the file is written all the same
    monkeypatch.setattr(
        "mmpeft.metrics_file.draw_loss", lambda rows, path: durable.write(path, "drawn")
    )
    began, draw = time.time(), random.Random(SEED)
    text = [{"messages": [user(f"say {i}"), assistant("words " * 4)]} for i in range(3)]
    options = [*SAVING, *(CACHED if scenario == "cached" else WORKERS)]
    options = [word.replace("{replay}", str(jsonl(text, "replay.jsonl"))) for word in options]

    def run(name):
        folder, cache = tmp_path / name, tmp_path / f"{name} cache"
        own = [*options, "--speed.feature_cache_dir", str(cache), "--output_dir", str(folder)]
        return folder, cache, lambda: train(recipe, own, resume=folder.exists())

    expected, _, work = run("whole")
    seconds = uninterrupted(work)
    kills = torn = runs = 0
    plan = rounds(KILLS or 45)
    try:
        number, most = next(plan)
        while True:
            folder, cache, work = run(f"killed {number}")
            done, halfway = until_done(
                work,
                tmp_path / "log",
                draw,
                seconds,
                lambda t, f=folder, c=cache: halves(t, f, c),
                most,
            )
            assert logged(folder) == logged(expected)
            for file in ("connector.safetensors", "adapter/adapter_model.safetensors"):
                one, other = (load_file(r / "checkpoint" / file) for r in (folder, expected))
                assert one.keys() == other.keys()
                assert all(torch.equal(one[key], other[key]) for key in one)
            whole(folder)
            kills, torn, runs = kills + done, torn + halfway, runs + 1
            report(f"train, {scenario}", kills, torn, runs, began)
            for made in (folder, cache):
                shutil.rmtree(made, ignore_errors=True)
            number, most = plan.send(done)
    except StopIteration:
        pass


def stored(cache: Path) -> dict:
    """All features of the one folder of features in a cache, by picture."""
    (folder,) = (path.parent for path in cache.glob("*/meta.json"))
    found = json.loads((folder / "meta.json").read_text())
    store = FeatureStore(folder, getattr(torch, found["dtype"]), (64, 64))
    keys = {name.split(".")[0] for f in folder.glob("*.safetensors") for name in load_file(f)}
    features = {key: store.get(key)[0].clone() for key in keys}
    assert None not in store._shards.values()  # none was refused
    return features


def test_building_the_cache(recipe, jsonl, tmp_path, monkeypatch):
    began, draw = time.time(), random.Random(SEED)
    monkeypatch.setattr(feature_cache, "SHARD_PICTURES", 16)
    monkeypatch.setattr(feature_fill, "FILL_BATCH", 8)
    rows = []
    for i in range(400):
        pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8,
                               generator=torch.Generator().manual_seed(i))  # fmt: skip
        Image.fromarray(pixels.numpy()).save(tmp_path / f"p{i}.png")
        rows.append({"messages": [user(), assistant("yes")]})
        rows[-1]["messages"][0]["content"] = [{"type": "image", "image": f"p{i}.png"}]
    data = str(jsonl(rows, "many.jsonl"))

    def build(name):
        cache = tmp_path / name
        own = ["--data.task.init_args.train", data, "--speed.feature_cache_dir", str(cache)]
        return cache, lambda: feature_fill.fill(recipe, own)

    expected, work = build("whole")
    seconds = uninterrupted(work)
    expected = stored(expected)
    assert len(expected) == 400
    kills = torn = runs = 0
    plan = rounds(KILLS or 60)
    try:
        number, most = next(plan)
        while True:
            cache, work = build(f"killed {number}")
            done, halfway = until_done(
                work, tmp_path / "log", draw, seconds, lambda t, c=cache: halves(t, c), most
            )
            found = stored(cache)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)
            kills, torn, runs = kills + done, torn + halfway, runs + 1
            report("cache", kills, torn, runs, began)
            shutil.rmtree(cache)
            number, most = plan.send(done)
    except StopIteration:
        pass


def test_retention(make_bridge, recipe, images, tmp_path, monkeypatch):
    from mmpeft.config import load

    began, draw = time.time(), random.Random(SEED)
    model, processor = make_bridge(gate="none")
    run = tmp_path / "run"
    model.save_pretrained(run / "checkpoint")
    processor.save_pretrained(run / "checkpoint")
    images[0].save(tmp_path / "photograph.png")
    task = load(recipe)[0].data.task

    def measure(name):
        folder = tmp_path / name

        def work():
            retain_run(
                run, task, image=tmp_path / "photograph.png", suite=["facts", "grammar"],
                samples=40, modes=["text", "with_image"], prose_tokens=256,
                output=folder / "retain", cache=folder / "cache",
            )  # fmt: skip

        return folder, work

    def result(folder):
        found = json.loads((folder / "retain" / "report.json").read_text())
        for name in ("seconds", "cache"):
            assert _without(found, name)
        return found, (folder / "retain" / "items.jsonl").read_text()

    expected, work = measure("whole")
    seconds, expected = uninterrupted(work), result(expected)
    kills = torn = runs = 0
    plan = rounds(KILLS or 60)
    try:
        number, most = next(plan)
        while True:
            folder, work = measure(f"killed {number}")

            def writing(since, cache=folder / "cache"):
                """A line of the answers is not whole, or a file has its temporary name."""
                files = [p for p in cache.glob("*.jsonl") if p.stat().st_mtime >= since]
                return any(not p.read_bytes().endswith(b"\n") for p in files) or halves(
                    since, cache.parent
                )

            done, halfway = until_done(work, tmp_path / "log", draw, seconds, writing, most)
            assert result(folder) == expected
            kills, torn, runs = kills + done, torn + halfway, runs + 1
            report("retain", kills, torn, runs, began)
            shutil.rmtree(folder)
            number, most = plan.send(done)
    except StopIteration:
        pass


def _without(found, name: str) -> bool:
    """Take a key out of nested dicts; whether it was there."""
    if not isinstance(found, dict):
        return False
    there = found.pop(name, None) is not None
    return any([_without(value, name) for value in found.values()]) or there
