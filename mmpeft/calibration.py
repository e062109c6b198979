"""What a new connector is told about the frozen features before it learns."""

import torch
import torch.nn.functional as F

from mmpeft.data import ConversationDataset, join_images
from mmpeft.language_model import embedding_std
from mmpeft.streaming import some

ROWS = 4  # looked at for each picture wanted: some rows may have none


@torch.no_grad()
def calibrate(model, dataset: ConversationDataset, num_images: int = 256, cache=None) -> None:
    """Give the connector the statistics of the frozen features, from samples of all rows.

    Those of a stream are its first.

    A :class:`~mmpeft.feature_cache.FeatureCache` is used, and filled, where pictures are shown to
    the encoder as in training.
    """
    features, store = [], getattr(dataset, "store", None)
    if model.layout.config.mode == "native":
        cache = None
    if store is not None:
        dataset.store = store if cache else None
    for index in some(dataset, ROWS * num_images):
        images = join_images([dataset[index]])
        if images:  # one picture, or one tile, of each sample
            features.append(_one_of(model, images, len(features), cache))
        if len(features) == num_images:
            break
    if store is not None:
        dataset.store = store
    if features:
        std = embedding_std(model.language_model)
        model.connector.calibrate(torch.cat(features), model.vision_encoder.grid, std)


def _one_of(model, images: dict, number: int, cache) -> torch.Tensor:
    """Features ``(1, K + P, D)`` of one picture, or tile, of a sample's image inputs."""
    if cache is not None:
        tiles = torch.cat(cache.resolve(images)["image_features"])
        return tiles[number % len(tiles)].unsqueeze(0).float().cpu()
    pixel_values = _at_own_size(model, images)
    own = pixel_values[number % len(pixel_values)].unsqueeze(0)
    device = next(model.vision_encoder.parameters()).device
    return model.vision_encoder(own.to(device)).float().cpu()


def _at_own_size(model, sample) -> torch.Tensor:
    """The sample's pixels ``(n, 3, H, W)``, resized to the encoder's own size where they differ."""
    pixel_values, size = sample["pixel_values"], model.layout.size
    if model.layout.config.mode != "native":
        return pixel_values
    sizes = model.layout.sizes(sample["image_sizes"], len(pixel_values))
    images = [image[None, :, :h, :w] for image, (h, w) in zip(pixel_values, sizes, strict=True)]
    return torch.cat([F.interpolate(image, size=size, mode="bilinear") for image in images])
