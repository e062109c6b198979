"""Frozen features on disk: immutable shards that any number of runs read and add to.

A shard is a safetensors file with one tensor ``(tiles, K + P, D)`` for each picture, named by its
content hash, its height and width after resizing, and a checksum of its values. Shards are written
under a temporary name, synced and renamed, so a reader sees whole ones only; the same picture in
two of them does no harm.
"""

import os
import re
import shutil
import sys
import time
import uuid
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmpeft.images import content_hash, load_image

_NAME = re.compile(r"([0-9a-f]{32})\.(\d+)x(\d+)\.([0-9a-f]{8})")
_TICK = 50_000_000  # ns; two changes of a folder within a clock tick leave one time stamp
_ABANDONED = 3600  # seconds after which a half-written shard is that of a killed process


class FeatureStore:
    """Reads the features of one encoder; memory-mapped, in any process, also across pickling.

    Args:
        folder: the shards; need not exist yet.
        dtype: floating type of the stored features.
        size: height and width that a picture is resized to where the image processor gives none.
    """

    def __init__(self, folder, dtype: torch.dtype, size: tuple[int, int]):
        self.folder, self.dtype, self.size = Path(folder), dtype, tuple(size)
        self._forget()

    def _forget(self):
        self._shards, self._index, self._stamp = {}, {}, None

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("folder", "dtype", "size")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        self._rescan()
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        if key not in self._index:
            self._rescan()  # another process may have written it since
        return key in self._index

    def get(self, key: str) -> tuple[Tensor, tuple[int, int]] | None:
        """Features ``(tiles, K + P, D)`` and ``(height, width)`` after resizing; ``None`` if new.

        The tensor lies in the mapped file: do not write to it.
        """
        if key not in self:
            return None
        shard, name = self._index[key]
        _, height, width, checksum = _NAME.fullmatch(name).groups()
        features = self._shards[shard].get_tensor(name)
        whole = features.dtype == self.dtype and features.dim() == 3
        if whole and f"{_checksum(features):08x}" == checksum:
            return features, (int(height), int(width))
        self._index = {k: place for k, place in self._index.items() if place[0] != shard}
        self._refuse(shard, "its values are not those that were written")
        return None

    def _rescan(self):
        try:
            stamp = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if stamp == self._stamp:
            return
        new = [p for p in self.folder.glob("*.safetensors") if p.name not in self._shards]
        for path in sorted(new, key=_written):  # of two copies of a picture the later is taken
            try:
                self._shards[path.name] = safe_open(path, "pt")
                names = self._shards[path.name].keys()
                keys = {_NAME.fullmatch(name)[1]: (path.name, name) for name in names}
            except (SafetensorError, OSError) as error:
                self._refuse(path.name, f"it is torn: {error}")
            except TypeError:  # a name of another form
                self._refuse(path.name, "it was not written by mmpeft")
            else:
                self._index |= keys
        self._stamp = stamp if time.time_ns() - stamp > _TICK else None

    def _refuse(self, shard: str, why: str):
        self._shards[shard] = None
        print(
            f"feature cache: {self.folder / shard} is not used ({why}); its pictures are encoded "
            "again. Remove the file.",
            file=sys.stderr,
        )

    # ----------------------------------------------------------------------- a sample's images

    def image_inputs(self, processor, pictures: list, where: str = "") -> dict:
        """As :meth:`mmpeft.processing.BridgeProcessor.image_inputs`, but pixels of new ones only.

        Returns:
            ``image_keys`` (a hash for each image), ``image_sizes`` (images, 2), ``pixel_values`` of
            the images that are not stored, and of those that are ``cached_features`` (rows, D) and
            ``cached_shapes`` (tiles and rows a tile of each image, 0 where it is not stored).
        """
        names = [f"{where}image {n}" for n in range(1, len(pictures) + 1)]
        keys = [content_hash(p.source, name) for p, name in zip(pictures, names, strict=True)]
        found = [self.get(key) for key in keys]
        inputs = {
            "image_keys": keys,
            "cached_shapes": [[0, 0] if f is None else list(f[0].shape[:2]) for f in found],
            **processor.instruction_inputs(pictures, where),
        }
        if any(f is not None for f in found):
            # one tensor, a copy: many would each take a file descriptor on their way from a worker
            inputs["cached_features"] = torch.cat([f[0].flatten(0, 1) for f in found if f])
        sizes = [self.size if f is None else f[1] for f in found]
        if new := [i for i, f in enumerate(found) if f is None]:
            loaded = [load_image(pictures[i].source, names[i]) for i in new]
            inputs["pixel_values"], own = self.pixels(processor, loaded)
            for i, size in zip(new, own, strict=True):
                sizes[i] = size
        return inputs | {"image_sizes": torch.tensor(sizes)}

    def pixels(self, processor, loaded: list) -> tuple[Tensor, list]:
        """``(tiles, 3, H, W)`` of loaded pictures, and each one's size after resizing."""
        pixels = processor.image_processor(loaded, return_tensors="pt")
        sizes = pixels.get("image_sizes")
        sizes = [self.size] * len(loaded) if sizes is None else sizes.tolist()
        return pixels["pixel_values"], sizes


def write_shard(folder: Path, pictures: dict[str, tuple[Tensor, tuple[int, int]]]) -> Path:
    """Write features and sizes by content hash, all or nothing.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, (features, (height, width)) in pictures.items():
        own = features.detach().cpu().contiguous()
        tensors[f"{key}.{height}x{width}.{_checksum(own):08x}"] = own
    path = folder / f"{uuid.uuid4().hex}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:  # not save_file: that lets nobody else read it
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return path


def bytes_in(folder: Path) -> int:
    """What all shards in a folder and below it take, in bytes."""
    return sum(_size(path) for path in folder.rglob("*.safetensors"))


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left half-written, here and beside it."""
    for path in [*folder.glob("*.partial"), *folder.parent.glob("probe-*")]:
        if time.time() - _written(path) / 1e9 > _ABANDONED:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _checksum(features: Tensor) -> int:
    return zlib.crc32(features.contiguous().view(torch.uint8).flatten().numpy())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # removed meanwhile
        return 0


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
