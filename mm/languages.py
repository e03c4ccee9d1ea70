"""The 34 languages of the speech half (section 8.1.1), how each is scored, and the prompts that name them (section 8.3.1)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_CODES = {
    "Arabic": "ar", "Bengali": "bn", "Chinese": "zh", "Czech": "cs", "Dutch": "nl", "English": "en", "Finnish": "fi",
    "French": "fr", "German": "de", "Greek": "el", "Gujarati": "gu", "Hindi": "hi", "Hungarian": "hu",
    "Indonesian": "id", "Italian": "it", "Japanese": "ja", "Kannada": "kn", "Korean": "ko", "Malayalam": "ml",
    "Marathi": "mr", "Persian": "fa", "Polish": "pl", "Portuguese": "pt", "Romanian": "ro", "Russian": "ru",
    "Spanish": "es", "Swahili": "sw", "Swedish": "sv", "Tamil": "ta", "Telugu": "te", "Thai": "th", "Turkish": "tr",
    "Urdu": "ur", "Vietnamese": "vi",
}  # fmt: skip
#: The paper scores these by characters: words are not, or not reliably, set apart by spaces.
_BY_CHARACTER = frozenset({"Chinese", "Japanese", "Korean", "Thai"})


@dataclass(frozen=True, kw_only=True)
class Language:
    """A language that prompts may name.

    Attributes:
        name: in English, as prompts have it.
        code: ISO 639-1.
    """

    name: str
    code: str

    @property
    def error_rate(self) -> Literal["WER", "CER"]:
        """What recognition is scored by (section 8.3.2)."""
        return "CER" if self.name in _BY_CHARACTER else "WER"


#: By English name, in alphabetical order.
LANGUAGES: Mapping[str, Language] = {name: Language(name=name, code=code) for name, code in _CODES.items()}


_BY_CODE = {known.code: known for known in LANGUAGES.values()}


def find_language(name: str) -> Language:
    """Looks a language up by its English name, as prompts spell it, or by its code, as many corpora do.

    Raises:
        ValueError: it is not one of the 34; names the ones that may be meant.
    """
    known = LANGUAGES.get(name) or _BY_CODE.get(name)
    if known is None:
        folded = {alias.casefold(): alias for alias in (*LANGUAGES, *_BY_CODE)}
        near = [repr(folded[alias]) for alias in difflib.get_close_matches(name.casefold(), folded)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(LANGUAGES)}"
        raise ValueError(f"language: {name!r} is not one of the {len(LANGUAGES)}; {hint}")
    return known


def asr_prompt(language: str) -> str:
    """The prompt that asks for a transcript of speech in a language."""
    return f"Repeat after me in {find_language(language).name}:"


def ast_prompt(language: str) -> str:
    """The prompt that asks for a translation of speech; names the target alone, the source is never told."""
    return f"Translate the following sentence into {find_language(language).name}:"
