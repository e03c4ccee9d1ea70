"""Stage image-encoder: pictures and their captions meet in one space (section 7.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from open_clip import SimpleTokenizer
from torch import Tensor

from data.images import load_image
from data.shards import Sample as RawSample
from mm.sheet import Shown
from mm.train.config import TrainConfig
from mm.train.encoders import save_encoder
from mm.train.objective import Objective
from mm.train.reading import as_caption, first_question, media_of, split_answer
from mm.train.showing import picture_of, share_right
from vision.contrastive import ContrastiveModel
from vision.encoder import PRESETS, ImageEncoder
from vision.pretrained import init_stem
from vision.tiling import Pictures, Tiles, tile_image


@dataclass
class Pairs:
    """A batch of pictures, each with its caption."""

    pictures: Pictures
    ids_PT: Tensor
    keys: list[str]

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(self.pictures.to(device), self.ids_PT.to(device), self.keys)


@dataclass
class Pair:
    tiles: Tiles
    caption: str
    key: str


@dataclass(frozen=True)
class PairReader:
    """Reads each sample as its first picture, fitted into one tile as in contrastive pre-training (7.2), and its caption."""

    tile_size: int
    tokenizer: SimpleTokenizer = field(repr=False)

    def length(self, raw: RawSample) -> int:
        return 0  # captions all have the text tower's context length

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Pair:
        pictures = media_of(raw, "image")
        if not pictures:
            raise ValueError("the sample has no picture")
        tiles = tile_image(load_image(pictures[0]), self.tile_size, max_tiles=1)
        return Pair(tiles, self.answer(raw), f"{raw.source}/{raw.key}")

    def answer(self, raw: RawSample) -> str:
        """The caption, or what the assistant says where there is none."""
        return split_answer(raw, as_caption(raw) if raw.caption else raw.messages)[1]

    def count(self, sample: Pair) -> int:
        return 1

    def collate(self, samples: Sequence[Pair]) -> Pairs:
        pictures = Pictures.collate([pair.tiles for pair in samples])
        ids_PT = self.tokenizer([pair.caption for pair in samples])
        return Pairs(pictures, ids_PT, [pair.key for pair in samples])


class Contrastive(Objective[ContrastiveModel, PairReader]):
    """An image encoder beside a text tower that is thrown away."""

    def __init__(self, config: TrainConfig) -> None:
        preset = config.model.encoder
        if preset not in PRESETS:
            raise ValueError(f"model.encoder: preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        encoder_config = PRESETS[preset]()
        if config.data.tile_size:
            encoder_config = dataclasses.replace(encoder_config, tile_size=config.data.tile_size)
        encoder = ImageEncoder(encoder_config)
        if config.model.stem:
            init_stem(encoder, config.model.stem)
        self.model = ContrastiveModel(encoder, config.model.text)
        self.reader = PairReader(encoder_config.tile_size, self.model.tokenizer)

    def loss(self, batch: Pairs) -> Tensor:
        return self.model(batch.pictures, batch.ids_PT).loss * len(batch.pictures)

    def n_tokens(self, batch: Pairs) -> int:
        return int(batch.ids_PT.ne(0).sum())

    def gauges(self) -> dict[str, float]:
        return {"logit_scale": self.model.logit_scale.exp().item()}

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """The prediction is the nearest of the samples' captions."""
        pairs = [self.reader.prepare(raw) for raw in raws]
        pictures = Pictures.collate([pair.tiles for pair in pairs]).to(self.model.logit_scale.device)
        nearest = self.model.zero_shot(pictures, sorted({pair.caption for pair in pairs}))
        rows = [
            Shown(picture_of(raw, None), first_question(raw.messages), pair.caption, caption)
            for raw, pair, caption in zip(raws, pairs, nearest, strict=True)
        ]
        return rows, share_right(rows)

    def export(self, directory: Path) -> None:
        save_encoder(self.model.image_encoder, directory)
