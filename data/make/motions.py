"""Clips whose things move, race, grow, turn and meet.

What happens is centred on the middle of the clip: there, place, size and tilt are drawn without regard to what happens, so
one frame from the middle does not tell it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import ClassVar

from data.make.actors import Actor, Cast
from data.make.canvas import Question, Source, Split, choose_questions
from data.make.emoji import Emoji
from data.make.film import LENGTHS, SIDE, Clip, Pose, Role, shoot
from data.make.stamps import Stamps

_DIAGONAL = math.sqrt(0.5)
#: Unit vectors, y down.
DIRECTIONS: Mapping[str, tuple[float, float]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-_DIAGONAL, -_DIAGONAL),
    "up right": (_DIAGONAL, -_DIAGONAL),
    "down left": (-_DIAGONAL, _DIAGONAL),
    "down right": (_DIAGONAL, _DIAGONAL),
}
_OPPOSITES = {"left": "right", "up": "down", "grow": "shrink", "clockwise": "counterclockwise"}
OPPOSITES = _OPPOSITES | {other: one for one, other in _OPPOSITES.items()}
OPPOSITES |= {f"{v} {h}": f"{OPPOSITES[v]} {OPPOSITES[h]}" for v in ("up", "down") for h in ("left", "right")}
VERBS = {direction: f"moves {direction}" for direction in DIRECTIONS} | {
    "grow": "grows",
    "shrink": "shrinks",
    "clockwise": "turns clockwise",
    "counterclockwise": "turns counterclockwise",
    "still": "stays still",
}
SIZES = (32.0, 44.0)
#: Least distance of a thing's middle from the edge at mid-clip, and between the middles of two things at any time.
MARGIN, APART = 30.0, 36.0
SOURCES: Sequence[Source] = (*Emoji.sources, *Stamps.sources)


def options(rng: random.Random, *answers: str) -> list[str]:
    return rng.sample(answers, len(answers))


def either(rng: random.Random, names: Sequence[str]) -> str:
    """`the dog or the red circle`, in random order."""
    return " or ".join(f"the {name}" for name in rng.sample(names, len(names)))


def open_questions(split: Split, caption: str, *asked: tuple[str, str]) -> list[Question]:
    """For training alone: what happens, and questions that name no candidate, so that a model has to look who does it.

    Held-out clips keep to the questions by which models were compared so far.
    """
    if split == "heldout":
        return []
    pairs = [("What happens?", caption), *asked]
    return [Question(task="open", question=question, answer=answer) for question, answer in pairs]


def random_place(rng: random.Random, margin: float = MARGIN) -> tuple[float, float]:
    return rng.uniform(margin, SIDE - margin), rng.uniform(margin, SIDE - margin)


def are_apart(paths: Sequence[Sequence[Pose]], distance: float = APART) -> bool:
    """Whether no two things ever come closer than this."""
    return all(
        math.dist((one.x, one.y), (other.x, other.y)) >= distance
        for poses in zip(*paths, strict=True)
        for i, one in enumerate(poses)
        for other in poses[:i]
    )


def path(rng: random.Random, deed: str, n_frames: int, length: float) -> list[Pose]:
    """Poses of a thing that does one of `VERBS` all the time.

    Args:
        length: of the way, in pixels, if it moves.
    """
    (x, y), size, tilt = random_place(rng), rng.uniform(*SIZES), rng.uniform(-30, 30)
    growth, turn = rng.uniform(1.8, 2.6), rng.uniform(90, 160)
    dx, dy = DIRECTIONS.get(deed, (0, 0))
    growing = {"grow": 1, "shrink": -1}.get(deed, 0)
    turning = {"counterclockwise": 1, "clockwise": -1}.get(deed, 0)
    poses = []
    for i in range(n_frames):
        s = i / (n_frames - 1) - 0.5
        way = length * s
        poses.append(
            Pose(x=x + dx * way, y=y + dy * way, size=size * growth ** (growing * s), angle=tilt + turning * turn * s)
        )
    return poses


@dataclass(frozen=True, kw_only=True)
class Motions:
    """One or two things, each of which moves one of eight ways, grows, shrinks, turns, or stays still."""

    cast: Cast = field(default_factory=Cast)

    name: ClassVar[str] = "motions"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 4000, "heldout": 200}
    sources: ClassVar[Sequence[Source]] = SOURCES

    def draw(self, rng: random.Random, split: Split, index: int) -> Clip:
        n_frames = rng.randint(*LENGTHS)
        deeds = [random_deed(rng) for _ in range(rng.choice([1, 2, 2]))]
        actors = self.cast.draw(rng, split, index, deeds)
        while not are_apart(paths := [path(rng, deed, n_frames, rng.uniform(30, 48)) for deed in deeds]):
            pass
        roles = [Role(actor=actor, poses=poses) for actor, poses in zip(actors, paths, strict=True)]
        caption = " and ".join(f"the {actor.name} {VERBS[deed]}" for actor, deed in zip(actors, deeds, strict=True))
        names = [actor.name for actor in actors]
        questions = choose_questions(rng, list(motion_questions(rng, names, deeds)))
        who = [
            (f"What {VERBS[deed]}?", name) for name, deed in zip(names, deeds, strict=True) if deeds.count(deed) == 1
        ]
        questions += open_questions(split, caption, *who)
        facts = {name: {"deed": VERBS[deed]} for name, deed in zip(names, deeds, strict=True)}
        return Clip(frames=shoot(rng, split, roles), caption=caption, questions=questions, facts=facts)


def random_deed(rng: random.Random) -> str:
    """Half of the deeds are movements; of a sort, all are equally likely."""
    sort = rng.choices(["move", "size", "turn", "still"], [50, 20, 20, 10])[0]
    return rng.choice(
        {"move": [*DIRECTIONS], "size": ["grow", "shrink"], "turn": ["clockwise", "counterclockwise"]}.get(
            sort, ["still"]
        )
    )


def direction_question(rng: random.Random, name: str, direction: str) -> Question:
    others = [other for other in DIRECTIONS if other not in (direction, OPPOSITES[direction])]
    return Question(
        task="direction",
        question=f"Which way does the {name} move?",
        answer=direction,
        options=options(rng, direction, OPPOSITES[direction], *rng.sample(others, 2)),
    )


def motion_questions(rng: random.Random, names: Sequence[str], deeds: Sequence[str]) -> Iterator[Question]:
    for name, deed in zip(names, deeds, strict=True):
        near = [OPPOSITES[deed]] if deed in OPPOSITES else []
        others = rng.sample([other for other in VERBS if other not in (deed, *near)], 3 - len(near))
        verbs = [VERBS[d] for d in (deed, *near, *others)]
        question = f"What does the {name} do?"
        yield Question(task="action", question=question, answer=verbs[0], options=options(rng, *verbs))
        if deed in DIRECTIONS:
            yield direction_question(rng, name, deed)
        elif deed in ("grow", "shrink"):
            question = f"Does the {name} {' or '.join(options(rng, deed, OPPOSITES[deed]))}?"
            yield Question(task="growth", question=question, answer=deed, options=options(rng, "grow", "shrink"))
        elif deed != "still":
            ways = options(rng, deed, OPPOSITES[deed])
            yield Question(task="rotation", question=f"Which way does the {name} turn?", answer=deed, options=ways)
    if len(set(deeds)) == 2:
        for name, deed in zip(names, deeds, strict=True):
            question = f"Which {VERBS[deed]}, {either(rng, names)}?"
            yield Question(task="which", question=question, answer=name, options=options(rng, *names))


@dataclass(frozen=True, kw_only=True)
class Races:
    """Two things move, one at least twice as fast as the other."""

    cast: Cast = field(default_factory=Cast)

    name: ClassVar[str] = "races"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 2000, "heldout": 100}
    sources: ClassVar[Sequence[Source]] = SOURCES

    def draw(self, rng: random.Random, split: Split, index: int) -> Clip:
        n_frames = rng.randint(*LENGTHS)
        actors = self.cast.draw(rng, split, index, ["race"] * 2)
        ways = rng.choices([*DIRECTIONS], k=2)
        slow = rng.uniform(14, 22)
        lengths = slow * rng.uniform(2, 2.6), slow
        while not are_apart(paths := [path(rng, w, n_frames, n) for w, n in zip(ways, lengths, strict=True)]):
            pass
        roles = [Role(actor=actor, poses=poses) for actor, poses in zip(actors, paths, strict=True)]
        faster, slower = names = [actor.name for actor in actors]
        questions = [direction_question(rng, name, way) for name, way in zip(names, ways, strict=True)]
        for one, other, degree in ((faster, slower, "faster"), (slower, faster, "slower")):
            asked = f"Which is {degree}, {either(rng, names)}?"
            questions.append(Question(task="speed", question=asked, answer=one, options=options(rng, *names)))
            asked = f"Is the {one} faster or slower than the {other}?"
            degrees = options(rng, "faster", "slower")
            questions.append(Question(task="faster", question=asked, answer=degree, options=degrees))
        caption = f"the {faster} moves {ways[0]} faster than the {slower}, which moves {ways[1]}"
        rng.shuffle(roles)  # who is drawn in front tells nothing
        frames = shoot(rng, split, roles)
        questions = choose_questions(rng, questions)
        questions += open_questions(split, caption, ("What is faster?", faster), ("What is slower?", slower))
        facts = {
            name: {"deed": VERBS[way], "pace": pace}
            for name, way, pace in zip(names, ways, ("faster", "slower"), strict=True)
        }
        return Clip(frames=frames, caption=caption, questions=questions, facts=facts)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two things come together; then they pass each other and so swap places, or they turn back."""

    cast: Cast = field(default_factory=Cast)

    name: ClassVar[str] = "pairs"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 1500, "heldout": 75}
    sources: ClassVar[Sequence[Source]] = SOURCES

    def draw(self, rng: random.Random, split: Split, index: int) -> Clip:
        n_frames = rng.randint(*LENGTHS)
        swap = rng.random() < 0.5
        actors = self.cast.draw(rng, split, index, ["swap" if swap else "return"] * 2)
        sides = rng.choice([("left", "right"), ("above", "below")])
        paths = meeting(rng, n_frames, swap=swap, upright=sides[0] == "above")
        roles = [Role(actor=actor, poses=poses) for actor, poses in zip(actors, paths, strict=True)]
        questions = choose_questions(rng, list(self._questions(rng, actors, sides, swap)))
        names = " and ".join(f"the {actor.name}" for actor in actors)
        caption = f"{names} {'swap places' if swap else 'come together and turn back'}"
        at_end = [actor.name for actor in (actors[::-1] if swap else actors)]
        places = ("on the left", "on the right") if "left" in sides else ("at the top", "at the bottom")
        where = [(f"What is {place} at the start?", actor.name) for place, actor in zip(places, actors, strict=True)]
        where += [(f"What is {place} at the end?", name) for place, name in zip(places, at_end, strict=True)]
        questions += open_questions(split, caption, *where)
        facts: dict[str, dict[str, str]] = {name: {} for name in at_end}
        for when, order in (("start", [actor.name for actor in actors]), ("end", at_end)):
            for name, place in zip(order, places, strict=True):
                facts[name][when] = place
        rng.shuffle(roles)
        return Clip(frames=shoot(rng, split, roles), caption=caption, questions=questions, facts=facts)

    def _questions(
        self, rng: random.Random, actors: Sequence[Actor], sides: tuple[str, str], swap: bool
    ) -> Iterator[Question]:
        names = [actor.name for actor in actors]
        one, other = rng.sample(names, 2)
        yield Question(
            task="swap",
            question=f"Do the {one} and the {other} swap places?",
            answer="yes" if swap else "no",
            options=options(rng, "yes", "no"),
        )
        yield Question(
            task="pass",
            question=f"Do the {one} and the {other} {' or '.join(options(rng, 'pass each other', 'turn back'))}?",
            answer="pass each other" if swap else "turn back",
            options=options(rng, "pass each other", "turn back"),
        )
        for one, other in permutations(names):
            at_start = sides[names.index(one)]
            at_end = sides[1 - sides.index(at_start)] if swap else at_start
            choices = " or ".join(sides) + (" of" if "left" in sides else "")
            for when, answer in (("start", at_start), ("end", at_end)):
                question = f"At the {when}, is the {one} {choices} the {other}?"
                yield Question(task="place", question=question, answer=answer, options=options(rng, *sides))


def meeting(rng: random.Random, n_frames: int, *, swap: bool, upright: bool) -> list[list[Pose]]:
    """Paths of two things, the first of which starts on the left, or above; in mid-clip they are side by side."""
    x, y = (SIDE / 2 + rng.uniform(-10, 10) for _ in range(2))
    far, aside = rng.uniform(34, 44), rng.choice([-1, 1]) * rng.uniform(20, 24)
    paths = []
    for sign in (-1, 1):
        size, tilt = rng.uniform(28, 36), rng.uniform(-30, 30)
        poses = []
        for i in range(n_frames):
            s = 2 * i / (n_frames - 1) - 1
            along, across = sign * far * (-s if swap else abs(s)), sign * aside * (1 - abs(s))
            dx, dy = (across, along) if upright else (along, across)
            poses.append(Pose(x=x + dx, y=y + dy, size=size, angle=tilt))
        paths.append(poses)
    return paths
