"""Keeps captioned clips that are worth learning from: the chain of filters of section 7.1.2, in its order.

Each filter gives a clip a score and keeps it if that reaches a threshold. The paper names the filters and no thresholds;
the defaults here are ours. Scores of models come from the caller, as callables:

    filter_clips(source, "curated", [
        minimum_words(3),
        english(),
        little_overlaid_text(part_covered_by_text, 0.05),
        image_text_similarity(similarity, 0.2),
        video_text_similarity(similarity, 0.2),
        motion(),
    ])

Those that read no frames stand first, so that most of what is dropped is never decoded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.box import SIMPLE
from rich.table import Table
from tqdm import tqdm

from data.shards import Sample, Source, write_shard
from video.frames import load_frames

logger = logging.getLogger(__name__)

#: Frames that filters look at.
N_FRAMES = 16
#: Larger side of the grey frames whose differences are motion.
MOTION_SIDE = 64
_SHARD_SAMPLES = 500


class Clip:
    """A captioned clip under examination.

    Attributes:
        video: path or encoded bytes.
        caption: cleaned by `clean_caption`.
    """

    def __init__(self, sample: Sample) -> None:
        media = [part for message in sample.messages for part in message["content"] if part["type"] != "text"]
        if len(media) != 1 or media[0]["type"] != "video":
            raise ValueError(f"sample {sample.key!r} must hold one clip and nothing else to see or hear")
        if sample.caption is None:
            raise ValueError(f"the clip of sample {sample.key!r} has no caption")
        self.sample = sample
        self.video: bytes | Path = media[0]["video"]
        self.caption = clean_caption(sample.caption)

    @cached_property
    def frames(self) -> list[Image.Image]:
        """Up to `N_FRAMES`, spread over the clip; decoded when a filter first looks."""
        return load_frames(self.video, N_FRAMES)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Keeps clips whose score is at least `lowest` and at most `highest`; None is no limit."""

    name: str
    score: Callable[[Clip], float]
    lowest: float | None = None
    highest: float | None = None

    def keeps(self, score: float) -> bool:
        return (self.lowest is None or score >= self.lowest) and (self.highest is None or score <= self.highest)

    @property
    def limit(self) -> str:
        return " and ".join(
            f"{sign} {limit:g}" for sign, limit in ((">=", self.lowest), ("<=", self.highest)) if limit is not None
        )


# --- the filters -------------------------------------------------------------------------------------------------------


def minimum_words(lowest: int = 3) -> Filter:
    return Filter(name="words", score=lambda clip: len(clip.caption.split()), lowest=lowest)


def english(lowest: float = 0.05, probability: Callable[[str], float] | None = None) -> Filter:
    """Captions in English.

    Args:
        lowest: captions are short, so that even plain English ones are often given no more than 0.1.
        probability: that a text is English; py3langid's where None.

    Raises:
        ValueError: py3langid is wanted and not installed.
    """
    score = probability or english_probability()
    return Filter(name="english", score=lambda clip: score(clip.caption), lowest=lowest)


def little_overlaid_text(covered: Callable[[Image.Image], float], highest: float = 0.05) -> Filter:
    """Clips with little writing on them.

    Args:
        covered: part of a frame that lies in the boxes of a text detector, 0 to 1; the mean over three frames counts.
    """

    def score(clip: Clip) -> float:
        return float(np.mean([covered(frame) for frame in clip.frames[:: max(1, len(clip.frames) // 3)][:3]]))

    return Filter(name="overlaid text", score=score, highest=highest)


#: How well frames and a text go together, such as the cosine of a CLIP model's embeddings.
Similarity = Callable[[Sequence[Image.Image], str], float]


def image_text_similarity(similarity: Similarity, lowest: float) -> Filter:
    """Clips whose middle frame suits the caption."""

    def score(clip: Clip) -> float:
        return similarity([clip.frames[len(clip.frames) // 2]], clip.caption)

    return Filter(name="image-text", score=score, lowest=lowest)


def video_text_similarity(similarity: Similarity, lowest: float) -> Filter:
    """Clips that suit the caption as a whole, by a video-text model (or an image-text one over all frames)."""
    return Filter(name="video-text", score=lambda clip: similarity(clip.frames, clip.caption), lowest=lowest)


def motion(lowest: float = 0.002) -> Filter:
    """Clips in which something moves."""
    return Filter(name="motion", score=lambda clip: motion_score(clip.frames), lowest=lowest)


# --- their scores ------------------------------------------------------------------------------------------------------


def clean_caption(text: str) -> str:
    """Evens out spaces, takes back capitals that shout, and begins sentences with one."""
    text = " ".join(text.split())
    if not any(map(str.islower, text)):
        text = re.sub(r"\bi\b", "I", text.lower())
    return re.sub(r"(^|[.!?] )(\w)", lambda found: found[1] + found[2].upper(), text)


def english_probability() -> Callable[[str], float]:
    """py3langid's probability that a text is English, among its 97 languages.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError("english: py3langid tells languages apart; run `pip install py3langid`") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return lambda text: float(dict(identifier.rank(text))["en"])


def motion_score(frames: Sequence[Image.Image]) -> float:
    """How much of the picture changes from frame to frame, 0 to 1: mean absolute difference of small grey frames.

    The median over pairs of neighbours counts, so a slide show, which changes rarely and then all at once, is still.
    """
    small = []
    for frame in frames:
        grey = frame.convert("L")
        grey.thumbnail((MOTION_SIDE, MOTION_SIDE))
        small.append(np.asarray(grey, np.float32) / 255)
    return float(np.median([np.abs(after - before).mean() for before, after in pairwise(small)] or [0.0]))


# --- the chain ---------------------------------------------------------------------------------------------------------


@dataclass
class FilterStatistics:
    """What one filter did with the clips that came as far as it."""

    name: str
    limit: str
    kept: int = 0
    dropped: int = 0


@dataclass
class CurationStatistics:
    """What a chain of filters did.

    Attributes:
        kept: clips that passed all filters.
        broken: samples that could not be read, or held no single captioned clip; they are left out, too.
    """

    filters: list[FilterStatistics] = field(default_factory=list)
    kept: int = 0
    broken: int = 0

    def table(self) -> Table:
        """For people: a row per filter."""
        view = Table(caption=f"{self.kept} kept, {self.broken} broken", box=SIMPLE, show_edge=False, pad_edge=False)
        view.add_column("filter", no_wrap=True)
        for heading in ("limit", "kept", "dropped"):
            view.add_column(heading, justify="right", no_wrap=True)
        for row in self.filters:
            view.add_row(row.name, row.limit, str(row.kept), str(row.dropped))
        return view


def filter_clips(source: Source, out: str | Path, filters: Sequence[Filter]) -> CurationStatistics:
    """Writes the captioned clips of a source that pass all filters to shards.

    A shard's sample is the clip as it was, its cleaned caption, and its metadata with the `scores` of all filters.

    Args:
        source: captioned clips.
        out: folder for `clips-{000000...}.tar`; must hold no shards yet.
        filters: in order; a clip that one drops does not come to the next.

    Raises:
        ValueError: two filters have one name, or a folder has shards.
    """
    if len({f.name for f in filters}) < len(filters):
        raise ValueError(f"filters: each needs its own name, got {[f.name for f in filters]}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise ValueError(f"out: {str(out)!r} already holds shards; give another folder")
    statistics = CurationStatistics([FilterStatistics(f.name, f.limit) for f in filters])
    passing = _passing(source, filters, statistics)
    n_shards = 0
    while samples := list(islice(passing, _SHARD_SAMPLES)):
        write_shard(out / f"clips-{n_shards:06d}.tar", samples)
        n_shards += 1
    return statistics


def _passing(source: Source, filters: Sequence[Filter], statistics: CurationStatistics) -> Iterator[dict[str, Any]]:
    """Clips that pass, as they go into a shard; counts all."""
    for index in tqdm(range(len(source)), desc=f"filtering {source.name}", unit="clip", delay=2):
        try:
            clip = Clip(source[index])
            scores = _scores(clip, filters, statistics)
            content = clip.video if isinstance(clip.video, bytes) else clip.video.read_bytes()
            extension = _extension(content, clip.sample.key)
        except (ValueError, OSError) as error:
            statistics.broken += 1
            logger.warning("sample %d of source %r left out: %s", index, source.name, error)
            continue
        if len(scores) == len(filters):
            statistics.kept += 1
            metadata = clip.sample.metadata | {"id": clip.sample.key, "scores": scores}
            yield {"__key__": f"{index:09d}", extension: content, "txt": clip.caption, "json": metadata}


def _extension(content: bytes, key: str) -> str:
    """What a clip is called in a shard, by how it starts."""
    if content[4:8] == b"ftyp":
        return "mp4"
    if content.startswith(b"\x1a\x45\xdf\xa3"):
        return "mkv"  # or WebM, which is a part of it
    if content.startswith(b"GIF8"):
        return "gif"
    raise ValueError(f"the clip of sample {key!r} is no MP4, MKV, WebM or GIF, which shards can hold; convert it")


def _scores(clip: Clip, filters: Sequence[Filter], statistics: CurationStatistics) -> dict[str, float]:
    """Scores of the filters that keep a clip, up to the first that drops it."""
    scores: dict[str, float] = {}
    for step, count in zip(filters, statistics.filters, strict=True):
        score = step.score(clip)
        if not step.keeps(score):
            count.dropped += 1
            break
        count.kept += 1
        scores[step.name] = round(float(score), 4)
    return scores
