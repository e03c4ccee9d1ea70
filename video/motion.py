"""Local motion: convolutions over the time and the places of a clip's tokens, before its frames are merged.

Not the paper's, which says no more than "perceiver resampler" (section 7.2). With thousands of clips instead of millions, a
resampler of whole frames learns the training clips by heart and not what motion is: where something was and where it is then
are far apart for it. A convolution sees both at once, everywhere alike; and what it sees here is how a place differs from its
mean over the clip, so that what rests looks the same whatever it is, and what moves is not drowned by what things look like.
docs/LOG.md has the measurements.

Shape letters: V clips of all rows, P frames of all clips, T frames of a clip, N tiles of a frame, L tokens of a tile, W width of
the tokens, C channels, Y and X rows and columns of a tile's patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.model import RMSNorm
from video.clips import Clips

#: Frames between the taps of each convolution: together they see 7 frames to either side, beside the clip's mean.
STRIDES = (1, 2, 4)


class LocalMotion(nn.Module):
    """Adds to the tokens of patches what changes around them. Clips and tiles never see each other.

    What it adds starts random and as large as `start_at` says; where nothing moves that is the same for all clips. Smaller than the
    tokens, and of tokens that were not compared with their mean, it was not found in 250 steps (docs/LOG.md).
    """

    def __init__(self, width: int, n_channels: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, norm_eps)
        self.down_proj = nn.Linear(width, n_channels, bias=False)
        self.convs = nn.ModuleList(
            nn.Conv3d(n_channels, n_channels, 3, padding=(stride, 1, 1), dilation=(stride, 1, 1)) for stride in STRIDES
        )
        self.out_norm = RMSNorm(n_channels, norm_eps)
        self.up_proj = nn.Linear(n_channels, width, bias=False)
        self.start_at(1.0)

    def start_at(self, size: float) -> None:
        """Starts with a root mean square of `size`."""
        nn.init.normal_(self.up_proj.weight, std=size * self.up_proj.in_features**-0.5)

    def forward(self, x_PNLW: Tensor, clips: Clips) -> Tensor:
        """Tokens of all frames, the class token of each tile first; padded tiles give nothing that is read."""
        n_tiles_V = clips.valid_VN.sum(-1)
        motion_PNLW = torch.zeros_like(x_PNLW)
        # Clips of one shape run together, so there is nothing to mask.
        for n_frames, n_tiles in torch.stack([clips.n_frames_V, n_tiles_V], dim=1).unique(dim=0).tolist():
            chosen_V = (clips.n_frames_V == n_frames) & (n_tiles_V == n_tiles)
            chosen_P = chosen_V[clips.clip_P]
            x_VTNLW = x_PNLW[chosen_P, :n_tiles, 1:].unflatten(0, (-1, n_frames))
            motion_VTNLW = self._convolve(x_VTNLW.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, n_tiles))
            index_PN = chosen_P.nonzero()[:, 0, None], torch.arange(n_tiles, device=x_PNLW.device)
            patches = F.pad(motion_VTNLW.transpose(1, 2).flatten(0, 1), (0, 0, 1, 0))  # nothing for the class token
            motion_PNLW = motion_PNLW.index_put(index_PN, patches.to(motion_PNLW.dtype))
        return x_PNLW + motion_PNLW

    def _convolve(self, x_VTLW: Tensor) -> Tensor:
        side = math.isqrt(x_VTLW.shape[2])
        x_VTLW = self.norm(x_VTLW)
        change_VTLW = x_VTLW - x_VTLW.mean(1, keepdim=True)
        y_VCTYX = self.down_proj(change_VTLW).unflatten(2, (side, side)).movedim(-1, 1)
        for conv in self.convs:
            y_VCTYX = F.gelu(conv(y_VCTYX))
        return self.up_proj(self.out_norm(y_VCTYX.movedim(1, -1).flatten(2, 3)))
