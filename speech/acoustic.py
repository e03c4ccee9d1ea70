"""The acoustic model: phones, how long, how high and how loud they are, to log-mel frames and pitch (section 8.1.2 leaves it open).

It looks a fixed number of phones ahead; all else is causal, so it streams phone by phone.

    phones, prosody --look-ahead--> ConvNeXt blocks, one position per phone
        --repeated for the frames of each phone, with the place in the phone--> ConvNeXt blocks, one per frame
        --> log-mel, pitch around the phone's mean, voicing

Shape letters: B rows, N phones, T frames (10 ms), M mel bins, D width, K phones of context, A phones of look-ahead, L blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speech.convnext import CausalConvNeXt
from speech.phone_batch import PhoneBatch, PhoneEmbedding
from speech.streaming import StreamState, below, ending, take
from speech.vocoder import MEL_MEAN, MEL_STD

#: Bring log duration in frames, log pitch in Hz and log power of phones to about mean 0 and variance 1.
PROSODY_MEAN, PROSODY_STD = (2.0, 4.9, -3.5), (0.6, 0.3, 1.5)
#: What is told of a frame's place in its phone.
N_PLACE = 6


@dataclass(frozen=True, kw_only=True)
class AcousticConfig:
    """Shape of an acoustic model.

    Attributes:
        phone_layers, phone_kernel: blocks at the rate of phones.
        frame_layers, frame_kernel: blocks at the rate of frames.
        lookahead: phones after its own that a phone sees, and as many before it beside what the blocks see.
        n_speakers, n_styles: voices to choose from.
    """

    n_mels: int = 80
    dim: int
    ffn_dim: int
    phone_layers: int
    frame_layers: int
    phone_kernel: int = 3
    frame_kernel: int = 7
    lookahead: int = 3
    n_speakers: int = 1
    n_styles: int = 1

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise ValueError(f"lookahead must be at least 1 phone, got {self.lookahead}")


@dataclass(frozen=True, kw_only=True)
class AcousticState(StreamState):
    """Memory of an acoustic model between steps.

    Attributes:
        phones_BKD: the last phones.
        frames_BA, log_f0_BA: frames and mean log pitch of those that wait for what follows them.
        phone_past_BLKD, frame_past_BLKD: of the blocks.
    """

    phones_BKD: Tensor
    frames_BA: Tensor
    log_f0_BA: Tensor
    phone_past_BLKD: Tensor
    frame_past_BLKD: Tensor


@dataclass
class Frames:
    """What phones sound like, frame by frame; zeros past a row's end.

    Attributes:
        mel_BTM: log-mel.
        log_f0_BT: logarithm of the pitch in Hz, as if all were voiced.
        voicing_BT: log odds that it is.
        n_frames_B: real frames of each row.
    """

    mel_BTM: Tensor
    log_f0_BT: Tensor
    voicing_BT: Tensor
    n_frames_B: Tensor

    @property
    def f0_BT(self) -> Tensor:
        """Pitch in Hz, 0 where unvoiced."""
        return self.log_f0_BT.exp().where(self.voicing_BT > 0, 0)


class AcousticModel(nn.Module):
    """Phones and their prosody to log-mel frames and pitch."""

    prosody_mean: Tensor
    prosody_std: Tensor

    def __init__(self, config: AcousticConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.embed = PhoneEmbedding(dim, config.n_speakers, config.n_styles)
        self.prosody_proj = nn.Linear(3, dim)
        self.context = nn.Conv1d(dim, dim, 2 * config.lookahead + 1)
        self.phone_blocks = CausalConvNeXt(dim, config.ffn_dim, config.phone_kernel, config.phone_layers)
        self.place_proj = nn.Linear(N_PLACE, dim)
        self.frame_blocks = CausalConvNeXt(dim, config.ffn_dim, config.frame_kernel, config.frame_layers)
        self.head = nn.Linear(dim, config.n_mels + 2)
        self.register_buffer("prosody_mean", torch.tensor(PROSODY_MEAN), persistent=False)
        self.register_buffer("prosody_std", torch.tensor(PROSODY_STD), persistent=False)

    def forward(self, phones: PhoneBatch, prosody_BN3: Tensor, frames_BN: Tensor) -> Frames:
        """Frames of whole utterances.

        Args:
            prosody_BN3: log duration (which `frames_BN` overrules), mean log pitch in Hz and mean log power of each phone.
            frames_BN: how many frames each phone lasts, int64, at least 1 where there is a phone.
        """
        return self.follow(phones, prosody_BN3, frames_BN, self.init_state(len(frames_BN)), final=True)[0]

    def init_state(self, batch_size: int) -> AcousticState:
        """State of rows that have said nothing yet."""
        config, zeros = self.config, partial(self.head.weight.new_zeros, batch_size)
        return AcousticState(
            phones_BKD=zeros(2 * config.lookahead, config.dim),
            frames_BA=zeros(config.lookahead, dtype=torch.int64),
            log_f0_BA=zeros(config.lookahead),
            phone_past_BLKD=zeros(*self.phone_blocks.past_shape),
            frame_past_BLKD=zeros(*self.frame_blocks.past_shape),
        )

    def step(
        self,
        phones: PhoneBatch,
        prosody_BN3: Tensor,
        frames_BN: Tensor,
        state: AcousticState,
        *,
        final: bool | Tensor = False,
    ) -> tuple[Tensor, Tensor, Tensor, AcousticState]:
        """Frames of the phones whose look-ahead is there; together, those of all steps are `forward`'s.

        Args:
            phones, prosody_BN3, frames_BN: new phones, any number, also none.
            final: whether the stream ends here, for all rows or `(B,)`; the rows that end start anew in the state returned.

        Returns:
            mel_BTM: log-mel frames, zeros past a row's end.
            f0_BT: pitch in Hz, 0 where unvoiced.
            n_B: how many frames each row has.
            state: for the next step.

        Raises:
            ValueError: prosody or durations do not fit the phones.
        """
        frames, state = self.follow(phones, prosody_BN3, frames_BN, state, final=final)
        return frames.mel_BTM, frames.f0_BT, frames.n_frames_B, state

    def follow(
        self, phones: PhoneBatch, prosody_BN3: Tensor, frames_BN: Tensor, state: AcousticState, *, final: bool | Tensor
    ) -> tuple[Frames, AcousticState]:
        """As `step`, with all that is known of the frames."""
        self._check(phones, prosody_BN3, frames_BN)
        ahead = self.config.lookahead
        final_B = ending(final, frames_BN)
        is_real_BN = below(phones.n_phones_B, frames_BN.shape[1])
        frames_BN, log_f0_BN = frames_BN.where(is_real_BN, 0), prosody_BN3[..., 1].where(is_real_BN, 0)
        prosody_BN3 = torch.stack([frames_BN.clamp(min=1).log(), *prosody_BN3.unbind(-1)[1:]], dim=-1)
        x_BND = self.embed(phones) + self.prosody_proj((prosody_BN3 - self.prosody_mean) / self.prosody_std)
        x_BND = x_BND.masked_fill(~is_real_BN[..., None], 0)
        n_B = phones.n_phones_B
        if final_B.any():  # nothing follows the last phones
            x_BND = F.pad(x_BND, (0, 0, 0, ahead))
            frames_BN, log_f0_BN = F.pad(frames_BN, (0, ahead)), F.pad(log_f0_BN, (0, ahead))
            n_B = n_B + final_B * ahead
        if x_BND.shape[1] == 0:
            return self._no_frames(len(frames_BN)), state
        h_BND, frames_BN, log_f0_BN, state = self._read(x_BND, frames_BN, log_f0_BN, n_B, state)
        frames, state = self._expand(h_BND, frames_BN, log_f0_BN, state)
        return frames, state.reset(final_B)

    def _read(
        self, x_BND: Tensor, frames_BN: Tensor, log_f0_BN: Tensor, n_B: Tensor, state: AcousticState
    ) -> tuple[Tensor, Tensor, Tensor, AcousticState]:
        """Phones in their context, each `lookahead` phones late, with its frames and pitch.

        What comes out before the first phone has no frames.
        """
        ahead, length = self.config.lookahead, x_BND.shape[1]
        x_BND = torch.cat([state.phones_BKD, x_BND], dim=1)
        frames_BN = torch.cat([state.frames_BA, frames_BN], dim=1)
        log_f0_BN = torch.cat([state.log_f0_BA, log_f0_BN], dim=1)
        h_BND = self.context(x_BND.transpose(1, 2)).transpose(1, 2)
        h_BND, past_BLKD = self.phone_blocks(h_BND, n_B, state.phone_past_BLKD)
        state = dataclasses.replace(
            state,
            phones_BKD=take(x_BND, n_B, 2 * ahead),
            frames_BA=take(frames_BN, n_B, ahead),
            log_f0_BA=take(log_f0_BN, n_B, ahead),
            phone_past_BLKD=past_BLKD,
        )
        return h_BND, frames_BN[:, :length].where(below(n_B, length), 0), log_f0_BN[:, :length], state

    def _expand(
        self, h_BND: Tensor, frames_BN: Tensor, log_f0_BN: Tensor, state: AcousticState
    ) -> tuple[Frames, AcousticState]:
        """Repeats each phone for its frames, and says how these sound."""
        end_BN = frames_BN.cumsum(1)
        n_frames_B = end_BN[:, -1]
        length = int(n_frames_B.max())
        if length == 0:
            return self._no_frames(len(frames_BN)), state
        frame_BT = torch.arange(length, device=end_BN.device).expand(len(end_BN), -1).contiguous()
        phone_BT = torch.searchsorted(end_BN, frame_BT, right=True).clamp(max=end_BN.shape[1] - 1)
        lasts_BT = frames_BN.gather(1, phone_BT)
        after_BT = (end_BN.gather(1, phone_BT) - frame_BT - 0.5).clamp(min=0)  # past a row's end nothing is far
        before_BT = lasts_BT - after_BT
        share_BT = before_BT / lasts_BT.clamp(min=1)
        place = [
            share_BT,
            (torch.pi * share_BT).sin(),
            *(x / 10 for x in (before_BT, after_BT)),
            *map(_near, (before_BT, after_BT)),
        ]
        x_BTD = self.place_proj(torch.stack(place, dim=-1).to(h_BND.dtype)) + take_phones(h_BND, phone_BT)
        x_BTD, past_BLKD = self.frame_blocks(x_BTD, n_frames_B, state.frame_past_BLKD)
        y_BTX = self.head(x_BTD).float()
        mel_BTM, (f0_BT, voicing_BT) = y_BTX[..., :-2], y_BTX[..., -2:].unbind(-1)
        is_real_BT = below(n_frames_B, length)
        frames = Frames(
            (MEL_MEAN + MEL_STD * mel_BTM).where(is_real_BT[..., None], 0),
            (log_f0_BN.gather(1, phone_BT) + PROSODY_STD[1] * f0_BT).where(is_real_BT, 0),
            voicing_BT.where(is_real_BT, 0),
            n_frames_B,
        )
        return frames, dataclasses.replace(state, frame_past_BLKD=past_BLKD)

    def _no_frames(self, batch_size: int) -> Frames:
        zeros = partial(self.head.weight.new_zeros, batch_size)
        return Frames(zeros(0, self.config.n_mels), zeros(0), zeros(0), zeros(dtype=torch.int64))

    def _check(self, phones: PhoneBatch, prosody_BN3: Tensor, frames_BN: Tensor) -> None:
        shape = phones.ipa_BN.shape
        if prosody_BN3.shape != (*shape, 3) or frames_BN.shape != shape:
            raise ValueError(
                f"prosody: need three values and a number of frames for each of {tuple(shape)} phones, got shapes "
                f"{tuple(prosody_BN3.shape)} and {tuple(frames_BN.shape)}"
            )


def take_phones(h_BND: Tensor, phone_BT: Tensor) -> Tensor:
    """The phone of each frame."""
    return h_BND.gather(1, phone_BT[..., None].expand(-1, -1, h_BND.shape[2]))


def _near(distance_BT: Tensor) -> Tensor:
    """How near the end of a phone is, which matters most in the last frames before it."""
    return torch.exp(-distance_BT / 3)


def debug() -> AcousticConfig:
    return AcousticConfig(dim=14, ffn_dim=22, phone_layers=1, frame_layers=2, frame_kernel=3, lookahead=2)


def bundled() -> AcousticConfig:
    return AcousticConfig(dim=192, ffn_dim=352, phone_layers=2, frame_layers=4)


#: Acoustic models by name.
PRESETS: dict[str, Callable[[], AcousticConfig]] = {"debug": debug, "bundled": bundled}
