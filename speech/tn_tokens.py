"""TN tokens: written text cut where the kind of character changes, while it is still being written (section 8.1.2).

A token is complete when a character of the next one has been seen, or the end. Language-model tokens are aligned with TN
tokens in chunks: a chunk is what had to be decoded, after the chunk before, until its TN token was complete. Both depend
on the text alone, never on the pieces in which it arrives.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

#: Characters of the longest token. A run without end is cut here, so that it still streams.
MAX_RUN = 32


class Kind(IntEnum):
    """Kinds of characters, after the first letter of their unicode category."""

    LETTERS = 0
    DIGITS = 1
    SPACE = 2
    PUNCTUATION = 3
    SYMBOL = 4
    OTHER = 5


_KINDS = {"L": Kind.LETTERS, "Z": Kind.SPACE, "P": Kind.PUNCTUATION, "S": Kind.SYMBOL}


def kind_of(character: str) -> Kind:
    """Kind of a character that begins a token. Line breaks and tabs, which unicode calls control characters, are space."""
    category = unicodedata.category(character)
    if category == "Nd":
        return Kind.DIGITS
    if category[0] == "N":  # such as a superscript or a fraction in one character: no place in a row of digits
        return Kind.SYMBOL
    return Kind.SPACE if character.isspace() else _KINDS.get(category[0], Kind.OTHER)


@dataclass(frozen=True)
class TNToken:
    """A run of characters of one kind.

    Attributes:
        start: index of its first character in the whole text.
    """

    text: str
    start: int
    kind: Kind

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class TokenSplitter:
    """Cuts a growing text into TN tokens."""

    def __init__(self) -> None:
        self._run, self._start, self._kind = "", 0, Kind.OTHER

    def push(self, text: str) -> list[TNToken]:
        """Takes more text and returns the tokens that are now complete."""
        return [token for character in text for token in self._take(character)]

    def flush(self) -> list[TNToken]:
        """Returns the last token, if there is one; a new text may follow."""
        tokens = [TNToken(self._run, self._start, self._kind)] if self._run else []
        self._run, self._start = "", 0
        return tokens

    def _take(self, character: str) -> list[TNToken]:
        if self._continues(character):
            self._run += character
            return []
        complete = [TNToken(self._run, self._start, self._kind)] if self._run else []
        self._start += len(self._run)
        self._run, self._kind = character, kind_of(character)
        return complete

    def _continues(self, character: str) -> bool:
        if not self._run or len(self._run) == MAX_RUN:
            return False
        if unicodedata.category(character)[0] == "M":  # accents and the like belong to what they stand on
            return True
        # Marks are read one by one, unless one is repeated: `...` is one token, `."` and `$-` are two.
        alike = self._kind in (Kind.PUNCTUATION, Kind.SYMBOL)
        return character == self._run[0] if alike else kind_of(character) == self._kind


def split(text: str) -> list[TNToken]:
    """The TN tokens of a whole text; put together they are the text."""
    splitter = TokenSplitter()
    return splitter.push(text) + splitter.flush()


def align(tokens: Sequence[TNToken], ends: Sequence[int]) -> list[int]:
    """How many language-model tokens are in the chunk of each TN token of a whole text.

    Args:
        ends: how many characters of the text are known after each language-model token.
    """
    seen = [min(bisect_right(ends, token.end) + 1, len(ends)) for token in tokens]
    if seen:
        seen[-1] = len(ends)  # only the end shows that the last one is complete
    return [now - before for before, now in zip([0, *seen], seen, strict=False)]
