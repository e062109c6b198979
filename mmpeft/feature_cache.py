"""Features of the frozen encoder, computed once: kept on disk for later epochs, stages and runs.

What the encoder makes of a picture never changes while its weights, its preprocessing and the
picture's bytes do not, so it is kept under all three (before the connector, which trains). A folder
of features belongs to one encoder and one preprocessing and says so in its ``meta.json``; a picture
in it is known by the hash of its content, never by its path.

Features of a float32 encoder are rounded to ``speed.feature_cache_dtype``, found or new, kept or
not: no loss depends on what the cache happened to hold.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from mmpeft.cache import cache_home
from mmpeft.config import STAGES, RunConfig, load
from mmpeft.data import join_images, named_in_workers
from mmpeft.feature_store import FeatureStore, bytes_in, remove_abandoned, write_shard
from mmpeft.images import content_hash, image_size, load_image

FORMAT = 1
LIBRARIES = ("torch", "torchvision", "pillow", "transformers", "timm", "open_clip_torch")
SHARD_BYTES, SHARD_PICTURES = 64_000_000, 2048  # a shard is written when it has either
SPARE_DISK = 1_000_000_000  # bytes of the disk that are left free
LOOKED_AT = 64  # samples that the size is estimated from
TIMED = 8  # pictures that are timed
FILL_BATCH = 16  # pictures that `mmpeft cache` encodes at a time


class FeatureCache:
    """Looks features up, encodes what is new, and writes it in the background.

    Lives where the model is; data sets, which may be in workers, only hold its ``store``.

    Args:
        model: the bridge whose ``vision_encoder`` it serves.
        image_processor: what makes its pixels.
        root: folder of all features; this encoder's get a folder in it.
        dtype: what features are rounded to; those of a 16-bit encoder are kept as they are.
        limit: bytes that ``root`` may hold.
        autocast: floating type that the encoder is run in by autocast, ``None`` runs it as it is.

    Attributes:
        store: the :class:`~mmpeft.feature_store.FeatureStore`; ``None`` keeps nothing (and still
            rounds).
        full: nothing more is written; the reason has been printed.
        encoded: pictures encoded so far.
    """

    def __init__(
        self, model, image_processor, root, dtype=torch.bfloat16, limit: float = float("inf"),
        autocast: torch.dtype | None = None,
    ):  # fmt: skip
        self.model, self.root, self.limit, self.autocast = model, Path(root), limit, autocast
        height, width = model.layout.size
        own = self._run(torch.zeros(1, 3, height, width, device=self.device))[0]
        self.shape = tuple(own.shape[1:])  # (K + P, D) of one tile
        self.dtype = own.dtype if own.dtype.itemsize == 2 else dtype
        self.description = describe(model, image_processor, self.dtype, autocast)
        self.store = FeatureStore(self.root / folder_name(self.description), self.dtype,
                                  model.layout.size)  # fmt: skip
        self.full, self.encoded = False, 0
        self._pending, self._waiting, self._writes = {}, {}, []
        self._waiting_bytes, self._left = 0, 0
        self._writer = None

    @property
    def device(self) -> torch.device:
        return next(self.model.vision_encoder.parameters()).device

    def open(self) -> None:
        """Make the folder and see how much may be written.

        Raises:
            OSError: the folder cannot be made.
        """
        folder = self.store.folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        partial = folder / f"{uuid.uuid4().hex}.partial"
        partial.write_text(json.dumps(self.description, indent=2) + "\n")
        partial.rename(folder / "meta.json")
        self._left = self.room()

    def room(self) -> float:
        """Bytes that may still be written, by the limit and by the disk."""
        free = shutil.disk_usage(self.root).free - SPARE_DISK
        return max(0, min(self.limit - bytes_in(self.root), free))

    # ------------------------------------------------------------------------------ in training

    def resolve(self, inputs: dict) -> dict:
        """A batch with ``image_features`` (a list, as ``encode_images`` gives them) for its images.

        ``inputs`` holds what :func:`mmpeft.data.join_images` makes of the store's image inputs, or
        plain pixels, or no image at all: then nothing is changed.
        """
        inputs = dict(inputs)
        keys, pixels = inputs.pop("image_keys", None), inputs.pop("pixel_values", None)
        shapes, flat = inputs.pop("cached_shapes", None), inputs.pop("cached_features", None)
        if keys is None:
            if pixels is None:
                return inputs
            return inputs | {"image_features": self._encode(pixels, inputs.get("image_sizes"))}
        rows = [tiles * rows for tiles, rows in shapes]
        parts = [None] * len(keys) if flat is None else flat.to(self.device).split(rows)
        features = [
            None if tiles == 0 else part.unflatten(0, (tiles, -1))
            for part, (tiles, _) in zip(parts, shapes, strict=True)
        ]
        new = [i for i, (tiles, _) in enumerate(shapes) if tiles == 0]
        if new:
            made = self._encode_new([keys[i] for i in new], pixels, inputs["image_sizes"][new])
            for i in new:
                features[i] = made[keys[i]]
        return inputs | {"image_features": features}

    def _encode_new(self, keys: list[str], pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Features by key of the pictures ``pixels`` holds; each different one is encoded once."""
        layout, first, chosen, made, start = self.model.layout, [], [], {}, 0
        for i, (key, size) in enumerate(zip(keys, layout.sizes(sizes, len(keys)), strict=True)):
            tiles = range(start, start := start + layout.tiles(size))
            if key in made:
                continue
            made[key] = self._known(key)
            if made[key] is None:
                first.append(i)
                chosen += tiles
        if first:
            encoded = self._encode(pixels[chosen], sizes[first])
            for i, features in zip(first, encoded, strict=True):
                made[keys[i]] = features
                self._keep(keys[i], features, tuple(sizes[i].tolist()))
        return made

    def _known(self, key: str) -> Tensor | None:
        """Features that came since a worker looked."""
        found = self._pending.get(key)
        if found is None and self.store is not None:
            found = self.store.get(key)
        return None if found is None else found[0].to(self.device, copy=True)

    def _encode(self, pixels: Tensor, sizes: Tensor | None) -> list[Tensor]:
        encoded = self._run(pixels.to(self.device), sizes)
        self.encoded += len(encoded)
        return [features.to(self.dtype) for features in encoded]

    @torch.no_grad()
    def _run(self, pixels: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
        run = nullcontext()
        if self.autocast is not None:
            run = torch.autocast(pixels.device.type, self.autocast)
        with run:
            return self.model.encode_images(pixels, sizes)

    # ---------------------------------------------------------------------------------- writing

    def _keep(self, key: str, features: Tensor, size: tuple[int, int]) -> None:
        if self.store is None or self.full:
            return
        if features.nbytes > self._left:
            self._stop(
                f"no room for more than {bytes_text(bytes_in(self.root) + self._waiting_bytes)} in "
                f"{self.root} (speed.feature_cache_gb, or the disk); the pictures that are not "
                "there are encoded each time"
            )
            return
        if features.device.type == "cpu":
            # Copied here, not by the writer: a second thread that copies starts OpenMP workers of
            # its own, and when there are more of them than cores all go to sleep between kernels.
            features = features.clone(memory_format=torch.contiguous_format)
        self._left -= features.nbytes
        self._waiting_bytes += features.nbytes
        self._pending[key] = self._waiting[key] = features, size
        if self._waiting_bytes >= SHARD_BYTES or len(self._waiting) >= SHARD_PICTURES:
            self._submit()

    def _submit(self) -> None:
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "feature-cache")
        while len(self._writes) > 1:  # a slow disk must not fill the memory
            self._writes.pop(0).result()
        self._writes.append(self._writer.submit(self._write, self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _write(self, pictures: dict) -> None:
        try:
            write_shard(self.store.folder, pictures)
        except OSError as error:
            self._stop(f"{self.store.folder} cannot be written to ({error}); nothing more is kept")
        for key in pictures:
            del self._pending[key]
        self._left = self.room() - sum(f.nbytes for f, _ in list(self._pending.values()))

    def _stop(self, why: str) -> None:
        if not self.full:
            say(f"{why}.")
        self.full = True

    def flush(self) -> None:
        """Return when everything encoded so far is on disk."""
        if self._waiting:
            self._submit()
        for write in self._writes:
            write.result()
        self._writes = []


class FlushFeatures(TrainerCallback):
    """Puts an epoch's features on disk before the next one looks for them."""

    def __init__(self, cache: FeatureCache):
        self.cache = cache

    def on_epoch_end(self, args, state, control, **kwargs):
        self.cache.flush()


# ------------------------------------------------------------------------------------- a folder


def describe(model, image_processor, dtype: torch.dtype, autocast: torch.dtype | None) -> dict:
    """Everything that features depend on besides the picture."""
    pixels = image_processor.to_dict()
    for name in ("processor_class", "_processor_class"):
        pixels.pop(name, None)
    if pixels.get("resolutions"):  # the tokens of a size are the connector's affair
        pixels["resolutions"] = [[height, width] for height, width, _ in pixels["resolutions"]]
    description = {
        "format": FORMAT,
        "made with": {name: version(name) for name in LIBRARIES},
        "weights": model.config.identities["vision_encoder"]["sha256"],
        "vision_encoder": model.config.vision_encoder,
        "pixels": {name: value for name, value in pixels.items() if value is not None},
        "resolution": model.layout.config.mode,
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
    return json.loads(json.dumps(description, sort_keys=True, default=str))


def folder_name(description: dict) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]


# -------------------------------------------------------------------------------- before a run


def prepare(model, processor, config: RunConfig, datasets: list) -> FeatureCache | None:
    """The cache that a recipe asks for, tried and given to the data sets; prints one line on it.

    Args:
        datasets: every :class:`~mmpeft.data.ConversationDataset` that is trained on, once.

    Returns:
        ``None`` where features are as the encoder gives them: ``feature_cache: off``,
        augmentation, or no pictures.

    Raises:
        ValueError: ``feature_cache: on``, but the folder cannot be used.
    """
    speed, wanted = config.speed, config.speed.feature_cache
    if wanted == "off":
        return None
    if config.data.augmentation:
        say("off: data.augmentation shows each picture differently every time.")
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
        times = measure(cache, processor, pictures) if wanted == "auto" else None
    except OSError as error:
        if wanted == "on":
            raise ValueError(
                f"speed.feature_cache_dir {cache.root} cannot be used ({error}); choose another "
                "folder, or set speed.feature_cache: off."
            ) from None
        say(f"off: {cache.root} cannot be used ({error}).")
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

    From the sizes of the pictures of evenly spread samples; a picture that several samples show is
    counted each time.
    """
    total, pictures = 0.0, []
    for dataset in datasets:
        step = max(1, len(dataset) // LOOKED_AT)
        looked_at, taken = range(0, len(dataset), step)[:LOOKED_AT], 0
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
    step = max(1, len(pictures) // TIMED)
    pictures = pictures[::step][:TIMED]
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


def say(text: str) -> None:
    print(f"feature cache: {text}", file=sys.stderr)


def bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000


# --------------------------------------------------------------------------------- mmpeft cache


def fill(recipe, overrides: list[str] = ()) -> dict:
    """Encode the training pictures of every stage of a recipe that are not kept yet.

    Args:
        recipe: YAML file, see ``configs/``.
        overrides: command-line style, as for training.

    Returns:
        the report, ``mmpeft.cache/1``; see ``docs/json.md``.

    Raises:
        ValueError: a bad recipe or row, or a recipe that augments its pictures.
    """
    from tqdm import tqdm

    from mmpeft import train
    from mmpeft.training_data import TrainingData

    config, _ = load(recipe, overrides)
    if config.data.augmentation:
        raise ValueError(
            f"{recipe}: data.augmentation shows each picture differently every time, so there is "
            "nothing to keep."
        )
    config.speed.feature_cache = "on"
    model, processor = train.build(config)
    train.place_encoder(model, config)
    datasets = TrainingData.load(model, processor, config).sources
    cache = prepare(model, processor, config, datasets)
    start, keys, stages = time.perf_counter(), set(), [config.align, config.instruct]
    loader = DataLoader(
        _NewPictures(datasets, cache.store), FILL_BATCH, collate_fn=lambda samples: samples,
        num_workers=max(stage.dataloader_num_workers for stage in stages if stage is not None),
    )  # fmt: skip
    with tqdm(total=len(loader.dataset), unit="sample", desc="encoding") as bar:
        try:
            for samples in loader:
                keys.update(key for sample in samples for key in sample["seen"])
                cache.resolve(join_images([s for s in samples if "image_keys" in s]))
                bar.update(len(samples))
                if cache.full:
                    break
        finally:
            cache.flush()
    return {
        "schema": "mmpeft.cache/1",
        "recipe": str(recipe),
        "folder": str(cache.store.folder),
        "dtype": cache.description["dtype"],
        "samples": len(loader.dataset),
        "pictures": len(keys),
        "encoded": cache.encoded,
        "kept": len(cache.store),
        "bytes": bytes_in(cache.store.folder),
        "complete": not cache.full,
        "seconds": round(time.perf_counter() - start, 3),
    }


def render(report: dict) -> str:
    """The report of :func:`fill` for a reader."""
    rest = "" if report["complete"] else "; not all, see above"
    return (
        f"{report['folder']}: {report['encoded']} of {report['pictures']} pictures encoded in "
        f"{report['seconds']:.1f} s; {report['kept']} kept ({bytes_text(report['bytes'])}, "
        f"{report['dtype']}){rest}"
    )


class _NewPictures(Dataset):
    """Image inputs of the pictures of each sample that neither store nor process has met."""

    def __init__(self, datasets: list, store: FeatureStore):
        self.places = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
        self.store, self.met = store, set()

    def __len__(self):
        return len(self.places)

    def __getitem__(self, number: int) -> dict:
        with named_in_workers() as names:
            return self._inputs(*self.places[number], names)

    def _inputs(self, dataset, index: int, names: list[str]) -> dict:
        pictures, where = dataset.pictures(index)
        names.append(where)
        called = [f"{where}: image {n}" for n in range(1, len(pictures) + 1)]
        keys = [content_hash(p.source, name) for p, name in zip(pictures, called, strict=True)]
        sample, new = {"seen": keys}, {}
        for key, picture, name in zip(keys, pictures, called, strict=True):
            if key not in self.met and key not in self.store:
                new[key] = load_image(picture.source, name)
            self.met.add(key)
        if not new:
            return sample
        pixel_values, sizes = self.store.pixels(dataset.processor, list(new.values()))
        return sample | {
            "image_keys": list(new),
            "cached_shapes": [[0, 0]] * len(new),
            "pixel_values": pixel_values,
            "image_sizes": torch.tensor(sizes),
        }
