"""What kinds of pictures and clips share: their record, their sources on disk, backgrounds and last augmentation."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageFont

from data.shards import IMAGE_MARKER

Split = Literal["train", "heldout"]
Colour = tuple[int, int, int]
Size = tuple[int, int]  #: width, height in pixels
#: What is true of each named thing, each kind of fact in one word or a few: `{"drum": {"deed": "moves left", "pace": "faster"}}`.
Facts = Mapping[str, Mapping[str, str]]

#: Where Debian packages lie: installed, or unpacked by a user without root.
PACKAGE_ROOTS = (Path("/"), Path.home() / ".local/share/debian")

#: Background hues (turns of the colour wheel) and textures that training pictures never have.
HELDOUT_HUES = (0.44, 0.56)
TEXTURES: Mapping[Split, tuple[str, ...]] = {
    "train": ("plain", "gradient", "clouds"),
    "heldout": ("plain", "gradient", "clouds", "checks"),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question that the picture or clip answers; `task` groups answers in the evaluation.

    Attributes:
        options: answers to choose from, the right one among them; empty where anything may be asked for.
    """

    task: str
    question: str
    answer: str
    options: Sequence[str] = ()


class Drawn(Protocol):
    """What a kind draws.

    Attributes:
        marker: stands for it in a conversation.
    """

    marker: ClassVar[str]

    @property
    def caption(self) -> str: ...

    @property
    def questions(self) -> Sequence[Question]: ...

    @property
    def facts(self) -> Facts: ...

    def encode(self, rng: random.Random) -> tuple[str, bytes]:
        """File extension and content."""

    def view(self) -> Image.Image:
        """A picture of it for people, which the caller may change."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    image: Image.Image
    caption: str
    questions: Sequence[Question]

    marker: ClassVar[str] = IMAGE_MARKER
    facts: ClassVar[Facts] = {}

    def encode(self, rng: random.Random) -> tuple[str, bytes]:
        """JPEG of quality 85 to 95, one in twenty PNG."""
        buffer = io.BytesIO()
        if rng.random() < 0.05:
            self.image.save(buffer, "PNG")
            return "png", buffer.getvalue()
        self.image.save(buffer, "JPEG", quality=rng.randint(85, 95))
        return "jpg", buffer.getvalue()

    def view(self) -> Image.Image:
        return self.image.copy()


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a kind's material comes from, for the manifest and the data card."""

    package: str
    licence: str


class Kind(Protocol):
    """One kind of picture or clip: picklable, and `draw` depends on nothing but its arguments.

    Attributes:
        name: part of the shard names.
        sizes: samples per split at scale 1, training first; a kind for training alone has no other.
        sources: packages it draws from.
    """

    name: ClassVar[str]
    sizes: ClassVar[Mapping[Split, int]]
    sources: ClassVar[Sequence[Source]]

    def draw(self, rng: random.Random, split: Split, index: int) -> Drawn: ...


def package_files(patterns: Mapping[str, str]) -> dict[str, list[Path]]:
    """Files of Debian packages, sorted, by package.

    Args:
        patterns: package -> glob below the root of the file system.

    Raises:
        ValueError: some packages are missing; tells how to get all of them, with and without root.
    """
    found = {
        package: next((files for root in PACKAGE_ROOTS if (files := sorted(root.glob(pattern)))), [])
        for package, pattern in patterns.items()
    }
    if missing := " ".join(sorted(package for package, files in found.items() if not files)):
        raise ValueError(
            f"Debian packages are missing: run `apt-get install {missing}`, or without root "
            f"`apt-get download {missing} && for deb in *.deb; do dpkg -x $deb {PACKAGE_ROOTS[1]}; done`"
        )
    return found


@cache
def plain_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib carries it: there on every machine."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def frame_size(rng: random.Random, side: int = 128) -> Size:
    """A square of `side` in nine of ten cases, else up to twice as large with any aspect ratio."""
    return (side, side) if rng.random() < 0.9 else (rng.randint(side, 2 * side), rng.randint(side, 2 * side))


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB of a hue in turns (any real number), saturation and value in [0, 1]."""

    def channel(n: int) -> int:
        k = (n + 6 * hue) % 6
        return round(255 * value * (1 - saturation * max(0.0, min(k, 4 - k, 1.0))))

    return channel(5), channel(3), channel(1)


def random_hue(rng: random.Random, split: Split) -> float:
    low, high = HELDOUT_HUES
    return rng.uniform(low, high) if split == "heldout" else rng.uniform(high, low + 1)


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A background of two shades of one hue, so that a blend keeps to the hues of its split."""

    shades: tuple[Colour, Colour]
    texture: str
    grain: float

    @staticmethod
    def draw(rng: random.Random, split: Split, max_saturation: float = 1.0, contrast: float = 1.0) -> Ground:
        """
        Args:
            max_saturation: 0 gives greys only, 1 any colour.
            contrast: how far the second shade may lie from the first; 0 makes them equal.
        """
        hue = random_hue(rng, split)
        min_saturation = 0.35 if split == "heldout" else 0.0  # a grey has no hue to be unseen
        saturation, saturation_too = (rng.uniform(min_saturation, max_saturation) for _ in range(2))
        value, value_too = (rng.uniform(0.1, 1) for _ in range(2))
        second = saturation + contrast * (saturation_too - saturation), value + contrast * (value_too - value)
        return Ground(
            shades=(hsv(hue, saturation, value), hsv(hue, *second)),
            texture=rng.choice(TEXTURES[split]),
            grain=rng.choice([0.0, 0.0, rng.uniform(1, 6)]),
        )

    def paint(self, rng: random.Random, size: Size) -> Image.Image:
        """An RGB picture of this size; `rng` places the texture."""
        width, height = size
        noise = np.random.default_rng(rng.getrandbits(64))
        first, second = np.array(self.shades, np.float32)
        pixels = first + self._blend(noise, size)[..., None] * (second - first)
        if self.grain:
            pixels = pixels + noise.normal(0, self.grain, (height, width, 1)).astype(np.float32)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def _blend(self, noise: np.random.Generator, size: Size) -> np.ndarray:
        """Weight `(height, width)` of the second shade."""
        width, height = size
        x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
        if self.texture == "plain":
            return np.zeros((height, width), np.float32)
        if self.texture == "gradient":
            angle = noise.uniform(0, 2 * math.pi)
            ramp = x * math.cos(angle) + y * math.sin(angle)
            return (ramp - ramp.min()) / np.ptp(ramp)
        if self.texture == "checks":
            side = noise.integers(8, 33)
            return ((x // side + y // side) % 2).astype(np.float32)
        assert self.texture == "clouds"
        coarse = noise.integers(0, 256, (noise.integers(2, 9), noise.integers(2, 9)), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32) / 255


def contrasting_ground(
    rng: random.Random, colours: Sequence[Colour], split: Split = "train", max_saturation: float = 0.35
) -> Ground:
    """A dull background whose two shades are far from all these colours."""
    while True:
        ground = Ground.draw(rng, split, max_saturation=max_saturation, contrast=0.3)
        if all(math.dist(colour, shade) > 110 for colour in colours for shade in ground.shades):
            return ground


def choose_questions(rng: random.Random, questions: Sequence[Question]) -> list[Question]:
    """Three to five of the questions, of as many tasks as there are."""
    shuffled = list(questions)
    rng.shuffle(shuffled)
    firsts = list({question.task: question for question in shuffled}.values())
    rest = [question for question in shuffled if question not in firsts]
    return (firsts + rest)[: rng.randint(3, 5)]


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Six frames of a clip, from its start to its end, in two lines."""
    width, height = frames[0].size
    gap = 1 + width // 32
    sheet = Image.new("RGB", (3 * width + 2 * gap, 2 * height + gap), "white")
    for i in range(6):
        frame = frames[round(i * (len(frames) - 1) / 5)]
        sheet.paste(frame, (i % 3 * (width + gap), i // 3 * (height + gap)))
    return sheet


def luma(colour: Colour) -> float:
    """Perceived brightness, 0 to 255 (ITU-R BT.601)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def paste_cutout(
    rng: random.Random, canvas: Image.Image, cutout: Image.Image, *, tilt: float, extent: tuple[float, float]
) -> None:
    """Pastes an RGBA cut-out whole: tilted by up to ±`tilt` degrees, at a random size and place.

    Args:
        extent: bounds of its larger side, as a part of the canvas side that limits it.
    """
    turned = cutout.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getchannel("A").getbbox())
    scale = rng.uniform(*extent) * min(canvas.width / turned.width, canvas.height / turned.height)
    width, height = (max(1, int(side * scale)) for side in turned.size)
    turned = turned.resize((width, height), Image.Resampling.BICUBIC)
    corner = rng.randint(0, canvas.width - width), rng.randint(0, canvas.height - height)
    canvas.paste(turned, corner, turned)


def photograph(rng: random.Random, image: Image.Image, max_blur: float = 0.8) -> Image.Image:
    """A camera's small faults: brightness, and sometimes blur of up to `max_blur` pixels."""
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.15))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, max_blur)))
    return image
