"""A linear head on the speech encoder that spells: the probe of what pre-training is worth, and a warm start for small budgets.

Connectionist temporal classification needs transcripts only, no alignment. The alphabet is that of plain lower-case English.

Shape letters: B rows, T mel frames (10 ms), M mel bins, S encoder frames (40 ms), V letters and the blank.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speech.conformer import Conformer

BLANK = 0
ALPHABET = " '" + string.ascii_lowercase  # index 0 is the blank, so letter i has id i + 1
_ID = {letter: i for i, letter in enumerate(ALPHABET, start=1)}


def spell(text: str) -> list[int]:
    """Ids of a transcript's letters, case ignored.

    Raises:
        ValueError: it holds something that is not spelt with the alphabet.
    """
    unknown = sorted(set(text.lower()) - _ID.keys())
    if unknown:
        raise ValueError(
            f"text: {''.join(unknown)!r} in {text!r} is not in a-z, space and apostrophe; "
            "spell numbers out and leave punctuation and accents away"
        )
    return [_ID[letter] for letter in text.lower()]


class CTCOutput(NamedTuple):
    """What a batch gives; a term is one letter (an empty transcript counts as one).

    Attributes:
        loss_sum: negative log-likelihood of the transcripts, FP32.
        n_terms: letters that it is the sum over.
        n_too_short: utterances with fewer encoder frames than their transcript needs; they add no loss, no terms and no gradient.
    """

    loss_sum: Tensor
    n_terms: int
    n_too_short: int


class CTCProbe(nn.Module):
    """Speech to letters.

    Args:
        encoder: pre-trained or new; whether it trains along is the stage's business.
    """

    def __init__(self, encoder: Conformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.dim, 1 + len(ALPHABET))

    def forward(self, mel_BTM: Tensor, n_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, S, V)` and the number of real encoder frames of each row, `(B,)`."""
        h_BSD, n_B = self.encoder(mel_BTM, n_frames_B)
        return self.head(h_BSD), n_B

    def loss(self, mel_BTM: Tensor, n_frames_B: Tensor, texts: Sequence[str]) -> CTCOutput:
        """Loss of a batch.

        Args:
            mel_BTM: normalised features.
            n_frames_B: real mel frames of each row.
            texts: a transcript for each row.

        Raises:
            ValueError: a transcript holds something that is not in the alphabet, or there is not one for each row.
        """
        if len(texts) != len(mel_BTM):
            raise ValueError(f"texts: {len(texts)} transcripts for {len(mel_BTM)} utterances; give one for each")
        letters = [spell(text) for text in texts]
        logits_BSV, n_B = self(mel_BTM, n_frames_B)
        # Equal letters in a row need a blank between them.
        needs = [len(ids) + sum(a == b for a, b in pairwise(ids)) for ids in letters]
        fits = [n >= need for n, need in zip(n_B.tolist(), needs, strict=True)]
        loss_sum = F.ctc_loss(
            logits_BSV.float().log_softmax(-1).transpose(0, 1),
            torch.tensor([i for ids in letters for i in ids], dtype=torch.int64, device=logits_BSV.device),
            n_B,
            torch.tensor([len(ids) for ids in letters], device=n_B.device),
            blank=BLANK,
            reduction="sum",
            zero_infinity=True,
        )
        n_terms = sum(max(len(ids), 1) for ids, fit in zip(letters, fits, strict=True) if fit)
        return CTCOutput(loss_sum, n_terms, fits.count(False))

    @torch.no_grad()
    def decode(self, mel_BTM: Tensor, n_frames_B: Tensor) -> list[str]:
        """The best letter of every frame, repeats and blanks taken out."""
        logits_BSV, n_B = self(mel_BTM, n_frames_B)
        texts = []
        for best_S, n in zip(logits_BSV.argmax(-1), n_B.tolist(), strict=True):
            ids = torch.unique_consecutive(best_S[:n]).tolist()
            texts.append("".join(ALPHABET[i - 1] for i in ids if i != BLANK))
        return texts
