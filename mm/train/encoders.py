"""Encoders alone on disk, which is how one stage hands them to the next: `encoder.safetensors` and `config.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file

from lm.checkpoint import load_strict, read_json
from mm.config import from_mapping
from speech.conformer import Conformer, ConformerConfig
from vision.encoder import ImageEncoder, ImageEncoderConfig

Encoder = TypeVar("Encoder", ImageEncoder, Conformer)
_CONFIGS: dict[type, type] = {ImageEncoder: ImageEncoderConfig, Conformer: ConformerConfig}


def save_encoder(encoder: ImageEncoder | Conformer, directory: Path) -> None:
    """Writes an encoder."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, directory / "encoder.safetensors")
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(encoder.config), indent=2) + "\n")


def read_encoder(directory: str | Path, kind: type[Encoder]) -> Encoder:
    """Reads what `save_encoder` wrote.

    Raises:
        ValueError: the files are missing, or of an encoder of another kind.
    """
    directory = Path(directory)
    if not (directory / "encoder.safetensors").exists():
        raise ValueError(
            f"model.encoder: {directory} is neither a preset nor an export of a stage that trains an encoder; "
            "it has no encoder.safetensors"
        )
    config_file = directory / "config.json"
    encoder: Any = kind(from_mapping(_CONFIGS[kind], read_json(config_file), str(config_file)))
    load_strict(encoder, load_file(directory / "encoder.safetensors"), str(directory))
    return encoder


def load_encoder(directory: str | Path, encoder: Encoder) -> None:
    """Fills an encoder from `save_encoder`'s files; an image encoder's positions are interpolated where the tile size differs.

    Raises:
        ValueError: the files are missing, or of an encoder of another shape; says in what.
    """
    saved = read_encoder(directory, type(encoder))
    if isinstance(saved, ImageEncoder) and saved.config.tile_size != encoder.config.tile_size:
        saved.resize(encoder.config.tile_size)
    for name, value in dataclasses.asdict(encoder.config).items():
        if getattr(saved.config, name) != value:
            raise ValueError(f"model.encoder: {directory} has {name} {getattr(saved.config, name)}, this model {value}")
    encoder.load_state_dict(saved.state_dict())
