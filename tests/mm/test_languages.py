"""The languages of the speech half: the paper's list, its prompts, and help with misspelt names."""

from __future__ import annotations

import pytest
from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES

from mm.languages import LANGUAGES, asr_prompt, ast_prompt, find_language


def test_the_34_languages_have_the_codes_that_whisper_knows() -> None:
    assert len(LANGUAGES) == 34 and list(LANGUAGES) == sorted(LANGUAGES)
    for name, known in LANGUAGES.items():
        assert known.name == name and WHISPER_LANGUAGES[known.code] == name.lower()


def test_four_languages_are_scored_by_character() -> None:
    by_character = {name for name, known in LANGUAGES.items() if known.error_rate == "CER"}
    assert by_character == {"Chinese", "Japanese", "Korean", "Thai"}
    assert find_language("English").error_rate == "WER"


def test_prompts_are_the_papers() -> None:
    assert asr_prompt("French") == "Repeat after me in French:"
    assert asr_prompt("fr") == asr_prompt("French")
    assert ast_prompt("Thai") == "Translate the following sentence into Thai:"


@pytest.mark.parametrize(
    ("wrong", "meant"), [("Englsh", "English"), ("english", "English"), ("ZH", "zh"), ("Klingon", "choose one of")]
)
def test_an_unknown_language_names_near_ones(wrong: str, meant: str) -> None:
    for look_up in (find_language, asr_prompt, ast_prompt):
        with pytest.raises(ValueError, match=rf"language: '{wrong}' .*{meant}"):
            look_up(wrong)
