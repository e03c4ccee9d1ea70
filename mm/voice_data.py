"""What a made voice says, phone by phone, as the voice itself will say it: the front end of `mm data make voice`."""

from __future__ import annotations

from collections.abc import Sequence

from data.make.voice import Item
from speech.phone_batch import PhoneStream
from speech.phones import Phone, Phonemizer
from speech.spoken_text import SpokenPart
from speech.tn_rules import Rule, speak
from speech.tn_tokens import split


class FrontEnd:
    """Written tokens and the names of their rules to words and pauses with phones.

    Raises:
        ValueError: gruut is not installed.
    """

    def __init__(self) -> None:
        self._phonemizer = Phonemizer()

    def __call__(self, written: Sequence[tuple[str, str]]) -> list[Item]:
        tokens = split("".join(text for text, _ in written))
        if len(tokens) != len(written):
            raise ValueError(f"text {written!r}: its tokens are cut elsewhere")
        parts = [
            SpokenPart(part.kind, part.text, tokens[part.tokens[0]].start, tokens[part.tokens[1]].end, 0, 0)
            for part in speak(tokens, [Rule[name] for _, name in written])
        ]
        stream, words = PhoneStream(), list[list[Phone]]()
        for phone in [*stream.push(self._phonemizer(parts)), *stream.finish()]:
            if phone.begins_word:
                words.append([])
            words[-1].append(phone)
        return [
            Item(
                word="" if word[0].is_pause else word[0].source.text,
                mark=word[0].mark,
                phones=tuple((phone.ipa, phone.stress) for phone in word),
                end=word[0].source.end,
            )
            for word in words
        ]
