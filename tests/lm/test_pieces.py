"""Texts in a few of a tokenizer's tokens; that they are taken apart rightly, `test_tokenizer` holds."""

from collections import Counter
from pathlib import Path

import pytest

from lm.pieces import frequent_pieces, pieces
from lm.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    " the cat sat on the mat",
    " the cats are thinking of a cathedral",
    " a cat is a cat is a cat",
    " concatenation of catalogues of cats",
    " 日本語 and the rest 😀",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.mark.parametrize("rarest", [0.02, 0.05, 0.2, 1.0])
def test_what_is_kept_is_frequent_or_cannot_be_taken_apart(tokenizer: Tokenizer, rarest: float) -> None:
    known = frequent_pieces(tokenizer, TEXTS, rarest)
    written = Counter(token for text in TEXTS for token in pieces(tokenizer, text, known))
    assert written.keys() == known
    least = rarest * sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert all(n >= least or tokenizer.halves(token) is None for token, n in written.items())
    for text in TEXTS:
        assert tokenizer.decode(list(pieces(tokenizer, text, known))) == text


def test_a_frequent_word_is_kept_and_a_rare_one_is_not(tokenizer: Tokenizer) -> None:
    known = frequent_pieces(tokenizer, TEXTS, 0.1)
    (frequent,), (rare,) = tokenizer.encode(" a"), tokenizer.encode(" cathedral")
    assert frequent in known and rare not in known
    assert next(pieces(tokenizer, " cathedral", known)) in known


def test_nothing_is_rare_where_anything_will_do(tokenizer: Tokenizer) -> None:
    assert frequent_pieces(tokenizer, TEXTS, 0) == {token for text in TEXTS for token in tokenizer.encode(text)}
    assert frequent_pieces(tokenizer, [], 0.1) == set()
