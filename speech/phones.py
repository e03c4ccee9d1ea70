"""Words to phones, with stress, word boundaries and punctuation: linguistic input at the phone rate (section 8.1.2).

Pronunciations are gruut's: a lexicon of American English, and a model for words that it lacks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from speech.spoken_text import SpokenPart

#: The phone of a pause, whatever its mark.
PAUSE = "|"
_STRESS = {"\u02c8": 1, "\u02cc": 2}  # primary and secondary stress in IPA


@dataclass(frozen=True)
class Phone:
    """One phone, or a pause.

    Attributes:
        ipa: symbol without stress, or `PAUSE`.
        stress: 1 primary, 2 secondary, 0 none; of a syllable, at its vowel.
        begins_word, ends_word: whether it is the first or last of its word; a pause is both.
        mark: of a pause, its punctuation (`, . ? ! : ; -`); empty otherwise.
        source: the word or pause that it belongs to.
    """

    ipa: str
    stress: int
    begins_word: bool
    ends_word: bool
    mark: str
    source: SpokenPart

    @property
    def is_pause(self) -> bool:
        return self.ipa == PAUSE


class Phonemizer:
    """American English.

    Raises:
        ValueError: gruut is not installed.
    """

    def __init__(self) -> None:
        try:
            importlib.import_module("gruut.lang")
            importlib.import_module("gruut_lang_en")  # without it gruut would fail at the first word
        except ImportError as error:
            raise ValueError("phones need gruut: run `pip install gruut gruut-lang-en`") from error
        self._lookup, self._guess = _pronunciations()

    def __call__(self, parts: Iterable[SpokenPart]) -> list[Phone]:
        """Phones of words and pauses, in their order; what was dropped has none."""
        phones: list[Phone] = []
        for part in parts:
            if part.kind == "pause":
                phones.append(Phone(PAUSE, 0, True, True, part.text, part))
            elif part.kind == "word":
                symbols = self.pronounce(part.text)
                for i, symbol in enumerate(symbols):
                    stress = _STRESS.get(symbol[0], 0)
                    ends = i == 0, i == len(symbols) - 1
                    phones.append(Phone(symbol[1:] if stress else symbol, stress, *ends, "", part))
        return phones

    def pronounce(self, word: str) -> list[str]:
        """IPA symbols of a word in lower case, or of the name of a letter, which is a capital; stress stands before vowels."""
        if word[0] == "A":  # a lone "a" is an article in the lexicon
            return ["\u02c8e\u026a", *["z"] * (len(word) > 1)]
        if word[0].isupper():
            return [*self._lookup(word[0].lower()), *["z"] * (len(word) > 1)]
        return list(self._lookup(word) or self._guess(word))


@functools.cache
def _pronunciations() -> tuple[Callable[[str], Any], Callable[[str], Any]]:
    """What gruut's lexicon has for a word, and what its model guesses.

    The lexicon is a database without an index, read 10 ms a word, and only from the thread that opened it. A copy in memory with
    one takes 0.1 ms, from any thread.
    """
    from gruut.lang import get_settings
    from gruut.phonemize import SqlitePhonemizer

    settings: Any = get_settings("en-us", load_pos_tagger=False)
    lexicon = sqlite3.connect(":memory:", check_same_thread=False)
    with contextlib.closing(sqlite3.connect(settings.lookup_phonemes.db_path)) as file:
        file.backup(lexicon)
    lexicon.execute("CREATE INDEX by_word ON word_phonemes (word)")
    return SqlitePhonemizer(lexicon, **settings.lookup_phonemes.phonemizer_args), settings.guess_phonemes
