"""Whole models to and from disk: ours, Llama 3.2 Vision in both layouts, and text-only Llamas.

Files are safetensors and JSON; nothing that is read can execute code.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lm import hub
from lm.checkpoint import export_huggingface, load_llama, load_strict, read_json, read_meta_checkpoint, read_safetensors
from lm.config import PRESETS
from lm.model import Llama
from lm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from mm.config import MultimodalConfig, from_mapping, with_image
from mm.model import MultimodalLlama
from vision import mllama

MODEL_TYPE = "llama-multimodal"
CONFIG_FILE, ADAPTERS_FILE, LM_DIRECTORY = "config.json", "adapters.safetensors", "lm"


def from_pretrained(
    source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> MultimodalLlama:
    """See `MultimodalLlama.from_pretrained`."""
    dtype = dtype or torch.float32
    if str(source) == "debug":
        model = debug_model()
    elif str(source) == "bundled":
        model = _load_ours(Path(str(resources.files("mm") / "bundled")), dtype)
    else:
        model = _load_path(hub.resolve(source), dtype)
    return model.to(device=device, dtype=dtype).eval()


def _load_path(path: Path, dtype: torch.dtype) -> MultimodalLlama:
    if path.is_dir() and (path / CONFIG_FILE).exists():
        model_type = read_json(path / CONFIG_FILE).get("model_type")
        if model_type == MODEL_TYPE:
            return _load_ours(path, dtype)
        if model_type == "mllama":
            return _load_mllama(mllama.from_huggingface(read_safetensors(path), read_json(path / CONFIG_FILE)), path)
    if path.is_dir() and (path / "params.json").exists():
        params = read_json(path / "params.json")
        if "vision_num_cross_attention_layers" in params:
            return _load_mllama(mllama.from_meta(read_meta_checkpoint(path), params), path)
    return compose(path, None, dtype=dtype)


def debug_model(seed: int = 0) -> MultimodalLlama:
    """A random model under 1M parameters with every part, for tests. Its gates are open, so that pictures matter."""
    model = MultimodalLlama(with_image(PRESETS["debug"](), "debug", chat="chatml"), ByteTokenizer())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.rsplit(".", 1)[-1]:
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def compose(
    lm_source: str | Path, image: str | None, *, lm: Llama | None = None, dtype: torch.dtype = torch.float32
) -> MultimodalLlama:
    """A language model with a new, untrained image part (an `IMAGE_PRESETS` name), or with none."""
    lm = lm or load_llama(lm_source, dtype=dtype)
    tokenizer = find_tokenizer(lm_source)
    chat = chat_name(tokenizer)
    if image is None:
        config = MultimodalConfig(lm=lm.config, chat=chat, lm_source=str(lm_source))
    else:
        config = with_image(lm.config, image, chat=chat, lm_source=str(lm_source))
    model = _empty(config, tokenizer)
    model.lm = lm
    ...
    return model
