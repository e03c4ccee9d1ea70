"""The prosody model: causal, streams as it runs offline, rows alone, what it sees of the language model, and its targets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from speech.normalizer import LMFeatures
from speech.phone_batch import IPA, MARKS, PhoneBatch, PhoneIds
from speech.prosody import MAX_FRAMES, PRESETS, ProsodyConfig, ProsodyModel, durations
from speech.streaming import below

LM = LMFeatures(source="debug", layer=1, dim=13)
DEBUG = PRESETS["debug"]()


def make(seed: int = 0, **changes: Any) -> ProsodyModel:
    torch.manual_seed(seed)
    model = ProsodyModel(dataclasses.replace(DEBUG, **changes)).eval()
    with torch.no_grad():  # as it may be after training: no bias and nothing left at zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_rows(lengths: list[int], seed: int = 1) -> tuple[list[list[PhoneIds]], list[int]]:
    """Rows of phones, whose chunks grow by none, one or two tokens, and how many tokens each row has."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    rows, tokens = [], []
    for length in lengths:
        chunk, row = 0, []
        for _ in range(length):
            row.append(PhoneIds(2 + draw(len(IPA) - 2), draw(3), draw(4), draw(len(MARKS)), chunk))
            chunk += draw(3)
        rows.append(row)
        tokens.append(row[-1].chunk + 1 if row else 0)
    return rows, tokens


def features(tokens: list[int]) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(len(tokens), max(tokens), LM.dim)


def stream(model: ProsodyModel, row: list[PhoneIds], tokens_SF: Tensor | None, sizes: list[int]) -> Tensor:
    """Pushes a row in pieces, each with the tokens up to its last chunk and some more."""
    state, made, n_lm, start = model.init_state(1), [], 0, 0
    for i, size in enumerate([*sizes, 0]):
        piece, start = row[start : start + size], start + size
        final = i == len(sizes)
        new = None
        if tokens_SF is not None:
            end = len(tokens_SF) if final else min(len(tokens_SF), (piece[-1].chunk + 2 + i % 3) if piece else n_lm)
            new, n_lm = tokens_SF[None, n_lm : max(end, n_lm)], max(end, n_lm)
        prosody, n_B, state = model.step(PhoneBatch.collate([piece]), new, state, final=final)
        made.append(prosody[0, : n_B[0]])
    return torch.cat(made)


@pytest.mark.parametrize("lm", [None, LM])
@pytest.mark.parametrize("sizes", [[17], [1] * 17, [3, 0, 1, 9, 4], [0, 11, 6]])
def test_any_chunking_is_offline(lm: LMFeatures | None, sizes: list[int]) -> None:
    model = make(lm=lm)
    (row,), tokens = make_rows([17])
    x_BSF = features(tokens) if lm else None
    whole = model.predict(PhoneBatch.collate([row]), x_BSF)
    pieces = stream(model, row, None if x_BSF is None else x_BSF[0], sizes)
    assert whole.shape == (1, 17, 3)
    assert torch.allclose(whole[0], pieces, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"lm": LM}, {"lookahead": None}, {"lookahead": 0}])
def test_training_sees_what_streaming_sees(changes: dict[str, Any]) -> None:
    """Told its own predictions, `forward` predicts these."""
    model = make(**changes)
    rows, tokens = make_rows([11, 0, 7])
    given = (features(tokens), torch.tensor(tokens)) if "lm" in changes else (None, None)
    phones = PhoneBatch.collate(rows)
    predicted = model.predict(phones, *given)
    assert torch.allclose(model(phones, predicted, *given), predicted, atol=1e-5)
    assert predicted[~below(phones.n_phones_B, 11)].count_nonzero() == 0


@pytest.mark.parametrize("lm", [None, LM])
def test_row_alone_and_reset(lm: LMFeatures | None) -> None:
    model = make(lm=lm)
    rows, tokens = make_rows([5, 13, 8])
    x_BSF = features(tokens) if lm else None
    together = model.predict(PhoneBatch.collate(rows), x_BSF, torch.tensor(tokens))
    for b, row in enumerate(rows):
        alone = model.predict(PhoneBatch.collate([row]), None if x_BSF is None else x_BSF[b : b + 1, : tokens[b]])
        assert torch.allclose(together[b, : len(row)], alone[0], atol=1e-5)
    # Rows end at different times, and start anew.
    state = model.init_state(2)
    some = (None, None) if x_BSF is None else (x_BSF[:2], torch.tensor(tokens[:2]))
    _, _, state = model.step(
        PhoneBatch.collate(rows[:2]), some[0], state, n_features_B=some[1], final=torch.tensor([True, False])
    )
    new = [rows[2], []]
    more = (None, None) if x_BSF is None else (x_BSF[[2, 2], : tokens[2]], torch.tensor([tokens[2], 0]))
    again, n_B, _ = model.step(PhoneBatch.collate(new), more[0], state, n_features_B=more[1], final=True)
    assert n_B[0] == 8 and torch.allclose(again[0, :8], together[2, :8], atol=1e-5)
    assert n_B[1] > 0 and torch.allclose(again[1, : n_B[1]], together[1, 13 - n_B[1] : 13], atol=1e-5)


def test_lookahead_is_exact() -> None:
    """Duration sees `lookahead` phones ahead; pitch and loudness, a step later, one more."""
    model = make()
    (row,), _ = make_rows([15])
    before = model.predict(PhoneBatch.collate([row]))[0]
    changed = list(row)
    changed[10] = row[10]._replace(ipa=2 + (row[10].ipa - 1) % (len(IPA) - 2))
    after = model.predict(PhoneBatch.collate([changed]))[0]
    first = (before - after).abs().gt(1e-6).int().argmax(0).tolist()
    assert first == [10 - DEBUG.ahead, 9 - DEBUG.ahead, 9 - DEBUG.ahead]


def test_chunk_is_visible_with_its_first_phone() -> None:
    model = make(lm=LM)
    row = [PhoneIds(3, 0, 0, 0, chunk) for chunk in [0, 0, 1, 1, 4, 4, 4, 5]]
    x_1SF = torch.randn(1, 6, LM.dim)
    before = model.predict(PhoneBatch.collate([row]), x_1SF)[0]
    for token, phone in [(0, 0), (1, 2), (2, 4), (4, 4), (5, 7)]:
        other = x_1SF.clone()
        other[0, token] = torch.randn(LM.dim)
        change = (before - model.predict(PhoneBatch.collate([row]), other)[0]).abs()
        assert change[:phone, 0].max() < 1e-6 if phone else True
        assert change[phone, 0] > 1e-6


def test_every_parameter_learns() -> None:
    model = ProsodyModel(dataclasses.replace(DEBUG, lm=LM))
    rows, tokens = make_rows([11, 7])
    phones = PhoneBatch.collate(rows)
    model(phones, torch.randn(2, 11, 3), features(tokens)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unlimited_lookahead_cannot_stream_but_sees_all() -> None:
    model = make(lookahead=None)
    with pytest.raises(ValueError, match="cannot stream"):
        model.init_state(1)
    (row,), _ = make_rows([30])
    changed = [*row[:-1], row[-1]._replace(ipa=2 + (row[-1].ipa - 1) % (len(IPA) - 2))]
    same = model.predict(PhoneBatch.collate([row]))[0] - model.predict(PhoneBatch.collate([changed]))[0]
    assert same[0].abs().min() > 0


def test_bad_input() -> None:
    (row,), _ = make_rows([3])
    phones = PhoneBatch.collate([row])
    with pytest.raises(ValueError, match="made with features"):
        make(lm=LM).predict(phones)
    with pytest.raises(ValueError, match="made without"):
        make().predict(phones, torch.zeros(1, 2, LM.dim))
    with pytest.raises(ValueError, match="width 13"):
        make(lm=LM).predict(phones, torch.zeros(1, 2, 7))
    for changes in ({"dim": 15}, {"lookahead": -1}, {"window": 0}):
        with pytest.raises(ValueError):
            dataclasses.replace(DEBUG, **changes)


def test_durations() -> None:
    assert durations(torch.tensor([-3.0, 0.0, 2.0, 99.0])).tolist() == [1, 1, 7, MAX_FRAMES]


def test_presets() -> None:
    smollm = LMFeatures(source="smollm2-135m-instruct", layer=15, dim=576)
    llama = LMFeatures(source="llama", layer=16, dim=4096)
    counts = {}
    for name, lm in (("debug", LM), ("bundled", smollm), ("paper", llama)):
        config: ProsodyConfig = dataclasses.replace(PRESETS[name](), lm=lm)
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in ProsodyModel(config).parameters())
    assert counts == {"debug": 7_991, "bundled": 1_059_363, "paper": 70_234_367}
