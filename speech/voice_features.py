"""What the voice is described by, ten milliseconds at a time: log-mel spectrogram, pitch and loudness (section 8.2.2).

Frame t stands for the samples `[t * hop, (t + 1) * hop)`, and every window is centred on them, so T frames are exactly
`T * hop` samples.

Shape letters: B rows, N samples, T frames, M mel bins, F frequency bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn

#: Mel magnitudes below this count as silence.
MEL_FLOOR = 1e-5
#: Root mean squares below this (-80 dB of full scale) count as silence.
POWER_FLOOR = 1e-4
#: Range in which pitch is looked for, in Hz.
PITCH_RANGE = 60.0, 500.0


@dataclass(frozen=True, kw_only=True)
class VoiceFeaturesConfig:
    """Shape of the features.

    Attributes:
        sample_rate: of the waveforms, in Hz.
        hop: samples of a frame (10 ms).
        n_fft: samples that a frame sees.
        f_min, f_max: range of the mel bins, in Hz.
    """

    sample_rate: int = 24_000
    hop: int = 240
    n_fft: int = 1024
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float = 12_000.0

    def __post_init__(self) -> None:
        if self.hop > self.n_fft or (self.n_fft - self.hop) % 2:
            raise ValueError(
                f"hop {self.hop}: n_fft {self.n_fft} must be greater by an even number, to be centred on it"
            )

    @property
    def padding(self) -> int:
        """Samples that a frame sees before and after its own."""
        return (self.n_fft - self.hop) // 2


class LogMelVoice(nn.Module):
    """Natural logarithm of mel magnitudes, floored at `MEL_FLOOR`."""

    window: Tensor
    filters_FM: Tensor

    def __init__(self, config: VoiceFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        filters_FM = AF.melscale_fbanks(
            config.n_fft // 2 + 1, config.f_min, config.f_max, config.n_mels, config.sample_rate, "slaney", "slaney"
        )
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
        self.register_buffer("filters_FM", filters_FM, persistent=False)

    def forward(self, waveform_BN: Tensor) -> Tensor:
        """Log-mel frames `(B, T, M)`.

        Raises:
            ValueError: the samples are no whole number of frames.
        """
        n_frames(waveform_BN.shape[-1], self.config)
        padded_BN = F.pad(waveform_BN, (self.config.padding, self.config.padding))
        spectrum_BFT = torch.stft(
            padded_BN, self.config.n_fft, self.config.hop, window=self.window, center=False, return_complex=True
        )
        return (spectrum_BFT.abs().mT @ self.filters_FM).clamp(min=MEL_FLOOR).log()


def n_frames(n_samples: int, config: VoiceFeaturesConfig) -> int:
    """Frames of that many samples.

    Raises:
        ValueError: the samples are no whole number of frames.
    """
    if n_samples % config.hop:
        raise ValueError(
            f"waveform: {n_samples} samples are no multiple of hop {config.hop}; cut it or pad it with zeros"
        )
    return n_samples // config.hop


def log_power(waveform_BN: Tensor, config: VoiceFeaturesConfig) -> Tensor:
    """Natural logarithm of the root mean square around each frame, `(B, T)`, floored at `POWER_FLOOR`."""
    n_frames(waveform_BN.shape[-1], config)
    window = torch.hann_window(config.n_fft, device=waveform_BN.device)
    padded_BN = F.pad(waveform_BN.square(), (config.padding, config.padding))
    power_BT = padded_BN.unfold(-1, config.n_fft, config.hop) @ (window / window.sum())
    return power_BT.sqrt().clamp(min=POWER_FLOOR).log()


def pitch(waveform_N: np.ndarray, config: VoiceFeaturesConfig) -> np.ndarray:
    """Fundamental frequency of each frame in Hz, `(T,)` float32, 0 where the voice has none: Praat's autocorrelation method.

    Raises:
        ValueError: Praat's library is not installed, or the samples are no whole number of frames.
    """
    try:
        import parselmouth
    except ImportError as error:
        raise ValueError("pitch needs Praat's library: run `pip install praat-parselmouth`") from error
    count, period = n_frames(len(waveform_N), config), config.hop / config.sample_rate
    low, high = PITCH_RANGE
    # Praat centres a grid of frames on the sound, and leaves out those whose window of three periods would pass its ends.
    # A margin of that window and a bit on both sides makes that grid ours, some frames longer.
    window = 3 / low
    margin = np.zeros(round((window + 0.2 * period) * config.sample_rate))
    sound = parselmouth.Sound(np.concatenate([margin, waveform_N.astype(np.float64), margin]), config.sample_rate)
    track = sound.to_pitch_ac(time_step=period, pitch_floor=low, pitch_ceiling=high)
    first = round((len(margin) / config.sample_rate + period / 2 - track.x1) / period)
    return track.selected_array["frequency"][first : first + count].astype(np.float32)
