"""Varies pictures: shifted, scaled, and in other light.

Everything draws from torch's global generator, which `data.stream` seeds for every sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torchvision.transforms.v2 import ColorJitter, Compose, InterpolationMode, RandomAffine


@dataclass(frozen=True, kw_only=True)
class PictureAugmentation:
    """How far `vary_picture` goes.

    Attributes:
        scale: range of the factor by which what is seen grows.
        shift: largest shift, as a share of width and height. What comes in from outside is black, as a tile's padding is.
        light: largest change of brightness, contrast and saturation, as a share.
    """

    scale: tuple[float, float] = (0.85, 1.1)
    shift: float = 0.06
    light: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be (low, high), both positive, got {tuple(self.scale)}")
        for name in ("shift", "light"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def vary_picture(picture: Image.Image, config: PictureAugmentation) -> Image.Image:
    """The picture at another place and size within its frame, and in other light. Colours keep their hue, text its direction."""
    vary = Compose(
        [
            RandomAffine(
                0, (config.shift, config.shift), tuple(config.scale), interpolation=InterpolationMode.BILINEAR, fill=0
            ),
            ColorJitter(config.light, config.light, config.light),
        ]
    )
    return vary(picture)
