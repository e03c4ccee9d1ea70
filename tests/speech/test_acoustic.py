"""The acoustic model and what it is given: the streaming contract, durations, look-ahead, means over phones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from speech.acoustic import PRESETS, AcousticConfig, AcousticModel
from speech.convnext import CausalConvNeXt, DepthwiseConv
from speech.phone_batch import PhoneBatch
from speech.phone_prosody import NO_PITCH, phone_prosody

CONFIGS = [
    AcousticConfig(
        n_mels=5, dim=13, ffn_dim=17, phone_layers=2, frame_layers=1, phone_kernel=2, frame_kernel=3, lookahead=3
    ),
    AcousticConfig(
        n_mels=7, dim=11, ffn_dim=5, phone_layers=1, frame_layers=2, frame_kernel=5, lookahead=1, n_speakers=3
    ),
]
N_PHONES = 13


def make(config: AcousticConfig) -> AcousticModel:
    torch.manual_seed(0)
    return AcousticModel(config).eval()


def speech(n_phones_B: Sequence[int]) -> tuple[PhoneBatch, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = len(n_phones_B), max(n_phones_B, default=0)
    ids = [torch.randint(n, shape, generator=generator) for n in (40, 3, 4, 8, 1)]
    phones = PhoneBatch(*ids, torch.tensor(n_phones_B), *torch.zeros(2, len(n_phones_B), dtype=torch.int64))
    prosody_BN3 = torch.randn(*shape, 3, generator=generator) * 0.3 + torch.tensor([2.0, 4.9, -3.5])
    return phones, prosody_BN3, torch.randint(1, 8, shape, generator=generator)


def cut(phones: PhoneBatch, start: int, stop: int) -> PhoneBatch:
    ids = [x[:, start:stop] for x in list(vars(phones).values())[:5]]
    return PhoneBatch(*ids, (phones.n_phones_B - start).clamp(0, stop - start), phones.speaker_B, phones.style_B)


def row(phones: PhoneBatch, b: int) -> PhoneBatch:
    return PhoneBatch(*(x[b : b + 1] for x in vars(phones).values()))


# --- the streaming contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=["ahead", "speakers"])
@pytest.mark.parametrize("cuts", [[], [1] * 12, [0, 5, 0, 3], [N_PHONES], [2, 1, 9]], ids=str)
def test_any_chunking_gives_the_same_frames(config: AcousticConfig, cuts: list[int]) -> None:
    model = make(config)
    phones, prosody_BN3, frames_BN = speech([N_PHONES, 2, 7])
    edges = [0, *np.cumsum(cuts).tolist(), N_PHONES]
    made: list[list[Tensor]] = [[], [], []]
    state = model.init_state(3)
    with torch.no_grad():
        whole = model(phones, prosody_BN3, frames_BN)
        for i, (start, stop) in enumerate(pairwise(edges)):
            mel_BTM, f0_BT, n_B, state = model.step(
                cut(phones, start, stop),
                prosody_BN3[:, start:stop],
                frames_BN[:, start:stop],
                state,
                final=i == len(edges) - 2,
            )
            for b, n in enumerate(n_B.tolist()):
                made[b].append(torch.cat([mel_BTM, f0_BT[..., None]], dim=-1)[b, :n])
                assert not mel_BTM[b, n:].any() and not f0_BT[b, n:].any()
    for b, n in enumerate([N_PHONES, 2, 7]):
        n_frames = int(frames_BN[b, :n].sum())
        assert whole.n_frames_B[b] == n_frames
        expected = torch.cat([whole.mel_BTM, whole.f0_BT[..., None]], dim=-1)[b, :n_frames]
        torch.testing.assert_close(torch.cat(made[b]), expected, atol=1e-4, rtol=1e-5)
        assert not whole.mel_BTM[b, n_frames:].any()


def test_a_row_does_not_depend_on_the_others_or_on_padding() -> None:
    model = make(CONFIGS[0])
    phones, prosody_BN3, frames_BN = speech([N_PHONES, 1, 6])
    whole = model(phones, prosody_BN3, frames_BN)
    for b, n in enumerate([N_PHONES, 1, 6]):
        alone = model(cut(row(phones, b), 0, n), prosody_BN3[b : b + 1, :n], frames_BN[b : b + 1, :n])
        n_frames = int(alone.n_frames_B)
        torch.testing.assert_close(whole.mel_BTM[b, :n_frames], alone.mel_BTM[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole.log_f0_BT[b, :n_frames], alone.log_f0_BT[0])
        torch.testing.assert_close(whole.voicing_BT[b, :n_frames], alone.voicing_BT[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=["ahead", "speakers"])
def test_a_phone_changes_no_frame_before_its_look_ahead(config: AcousticConfig) -> None:
    model = make(config)
    phones, prosody_BN3, frames_BN = speech([N_PHONES])
    before = model(phones, prosody_BN3, frames_BN)
    phones.ipa_BN[0, 8] = (phones.ipa_BN[0, 8] + 1) % 40
    after = model(phones, prosody_BN3, frames_BN)
    changed_T = (before.mel_BTM != after.mel_BTM).any(-1)[0]
    first = int(frames_BN[0, : 8 - config.lookahead].sum())
    assert not changed_T[:first].any() and changed_T[first]


def test_rows_end_on_their_own_and_states_can_be_saved(tmp_path: Path) -> None:
    model = make(CONFIGS[0])
    phones, prosody_BN3, frames_BN = speech([9, 9])
    with torch.no_grad():
        whole = model(phones, prosody_BN3, frames_BN)
        parts = [(cut(phones, i, j), prosody_BN3[:, i:j], frames_BN[:, i:j]) for i, j in ((0, 4), (4, 9))]
        _, _, first_B, state = model.step(*parts[0], model.init_state(2))
        save_file(vars(state), tmp_path / "state.safetensors")
        state = type(state)(**load_file(tmp_path / "state.safetensors"))
        mel_BTM, _, n_B, state = model.step(*parts[1], state, final=torch.tensor([True, False]))
        assert n_B[0] + first_B[0] == whole.n_frames_B[0] and n_B[1] + first_B[1] < whole.n_frames_B[1]
        torch.testing.assert_close(
            mel_BTM[0, : n_B[0]], whole.mel_BTM[0, first_B[0] : whole.n_frames_B[0]], atol=1e-4, rtol=1e-5
        )
        assert not any(x[0].any() for x in vars(state).values()) and all(x[1].any() for x in vars(state).values())


def test_nothing_comes_from_nothing() -> None:
    model = make(CONFIGS[0])
    for final in (False, True):
        mel_BTM, f0_BT, n_B, _ = model.step(*speech([0, 0]), model.init_state(2), final=final)
        assert mel_BTM.shape == (2, 0, 5) and f0_BT.shape == (2, 0) and n_B.tolist() == [0, 0]


# --- meaning ----------------------------------------------------------------------------------------------------------


def test_durations_and_speakers_matter() -> None:
    model = make(CONFIGS[1])
    phones, prosody_BN3, frames_BN = speech([5])
    said = model(phones, prosody_BN3, frames_BN)
    other = model(dataclasses.replace(phones, speaker_B=torch.tensor([2])), prosody_BN3, frames_BN)
    assert not torch.allclose(said.mel_BTM, other.mel_BTM)
    twice = model(phones, prosody_BN3, 2 * frames_BN)
    assert twice.n_frames_B.item() == 2 * said.n_frames_B.item() == 2 * frames_BN.sum().item()


def test_pitch_is_told_around_the_phones_mean() -> None:
    model = make(CONFIGS[0])
    phones, prosody_BN3, frames_BN = speech([4])
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    said = model(phones, prosody_BN3, frames_BN)
    expected = torch.repeat_interleave(prosody_BN3[0, :, 1], frames_BN[0])
    torch.testing.assert_close(said.log_f0_BT[0], expected)
    assert not said.f0_BT.any()  # no odds, no voice
    model.head.bias.data[-1] = 1
    torch.testing.assert_close(model(phones, prosody_BN3, frames_BN).f0_BT[0], expected.exp())


def test_the_depthwise_convolution_is_pytorchs() -> None:
    conv = DepthwiseConv(7, kernel=3)
    x_BXD = torch.randn(2, 11, 7)
    expected = F.conv1d(x_BXD.mT, conv.weight[:, None], conv.bias, groups=7).mT
    torch.testing.assert_close(conv(x_BXD), expected)


def test_blocks_are_causal_and_gradients_reach_everything() -> None:
    torch.manual_seed(0)
    blocks = CausalConvNeXt(7, 11, kernel=3, n_layers=2)
    x_BTD, n_B = torch.randn(2, 13, 7), torch.tensor([13, 5])
    empty = torch.zeros(2, *blocks.past_shape)
    y_BTD, _ = blocks(x_BTD, n_B, empty)
    x_BTD[:, 6:] += 1
    z_BTD, _ = blocks(x_BTD, n_B, empty)
    assert torch.equal(y_BTD[:, :6], z_BTD[:, :6]) and not torch.allclose(y_BTD[:, 6], z_BTD[:, 6])
    model = make(CONFIGS[1])
    phones, prosody_BN3, frames_BN = speech([5, 3])
    said = model(phones, prosody_BN3, 100 * frames_BN)  # so that one row is padded by far more than a phone
    (said.mel_BTM.sum() + said.log_f0_BT.sum() + said.voicing_BT.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_means_over_phones() -> None:
    frames_N = torch.tensor([2, 3, 1, 4, 2])
    f0_T = torch.tensor([0, 0, 100.0, 121.0, 0, 0, 0, 0, 0, 0, 200.0, 200.0])
    power_T = torch.arange(12.0)
    said_N3 = phone_prosody(frames_N, f0_T, power_T)
    torch.testing.assert_close(said_N3[:, 0].exp(), frames_N.float())
    assert said_N3[:, 2].tolist() == [0.5, 3.0, 5.0, 7.5, 10.5]
    first, last = np.log(110), np.log(200)
    # Centres of the phones lie at 1, 3.5, 5.5, 8 and 11.
    between = [first + (last - first) * (centre - 3.5) / 7.5 for centre in (5.5, 8)]
    np.testing.assert_allclose(said_N3[:, 1], [first, first, *between, last], rtol=1e-5)
    assert phone_prosody(frames_N, 0 * f0_T, power_T)[:, 1].tolist() == [NO_PITCH] * 5


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_parameter_counts_of_all_presets() -> None:
    counts = {}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in AcousticModel(preset()).parameters())
    assert counts.pop("debug") < 20_000
    assert counts.pop("bundled") <= 1_200_000
    assert not counts


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="lookahead must be at least 1"):
        dataclasses.replace(CONFIGS[0], lookahead=0)
    phones, prosody_BN3, frames_BN = speech([4])
    with pytest.raises(ValueError, match="prosody: need three values"):
        make(CONFIGS[0])(phones, prosody_BN3[..., :2], frames_BN)
    with pytest.raises(ValueError, match="prosody: need three values"):
        make(CONFIGS[0])(phones, prosody_BN3, frames_BN[:, :3])
