"""Text of every kind, for tests of what reads it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

ALPHABET = "ab Zé019٣.,-\u2013$€+½²\t\n\x00\u200d\u0301\N{GRINNING FACE}\N{HEAVY BLACK HEART}\ufe0fЖ漢"


@pytest.fixture(scope="session")
def random_text() -> Callable[..., str]:
    """Makes runs, some of them long, of letters, digits, marks, emoji, control characters and other scripts."""

    def make(rng: random.Random, n: int = 60) -> str:
        return "".join(rng.choice(ALPHABET) * rng.choice([1, 1, 1, 2, 40]) for _ in range(rng.randint(0, n)))

    return make
