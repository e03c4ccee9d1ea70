"""The chain of filters on real clips: what is dropped by which, in which order, and what is written."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data.make.film import encode_mp4
from data.shards import Sample, open_source, write_shard
from video.curate import (
    N_FRAMES,
    Clip,
    Filter,
    clean_caption,
    english,
    filter_clips,
    image_text_similarity,
    little_overlaid_text,
    minimum_words,
    motion,
    motion_score,
    video_text_similarity,
)

SIDE, LENGTH = 64, 24
NOISE = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)


def clip(speed: int = 0, red: int = 0, cut: int = LENGTH) -> list[Image.Image]:
    """Noise with a white square that moves `speed` pixels a frame; grey, with this much red, from frame `cut` on."""
    frames = []
    for i in range(LENGTH):
        pixels = (NOISE // 4).copy() if i < cut else np.full_like(NOISE, 90)
        x = 4 + speed * i % (SIDE - 24)
        pixels[20:40, x : x + 20] = 255
        pixels[:4, :, 0] = red
        frames.append(Image.fromarray(pixels))
    return frames


def redness(frames: Sequence[Image.Image], text: str) -> float:
    """A similarity: how red the upper edge is, where the text speaks of red."""
    level = np.mean([np.asarray(frame)[0, :, 0].mean() for frame in frames]) / 255
    return float(level if "red" in text else 1 - level)


def examined(video: bytes, caption: str = "x") -> Clip:
    messages = [{"role": "user", "content": [{"type": "video", "video": video}]}]
    return Clip(Sample(key="x", source="s", messages=messages, metadata={}, caption=caption))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    samples = {
        "good": (clip(speed=2, red=250), "THE RED SQUARE MOVES"),
        "short": (clip(speed=2, red=250), "red"),
        "foreign": (clip(speed=2, red=250), "das rote Quadrat bewegt sich"),
        "unlike": (clip(speed=2, red=0), "the red square moves"),
        "static": (clip(speed=0, red=250), "the red square rests"),
    }
    files = [
        {"__key__": key, "mp4": encode_mp4(frames), "txt": text, "json": {"site": key}}
        for key, (frames, text) in samples.items()
    ]
    files += [{"__key__": "torn", "mp4": b"ftyp" * 9, "txt": "the red square moves"}]
    files += [{"__key__": "mute", "json": {"conversations": [{"from": "human", "value": "Hi"}]}}]
    write_shard(tmp_path / "clips.tar", files)
    return tmp_path / "clips.tar"


FILTERS = [
    minimum_words(3),
    english(0.5, probability=lambda text: float(not text.lower().startswith("das"))),
    image_text_similarity(redness, 0.5),
    motion(),
]


def test_each_clip_is_dropped_by_the_first_filter_that_finds_fault(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        statistics = filter_clips(open_source(clips, name="web"), tmp_path / "out", FILTERS)
    rows = [(row.name, row.limit, row.kept, row.dropped) for row in statistics.filters]
    assert rows == [
        ("words", ">= 3", 5, 1), ("english", ">= 0.5", 4, 1), ("image-text", ">= 0.5", 2, 1), ("motion", ">= 0.002", 1, 1)
    ]  # fmt: skip
    assert (statistics.kept, statistics.broken) == (1, 2)
    assert "no video" in caplog.text and "must hold one clip" in caplog.text
    (kept,) = open_source(tmp_path / "out", name="out")
    assert kept.caption == "The red square moves"
    assert kept.metadata["site"] == kept.metadata["id"] == "good"
    assert list(kept.metadata["scores"]) == ["words", "english", "image-text", "motion"]
    assert (
        kept.messages[0]["content"][0]["video"] == open_source(clips, name="web")[0].messages[0]["content"][0]["video"]
    )
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(statistics.table())
    assert "image-text" in capture.get() and "1 kept, 2 broken" in capture.get()


def test_a_filter_does_not_look_at_what_another_dropped(clips: Path, tmp_path: Path) -> None:
    looked: list[tuple[str, int]] = []

    def similarity(frames: Sequence[Image.Image], text: str) -> float:
        looked.append((text, len(frames)))
        return float("red" in text)

    filters = [minimum_words(4), image_text_similarity(similarity, 1), video_text_similarity(similarity, 1)]
    filter_clips(open_source(clips, name="web"), tmp_path / "out", filters)
    moves, rests = "The red square moves", "The red square rests"
    assert looked == [
        (moves, 1), (moves, N_FRAMES), ("Das rote Quadrat bewegt sich", 1),
        (moves, 1), (moves, N_FRAMES), (rests, 1), (rests, N_FRAMES),
    ]  # fmt: skip


def test_nothing_is_written_over(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already holds shards"):
        filter_clips(open_source(clips, name="web"), clips.parent, FILTERS)
    with pytest.raises(ValueError, match="its own name"):
        filter_clips(open_source(clips, name="web"), tmp_path / "out", [motion(), motion(0.1)])


def test_motion_tells_moving_clips_from_still_ones_and_slide_shows() -> None:
    def score(frames: list[Image.Image]) -> float:
        return motion_score(examined(encode_mp4(frames)).frames)

    still, slow, fast, slides = (score(frames) for frames in (clip(), clip(speed=1), clip(speed=3), clip(cut=12)))
    limit = motion().lowest
    assert limit is not None
    assert still < limit / 2 and slides < limit / 2  # noise of the encoder stays far below
    assert limit < slow < fast
    assert motion_score([Image.new("RGB", (8, 8))]) == 0


def test_text_on_frames_is_measured_over_three_of_them() -> None:
    covered = iter([0.0, 0.3, 0.0])
    step = little_overlaid_text(lambda frame: next(covered), highest=0.2)
    score = step.score(examined(encode_mp4(clip(speed=1))))
    assert score == pytest.approx(0.1) and step.keeps(score) and not step.keeps(0.21)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a dog \n runs ", "A dog runs"),
        ("A DOG AND I RUN. FAST!", "A dog and I run. Fast!"),
        ("it is over. we go home", "It is over. We go home"),
        ("The NASA rover", "The NASA rover"),
        ("", ""),
    ],
)
def test_captions_are_cleaned(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


def test_english_is_told_from_other_languages() -> None:
    pytest.importorskip("py3langid")
    step = english()
    for text, kept in [
        ("A dog runs", True),
        ("Two men play football", True),
        ("Cooking pasta at home", True),
        ("Ein Hund läuft über die Wiese", False),
        ("Un perro corre en el parque", False),
        ("дети играют", False),
    ]:
        assert step.keeps(step.score(examined(b"", text))) == kept


def test_limits_go_both_ways() -> None:
    step = Filter(name="x", score=lambda clip: 0, lowest=1, highest=2)
    assert [step.keeps(score) for score in (0.9, 1, 2, 2.1)] == [False, True, True, False]
    assert step.limit == ">= 1 and <= 2"
