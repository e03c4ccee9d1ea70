"""Augmentation does what its numbers say, and the same again from the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from data.augment_audio import (
    SpecAugmentConfig,
    WaveformAugmentation,
    add_noise,
    augment_waveform,
    change_speed,
    coloured_noise,
    fit_noise,
    spec_augment,
    stretch_mel,
)

N = 16_001
TONE = 0.5 * torch.sin(torch.arange(N) * (2 * math.pi * 500 / 16_000))


def loudest_hertz(waveform: Tensor) -> float:
    return float(torch.fft.rfft(waveform).abs().argmax()) * 16_000 / len(waveform)


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1])
def test_speed(speed: float):
    fast = change_speed(TONE, speed)
    assert len(fast) == round(N / speed)
    assert loudest_hertz(fast) == pytest.approx(500 * speed, abs=1)
    assert speed != 1.0 or torch.equal(fast, TONE)


@pytest.mark.parametrize("snr_db", [-3.0, 10.0, 40.0])
def test_noise_has_the_ratio_asked_for(snr_db: float):
    noise = coloured_noise(N, 1.0)
    quiet = 0.1 * TONE
    added = add_noise(quiet, noise, snr_db) - quiet
    ratio = 10 * math.log10(float(quiet.square().sum() / added.square().sum()))
    assert ratio == pytest.approx(snr_db, abs=0.05)
    assert torch.nn.functional.cosine_similarity(added, noise, dim=0) > 0.999


def test_noise_never_clips_and_needs_two_sounds():
    assert add_noise(2 * TONE, coloured_noise(N, 0.0), 0.0).abs().max() == 1
    silence = torch.zeros(N)
    assert torch.equal(add_noise(silence, TONE, 10.0), silence)
    assert torch.equal(add_noise(TONE, silence, 10.0), TONE)


@pytest.mark.parametrize("colour", [0.0, 1.0, 2.0])
def test_colour_is_the_slope_of_the_power(colour: float):
    torch.manual_seed(0)
    noise = coloured_noise(65_537, colour)
    assert noise.square().mean().sqrt() == pytest.approx(1)
    power = torch.fft.rfft(noise).abs().square()
    low, high = power[100:200].mean(), power[10_000:20_000].mean()
    assert math.log(low / high) / math.log(100) == pytest.approx(colour, abs=0.15)


def test_recorded_noise_is_cut_or_repeated():
    noise = torch.arange(7.0)
    for n in (3, 7, 23):
        stretch = fit_noise(noise, n)
        assert torch.equal((stretch - stretch[0]) % 7, torch.arange(float(n)) % 7)


def test_spec_augment_masks_whole_bins_and_frames():
    config = SpecAugmentConfig(n_frequency_masks=2, max_bins=11, n_time_masks=3, max_share=0.1)
    torch.manual_seed(0)
    mel_TM = torch.rand(211, 79) + 1
    n_bins, n_frames = [], []
    for _ in range(50):
        masked_TM = spec_augment(mel_TM, config)
        zero_TM = masked_TM == 0
        bins_M, frames_T = zero_TM.all(dim=0), zero_TM.all(dim=1)
        assert torch.equal(zero_TM, bins_M[None] | frames_T[:, None])
        assert torch.equal(masked_TM[~zero_TM], mel_TM[~zero_TM])
        n_bins.append(int(bins_M.sum()))
        n_frames.append(int(frames_T.sum()))
    assert 0 < max(n_bins) <= 2 * 11 and 0 < max(n_frames) <= 3 * 21
    assert len(set(n_bins)) > 5 and len(set(n_frames)) > 5
    assert (mel_TM > 0).all()  # the input is untouched


def test_spec_augment_of_the_shortest_utterance():
    mel_TM = torch.ones(10, 80)  # 0.1 s: 5% of it is no whole frame
    assert (spec_augment(mel_TM, SpecAugmentConfig()) == 1).any(dim=1).all()


def test_stretched_mel():
    """A longer tract lifts what is at a bin, a faster tempo shortens it; as they were, bit for bit, nothing changes."""
    ramp_TM = torch.arange(40.0)[:, None] + 100 * torch.arange(20.0)
    assert torch.equal(stretch_mel(ramp_TM, tempo=1.0, tract=1.0), ramp_TM)
    fast_TM = stretch_mel(ramp_TM, tempo=1.6, tract=1.0)
    torch.testing.assert_close(fast_TM, (torch.arange(25.0) * 1.6).clamp(max=39)[:, None] + 100 * torch.arange(20.0))
    short_TM = stretch_mel(ramp_TM, tempo=1.0, tract=0.8)
    torch.testing.assert_close(short_TM[0], (100 * torch.arange(20.0) / 0.8).clamp(max=1900))
    tone_TM = torch.zeros(7, 80).index_fill(1, torch.tensor([40]), 1.0)
    assert stretch_mel(tone_TM, tempo=1.0, tract=1.1)[0].argmax() == 44
    assert stretch_mel(tone_TM[:1], tempo=2.0, tract=1.0).shape == (1, 80)


def test_tempo_and_tract_are_drawn():
    config = SpecAugmentConfig(n_frequency_masks=0, n_time_masks=0, tempo=(0.8, 1.25), tract=(0.9, 1.1))
    torch.manual_seed(0)
    tone_TM = torch.zeros(100, 80).index_fill(1, torch.tensor([40]), 1.0)
    drawn = [spec_augment(tone_TM, config) for _ in range(60)]
    n_frames, bins = {len(mel_TM) for mel_TM in drawn}, {int(mel_TM[0].argmax()) for mel_TM in drawn}
    assert 80 <= min(n_frames) < 85 and 120 < max(n_frames) <= 125 and len(n_frames) > 20
    assert bins == set(range(36, 45))


def test_the_seed_decides():
    config = WaveformAugmentation(noise_probability=0.5)

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [augment_waveform(TONE, config) for _ in range(12)]

    one, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert {len(waveform) for waveform in one + other} == {round(N / 0.9), N, round(N / 1.1)}
    assert any(torch.equal(waveform, TONE) for waveform in one + other)
    assert not all(len(a) == len(b) and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_given_noises_are_used():
    config = WaveformAugmentation(speeds=(1.0,), noise_probability=1.0, snr_db=(20.0, 20.0))
    hum = torch.sin(torch.arange(960) * (2 * math.pi * 50 / 16_000))  # whole periods, so it repeats without a seam
    added = augment_waveform(TONE, config, [hum]) - TONE
    assert loudest_hertz(added) == pytest.approx(50, abs=2)
    assert float(TONE.square().sum() / added.square().sum()) == pytest.approx(100, rel=0.02)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="speeds"):
        WaveformAugmentation(speeds=())
    with pytest.raises(ValueError, match="noise_probability"):
        WaveformAugmentation(noise_probability=1.5)
    with pytest.raises(ValueError, match=r"snr_db must be \(low, high\)"):
        WaveformAugmentation(snr_db=(40.0, 10.0))
    with pytest.raises(ValueError, match="max_share"):
        SpecAugmentConfig(max_share=5)
    for name in ("tempo", "tract"):
        with pytest.raises(ValueError, match=rf"{name} must be \(low, high\)"):
            SpecAugmentConfig(**{name: (1.2, 0.9)})
    with pytest.raises(ValueError, match="cannot be negative"):
        SpecAugmentConfig(n_time_masks=-1)
