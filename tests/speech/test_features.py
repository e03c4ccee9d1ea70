"""Log-mel features: against torchaudio and a NumPy reference, and the streaming contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from safetensors.torch import load_file, save_file
from torch import Tensor

from speech.features import (
    LOG_FLOOR,
    PRIOR_FRAMES,
    PRIOR_MEAN,
    PRIOR_STD,
    VARIANCE_FLOOR,
    FeaturesConfig,
    LogMel,
    LogMelState,
)

UTTERANCE, RUNNING = FeaturesConfig(), FeaturesConfig(normalisation="running")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)) * 0.1


def lengths(*n: int) -> Tensor:
    return torch.tensor(n)


def stream(features: LogMel, waveform_BN: Tensor, n_samples_B: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    """Features of each row, streamed in pieces of the sizes in `cuts`, then the rest."""
    state = features.init_state(len(waveform_BN))
    edges = [0, *np.cumsum(cuts).tolist(), waveform_BN.shape[1]]
    pieces: list[list[Tensor]] = [[] for _ in waveform_BN]
    for start, stop in pairwise(edges):
        n_B = (n_samples_B - start).clamp(0, stop - start)
        mel_BTM, n_frames_B, state = features.step(
            waveform_BN[:, start:stop], state, n_samples_B=n_B, final=stop == edges[-1]
        )
        for row, mel_TM, n in zip(pieces, mel_BTM, n_frames_B.tolist(), strict=True):
            row.append(mel_TM[:n])
            assert not mel_TM[n:].any()
    return [torch.cat(row) for row in pieces]


# -- oracles ---------------------------------------------------------------------------------------------------------


def torchaudio_log_mel(waveform_N: Tensor) -> np.ndarray:
    """Frames by torchaudio's transform of the zero-padded waveform, `(T, M)` FP64."""
    transform = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=400, hop_length=160, n_mels=80, center=False, norm="slaney", mel_scale="slaney"
    )
    n_frames = -(-len(waveform_N) // 160)
    padded = torch.nn.functional.pad(waveform_N, (0, (n_frames - 1) * 160 + 400 - len(waveform_N)))
    return np.log(transform(padded).T.double().numpy() + LOG_FLOOR)


def test_utterance_features_are_torchaudios_with_each_bin_normalised() -> None:
    waveform = noise(7919)
    mel_BTM, n_frames_B = LogMel(UTTERANCE)(waveform[None], lengths(7919))
    log_mel = torchaudio_log_mel(waveform)
    expected = (log_mel - log_mel.mean(0)) / np.sqrt(log_mel.var(0) + VARIANCE_FLOOR)
    assert n_frames_B.tolist() == [50]
    np.testing.assert_allclose(mel_BTM[0].numpy(), expected, atol=1e-4)


def test_running_features_use_the_frames_so_far_and_the_prior() -> None:
    waveform = noise(7919)
    log_mel = torchaudio_log_mel(waveform)
    # The prior as so many frames, half of them one deviation above the mean, half one below.
    prior = np.repeat([[PRIOR_MEAN - PRIOR_STD], [PRIOR_MEAN + PRIOR_STD]], PRIOR_FRAMES // 2, axis=0)
    heard = [np.concatenate([np.tile(prior, (1, 80)), log_mel[: t + 1]]) for t in range(len(log_mel))]
    expected = np.stack([(x[-1] - x.mean(0)) / np.sqrt(x.var(0) + VARIANCE_FLOOR) for x in heard])
    mel_BTM, _ = LogMel(RUNNING)(waveform[None], lengths(7919))
    np.testing.assert_allclose(mel_BTM[0].numpy(), expected, atol=1e-4)


# -- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_samples", "n_frames"), [(400, 3), (480, 3), (481, 4), (1600, 10), (960_000, 6000)], ids=lambda n: str(n)
)
def test_n_samples_give_ceil_n_over_hop_frames(n_samples: int, n_frames: int) -> None:
    mel_BTM, n_frames_B = LogMel(UTTERANCE)(noise(1, n_samples), lengths(n_samples))
    assert mel_BTM.shape == (1, n_frames, 80)
    assert n_frames_B.tolist() == [n_frames] == [UTTERANCE.n_frames(n_samples)]


def test_every_bin_hears_something() -> None:
    assert (LogMel(UTTERANCE).filters_FM.sum(0) > 0).all()


@pytest.mark.parametrize("config", [UTTERANCE, RUNNING], ids=lambda config: config.normalisation)
def test_a_row_equals_the_row_alone_whatever_its_padding_holds(config: FeaturesConfig) -> None:
    features, waveform = LogMel(config), noise(3, 5003)
    n_B = lengths(1409, 5003, 2111)
    waveform[0, 1409:] = float("nan")
    mel_BTM, n_frames_B = features(waveform, n_B)
    for row, n, n_frames in zip(range(3), n_B.tolist(), n_frames_B.tolist(), strict=True):
        alone, _ = features(waveform[row : row + 1, :n], n_B[row : row + 1])
        torch.testing.assert_close(mel_BTM[row, :n_frames], alone[0], atol=1e-5, rtol=0)
        assert not mel_BTM[row, n_frames:].any()


@pytest.mark.parametrize("config", [UTTERANCE, RUNNING], ids=lambda config: config.normalisation)
def test_silence_has_finite_features(config: FeaturesConfig) -> None:
    mel_BTM, _ = LogMel(config)(torch.zeros(1, 1601), lengths(1601))
    assert mel_BTM.isfinite().all()
    assert mel_BTM.abs().max() < 3


@pytest.mark.parametrize("gain", [0.001, 0.1, 10.0])
def test_running_features_are_sane_from_the_first_frame(gain: float) -> None:
    mel_BTM, _ = LogMel(RUNNING)(gain * noise(1, 1601), lengths(1601))
    assert mel_BTM[:, 0].abs().max() < 4


def test_running_features_do_not_hear_the_future() -> None:
    features, waveform = LogMel(RUNNING), noise(1, 5003)
    before, _ = features(waveform, lengths(5003))
    waveform[:, 11 * 160 + 400 :] *= -3
    after, _ = features(waveform, lengths(5003))
    assert torch.equal(before[:, :12], after[:, :12])  # frame 11 ends where the change starts
    assert not torch.isclose(before[:, 12:], after[:, 12:]).all(-1).any()


# -- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [1] * 5 + [163] * 29, [0, 997, 0, 3, 2003], [4999]], ids=str)
def test_any_chunking_equals_offline(cuts: list[int]) -> None:
    features, waveform, n_B = LogMel(RUNNING), noise(2, 5003), lengths(5003, 1409)
    offline, n_frames_B = features(waveform, n_B)
    for row, streamed in enumerate(stream(features, waveform, n_B, cuts)):
        torch.testing.assert_close(streamed, offline[row, : n_frames_B[row]], atol=1e-5, rtol=0)


def test_a_stream_goes_on_from_a_saved_state_and_rows_reset_alone(tmp_path: Path) -> None:
    features, waveform = LogMel(RUNNING), noise(2, 5003)
    first, n_first_B, state = features.step(waveform[:, :1013], features.init_state(2))
    save_file(vars(state), tmp_path / "state.safetensors")
    state = LogMelState(**load_file(tmp_path / "state.safetensors"))
    rest, n_rest_B, state = features.step(waveform[:, 1013:], state.reset(torch.tensor([False, True])), final=True)

    whole, _ = features(waveform[:1], lengths(5003))
    assert n_first_B.tolist() == [4, 4] and n_rest_B.tolist() == [28, 25]
    torch.testing.assert_close(torch.cat([first[0], rest[0]]), whole[0], atol=1e-5, rtol=0)
    anew, _ = features(waveform[1:, 1013:], lengths(3990))
    torch.testing.assert_close(rest[1, :25], anew[0], atol=1e-5, rtol=0)
    assert not any(tensor.any() for tensor in vars(state).values())


def test_one_row_may_end_before_the_others() -> None:
    features, waveform = LogMel(RUNNING), noise(2, 2003)
    ended, n_ended_B, state = features.step(
        waveform[:, :1013], features.init_state(2), final=torch.tensor([True, False])
    )
    alone, _ = features(waveform[:1, :1013], lengths(1013))
    assert n_ended_B.tolist() == [7, 4]
    torch.testing.assert_close(ended[0], alone[0], atol=1e-5, rtol=0)
    following, _, _ = features.step(waveform[:, 1013:], state, final=True)
    anew, _ = features(waveform[:1, 1013:], lengths(990))
    torch.testing.assert_close(following[0, :7], anew[0], atol=1e-5, rtol=0)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waveform", "n", "message"),
    [
        (torch.zeros(1, 399), 399, "n_samples: 399 samples are too short.*400"),
        (torch.zeros(1, 500), 501, "n_samples.*no longer than the waveform"),
        (torch.full((1, 500), float("nan")), 500, "waveform: has NaN"),
        (torch.full((1, 500), float("inf")), 500, "waveform: has NaN or infinite"),
        (torch.zeros(1, 500, dtype=torch.int16), 500, "waveform: need floating-point samples"),
        (torch.zeros(1, 2, 500), 500, "waveform: need floating-point samples"),
    ],
    ids=["short", "long", "nan", "inf", "int16", "channels"],
)
def test_bad_waveforms_are_refused(waveform: Tensor, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(UTTERANCE)(waveform, lengths(n))


def test_streaming_refuses_nan_and_normalisation_by_utterance() -> None:
    features = LogMel(RUNNING)
    with pytest.raises(ValueError, match="waveform: has NaN"):
        features.step(torch.full((1, 500), float("nan")), features.init_state(1))
    with pytest.raises(ValueError, match='streaming needs "running"'):
        LogMel(UTTERANCE).init_state(1)


def test_bad_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="hop 401"):
        dataclasses.replace(UTTERANCE, hop=401)
    with pytest.raises(ValueError, match="normalisation 'global' is unknown"):
        dataclasses.replace(UTTERANCE, normalisation="global")
