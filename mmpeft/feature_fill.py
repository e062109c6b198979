"""``mmpeft cache``: the features of all training pictures of a recipe, made ahead of time."""

import time

import torch
from torch.utils.data import DataLoader, Dataset

from mmpeft.bad_rows import KEY as BAD_ROWS
from mmpeft.config import load
from mmpeft.data import join_images, named_in_workers
from mmpeft.feature_cache import bytes_text
from mmpeft.feature_setup import prepare
from mmpeft.feature_store import FeatureStore, bytes_in
from mmpeft.images import content_hash, load_image

FILL_BATCH = 16  # pictures that `mmpeft cache` encodes at a time


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
    if config.data.streams:
        raise ValueError(f"{recipe}: its rows are streamed, so features of them are not kept.")
    config.speed.feature_cache = "on"
    model, processor = train.build(config)
    train.place_encoder(model, config)
    data = TrainingData.load(model, processor, config)
    datasets = data.sources
    cache = prepare(model, processor, config, datasets)
    start, keys, stages = time.perf_counter(), set(), [config.align, config.instruct]
    loader = DataLoader(
        _NewPictures(datasets, cache.store), FILL_BATCH, collate_fn=lambda samples: samples,
        num_workers=max(stage.dataloader_num_workers for stage in stages if stage is not None),
    )  # fmt: skip
    with tqdm(total=len(loader.dataset), unit="sample", desc="encoding") as bar:
        try:
            for samples in loader:
                data.bad_rows.add([row for s in samples for row in s.get(BAD_ROWS, ())])
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
        "bad_rows": len(data.bad_rows.rows),
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
    rest += f"; {report['bad_rows']} bad rows passed over" if report["bad_rows"] else ""
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
            dataset, index = self.places[number]
            return dataset.bad_rows.take(self._inputs(dataset, index, names))

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
