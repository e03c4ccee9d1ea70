"""Keeps recordings that are speech: silero-vad's probability, as section 8.1.1 of the paper filters with (above 0.7)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.audio import SAMPLE_RATE, encode_flac, load_audio
from data.shards import Sample, Source, write_shard

logger = logging.getLogger(__name__)

_WINDOW = 512  # samples to a probability
_LEAD_IN = 16  # windows of silence put first: speech that starts at once is doubted for a while
_SHARD_SAMPLES = 500


@dataclass
class VADStatistics:
    """What a filter did; seconds are of audio.

    Attributes:
        broken: samples that could not be read, or held no single recording; they are left out, too.
    """

    kept: int = 0
    dropped: int = 0
    broken: int = 0
    kept_seconds: float = 0.0
    dropped_seconds: float = 0.0

    @property
    def kept_hours(self) -> float:
        return self.kept_seconds / 3600

    @property
    def dropped_hours(self) -> float:
        return self.dropped_seconds / 3600


def filter_speech(source: Source, out: str | Path, threshold: float = 0.7) -> VADStatistics:
    """Writes the samples of a source whose `speech_score` is above a threshold to shards.

    A shard's sample is the recording as 16 kHz mono FLAC, its transcript if it has one, and its metadata with the
    score as `speech_score`.

    Args:
        source: utterances, at most 10 minutes each.
        out: folder for `speech-{000000...}.tar`; must hold no shards yet.
        threshold: in [0, 1).

    Raises:
        ValueError: a threshold out of range, or a folder with shards.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: must be in [0, 1), got {threshold}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise ValueError(f"out: {str(out)!r} already holds shards; give another folder")
    statistics = VADStatistics()
    passing = _passing(source, threshold, statistics)
    n_shards = 0
    while samples := list(islice(passing, _SHARD_SAMPLES)):
        write_shard(out / f"speech-{n_shards:06d}.tar", samples)
        n_shards += 1
    return statistics


def speech_score(waveform: Tensor) -> float:
    """How sure it is that what sounds in a recording is speech, in [0, 1].

    The mean of silero-vad's probabilities of 32 ms windows, each weighed by its loudness (RMS): pauses and silence
    around an utterance cost nothing, while noise and music do. The paper does not say how it reduces an utterance to one score.

    Args:
        waveform: `(samples,)` at 16 kHz.
    """
    tail = -len(waveform) % _WINDOW
    padded = torch.nn.functional.pad(waveform, (_LEAD_IN * _WINDOW, tail))
    loudness = padded.view(-1, _WINDOW).square().mean(dim=1).sqrt()
    if not loudness.any():
        return 0.0
    with torch.inference_mode():
        probability = _silero().audio_forward(padded[None], SAMPLE_RATE)[0]
    return float((probability * loudness).sum() / loudness.sum())


def speech_spans(waveform: Tensor, threshold: float = 0.5) -> list[tuple[float, float]]:
    """Start and end, in seconds, of each stretch of speech in a 16 kHz waveform `(samples,)`, by silero-vad's rules."""
    from silero_vad import get_speech_timestamps

    spans = get_speech_timestamps(waveform, _silero(), threshold=threshold, sampling_rate=SAMPLE_RATE)
    return [(span["start"] / SAMPLE_RATE, span["end"] / SAMPLE_RATE) for span in spans]


@functools.cache
def _silero() -> Any:
    n_threads = torch.get_num_threads()
    from silero_vad import load_silero_vad  # importing it sets torch to one thread

    torch.set_num_threads(n_threads)
    return load_silero_vad()


def _passing(source: Source, threshold: float, statistics: VADStatistics) -> Iterator[dict[str, Any]]:
    """Samples above the threshold, as they go into a shard; counts all."""
    for index in tqdm(range(len(source)), desc=f"filtering {source.name}", unit="utterance", delay=2):
        try:
            sample = source[index]
            waveform = load_audio(_recording(sample))
        except (ValueError, OSError) as error:
            statistics.broken += 1
            logger.warning("sample %d of source %r left out: %s", index, source.name, error)
            continue
        seconds = len(waveform) / SAMPLE_RATE
        score = speech_score(waveform)
        if score <= threshold:
            statistics.dropped += 1
            statistics.dropped_seconds += seconds
            continue
        statistics.kept += 1
        statistics.kept_seconds += seconds
        metadata = sample.metadata | {"id": sample.key, "duration": seconds, "speech_score": round(score, 4)}
        files = {"__key__": f"{index:09d}", "flac": encode_flac(waveform), "json": metadata}
        yield files if sample.caption is None else files | {"txt": sample.caption}


def _recording(sample: Sample) -> Any:
    media = [part for message in sample.messages for part in message["content"] if part["type"] != "text"]
    if len(media) != 1 or media[0]["type"] != "audio":
        raise ValueError(f"sample {sample.key!r} must hold one recording and nothing else to see or hear")
    return media[0]["audio"]
