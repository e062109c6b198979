"""Frozen features on disk: the same training, nothing encoded twice, nothing taken on trust."""

import json
import multiprocessing
import os
import re
import shutil

import pytest
import torch
from PIL import Image

from mmpeft import cli, feature_cache, feature_fill, feature_setup, feature_store
from mmpeft.calibration import calibrate
from mmpeft.connectors.qformer import QFormerConnectorConfig
from mmpeft.data import Collator, ConversationDataset
from mmpeft.feature_cache import FeatureCache, describe, folder_name
from mmpeft.feature_store import FeatureStore, write_shard
from mmpeft.images import content_hash
from mmpeft.layout import ResolutionConfig
from mmpeft.model import BridgeForConditionalGeneration
from mmpeft.train import train

from .conftest import assistant, user
from .test_data import InMemory
from .test_train import losses

KEYS = [f"{i:032x}" for i in range(8)]


def picture(i, size=(3, 2, 4)):
    return torch.full(size, float(i), dtype=torch.bfloat16), (16, 16)


@pytest.fixture
def encoded(monkeypatch):
    """Counts the pictures that any bridge encodes."""
    counts, encode = [], BridgeForConditionalGeneration.encode_images

    def counting(self, pixel_values, image_sizes=None):
        features = encode(self, pixel_values, image_sizes)
        counts.append(len(features))
        return features

    monkeypatch.setattr(BridgeForConditionalGeneration, "encode_images", counting)
    return counts


def cached(recipe, *overrides, name="run", cache="on"):
    folder = recipe.parent
    return train(
        recipe,
        ["--speed.feature_cache", cache, "--speed.feature_cache_dir", str(folder / "features"),
         "--output_dir", str(folder / name), *overrides],
    )  # fmt: skip


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


# ------------------------------------------------------------------------------------ the store


def test_what_is_written_is_read_in_other_objects_too(tmp_path):
    import pickle

    store = FeatureStore(tmp_path / "new", torch.bfloat16, (16, 16))
    assert store.get(KEYS[0]) is None and len(store) == 0
    write_shard(store.folder, {key: picture(i) for i, key in enumerate(KEYS[:2])})
    again = pickle.loads(pickle.dumps(store))
    for reader in (store, again):
        write_shard(store.folder, {KEYS[2]: picture(2)})  # the same picture twice does no harm
        features, size = reader.get(KEYS[2])
        assert features.equal(picture(2)[0]) and size == (16, 16) and len(reader) == 3
    assert [p.suffix for p in store.folder.iterdir()] == [".safetensors"] * 3


@pytest.mark.parametrize("how", ["cut", "flipped", "foreign", "other dtype"])
def test_a_bad_shard_is_named_once_and_its_pictures_are_new_again(tmp_path, capsys, how):
    good = write_shard(tmp_path, {KEYS[0]: picture(0)})
    bad = write_shard(tmp_path, {KEYS[1]: picture(1), KEYS[2]: picture(2)})
    content = bad.read_bytes()
    if how == "cut":
        bad.write_bytes(content[:-10])
    elif how == "flipped":
        bad.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": torch.ones(2)}, bad)
    else:
        bad.unlink()
        bad = write_shard(tmp_path, {k: (picture(1)[0].float(), (16, 16)) for k in KEYS[1:3]})
    os.utime(bad, (0, 0))
    store = FeatureStore(tmp_path, torch.bfloat16, (16, 16))
    for key in KEYS[1:3]:
        store.get(key)
    assert store.get(KEYS[1]) is None and store.get(KEYS[0])[0].equal(picture(0)[0])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(bad) in lines[0] and str(good) not in lines[0]
    write_shard(tmp_path, {key: picture(7) for key in KEYS[1:3]})
    assert store.get(KEYS[1])[0].equal(picture(7)[0]) and bad.exists()
    fresh = FeatureStore(tmp_path, torch.bfloat16, (16, 16))  # the later of two copies counts
    assert fresh.get(KEYS[1])[0].equal(picture(7)[0])


def _write_many(folder, start):
    for i in range(start, start + 4):
        write_shard(folder, {KEYS[i % 8]: picture(i % 8)})


def test_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, n)) for n in (0, 2, 4)]
    for writer in writers:
        writer.start()
    store = FeatureStore(tmp_path, torch.bfloat16, (16, 16))
    for writer in writers:
        writer.join()
    assert [store.get(key)[0].equal(picture(i)[0]) for i, key in enumerate(KEYS)] == [True] * 8


def test_a_picture_is_known_by_its_content(tmp_path, images):
    path = tmp_path / "a.png"
    images[0].save(path)
    first = content_hash(str(path))
    assert first == content_hash(path.read_bytes())
    images[1].save(path)
    assert content_hash(str(path)) != first
    assert content_hash(images[0]) == content_hash(images[0].copy()) != content_hash(images[1])
    tall = Image.frombytes("RGB", images[0].size[::-1], images[0].tobytes())
    assert content_hash(images[0]) != content_hash(tall)
    with pytest.raises(FileNotFoundError, match=r"row 3, image 1: .*gone.png does not exist"):
        content_hash(str(tmp_path / "gone.png"), "row 3, image 1")


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    (tmp_path / "x.partial").touch()
    feature_store.remove_abandoned(tmp_path)
    assert (tmp_path / "x.partial").exists()
    monkeypatch.setattr(feature_store, "_ABANDONED", -1)
    feature_store.remove_abandoned(tmp_path)
    assert not (tmp_path / "x.partial").exists()


# ------------------------------------------------------------------------------------- a bridge


def opened(model, processor, folder, **options):
    cache = FeatureCache(model, processor.image_processor, folder, **options)
    cache.open()
    return cache


def test_a_folder_belongs_to_weights_preprocessing_and_type(make_bridge):
    model, processor = make_bridge()

    def name(model=model, image_processor=processor.image_processor, dtype=torch.bfloat16, **own):
        return folder_name(describe(model, image_processor, dtype, **{"autocast": None} | own))

    others = [name(), name(dtype=torch.float32), name(autocast=torch.bfloat16)]
    for part, value in (("image_mean", [0.1] * 3), ("fit", "pad"), ("resample", 0)):
        changed = type(processor.image_processor)(
            **{**processor.image_processor.to_dict(), part: value}
        )
        others.append(name(image_processor=changed))
    tiles = make_bridge(resolution=ResolutionConfig("tiles"))
    others.append(name(*(tiles[0], tiles[1].image_processor)))
    model.config.identities["vision_encoder"]["sha256"] = "other weights"
    others.append(name())
    model.config.vision_encoder["init_args"]["layers"] = [-2]
    others.append(name())
    model.vision_encoder.model.blocks[0].mlp.act = torch.nn.ReLU()  # weights alike
    others.append(name())
    assert len(set(others)) == len(others)


def test_connectors_share_a_folder(make_bridge):
    from mmpeft.connectors.pool import PoolConnectorConfig

    names = []
    for connector in (None, PoolConnectorConfig(factor=2)):
        model, processor = make_bridge(connector=connector)
        names.append(folder_name(describe(model, processor.image_processor, torch.float32, None)))
    assert names[0] == names[1]


def chats(images):
    """Text alone, one picture, several in a row, one of them again, other shapes."""
    tall = Image.fromarray(torch.arange(90 * 40 * 3, dtype=torch.uint8).view(90, 40, 3).numpy())
    return [
        [user(images[0], "red?"), assistant("yes")],
        [user("no picture"), assistant("none")],
        [user(images[1], images[0], "both?"), assistant("two")],
        [user(images[0], tall, images[2], "all?"), assistant("three")],
    ]


MODES = {
    "fixed": {},
    "tiles": {"resolution": ResolutionConfig("tiles")},
    "native": {"resolution": ResolutionConfig("native", max_area=2)},
    "instruction": {
        "connector": QFormerConnectorConfig(
            num_query_tokens=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, vocab_size=300, max_position_embeddings=64, instruction=True,
            tokenizer="set by the test",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_learns_the_same_new_half_known_and_known(
    make_bridge, images, tmp_path, encoded, llm_dir, mode
):
    if mode == "instruction":
        MODES[mode]["connector"].tokenizer = llm_dir
    model, processor = make_bridge(**MODES[mode])
    rows = chats(images)
    dataset = ConversationDataset(InMemory(rows, [None] * len(rows)), "train", processor)
    calibrate(model, dataset)
    collate = Collator(0)
    model.train().connector.requires_grad_(True)

    def gradients(batch):
        torch.manual_seed(0)  # the Q-Former has dropout
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss, *(p.grad for p in model.connector.parameters() if p.grad is not None)]

    assert len(gradients(collate([dataset[0]]))) > 2
    expected = gradients(collate(list(dataset)))
    for folder, known in (("a", 0), ("a", 4), ("b", 1)):
        cache = opened(model, processor, tmp_path / folder, dtype=torch.float32)
        dataset.store = cache.store
        if known == 1:  # the first row's picture alone
            cache.resolve(collate([dataset[0]]))
            cache.flush()
        batch = collate(list(dataset))
        assert ("cached_features" in batch, "pixel_values" in batch) == (known > 0, known < 4)
        encoded.clear()
        batch = cache.resolve(batch)
        assert encoded == {0: [4], 1: [3], 4: []}[known]  # each different picture once
        torch.testing.assert_close(gradients(batch), expected, atol=1e-5, rtol=1e-3)
        cache.flush()
    text = collate([dataset[1]])
    assert cache.resolve(text).keys() == text.keys()


def test_new_and_known_pictures_are_rounded_alike(tiny, images, tmp_path):
    model, processor = tiny
    pictures = processor.pictures([user(images[0])])
    plain = model.encode_images(**processor.image_inputs(pictures))[0]
    for dtype in (torch.bfloat16, torch.float32):
        cache = opened(model, processor, tmp_path, dtype=dtype)
        new = cache.resolve(cache.store.image_inputs(processor, pictures))["image_features"][0]
        waiting = cache.resolve(cache.store.image_inputs(processor, pictures))["image_features"][0]
        cache.flush()
        known = cache.resolve(cache.store.image_inputs(processor, pictures))["image_features"][0]
        kept_off = cache.resolve(processor.image_inputs(pictures))["image_features"][0]
        for features in (new, waiting, known, kept_off):
            assert features.equal(plain.to(dtype))
        assert cache.encoded == 2


# ------------------------------------------------------------------------------------ training


def test_losses_are_those_without_a_cache(recipe, encoded):
    plain = losses(cached(recipe, name="plain", cache="off"))
    exact = losses(cached(recipe, "--speed.feature_cache_dtype", "float32", name="exact"))
    rounded = losses(cached(recipe, name="rounded"))
    assert plain.keys() == exact.keys() == rounded.keys()
    torch.testing.assert_close(list(exact.values()), list(plain.values()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(list(rounded.values()), list(plain.values()), atol=0.05, rtol=0.02)
    encoded.clear()
    assert losses(cached(recipe, name="again")) == rounded and sum(encoded) == 1  # its size


@pytest.mark.parametrize("workers", [0, 2])
def test_no_picture_is_encoded_twice(recipe, images, encoded, workers):
    for i in range(12):  # 12 different ones in 12 rows
        images[0].rotate(i).save(recipe.parent / f"{i}.png")
    stage = [f"--instruct.dataloader_num_workers={workers}", "--instruct.max_steps", "14"]
    cached(recipe, *stage)  # 28 samples and more in all
    assert sum(encoded) == 1 + 12
    encoded.clear()
    images[1].save(recipe.parent / "3.png")  # another picture under the same name
    cached(recipe, *stage, name="second")
    assert sum(encoded) == 1 + 1
    encoded.clear()
    layers = ["--model.vision_encoder.init_args.layers", "[-2]"]
    cached(recipe, *stage, *layers, name="third")
    assert sum(encoded) == 1 + 12
    assert len(list((recipe.parent / "features").glob("*/meta.json"))) == 2


def test_several_chats_a_sample(recipe, encoded):
    options = ["--data.chats_per_sample", "4", "--speed.feature_cache_dtype", "float32"]
    plain = losses(cached(recipe, *options, name="plain", cache="off"))
    encoded.clear()
    with_cache = losses(cached(recipe, *options))
    assert sum(encoded) == 1 + 3  # pictures 0, 3, 6 and 9 are one
    torch.testing.assert_close(
        list(with_cache.values()), list(plain.values()), rtol=1e-5, atol=1e-5
    )


def test_an_interrupted_epoch_is_kept_and_the_run_goes_on(recipe, encoded, monkeypatch):
    from mmpeft.trainer import BridgeTrainer

    reference = losses(cached(recipe, name="whole"))
    shutil.rmtree(recipe.parent / "features")
    step = BridgeTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(BridgeTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(recipe)
    assert shards(recipe.parent / "features")
    monkeypatch.setattr(BridgeTrainer, "training_step", step)
    encoded.clear()
    run = train(
        recipe,
        ["--speed.feature_cache", "on", "--speed.feature_cache_dir",
         str(recipe.parent / "features"), "--output_dir", str(recipe.parent / "run")],
        resume=True,
    )  # fmt: skip
    assert sum(encoded) == 1
    assert losses(run).keys() == reference.keys()
    torch.testing.assert_close(
        list(losses(run).values()), list(reference.values()), atol=1e-4, rtol=1e-4
    )


def test_a_mistake_in_the_data_is_named_as_without(recipe):
    (recipe.parent / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"data.jsonl line 4: image 1: .*3.png is not an image"):
        cached(recipe)
    (recipe.parent / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"data.jsonl line 4: image 1: .*3.png does not"):
        cached(recipe)


# ----------------------------------------------------------------------- room, gain and messages


def test_what_fits_is_kept(recipe, encoded, capsys, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_PICTURES", 1)
    one = 16 * 64 * 2
    run = cached(recipe, "--speed.feature_cache_gb", str(2.5 * one / 1e9))
    errors = capsys.readouterr().err
    assert re.search(r"feature cache: /.*: about 24.6 kB at most, 0 pictures .* room for 5.12 kB; "
                     r"what fits is kept. Raise speed.feature_cache_gb", errors)  # fmt: skip
    assert errors.count("feature cache: no room for more than") == 1
    assert 1 <= len(shards(recipe.parent / "features")) <= 2
    assert losses(run) == losses(cached(recipe, name="all"))  # rounded alike


@pytest.mark.parametrize(("encoding", "reading"), [(2e-3, 1e-3), (1e-3, 2e-3)])
def test_auto_takes_what_is_quicker(recipe, capsys, monkeypatch, encoding, reading):
    monkeypatch.setattr(feature_setup, "_seconds_to_encode", lambda *_: encoding)
    monkeypatch.setattr(feature_setup, "_seconds_to_read", lambda *_: reading)
    run = cached(recipe, cache="auto")
    errors = capsys.readouterr().err
    if encoding > reading:
        assert "a picture takes 2 ms to encode, 1 to read." in errors
        assert shards(recipe.parent / "features")
    else:
        assert (
            "feature cache: off, it would lose: encoding a picture takes 1 ms, finding and reading "
            "its features 2 ms (speed.feature_cache: on forces it)."
        ) in errors
        assert not shards(recipe.parent / "features")
    assert losses(run) == losses(cached(recipe, name="forced"))  # no loss depends on a timing


def test_auto_measures(recipe, tmp_path):
    run = cached(recipe, cache="auto")
    assert run.is_dir()
    assert not list((tmp_path / "features").glob("probe-*"))


def test_a_folder_that_cannot_be_used(recipe, capsys):
    (recipe.parent / "features").write_text("a file")
    with pytest.raises(ValueError, match=r"speed.feature_cache_dir .*features cannot be used"):
        cached(recipe)
    cached(recipe, cache="auto")
    assert re.search(r"feature cache: off: .*features cannot be used", capsys.readouterr().err)


def test_a_full_disk_stops_the_cache_not_the_run(recipe, capsys, monkeypatch):
    def full(folder, pictures):
        raise OSError("No space left on device")

    monkeypatch.setattr(feature_cache, "write_shard", full)
    cached(recipe)
    errors = capsys.readouterr().err
    assert errors.count("cannot be written to (No space left on device); nothing more is kept") == 1


FLIP = ["--data.augmentation", "[{class_path: RandomHorizontalFlip, init_args: {p: 1.0}}]"]


def test_augmentation_reaches_the_encoder_and_turns_the_cache_off(recipe, capsys, images):
    plain = losses(cached(recipe, cache="off"))
    flipped = losses(cached(recipe, *FLIP, cache="auto", name="flipped"))
    line = "feature cache: off: data.augmentation shows each picture differently every time."
    assert line in capsys.readouterr().err
    for i in range(12):
        images[i % 3].transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(recipe.parent / f"{i}.png")
    assert flipped == losses(cached(recipe, cache="off", name="turned")) != plain
    with pytest.raises(ValueError, match="feature_cache is on, but data.augmentation"):
        cached(recipe, *FLIP, name="on")
    with pytest.raises(ValueError, match="there is nothing to keep"):
        feature_fill.fill(recipe, FLIP)
    with pytest.raises(ValueError, match="unknown class 'RandomHorizontalFlop'.*Flip"):
        cached(recipe, FLIP[0], FLIP[1].replace("Flip", "Flop"), name="on")


def test_augmentation_must_leave_what_tokens_are_counted_from(recipe):
    tiles = ["--model.resolution.mode", "tiles"]
    crop = "[{class_path: RandomCrop, init_args: {size: [30, 30]}}]"
    with pytest.raises(ValueError, match=r"line 1: image 1: .*RandomCrop makes 30 x 30 pixels of"):
        cached(recipe, FLIP[0], crop, *tiles, cache="off")
    cached(recipe, FLIP[0], crop, cache="off")
    tensor = "[{class_path: torchvision.transforms.v2.PILToTensor}]"
    with pytest.raises(ValueError, match="PILToTensor gives a Tensor; use one that gives a PIL"):
        cached(recipe, FLIP[0], tensor, cache="off", name="tensor")


# --------------------------------------------------------------------------------- mmpeft cache


@pytest.mark.parametrize("workers", [0, 2])
def test_after_mmpeft_cache_training_encodes_nothing(recipe, encoded, capsys, jsonl, workers):
    captions = [{"messages": [user(), assistant("an owl")]} for _ in range(2)]
    for row in captions:
        row["messages"][0]["content"] = [{"type": "image", "image": "caption.png"}]
    Image.new("RGB", (50, 60), "red").save(recipe.parent / "caption.png")
    options = [
        "--speed.feature_cache_dir", str(recipe.parent / "features"), "--data.align", "Messages",
        "--data.align.init_args.train", str(jsonl(captions, "captions.jsonl")),
        "--instruct.dataloader_num_workers", str(workers),
    ]  # fmt: skip
    for time in (1, 2):
        encoded.clear()
        assert cli.main(["cache", str(recipe), "--json", *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["schema"] == "mmpeft.cache/1" and report["complete"]
        assert (report["pictures"], report["kept"], report["samples"]) == (4, 4, 14)
        assert report["encoded"] == (4 if time == 1 else 0)
        assert report["bytes"] == sum(p.stat().st_size for p in shards(recipe.parent / "features"))
    assert not (recipe.parent / "run").exists()
    encoded.clear()
    train(recipe, [*options, "--speed.feature_cache", "on"])
    assert sum(encoded) == 1
    assert cli.main(["cache", str(recipe), *options]) == 0
    assert "0 of 4 pictures encoded" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_mmpeft_cache_names_a_mistake_in_one_line(recipe, capsys, workers):
    (recipe.parent / "11.png").write_bytes(b"no picture")
    options = [
        "--speed.feature_cache_dir",
        str(recipe.parent / "features"),
        "--instruct.dataloader_num_workers",
        str(workers),
        "--data.chats_per_sample",
        "1",
    ]
    assert cli.main(["cache", str(recipe), *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("mmpeft: error: ") and "line 12: image 1: " in last


def test_mmpeft_cache_stops_at_the_limit(recipe, capsys):
    options = ["--speed.feature_cache_dir", str(recipe.parent / "features"),
               "--speed.feature_cache_gb", "5e-6"]  # fmt: skip
    assert cli.main(["cache", str(recipe), *options]) == 0
    shown = capsys.readouterr()
    assert "not all, see above" in shown.out and "no room for more" in shown.err
    assert feature_store.bytes_in(recipe.parent / "features") < 6000


@pytest.mark.parametrize("value", ["on", "off", "true", "false", "auto"])
def test_on_and_off_are_words_in_yaml_too(tmp_path, value):
    from mmpeft import config

    from .test_config import write_recipe

    path = write_recipe(tmp_path)
    expected = {"true": "on", "false": "off"}.get(value, value)
    assert config.load(path, ["--speed.feature_cache", value])[0].speed.feature_cache == expected
    path.write_text(path.read_text().replace("feature_cache: off", f"feature_cache: {value}"))
    speed, resolved = config.load(path)[0].speed, config.load(path)[1]
    assert speed.feature_cache == expected
    path.write_text(resolved)
    assert config.load(path)[0].speed == speed
    with pytest.raises(ValueError, match="feature_cache_gb is 0.0; it must be above 0"):
        config.load(path, ["--speed.feature_cache_gb", "0"])


def test_an_imported_bridge_keeps_its_own_image_processor(tmp_path, images, encoded):
    from mmpeft import BridgeProcessor

    from .test_hf import tiny_llava

    tiny_llava(tmp_path / "llava")
    model = BridgeForConditionalGeneration.from_hf(str(tmp_path / "llava"))
    processor = BridgeProcessor.from_model(model)
    rows = [[user(images[0], "red?"), assistant("yes")], [user(images[1]), assistant("no")]]
    dataset = ConversationDataset(InMemory(rows, [None] * 2), "train", processor)
    expected = model(**Collator(0)(list(dataset))).loss
    cache = opened(model, processor, tmp_path / "features", dtype=torch.float32)
    assert feature_setup.estimate(cache, [dataset])[0] > 0
    dataset.store = cache.store
    for new in (2, 0):
        encoded.clear()
        loss = model(**cache.resolve(Collator(0)(list(dataset)))).loss
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        assert sum(encoded) == new
        cache.flush()


def test_the_writer_is_handed_copies_that_need_no_more_work(recipe, monkeypatch):
    """Its thread must not start OpenMP workers, as copying in it would."""
    seen, write = [], feature_cache.write_shard

    def look(folder, pictures):
        seen.extend(features for features, _ in pictures.values())
        return write(folder, pictures)

    monkeypatch.setattr(feature_cache, "write_shard", look)
    cached(recipe)
    assert seen and all(features.is_contiguous() for features in seen)
    assert all(f.untyped_storage().nbytes() == f.nbytes for f in seen)  # no view of a batch
