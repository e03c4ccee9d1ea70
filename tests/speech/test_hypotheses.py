"""Prefix beam search against all ways to write every text."""

import itertools
import math
from collections import defaultdict

import pytest
import torch

from speech import hypotheses
from speech.hypotheses import Text, likely_texts

#: What the symbols write: two of them are made of others.
WRITES: dict[int, Text] = {1: (7,), 2: (8,), 3: (7, 8), 4: (8, 8)}


def by_hand(log_probs_UK: torch.Tensor, symbols_UK: torch.Tensor) -> dict[Text, float]:
    """Sums of the probabilities of all paths of each text."""
    totals: dict[Text, float] = defaultdict(float)
    n_symbols = symbols_UK.shape[1]
    for path in itertools.product(range(n_symbols), repeat=len(symbols_UK)):
        symbols = [int(symbols_UK[u, k]) for u, k in enumerate(path)]
        log_prob = sum(float(log_probs_UK[u, k]) for u, k in enumerate(path))
        text = [part for symbol, _ in itertools.groupby(symbols) if symbol for part in WRITES[symbol]]
        totals[tuple(text)] += math.exp(log_prob)
    return totals


def frames(n: int, n_symbols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) * 2
    top = scores.log_softmax(-1).topk(n_symbols)
    return top.values, top.indices


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_symbols", [2, 5])
def test_all_ways_to_write_a_text_count(seed: int, n_symbols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypotheses, "N_HYPOTHESES", 10_000)
    log_probs_UK, symbols_UK = frames(5, n_symbols, seed)
    found = likely_texts(log_probs_UK, symbols_UK, WRITES.__getitem__)
    expected = by_hand(log_probs_UK, symbols_UK)
    assert dict(found).keys() == expected.keys()
    assert {text: math.exp(p) for text, p in found} == pytest.approx(expected, rel=1e-4)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)


def test_a_beam_keeps_the_likeliest() -> None:
    log_probs_UK, symbols_UK = frames(6, 5, seed=9)
    expected = by_hand(log_probs_UK, symbols_UK)
    found = likely_texts(log_probs_UK, symbols_UK, WRITES.__getitem__)
    assert len(found) == hypotheses.N_HYPOTHESES < len(expected)
    assert found[0][0] == max(expected, key=expected.__getitem__)


def test_nothing_says_nothing() -> None:
    assert likely_texts(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), WRITES.__getitem__) == [((), 0.0)]
    assert likely_texts(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.int64), WRITES.__getitem__) == [((), 0.0)]
