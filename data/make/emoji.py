"""Emoji of Noto Color Emoji with their English names: 1377 pictures whose labels are clean."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar

from PIL import Image, ImageDraw, ImageFont

from data.make.canvas import (
    Ground,
    Picture,
    Question,
    Source,
    Split,
    frame_size,
    package_files,
    paste_cutout,
    photograph,
)

PACKAGE = "fonts-noto-color-emoji"
#: The only size at which this bitmap font can be drawn, and the cell of a glyph.
FONT_SIZE, CELL = 109, (136, 128)
QUESTIONS = ("What is this?", "Name this picture.", "Which emoji is this?", "What does the picture show?")


def clean_names() -> dict[str, str]:
    """Emoji of a single code point (but for a variation selector) -> unique lower-case English name.

    Raises:
        ValueError: the `emoji` package is not installed.
    """
    try:
        import emoji
    except ImportError as error:
        raise ValueError("kind 'emoji' needs the names of the PyPI package emoji: run `pip install emoji`") from error
    names = {
        character.replace("\ufe0f", ""): entry["en"].strip(":").replace("_", " ").replace("\u2019", "'").lower()
        for character, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"] and len(character.replace("\ufe0f", "")) == 1
    }
    times = Counter(names.values())
    return {character: name for character, name in sorted(names.items()) if times[name] == 1}


@cache
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, FONT_SIZE)


def _font_path() -> Path:
    return package_files({PACKAGE: "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"})[PACKAGE][0]


def _drawable_names(font: Path) -> tuple[tuple[str, str], ...]:
    """`(character, name)` of every emoji that the font can draw, in a fixed shuffled order."""
    missing = _font(font).getmask("\U000fffff", mode="RGBA").getbbox()
    names = [item for item in clean_names().items() if _font(font).getmask(item[0], mode="RGBA").getbbox() != missing]
    random.Random(0).shuffle(names)
    return tuple(names)


@dataclass(frozen=True)
class Emoji:
    """Each name in turn, at a random size, place and tilt on a random background.

    Held out are renderings: their backgrounds have hues and a texture that training never shows.
    """

    font: Path = field(default_factory=_font_path)
    names: tuple[tuple[str, str], ...] = ()

    name: ClassVar[str] = "emoji"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 40 * 1377, "heldout": 1377}
    sources: ClassVar[Sequence[Source]] = (
        Source(package=PACKAGE, licence="OFL-1.1"),
        Source(package="emoji (PyPI)", licence="BSD-3-Clause"),
    )

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", _drawable_names(self.font))

    def draw(self, rng: random.Random, split: Split, index: int) -> Picture:
        character, name = self.names[index % len(self.names)]
        canvas = Ground.draw(rng, split).paint(rng, frame_size(rng))
        paste_cutout(rng, canvas, self.glyph(character), tilt=25, extent=(0.55, 1.0))
        question = Question(task="emoji", question=rng.choice(QUESTIONS), answer=name)
        return Picture(image=photograph(rng, canvas), caption=name, questions=[question])

    def glyph(self, character: str) -> Image.Image:
        """The emoji on a transparent ground (RGBA)."""
        glyph = Image.new("RGBA", CELL)
        ImageDraw.Draw(glyph).text((0, 0), character, font=_font(self.font), embedded_color=True)
        return glyph
