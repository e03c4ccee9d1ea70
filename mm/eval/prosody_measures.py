"""How near predicted prosody is to that of the recording: root mean squared errors, and pictures.

Shape letters: N phones; 3 is log duration, mean log pitch, mean log power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mm.eval.metrics import Estimate, ratio

NAMES = ("log_duration", "log_f0", "log_power")
#: Size of a picture, and how much of each of the three its height shows, around the recording's mean.
SIZE, SPANS = (360, 240), (3.0, 1.0, 8.0)
BLACK, RED = (0, 0, 0), (190, 30, 30)


@dataclass(frozen=True)
class ProsodyErrors:
    """Sums of squared errors of one utterance, and how many phones they are over, by the order of `NAMES`."""

    squares: tuple[float, ...]
    counts: tuple[int, ...]

    def __str__(self) -> str:
        roots = (math.sqrt(square / max(n, 1)) for square, n in zip(self.squares, self.counts, strict=True))
        return ", ".join(f"{name} {root:.2f}" for name, root in zip(NAMES, roots, strict=True))


def prosody_errors(predicted_N3: Tensor, true_N3: Tensor, is_voiced_N: Tensor) -> ProsodyErrors:
    """Compares prosody. Pitch counts where a phone has a voice; the pauses at both ends, which are made alike, do not count."""
    counted_N3 = torch.stack([torch.ones_like(is_voiced_N), is_voiced_N, torch.ones_like(is_voiced_N)], dim=-1)
    counted_N3[[0, -1]] = False
    squares_3 = (predicted_N3 - true_N3).square().where(counted_N3, 0).sum(0)
    return ProsodyErrors(tuple(squares_3.tolist()), tuple(counted_N3.sum(0).tolist()))


def rmse(errors: Sequence[ProsodyErrors]) -> dict[str, Estimate]:
    """Root of the mean squared error over all phones, by name, with intervals over utterances."""
    means = (ratio([e.squares[i] for e in errors], [e.counts[i] for e in errors]) for i in range(len(NAMES)))
    return {
        name: Estimate(*(math.sqrt(max(x, 0)) for x in (mean.value, mean.low, mean.high)))
        for name, mean in zip(NAMES, means, strict=True)
    }


def contours(true_N3: Tensor, predicted_N3: Tensor) -> Image.Image:
    """The recording's prosody, black, and the predicted one, red, over the recording's time: duration, pitch, loudness."""
    picture = Image.new("RGB", SIZE, "white")
    pen, (width, height) = ImageDraw.Draw(picture), (SIZE[0] - 1, SIZE[1] // 3)
    end_N = true_N3[:, 0].exp().cumsum(0)
    edges = [0.0, *(width * end_N / end_N[-1]).tolist()]
    for i, span in enumerate(SPANS):
        middle = true_N3[:, i].mean()
        for values_N3, colour in ((true_N3, BLACK), (predicted_N3, RED)):
            level_N = (0.5 - (values_N3[:, i] - middle) / span).clamp(0, 1) * (height - 4) + i * height + 2
            levels = level_N.tolist()
            pen.line([(x, y) for n, y in enumerate(levels) for x in (edges[n], edges[n + 1])], fill=colour, width=1)
    return picture
