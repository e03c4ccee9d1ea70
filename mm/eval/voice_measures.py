"""How near made speech is to the recording that it stands for, frame by frame.

Shape letters: T and U frames of two recordings, M mel bins, C cepstral coefficients, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Cepstral coefficients that count, after the one for loudness.
N_CEPSTRA = 13


@dataclass(frozen=True)
class Fidelity:
    """Distances of one utterance; sums, so that those of several add up to a mean per frame.

    Attributes:
        mel: mean absolute difference of log-mel bins, summed over frames.
        cepstra: mel-cepstral distortion in dB, summed over frames.
        f0: squared difference of the pitch in Hz, summed over frames that have a voice in both.
        voicing: frames that have a voice in one alone.
    """

    mel: float
    cepstra: float
    f0: float
    voicing: int
    n_frames: int
    n_voiced: int


def fidelity(mel_TM: Tensor, made_mel_TM: Tensor, f0_T: Tensor, made_f0_T: Tensor) -> Fidelity:
    """Compares log-mel frames (natural logarithm of magnitudes) and pitch (Hz, 0 where unvoiced) of the same timing."""
    difference_TM = (mel_TM - made_mel_TM).float()
    voiced_T, made_voiced_T = f0_T > 0, made_f0_T > 0
    both_T = voiced_T & made_voiced_T
    return Fidelity(
        mel=difference_TM.abs().mean(1).sum().item(),
        cepstra=cepstral_distortion(difference_TM).sum().item(),
        f0=(f0_T - made_f0_T)[both_T].square().sum().item(),
        voicing=int((voiced_T != made_voiced_T).sum()),
        n_frames=len(mel_TM),
        n_voiced=int(both_T.sum()),
    )


def cepstral_distortion(difference_TM: Tensor) -> Tensor:
    """Mel-cepstral distortion of each frame in dB (Kubichek 1993), from a difference of log magnitudes."""
    return (10 / math.log(10)) * (2 * mel_cepstra(difference_TM).square().sum(1)).sqrt()


def mel_cepstra(mel_TM: Tensor) -> Tensor:
    """Cosine transform `(T, C)` of log-mel frames, without the coefficient for loudness."""
    n_mels = mel_TM.shape[1]
    order_C1 = torch.arange(1, N_CEPSTRA + 1, device=mel_TM.device)[:, None]
    angle_CM = order_C1 * (torch.arange(n_mels, device=mel_TM.device) + 0.5) * (math.pi / n_mels)
    return mel_TM @ angle_CM.cos().T * (2 / n_mels)


def warped(mel_TM: Tensor, made_mel_UM: Tensor) -> tuple[Tensor, Tensor]:
    """Frames of two recordings that belong together when one is stretched to fit the other: dynamic time warping.

    Returns:
        Indices of the frames of each, `(P,)`, on the path from beginning to end whose cepstra differ least in sum.
    """
    cost_TU = torch.cdist(mel_cepstra(mel_TM), mel_cepstra(made_mel_UM)).numpy()
    n, m = cost_TU.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for diagonal in range(n + m - 1):  # its cells depend on the two diagonals before alone
        t = np.arange(max(0, diagonal - m + 1), min(diagonal + 1, n))
        u = diagonal - t
        before = np.minimum(np.minimum(total[t, u + 1], total[t + 1, u]), total[t, u])
        total[t + 1, u + 1] = cost_TU[t, u] + before
    path, (t, u) = [(n - 1, m - 1)], (n, m)
    while (t, u) != (1, 1):
        t, u = min(((t - 1, u - 1), (t - 1, u), (t, u - 1)), key=lambda cell: total[cell])
        path.append((t - 1, u - 1))
    t_P, u_P = torch.tensor(path[::-1]).T
    return t_P, u_P


def means(rows: Sequence[Fidelity]) -> dict[str, float]:
    """Means over all frames: `mel_l1`, `mcd_db`, `f0_rmse_hz`, and the share of `voicing_errors`; nothing without rows."""
    n_frames, n_voiced = sum(row.n_frames for row in rows), sum(row.n_voiced for row in rows)
    if n_frames == 0:
        return {}
    return {
        "mel_l1": sum(row.mel for row in rows) / n_frames,
        "mcd_db": sum(row.cepstra for row in rows) / n_frames,
        "f0_rmse_hz": math.sqrt(sum(row.f0 for row in rows) / max(n_voiced, 1)),
        "voicing_errors": sum(row.voicing for row in rows) / n_frames,
    }
