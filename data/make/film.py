"""From where actors stand in each frame to an encoded clip."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, cast

import av
import numpy as np
from PIL import Image

from data.make.actors import CONTENT, CUTOUT, Actor
from data.make.canvas import Facts, Question, Split, contrasting_ground, strip
from data.shards import VIDEO_MARKER

#: Side of a clip in pixels, and frames per second.
SIDE, RATE = 128, 8
#: Frames of a clip: 2 to 4 seconds.
LENGTHS = (16, 32)


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Centre and larger side in pixels, and turn in degrees, counterclockwise."""

    x: float
    y: float
    size: float
    angle: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Role:
    """An actor's pose in every frame, None where it is away."""

    actor: Actor
    poses: Sequence[Pose | None]


@dataclass(frozen=True, kw_only=True)
class Clip:
    frames: Sequence[Image.Image]
    caption: str
    questions: Sequence[Question]
    facts: Facts = field(default_factory=dict)

    marker: ClassVar[str] = VIDEO_MARKER

    def encode(self, rng: random.Random) -> tuple[str, bytes]:
        return "mp4", encode_mp4(self.frames)

    def view(self) -> Image.Image:
        return strip(self.frames)


def shoot(rng: random.Random, split: Split, roles: Sequence[Role]) -> list[Image.Image]:
    """All frames before one background; later roles are in front."""
    colours = [role.actor.colour for role in roles if role.actor.colour]
    ground = contrasting_ground(rng, colours, split, max_saturation=0.6)
    stage = ground.paint(rng, (SIDE, SIDE))
    frames = [stage.copy() for _ in roles[0].poses]
    for role in roles:
        for frame, pose, look in zip(frames, role.poses, _looks(role), strict=True):
            if pose is not None and look is not None:
                frame.paste(look, (round(pose.x - look.width / 2), round(pose.y - look.height / 2)), look)
    return frames


def _looks(role: Role) -> Iterator[Image.Image | None]:
    """The actor's cut-out at the size and turn of every frame; drawn anew only where these change."""
    looks: dict[tuple[float, float], Image.Image] = {}
    for pose in role.poses:
        if pose is None:
            yield None
            continue
        if (key := (pose.size, pose.angle)) not in looks:
            side = round(CUTOUT * pose.size / CONTENT)
            looks[key] = role.actor.cutout.resize((side, side)).rotate(pose.angle, Image.Resampling.BICUBIC)
        yield looks[key]


def encode_mp4(frames: Sequence[Image.Image], rate: int = RATE) -> bytes:
    """H.264 where PyAV has its encoder, else MPEG-4; the same frames give the same bytes."""
    file = io.BytesIO()
    codec, options = ("libx264", {"crf": "20", "preset": "veryfast"})
    if codec not in av.codecs_available:
        codec, options = "mpeg4", {"qmin": "2", "qmax": "5"}
    with av.open(file, "w", format="mp4", container_options={"fflags": "+bitexact"}) as out:
        stream = cast(av.VideoStream, out.add_stream(codec, rate=rate, options=options))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.gop_size = "yuv420p", len(frames)
        stream.thread_count = 1  # how frames are cut up among threads would change the bytes
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()
