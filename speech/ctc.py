"""Connectionist temporal classification: speech to letters, or to a language model's tokens.

It needs transcripts only, no alignment. `CTCProbe`, a linear head on the encoder, spells: the probe of what pre-training is worth,
and a warm start for small budgets. `TokenCTC` goes on from there: the adapter writes the transcript in the embeddings that a
frozen language model has for its tokens, which costs a fraction of running that model.

Shape letters: B rows, T mel frames (10 ms), M mel bins, S frames of the output, N of them of all rows, D width, V symbols with
the blank.
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speech.adapter import SpeechAdapter
from speech.conformer import Conformer

BLANK = 0
#: Frames whose logits over all symbols exist at one time: with 15,000 tokens, 15 MB.
CHUNK = 256
ALPHABET = " '" + string.ascii_lowercase  # index 0 is the blank, so letter i has id i + 1
_ID = {letter: i for i, letter in enumerate(ALPHABET, start=1)}


class Symbols(Protocol):
    """What transcripts are written with; ids count from 1, because 0 is the blank."""

    def __len__(self) -> int: ...

    def spell(self, text: str) -> list[int]:
        """Ids of a transcript.

        Raises:
            ValueError: it cannot be written with these symbols.
        """

    def read(self, ids: Sequence[int]) -> str:
        """The text that ids stand for."""


class Letters:
    """Plain lower-case English: a-z, space and apostrophe."""

    def __len__(self) -> int:
        return len(ALPHABET)

    def spell(self, text: str) -> list[int]:
        """Case is ignored."""
        unknown = sorted(set(text.lower()) - _ID.keys())
        if unknown:
            raise ValueError(
                f"text: {''.join(unknown)!r} in {text!r} is not in a-z, space and apostrophe; "
                "spell numbers out and leave punctuation and accents away"
            )
        return [_ID[letter] for letter in text.lower()]

    def read(self, ids: Sequence[int]) -> str:
        return "".join(ALPHABET[i - 1] for i in ids)


def n_frames_needed(ids: Sequence[int]) -> int:
    """Output frames that a transcript takes at least: one for each symbol, and a blank between equal neighbours."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))


def merge_unused(logits_NV: Tensor, used: Tensor) -> Tensor:
    """All symbols that are not asked for as one: the same loss, and of thousands of symbols a few hundred to align.

    Args:
        logits_NV: of every symbol.
        used: symbols to keep, each once.

    Returns:
        Logits of the symbols in `used` and, last, of all others together.
    """
    unlikely = torch.finfo(torch.float32).min  # not -inf, whose gradient is NaN where no others are left
    others_N1 = logits_NV.float().index_fill(-1, used, unlikely).logsumexp(-1, keepdim=True)
    return torch.cat([logits_NV.index_select(-1, used), others_N1], dim=-1)


class CTCOutput(NamedTuple):
    """What a batch gives; a term is one symbol (an empty transcript counts as one).

    Attributes:
        loss_sum: negative log-likelihood of the transcripts; FP64, because its sums over alignments round in FP32.
        n_terms: symbols that it is the sum over.
        n_too_short: utterances with fewer frames than their transcript needs; they add no loss, no terms and no gradient.
    """

    loss_sum: Tensor
    n_terms: int
    n_too_short: int


class CTCModel(nn.Module, ABC):
    """Speech to symbols.

    Attributes:
        symbols: what transcripts are written with.
        stack: mel frames of one output frame.
    """

    symbols: Symbols
    stack: int

    @abstractmethod
    def encode(self, mel_BTM: Tensor, n_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Output frames `(B, S, D)` and the number of real ones of each row, `(B,)`."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Logits `(..., V)` of output frames `(..., D)`."""

    def forward(self, mel_BTM: Tensor, n_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, S, V)` and the number of real output frames of each row, `(B,)`."""
        x_BSD, n_B = self.encode(mel_BTM, n_frames_B)
        return self.score(x_BSD), n_B

    def loss(self, mel_BTM: Tensor, n_frames_B: Tensor, texts: Sequence[str]) -> CTCOutput:
        """Loss of a batch.

        Args:
            mel_BTM: normalised features.
            n_frames_B: real mel frames of each row.
            texts: a transcript for each row.

        Raises:
            ValueError: a transcript cannot be written with the symbols, or there is not one for each row.
        """
        if len(texts) != len(mel_BTM):
            raise ValueError(f"texts: {len(texts)} transcripts for {len(mel_BTM)} utterances; give one for each")
        spelt = [self.symbols.spell(text) for text in texts]
        x_BSD, n_B = self.encode(mel_BTM, n_frames_B)
        targets = torch.tensor([i for ids in spelt for i in ids], dtype=torch.int64, device=x_BSD.device)
        used = torch.cat([targets.new_tensor([BLANK]), targets]).unique()
        # Of all symbols, logits exist for a few frames at one time; the backward pass computes them anew.
        logits_BSV = torch.cat(
            [
                checkpoint(lambda x_ND: merge_unused(self.score(x_ND), used), x_ND, use_reentrant=False)
                for x_ND in x_BSD.flatten(0, 1).split(CHUNK)
            ]
        ).unflatten(0, x_BSD.shape[:2])
        fits = [n >= n_frames_needed(ids) for n, ids in zip(n_B.tolist(), spelt, strict=True)]
        loss_sum = F.ctc_loss(
            logits_BSV.double().log_softmax(-1).transpose(0, 1),
            torch.searchsorted(used, targets),
            n_B,
            torch.tensor([len(ids) for ids in spelt], device=n_B.device),
            blank=BLANK,
            reduction="sum",
            zero_infinity=True,
        )
        n_terms = sum(max(len(ids), 1) for ids, fit in zip(spelt, fits, strict=True) if fit)
        return CTCOutput(loss_sum, n_terms, fits.count(False))

    @torch.no_grad()
    def decode(self, mel_BTM: Tensor, n_frames_B: Tensor) -> list[str]:
        """The best symbol of every frame, repeats and blanks taken out."""
        logits_BSV, n_B = self(mel_BTM, n_frames_B)
        texts = []
        for best_S, n in zip(logits_BSV.argmax(-1), n_B.tolist(), strict=True):
            ids = torch.unique_consecutive(best_S[:n]).tolist()
            texts.append(self.symbols.read([i for i in ids if i != BLANK]))
        return texts


class CTCProbe(CTCModel):
    """Speech to letters, every 40 ms.

    Args:
        encoder: pre-trained or new; whether it trains along is the stage's business.
    """

    def __init__(self, encoder: Conformer) -> None:
        super().__init__()
        self.symbols, self.stack = Letters(), encoder.config.stack
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.dim, 1 + len(self.symbols))

    def encode(self, mel_BTM: Tensor, n_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(mel_BTM, n_frames_B)

    def score(self, x: Tensor) -> Tensor:
        return self.head(x)


class TokenCTC(CTCModel):
    """Speech to the tokens of a frozen language model, every 80 ms, by its own embeddings.

    After it the adapter's output lies where the language model has the words that were said, which is a shorter way to its
    understanding than its own loss finds on a small budget.

    Args:
        encoder, adapter: of the model that is to hear; the adapter has a readout.
        symbols: the readout's tokens.
        table_VD: the language model's embeddings, which stay as they are.
    """

    def __init__(self, encoder: Conformer, adapter: SpeechAdapter, symbols: Symbols, table_VD: Tensor) -> None:
        super().__init__()
        assert adapter.readout is not None and len(symbols) == len(adapter.readout.token_ids)
        self.symbols, self.stack = symbols, encoder.config.stack * adapter.config.stride
        self.speech_encoder, self.speech_adapter = encoder, adapter
        self.embeddings_RD: Tensor
        self.register_buffer("embeddings_RD", adapter.readout.embeddings(table_VD).detach().float(), persistent=False)

    def encode(self, mel_BTM: Tensor, n_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.speech_adapter(*self.speech_encoder(mel_BTM, n_frames_B))

    def score(self, x: Tensor) -> Tensor:
        assert self.speech_adapter.readout is not None
        return self.speech_adapter.readout.scores(x, self.embeddings_RD)
