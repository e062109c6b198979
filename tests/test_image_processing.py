"""Pixels: the right size, the right crop, the same as upstream where upstream has the same."""

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor, ViTImageProcessor

from mmpeft.image_processing import BridgeImageProcessor

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def processor(**options):
    how = {"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD, "resample": 3}
    return BridgeImageProcessor(**how | options)


def test_stretch_is_vits(images):
    theirs = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, resample=3
    )
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    ours = processor()(images, return_tensors="pt")
    assert torch.equal(ours["pixel_values"], expected)
    assert ours["image_sizes"].tolist() == [[32, 32]] * 3


def test_crop_is_clips(images):
    theirs = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN,
        image_std=STD, resample=3,
    )  # fmt: skip
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(fit="crop")(images, return_tensors="pt")["pixel_values"], expected)


def test_pad_letterboxes_with_the_mean_colour():
    red = Image.new("RGB", (64, 16), (255, 0, 0))
    (pixels,) = processor(fit="pad")(red, return_tensors="pt")["pixel_values"]
    assert pixels[:, :12].abs().max() < 0.02 and pixels[:, 20:].abs().max() < 0.02
    assert torch.allclose(pixels[0, 12:20], torch.tensor((1 - MEAN[0]) / STD[0]), atol=1e-4)


RESOLUTIONS = [[32, 32, 4], [32, 64, 15], [64, 32, 15], [64, 64, 24]]


@pytest.mark.parametrize(
    ("width", "height", "target"),
    [(20, 20, (32, 32)), (200, 200, (64, 64)), (120, 60, (32, 64)), (30, 61, (64, 32))],
)
def test_a_picture_takes_the_size_that_serves_it_best(width, height, target):
    made = processor(resolutions=RESOLUTIONS, cut_tiles=True)
    assert made.target(height, width) == target
    assert made.num_image_tokens(height, width) == {(h, w): n for h, w, n in RESOLUTIONS}[target]


def test_a_hair_of_a_picture_still_has_a_size():
    assert processor(resolutions=RESOLUTIONS).target(1, 5000) in {(32, 32), (32, 64)}


def test_tiles_are_the_picture_cut_up_behind_its_thumbnail():
    ramp = torch.arange(64 * 64 * 3, dtype=torch.float).reshape(64, 64, 3) % 251
    picture = Image.fromarray(ramp.to(torch.uint8).numpy())
    made = processor(resolutions=RESOLUTIONS, cut_tiles=True)(picture, return_tensors="pt")
    whole = processor(size={"height": 64, "width": 64})(picture, return_tensors="pt")
    thumbnail, *tiles = made["pixel_values"]
    assert made["image_sizes"].tolist() == [[64, 64]] and len(tiles) == 4
    (pixels,) = whole["pixel_values"]
    assert torch.equal(torch.cat([torch.cat(tiles[:2], 2), torch.cat(tiles[2:], 2)], 1), pixels)
    small = processor()(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(thumbnail, small)


def test_whole_pictures_of_several_sizes_are_padded(images):
    made = processor(resolutions=[[32, 48, 1], [48, 32, 1]])
    turned = images[0].transpose(Image.Transpose.ROTATE_90)
    batch = made([images[0], turned], return_tensors="pt")
    assert batch["image_sizes"].tolist() == [[32, 48], [48, 32]]
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    assert batch["pixel_values"][0, :, 32:].eq(0).all()


def test_save_and_load(tmp_path, images):
    made = processor(resolutions=RESOLUTIONS, cut_tiles=True, fit="pad")
    made.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    a, b = made(images, return_tensors="pt"), loaded(images, return_tensors="pt")
    assert type(loaded) is BridgeImageProcessor
    assert torch.equal(a["pixel_values"], b["pixel_values"])
