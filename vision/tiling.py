"""Pictures as tiles, as Llama 3.2 Vision cuts them (sections 7.2 and 7.4).

A picture is fitted, aspect ratio kept, into the grid of tiles that suits it best, padded with black at the bottom and
the right, normalised, and cut into tiles in reading order.

Shape letters: P pictures, N tiles of a picture, C channels, H height and W width of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

#: Channel statistics of CLIP's training pictures, which Llama 3.2 Vision uses too.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class TileGrid(NamedTuple):
    """A layout of tiles."""

    rows: int
    columns: int

    @property
    def n_tiles(self) -> int:
        return self.rows * self.columns


@cache
def supported_grids(max_tiles: int) -> tuple[TileGrid, ...]:
    """All layouts of at most `max_tiles` tiles, ordered by rows, then columns."""
    if max_tiles < 1:
        raise ValueError(f"max_tiles must be at least 1, got {max_tiles}")
    return tuple(
        TileGrid(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)
    )


def choose_grid(height: int, width: int, tile_size: int, max_tiles: int) -> TileGrid:
    """The layout that enlarges a picture least, or where all are too small shrinks it least; ties go to fewer tiles."""
    grids = supported_grids(max_tiles)
    scales = [min(grid.rows * tile_size / height, grid.columns * tile_size / width) for grid in grids]
    enlarging = [scale for scale in scales if scale >= 1]
    best = min(enlarging) if enlarging else max(scales)
    return min(
        (grid for grid, scale in zip(grids, scales, strict=True) if scale == best), key=lambda grid: grid.n_tiles
    )


def fit_size(height: int, width: int, grid: TileGrid, tile_size: int) -> tuple[int, int]:
    """Height and width to resize a picture to, so that it fits the grid.

    A picture larger than a tile keeps its size where it can; a smaller one grows until its longer side fills one tile.
    """
    target_height = min(max(height, tile_size), grid.rows * tile_size)
    target_width = min(max(width, tile_size), grid.columns * tile_size)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(max(math.floor(height * scale_width), 1), target_height), target_width
    return target_height, min(max(math.floor(width * scale_height), 1), target_width)


@dataclass(frozen=True)
class Tiles:
    """One picture: its normalised float32 tiles in reading order, and their layout."""

    pixels_NCHW: Tensor
    rows: int
    columns: int


def tile_image(image: Image.Image, tile_size: int, max_tiles: int) -> Tiles:
    """Cuts a picture into `rows * columns` normalised tiles.

    Args:
        image: an RGB picture of any size.
        tile_size: side of a tile in pixels.
        max_tiles: most tiles that a picture may take.

    Raises:
        ValueError: the picture is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"image: expected an RGB picture, got mode {image.mode}; open it with data.images.load_image")
    grid = choose_grid(image.height, image.width, tile_size, max_tiles)
    height, width = fit_size(image.height, image.width, grid, tile_size)
    canvas = np.zeros((grid.rows * tile_size, grid.columns * tile_size, 3), dtype=np.float32)
    canvas[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) / np.float32(255)
    # Padding is black before it is normalised, so it is not zero afterwards.
    canvas -= np.array(PIXEL_MEAN, np.float32)
    canvas /= np.array(PIXEL_STD, np.float32)
    tiles = rearrange(canvas, "(r h) (c w) k -> (r c) k h w", r=grid.rows, c=grid.columns)
    return Tiles(torch.from_numpy(np.ascontiguousarray(tiles)), grid.rows, grid.columns)


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures, each padded with all-zero tiles to the same number of tiles.

    Attributes:
        tiles_PNCHW: normalised tiles; a picture's real tiles come first.
        grid_P2: int64 rows and columns of every picture.
    """

    tiles_PNCHW: Tensor
    grid_P2: Tensor

    @classmethod
    def collate(cls, tiles: Sequence[Tiles], n_tiles: int | None = None) -> Pictures:
        """Batches pictures.

        Args:
            tiles: at least one picture; all of one tile size.
            n_tiles: pad every picture to this many tiles; to those of the largest one when None.
        """
        if not tiles:
            raise ValueError("tiles: a batch of pictures needs at least one picture")
        most = max(len(picture.pixels_NCHW) for picture in tiles)
        n_tiles = most if n_tiles is None else n_tiles
        if most > n_tiles:
            raise ValueError(f"n_tiles: a picture has {most} tiles, more than {n_tiles}")
        batch = torch.zeros(len(tiles), n_tiles, *tiles[0].pixels_NCHW.shape[1:])
        for row, picture in zip(batch, tiles, strict=True):
            row[: len(picture.pixels_NCHW)] = picture.pixels_NCHW
        return cls(batch, torch.tensor([(picture.rows, picture.columns) for picture in tiles]))

    def __len__(self) -> int:
        return len(self.tiles_PNCHW)

    @property
    def valid_PN(self) -> Tensor:
        """True for real tiles, False for padding."""
        n_tiles = self.tiles_PNCHW.shape[1]
        return torch.arange(n_tiles, device=self.grid_P2.device) < self.grid_P2.prod(-1, keepdim=True)

    def to(self, *args: Any, **kwargs: Any) -> Pictures:
        """Moves as `Tensor.to` does; a dtype applies to the pixels alone."""
        tiles_PNCHW = self.tiles_PNCHW.to(*args, **kwargs)
        return Pictures(tiles_PNCHW, self.grid_P2.to(tiles_PNCHW.device))
