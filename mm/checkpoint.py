"""Whole models to and from disk: ours, Llama 3.2 Vision in both layouts, and text-only Llamas.

Files are safetensors and JSON; nothing that is read can execute code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from lm import hub
from lm.checkpoint import export_huggingface, load_llama, load_strict, read_json, read_meta_shards, read_safetensors
from lm.config import PRESETS
from lm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from mm.config import ImageConfig, MultimodalConfig, add_part, from_mapping, with_parts
from mm.model import MultimodalLlama
from mm.voice import FOLDER as VOICE_FOLDER
from mm.voice import debug_voice, load_voice, save_voice
from vision import mllama
from vision.tiling import PIXEL_MEAN, PIXEL_STD

MODEL_TYPE = "llama-multimodal"
ADAPTERS = "adapters.safetensors"
LM_FOLDER = "lm"


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
    if model.voice is not None:
        model.voice.to(device)  # which keeps its own types
    return model.to(device=device, dtype=dtype).eval()


def save_pretrained(model: MultimodalLlama, directory: str | Path) -> None:
    """Writes `config.json`, the parts beside the language model, its voice, its tokenizer, and the language model.

    A language model that came from the registry of `lm.hub` is pinned by its hash, so it is named instead of copied.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    by_name = model.config.lm_source in hub.REGISTRY
    config = model.config if by_name else dataclasses.replace(model.config, lm_source=None)
    if not by_name:
        export_huggingface(model.lm, directory / LM_FOLDER)
        if model.tokenizer is not None:
            model.tokenizer.save(directory)
    _write_json(directory / "config.json", {"model_type": MODEL_TYPE, **dataclasses.asdict(config)})
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("lm.")}
    save_torch_state_dict(state, directory, filename_pattern="adapters{suffix}.safetensors")
    if model.voice is not None:
        save_voice(model.voice, directory / VOICE_FOLDER)


def export_mllama(model: MultimodalLlama, directory: str | Path, layout: str) -> None:
    """Writes the model as Llama 3.2 Vision, for transformers ("huggingface") or Meta's own code ("meta").

    Raises:
        ValueError: the layout is unknown, or has no place for a part of this model.
    """
    if model.config.image is None:
        raise ValueError("convert: a model without an image part is no Llama 3.2 Vision")
    configs = mllama.MllamaConfigs(
        lm=model.config.lm,
        encoder=model.config.image.encoder,
        adapter=model.config.image.adapter,
        image_token_id=model.config.media_ids["image"],
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if layout == "huggingface":
        tensors, config = mllama.to_huggingface(model.state_dict(), configs)
        save_torch_state_dict(tensors, directory)
        _write_json(directory / "config.json", config)
        _write_json(directory / "preprocessor_config.json", mllama.image_processor_config(configs.encoder))
    elif layout == "meta":
        tensors, params = mllama.to_meta(model.state_dict(), configs)
        torch.save(tensors, directory / "consolidated.00.pth")
        _write_json(directory / "params.json", params)
    else:
        raise ValueError(f"convert: layout {layout!r} is unknown; choose 'huggingface' or 'meta'")
    if model.tokenizer is not None:
        model.tokenizer.save(directory)


def compose(
    lm_source: str | Path,
    image: str | None = None,
    speech: str | None = None,
    video: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> MultimodalLlama:
    """A language model with new parts of these names (`mm.config.IMAGE_PRESETS`, `SPEECH_PRESETS`, `VIDEO_PRESETS`).

    The new parts are untrained. Gates of image and video parts are zero, so the model answers as the language model alone.
    """
    path = lm_source if lm_source == "debug" else hub.resolve(lm_source)
    lm = load_llama(lm_source, dtype=dtype)
    tokenizer = _find_tokenizer(path)
    config = MultimodalConfig(lm=lm.config, chat=_chat_of(tokenizer), lm_source=str(lm_source))
    model = MultimodalLlama(config, tokenizer, lm=lm)
    for part, preset in (("image", image), ("speech", speech), ("video", video)):
        if preset is not None:
            model = give(model, part, preset)
    return model


def give(model: MultimodalLlama, part: str, preset: str) -> MultimodalLlama:
    """The same model with one more part, untrained; what it has stays as it is.

    Args:
        part: "image", "speech" or "video".
        preset: a name in `mm.config.IMAGE_PRESETS`, `SPEECH_PRESETS` or `VIDEO_PRESETS`.

    Raises:
        ValueError: it has such a part already, the name is unknown, or a part that it needs is missing.
    """
    whole = MultimodalLlama(add_part(model.config, part, preset), model.tokenizer, lm=model.lm)
    for name, module in model.named_children():
        if name != "new_tokens":
            setattr(whole, name, module)
    whole.voice = model.voice
    assert whole.new_tokens is not None  # every part has a token of its own
    table_VD, rows = whole.lm.embed_tokens.weight, whole.new_tokens.weight
    with torch.no_grad():
        if (
            part != "image"
        ):  # whose token stays nothing; a row that trains would, at zero, have RMSNorm blow its gradient up
            rows.normal_(std=table_VD.float().square().mean().sqrt().item())
        if model.new_tokens is not None:
            rows[: len(model.new_tokens.weight)] = model.new_tokens.weight
    if part == "speech" and whole.speech_adapter is not None:
        whole.speech_adapter.match_embeddings(table_VD)  # as large as the language model's own
    return whole


def debug_model(seed: int = 0) -> MultimodalLlama:
    """A random model under 1M parameters with every part and a voice, for tests. Its gates are open, so that media matter."""
    with torch.random.fork_rng(
        devices=[]
    ):  # vectors keep what their modules draw, which must not differ from call to call
        torch.manual_seed(seed)
        config = with_parts(PRESETS["debug"](), image="debug", speech="debug", video="debug", chat="chatml")
        model = MultimodalLlama(config, ByteTokenizer())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate" in name.rsplit(".", 1)[-1]:
                    parameter.fill_(0.5)
                elif parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
        model.voice = debug_voice(config.lm)
    return model


def _load_path(path: Path, dtype: torch.dtype) -> MultimodalLlama:
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if config.get("model_type") == MODEL_TYPE:
            return _load_ours(path, dtype)
        if config.get("model_type") == "mllama":
            return _load_mllama(path, *mllama.from_huggingface(read_safetensors(path), config))
    if (path / "params.json").is_file():
        params = read_json(path / "params.json")
        if params.get("vision_chunk_size"):
            return _load_mllama(path, *mllama.from_meta(read_meta_shards(path, mllama.META_SPLIT_DIM), params))
    return compose(path, dtype=dtype)


def _load_ours(directory: Path, dtype: torch.dtype) -> MultimodalLlama:
    data = read_json(directory / "config.json")
    data.pop("model_type", None)
    config = from_mapping(MultimodalConfig, data, str(directory / "config.json"))
    lm_source = config.lm_source or directory / LM_FOLDER
    tokenizer = _find_tokenizer(hub.resolve(lm_source) if config.lm_source else directory)
    lm = load_llama(lm_source, dtype=dtype)
    if lm.config != config.lm:
        raise ValueError(
            f"{directory}: config.json describes another language model than {lm_source}:\n{config.lm}\n{lm.config}"
        )
    model = MultimodalLlama(config, tokenizer, lm=lm)
    state = read_safetensors(directory, ADAPTERS) if config.has_parts else {}
    if stray := sorted(key for key in state if key.startswith("lm.")):
        raise ValueError(
            f"{directory / ADAPTERS} holds tensors of the language model ({stray[0]}, ...); they belong in {LM_FOLDER}/"
        )
    state |= {f"lm.{key}": tensor for key, tensor in model.lm.state_dict().items()}
    load_strict(model, state, str(directory))
    if (directory / VOICE_FOLDER).is_dir():
        model.voice = load_voice(directory / VOICE_FOLDER)
    return model


def _load_mllama(path: Path, state: Mapping[str, Tensor], configs: mllama.MllamaConfigs) -> MultimodalLlama:
    _check_pixel_statistics(path)
    tokenizer = _find_tokenizer(path)
    config = MultimodalConfig(
        lm=configs.lm,
        chat=_chat_of(tokenizer),
        image=ImageConfig(encoder=configs.encoder, adapter=configs.adapter),
        n_new_tokens=mllama.N_NEW_TOKENS,
        media_ids={"image": configs.image_token_id},
    )
    with torch.device("meta"):
        model = MultimodalLlama(config, tokenizer)
    load_strict(model, state, str(path))
    return model


def _check_pixel_statistics(path: Path) -> None:
    """Tiles are normalised as the released models'; a processor of transformers can be set to do otherwise."""
    for name in ("preprocessor_config.json", "processor_config.json"):  # before and since version 5
        settings = read_json(path / name) if (path / name).is_file() else {}
        settings = settings.get("image_processor", settings)
        for key, ours in (("image_mean", PIXEL_MEAN), ("image_std", PIXEL_STD)):
            if list(settings.get(key, ours)) != list(ours):
                raise ValueError(f"source: {path / name} says {key}={settings[key]}; only {list(ours)} is supported")


def _find_tokenizer(path: str | Path) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where it came without one, which is enough for `forward`."""
    if (
        path != "debug"
        and Path(path).is_dir()
        and not any((Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    ):
        return None
    return load_tokenizer(path)


def _chat_of(tokenizer: Tokenizer | None) -> str:
    """Name of the chat format that a tokenizer's special tokens belong to; Llama 3's when there is no tokenizer."""
    return "chatml" if tokenizer is not None and "<|im_start|>" in tokenizer.special_tokens else "llama3"


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
