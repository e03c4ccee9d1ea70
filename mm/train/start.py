"""The model that a stage starts from."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from mm.checkpoint import compose, give
from mm.config import PART_OF_MEDIUM
from mm.model import MultimodalLlama
from mm.train.config import TrainConfig
from mm.train.encoders import load_encoder
from vision.pretrained import init_stem
from vision.tiling import Pictures, tile_image


def load_model(config: TrainConfig) -> MultimodalLlama:
    """Loads or composes a whole model, and prepares its parts as the run says."""
    source, part = config.model, PART_OF_MEDIUM[config.medium]
    preset = getattr(source, part)
    if source.init_from:
        model = MultimodalLlama.from_pretrained(source.init_from)
        if preset:
            model = give(model, part, preset)
    else:
        assert source.lm is not None
        model = compose(source.lm, **{part: preset})
    if getattr(model.config, part) is None:
        raise ValueError(f"model.init_from: {source.init_from} has no {part} part; name a new one as model.{part}")
    _prepare_parts(model, config)
    return model


def start_from_image(model: MultimodalLlama) -> None:
    """Lets a new video part begin as the image part (`VideoAdapter.start_from`)."""
    assert model.image_encoder is not None and model.image_adapter is not None and model.video_adapter is not None
    config = model.image_encoder.config
    grey = tile_image(
        Image.new("RGB", (config.tile_size, config.tile_size), "grey"), config.tile_size, config.max_tiles
    )
    with torch.no_grad():
        features_PNLF = model.image_encoder(Pictures.collate([grey], n_tiles=config.n_padded_tiles))
    model.video_adapter.start_from(model.image_adapter, features_PNLF[:, 0])


def _prepare_parts(model: MultimodalLlama, config: TrainConfig) -> None:
    """Puts in what was trained elsewhere, and changes tiles and frames as the run says."""
    source, data = config.model, config.data
    encoder: Any = model.speech_encoder if config.hears else model.image_encoder
    adapter = {"image": model.image_adapter, "video": model.video_adapter}.get(config.medium)
    if source.encoder:
        load_encoder(source.encoder, encoder)
    if source.stem:
        init_stem(encoder, source.stem)
    if source.from_image:
        start_from_image(model)
    if source.open_gates is not None:
        assert adapter is not None
        adapter.open_gates(source.open_gates)
    if source.swap_lm:
        model.swap_lm(source.swap_lm)
    if source.swap_image:
        model.swap_image(source.swap_image)
    if data.tile_size:
        model.resize_tiles(data.tile_size)
    if data.max_frames or data.factor:
        model.change_frames(data.max_frames, data.factor)
