"""Texts in a few of a tokenizer's tokens: rare ones are taken apart into the tokens that byte-pair encoding merged to them.

What must be learnt token by token, as hearing is, is learnt from the examples that each has, and most tokens of a large vocabulary
are rare in any small corpus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from heapq import heapify, heappop, heappush

from lm.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, text: str, known: Container[int]) -> Iterator[int]:
    """Tokens of a text, those that are not `known` taken apart until they are, or cannot be."""
    waiting = tokenizer.encode(text)[::-1]
    while waiting:
        token = waiting.pop()
        if token not in known and (halves := tokenizer.halves(token)):
            waiting += reversed(halves)
        else:
            yield token


def frequent_pieces(tokenizer: Tokenizer, texts: Iterable[str], rarest: float) -> set[int]:
    """Tokens that `pieces` needs for these texts when it takes apart what is rarer than `rarest`.

    Args:
        rarest: as a share of all tokens of the texts.
    """
    counts = Counter(token for text in texts for token in tokenizer.encode(text))
    least = rarest * counts.total()
    # The longest first: what a token is a part of has been counted when its turn comes.
    waiting = [(-_size(tokenizer, token), token) for token in counts]
    heapify(waiting)
    while waiting:
        _, token = heappop(waiting)
        halves = tokenizer.halves(token)
        if counts[token] >= least or halves is None:
            continue
        n = counts.pop(token)
        for half in halves:
            if half not in counts:
                heappush(waiting, (-_size(tokenizer, half), half))
            counts[half] += n
    return set(counts)


def _size(tokenizer: Tokenizer, token: int) -> int:
    """How many tokens that cannot be taken apart a token is made of."""
    halves = tokenizer.halves(token)
    return 1 if halves is None else sum(_size(tokenizer, half) for half in halves)
