"""Features of the voice: frames are centred on their samples, measures are those of known sounds, and rows do not mix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from speech.voice_features import MEL_FLOOR, POWER_FLOOR, LogMelVoice, VoiceFeaturesConfig, log_power, pitch

CONFIG = VoiceFeaturesConfig()


def test_frames_are_centred_on_their_samples() -> None:
    click_BN = torch.zeros(1, 11 * CONFIG.hop)
    click_BN[0, 7 * CONFIG.hop + CONFIG.hop // 2] = 1.0
    for energy_BT in (LogMelVoice(CONFIG)(click_BN).exp().sum(-1), log_power(click_BN, CONFIG)):
        assert energy_BT.shape == (1, 11)
        assert energy_BT.argmax() == 7
        torch.testing.assert_close(energy_BT[0, 6], energy_BT[0, 8], rtol=1e-3, atol=1e-6)


def test_rows_alone_and_silence() -> None:
    rows_BN = torch.randn(3, 5 * CONFIG.hop)
    rows_BN[1] = 0
    log_mel = LogMelVoice(CONFIG)
    for measure, floor in ((log_mel, MEL_FLOOR), (lambda x: log_power(x, CONFIG), POWER_FLOOR)):
        together = measure(rows_BN)
        for b in range(3):
            torch.testing.assert_close(together[b], measure(rows_BN[b : b + 1])[0])
        assert together[1].eq(torch.tensor(math.log(floor))).all()


def test_log_power_of_a_sine() -> None:
    sine_N = 0.4 * torch.sin(2 * math.pi * 500 * torch.arange(40 * CONFIG.hop) / CONFIG.sample_rate)
    middle = log_power(sine_N[None], CONFIG)[0, 10:30]
    torch.testing.assert_close(middle, torch.full((20,), math.log(0.4 / math.sqrt(2))), rtol=0, atol=2e-3)


@pytest.mark.parametrize("n_frames", [1, 7, 101])
def test_pitch_of_a_glide(n_frames: int) -> None:
    pytest.importorskip("parselmouth")
    time_N = np.arange(n_frames * CONFIG.hop) / CONFIG.sample_rate
    phase_N = 2 * np.pi * np.cumsum(150 + 100 * time_N) / CONFIG.sample_rate
    f0_T = pitch(sum(np.sin(k * phase_N) / k for k in range(1, 8)), CONFIG)  # type: ignore[arg-type]
    assert f0_T.shape == (n_frames,) and f0_T.dtype == np.float32
    if n_frames > 10:
        true_T = 150 + 100 * (np.arange(n_frames) + 0.5) * CONFIG.hop / CONFIG.sample_rate
        assert np.abs(f0_T - true_T)[4:-4].max() < 0.3
    assert not pitch(np.zeros(len(time_N)), CONFIG).any()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="multiple of hop"):
        LogMelVoice(CONFIG)(torch.zeros(1, CONFIG.hop + 1))
    with pytest.raises(ValueError, match="even number"):
        VoiceFeaturesConfig(n_fft=1023)
