"""Clips of one frame: what things look like when they are as small as in clips, what they are called, and where they are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from data.make.actors import Actor, Troupe, emoji, shapes, stamps
from data.make.canvas import Question, Source, Split
from data.make.events import standing
from data.make.film import SIDE, Clip, Pose, Role, shoot
from data.make.motions import SOURCES, either, options

#: Least distance between two things, and of a thing from the middle, in pixels, for what is asked to be plain to see.
CLEAR = 14.0


def portrayed() -> tuple[Troupe, ...]:
    """Mostly emoji, which have the most names: all of them, as in pictures, also those that no clip may show."""
    everyone = emoji()
    everyone = replace(everyone, names={"train": [name for names in everyone.names.values() for name in names]})
    return tuple(
        replace(troupe, share=share) for troupe, share in ((everyone, 0.7), (shapes(), 0.15), (stamps(), 0.15))
    )


@dataclass(frozen=True, kw_only=True)
class Stills:
    """One to three things at rest, for training alone: nothing happens that one could ask about."""

    troupes: Sequence[Troupe] = field(default_factory=portrayed)

    name: ClassVar[str] = "stills"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 16000}
    sources: ClassVar[Sequence[Source]] = SOURCES

    def draw(self, rng: random.Random, split: Split, index: int) -> Clip:
        count = rng.randint(1, 3)
        actors: list[Actor] = []
        while len(actors) < count:
            troupe = rng.choices(self.troupes, [troupe.share for troupe in self.troupes])[0]
            name = rng.choice(troupe.names["train"])
            if name not in (actor.name for actor in actors):
                actors.append(troupe.paint(name))
        poses = sorted(standing(rng, count), key=lambda pose: pose.x)
        frames = shoot(rng, split, [Role(actor=actor, poses=[pose]) for actor, pose in zip(actors, poses, strict=True)])
        names = [actor.name for actor in actors]
        *firsts, last = (f"the {name}" for name in names)
        caption = f"{', '.join(firsts)} and {last}" if firsts else last
        questions = [Question(task="names", question="What is there, from left to right?", answer=caption)]
        if count == 1:
            questions = [Question(task="names", question="What is there?", answer=names[0])]
        questions += _questions(rng, names, poses)
        facts = {name: {way: side for way, _, side in _sides(pose)} for name, pose in zip(names, poses, strict=True)}
        return Clip(frames=frames, caption=caption, questions=questions, facts=facts)


def _questions(rng: random.Random, names: Sequence[str], poses: Sequence[Pose]) -> Iterator[Question]:
    """What is outermost, and on which side of the middle each thing is."""
    places = {
        "on the left": [pose.x for pose in poses],
        "on the right": [-pose.x for pose in poses],
        "at the top": [pose.y for pose in poses],
        "at the bottom": [-pose.y for pose in poses],
    }
    for place, along in places.items():
        (first, name), *others = sorted(zip(along, names, strict=True))
        if others and others[0][0] - first > CLEAR:
            yield Question(task="names", question=f"What is {place}?", answer=name, options=options(rng, *names))
    for name, pose in zip(names, poses, strict=True):
        for way, sides, side in _sides(pose):
            question = f"Is the {name} {'on' if way == 'across' else 'at'} {either(rng, sides)}?"
            yield Question(task="places", question=question, answer=side, options=options(rng, *sides))


def _sides(pose: Pose) -> Iterator[tuple[str, tuple[str, str], str]]:
    """On which side of the middle a thing is, across and down, where that is clear; and the two that are possible."""
    for way, sides, at in (("across", ("left", "right"), pose.x), ("down", ("top", "bottom"), pose.y)):
        if abs(at - SIDE / 2) > CLEAR:
            yield way, sides, sides[at > SIDE / 2]
