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
import re
import shutil
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, TrainerCallback

from mmpeft.feature_store import FeatureStore, bytes_in, remove_abandoned, write_shard

FORMAT = 1
LIBRARIES = ("torch", "torchvision", "pillow", "transformers", "timm", "open_clip_torch")
SHARD_BYTES, SHARD_PICTURES = 64_000_000, 2048  # a shard is written when it has either
SPARE_DISK = 1_000_000_000  # bytes of the disk that are left free


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
            # whole batches only: after a kill, the same ones are encoded together as before
            if self._waiting_bytes >= SHARD_BYTES or len(self._waiting) >= SHARD_PICTURES:
                self._submit()
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
        "architecture": architecture(model.vision_encoder),
        "pixels": {name: value for name, value in pixels.items() if value is not None},
        "resolution": model.layout.config.mode,
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
    return json.loads(json.dumps(description, sort_keys=True, default=str))


def architecture(encoder) -> str:
    """A hash of what a model is made of besides weights: layers and, of transformers, configs."""
    configs = [
        part.config.to_dict() for part in encoder.modules()
        if isinstance(getattr(part, "config", None), PreTrainedConfig)
    ]  # fmt: skip
    for config in configs:
        config.pop("_name_or_path", None)
    text = repr(encoder) + json.dumps(configs, sort_keys=True, default=str)
    text = re.sub(" at 0x[0-9a-f]+", "", text)  # where functions are this time
    return hashlib.sha256(text.encode()).hexdigest()


def folder_name(description: dict) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]


def say(text: str) -> None:
    print(f"feature cache: {text}", file=sys.stderr)


def bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
