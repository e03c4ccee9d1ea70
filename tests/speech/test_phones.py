"""Phones of words and pauses, from gruut."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from speech.phones import PAUSE, Phonemizer
from speech.spoken_text import SpokenPart


def part(text: str, kind: str = "word") -> SpokenPart:
    return SpokenPart(kind, text, 0, 1, 0, 1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def phonemizer() -> Phonemizer:
    pytest.importorskip("gruut_lang_en")
    return Phonemizer()


def test_phones_have_stress_boundaries_and_punctuation(phonemizer: Phonemizer) -> None:
    parts = [part("hello"), part(",", "pause"), part("\N{GRINNING FACE}", "dropped"), part("a"), part("A")]
    phones = phonemizer(parts)
    assert [phone.ipa for phone in phones] == ["h", "ɛ", "l", "oʊ", PAUSE, "ə", "e\u026a"]
    assert [phone.stress for phone in phones] == [0, 0, 0, 1, 0, 0, 1]
    assert [phone.begins_word for phone in phones] == [True, False, False, False, True, True, True]
    assert [phone.ends_word for phone in phones] == [False, False, False, True, True, True, True]
    assert [phone.mark for phone in phones] == ["", "", "", "", ",", "", ""]
    assert [phone.source for phone in phones] == [parts[i] for i in (0, 0, 0, 0, 1, 3, 4)]


def test_every_letter_and_word_has_phones(phonemizer: Phonemizer) -> None:
    names = ["".join(phonemizer.pronounce(letter)) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    assert len(set(names)) == 26
    assert phonemizer.pronounce("O's") == [*phonemizer.pronounce("O"), "z"]
    for word in ("o'clock", "zorblax", "don't", "celsius"):  # one of them is no word
        assert len(phonemizer.pronounce(word)) > 3


def test_without_gruut_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gruut.lang", None)
    with pytest.raises(ValueError, match="pip install gruut gruut-lang-en"):
        Phonemizer()


def test_any_thread_may_ask(phonemizer: Phonemizer) -> None:
    words = ["thread", "zorblax", "water"]
    with ThreadPoolExecutor(1) as pool:
        assert list(pool.map(phonemizer.pronounce, words)) == list(map(phonemizer.pronounce, words))
