"""What `mm data make voice` needs of the voice itself: what texts say, phone by phone, and what is measured of recordings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data.make.voice import Item
from speech.phone_batch import PhoneStream
from speech.phones import Phone, Phonemizer
from speech.spoken_text import SpokenPart
from speech.tn_rules import Rule, speak
from speech.tn_tokens import split
from speech.voice_features import VoiceFeaturesConfig, log_power, pitch


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


def measure(waveform_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pitch and log power of each frame, as the voice is trained with.

    Raises:
        ValueError: what finds pitch is not installed.
    """
    config = VoiceFeaturesConfig()
    return pitch(waveform_N, config), log_power(torch.from_numpy(waveform_N)[None], config)[0].numpy()
