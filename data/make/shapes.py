"""Coloured shapes with questions about colour, shape, count, position and relation; right by construction."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

from PIL import Image, ImageDraw

from data.make.canvas import (
    Colour,
    Ground,
    Picture,
    Question,
    Size,
    Source,
    Split,
    choose_questions,
    contrasting_ground,
    frame_size,
    photograph,
)

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "hexagon", "cross")
COLOURS: dict[str, Colour] = {
    "red": (214, 36, 36),
    "blue": (36, 76, 214),
    "green": (36, 150, 56),
    "yellow": (246, 222, 40),
    "orange": (248, 136, 20),
    "purple": (128, 44, 170),
    "black": (16, 16, 16),
    "white": (250, 250, 250),
    "pink": (248, 150, 190),
    "brown": (116, 68, 32),
}
#: Colours and outlines (below) of training pictures alone. With more pairs than can be learnt one by one, what shape a thing has
#: and what colour have to be told apart.
TRAINING_COLOURS: dict[str, Colour] = {
    "gray": (128, 128, 128),
    "cyan": (64, 206, 226),
    "lime": (168, 228, 44),
    "tan": (208, 174, 124),
}
#: 12 of the 80 pairs are never drawn in training; each colour and each shape has one at least.
HELDOUT_PAIRS = frozenset(
    (shape, list(COLOURS)[(3 * i + offset) % 10])
    for offset, shapes in [(0, SHAPES), (4, SHAPES[:4])]
    for i, shape in enumerate(shapes)
)
#: Places that a question can name, as parts of width and height.
REGIONS = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "center": (0.5, 0.5),
}
#: Bounds of an object's radius, as parts of the smaller side, by the number of objects.
RADII = {1: (0.1, 0.24), 2: (0.1, 0.21), 3: (0.1, 0.19), 4: (0.095, 0.16), 5: (0.095, 0.15)}
SUPERSAMPLING = 4


def _polygon(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners on the unit circle, the first on top; every second one at radius `inner`."""
    return [
        (radius * math.sin(angle), -radius * math.cos(angle))
        for i in range(corners)
        for radius, angle in [(inner if i % 2 else 1.0, 2 * math.pi * i / corners)]
    ]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            16 * math.sin(t) ** 3 / 17,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in turns
    ]


def _moon() -> list[tuple[float, float]]:
    """A crescent that is open to the right: most of a circle, and back along a flatter arc."""
    outer = [(math.cos(t), math.sin(t)) for t in (math.pi * (0.3 + 1.4 * i / 32) for i in range(33))]
    left, (tip_x, tip_y) = -0.45, outer[0]
    inner = [(left + (tip_x - left) * (y / tip_y) ** 2, y) for y in (-tip_y + 2 * tip_y * i / 16 for i in range(1, 16))]
    return [*outer, *inner]


_A, _B = 0.32, 0.94
#: Outlines within the unit circle.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _polygon(64),
    "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
    "triangle": _polygon(3),
    "star": _polygon(10, inner=0.42),
    "heart": _heart(),
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "hexagon": _polygon(6),
    "cross": [(-_A, -_B), (_A, -_B), (_A, -_A), (_B, -_A), (_B, _A), (_A, _A),
              (_A, _B), (-_A, _B), (-_A, _A), (-_B, _A), (-_B, -_A), (-_A, -_A)],
}  # fmt: skip
TRAINING_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "oval": [(0.55 * x, y) for x, y in _polygon(64)],
    "moon": _moon(),
    "arrow": [(0, -1), (0.75, -0.15), (0.3, -0.15), (0.3, 0.94), (-0.3, 0.94), (-0.3, -0.15), (-0.75, -0.15)],
    "house": [(0, -0.98), (0.7, -0.3), (0.55, -0.3), (0.55, 0.8), (-0.55, 0.8), (-0.55, -0.3), (-0.7, -0.3)],
    "bolt": [(0.28, -0.95), (-0.52, 0.16), (-0.06, 0.16), (-0.28, 0.95), (0.52, -0.2), (0.08, -0.2)],
    "drop": [(0, -1), *((0.6 * math.cos(t), 0.36 + 0.6 * math.sin(t)) for t in (math.pi * (i - 3) / 24 for i in range(31)))],
}  # fmt: skip


#: What pictures of a split may have; the training ones have all that there is.
PALETTES: Mapping[Split, Mapping[str, Colour]] = {"train": COLOURS | TRAINING_COLOURS, "heldout": COLOURS}
FORMS: Mapping[Split, Mapping[str, Sequence[tuple[float, float]]]] = {
    "train": OUTLINES | TRAINING_OUTLINES,
    "heldout": OUTLINES,
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: centre and radius in pixels, tilt in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    tilt: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """Objects of one shape and colour."""

    shape: str
    colour: str
    things: Sequence[Thing]

    def __str__(self) -> str:
        return f"{len(self.things)} {self.colour} {plural(self.shape, len(self.things))}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    size: Size
    groups: Sequence[Group]

    @property
    def things(self) -> list[Thing]:
        return [thing for group in self.groups for thing in group.things]


def plural(shape: str, count: int) -> str:
    return shape if count == 1 else "crosses" if shape == "cross" else shape + "s"


class Shapes:
    """Scenes of one to five objects in one or two groups.

    Held out are the pairs of shape and colour in `HELDOUT_PAIRS`: every held-out picture has one, no training one any. Held-out
    pictures have `SHAPES` and `COLOURS` alone, training ones others, too.
    """

    name: ClassVar[str] = "shapes"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 40_000, "heldout": 2_000}
    sources: ClassVar[Sequence[Source]] = ()

    def draw(self, rng: random.Random, split: Split, index: int) -> Picture:
        scene = self.arrange(rng, split)
        ground = contrasting_ground(rng, [PALETTES["train"][group.colour] for group in scene.groups])
        image = photograph(rng, paint(rng, scene, ground))
        caption = " and ".join(map(str, scene.groups))
        return Picture(image=image, caption=caption, questions=self.choose(rng, scene))

    def arrange(self, rng: random.Random, split: Split) -> Scene:
        return random_scene(rng, split)

    def choose(self, rng: random.Random, scene: Scene) -> list[Question]:
        return choose_questions(rng, list(all_questions(scene)))


class _Focused(Shapes):
    """Scenes of which questions of one sort alone are asked. For training alone; held-out `Shapes` test them."""

    sizes: ClassVar[Mapping[Split, int]] = {"train": 20_000}

    def arrange(self, rng: random.Random, split: Split) -> Scene:
        while not self.choose(rng, scene := random_scene(rng, split)):
            pass
        return scene


class Places(_Focused):
    """Where things are: less than half of `Shapes` has a place to ask about, and few questions are of this kind."""

    name: ClassVar[str] = "places"

    def choose(self, rng: random.Random, scene: Scene) -> list[Question]:
        return [question for question in all_questions(scene) if question.task == "position"]


class Tallies(_Focused):
    """How many there are of one shape beside another, which takes telling what belongs to it from what does not."""

    name: ClassVar[str] = "tallies"

    def choose(self, rng: random.Random, scene: Scene) -> list[Question]:
        _everything, *of_a_shape = (question for question in all_questions(scene) if question.task == "count")
        return of_a_shape if len(scene.groups) > 1 else []


def random_scene(rng: random.Random, split: Split) -> Scene:
    """Draws groups, then places until everything fits."""
    count = rng.randint(1, 5)
    n_groups = rng.choice([1, 2, 2]) if count > 1 else 1
    counts = [count] if n_groups == 1 else [(first := rng.randint(1, count - 1)), count - first]
    kinds = _random_kinds(rng, split, n_groups)
    size = frame_size(rng)
    while True:
        placed: list[Thing] = []
        groups = [Group(shape=s, colour=c, things=_place(rng, s, c, n, count, size, placed))
                  for (s, c), n in zip(kinds, counts, strict=True)]  # fmt: skip
        if len(placed) == count:
            return Scene(size=size, groups=groups)


def _random_kinds(rng: random.Random, split: Split, n_groups: int) -> list[tuple[str, str]]:
    """Pairs that differ in shape and in colour."""
    while True:
        shapes, colours = (rng.sample(list(names), n_groups) for names in (FORMS[split], PALETTES[split]))
        kinds = list(zip(shapes, colours, strict=True))
        if bool(HELDOUT_PAIRS.intersection(kinds)) == (split == "heldout"):
            return kinds


def _place(
    rng: random.Random, shape: str, colour: str, n: int, total: int, size: Size, placed: list[Thing]
) -> list[Thing]:
    """Adds up to `n` things to `placed`, clear of those there; a lone one mostly gets a place with a name."""
    width, height = size
    low, high = (bound * min(size) for bound in RADII[total])
    upright = {"square": 0.2, "diamond": 0.15, "cross": 0.3}.get(shape, 0.45)
    region = rng.choice(list(REGIONS)) if n == 1 and rng.random() < 0.8 else None
    things: list[Thing] = []
    for _ in range(60):
        if len(things) == n:
            break
        radius = rng.uniform(low, high)
        if region:
            across, down = REGIONS[region]
            x, y = width * (across + rng.uniform(-0.08, 0.08)), height * (down + rng.uniform(-0.08, 0.08))
        else:
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        thing = Thing(shape=shape, colour=colour, x=x, y=y, radius=radius, tilt=rng.uniform(-upright, upright))
        inside = min(x, y, width - x, height - y) >= radius + 2
        clear = all(math.dist((x, y), (o.x, o.y)) > radius + o.radius + 3 for o in placed)
        if inside and clear and (region is None or region_of(thing, size) == region):
            things.append(thing)
            placed.append(thing)
    return things


def paint(rng: random.Random, scene: Scene, ground: Ground) -> Image.Image:
    """Paints a scene with smooth edges; `rng` moves each group's colour a little."""
    image = ground.paint(rng, scene.size)
    for group in scene.groups:
        colour = tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in PALETTES["train"][group.colour])
        for thing in group.things:
            _paint_thing(image, thing, colour)
    return image


def _paint_thing(image: Image.Image, thing: Thing, colour: tuple[int, ...]) -> None:
    left, top = int(thing.x - thing.radius) - 1, int(thing.y - thing.radius) - 1
    side = math.ceil(2 * thing.radius) + 4
    cos, sin = math.cos(thing.tilt) * thing.radius, math.sin(thing.tilt) * thing.radius
    corners = [
        (SUPERSAMPLING * (thing.x - left + x * cos - y * sin), SUPERSAMPLING * (thing.y - top + x * sin + y * cos))
        for x, y in FORMS["train"][thing.shape]
    ]
    mask = Image.new("L", (SUPERSAMPLING * side, SUPERSAMPLING * side))
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    image.paste(colour, (left, top), mask.reduce(SUPERSAMPLING))


def region_of(thing: Thing, size: Size) -> str | None:
    """The place that the whole thing clearly lies in, or None where people could disagree."""
    dx, dy = thing.x / size[0] - 0.5, thing.y / size[1] - 0.5
    if max(abs(dx), abs(dy)) < 0.09:
        return "center"
    clear_x, clear_y = (max(0.15, thing.radius / side) for side in size)
    if abs(dx) < clear_x or abs(dy) < clear_y:
        return None
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def all_questions(scene: Scene) -> Iterator[Question]:
    """Every question with one undisputed answer."""

    def ask(task: str, question: str, answer: str | int) -> Question:
        return Question(task=task, question=question, answer=str(answer))

    yield ask("count", "How many shapes are there?", len(scene.things))
    for group in scene.groups:
        n, shape = len(group.things), group.shape
        yield ask("colour", f"What colour {'is' if n == 1 else 'are'} the {plural(shape, n)}?", group.colour)
        yield ask("shape", f"What shape is {group.colour}?", shape)
        yield ask("count", f"How many {plural(shape, 2)} are there?", n)
        if n == 1 and (region := region_of(group.things[0], scene.size)):
            yield ask("position", f"Where is the {shape}?", region)
    lone = [group.things[0] for group in scene.groups if len(group.things) == 1]
    for one, other in permutations(lone, 2):
        dx, dy = (one.x - other.x) / scene.size[0], (one.y - other.y) / scene.size[1]
        if abs(dx) >= 0.2:
            side = "left" if dx < 0 else "right"
            yield ask("relation", f"Is the {one.shape} left or right of the {other.shape}?", side)
        if abs(dy) >= 0.2:
            side = "above" if dy < 0 else "below"
            yield ask("relation", f"Is the {one.shape} above or below the {other.shape}?", side)
