"""Bridges that see pictures at more than one size, several pictures, and clips."""

import pytest
import torch
from PIL import Image

import mmpeft
from mmpeft import adapters
from mmpeft.connectors.resampler import ResamplerConnectorConfig
from mmpeft.data import Collator
from mmpeft.layout import ResolutionConfig
from mmpeft.packing import share_prefix

from .conftest import assistant, model_inputs, user

MODES = [ResolutionConfig("tiles", max_area=4), ResolutionConfig("native", max_area=2)]
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=MODES, ids=lambda config: config.mode)
def bridge(request, make_bridge):
    model, processor = make_bridge(resolution=request.param)
    torch.nn.init.normal_(model.connector.newline, std=0.3)
    return model, processor


@pytest.fixture(scope="module")
def shapes():
    """Pictures of different shapes, each of several sizes' worth of tokens."""
    noise = torch.Generator().manual_seed(0)
    sizes = [(64, 64), (60, 130), (140, 70), (128, 128)]
    return [
        Image.fromarray(
            torch.randint(0, 256, (*size, 3), generator=noise, dtype=torch.uint8).numpy()
        )
        for size in sizes
    ]


def chats(shapes):
    return [
        [user("no picture")],
        [user(shapes[0], "small")],
        [user("between ", shapes[1], " and ", shapes[2], " words")],
        [user(shapes[3], "large")],
    ]


def test_each_image_takes_its_own_number_of_positions(bridge, shapes):
    model, processor = bridge
    batch = model_inputs(processor, chats(shapes))
    counts = batch["mm_token_type_ids"].sum(1).tolist()
    table = {(r.height, r.width): r.tokens for r in model.layout.resolutions}
    tokens = [table[tuple(size)] for size in batch["image_sizes"].tolist()]
    assert counts == [0, tokens[0], tokens[1] + tokens[2], tokens[3]]
    assert len(set(tokens)) > 1


def test_a_mixed_batch_gives_each_row_what_it_gets_alone(bridge, shapes):
    model, processor = bridge
    batch = model_inputs(processor, chats(shapes))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = model(**batch, position_ids=positions).logits
    generated = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    beams = model.generate(**batch, **GREEDY, num_beams=2)[:, batch["input_ids"].shape[1] :]
    for row, chat in enumerate(chats(shapes)):
        single = model_inputs(processor, [chat])
        real = together[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(real, model(**single).logits[0], atol=2e-5, rtol=1e-4)
        for several, options in ((generated, GREEDY), (beams, GREEDY | {"num_beams": 2})):
            alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
            assert several[row, : len(alone)].tolist() == alone.tolist()


def test_features_made_before_give_the_same(bridge, shapes):
    model, processor = bridge
    batch = dict(model_inputs(processor, chats(shapes)))
    expected = model(**batch).logits
    features = model.encode_images(batch.pop("pixel_values"), batch["image_sizes"])
    assert torch.equal(model(**batch, image_features=features).logits, expected)


def test_the_newline_learns_and_is_saved(bridge, shapes, tmp_path):
    model, processor = bridge
    adapters.set_trainable(model, connector=True, adapter=True)
    batch = model_inputs(processor, [[user(shapes[1], "what?"), assistant("yes")]])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.connector.newline.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = mmpeft.load(tmp_path)
    again = model_inputs(loaded_processor, [[user(shapes[1], "what?"), assistant("yes")]])
    assert torch.equal(loaded(**again).logits, model(**batch).logits)
    assert loaded.layout.resolutions == model.layout.resolutions


def test_training_rows_of_different_sizes_share_a_batch(bridge, shapes):
    model, processor = bridge
    processor.tokenizer.padding_side = "right"
    samples, alone = [], []
    for picture in shapes[:3]:
        row, pictures = processor.encode_chat([user(picture, "what?"), assistant("a thing")])
        samples.append(share_prefix([row]) | processor.image_inputs(pictures))
        alone.append(model(**Collator(0)(samples[-1:])).logits[0])
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    together = model(**batch).logits
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row, : len(expected)], expected, atol=2e-5, rtol=1e-4)


def test_queries_and_tiles(make_bridge, shapes):
    connector = ResamplerConnectorConfig(num_query_tokens=3, depth=1)
    model, processor = make_bridge(connector=connector, resolution=MODES[0])
    batch = model_inputs(processor, chats(shapes))
    assert batch["mm_token_type_ids"].sum(1).tolist()[3] == 3 * 5 + 2
    assert model(**batch).logits.isfinite().all()


def test_a_budget_caps_every_picture(make_bridge, shapes):
    model, processor = make_bridge(resolution=ResolutionConfig("tiles", 60, max_area=9))
    batch = model_inputs(processor, chats(shapes)[1:2] + chats(shapes)[3:])
    assert batch["mm_token_type_ids"].sum(1).max() <= 60
    assert "tokens an image" in str(model.layout)


def test_a_clip_is_its_frames(tiny, images, tmp_path):
    _, processor = tiny
    processor.num_frames = 2
    frames = [images[0], images[1], images[2], images[0]]
    file = tmp_path / "clip.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    clip = {"role": "user", "content": [{"type": "video", "video": frames},
                                        {"type": "text", "text": "what happens?"}]}  # fmt: skip
    inputs = model_inputs(processor, [[clip]])
    same = model_inputs(processor, [[user(images[1], images[0], "what happens?")]])
    assert all(torch.equal(inputs[key], same[key]) for key in same)
    clip["content"][0]["video"] = str(file)
    assert model_inputs(processor, [[clip]])["pixel_values"].shape == (2, 3, 64, 64)
    clip["content"][0]["video"] = []
    with pytest.raises(ValueError, match="clip has no frames"):
        model_inputs(processor, [[clip]])


@pytest.mark.parametrize("resolution", MODES, ids=lambda config: config.mode)
def test_statistics_come_from_one_tile_of_each_sample(make_bridge, shapes, resolution):
    from mmpeft.calibration import calibrate

    model, processor = make_bridge(resolution=resolution)
    samples = []
    for picture in shapes:
        _, pictures = processor.encode_chat([user(picture, "what?"), assistant("it")])
        samples.append(processor.image_inputs(pictures))
    seen = []
    model.connector.calibrate = lambda features, grid, std: seen.append(features.shape)
    calibrate(model, samples)
    assert seen == [(4, 16, 64)]
