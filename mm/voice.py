"""The voice on disk: the exports of its four stages, and the folder that they are put together in.

An export is `config.json` and `{part}.safetensors`; a voice is `config.json` and `voice.safetensors`, in a folder of its own or
beside a model's adapters.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def save_part(module: nn.Module, directory: Path, part: str) -> None:
    """Writes one part of a voice ("normalizer", "prosody", "acoustic", "vocoder"); the folder is made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, directory / f"{part}.safetensors")
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(module.config), indent=2) + "\n")  # type: ignore[call-overload]
