"""The text normaliser on disk: `normalizer.safetensors` and `config.json`, which names the language model that it reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from lm.checkpoint import load_strict, read_json
from mm.config import from_mapping
from speech.normalizer import NormalizerConfig, TextNormalizer


def save_normalizer(normalizer: TextNormalizer, directory: Path) -> None:
    """Writes a normaliser; the folder is made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(normalizer.state_dict(), directory / "normalizer.safetensors")
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(normalizer.config), indent=2) + "\n")


def load_normalizer(directory: str | Path) -> TextNormalizer:
    """Reads what `save_normalizer` wrote, ready for use.

    Raises:
        ValueError: the files are missing or do not fit.
    """
    directory = Path(directory)
    if not (directory / "normalizer.safetensors").exists():
        raise ValueError(f"{directory} is no export of stage tts-normalizer; it has no normalizer.safetensors")
    config = from_mapping(NormalizerConfig, read_json(directory / "config.json"), str(directory / "config.json"))
    normalizer = TextNormalizer(config)
    load_strict(normalizer, load_file(directory / "normalizer.safetensors"), str(directory))
    return normalizer.eval()
