"""Tiling against transformers' Mllama image processor, and its own invariants."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MllamaImageProcessor, MllamaImageProcessorPil
from transformers.models.mllama.image_processing_mllama import get_image_size_fit_to_canvas, get_optimal_tiled_canvas

from vision.tiling import PIXEL_MEAN, PIXEL_STD, Pictures, Tiles, choose_grid, fit_size, supported_grids, tile_image

SIZES = [
    (1, 1),
    (1, 97),
    (211, 1),
    (2, 1009),
    (13, 13),
    (28, 28),
    (29, 28),
    (28, 84),
    (56, 56),
    (61, 59),
    (127, 31),
    (31, 127),
    (300, 200),
]


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * 10007 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_supported_grids_of_four_tiles_are_llama_3_2s_in_its_order() -> None:
    assert supported_grids(4) == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def test_layouts_and_sizes_equal_transformers_over_many_shapes() -> None:
    shapes = np.random.default_rng(0).integers(1, 400, (1500, 2)).tolist()
    for height, width in shapes:
        for max_tiles, tile_size in ((1, 7), (4, 97), (6, 61)):
            grid = choose_grid(height, width, tile_size, max_tiles)
            canvas = grid.rows * tile_size, grid.columns * tile_size
            assert canvas == get_optimal_tiled_canvas(height, width, max_tiles, tile_size)
            assert fit_size(height, width, grid, tile_size) == get_image_size_fit_to_canvas(
                height, width, *canvas, tile_size
            )


@pytest.mark.parametrize(("tile_size", "max_tiles"), [(28, 4), (31, 6)])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_equal_transformers(height: int, width: int, tile_size: int, max_tiles: int) -> None:
    image = noise(height, width)
    settings = {
        "size": {"height": tile_size, "width": tile_size}, "max_image_tiles": max_tiles,
        "image_mean": PIXEL_MEAN, "image_std": PIXEL_STD,
    }  # fmt: skip
    theirs = MllamaImageProcessorPil(**settings)(image, return_tensors="pt")
    tiles = tile_image(image, tile_size, max_tiles)
    assert tiles.pixels_NCHW.shape == (tiles.rows * tiles.columns, 3, tile_size, tile_size)
    assert supported_grids(max_tiles).index((tiles.rows, tiles.columns)) + 1 == theirs["aspect_ratio_ids"].item()
    batch = Pictures.collate([tiles], n_tiles=max_tiles)
    assert batch.valid_PN.long().tolist() == theirs["aspect_ratio_mask"][0].tolist()
    torch.testing.assert_close(batch.tiles_PNCHW, theirs["pixel_values"][0], rtol=0, atol=2e-6)
    # The torchvision processor resizes with other arithmetic: the same up to rounding to one of 256 levels.
    fast = MllamaImageProcessor(**settings)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(batch.tiles_PNCHW, fast, rtol=0, atol=1.01 / 255 / min(PIXEL_STD))


def test_tiles_are_in_reading_order() -> None:
    colours = [(10, 20, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200)]
    image = Image.new("RGB", (58, 58))
    for i, colour in enumerate(colours):
        image.paste(colour, (i % 2 * 29, i // 2 * 29, i % 2 * 29 + 29, i // 2 * 29 + 29))
    tiles = tile_image(image, 29, 4)
    assert (tiles.rows, tiles.columns) == (2, 2)
    for pixels_CHW, colour in zip(tiles.pixels_NCHW, colours, strict=True):
        expected = (torch.tensor(colour) / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        torch.testing.assert_close(pixels_CHW, expected[:, None, None].expand(3, 29, 29))


def test_padding_is_black_at_the_bottom_and_right() -> None:
    black = -torch.tensor(PIXEL_MEAN) / torch.tensor(PIXEL_STD)
    (wide_CHW,) = tile_image(Image.new("RGB", (31, 17), "white"), 31, 1).pixels_NCHW
    (tall_CHW,) = tile_image(Image.new("RGB", (17, 31), "white"), 31, 1).pixels_NCHW
    for padding in (wide_CHW[:, 17:], tall_CHW[:, :, 17:]):
        assert padding.numel() and torch.allclose(padding, black[:, None, None].expand_as(padding))
    assert (wide_CHW[:, :17] > 1).all() and (tall_CHW[:, :, :17] > 1).all()


def test_collate_pads_tiles_with_zeros() -> None:
    one, three = (Tiles(torch.full((n, 3, 5, 5), float(n)), n, 1) for n in (1, 3))
    batch = Pictures.collate([one, three])
    assert batch.tiles_PNCHW[:, :, 0, 0, 0].tolist() == [[1, 0, 0], [3, 3, 3]]
    assert batch.valid_PN.tolist() == [[True, False, False], [True, True, True]]
    assert Pictures.collate([one], n_tiles=7).tiles_PNCHW.shape == (1, 7, 3, 5, 5)


def test_to_keeps_layouts_integral() -> None:
    batch = Pictures.collate([tile_image(noise(20, 50), 28, 4)]).to(torch.bfloat16)
    assert batch.tiles_PNCHW.dtype == torch.bfloat16
    assert batch.grid_P2.dtype == torch.int64 and batch.grid_P2.tolist() == [[1, 2]]


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="load_image"):
        tile_image(Image.new("L", (5, 5)), 28, 4)
    with pytest.raises(ValueError, match="max_tiles"):
        choose_grid(5, 5, 28, 0)
    with pytest.raises(ValueError, match="at least one picture"):
        Pictures.collate([])
    with pytest.raises(ValueError, match="4 tiles, more than 3"):
        Pictures.collate([tile_image(noise(56, 56), 28, 4)], n_tiles=3)
