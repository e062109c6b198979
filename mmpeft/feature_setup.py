"""Before a run: whether features are kept, how much they will take, and whether that is quicker."""

import os
import tempfile
import time
from pathlib import Path

import torch

from mmpeft.cache import cache_home
from mmpeft.config import STAGES, RunConfig
from mmpeft.feature_cache import FeatureCache, bytes_text, say
from mmpeft.feature_store import FeatureStore, bytes_in, write_shard
from mmpeft.images import content_hash, image_size, load_image
from mmpeft.streaming import some

LOOKED_AT = 64  # samples that the size is estimated from
TIMED = 8  # pictures that are timed


def prepare(
    model, processor, config: RunConfig, datasets: list, kept: bool | None = None
) -> FeatureCache | None:
    """The cache that a recipe asks for, tried and given to the data sets; prints one line on it.

    Args:
        datasets: every :class:`~mmpeft.data.ConversationDataset` that is trained on, once.
        kept: what ``auto`` found when the run began, which holds for all of it; ``None`` finds out.

    Returns:
        ``None`` where features are as the encoder gives them: ``feature_cache: off``,
        augmentation, a stream, or no pictures.

    Raises:
        ValueError: ``feature_cache: on``, but the folder cannot be used.
    """
    speed, wanted = config.speed, config.speed.feature_cache
    if wanted == "off":
        return None
    if config.data.augmentation:
        say("off: data.augmentation shows each picture differently every time.")
        return None
    if config.data.streams:
        say("off: the rows are streamed, so what it would take is not known.")
        return None
    stages = [getattr(config, name) for name in STAGES if getattr(config, name) is not None]
    cache = FeatureCache(
        model, processor.image_processor, speed.feature_cache_dir or cache_home() / "features",
        getattr(torch, speed.feature_cache_dtype), 1e9 * speed.feature_cache_gb, _autocast(stages),
    )  # fmt: skip
    size, pictures = estimate(cache, datasets)
    if not pictures and wanted == "auto":
        say(f"off: no pictures in {LOOKED_AT} samples.")
        return None
    try:
        cache.open()
        asked = wanted == "auto" and kept is None
        times = measure(cache, processor, pictures) if asked else None
    except OSError as error:
        if wanted == "on":
            raise ValueError(
                f"speed.feature_cache_dir {cache.root} cannot be used ({error}); choose another "
                "folder, or set speed.feature_cache: off."
            ) from None
        say(f"off: {cache.root} cannot be used ({error}).")
        cache.store = None
        return cache
    if wanted == "auto" and kept is False:
        say("off, as when the run began.")
        cache.store = None
        return cache
    if times is not None and times[1] >= times[0]:
        say(
            f"off, it would lose: encoding a picture takes {1e3 * times[0]:.2g} ms, finding and "
            f"reading its features {1e3 * times[1]:.2g} ms (speed.feature_cache: on forces it)."
        )
        cache.store = None
        return cache
    for dataset in datasets:
        dataset.store = cache.store
    _announce(cache, size, times)
    return cache


def _announce(cache: FeatureCache, size: float, times: tuple[float, float] | None) -> None:
    there, room = bytes_in(cache.store.folder), cache.room()
    line = (
        f"{cache.store.folder}: about {bytes_text(size)} at most, {len(cache.store)} pictures "
        f"({bytes_text(there)}) are there; room for {bytes_text(room)}"
    )
    if times is not None:
        line += f"; a picture takes {1e3 * times[0]:.2g} ms to encode, {1e3 * times[1]:.2g} to read"
    if size - there > room:
        line += (
            "; what fits is kept. Raise speed.feature_cache_gb, or remove folders of encoders no "
            f"longer used from {cache.root}"
        )
    say(line + ".")


def estimate(cache: FeatureCache, datasets: list) -> tuple[float, list]:
    """Bytes that all features will take at most, and some pictures with their names.

    From the sizes of the pictures of some samples; a picture that several samples show is
    counted each time.
    """
    total, pictures = 0.0, []
    for dataset in datasets:
        looked_at, taken = some(dataset, LOOKED_AT), 0
        for index in looked_at:
            own, where = dataset.pictures(index)
            named = [(p, f"{where}: image {n}") for n, p in enumerate(own, 1)]
            taken += sum(_bytes(cache, dataset.processor, *one) for one in named)
            pictures += named
        total += taken / max(1, len(looked_at)) * len(dataset)
    return total, pictures


def _bytes(cache: FeatureCache, processor, picture, name: str) -> int:
    layout, (rows, channels) = cache.model.layout, cache.shape
    mode, size = layout.config.mode, layout.size
    if mode != "fixed":
        size = processor.image_processor.target(*image_size(picture.source, name))
    if mode == "native":
        height, width = layout.encoder.grid_of(*size)
        rows = height * width + layout.encoder.num_prefix_tokens
    return layout.tiles(size) * rows * channels * cache.dtype.itemsize


def measure(cache: FeatureCache, processor, pictures: list) -> tuple[float, float]:
    """Seconds a picture takes: to decode, resize and encode; to hash and to read from the disk."""
    pictures = [pictures[n] for n in some(pictures, TIMED)]
    return tuple(f(cache, processor, pictures) for f in (_seconds_to_encode, _seconds_to_read))


def _seconds_to_encode(cache: FeatureCache, processor, pictures: list) -> float:
    def encode(some):
        loaded = [load_image(picture.source, name) for picture, name in some]
        pixels = processor.image_processor(loaded, return_tensors="pt")
        encoded = cache._run(pixels["pixel_values"].to(cache.device), pixels.get("image_sizes"))
        return encoded[-1].to(cache.dtype).cpu()  # waits for the device

    encode(pictures[:1])  # the first call of anything is slow
    start = time.perf_counter()
    encode(pictures)
    return (time.perf_counter() - start) / len(pictures)


def _seconds_to_read(cache: FeatureCache, processor, pictures: list) -> float:
    """Of a probe in the cache's own folder, put out of the system's memory where it can be."""
    with tempfile.TemporaryDirectory(dir=cache.root, prefix="probe-") as folder:
        channels = cache.shape[1]
        count = sum(_bytes(cache, processor, *one) for one in pictures) // cache.dtype.itemsize
        probe = torch.rand(1, count // channels // len(pictures), channels).to(cache.dtype)
        keys = [f"{i:032x}" for i in range(len(pictures))]
        path = write_shard(Path(folder), {key: (probe.clone(), cache.store.size) for key in keys})
        if hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        store = FeatureStore(folder, cache.dtype, cache.store.size)
        start = time.perf_counter()
        for key, (picture, name) in zip(keys, pictures, strict=True):
            content_hash(picture.source, name)
            store.get(key)[0].clone()
        return (time.perf_counter() - start) / len(pictures)


def _autocast(stages: list) -> torch.dtype | None:
    """What every stage runs the model in by autocast; ``None`` where they differ."""
    kinds = {torch.bfloat16 if s.bf16 else torch.float16 if s.fp16 else None for s in stages}
    if len(kinds) == 1:
        return kinds.pop()
    say("the stages differ in bf16 or fp16, so the encoder runs without autocast.")
    return None
