"""A batch of clips, as the pictures that their frames are.

Shape letters: V clips of all rows, P frames of all clips in order, N tiles of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision.tiling import Pictures, Tiles


@dataclass(frozen=True)
class Clips:
    """Clips of any lengths, one after the other; no frame is padding.

    Attributes:
        frames: all frames of all clips, as pictures; the frames of a clip have one grid.
        n_frames_V: int64 frames of each clip.
    """

    frames: Pictures
    n_frames_V: Tensor

    @classmethod
    def collate(cls, clips: Sequence[Sequence[Tiles]], n_tiles: int | None = None) -> Clips:
        """Batches clips.

        Args:
            clips: the tiled frames of each, at least one; all of one tile size.
            n_tiles: pad every frame to this many tiles; to those of the largest one when None.
        """
        for frames in clips:
            if not frames:
                raise ValueError("clips: a clip has no frames; give at least one")
            if len({(frame.rows, frame.columns) for frame in frames}) > 1:
                raise ValueError("clips: the frames of a clip are tiled differently; bring them to one size first")
        pictures = Pictures.collate([frame for frames in clips for frame in frames], n_tiles=n_tiles)
        return cls(pictures, torch.tensor([len(frames) for frames in clips]))

    def __len__(self) -> int:
        return len(self.n_frames_V)

    @property
    def clip_P(self) -> Tensor:
        """The clip of each frame."""
        return torch.arange(len(self), device=self.n_frames_V.device).repeat_interleave(self.n_frames_V)

    @property
    def index_P(self) -> Tensor:
        """Index of each frame in its clip."""
        first_V = self.n_frames_V.cumsum(0) - self.n_frames_V
        return torch.arange(len(self.frames), device=first_V.device) - first_V[self.clip_P]

    @property
    def valid_VN(self) -> Tensor:
        """True for the real tiles of a clip's frames, False for padding."""
        return self.frames.valid_PN[self.n_frames_V.cumsum(0) - 1]

    def to(self, *args: Any, **kwargs: Any) -> Clips:
        """Moves as `Tensor.to` does; a dtype applies to the pixels alone."""
        frames = self.frames.to(*args, **kwargs)
        return Clips(frames, self.n_frames_V.to(frames.grid_P2.device))


def encode_frames(encoder: Callable[[Pictures], Tensor], frames: Pictures, n_at_once: int | None = None) -> Tensor:
    """Features `(P, N, L, F)` of frames, `n_at_once` at a time: the encoder's memory does not grow with the clips.

    When None, as many as keep the device busy.
    """
    n_at_once = n_at_once or (256 if frames.tiles_PNCHW.is_cuda else 16)
    slices = zip(frames.tiles_PNCHW.split(n_at_once), frames.grid_P2.split(n_at_once), strict=True)
    return torch.cat([encoder(Pictures(tiles, grid)) for tiles, grid in slices])
