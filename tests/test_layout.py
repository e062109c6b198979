"""From a picture's size to image tokens: the table, the budget, the order."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from mmpeft.connector import Connector, ConnectorConfig
from mmpeft.connectors.linear import LinearConnectorConfig
from mmpeft.layout import ImageLayout, ResolutionConfig

LLM_SIZE = 6


class Queries(Connector):
    """Five outputs that are no map."""

    def num_image_tokens(self, grid, num_prefix_tokens=0):
        return 5

    def output_grid(self, grid):
        return None


class EvenOnly(Connector):
    def num_image_tokens(self, grid, num_prefix_tokens=0):
        if grid[0] % 2 or grid[1] % 2:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} cannot be folded by 2")
        return grid[0] * grid[1] // 4

    def output_grid(self, grid):
        return grid[0] // 2, grid[1] // 2


def encoder(any_size=True):
    """2 x 3 patches of 8 x 10 pixels."""
    return SimpleNamespace(
        preprocessing={"size": (16, 30)}, grid=(2, 3), stride=(8, 10), num_prefix_tokens=0,
        any_size=any_size, grid_of=lambda h, w: (h // 8, w // 10),
    )  # fmt: skip


def layout(mode, cls=None, **options):
    connector = LinearConnectorConfig().build(4, LLM_SIZE)
    if cls is not None:
        connector = cls(ConnectorConfig(), 4, LLM_SIZE)
    connector.add_newline()
    with torch.no_grad():
        connector.newline.fill_(-1.0)
    return ImageLayout(ResolutionConfig(mode, **options), encoder(), connector)


def test_fixed_has_one_size():
    fixed = layout("fixed")
    assert fixed.resolutions == [(16, 30, 6)]
    assert str(fixed) == "6 tokens an image, 16 x 30 pixels"


def test_tiles_by_hand():
    table = {(r.height, r.width): r.tokens for r in layout("tiles", max_area=4).resolutions}
    assert set(table) == {(16, 30), (16, 60), (16, 90), (16, 120), (32, 30), (48, 30), (64, 30),
                          (32, 60)}  # fmt: skip
    assert table[16, 30] == 6  # one tile: no thumbnail, no newline
    assert table[32, 60] == 6 + 4 * 6 + 4  # thumbnail, four tiles, four lines of the joined map
    queries = {(r.height, r.width): r.tokens for r in layout("tiles", Queries).resolutions}
    assert queries[32, 60] == 5 + 4 * 5 + 2  # a newline for each row of tiles


def test_native_counts_lines_and_skips_grids_the_connector_refuses():
    table = {(r.height, r.width): r.tokens for r in layout("native", max_area=2).resolutions}
    assert table[8, 10] == 1 + 1 and table[24, 40] == 12 + 3
    assert max(h * w for h, w in table) <= 2 * 16 * 30
    assert all(h // 8 <= 4 * (w // 10) and w // 10 <= 4 * (h // 8) for h, w in table)
    folded = {(r.height, r.width): r.tokens for r in layout("native", EvenOnly).resolutions}
    assert folded[16, 40] == 2 + 1 and (24, 40) not in folded
    assert all(h % 16 == 0 and w % 20 == 0 for h, w in folded)


@pytest.mark.parametrize("cls", [None, Queries])
@pytest.mark.parametrize("mode", ["fixed", "tiles", "native"])
def test_arranged_tokens_are_as_many_as_the_table_says(mode, cls):
    made = layout(mode, cls, max_area=4 if mode == "fixed" else 6)
    for height, width, count in made.resolutions:
        grid = (height // 8, width // 10) if mode == "native" else (2, 3)
        per_tile = made.connector.num_image_tokens(grid)
        tokens = torch.zeros(made.tiles((height, width)), per_tile, LLM_SIZE)
        arranged = made.arrange(tokens, (height, width))
        assert arranged.shape == (count, LLM_SIZE)
        newlines = int((arranged == -1).all(1).sum())
        assert count == tokens.flatten(0, 1).shape[0] + newlines


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 2), (3, 1)])
def test_tiles_stand_as_in_llava_next(rows, columns):
    """Upstream's packing of one image whose shape needs no unpadding."""
    made = layout("tiles", max_area=4)
    # upstream knows square tiles only
    made.encoder.grid, made.encoder.preprocessing["size"] = (3, 3), (24, 24)
    made.size = (24, 24)
    tokens = torch.randn(1 + rows * columns, 9, LLM_SIZE)
    upstream = SimpleNamespace(config=LlavaNextConfig())
    upstream.config.vision_config.image_size, upstream.config.vision_config.patch_size = 24, 8
    upstream.config.image_grid_pinpoints = [[24 * rows, 24 * columns]]
    expected, _ = LlavaNextModel.pack_image_features(
        upstream, [tokens], torch.tensor([[24 * rows, 24 * columns]]), "default",
        image_newline=made.connector.newline.detach(),
    )  # fmt: skip
    assert torch.equal(made.arrange(tokens, (24 * rows, 24 * columns)), expected[0])


def test_the_budget_is_enforced():
    within = layout("tiles", max_area=9, max_image_tokens=30)
    assert max(r.tokens for r in within.resolutions) <= 30
    assert len(within.resolutions) < len(layout("tiles", max_area=9).resolutions)
    for mode in ("fixed", "tiles"):
        with pytest.raises(ValueError, match="max_image_tokens is 5, but the smallest image takes"):
            layout(mode, max_image_tokens=5)
    with pytest.raises(ValueError, match="max_image_tokens is 0; it must be 1 or more"):
        ResolutionConfig(max_image_tokens=0)


@pytest.mark.parametrize(
    ("grid_of", "tokens"),
    [(lambda h, w: (1, 1), 1 + 1), (lambda h, w: (2 * (h // 8), w // 10), 4 * 2 + 4)],
    ids=["pooled", "two sequences in one"],
)
def test_native_counts_what_the_encoder_gives(grid_of, tokens):
    whole = encoder()
    whole.grid_of, whole.grid = grid_of, grid_of(*whole.preprocessing["size"])
    made = ImageLayout(
        ResolutionConfig("native", max_area=2), whole, LinearConnectorConfig().build(4, LLM_SIZE)
    )
    table = {(r.height, r.width): r.tokens for r in made.resolutions}
    assert table[16, 20] == tokens  # and a newline for each line
    assert max(h * w for h, w in table) == 2 * 16 * 30


def test_native_needs_an_encoder_that_takes_any_size():
    with pytest.raises(ValueError, match=r"takes one size only \(16 x 30\); use tiles or fixed"):
        ImageLayout(
            ResolutionConfig("native"), encoder(any_size=False), LinearConnectorConfig().build(4, 6)
        )


def test_a_connector_that_miscounts_its_map_is_named():
    class Halved(Connector):
        def num_image_tokens(self, grid, num_prefix_tokens=0):
            return grid[0] * grid[1] // 2

    with pytest.raises(
        ValueError, match="Halved.output_grid says 2 x 3, but .* is 3; let it return"
    ):
        layout("tiles", Halved)
