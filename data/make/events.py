"""Clips in which something appears, disappears, blinks or changes.

No event is under way in the middle of a clip, and what shows there does not depend on the answers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import ClassVar

from data.make.actors import Cast
from data.make.canvas import Question, Source, Split, choose_questions
from data.make.film import LENGTHS, Clip, Pose, Role, shoot
from data.make.motions import SIZES, SOURCES, are_apart, either, open_questions, options, random_place


def standing(rng: random.Random, count: int) -> list[Pose]:
    """Poses of so many things, clear of each other."""
    while True:
        poses = []
        for _ in range(count):
            x, y = random_place(rng, margin=24)
            poses.append(Pose(x=x, y=y, size=rng.uniform(*SIZES), angle=rng.uniform(-30, 30)))
        if are_apart([[pose] for pose in poses], distance=46):
            return poses


def spaced(rng: random.Random, count: int, low: int, high: int, gap: int) -> list[int]:
    """Random frames of `low` to `high`, ascending, at least `gap` apart."""
    return [
        frame + i * gap for i, frame in enumerate(sorted(rng.sample(range(low, high + 1 - (count - 1) * gap), count)))
    ]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Two or three things appear, or disappear, one after the other, all before the middle or all after it."""

    cast: Cast = field(default_factory=Cast)

    name: ClassVar[str] = "order"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 2000, "heldout": 100}
    sources: ClassVar[Sequence[Source]] = SOURCES

    def draw(self, rng: random.Random, split: Split, index: int) -> Clip:
        n_frames, count = rng.randint(24, LENGTHS[1]), rng.choice([2, 3, 3])
        deed = rng.choice(["appear", "disappear"])
        actors = self.cast.draw(rng, split, index, [deed] * count)
        gap = n_frames // 12
        window = (gap, n_frames // 2 - 1) if rng.random() < 0.5 else (n_frames // 2 + 1, n_frames - gap)
        roles = []
        for actor, pose, time in zip(actors, standing(rng, count), spaced(rng, count, *window, gap), strict=True):
            poses = [pose if (i >= time) == (deed == "appear") else None for i in range(n_frames)]
            roles.append(Role(actor=actor, poses=poses))
        names = [actor.name for actor in actors]
        caption = f"the {names[0]} {deed}s" + "".join(f", then the {name}" for name in names[1:])
        questions = choose_questions(rng, list(self._questions(rng, names, deed)))
        nth = dict(zip(("first", "second", "third") if count == 3 else ("first", "last"), names, strict=True))
        questions += open_questions(split, caption, *((f"What {deed}s {when}?", name) for when, name in nth.items()))
        turns = ("first", "last") if count == 2 else ("first", "second", "last")
        facts = {name: {"turn": turn} for name, turn in zip(names, turns, strict=True)}
        rng.shuffle(roles)
        return Clip(frames=shoot(rng, split, roles), caption=caption, questions=questions, facts=facts)

    def _questions(self, rng: random.Random, names: Sequence[str], deed: str) -> Iterator[Question]:
        for pair in combinations(names, 2):
            which = rng.randrange(2)
            question = f"Which {deed}s {('first', 'last')[which]}, {either(rng, pair)}?"
            yield Question(task="order", question=question, answer=pair[which], options=options(rng, *pair))
        for before, after in pairwise(names):
            question = f"What {deed}s right before the {after}?"
            yield Question(task="previous", question=question, answer=before, options=options(rng, *names))
        question = (
            f"Do the {' and the '.join(rng.sample(names, 2))} {' or '.join(options(rng, 'appear', 'disappear'))}?"
        )
        yield Question(task="event", question=question, answer=deed, options=options(rng, "appear", "disappear"))


@dataclass(frozen=True, kw_only=True)
class Blinks:
    """Two things blink one to four times, one more often than the other."""

    cast: Cast = field(default_factory=Cast)

    name: ClassVar[str] = "blinks"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 1000, "heldout": 50}
    sources: ClassVar[Sequence[Source]] = SOURCES

    def draw(self, rng: random.Random, split: Split, index: int) -> Clip:
        n_frames = rng.randint(24, LENGTHS[1])
        actors = self.cast.draw(rng, split, index, ["blink"] * 2)
        counts = rng.sample(range(1, 5), 2)
        roles = []
        for actor, pose, count in zip(actors, standing(rng, 2), counts, strict=True):
            dark = blinking(rng, n_frames, count)
            roles.append(Role(actor=actor, poses=[None if i in dark else pose for i in range(n_frames)]))
        names = [actor.name for actor in actors]
        questions = [
            Question(
                task="count",
                question=f"How many times does the {name} blink?",
                answer=str(count),
                options=options(rng, "1", "2", "3", "4"),
            )
            for name, count in zip(names, counts, strict=True)
        ]
        asked = f"Which blinks more often, {either(rng, names)}?"
        more = max(zip(counts, names, strict=True))[1]
        questions.append(Question(task="more", question=asked, answer=more, options=options(rng, *names)))
        times = [f"the {n} blinks {c} {'time' if c == 1 else 'times'}" for n, c in zip(names, counts, strict=True)]
        frames, caption = shoot(rng, split, roles), " and ".join(times)
        less = min(zip(counts, names, strict=True))[1]
        questions = choose_questions(rng, questions)
        questions += open_questions(
            split, caption, ("What blinks more often?", more), ("What blinks less often?", less)
        )
        facts = {
            name: {"blinks": str(count), "than the other": "more" if name == more else "less"}
            for name, count in zip(names, counts, strict=True)
        }
        return Clip(frames=frames, caption=caption, questions=questions, facts=facts)


def blinking(rng: random.Random, n_frames: int, count: int) -> set[int]:
    """Frames in which a thing that blinks so often is away; it is there in the middle, at the start and at the end."""
    length = n_frames // 12
    while True:
        starts = spaced(rng, count, length, n_frames - 2 * length, 2 * length)
        dark = {start + i for start in starts for i in range(length)}
        if not dark & {n_frames // 2 - 1, n_frames // 2}:
            return dark


@dataclass(frozen=True, kw_only=True)
class Changes:
    """A thing turns into another, which turns into a third; the middle shows the second."""

    cast: Cast = field(default_factory=Cast)

    name: ClassVar[str] = "changes"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 1500, "heldout": 75}
    sources: ClassVar[Sequence[Source]] = SOURCES

    def draw(self, rng: random.Random, split: Split, index: int) -> Clip:
        n_frames = rng.randint(*LENGTHS)
        actors = self.cast.draw(rng, split, index, ["change"] * 3)
        (pose,) = standing(rng, 1)
        ends = [round(n_frames * rng.uniform(*part)) for part in ((0.2, 0.4), (0.6, 0.8))] + [n_frames]
        roles = [
            Role(actor=actor, poses=[pose if start <= i < end else None for i in range(n_frames)])
            for actor, start, end in zip(actors, [0, *ends], ends, strict=False)
        ]
        first, second, third = names = [actor.name for actor in actors]
        asked = [
            ("before", "What is there at the start?", first),
            ("before", f"What was there before the {second}?", first),
            ("after", "What is there at the end?", third),
            ("after", f"What does the {second} turn into?", third),
        ]
        questions = [
            Question(task=task, question=question, answer=answer, options=options(rng, *names))
            for task, question, answer in asked
        ]
        caption = f"the {first} turns into the {second}, then into the {third}"
        frames = shoot(rng, split, roles)
        questions = choose_questions(rng, questions)
        questions += open_questions(
            split, caption, ("What is there in the middle?", second), (f"What does the {first} turn into?", second)
        )
        facts = {
            name: {"there": when} for name, when in zip(names, ("at the start", "between", "at the end"), strict=True)
        }
        return Clip(frames=frames, caption=caption, questions=questions, facts=facts)
