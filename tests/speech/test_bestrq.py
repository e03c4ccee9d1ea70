"""BEST-RQ: which frames are hidden, what the targets are, and that nothing else adds to the loss."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import groupby

import numpy as np
import pytest
import torch
from torch import Tensor

from speech import bestrq
from speech.bestrq import BestRQ, BestRQConfig, RandomQuantizer, mask_frames, masked_groups, random_crop
from speech.conformer import Conformer, ConformerConfig

ENCODER = ConformerConfig(n_mels=5, stack=4, dim=12, n_layers=1, n_heads=3, ffn_dim=19)
CONFIG = BestRQConfig(mask_span=6, mask_prob=0.1, n_codebooks=3, codebook_size=11, code_dim=7)
N_FRAMES = torch.tensor([46, 29, 13])  # of a batch of 47 frames: no row is full, no length a multiple of the stack
T = 47


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> BestRQ:
    torch.manual_seed(1)
    return BestRQ(Conformer(ENCODER), CONFIG)


@pytest.fixture(name="mel_BTM")
def features() -> Tensor:
    """Features with garbage after the rows' ends."""
    return torch.randn(len(N_FRAMES), T, ENCODER.n_mels, generator=rng(2))


@pytest.fixture(name="mask_BT")
def hidden() -> Tensor:
    return mask_frames(N_FRAMES, T, CONFIG, rng(3))


def nearest_codes(x_NF: Tensor, quantizer: RandomQuantizer) -> np.ndarray:
    """Plain NumPy: for every vector and codebook the code with the largest cosine."""
    z_NK = x_NF.double().numpy() @ quantizer.projection_FK.double().numpy()
    codes = []
    for codebook_VK in quantizer.codebooks_QVK.double().numpy():
        norms = np.linalg.norm(z_NK, axis=1)[:, None] * np.linalg.norm(codebook_VK, axis=1)
        codes.append((z_NK @ codebook_VK.T / norms).argmax(1))
    return np.stack(codes, axis=1)


# -------------------------------------------------------------------------------------------------------------- masks


def test_paper_masks_55_percent():
    n_frames = 1_000_000
    mask_BT = mask_frames(torch.tensor([n_frames]), n_frames, BestRQConfig(), rng(0))
    assert mask_BT.float().mean().item() == pytest.approx(1 - 0.975**32, abs=0.01)


def test_masks_are_spans_of_real_frames():
    mask_BT = mask_frames(torch.tensor([997, 499]), 1009, CONFIG, rng(0))
    assert not mask_BT[0, 997:].any() and not mask_BT[1, 499:].any()
    for mask_T, n in zip(mask_BT, (997, 499), strict=True):
        runs = [(hidden, len(list(run))) for hidden, run in groupby(mask_T[:n].tolist())]
        lengths = [length for hidden, length in runs[:-1] if hidden]  # the last one may be cut
        assert len(lengths) > 10
        assert min(lengths) == CONFIG.mask_span < max(lengths)  # spans overlap


def test_mask_does_not_depend_on_padding_or_batch():
    batch_BT = mask_frames(N_FRAMES, T, CONFIG, rng(4))
    generator = rng(4)
    for i, n in enumerate(N_FRAMES.tolist()):
        alone_1T = mask_frames(N_FRAMES[i : i + 1], n, CONFIG, generator)
        assert torch.equal(alone_1T[0], batch_BT[i, :n])


def test_a_group_counts_when_every_real_frame_is_hidden():
    mask_BT = torch.rand(23, 29, generator=rng(5)) < 0.8
    n_frames_B = torch.arange(7, 30)
    mask_BT &= torch.arange(29) < n_frames_B[:, None]
    groups_BS = masked_groups(mask_BT, n_frames_B, 4)
    assert groups_BS.shape == (23, 8)
    for b, n in enumerate(n_frames_B.tolist()):
        for s in range(8):
            real = mask_BT[b, 4 * s : min(4 * s + 4, n)].tolist()
            assert groups_BS[b, s].item() == (bool(real) and all(real))
    assert 0.2 < groups_BS.float().mean() < 0.8


def test_random_crop():
    mel_TM = torch.arange(10.0)[:, None].expand(-1, 3)
    assert random_crop(mel_TM, 10) is mel_TM
    crops = [random_crop(mel_TM, 7, rng(seed)) for seed in range(50)]
    assert {crop[0, 0].item() for crop in crops} == {0, 1, 2, 3}
    assert all(torch.equal(crop, mel_TM[int(crop[0, 0]) :][:7]) for crop in crops)


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("config", "in_dim", "n_vectors"), [(BestRQConfig(), 320, 17), (CONFIG, 23, bestrq._SEARCH_CHUNK + 31)]
)
def test_codes_agree_with_numpy(config, in_dim, n_vectors):
    quantizer = RandomQuantizer(in_dim, config)
    x_NF = torch.randn(n_vectors, in_dim, generator=rng(6))
    code_NQ = quantizer(x_NF)
    np.testing.assert_array_equal(code_NQ.numpy(), nearest_codes(x_NF, quantizer))
    assert all(len(code_N.unique()) > 8 for code_N in code_NQ.T)
    assert torch.equal(quantizer(3.7 * x_NF), code_NQ)  # cosine
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(x_NF), code_NQ)


def test_quantizer_comes_from_its_seed_and_never_trains():
    torch.manual_seed(0)
    quantizer = RandomQuantizer(23, CONFIG)
    torch.manual_seed(1)
    same, other = RandomQuantizer(23, CONFIG), RandomQuantizer(23, dataclasses.replace(CONFIG, seed=1))
    assert not list(quantizer.parameters())
    assert set(quantizer.state_dict()) == {"projection_FK", "codebooks_QVK"}
    for name, buffer in quantizer.named_buffers():
        assert torch.equal(buffer, same.get_buffer(name))
        assert not torch.equal(buffer, other.get_buffer(name))


def test_forward_agrees_with_a_plain_reference(model, mel_BTM, mask_BT):
    output = model(mel_BTM, N_FRAMES, rng(7), mask_BT)
    generator, corrupt_BTM = rng(7), mel_BTM.clone()
    for mel_TM, mask_T in zip(corrupt_BTM, mask_BT, strict=True):
        mel_TM[mask_T] = torch.randn(int(mask_T.sum()), ENCODER.n_mels, generator=generator) * CONFIG.noise_std
    h_BSD, _ = model.encoder(corrupt_BTM, N_FRAMES)
    weight_QVD = model.heads.weight.unflatten(0, (CONFIG.n_codebooks, -1))
    bias_QV = model.heads.bias.unflatten(0, (CONFIG.n_codebooks, -1))
    losses, right, used = [], 0, []
    for b, n in enumerate(N_FRAMES.tolist()):
        for s in range(math.ceil(n / 4)):
            real_XM = mel_BTM[b, 4 * s : min(4 * s + 4, n)]
            if not mask_BT[b, 4 * s : min(4 * s + 4, n)].all():
                continue
            stacked_F = torch.zeros(20)
            stacked_F[: real_XM.numel()] = real_XM.flatten()
            codes = nearest_codes(stacked_F[None], model.quantizer)[0]
            used.append(codes)
            for q, code in enumerate(codes.tolist()):
                log_p_V = (weight_QVD[q] @ h_BSD[b, s] + bias_QV[q]).log_softmax(0)
                losses.append(-log_p_V[code].item())
                right += log_p_V.argmax().item() == code
    counts = [np.bincount(column, minlength=CONFIG.codebook_size) / len(used) for column in np.stack(used, axis=1)]
    entropy = np.mean([-sum(p * math.log2(p) for p in share if p) for share in counts])
    assert output.n_terms == len(losses) > 20
    assert output.loss_sum.item() == pytest.approx(sum(losses), rel=1e-5)
    assert output.accuracy.item() == pytest.approx(right / len(losses))
    assert output.codebook_usage_entropy.item() == pytest.approx(entropy, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- contract


def test_padding_changes_nothing(model, mel_BTM):
    output = model(mel_BTM, N_FRAMES, rng(8))
    other_BTM = mel_BTM.clone()
    for b, n in enumerate(N_FRAMES.tolist()):
        other_BTM[b, n:] = 1e4
    other = model(torch.cat([other_BTM, other_BTM], dim=1), N_FRAMES, rng(8))
    assert output.n_terms == other.n_terms > 0
    torch.testing.assert_close(output, other)


def test_cut_into_micro_batches(model, mel_BTM, mask_BT):
    whole = model(mel_BTM, N_FRAMES, rng(9), mask_BT)
    generator, loss, n_terms = rng(9), 0.0, 0
    for b, n in enumerate(N_FRAMES.tolist()):
        row = slice(b, b + 1)
        part = model(mel_BTM[row, :n], N_FRAMES[row], generator, mask_BT[row, :n])
        loss, n_terms = loss + part.loss_sum.item(), n_terms + part.n_terms
    assert n_terms == whole.n_terms == int(masked_groups(mask_BT, N_FRAMES, 4).sum()) * CONFIG.n_codebooks
    assert loss == pytest.approx(whole.loss_sum.item(), rel=1e-6)


def test_logits_in_chunks(model, mel_BTM, mask_BT, monkeypatch):
    def gradients() -> list[Tensor]:
        output = model(mel_BTM, N_FRAMES, rng(10), mask_BT)
        return [output.loss_sum.detach(), output.accuracy, *torch.autograd.grad(output.loss_sum, model.parameters())]

    at_once = gradients()
    monkeypatch.setattr(bestrq, "_HEAD_CHUNK", 2)
    torch.testing.assert_close(gradients(), at_once)


def test_everything_but_the_quantizer_trains(model, mel_BTM, mask_BT):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(mel_BTM, N_FRAMES, rng(11), mask_BT).loss_sum.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in model.named_parameters()}
    assert before.keys() - changed == {"quantizer.projection_FK", "quantizer.codebooks_QVK"}


def test_nothing_hidden(model, mel_BTM):
    output = model(mel_BTM, N_FRAMES, mask_BT=torch.zeros(len(N_FRAMES), T, dtype=torch.bool))
    output.loss_sum.backward()
    assert [output.n_terms, output.loss_sum, output.accuracy, output.codebook_usage_entropy] == [0, 0, 0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_memorises(model, mel_BTM, mask_BT):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        output = model(mel_BTM, N_FRAMES, rng(12), mask_BT)
        optimizer.zero_grad()
        (output.loss_sum / output.n_terms).backward()
        optimizer.step()
    assert output.accuracy > 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_span": 0}, "mask_span must be at least 1"),
        ({"code_dim": 0}, "code_dim must be at least 1"),
        ({"mask_prob": 0.0}, "mask_prob must be in (0, 1]"),
        ({"noise_std": -0.1}, "noise_std must not be negative"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BestRQConfig(**change)
