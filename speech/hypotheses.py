"""Several texts that frames may stand for, by CTC: prefix beam search.

A hypothesis is a text letter by letter, so all ways to write it in tokens count together.

Shape letters: U frames, K symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

#: Hypotheses that are kept after each frame, and symbols that are tried at each.
N_HYPOTHESES, N_SYMBOLS = 16, 8
Text = tuple[int, ...]
#: Log probabilities of a hypothesis by the symbol that its last frame has.
_Ends = dict[int, float]


def likely_texts(
    log_probs_UK: Tensor, symbols_UK: Tensor, write: Callable[[int], Sequence[int]]
) -> list[tuple[Text, float]]:
    """The likeliest texts and their log probabilities, best first.

    Args:
        log_probs_UK, symbols_UK: the likeliest symbols of each frame; 0 is the blank.
        write: what a symbol adds to a text.
    """
    hypotheses: dict[Text, _Ends] = {(): {0: 0.0}}
    for log_probs, symbols in zip(log_probs_UK.tolist(), symbols_UK.tolist(), strict=True):
        longer: dict[Text, _Ends] = {}
        for text, ends in hypotheses.items():
            whole = _total(ends)
            for symbol, log_prob in zip(symbols, log_probs, strict=True):
                if symbol == 0:
                    _add(longer, text, 0, whole + log_prob)
                    continue
                if symbol in ends:  # it goes on
                    _add(longer, text, symbol, ends[symbol] + log_prob)
                others = {end: p for end, p in ends.items() if end != symbol}
                if others:  # it is new
                    _add(longer, text + tuple(write(symbol)), symbol, _total(others) + log_prob)
        best = sorted(longer, key=lambda text: _total(longer[text]), reverse=True)[:N_HYPOTHESES]
        hypotheses = {text: longer[text] for text in best}
    return [(text, _total(ends)) for text, ends in hypotheses.items()]


def _add(hypotheses: dict[Text, _Ends], text: Text, end: int, log_prob: float) -> None:
    ends = hypotheses.setdefault(text, {})
    ends[end] = _total({0: ends[end], 1: log_prob}) if end in ends else log_prob


def _total(ends: _Ends) -> float:
    best = max(ends.values())
    return best + math.log(sum(math.exp(p - best) for p in ends.values()))
