"""Fixtures that several test folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.hub import download


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct GGUF, downloaded once into the user's cache."""
    return download("smollm2-135m-instruct")
