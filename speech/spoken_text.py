"""From written text, as it is generated, to words to be spoken: the part of the pipeline that later parts begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from speech.normalizer import TextNormalizer, TokenBatch, best_rules
from speech.tn_rules import RuleReader, Spoken
from speech.tn_tokens import TNToken, TokenSplitter


@dataclass(frozen=True)
class SpokenPart:
    """A word or a pause, and where it comes from.

    Attributes:
        kind: "word", "pause" or "dropped", as in `speech.tn_rules.Spoken`.
        text: a word in lower case, the name of a letter as a capital, a mark of punctuation, or what nobody can say.
        start, end: the written characters that it stands for, `text[start:end]`; of several words for one number, all of them.
        first, stop: the language-model tokens that wrote these, `ids[first:stop]`: the part's source chunk.
    """

    kind: Literal["word", "pause", "dropped"]
    text: str
    start: int
    end: int
    first: int
    stop: int


class SpokenText:
    """One text on its way from the language model to the voice.

    What comes out depends on the text and its features alone, not on the pieces in which they arrive, and is never taken
    back. A word is certain when the white space behind it is decided, `right_context` tokens later; a number, date or
    address comes whole.
    """

    def __init__(self, normalizer: TextNormalizer) -> None:
        self._normalizer = normalizer
        self._state = normalizer.init_state(1)
        self._splitter, self._reader = TokenSplitter(), RuleReader()
        self._features: list[Tensor] = []  # of language-model tokens that belong to no complete TN token yet
        self._undecided: list[TNToken] = []
        # Character ranges of TN tokens, and ends of language-model tokens; both from the oldest that can still be asked for.
        self._spans: list[tuple[int, int]] = []
        self._ends: list[int] = []
        self._first_span = self._first_end = 0
        self._length = 0

    def push(self, text: str, features_F: Tensor | None = None) -> list[SpokenPart]:
        """Takes what one language-model token added to the text (it may be nothing yet).

        Args:
            features_F: the token's features, for a normaliser that was trained with them.

        Raises:
            ValueError: they are missing, or the normaliser reads text alone.
        """
        if (features_F is None) != ((lm := self._normalizer.config.lm) is None):
            raise ValueError(f"features: this normaliser reads {f'those of {lm.source}' if lm else 'text alone'}")
        self._length += len(text)
        self._ends.append(self._length)
        if features_F is not None:
            self._features.append(features_F)
        return self._decide(self._splitter.push(text), final=False)

    def finish(self, text: str = "") -> list[SpokenPart]:
        """Takes what is left of the text, such as a last token without features, and returns the rest. Nothing may follow."""
        self._length += len(text)
        if text:
            self._ends.append(self._length)
        return self._decide(self._splitter.push(text) + self._splitter.flush(), final=True)

    @torch.inference_mode()
    def _decide(self, tokens: list[TNToken], final: bool) -> list[SpokenPart]:
        if not tokens:  # the last token of a text is complete at its end, so this is no end
            return []
        self._undecided += tokens
        self._spans += [(token.start, token.end) for token in tokens]
        # All that was decoded since the last complete token is in the chunk of the first one.
        chunk = [len(self._features), *[0] * (len(tokens) - 1)]
        features = None
        if (lm := self._normalizer.config.lm) is not None:
            features = [torch.stack(self._features) if self._features else torch.zeros(0, lm.dim)]
        self._features = []
        batch = TokenBatch.collate([tokens], [chunk], features, self._normalizer.config.max_chars)
        logits_BUR, n_B, self._state = self._normalizer.step(
            batch.to(self._normalizer.head.weight.device), self._state, final=final
        )
        (rules,) = best_rules(logits_BUR, n_B)
        decided, self._undecided = self._undecided[: len(rules)], self._undecided[len(rules) :]
        said = [part for pair in zip(decided, rules, strict=True) for part in self._reader.push(*pair)]
        return self._locate(said + (self._reader.flush() if final else []))

    def _locate(self, said: Sequence[Spoken]) -> list[SpokenPart]:
        parts = []
        for part in said:
            (start, _), (_, end) = (self._spans[token - self._first_span] for token in part.tokens)
            first = next(i for i, stop in enumerate(self._ends) if stop > start)
            last = next(i for i, stop in enumerate(self._ends) if stop >= end)
            source = self._first_end + first, self._first_end + last + 1
            parts.append(SpokenPart(part.kind, part.text, start, end, *source))
        if said:
            self._forget(said[-1].tokens[0], parts[-1].first)
        return parts

    def _forget(self, token: int, lm_token: int) -> None:
        """Drops positions before those of the last part; the next one cannot begin earlier."""
        self._spans, self._first_span = self._spans[token - self._first_span :], token
        self._ends, self._first_end = self._ends[lm_token - self._first_end :], lm_token
