"""What a voice is made of before the mouth shapes it: pulses at the pitch, and noise.

Both are white, of power 1, and depend on nothing but pitch and position, so that a stream cut in any way has the same samples.
All is computed in FP64: the highest harmonics turn a hundred times faster than the phase that is carried on.

Shape letters: B rows, T frames, N samples of a frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pulses(
    f0_BT: Tensor, f0_before_B: Tensor, phase_B: Tensor, *, hop: int, sample_rate: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All harmonics up to half the sample rate, in cosine phase and equally loud; the highest fades out as it gets there.

    Pitch moves linearly to that of a frame, which it has at the frame's end; unvoiced frames keep the last one. Before the first
    voiced frame there are no pulses.

    Args:
        f0_BT: pitch in Hz, 0 where unvoiced.
        f0_before_B: last pitch before these frames, 0 where there was none yet.
        phase_B: where the pulses were then, in periods, FP64.

    Returns:
        pulses_BTN: float32.
        f0_BX: the pitch that was held before the first frame and at the end of each, X = T + 1.
        phase_BX: likewise the phase.
    """
    f0_BT = _held(torch.cat([f0_before_B[:, None], f0_BT.to(f0_before_B.dtype)], dim=1)).double()
    end_BT = f0_BT[:, 1:]
    start_BT = torch.where(f0_BT[:, :-1] > 0, f0_BT[:, :-1], end_BT)
    turned_BT = (start_BT + end_BT).cumsum(1) * (0.5 * hop / sample_rate) + phase_B[:, None]
    phase_BX = torch.cat([phase_B[:, None], turned_BT], dim=1).frac()

    sample_N = torch.arange(hop, device=f0_BT.device, dtype=torch.float64)
    slope_BT1 = ((end_BT - start_BT) / hop)[..., None]
    f0_BTN = start_BT[..., None] + slope_BT1 * sample_N
    phase_BTN = phase_BX[:, :-1, None] + (start_BT[..., None] + 0.5 * slope_BT1 * sample_N) * sample_N / sample_rate
    angle_BTN = 2 * math.pi * phase_BTN.frac()
    is_voiced_BTN = f0_BTN > 0
    n_harmonics_BTN = 0.5 * sample_rate / f0_BTN.where(is_voiced_BTN, sample_rate)
    whole_BTN = n_harmonics_BTN.floor()
    # The sum of cosines in closed form (Dirichlet's kernel), of all harmonics but the highest.
    half_sine_BTN = (0.5 * angle_BTN).sin()
    is_peak_BTN = half_sine_BTN.abs() < 1e-9
    kernel_BTN = 0.5 * ((whole_BTN - 0.5) * angle_BTN).sin() / half_sine_BTN.masked_fill(is_peak_BTN, 1) - 0.5
    sum_BTN = torch.where(is_peak_BTN, whole_BTN - 1, kernel_BTN)
    sum_BTN = sum_BTN + (n_harmonics_BTN - whole_BTN) * (whole_BTN * angle_BTN).cos()
    pulses_BTN = (sum_BTN * (2 / n_harmonics_BTN).sqrt()).where(is_voiced_BTN, 0)
    return pulses_BTN.float(), f0_BT.to(f0_before_B.dtype), phase_BX


def noise(position_BT: Tensor, *, hop: int) -> Tensor:
    """Uniform white noise `(B, T, N)`, a hash of the sample's number in its row.

    Args:
        position_BT: numbers of the frames, int64.
    """
    x = position_BT[..., None] * hop + torch.arange(hop, device=position_BT.device)
    x = x & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x846CA68B):  # the mixing steps of Wellons' hash "lowbias32"
        x = (x ^ (x >> 16)) * multiplier & 0xFFFFFFFF
        x = x ^ (x >> 15)
    return (x.double() * (2 * math.sqrt(3) / 2**32) - math.sqrt(3)).float()


def _held(f0_BT: Tensor) -> Tensor:
    """Every frame's own pitch, or the last one before it; 0 before the first."""
    frame_T = torch.arange(f0_BT.shape[1], device=f0_BT.device)
    last_BT = torch.where(f0_BT > 0, frame_T, 0).cummax(1).values
    return f0_BT.gather(1, last_BT)
