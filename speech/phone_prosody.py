"""What the prosody model predicts and the acoustic model is given: duration, pitch and loudness of each phone (section 8.3.2).

Shape letters: N phones, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Log pitch in Hz where nothing of an utterance has a voice.
NO_PITCH = 5.0


def phone_prosody(frames_N: Tensor, f0_T: Tensor, log_power_T: Tensor) -> Tensor:
    """Log duration in frames, mean log pitch in Hz and mean log power of each phone, `(N, 3)`.

    The mean pitch is that of the voiced frames; a phone that has none takes it from its neighbours, in proportion to how near
    they are, and before the first or after the last voiced phone from that one.

    Args:
        frames_N: how long each phone lasts, int64; T in all.
        f0_T: pitch in Hz, 0 where unvoiced.
        log_power_T: as `speech.voice_features.log_power` gives it.
    """
    phone_T = torch.repeat_interleave(torch.arange(len(frames_N)), frames_N)
    voiced_T = (f0_T > 0).float()

    def total(x_T: Tensor) -> Tensor:
        return torch.zeros(len(frames_N)).index_add_(0, phone_T, x_T)

    n_voiced_N = total(voiced_T)
    log_f0_N = total(f0_T.clamp(min=1).log() * voiced_T) / n_voiced_N.clamp(min=1)
    centre_N = frames_N.cumsum(0) - 0.5 * frames_N
    return torch.stack(
        [frames_N.log(), _bridged(log_f0_N, centre_N, n_voiced_N > 0), total(log_power_T) / frames_N], dim=-1
    )


def _bridged(value_N: Tensor, place_N: Tensor, known_N: Tensor) -> Tensor:
    """Known values, and between them straight lines."""
    place, value = place_N[known_N], value_N[known_N]
    if len(place) == 0:
        return torch.full_like(value_N, NO_PITCH)
    right_N = torch.searchsorted(place, place_N).clamp(max=len(place) - 1)
    left_N = (right_N - 1).clamp(min=0)
    span_N = (place[right_N] - place[left_N]).clamp(min=1e-6)
    share_N = ((place_N - place[left_N]) / span_N).clamp(0, 1)
    return torch.lerp(value[left_N], value[right_N], share_N)
