"""Phones as tensors, the same for every model of the voice (section 8.1.2).

Every utterance begins and ends with a pause, and no two pauses follow each other (`PhoneStream`).

Shape letters: B rows, N phones, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speech.phones import PAUSE, Phone

#: What a phone can be. The first is padding, the second a symbol that is not here; the rest are gruut's for American English.
IPA = (
    *("", "<unk>", PAUSE),
    *("i", "ɪ", "ɛ", "æ", "ɑ", "ɔ", "ʊ", "u", "ʌ", "ə", "ɚ", "eɪ", "aɪ", "ɔɪ", "aʊ", "oʊ"),  # noqa: RUF001
    *("p", "b", "t", "d", "k", "ɡ", "t͡ʃ", "d͡ʒ", "f", "v", "θ", "ð", "s", "z", "ʃ", "ʒ", "h"),  # noqa: RUF001
    *("m", "n", "ŋ", "l", "ɹ", "w", "j"),
)
#: Punctuation of a pause; the first is none: of a phone that is no pause, and of the pause that an utterance begins with.
MARKS = ("", ",", ".", "?", "!", ":", ";", "-")
N_STRESSES, N_PLACES = 3, 4
_IPA_IDS = {symbol: i for i, symbol in enumerate(IPA)}
_UNKNOWN = IPA.index("<unk>")


class PhoneIds(NamedTuple):
    """One phone in numbers.

    Attributes:
        ipa: index in `IPA`.
        stress: 1 primary, 2 secondary, 0 none.
        place: 0 inside a word, 1 begins it, 2 ends it, 3 both.
        mark: index in `MARKS`.
        chunk: the last language-model token of the phone's chunk; never less than that of the phone before.
    """

    ipa: int
    stress: int
    place: int
    mark: int
    chunk: int

    @classmethod
    def make(cls, ipa: str, stress: int, place: int, mark: str, chunk: int) -> PhoneIds:
        return cls(_IPA_IDS.get(ipa, _UNKNOWN), stress, place, MARKS.index(mark), chunk)

    @classmethod
    def of(cls, phone: Phone) -> PhoneIds:
        place = phone.begins_word + 2 * phone.ends_word
        return cls.make(phone.ipa, phone.stress, place, phone.mark, max(phone.source.stop - 1, 0))


@dataclass
class PhoneBatch:
    """Phones of several rows; zeros past a row's end.

    Attributes:
        ipa_BN, stress_BN, place_BN, mark_BN, chunk_BN: as in `PhoneIds`.
        n_phones_B: real phones of each row.
        speaker_B, style_B: who speaks, and how.
    """

    ipa_BN: Tensor
    stress_BN: Tensor
    place_BN: Tensor
    mark_BN: Tensor
    chunk_BN: Tensor
    n_phones_B: Tensor
    speaker_B: Tensor
    style_B: Tensor

    @classmethod
    def collate(
        cls,
        rows: Sequence[Sequence[Phone | PhoneIds]],
        speakers: Sequence[int] | None = None,
        styles: Sequence[int] | None = None,
    ) -> PhoneBatch:
        """Pads rows of phones; speaker and style are 0 when None."""
        ids = [[PhoneIds.of(phone) if isinstance(phone, Phone) else phone for phone in row] for row in rows]
        n_phones_B = torch.tensor([len(row) for row in ids], dtype=torch.int64)
        padding = PhoneIds(0, 0, 0, 0, 0)
        length = max(map(len, ids), default=0)
        padded = [[*row, *[padding] * (length - len(row))] for row in ids]
        ids_BNX = torch.tensor(padded, dtype=torch.int64).view(len(ids), length, len(PhoneIds._fields))
        ipa_BN, stress_BN, place_BN, mark_BN, chunk_BN = ids_BNX.unbind(-1)
        speaker_B, style_B = (torch.tensor(given or [0] * len(ids), dtype=torch.int64) for given in (speakers, styles))
        return cls(ipa_BN, stress_BN, place_BN, mark_BN, chunk_BN, n_phones_B, speaker_B, style_B)

    def to(self, device: torch.device | str) -> PhoneBatch:
        return PhoneBatch(*(x.to(device) for x in vars(self).values()))


class PhoneEmbedding(nn.Module):
    """The sum of what is known about each phone, `(B, N, D)`; past a row's end it is the speaker's and the style's alone."""

    def __init__(self, dim: int, n_speakers: int = 1, n_styles: int = 1) -> None:
        super().__init__()
        self.ipa = nn.Embedding(len(IPA), dim, padding_idx=0)
        self.stress = nn.Embedding(N_STRESSES, dim)
        self.place = nn.Embedding(N_PLACES, dim)
        self.mark = nn.Embedding(len(MARKS), dim)
        self.speaker = nn.Embedding(n_speakers, dim)
        self.style = nn.Embedding(n_styles, dim)

    def forward(self, phones: PhoneBatch) -> Tensor:
        x_BND = self.ipa(phones.ipa_BN) + self.stress(phones.stress_BN) + self.place(phones.place_BN)
        x_BND = x_BND + self.mark(phones.mark_BN)
        return x_BND + (self.speaker(phones.speaker_B) + self.style(phones.style_B))[:, None]


class PhoneStream:
    """Phones of one utterance, with the pauses that it begins and ends with; of pauses in a row, the first is kept."""

    def __init__(self) -> None:
        self._last: Phone | None = None

    def push(self, phones: Iterable[Phone]) -> list[Phone]:
        kept: list[Phone] = []
        for phone in phones:
            if self._last is None:
                kept.append(_pause("", phone))
                self._last = kept[-1]
            if not (phone.is_pause and self._last.is_pause):
                kept.append(phone)
                self._last = phone
        return kept

    def finish(self) -> list[Phone]:
        """The pause at the end, where the text has none; nothing if nothing was said."""
        return [] if self._last is None or self._last.is_pause else [_pause(".", self._last)]


def _pause(mark: str, neighbour: Phone) -> Phone:
    return Phone(PAUSE, 0, True, True, mark, neighbour.source)
