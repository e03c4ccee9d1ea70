"""Batches of clips: which frame belongs where, and frames encoded a few at a time."""

from __future__ import annotations

import pytest
import torch

from video.clips import Clips, encode_frames
from vision.encoder import PRESETS, ImageEncoder
from vision.tiling import Tiles

N_FRAMES = (3, 1, 5)
GRIDS = ((1, 2), (1, 1), (2, 2))


def make_frames(n_frames: int, grid: tuple[int, int], size: int = 2) -> list[Tiles]:
    return [Tiles(torch.randn(grid[0] * grid[1], 3, size, size), *grid) for _ in range(n_frames)]


def test_clips_of_all_lengths_and_grids_lie_one_after_the_other():
    torch.manual_seed(0)
    lists = [make_frames(n, grid) for n, grid in zip(N_FRAMES, GRIDS, strict=True)]
    clips = Clips.collate(lists)
    assert len(clips) == 3
    assert clips.n_frames_V.tolist() == [3, 1, 5]
    assert clips.clip_P.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert clips.index_P.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert clips.valid_VN.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    for clip, frames in enumerate(lists):
        mine = clips.frames.tiles_PNCHW[clips.clip_P == clip]
        assert torch.equal(mine[:, clips.valid_VN[clip]], torch.stack([frame.pixels_NCHW for frame in frames]))


def test_a_move_changes_the_dtype_of_pixels_alone():
    clips = Clips.collate([make_frames(2, (1, 1))]).to("cpu", torch.bfloat16)
    assert clips.frames.tiles_PNCHW.dtype == torch.bfloat16
    assert clips.n_frames_V.dtype == clips.frames.grid_P2.dtype == torch.int64


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "at least one"),
        ([make_frames(2, (1, 1)), []], "no frames"),
        ([make_frames(1, (1, 2)) + make_frames(1, (2, 1))], "tiled differently"),
    ],
)
def test_bad_clips_are_refused(clips, message):
    with pytest.raises(ValueError, match=message):
        Clips.collate(clips)


@pytest.mark.parametrize("n_at_once", [1, 4, 9, 100])
def test_frames_encoded_a_few_at_a_time_give_the_same_features(n_at_once):
    torch.manual_seed(1)
    encoder = ImageEncoder(PRESETS["debug"]()).eval()
    size = encoder.config.tile_size
    clips = Clips.collate([make_frames(n, grid, size) for n, grid in zip(N_FRAMES, GRIDS, strict=True)])
    sizes = []

    def counting(pictures):
        sizes.append(len(pictures))
        return encoder(pictures)

    with torch.no_grad():
        features = encode_frames(counting, clips.frames, n_at_once)
        torch.testing.assert_close(features, encoder(clips.frames), rtol=1e-5, atol=1e-5)
    assert max(sizes) <= n_at_once and sum(sizes) == 9
