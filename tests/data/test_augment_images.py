"""Variation of pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment_images import PictureAugmentation, vary_picture

NOWHERE = PictureAugmentation(scale=(1.0, 1.0), shift=0.0, light=0.0)


def square() -> Image.Image:
    """A red square of 20 x 20 in the middle of 60 x 40 grey pixels."""
    pixels = np.full((40, 60, 3), 128, np.uint8)
    pixels[10:30, 20:40] = (200, 20, 20)
    return Image.fromarray(pixels)


def test_nothing_to_vary_leaves_the_picture() -> None:
    assert np.array_equal(np.asarray(vary_picture(square(), NOWHERE)), np.asarray(square()))


def test_it_grows_and_moves_within_its_frame() -> None:
    def is_red(picture: Image.Image) -> np.ndarray:
        return (np.asarray(picture).astype(int) * (1, -1, 0)).sum(-1) > 90

    torch.manual_seed(0)
    grown = vary_picture(square(), PictureAugmentation(scale=(1.5, 1.5), shift=0.0, light=0.0))
    assert grown.size == (60, 40) and is_red(grown).sum() == pytest.approx(900, abs=80)
    places = set()
    for _ in range(20):
        moved = is_red(vary_picture(square(), PictureAugmentation(scale=(1.0, 1.0), shift=0.1, light=0.0)))
        rows, columns = moved.nonzero()
        assert moved.sum() == pytest.approx(400, abs=45)
        assert abs(rows.mean() - 19.5) <= 4.6 and abs(columns.mean() - 29.5) <= 6.6
        places.add((rows.min(), columns.min()))
    assert len(places) > 8


def test_light_changes_and_hue_does_not() -> None:
    torch.manual_seed(0)
    varied = [vary_picture(square(), PictureAugmentation(scale=(1.0, 1.0), shift=0.0, light=0.3)) for _ in range(12)]
    reds = np.array([np.asarray(picture)[20, 30] for picture in varied]).astype(int)
    assert np.ptp(reds[:, 0]) > 30
    assert (np.abs(reds[:, 1] - reds[:, 2]) <= 2).all() and (reds[:, 0] > reds[:, 1]).all()


def test_the_generator_alone_decides() -> None:
    def draw() -> np.ndarray:
        torch.manual_seed(3)
        return np.asarray(vary_picture(square(), PictureAugmentation()))

    assert np.array_equal(draw(), draw())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scale", (0.0, 1.0), "scale must be"),
        ("scale", (1.2, 1.0), "scale must be"),
        ("shift", 1.0, r"shift must be in \[0, 1\)"),
        ("light", -0.1, r"light must be in \[0, 1\)"),
    ],
)
def test_senseless_settings(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PictureAugmentation(**{key: value})  # type: ignore[arg-type]
