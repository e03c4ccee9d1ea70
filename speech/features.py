"""Log-mel features, the same offline and streaming (section 8.2.1: 80 bins every 10 ms).

Frame t is the window of samples `[t * hop, t * hop + window)`: nothing before it, nothing centred. The right end is padded
with zeros until every hop that holds a sample has its frame, so n samples give `ceil(n / hop)` frames and the paper's 60 s
exactly 6000.

Shape letters: B rows, N samples, T mel frames, M mel bins, F frequency bins.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torchaudio.functional as AF
from torch import Tensor, nn

from speech.streaming import StreamState, below, counts, ending, take

Count = TypeVar("Count", int, Tensor)

#: Added to mel energies before the logarithm: a room's noise at about -70 dB of full scale, so that digital silence,
#: which synthesised speech is full of, is no outlier.
LOG_FLOOR = 1e-6
#: Running normalisation starts as if it had heard this many frames of this mean and standard deviation, those of speech.
PRIOR_FRAMES, PRIOR_MEAN, PRIOR_STD = 100, -9.0, 4.0
#: Keeps a bin that never changes (silence) at zero instead of dividing by zero.
VARIANCE_FLOOR = 1e-5


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Shape of the features.

    Attributes:
        sample_rate: of the waveforms, in Hz.
        hop: samples from one frame to the next (10 ms).
        window: samples that a frame sees (25 ms).
        normalisation: "utterance" brings each bin to mean 0 and variance 1 over its utterance; "running" does so with the
            frames up to the current one, which streams.
    """

    sample_rate: int = 16000
    n_mels: int = 80
    hop: int = 160
    window: int = 400
    normalisation: str = "utterance"

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.window:
            raise ValueError(f"hop {self.hop} must lie between 1 and window {self.window}, or samples would be skipped")
        if self.normalisation not in ("utterance", "running"):
            raise ValueError(f'normalisation {self.normalisation!r} is unknown; choose "utterance" or "running"')

    def n_frames(self, n_samples: Count) -> Count:
        """Mel frames of that many samples."""
        return -(-n_samples // self.hop)


@dataclass(frozen=True, kw_only=True)
class LogMelState(StreamState):
    """Memory of `LogMel` between steps.

    Attributes:
        samples_BN: the last `window` samples.
        n_unread_B: how many of them, at the end, the frames to come will see.
        n_frames_B, sum_BM, square_sum_BM: statistics of the running normalisation, in FP64 because streams have no end.
    """

    samples_BN: Tensor
    n_unread_B: Tensor
    n_frames_B: Tensor
    sum_BM: Tensor
    square_sum_BM: Tensor


class LogMel(nn.Module):
    """Waveforms to normalised log-mel frames `(B, T, M)`."""

    window: Tensor
    filters_FM: Tensor

    def __init__(self, config: FeaturesConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        # Slaney's scale is linear at the bottom, where 80 bins of the HTK scale would be narrower than a frequency bin.
        filters_FM = AF.melscale_fbanks(
            config.window // 2 + 1, 0.0, config.sample_rate / 2, config.n_mels, config.sample_rate, "slaney", "slaney"
        )
        self.register_buffer("filters_FM", filters_FM, persistent=False)

    def forward(self, waveform_BN: Tensor, n_samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Features of whole utterances.

        Args:
            waveform_BN: mono, float, in -1 to 1, at the config's sample rate; what lies past a row's end does not matter.
            n_samples_B: length of each row, at least one window.

        Returns:
            mel_BTM: zeros in padded frames.
            n_frames_B: `ceil(n_samples / hop)`.

        Raises:
            ValueError: a row is shorter than a window or longer than the waveform, or has samples that are no numbers.
        """
        n_samples_B = n_samples_B.to(waveform_BN.device)
        if int(n_samples_B.min()) < self.config.window:
            raise ValueError(
                f"n_samples: {int(n_samples_B.min())} samples are too short, one frame needs {self.config.window} "
                f"({1000 * self.config.window / self.config.sample_rate:g} ms); give longer audio"
            )
        waveform_BN = _checked(waveform_BN, n_samples_B)
        n_frames_B = self.config.n_frames(n_samples_B)
        mel_BTM = self._log_mel(waveform_BN, self.config.n_frames(waveform_BN.shape[1]))
        valid_BT1 = below(n_frames_B, mel_BTM.shape[1])[..., None]
        if self.config.normalisation == "running":
            mel_BTM, _ = self._normalise_running(mel_BTM, n_frames_B, self._empty_state(len(mel_BTM)))
            return mel_BTM, n_frames_B
        mel_BTM = mel_BTM.masked_fill(~valid_BT1, 0)
        mean_B1M = mel_BTM.sum(1, keepdim=True) / n_frames_B[:, None, None]
        centred_BTM = (mel_BTM - mean_B1M).masked_fill(~valid_BT1, 0)
        variance_B1M = centred_BTM.square().sum(1, keepdim=True) / n_frames_B[:, None, None]
        return centred_BTM * (variance_B1M + VARIANCE_FLOOR).rsqrt(), n_frames_B

    def init_state(self, batch_size: int) -> LogMelState:
        """State of rows that have heard nothing.

        Raises:
            ValueError: the normalisation needs the whole utterance.
        """
        if self.config.normalisation != "running":
            raise ValueError('normalisation "utterance" needs the whole utterance; streaming needs "running"')
        return self._empty_state(batch_size)

    def step(
        self,
        waveform_BN: Tensor,
        state: LogMelState,
        *,
        n_samples_B: Tensor | None = None,
        final: bool | Tensor = False,
    ) -> tuple[Tensor, Tensor, LogMelState]:
        """Features of what a stream brings next; together, the frames of all steps are those of `forward`.

        Args:
            waveform_BN: new samples, any number, also none.
            n_samples_B: how many are real in each row; all when None.
            final: whether the stream ends here, for all rows or `(B,)`; the rows that end start anew in the state returned.

        Returns:
            mel_BTM: frames whose windows are complete, zeros past a row's end.
            n_frames_B: how many each row has.
            state: for the next step.
        """
        window, hop = self.config.window, self.config.hop
        n_samples_B = counts(n_samples_B, waveform_BN)
        waveform_BN = _checked(waveform_BN, n_samples_B)
        final_B = ending(final, waveform_BN)
        recent_BN = torch.cat([state.samples_BN, waveform_BN], dim=1)
        n_unread_B = state.n_unread_B + n_samples_B
        n_complete_B = ((n_unread_B - window) // hop + 1).clamp(min=0)
        n_frames_B = torch.where(final_B, self.config.n_frames(n_unread_B), n_complete_B)

        n_frames = int(n_frames_B.max())
        unread_BN = take(recent_BN, window - state.n_unread_B, n_frames * hop + window)
        unread_BN = unread_BN.masked_fill(~below(n_unread_B, unread_BN.shape[1]), 0)
        mel_BTM, state = self._normalise_running(self._log_mel(unread_BN, n_frames), n_frames_B, state)
        state = dataclasses.replace(
            state, samples_BN=take(recent_BN, n_samples_B, window), n_unread_B=n_unread_B - n_frames_B * hop
        )
        return mel_BTM, n_frames_B, state.reset(final_B)

    def _empty_state(self, batch_size: int) -> LogMelState:
        zeros, n_mels = partial(self.window.new_zeros, batch_size), self.config.n_mels
        return LogMelState(
            samples_BN=zeros(self.config.window),
            n_unread_B=zeros(dtype=torch.int64),
            n_frames_B=zeros(dtype=torch.int64),
            sum_BM=zeros(n_mels, dtype=torch.float64),
            square_sum_BM=zeros(n_mels, dtype=torch.float64),
        )

    def _log_mel(self, waveform_BN: Tensor, n_frames: int) -> Tensor:
        """Log-mel energies of the first `n_frames` windows `(B, T, M)`; zeros follow the waveform."""
        window, hop = self.config.window, self.config.hop
        if n_frames == 0:
            return waveform_BN.new_zeros(len(waveform_BN), 0, self.config.n_mels)
        n_samples = (n_frames - 1) * hop + window
        waveform_BN = nn.functional.pad(waveform_BN, (0, n_samples - waveform_BN.shape[1]))  # or cuts what is too long
        power_BFT = AF.spectrogram(
            waveform_BN, 0, self.window, window, hop, window, power=2.0, normalized=False, center=False
        )
        return (power_BFT.transpose(1, 2) @ self.filters_FM + LOG_FLOOR).log()

    def _normalise_running(self, mel_BTM: Tensor, n_frames_B: Tensor, state: LogMelState) -> tuple[Tensor, LogMelState]:
        """Normalises each frame with the statistics up to it, and moves these on."""
        valid_BT1 = below(n_frames_B, mel_BTM.shape[1])[..., None]
        mel = mel_BTM.double().masked_fill(~valid_BT1, 0)
        sum_BTM = state.sum_BM[:, None] + mel.cumsum(1)
        square_sum_BTM = state.square_sum_BM[:, None] + mel.square().cumsum(1)
        n_BT1 = (state.n_frames_B[:, None] + torch.arange(1, mel.shape[1] + 1, device=mel.device))[..., None]
        weight_BT1 = n_BT1 + PRIOR_FRAMES
        mean_BTM = (sum_BTM + PRIOR_FRAMES * PRIOR_MEAN) / weight_BT1
        square_BTM = (square_sum_BTM + PRIOR_FRAMES * (PRIOR_MEAN**2 + PRIOR_STD**2)) / weight_BT1
        normalised_BTM = (mel - mean_BTM) * (square_BTM - mean_BTM.square() + VARIANCE_FLOOR).rsqrt()
        state = dataclasses.replace(
            state,
            n_frames_B=state.n_frames_B + n_frames_B,
            sum_BM=state.sum_BM + mel.sum(1),
            square_sum_BM=state.square_sum_BM + mel.square().sum(1),
        )
        return normalised_BTM.to(mel_BTM.dtype).masked_fill(~valid_BT1, 0), state


def _checked(waveform_BN: Tensor, n_samples_B: Tensor) -> Tensor:
    """The waveform with zeros for padding, after checking it."""
    if waveform_BN.ndim != 2 or not waveform_BN.is_floating_point():
        raise ValueError(
            f"waveform: need floating-point samples (rows, samples), got {waveform_BN.dtype} {tuple(waveform_BN.shape)}; "
            "data.audio.load_audio gives such rows"
        )
    if n_samples_B.shape != waveform_BN.shape[:1] or bool((n_samples_B > waveform_BN.shape[1]).any()):
        raise ValueError(
            f"n_samples: {n_samples_B.tolist()} does not fit a waveform of shape {tuple(waveform_BN.shape)}; "
            "give one length per row, no longer than the waveform"
        )
    waveform_BN = waveform_BN.masked_fill(~below(n_samples_B, waveform_BN.shape[1]), 0)
    if not bool(waveform_BN.isfinite().all()):
        raise ValueError("waveform: has NaN or infinite samples; repair or drop the recording")
    return waveform_BN
