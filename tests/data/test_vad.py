"""The filter keeps what silero-vad hears as speech: vowels from a small formant synthesiser, against noise and tones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torchaudio.functional as F
from torch import Tensor

from data.audio import encode_flac, load_audio
from data.augment_audio import coloured_noise
from data.shards import open_source, write_shard
from data.speech import open_speech, speech_length
from data.vad import filter_speech, speech_score, speech_spans

RATE = 16_000
FORMANTS = {
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}


def vowel(name: str) -> Tensor:
    """0.18 s of a voice that falls from 130 to 100 Hz."""
    n = round(0.18 * RATE)
    turns = (torch.linspace(130, 100, n) / RATE).cumsum(0).floor()
    sound = turns.diff(prepend=torch.zeros(1))
    for hertz, width in zip(FORMANTS[name], (80, 90, 120), strict=True):
        radius = math.exp(-math.pi * width / RATE)
        poles = torch.tensor([1.0, -2 * radius * math.cos(2 * math.pi * hertz / RATE), radius**2])
        sound = F.lfilter(sound, poles, torch.tensor([float(poles.sum()), 0.0, 0.0]), clamp=False)
    return 0.4 * torch.hann_window(n).sqrt() * sound / sound.abs().max()


SPEECH = torch.cat([vowel(name) for name in "aiueoaeiou"])
NOISE = 0.1 * coloured_noise(len(SPEECH), 1.0)
SILENCE = torch.zeros(len(SPEECH))


def test_score_tells_speech_from_other_sounds():
    score = speech_score(SPEECH)
    assert score > 0.8
    assert speech_score(NOISE) < 0.1
    assert speech_score(0.3 * torch.sin(torch.arange(RATE) * 0.17)) < 0.1
    assert speech_score(torch.zeros(RATE)) == 0


def test_silence_costs_nothing_and_noise_does():
    score = speech_score(SPEECH)
    assert speech_score(torch.cat([SILENCE, SPEECH, SILENCE])) > score - 0.1
    assert speech_score(torch.cat([NOISE * 2, SPEECH, NOISE * 2])) < 0.6


def test_scores_do_not_depend_on_what_came_before():
    score = speech_score(SPEECH)
    speech_score(NOISE)
    assert speech_score(SPEECH) == score


def test_spans():
    ((start, end),) = speech_spans(torch.cat([SILENCE, SPEECH, SILENCE]))
    length = len(SPEECH) / RATE
    assert start == pytest.approx(length, abs=0.2) and end == pytest.approx(2 * length, abs=0.2)
    assert speech_spans(NOISE) == []


def test_threads_are_left_as_they_are():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        from data.vad import _silero

        _silero.cache_clear()
        _silero()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(n_threads)


def test_filter_writes_what_passes(tmp_path: Path):
    turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "Hello."}]
    write_shard(
        tmp_path / "in.tar",
        [
            {"__key__": "a/one", "flac": encode_flac(SPEECH), "txt": "aiueo", "json": {"speaker": "m"}},
            {"__key__": "two", "flac": encode_flac(NOISE), "txt": "nothing"},
            {"__key__": "three", "wav": b"broken"},
            {"__key__": "four", "flac": encode_flac(SPEECH), "json": {"conversations": turns}},
            {"__key__": "five", "json": {"conversations": turns[1:]}},
        ],
    )
    statistics = filter_speech(open_source(tmp_path / "in.tar", name="in"), tmp_path / "out", threshold=0.7)
    assert (statistics.kept, statistics.dropped, statistics.broken) == (2, 1, 2)
    assert statistics.kept_hours == pytest.approx(2 * len(SPEECH) / RATE / 3600)
    assert statistics.dropped_hours == pytest.approx(len(NOISE) / RATE / 3600)
    one, four = open_speech(tmp_path / "out")
    assert one.caption == "aiueo" and four.messages[1]["content"][0]["text"] == "Hello."
    assert one.metadata["id"] == "a/one" and one.metadata["speaker"] == "m" and one.metadata["speech_score"] > 0.7
    assert speech_length(one) == round(1000 * len(SPEECH) / RATE)
    torch.testing.assert_close(load_audio(one.messages[0]["content"][0]["audio"]), SPEECH, rtol=0, atol=2**-14)
    json.dumps(four.metadata)
    with pytest.raises(ValueError, match=r"out: '.*out' already holds shards"):
        filter_speech(open_source(tmp_path / "in.tar", name="in"), tmp_path / "out")


def test_threshold_is_checked(tmp_path: Path):
    write_shard(tmp_path / "in.tar", [{"__key__": "a", "flac": encode_flac(SPEECH)}])
    with pytest.raises(ValueError, match=r"threshold: must be in \[0, 1\), got 70"):
        filter_speech(open_source(tmp_path / "in.tar", name="in"), tmp_path / "out", threshold=70)
