"""The CTC probe: its loss against a sum over all alignments, greedy decoding, and utterances too short for their text."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Wav2Vec2CTCTokenizer

import speech.ctc
from speech.adapter import SpeechAdapter, SpeechAdapterConfig
from speech.conformer import Conformer, ConformerConfig
from speech.ctc import ALPHABET, BLANK, CTCProbe, Letters, TokenCTC, merge_unused

ENCODER = ConformerConfig(n_mels=5, dim=12, n_layers=1, n_heads=3, ffn_dim=19)
spell = Letters().spell
N_FRAMES = torch.tensor([19, 14, 7])  # 5, 4 and 2 encoder frames


@pytest.fixture
def probe() -> CTCProbe:
    torch.manual_seed(1)
    return CTCProbe(Conformer(ENCODER))


@pytest.fixture(name="mel_BTM")
def features() -> Tensor:
    return torch.randn(3, 19, ENCODER.n_mels, generator=torch.Generator().manual_seed(2))


def likelihood(log_p_SV: Tensor, ids: list[int]) -> float:
    """Sum over all alignments of blanks and the text's letters that read as the text."""
    total = 0.0
    for path in itertools.product({BLANK, *ids}, repeat=len(log_p_SV)):
        if [i for i, _ in itertools.groupby(path) if i != BLANK] == ids:
            total += math.exp(sum(log_p_SV[s, i].item() for s, i in enumerate(path)))
    return total


def test_spell():
    assert spell("It's a b") == [ALPHABET.index(letter) + 1 for letter in "it's a b"]
    assert sorted(spell(ALPHABET)) == list(range(1, 29)) and BLANK == 0
    with pytest.raises(ValueError, match="'7é' in 'Café 7' is not in a-z"):
        spell("Café 7")


def test_loss_is_the_sum_over_alignments(probe, mel_BTM):
    texts = ["a b", "zoo", ""]  # "zoo" needs a blank, so all of its four frames
    logits_BSV, n_B = probe(mel_BTM, N_FRAMES)
    expected = [
        -math.log(likelihood(logits_BSV[b, : n_B[b]].double().log_softmax(-1), spell(text)))
        for b, text in enumerate(texts)
    ]
    output = probe.loss(mel_BTM, N_FRAMES, texts)
    assert output.loss_sum.item() == pytest.approx(sum(expected), rel=1e-5)
    assert (output.n_terms, output.n_too_short) == (3 + 3 + 1, 0)


@pytest.mark.parametrize("targets", [[2, 5, 5, 1, 2], [], [*range(1, 8)]], ids=["some", "none", "all"])
def test_symbols_that_are_not_asked_for_count_as_one(targets):
    """The same loss and gradient as with all of them."""
    logits_NV = torch.randn(17, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    targets_N = torch.tensor(targets, dtype=torch.int64)
    used = torch.tensor(sorted({BLANK, *targets}))
    merged = merge_unused(logits_NV, used)
    assert merged.shape == (17, len(used) + 1)
    losses = [
        F.ctc_loss(logits.double().log_softmax(-1), ids, (17,), (len(targets),), reduction="sum")
        for logits, ids in [(logits_NV, targets_N), (merged, torch.searchsorted(used, targets_N))]
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, logits_NV, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_loss_in_pieces_is_the_loss(probe, mel_BTM, monkeypatch):
    """Logits are computed, and computed anew on the way back, for a few frames at a time."""
    texts = ["a b", "zoo", "x"]
    whole = probe.loss(mel_BTM, N_FRAMES, texts).loss_sum
    monkeypatch.setattr(speech.ctc, "CHUNK", 2)
    pieces = probe.loss(mel_BTM, N_FRAMES, texts).loss_sum
    torch.testing.assert_close(pieces, whole)
    gradients = [torch.autograd.grad(loss, [*probe.parameters()]) for loss in (pieces, whole)]
    torch.testing.assert_close(*gradients)


def test_too_short_utterances_are_counted_and_left_out(probe, mel_BTM):
    """Row 1 has four frames: enough for four letters, not for four of which two are equal neighbours."""
    kept = probe.loss(mel_BTM[:1], N_FRAMES[:1], ["abc"])
    output = probe.loss(mel_BTM, N_FRAMES, ["abc", "bees", "abc"])
    assert (output.n_terms, output.n_too_short) == (3, 2)
    gradients = [torch.autograd.grad(loss, [*probe.parameters()]) for loss in (kept.loss_sum, output.loss_sum)]
    torch.testing.assert_close(output.loss_sum, kept.loss_sum)
    torch.testing.assert_close(*gradients)
    assert probe.loss(mel_BTM, N_FRAMES, ["abc", "bets", "ab"]).n_too_short == 0


def test_decode_agrees_with_transformers(probe, tmp_path):
    vocabulary = {"<pad>": BLANK} | {letter.replace(" ", "|"): i for i, letter in enumerate(ALPHABET, start=1)}
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(vocabulary | {"<unk>": 29}))
    tokenizer = Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None)
    with torch.no_grad():
        probe.head.weight.mul_(20)  # so that letters differ from frame to frame
    mel_BTM = torch.randn(7, 803, ENCODER.n_mels, generator=torch.Generator().manual_seed(3))
    n_frames_B = torch.tensor([803, 401, 97, 31, 8, 4, 1])
    logits_BSV, n_B = probe(mel_BTM, n_frames_B)
    texts = probe.decode(mel_BTM, n_frames_B)
    for b, text in enumerate(texts):
        # transformers strips the ends.
        assert text.strip() == tokenizer.decode(logits_BSV[b, : n_B[b]].argmax(-1).tolist())
    assert len(set(texts[0])) > 10


def test_rows_do_not_meet(probe, mel_BTM):
    texts = ["a b", "zoo", "x"]
    whole = probe.loss(mel_BTM, N_FRAMES, texts)
    other_BTM = mel_BTM.clone()
    rows = []
    for b, n in enumerate(N_FRAMES.tolist()):
        other_BTM[b, n:] = 1e4
        rows.append(probe.loss(mel_BTM[b : b + 1, :n], N_FRAMES[b : b + 1], texts[b : b + 1]))
    assert probe.loss(other_BTM, N_FRAMES, texts).loss_sum == whole.loss_sum
    assert sum(row.n_terms for row in rows) == whole.n_terms
    torch.testing.assert_close(sum(row.loss_sum for row in rows), whole.loss_sum)


def test_one_transcript_for_each(probe, mel_BTM):
    with pytest.raises(ValueError, match="texts: 2 transcripts for 3 utterances"):
        probe.loss(mel_BTM, N_FRAMES, ["a", "b"])


def test_memorises(probe):
    texts = ["it's seven", "good", "a b c"]
    mel_BTM = torch.randn(3, 89, ENCODER.n_mels, generator=torch.Generator().manual_seed(4))
    n_frames_B = torch.tensor([89, 61, 73])
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.02)
    for _ in range(150):
        output = probe.loss(mel_BTM, n_frames_B, texts)
        optimizer.zero_grad()
        (output.loss_sum / output.n_terms).backward()
        assert all(p.grad is not None and p.grad.any() for p in probe.parameters())
        optimizer.step()
    assert probe.decode(mel_BTM, n_frames_B) == texts


def test_tokens_are_scored_by_the_language_models_own_embeddings(mel_BTM):
    """As the readout scores them; the embeddings neither train nor are saved."""
    encoder = Conformer(ENCODER)
    n = len(ALPHABET)
    config = SpeechAdapterConfig(encoder_dim=ENCODER.dim, lm_dim=31, dim=20, ffn_dim=17, n_heads=2, n_readout=n)
    adapter = SpeechAdapter(config)
    table_VD = torch.randn(53, 31, generator=torch.Generator().manual_seed(4)) * 0.05
    assert adapter.readout is not None
    adapter.readout.start(list(range(7, 7 + n)), table_VD)
    model = TokenCTC(encoder, adapter, Letters(), table_VD)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"speech_encoder", "speech_adapter"}
    logits_BSV, n_B = model(mel_BTM, N_FRAMES)
    x_BSD, _ = adapter(*encoder(mel_BTM, N_FRAMES))
    torch.testing.assert_close(logits_BSV, adapter.readout.scores(x_BSD, table_VD[7 : 7 + n]))
    assert n_B.tolist() == [3, 2, 1] and logits_BSV.shape == (3, 3, 1 + n)
    assert model.stack == 8 and model.loss(mel_BTM, N_FRAMES, ["abc", "ab", "ab"]).n_too_short == 1
