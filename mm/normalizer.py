"""The text normaliser on disk: `normalizer.safetensors` and `config.json`, which names the language model that it reads."""

from __future__ import annotations

from pathlib import Path

from mm.voice import load_part, save_part
from speech.normalizer import TextNormalizer


def save_normalizer(normalizer: TextNormalizer, directory: Path) -> None:
    """Writes a normaliser; the folder is made if missing."""
    save_part(normalizer, directory, "normalizer")


def load_normalizer(directory: str | Path) -> TextNormalizer:
    """Reads what `save_normalizer` wrote, ready for use.

    Raises:
        ValueError: the files are missing or do not fit.
    """
    return load_part(directory, "normalizer")
