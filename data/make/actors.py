"""What moves in clips: shapes, emoji and stamps as cut-outs of one size, and who may do what in which split."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image, ImageDraw

from data.make.canvas import Colour, Source, Split
from data.make.emoji import Emoji
from data.make.shapes import COLOURS, HELDOUT_PAIRS, OUTLINES, SHAPES, SUPERSAMPLING
from data.make.stamps import Stamps, load_stamp

#: Side of a cut-out, and of what it shows: it may be turned without being cut off.
CUTOUT, CONTENT = 96, 64
#: One in eight of the emoji and stamps, and of the pairs of a thing and what it does, is never seen in training.
HELDOUT_SHARE = 8
#: Words of names that describe a sign, a shape or a direction, which would read oddly in "the ... moves left".
_SIGNS = ("arrow", "button", "sign", "clock", "o'clock", "thirty", "flag", "symbol", "mark", "hole", "letter", "no")
_WAYS = ("left", "right", "up", "down")
_NO_THINGS = {*SHAPES, *COLOURS, *_SIGNS, *_WAYS}
_MAX_WORDS = 3


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A thing with a name.

    Attributes:
        cutout: RGBA, `CUTOUT` square, with what shows in the middle, `CONTENT` at its larger side.
        colour: what a background must differ from, if the thing has one colour.
    """

    name: str
    cutout: Image.Image
    colour: Colour | None = None


@dataclass(frozen=True, kw_only=True)
class Troupe:
    """Things of one sort.

    Attributes:
        share: of all actors.
        names: those that training may show, and those that it may not.
        paint: makes the actor of a name; picklable.
    """

    share: float
    names: Mapping[Split, Sequence[str]]
    paint: Callable[[str], Actor]
    sources: Sequence[Source] = ()


def shapes() -> Troupe:
    """Coloured shapes; as in pictures, training lacks `HELDOUT_PAIRS`."""
    names: dict[Split, list[str]] = {"train": [], "heldout": []}
    for shape in SHAPES:
        for colour in COLOURS:
            names["heldout" if (shape, colour) in HELDOUT_PAIRS else "train"].append(f"{colour} {shape}")
    return Troupe(share=0.5, names=names, paint=paint_shape)


def emoji() -> Troupe:
    kind = Emoji()
    glyphs = {name: character for character, name in kind.names if _is_thing(name)}
    return Troupe(share=0.35, names=_split(glyphs), paint=partial(_paint, glyphs, kind.glyph), sources=kind.sources)


def stamps() -> Troupe:
    """Stamps whose caption is no more than `A sea turtle.`, and no other's."""
    kind = Stamps()
    bare = [(found[1], path) for path, text in kind.stamps if (found := re.fullmatch(r"An? ([a-z' -]+)\.", text))]
    times = Counter(name for name, _ in bare)
    files = {name: path for name, path in bare if times[name] == 1 and _is_thing(name)}
    return Troupe(share=0.15, names=_split(files), paint=partial(_paint, files, load_stamp), sources=kind.sources)


def paint_shape(name: str) -> Actor:
    """`red circle` as an actor."""
    colour, shape = name.split()
    side, radius = SUPERSAMPLING * CUTOUT, SUPERSAMPLING * CONTENT / 2
    mask = Image.new("L", (side, side))
    corners = [(side / 2 + x * radius, side / 2 + y * radius) for x, y in OUTLINES[shape]]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    cutout = Image.new("RGBA", (CUTOUT, CUTOUT), COLOURS[colour])
    cutout.putalpha(mask.reduce(SUPERSAMPLING))
    return Actor(name=name, cutout=cutout, colour=COLOURS[colour])


def _paint(sources: Mapping[str, Any], load: Callable[[Any], Image.Image], name: str) -> Actor:
    picture = load(sources[name])
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = CONTENT / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    cutout = Image.new("RGBA", (CUTOUT, CUTOUT))
    cutout.paste(picture.resize((width, height)), ((CUTOUT - width) // 2, (CUTOUT - height) // 2))
    return Actor(name=name, cutout=cutout)


def _is_thing(name: str) -> bool:
    words = re.split("[ -]", name)
    return bool(re.fullmatch("[a-z' -]+", name)) and len(words) <= _MAX_WORDS and not _NO_THINGS & set(words)


def _split(names: Iterable[str]) -> Mapping[Split, Sequence[str]]:
    splits: dict[Split, list[str]] = {"train": [], "heldout": []}
    for name in names:
        splits["train" if zlib.crc32(name.encode()) % HELDOUT_SHARE else "heldout"].append(name)
    return splits


@dataclass(frozen=True)
class Cast:
    """All that can be in a clip.

    Training has neither unseen things nor unseen pairs of a thing and a deed. A held-out clip has unseen things alone
    (even numbers) or known things, one of which at least does what it never did (odd numbers).
    """

    troupes: Sequence[Troupe] = field(default_factory=lambda: (shapes(), emoji(), stamps()))

    def draw(self, rng: random.Random, split: Split, index: int, deeds: Sequence[str]) -> list[Actor]:
        """Different actors, one to do each of `deeds`."""
        unseen = split == "heldout" and index % 2 == 0
        while True:
            troupes = rng.choices(self.troupes, [troupe.share for troupe in self.troupes], k=len(deeds))
            names = [rng.choice(troupe.names["heldout" if unseen else "train"]) for troupe in troupes]
            pairs = list(zip(names, deeds, strict=True))
            if len(set(names)) < len(names) or any(map(is_invisible, pairs)):
                continue
            if unseen or any(map(is_heldout, pairs)) == (split == "heldout"):
                return [troupe.paint(name) for troupe, name in zip(troupes, names, strict=True)]


def is_heldout(pair: tuple[str, str]) -> bool:
    """Whether a known thing is never seen to do this in training."""
    return zlib.crc32("/".join(pair).encode()) % HELDOUT_SHARE == 0


def is_invisible(pair: tuple[str, str]) -> bool:
    """Whether nobody could see the thing do it: a circle turns unseen."""
    name, deed = pair
    return name.endswith("circle") and deed.endswith("clockwise")
