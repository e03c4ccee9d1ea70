"""The vocoder: its excitation against sums of cosines, exact filtering, and the streaming contract."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speech.excitation import noise, pulses
from speech.vocoder import PRESETS, START_GAIN, Vocoder, VocoderConfig, VocoderState
from speech.voice_features import VoiceFeaturesConfig

FEATURES = VoiceFeaturesConfig(sample_rate=1000, hop=22, n_fft=44, n_mels=5, f_max=500.0)
# One filter per frame with a response of odd length in frames, and two with another.
CONFIGS = [
    VocoderConfig(features=FEATURES, dim=13, ffn_dim=17, n_layers=2, kernel=3, lookahead=2, pieces=2, n_taps=30),
    VocoderConfig(features=FEATURES, dim=11, ffn_dim=19, n_layers=3, kernel=5, lookahead=1, pieces=1, n_taps=58),
    VocoderConfig(features=FEATURES, dim=7, ffn_dim=5, n_layers=1, kernel=2, lookahead=0, pieces=11, n_taps=4),
]


def make(config: VocoderConfig) -> Vocoder:
    torch.manual_seed(0)
    vocoder = Vocoder(config).eval()
    torch.nn.init.normal_(vocoder.head.weight, std=0.3)
    return vocoder


def frames(n_rows: int, n_frames: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mel_BTM = 3 * torch.randn(n_rows, n_frames, 5, generator=generator) - 5
    f0_BT = 60 + 80 * torch.rand(n_rows, n_frames, generator=generator)
    return mel_BTM, f0_BT.where(torch.rand(n_rows, n_frames, generator=generator) < 0.7, 0)


@torch.no_grad()
def stream(
    vocoder: Vocoder,
    mel_BTM: Tensor,
    f0_BT: Tensor,
    n_frames_B: Tensor,
    cuts: Sequence[int],
    state: VocoderState | None = None,
) -> list[Tensor]:
    """Samples of each row, streamed in pieces of the sizes in `cuts`, then the rest."""
    state = state or vocoder.init_state(len(mel_BTM))
    edges = [0, *np.cumsum(cuts).tolist(), mel_BTM.shape[1]]
    pieces: list[list[Tensor]] = [[] for _ in mel_BTM]
    for i, (start, stop) in enumerate(pairwise(edges)):
        n_B = (n_frames_B - start).clamp(0, stop - start)
        made_BN, made_B, state = vocoder.step(
            mel_BTM[:, start:stop], f0_BT[:, start:stop], state, n_frames_B=n_B, final=i == len(edges) - 2
        )
        for row, made_N, n in zip(pieces, made_BN, made_B.tolist(), strict=True):
            row.append(made_N[:n])
            assert not made_N[n:].any()
    return [torch.cat(row) for row in pieces]


# --- excitation -------------------------------------------------------------------------------------------------------


def test_pulses_are_the_sum_of_all_harmonics() -> None:
    """Against cosines added one by one, at a steady pitch; the last one is faded by how near it is to half the rate."""
    f0, rate, n_frames = 93.0, 1000, 7
    zero = torch.zeros(1, dtype=torch.float64)
    pulses_1TN, f0_1X, phase_1X = pulses(torch.full((1, n_frames), f0), zero, zero, hop=22, sample_rate=rate)
    time_N = np.arange(n_frames * 22) / rate
    share = rate / 2 / f0 - 5
    weights = [1, 1, 1, 1, share]  # five harmonics lie below 500 Hz
    expected = sum(w * np.cos(2 * math.pi * k * f0 * time_N) for k, w in enumerate(weights, 1)) * math.sqrt(
        2 / (5 + share)
    )
    np.testing.assert_allclose(pulses_1TN.flatten().numpy(), expected, atol=1e-5)
    assert phase_1X[0, -1].item() == pytest.approx(n_frames * 22 * f0 / rate % 1)
    assert f0_1X.tolist() == [[0.0, *[93.0] * n_frames]]


def test_pulses_follow_the_pitch_and_go_on_through_unvoiced_frames() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    f0_1T = torch.tensor([[0, 0, 100, 0, 120, 0.0]])
    pulses_1TN, f0_1X, phase_1X = pulses(f0_1T, zero, zero, hop=20, sample_rate=1000)
    assert not pulses_1TN[0, :2].any() and pulses_1TN[0, 2:].any(dim=1).all()
    assert f0_1X.tolist() == [[0, 0, 0, 100, 100, 120, 120]]
    turned = torch.tensor([0, 0, 0, 100, 100, 110, 120]).double().cumsum(0) * 0.02
    torch.testing.assert_close(phase_1X[0], turned.frac())


def test_the_kernel_holds_at_its_peaks() -> None:
    """At a period of whole samples the closed form would be 0 / 0 there."""
    zero = torch.zeros(1, dtype=torch.float64)
    pulses_1TN, _, _ = pulses(torch.full((1, 9), 125.0), zero, zero, hop=16, sample_rate=1000)
    assert pulses_1TN.isfinite().all()
    peaks = pulses_1TN.flatten()[::8]
    torch.testing.assert_close(peaks, torch.full_like(peaks, 3 * math.sqrt(2 / 4)))  # the fourth is at half the rate


def test_noise_is_white_and_told_by_its_position() -> None:
    x_TN = noise(torch.arange(500), hop=240)
    assert x_TN.mean().abs() < 0.01 and x_TN.var().item() == pytest.approx(1, abs=0.01)
    spectrum = torch.fft.rfft(x_TN.flatten()).abs().square()
    bands = spectrum[1:].unflatten(0, (60, -1)).mean(1)
    assert bands.std() / bands.mean() < 0.05
    assert torch.equal(noise(torch.arange(100, 110), hop=240), x_TN[100:110])


# --- filtering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=["two", "one", "eleven"])
def test_filters_that_do_nothing_give_the_excitation(config: VocoderConfig) -> None:
    """Windows add up to one, and samples stay where they were: the overlap-add is exact."""
    vocoder = make(config)
    torch.nn.init.zeros_(vocoder.head.weight)
    torch.nn.init.constant_(vocoder.head.bias, -START_GAIN)
    with torch.no_grad():
        bias = vocoder.head.bias.view(config.pieces, 3, -1)
        bias[:, 1] = 0  # no phase
        bias[:, 2] = -100.0  # no noise
        mel_BTM, f0_BT = frames(2, 13)
        made_BN = vocoder(mel_BTM, f0_BT)
    zeros = torch.zeros(2, dtype=torch.float64)
    pulses_BTN, _, _ = pulses(f0_BT, zeros, zeros, hop=22, sample_rate=1000)
    n = 12 * 22  # after the last frame the pulses go on
    torch.testing.assert_close(made_BN[:, :n], pulses_BTN.flatten(1)[:, :n], atol=1e-4, rtol=0)


def test_a_filter_is_a_convolution_without_wrapping_around() -> None:
    config = CONFIGS[0]
    vocoder = make(config)
    torch.nn.init.zeros_(vocoder.head.weight)
    torch.nn.init.normal_(vocoder.head.bias)
    with torch.no_grad():
        bias = vocoder.head.bias.view(config.pieces, 3, -1)
        bias[:] = bias[:1].clone()  # all pieces alike
        bias[:, 2] = -100.0
        mel_BTM, f0_BT = frames(1, 17)
        made_BN = vocoder(mel_BTM, f0_BT)
        gain_F, turn_F = (bias[0, 0] + START_GAIN).exp(), bias[0, 1]
        response = torch.fft.irfft(torch.polar(gain_F, turn_F), config.n_taps).roll(config.n_taps // 2)
    zeros = torch.zeros(1, dtype=torch.float64)
    source = pulses(f0_BT, zeros, zeros, hop=22, sample_rate=1000)[0].flatten()
    expected = np.convolve(source.numpy(), response.numpy())[config.n_taps // 2 :]
    n = 14 * 22
    np.testing.assert_allclose(made_BN[0, :n].numpy(), expected[:n], atol=1e-4)


# --- the streaming contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=["two", "one", "eleven"])
@pytest.mark.parametrize("cuts", [[], [1] * 22, [0, 5, 0, 11], [23], [2, 1, 19]], ids=str)
def test_any_chunking_gives_the_same_samples(config: VocoderConfig, cuts: list[int]) -> None:
    vocoder = make(config)
    mel_BTM, f0_BT = frames(3, 23)
    n_frames_B = torch.tensor([23, 3, 14])
    with torch.no_grad():
        whole_BN = vocoder(mel_BTM, f0_BT, n_frames_B)
    assert whole_BN.shape == (3, 23 * 22) and whole_BN.abs().max() > 0.01
    for made_N, expected_N, n in zip(
        stream(vocoder, mel_BTM, f0_BT, n_frames_B, cuts), whole_BN, n_frames_B.tolist(), strict=True
    ):
        assert len(made_N) == n * 22
        torch.testing.assert_close(made_N, expected_N[: n * 22], atol=1e-5, rtol=0)


def test_a_row_does_not_depend_on_the_others_or_on_padding() -> None:
    vocoder = make(CONFIGS[0])
    mel_BTM, f0_BT = frames(3, 19)
    n_frames_B = torch.tensor([19, 1, 8])
    with torch.no_grad():
        whole_BN = vocoder(mel_BTM, f0_BT, n_frames_B)
        for b, n in enumerate(n_frames_B.tolist()):
            alone_1N = vocoder(mel_BTM[b : b + 1, :n], f0_BT[b : b + 1, :n])
            torch.testing.assert_close(whole_BN[b, : n * 22], alone_1N[0], atol=1e-5, rtol=0)
            assert not whole_BN[b, n * 22 :].any()


def test_samples_are_certain_a_fixed_number_of_frames_late() -> None:
    """What frame t changes begins `delay` frames before it and no earlier."""
    for config in CONFIGS:
        vocoder = make(config)
        mel_BTM, f0_BT = frames(1, 20)
        other_BTM = mel_BTM.clone()
        other_BTM[:, 12] += 1
        with torch.no_grad():
            change_N = (vocoder(mel_BTM, f0_BT) - vocoder(other_BTM, f0_BT))[0].abs()
        first = int((change_N > 1e-6).nonzero()[0])
        assert 12 - config.delay <= first // 22 <= 12


def test_rows_end_and_begin_on_their_own_and_states_can_be_saved(tmp_path: Path) -> None:
    vocoder = make(CONFIGS[1])
    mel_BTM, f0_BT = frames(2, 16)
    with torch.no_grad():
        _, _, state = vocoder.step(mel_BTM[:, :9], f0_BT[:, :9], vocoder.init_state(2))
        save_file(vars(state), tmp_path / "state.safetensors")
        state = type(state)(**load_file(tmp_path / "state.safetensors"))
        ended_BN, n_B, state = vocoder.step(mel_BTM[:, 9:], f0_BT[:, 9:], state, final=torch.tensor([True, False]))
        whole_BN = vocoder(mel_BTM, f0_BT)
        assert n_B.tolist() == [(7 + CONFIGS[1].delay) * 22, 7 * 22]
        torch.testing.assert_close(ended_BN[0], whole_BN[0, -int(n_B[0]) :], atol=1e-5, rtol=0)
        again_BN, n_B, _ = vocoder.step(mel_BTM.flip(0), f0_BT.flip(0), state, final=True)
    torch.testing.assert_close(again_BN[0, : 16 * 22], vocoder(mel_BTM[1:], f0_BT[1:])[0], atol=1e-5, rtol=0)
    assert n_B.tolist() == [16 * 22, (16 + CONFIGS[1].delay) * 22]
    fresh = vocoder.init_state(2)
    reset = state.reset(torch.tensor([True, True]))
    assert all(torch.equal(x, y) for x, y in zip(vars(fresh).values(), vars(reset).values(), strict=True))


def test_nothing_comes_from_nothing() -> None:
    vocoder = make(CONFIGS[0])
    mel_BTM, f0_BT = frames(2, 0)
    for final in (False, True):
        made_BN, n_B, _ = vocoder.step(mel_BTM, f0_BT, vocoder.init_state(2), final=final)
        assert made_BN.shape == (2, 0) and n_B.tolist() == [0, 0]


def test_silent_and_loud_frames_are_finite() -> None:
    vocoder = make(CONFIGS[0])
    mel_BTM = torch.tensor([-11.5, 9.0])[:, None, None].expand(2, 9, 5)
    assert vocoder(mel_BTM, torch.full((2, 9), 499.0)).isfinite().all()


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_parameter_counts_of_all_presets() -> None:
    counts = {}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in Vocoder(preset()).parameters())
    assert counts.pop("debug") < 20_000
    assert counts.pop("bundled") <= 1_500_000
    assert not counts


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="pieces 3 must divide the hop of 22"):
        dataclasses.replace(CONFIGS[0], pieces=3)
    with pytest.raises(ValueError, match="n_taps must be even"):
        dataclasses.replace(CONFIGS[0], n_taps=7)
    with pytest.raises(ValueError, match="lookahead"):
        dataclasses.replace(CONFIGS[0], lookahead=-1)
    vocoder = make(CONFIGS[0])
    with pytest.raises(ValueError, match="mel: need \\(rows, frames, 5 bins\\)"):
        vocoder(torch.zeros(1, 4, 6), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="a pitch for each frame"):
        vocoder(torch.zeros(1, 4, 5), torch.zeros(1, 3))


def test_gradients_reach_everything_and_padding_gets_none() -> None:
    vocoder = make(CONFIGS[0])
    mel_BTM, f0_BT = frames(2, 9)
    mel_BTM.requires_grad_()
    vocoder(mel_BTM, f0_BT, torch.tensor([9, 4])).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in vocoder.parameters())
    assert mel_BTM.grad is not None and mel_BTM.grad[0].any() and not mel_BTM.grad[1, 4:].any()
