"""TN tokens: runs of one kind, whatever the pieces a text arrives in, and their alignment with language-model tokens."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable

import pytest

from lm.features import text_ends
from lm.tokenizer import ByteTokenizer
from speech.tn_tokens import MAX_RUN, Kind, TokenSplitter, align, kind_of, split

RandomText = Callable[..., str]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Dr. Ng paid $3.50!", ["Dr", ".", " ", "Ng", " ", "paid", " ", "$", "3", ".", "50", "!"]),
        ("3rd, 10am", ["3", "rd", ",", " ", "10", "am"]),
        ('He said "no"...', ["He", " ", "said", " ", '"', "no", '"', "..."]),
        ("a \n\tb", ["a", " \n\t", "b"]),
        ("cafe\u0301 1\ufe0f\u20e3", ["cafe\u0301", " ", "1\ufe0f\u20e3"]),
        ("5½ m²", ["5", "½", " ", "m", "²"]),
        ("", []),
    ],
)
def test_runs_of_one_kind(text: str, tokens: list[str]) -> None:
    assert [token.text for token in split(text)] == tokens


def test_any_pieces_give_the_same_tokens_and_the_tokens_are_the_text(random_text: RandomText) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        text, splitter, at, streamed = random_text(rng), TokenSplitter(), 0, []
        while at < len(text):
            n = rng.randint(0, 9)
            complete = splitter.push(text[at : at + n])
            assert all(token.end < at + n for token in complete)  # a character of the next one was seen
            streamed, at = streamed + complete, at + n
        streamed += splitter.flush()
        assert streamed == split(text)
        assert "".join(token.text for token in streamed) == text
        assert all(text[token.start : token.end] == token.text for token in streamed)


def test_a_token_has_one_kind_and_no_run_is_endless(random_text: RandomText) -> None:
    tokens = [token for seed in range(200) for token in split(random_text(random.Random(seed)))]
    assert {token.kind for token in tokens} == set(Kind)
    assert max(len(token.text) for token in tokens) == MAX_RUN
    for token in tokens:
        rest = [c for c in token.text[1:] if unicodedata.category(c)[0] != "M"]
        assert {kind_of(c) for c in [token.text[0], *rest]} == {token.kind}


def test_every_language_model_token_is_in_the_chunk_that_it_completes() -> None:
    text = "It is 10:30."
    # "It ", "is ", "10", ":", "30", "." are the language model's; each TN token waits for the first character of the next.
    #                                             It _  is _  10 :  30 .
    assert align(split(text), [3, 6, 8, 9, 11, 12]) == [1, 1, 0, 1, 1, 1, 1, 0]


def test_alignment_is_what_a_stream_sees(random_text: RandomText) -> None:
    tokenizer = ByteTokenizer()
    for seed in range(50):
        text = random_text(random.Random(seed), n=20)
        ids = tokenizer.encode(text)
        ends, splitter, chunks, waiting = text_ends(tokenizer, ids), TokenSplitter(), [], 0
        assert len(ends) == len(ids) and (not ends or ends[-1] == len(text))
        for start, end in zip([0, *ends], ends, strict=False):
            waiting += 1
            if complete := splitter.push(text[start:end]):
                chunks += [waiting, *[0] * (len(complete) - 1)]
                waiting = 0
        chunks += [waiting] * len(splitter.flush())
        assert align(split(text), ends) == chunks
