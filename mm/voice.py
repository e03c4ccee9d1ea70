"""The voice on disk: the exports of its four stages, and the folder that they are put together in.

An export is `config.json` and `{part}.safetensors`; a voice is `config.json` and `voice.safetensors`, in a folder of its own or
in `voice/` beside a model's adapters. Weights may be BF16 on disk.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lm.checkpoint import load_strict, read_json
from lm.config import LlamaConfig
from lm.features import features_layer
from mm.config import from_mapping
from speech import acoustic, prosody, vocoder
from speech.acoustic import AcousticConfig, AcousticModel
from speech.normalizer import LMFeatures, NormalizerConfig, TextNormalizer
from speech.prosody import ProsodyConfig, ProsodyModel
from speech.vocoder import Vocoder, VocoderConfig
from speech.voice import Voice, VoiceConfig

#: Where a model's folder has its voice.
FOLDER = "voice"
#: Part -> its configuration and module; `tts-{part}` is the stage that trains it.
PARTS: Mapping[str, tuple[type, type[nn.Module]]] = {
    "normalizer": (NormalizerConfig, TextNormalizer),
    "prosody": (ProsodyConfig, ProsodyModel),
    "acoustic": (AcousticConfig, AcousticModel),
    "vocoder": (VocoderConfig, Vocoder),
}


def save_part(module: nn.Module, directory: Path, part: str) -> None:
    """Writes one part of a voice (`PARTS`); the folder is made if missing."""
    _save(module, module.config, directory, part)


def load_part(directory: str | Path, part: str) -> Any:
    """Reads what `save_part` wrote, ready for use.

    Raises:
        ValueError: the files are missing or do not fit.
    """
    directory, (config_class, module_class) = Path(directory), PARTS[part]
    if not (directory / f"{part}.safetensors").is_file():
        raise ValueError(f"{directory} is no export of stage tts-{part}; it has no {part}.safetensors")
    module = module_class(from_mapping(config_class, read_json(directory / "config.json"), f"{directory}/config.json"))
    load_strict(module, load_file(directory / f"{part}.safetensors"), str(directory))
    return module.eval()


def save_voice(voice: Voice, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a voice, with weights of this type; the folder is made if missing."""
    _save(voice.parts, voice.config, Path(directory), "voice", dtype)


def load_voice(directory: str | Path) -> Voice:
    """Reads what `save_voice` wrote.

    Raises:
        ValueError: the files are missing or do not fit.
    """
    directory = Path(directory)
    if not (directory / "voice.safetensors").is_file():
        raise ValueError(f"voice: {directory} has no voice.safetensors; put one together with `mm voice`")
    config = from_mapping(VoiceConfig, read_json(directory / "config.json"), f"{directory}/config.json")
    voice = Voice(config)
    load_strict(voice.parts, load_file(directory / "voice.safetensors"), str(directory))
    return voice


def assemble_voice(exports: Mapping[str, str | Path]) -> Voice:
    """A voice of the exports of its four stages, by part (`PARTS`).

    Raises:
        ValueError: a file is missing, or the parts do not fit each other.
    """
    parts = {part: load_part(exports[part], part) for part in PARTS}
    voice = Voice(VoiceConfig(**{part: module.config for part, module in parts.items()}))
    for part, module in parts.items():
        voice.parts[part].load_state_dict(module.state_dict())
    return voice


def debug_voice(lm: LlamaConfig) -> Voice:
    """A tiny random voice that reads this language model's features, for tests."""
    features = LMFeatures(source="debug", layer=features_layer(lm), dim=lm.dim)
    return Voice(
        VoiceConfig(
            normalizer=NormalizerConfig(lm=features, lm_window=7, dim=12, n_heads=2, char_dim=5, max_chars=6),
            prosody=dataclasses.replace(prosody.PRESETS["debug"](), lm=features),
            acoustic=acoustic.PRESETS["debug"](),
            vocoder=vocoder.PRESETS["debug"](),
        )
    )


def _save(module: nn.Module, config: Any, directory: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    def stored(tensor: Tensor) -> Tensor:
        return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()

    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: stored(tensor) for key, tensor in module.state_dict().items()}, directory / f"{name}.safetensors")
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
