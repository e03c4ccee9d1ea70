"""Varies speech: masks in the spectrogram (SpecAugment), its tempo and the speaker's vocal tract; speed, and noise.

Everything draws from torch's global generator, which `data.stream` seeds for every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchaudio.functional as F
from torch import Tensor

from data.audio import SAMPLE_RATE, resample


@dataclass(frozen=True, kw_only=True)
class WaveformAugmentation:
    """Speed and noise of `augment_waveform`.

    Attributes:
        speeds: one is drawn; 1.0 leaves the waveform as it is. Pitch goes with speed.
        noise_probability: share of waveforms that get noise.
        snr_db: range of the signal-to-noise ratio, drawn evenly in decibels.
        colour: range of the exponent of generated noise, whose power falls as 1 / f^colour: 0 white, 1 pink, 2 brown.
    """

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    noise_probability: float = 0.5
    snr_db: tuple[float, float] = (10.0, 40.0)
    colour: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self) -> None:
        if not self.speeds or any(not 0.5 <= speed <= 2 for speed in self.speeds):
            raise ValueError(f"speeds must be in [0.5, 2], at least one, got {self.speeds}")
        if not 0 <= self.noise_probability <= 1:
            raise ValueError(f"noise_probability must be in [0, 1], got {self.noise_probability}")
        for name in ("snr_db", "colour"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (low, high), got {(low, high)}")


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    """Masks of `spec_augment`, by default the Conformer paper's, and how it stretches what it masks, by default not at all.

    Attributes:
        tempo: range of how many times as fast; voices keep their pitch.
        tract: range of the length of the vocal tract, 1 the speaker's own: what was at a mel bin comes to lie at `tract` times it
            (vocal tract length perturbation, Jaitly and Hinton 2013, along the mel scale). With it voices are met that nobody has.
        n_frequency_masks, max_bins: masks over mel bins, and the width that each stays below.
        n_time_masks, max_share: masks over frames, and the share of the utterance that each stays below.
    """

    tempo: tuple[float, float] = (1.0, 1.0)
    tract: tuple[float, float] = (1.0, 1.0)
    n_frequency_masks: int = 2
    max_bins: int = 27
    n_time_masks: int = 10
    max_share: float = 0.05

    def __post_init__(self) -> None:
        if min(self.n_frequency_masks, self.n_time_masks, self.max_bins) < 0:
            raise ValueError("n_frequency_masks, n_time_masks and max_bins cannot be negative")
        for name in ("tempo", "tract"):
            low, high = getattr(self, name)
            if not 0.5 <= low <= high <= 2:
                raise ValueError(f"{name} must be (low, high) within [0.5, 2], got {(low, high)}")
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"max_share must be in [0, 1], got {self.max_share}")


def augment_waveform(waveform: Tensor, config: WaveformAugmentation, noises: Sequence[Tensor] = ()) -> Tensor:
    """A waveform at another speed and in noise.

    Args:
        waveform: `(samples,)` at 16 kHz.
        noises: recorded noises to draw from, `(samples,)` each, repeated or cut to length; generated noise when empty.
    """
    waveform = change_speed(waveform, config.speeds[int(torch.randint(len(config.speeds), ()))])
    if torch.rand(()) >= config.noise_probability:
        return waveform
    if noises:
        noise = fit_noise(noises[int(torch.randint(len(noises), ()))], len(waveform))
    else:
        noise = coloured_noise(len(waveform), _uniform(*config.colour))
    return add_noise(waveform, noise, _uniform(*config.snr_db))


def change_speed(waveform: Tensor, speed: float) -> Tensor:
    """`(samples,)` at 16 kHz, played `speed` times as fast."""
    return resample(waveform, round(SAMPLE_RATE * speed), SAMPLE_RATE)


def add_noise(waveform: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """The sum at a signal-to-noise ratio, scaled down where it would clip; both `(samples,)`."""
    if not waveform.any() or not noise.any():  # no ratio to set
        return waveform
    mixed = F.add_noise(waveform, noise, torch.tensor(snr_db))
    return mixed / mixed.abs().max().clamp(min=1.0)


def coloured_noise(n_samples: int, colour: float) -> Tensor:
    """`(n_samples,)` of Gaussian noise of unit RMS whose power falls as 1 / f^colour."""
    spectrum = torch.fft.rfft(torch.randn(n_samples))
    frequency = torch.arange(len(spectrum), dtype=torch.float32).clamp(min=1.0)
    noise = torch.fft.irfft(spectrum * frequency ** (-colour / 2), n=n_samples)
    return noise / noise.square().mean().sqrt()


def fit_noise(noise: Tensor, n_samples: int) -> Tensor:
    """A stretch of a noise from a random place, the noise repeated if it is too short."""
    start = int(torch.randint(len(noise), ()))
    repeats = -(-(start + n_samples) // len(noise))
    return noise.repeat(repeats)[start : start + n_samples]


def spec_augment(mel_TM: Tensor, config: SpecAugmentConfig) -> Tensor:
    """One utterance's normalised log-mel `(T, M)`, stretched, with spans of time and frequency set to 0, its mean.

    Takes no padding: masks would be sized, and wasted, by it. For a batch, call it for every row's own frames.
    """
    mel_TM = stretch_mel(mel_TM, tempo=_uniform(*config.tempo), tract=_uniform(*config.tract))
    for _ in range(config.n_frequency_masks):
        mel_TM = F.mask_along_axis(mel_TM, config.max_bins, 0.0, axis=1)
    for _ in range(config.n_time_masks):
        mel_TM = F.mask_along_axis(mel_TM, int(config.max_share * len(mel_TM)), 0.0, axis=0)
    return mel_TM


def stretch_mel(mel_TM: Tensor, *, tempo: float, tract: float) -> Tensor:
    """A log-mel of another tempo and vocal tract (`SpecAugmentConfig`), linearly interpolated: `(max(1, round(T / tempo)), M)`."""
    n_frames, n_mels = mel_TM.shape
    mel_TM = _interpolate(mel_TM, torch.arange(max(1, round(n_frames / tempo))) * tempo)
    return _interpolate(mel_TM.T, torch.arange(n_mels) / tract).T.contiguous()


def _interpolate(x_NX: Tensor, at_K: Tensor) -> Tensor:
    """Rows at places between rows, `(K, X)`; past the last row, that one."""
    at_K = at_K.clamp(max=len(x_NX) - 1)
    below_K = at_K.long()
    return torch.lerp(x_NX[below_K], x_NX[(below_K + 1).clamp(max=len(x_NX) - 1)], (at_K - below_K)[:, None])


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
