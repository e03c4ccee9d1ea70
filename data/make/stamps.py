"""Tux Paint's stamps: cut-out photographs and cartoons with an English caption each."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from PIL import Image

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

PACKAGE = "tuxpaint-stamps-default"
QUESTIONS = ("Describe the picture.", "Describe this picture in a few words.", "What can you see in the picture?")
#: Longer captions tell stories that no picture shows, and smaller stamps have too few pixels.
MAX_WORDS, MIN_PIXELS = 8, 40 * 40


def captioned_stamps() -> tuple[tuple[Path, str], ...]:
    """`(PNG file, first sentence of its caption)` in a fixed shuffled order.

    Raises:
        ValueError: the package is missing.
    """
    stamps = []
    for path in package_files({PACKAGE: "usr/share/tuxpaint/stamps/**/*.png"})[PACKAGE]:
        text = path.with_suffix(".txt")
        if text.exists() and (caption := first_sentence(text.read_text(encoding="utf-8"))):
            with Image.open(path) as image:
                if image.width * image.height >= MIN_PIXELS:
                    stamps.append((path, caption))
    random.Random(0).shuffle(stamps)
    return tuple(stamps)


def first_sentence(text: str) -> str | None:
    """The first sentence of a caption file (its first line is English), None where it is unfit as an answer."""
    line = text.partition("\n")[0].strip().replace("\u2019", "'")
    sentence = line.partition(". ")[0].removesuffix(".") + "."
    plain = re.fullmatch(r"[A-Z0-9][\w ,'-]*\.", sentence)
    return sentence if plain and len(sentence.split()) <= MAX_WORDS else None


def load_stamp(path: Path) -> Image.Image:
    """The stamp on a transparent ground (RGBA), at most 256 x 256."""
    with Image.open(path) as image:
        stamp = image.convert("RGBA")
    stamp.thumbnail((256, 256))
    return stamp


@dataclass(frozen=True)
class Stamps:
    """Each stamp in turn; held out are renderings, as for emoji."""

    stamps: tuple[tuple[Path, str], ...] = field(default_factory=captioned_stamps)

    name: ClassVar[str] = "stamps"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 10 * 610, "heldout": 610}
    sources: ClassVar[Sequence[Source]] = (Source(package=PACKAGE, licence="GPL-2"),)

    def draw(self, rng: random.Random, split: Split, index: int) -> Picture:
        path, caption = self.stamps[index % len(self.stamps)]
        canvas = Ground.draw(rng, split).paint(rng, frame_size(rng))
        paste_cutout(rng, canvas, load_stamp(path), tilt=15, extent=(0.6, 1.0))
        question = Question(task="stamps", question=rng.choice(QUESTIONS), answer=caption)
        return Picture(image=photograph(rng, canvas), caption=caption, questions=[question])
