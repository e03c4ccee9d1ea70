"""What happens to a voice on its way to a recording: silence, rooms, other voices, telephones, levels.

Waveforms are `(samples,)` at 16 kHz. As in `data.augment_audio`, whose noise is used here too, chance comes from torch's
global generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.audio import SAMPLE_RATE, resample
from data.augment_audio import add_noise, coloured_noise, fit_noise

#: Chance of each disturbance in a training clip.
ROOM, NOISE, TELEPHONE, MUFFLED = 0.3, 0.5, 0.08, 0.1
BABBLE = 0.35  #: part of the noises that are other voices
SNR_DB = (10.0, 40.0)
SILENCE_SECONDS = (0.1, 0.4)  #: before the voice, and again after it
PEAK_DB = (-20.0, -1.0)
_FRAME = SAMPLE_RATE // 100


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def disturb(voice: Tensor, others: Sequence[Tensor]) -> Tensor:
    """By chance a room, noise (some of it `others` who talk), and a telephone or a muffled microphone."""
    if uniform(0, 1) < ROOM:
        voice = reverberate(voice, decay_seconds=uniform(0.1, 0.5), loudness=uniform(0.1, 0.6))
    if uniform(0, 1) < NOISE:
        babbles = uniform(0, 1) < BABBLE
        noise = babble(others, len(voice)) if babbles else coloured_noise(len(voice), uniform(0, 2))
        voice = add_noise(voice, noise, uniform(*SNR_DB))
    if uniform(0, 1) < TELEPHONE:
        return telephone(voice)
    return band(voice, 0, uniform(2500, 6000)) if uniform(0, 1) < MUFFLED else voice


def vocal_tract(voice: Tensor, rate: int, factor: float) -> Tensor:
    """The voice at 16 kHz, as of a smaller head (`factor` above 1) or a larger one.

    Formants, pitch and tempo all go with the factor, which is rounded so that its resampling filter stays small.
    """
    step = SAMPLE_RATE // 100
    return resample(voice, rate if factor == 1 else step * round(rate * factor / step), SAMPLE_RATE)


def trim(voice: Tensor, threshold_db: float = -45.0) -> Tensor:
    """Cuts what comes before the first and after the last 10 ms that are within `threshold_db` of the loudest 10 ms."""
    power = voice[: len(voice) // _FRAME * _FRAME].view(-1, _FRAME).square().mean(1)
    loud = (power > power.max() * 10 ** (threshold_db / 10)).nonzero().flatten()
    return voice[loud[0] * _FRAME : (loud[-1] + 1) * _FRAME] if len(loud) else voice


def add_silence(voice: Tensor) -> Tensor:
    before, after = (round(uniform(*SILENCE_SECONDS) * SAMPLE_RATE) for _ in range(2))
    return torch.nn.functional.pad(voice, (before, after))


def reverberate(voice: Tensor, *, decay_seconds: float, loudness: float) -> Tensor:
    """A simple room: noise that fades by 60 dB in `decay_seconds`, `loudness` times the direct sound's energy behind it."""
    time = torch.arange(round(decay_seconds * SAMPLE_RATE)) / SAMPLE_RATE
    echoes = torch.randn(len(time)) * 10 ** (-3 * time / decay_seconds)
    echoes[: SAMPLE_RATE // 200] = 0  # no wall is nearer than 5 ms
    response = echoes * (loudness / echoes.square().sum()) ** 0.5
    response[0] = 1
    n = len(voice) + len(response)
    return torch.fft.irfft(torch.fft.rfft(voice, n) * torch.fft.rfft(response, n), n)[: len(voice)]


def babble(voices: Sequence[Tensor], n_samples: int) -> Tensor:
    """Three to six voices at once, equally loud, each from a random place."""
    chosen = [voices[int(torch.randint(len(voices), ()))] for _ in range(int(torch.randint(3, 7, ())))]
    return torch.stack([fit_noise(voice / voice.square().mean().sqrt(), n_samples) for voice in chosen]).sum(0)


def band(voice: Tensor, low: float, high: float) -> Tensor:
    """Only what lies between `low` and `high` Hz, with slopes of 100 Hz outside of them."""
    spectrum = torch.fft.rfft(voice)
    frequency = torch.arange(len(spectrum)) * (SAMPLE_RATE / len(voice))
    gain = torch.minimum((frequency - low) / 100, (high - frequency) / 100) + 1
    return torch.fft.irfft(spectrum * gain.clamp(0, 1), len(voice))


def telephone(voice: Tensor) -> Tensor:
    """300 to 3400 Hz in the steps of 8-bit mu-law, as in G.711."""
    narrow = to_peak(band(voice, 300, 3400), -3)
    steps = (narrow.sign() * torch.log1p(255 * narrow.abs()) / math.log(256) * 127).round() / 127
    return steps.sign() * torch.expm1(steps.abs() * math.log(256)) / 255


def to_peak(voice: Tensor, decibels: float) -> Tensor:
    """The same with its largest sample at this level; 0 dB is the most that a file can hold."""
    return voice * (10 ** (decibels / 20) / voice.abs().max().clamp(min=1e-6))
