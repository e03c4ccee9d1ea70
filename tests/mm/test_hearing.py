"""What ears and language model hear together."""

from pathlib import Path

import pytest
import torch

from lm.checkpoint import load_llama
from lm.model import Llama
from lm.tokenizer import Tokenizer, load_tokenizer
from mm import hearing
from mm.hearing import plausibility, segments, what_was_said

TEXT = " the study of magnetic fields"


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def lm(smollm2_gguf: Path) -> Llama:
    return load_llama(smollm2_gguf)


def spoken(tokens: list[list[int]], known: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames with a blank after each, where the tokens of each are equally likely."""
    width = max(len(options) for options in tokens)
    log_probs, symbols = [], []
    for options in tokens:
        log_probs += [[-0.7] * len(options) + [-20.0] * (width - len(options)), [-0.01] + [-20.0] * (width - 1)]
        numbers = [1 + known.index(token) for token in options]
        symbols += [numbers + [0] * (width - len(options)), [*range(width)]]
    return torch.tensor(log_probs), torch.tensor(symbols)


def start(tokenizer: Tokenizer) -> int:
    return tokenizer.special_tokens["<|endoftext|>"]


def test_letters_are_heard_as_the_tokenizer_writes_them(lm: Llama, tokenizer: Tokenizer) -> None:
    said = [letter for token in tokenizer.encode(TEXT) for letter in tokenizer.letters(token)]
    known = sorted(set(said))
    heard = what_was_said(lm, tokenizer, start(tokenizer), *spoken([[token] for token in said], known), known)
    assert heard == tokenizer.encode(TEXT.strip()) and len(heard) < len(said)


def test_of_equally_likely_words_the_plausible_one_is_heard(lm: Llama, tokenizer: Tokenizer) -> None:
    """Whichever the ears name first; without the language model, the first."""
    said = tokenizer.encode(TEXT)
    (wrong,) = tokenizer.encode(" wheels")
    known = sorted({wrong, *said})
    for last in ([said[-1], wrong], [wrong, said[-1]]):
        frames = spoken([[token] for token in said[:-1]] + [last], known)
        assert tokenizer.decode(what_was_said(lm, tokenizer, start(tokenizer), *frames, known)) == TEXT.strip()


def test_plausibility_is_the_language_models(lm: Llama, tokenizer: Tokenizer) -> None:
    """Of each text by itself, whatever stands beside it."""
    before = [start(tokenizer), *tokenizer.encode(" it is")]
    texts = [tokenizer.encode(text) for text in (" the study of fields", " so", "")]
    with torch.no_grad():
        together_C = plausibility(lm, before, texts)
        for text, score in zip(texts, together_C.tolist(), strict=True):
            log_probs_TV = lm(torch.tensor([before + text]))[0].log_softmax(-1)
            alone = sum(float(log_probs_TV[len(before) - 1 + i, token]) for i, token in enumerate(text))
            assert score == pytest.approx(alone, abs=1e-3)


def test_long_recordings_are_cut_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "SEGMENT", 8)
    is_blank_U = torch.tensor([False] * 30)
    is_blank_U[[1, 5, 6]] = True
    assert [(part.start, part.stop) for part in segments(is_blank_U)] == [(0, 7), (7, 15), (15, 23), (23, 30)]
    assert [(part.start, part.stop) for part in segments(is_blank_U[:0])] == [(0, 0)]


def test_parts_make_up_the_whole(lm: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [letter for token in tokenizer.encode(TEXT) for letter in tokenizer.letters(token)]
    known = sorted(set(said))
    monkeypatch.setattr(hearing, "SEGMENT", 6)
    heard = what_was_said(lm, tokenizer, start(tokenizer), *spoken([[token] for token in said], known), known)
    assert heard == tokenizer.encode(TEXT.strip())
