"""The vocoder: log-mel frames and pitch to samples, causal up to a fixed look-ahead (section 8.1.2; the paper's is a WaveRNN).

Source and filter. White pulses at the pitch and white noise (`speech.excitation`) pass through two filters that a small network
draws twice per frame: one with magnitude and phase for the pulses, one with magnitude alone for the noise. Harmonics are thus
where the pitch is from the first step of training on, and the network, which runs at the rate of frames, has only envelopes to
learn. Filters act on windows that overlap and add up to one, each by a transform long enough that nothing wraps around.

    mel, pitch --look-ahead--> ConvNeXt blocks --> filters of pulses and noise --+
    pitch --> pulses --windows--> spectrum ------------------------------------- x --> inverse transform --> overlap-add
    position --> noise --windows--> spectrum ----------------------------------- x -^

Shape letters: B rows, T frames (10 ms), M mel bins, D width, N samples, P pieces (filters, S of them per frame),
F frequency bins of a filter, E excitations (pulses, noise).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speech.convnext import CausalConvNeXt
from speech.excitation import noise, pulses
from speech.streaming import StreamState, below, counts, ending, take
from speech.voice_features import VoiceFeaturesConfig

#: Brings log-mel values and log pitch of speech to about mean 0 and variance 1.
MEL_MEAN, MEL_STD = -5.0, 3.0
F0_MEAN, F0_STD = 5.0, 0.4
#: Logarithm of the gain that filters start from, and its bounds.
START_GAIN, GAIN_RANGE = -5.0, (-14.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """Shape of a vocoder.

    Attributes:
        lookahead: frames after its own that a filter is drawn from.
        pieces: filters per frame.
        n_taps: samples of a filter's response, half of them before its centre.
    """

    features: VoiceFeaturesConfig = field(default_factory=VoiceFeaturesConfig)
    dim: int
    ffn_dim: int
    n_layers: int
    kernel: int = 7
    lookahead: int = 2
    pieces: int = 2
    n_taps: int = 480

    def __post_init__(self) -> None:
        if self.features.hop % self.pieces:
            raise ValueError(f"pieces {self.pieces} must divide the hop of {self.features.hop} samples")
        if self.n_taps % 2 or self.n_taps < 2:
            raise ValueError(f"n_taps must be even and positive, got {self.n_taps}")
        if self.lookahead < 0:
            raise ValueError(f"lookahead must not be negative, got {self.lookahead}")

    @property
    def window(self) -> int:
        """Samples of excitation that a filter acts on."""
        return 2 * self.features.hop // self.pieces

    @property
    def n_fft(self) -> int:
        """Samples that come out of a filter."""
        return self.window + self.n_taps

    @property
    def delay(self) -> int:
        """Frames between the one that goes in and the one that comes out."""
        return self.lookahead + -(-self.n_fft // 2 // self.features.hop)

    @property
    def lead(self) -> int:
        """Samples from the start of the frame that comes out to the first piece."""
        return -self.n_fft // 2 % self.features.hop


@dataclass(frozen=True, kw_only=True)
class VocoderState(StreamState):
    """Memory of a vocoder between steps.

    Attributes:
        position_B: frames so far.
        frames_BKD: the last inputs of the first convolution.
        past_BLKD: of the blocks.
        excitation_BEN: the last samples of pulses and noise.
        f0_B, phase_B: last pitch in Hz, and where the pulses are, in periods.
        tail_BN: what later samples have got so far.
    """

    position_B: Tensor
    frames_BKD: Tensor
    past_BLKD: Tensor
    excitation_BEN: Tensor
    f0_B: Tensor
    phase_B: Tensor
    tail_BN: Tensor


class Vocoder(nn.Module):
    """Log-mel frames and pitch to samples, `hop` for each frame."""

    window: Tensor

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.n_bins = config.n_taps // 2 + 1
        self.input_conv = nn.Conv1d(config.features.n_mels + 2, config.dim, config.kernel)
        self.blocks = CausalConvNeXt(config.dim, config.ffn_dim, config.kernel, config.n_layers)
        self.head = nn.Linear(config.dim, config.pieces * 3 * self.n_bins)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)

    def forward(self, mel_BTM: Tensor, f0_BT: Tensor, n_frames_B: Tensor | None = None) -> Tensor:
        """Samples `(B, T * hop)` of whole utterances; zeros past a row's end.

        Args:
            mel_BTM: as `LogMelVoice` makes them.
            f0_BT: pitch in Hz, 0 where unvoiced.
            n_frames_B: how many frames of each row are real; all when None.
        """
        return self.step(mel_BTM, f0_BT, self.init_state(len(mel_BTM)), n_frames_B=n_frames_B, final=True)[0]

    def init_state(self, batch_size: int) -> VocoderState:
        """State of rows that have said nothing yet."""
        config, zeros = self.config, partial(self.head.weight.new_zeros, batch_size)
        return VocoderState(
            position_B=zeros(dtype=torch.int64),
            frames_BKD=zeros(config.kernel - 1, config.features.n_mels + 2),
            past_BLKD=zeros(*self.blocks.past_shape),
            excitation_BEN=zeros(2, (config.lookahead + 1) * config.features.hop),
            f0_B=zeros(dtype=torch.float64),
            phase_B=zeros(dtype=torch.float64),
            tail_BN=zeros(config.lead + config.n_fft - config.window // 2),
        )

    def step(
        self,
        mel_BTM: Tensor,
        f0_BT: Tensor,
        state: VocoderState,
        *,
        n_frames_B: Tensor | None = None,
        final: bool | Tensor = False,
    ) -> tuple[Tensor, Tensor, VocoderState]:
        """Says what a stream brings next; together, the samples of all steps are those of `forward`.

        Args:
            mel_BTM, f0_BT: new frames, any number, also none.
            n_frames_B: how many are real in each row; all when None.
            final: whether the stream ends here, for all rows or `(B,)`; the rows that end start anew in the state returned.

        Returns:
            waveform_BN: the samples that are certain, `config.delay` frames later than they could be; zeros past a row's end.
            n_B: how many each row has.
            state: for the next step.

        Raises:
            ValueError: the frames have other bins than this vocoder, or their pitch another length.
        """
        self._check(mel_BTM, f0_BT)
        delay, hop = self.config.delay, self.config.features.hop
        n_B = counts(n_frames_B, mel_BTM)
        final_B = ending(final, mel_BTM)
        is_real_BT = below(n_B, mel_BTM.shape[1])
        mel_BTM, f0_BT = mel_BTM.clone().masked_fill(~is_real_BT[..., None], MEL_MEAN), f0_BT.where(is_real_BT, 0)
        if final_B.any():  # silence pushes the last frames out
            mel_BTM, f0_BT = F.pad(mel_BTM, (0, 0, 0, delay), value=MEL_MEAN), F.pad(f0_BT, (0, delay))
            n_B = n_B + final_B * delay
        n_early_B = (delay - state.position_B).clamp(min=0).minimum(n_B)  # before the stream's start
        if mel_BTM.shape[1] == 0:
            return mel_BTM.new_zeros(len(mel_BTM), 0), n_B, state
        waveform_BTN, state = self.follow(mel_BTM, f0_BT, n_B, state)
        n_B = n_B - n_early_B
        waveform_BTN = take(waveform_BTN, n_early_B, int(n_B.max())) if int(n_B.max()) else waveform_BTN[:, :0]
        waveform_BTN = waveform_BTN.masked_fill(~below(n_B, waveform_BTN.shape[1])[..., None], 0)
        return waveform_BTN.flatten(1), n_B * hop, state.reset(final_B)

    def follow(self, mel_BTM: Tensor, f0_BT: Tensor, n_B: Tensor, state: VocoderState) -> tuple[Tensor, VocoderState]:
        """The frames of samples `(B, T, hop)` that lie `config.delay` frames before these: row for row, nothing left out."""
        n_taken = state.frames_BKD.shape[1]
        voiced_BT1 = (f0_BT > 0)[..., None]
        log_f0_BT1 = (f0_BT[..., None].clamp(min=1).log() - F0_MEAN).where(voiced_BT1, 0) / F0_STD
        frames_BTM = torch.cat([(mel_BTM - MEL_MEAN) / MEL_STD, log_f0_BT1, voiced_BT1], dim=2)
        frames_BTM = torch.cat([state.frames_BKD, frames_BTM.to(state.frames_BKD.dtype)], dim=1)
        x_BTD = self.input_conv(frames_BTM.transpose(1, 2)).transpose(1, 2)
        x_BTD, past_BLKD = self.blocks(x_BTD, n_B, state.past_BLKD)
        filters = self.head(x_BTD)
        state = dataclasses.replace(state, frames_BKD=take(frames_BTM, n_B, n_taken), past_BLKD=past_BLKD)
        with torch.autocast(mel_BTM.device.type, enabled=False):
            spectrum_BPEF, state = self._excite(f0_BT, n_B, state)
            return self._filter(filters.float(), spectrum_BPEF, n_B, state)

    def _excite(self, f0_BT: Tensor, n_B: Tensor, state: VocoderState) -> tuple[Tensor, VocoderState]:
        """Spectra of windowed pulses and noise `(B, P, 2, n_fft // 2 + 1)`, `lookahead` frames late."""
        config, features = self.config, self.config.features
        pulses_BTN, f0_BX, phase_BX = pulses(
            f0_BT, state.f0_B, state.phase_B, hop=features.hop, sample_rate=features.sample_rate
        )
        position_BT = state.position_B[:, None] + torch.arange(f0_BT.shape[1], device=f0_BT.device)
        new_BETN = torch.stack([pulses_BTN, noise(position_BT, hop=features.hop)], dim=1)
        excitation_BEN = torch.cat([state.excitation_BEN, new_BETN.flatten(2)], dim=2)
        n_past = state.excitation_BEN.shape[2]
        state = dataclasses.replace(
            state,
            position_B=state.position_B + n_B,
            excitation_BEN=take(excitation_BEN, n_B * features.hop, n_past, dim=2),
            f0_B=f0_BX.gather(1, n_B[:, None])[:, 0],
            phase_B=phase_BX.gather(1, n_B[:, None])[:, 0],
        )
        # The first window is centred on the start of the frame that is `lookahead` before the first new one.
        step = config.window // 2
        used_BEN = excitation_BEN[:, :, features.hop - step : excitation_BEN.shape[2] - config.lookahead * features.hop]
        windows_BPEN = used_BEN.unfold(2, config.window, step).transpose(1, 2)
        padding = config.n_taps // 2
        return torch.fft.rfft(F.pad(windows_BPEN * self.window, (padding, padding))), state

    def _filter(
        self, filters_BTX: Tensor, spectrum_BPEF: Tensor, n_B: Tensor, state: VocoderState
    ) -> tuple[Tensor, VocoderState]:
        """Filters windows of excitation and adds them up where they overlap."""
        config = self.config
        gain_BPF, turn_BPF, noise_BPF = filters_BTX.unflatten(2, (config.pieces, 3, -1)).flatten(1, 2).unbind(2)
        gain_BPEF = (torch.stack([gain_BPF, noise_BPF], dim=2) + START_GAIN).clamp(*GAIN_RANGE).exp()
        turn_BPEF = torch.stack([turn_BPF, torch.zeros_like(turn_BPF)], dim=2)
        response_BPEN = torch.fft.irfft(torch.polar(gain_BPEF, turn_BPEF), config.n_taps)
        half = config.n_taps // 2
        # Its centre is sample 0: what lies before goes to the end of the longer transform.
        response_BPEN = torch.cat(
            [
                response_BPEN[..., :half],
                response_BPEN.new_zeros(*response_BPEN.shape[:3], config.window),
                response_BPEN[..., half:],
            ],
            -1,
        )
        product_BPF = (torch.fft.rfft(response_BPEN) * spectrum_BPEF).sum(2)
        pieces_BPN = torch.fft.irfft(product_BPF, config.n_fft)
        return self._overlap_add(pieces_BPN, n_B, state)

    def _overlap_add(self, pieces_BPN: Tensor, n_B: Tensor, state: VocoderState) -> tuple[Tensor, VocoderState]:
        """Adds up pieces, each half a window after the one before, and splits off what no later piece will reach."""
        config, hop, step = self.config, self.config.features.hop, self.config.window // 2
        n_pieces = pieces_BPN.shape[1]
        pieces_BPN = pieces_BPN.masked_fill(~below(n_B * config.pieces, n_pieces)[..., None], 0)
        length = (n_pieces - 1) * step + config.n_fft
        sum_BN = F.fold(pieces_BPN.mT, (1, length), (1, config.n_fft), stride=(1, step))[:, 0, 0]
        n_tail = state.tail_BN.shape[1]
        sum_BN = F.pad(sum_BN, (config.lead, 0)) + F.pad(state.tail_BN, (0, config.lead + length - n_tail))
        state = dataclasses.replace(state, tail_BN=take(sum_BN, n_B * hop, n_tail))
        return sum_BN[:, : n_pieces * step].unflatten(1, (-1, hop)), state

    def _check(self, mel_BTM: Tensor, f0_BT: Tensor) -> None:
        n_mels = self.config.features.n_mels
        if mel_BTM.ndim != 3 or mel_BTM.shape[2] != n_mels or f0_BT.shape != mel_BTM.shape[:2]:
            raise ValueError(
                f"mel: need (rows, frames, {n_mels} bins) and a pitch for each frame, got shapes {tuple(mel_BTM.shape)} and "
                f"{tuple(f0_BT.shape)}; make them with the vocoder's features"
            )


def debug() -> VocoderConfig:
    return VocoderConfig(dim=14, ffn_dim=22, n_layers=2, kernel=3, n_taps=120)


def bundled() -> VocoderConfig:
    """Faster than speech on a small part of one CPU core."""
    return VocoderConfig(dim=192, ffn_dim=448, n_layers=5)


#: Vocoders by name.
PRESETS: dict[str, Callable[[], VocoderConfig]] = {"debug": debug, "bundled": bundled}
