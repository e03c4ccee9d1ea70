"""Stage image-align, a warm start for small budgets: a small decoder answers, letter by letter, from what the encoder sees.

The language model never runs, so that a step takes a fraction of the time that the same pictures take in `image-sft`, and all of
it is the encoder's to learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.images import load_image
from data.shards import Sample as RawSample
from mm.model import MultimodalLlama
from mm.processor import Style
from mm.sheet import Shown
from mm.train.config import UNVARIED, AugmentConfig, TrainConfig
from mm.train.reading import as_caption, media_of, one_exchange, split_answer, text_of
from mm.train.showing import picture_of, share_right
from video.frames import load_frames
from vision.encoder import ImageEncoderConfig
from vision.letters import LetterModel, spell
from vision.tiling import Pictures, Tiles, tile_image

#: Frames of a clip out of which one is taken.
N_FRAMES = 16


@dataclass
class Answer:
    """A picture, and what is asked and said about it in letters."""

    tiles: Tiles
    ids: list[int]
    supervised: list[bool]
    key: str


@dataclass
class Answers:
    """A batch of them, padded at the end."""

    pictures: Pictures
    ids_PT: Tensor
    supervised_PT: Tensor
    keys: list[str]

    def to(self, device: torch.device | str) -> Answers:
        return Answers(self.pictures.to(device), self.ids_PT.to(device), self.supervised_PT.to(device), self.keys)


@dataclass(frozen=True)
class AnswerReader:
    """Reads each sample as its one picture, or a frame of its one clip, and one question about it, or its caption.

    Attributes:
        styles: source name -> "chat", one question, the first or in training any; or "plain", the caption.
    """

    image: ImageEncoderConfig
    styles: dict[str, Style]
    augment: AugmentConfig

    def exchange(self, raw: RawSample, *, draw: bool = False) -> tuple[str, str]:
        """What is asked, nothing for a caption, and what is answered."""
        is_caption = self.styles[raw.source] == "plain"
        asked, answer = split_answer(raw, as_caption(raw) if is_caption else one_exchange(raw, draw=draw))
        return text_of(asked[-1]), answer

    def length(self, raw: RawSample) -> int:
        return 0  # a picture costs the same, whatever is asked

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Answer:
        ids, supervised = spell(*self.exchange(raw, draw=augment))
        picture = (self.augment if augment else UNVARIED).vary_picture(_picture(raw, draw=augment))
        tiles = tile_image(picture, self.image.tile_size, self.image.max_tiles)
        return Answer(tiles, ids, supervised, f"{raw.source}/{raw.key}")

    def count(self, sample: Answer) -> int:
        return sum(sample.supervised)

    def collate(self, samples: Sequence[Answer]) -> Answers:
        return Answers(
            Pictures.collate([sample.tiles for sample in samples], n_tiles=self.image.n_padded_tiles),
            pad_sequence([torch.tensor(sample.ids) for sample in samples], batch_first=True),
            pad_sequence([torch.tensor(sample.supervised) for sample in samples], batch_first=True),
            [sample.key for sample in samples],
        )


class Answering:
    """A model whose image encoder learns; its language model and its image adapter wait."""

    def __init__(self, config: TrainConfig, whole: MultimodalLlama) -> None:
        assert whole.image_encoder is not None
        self.whole = whole
        self.model = LetterModel(whole.image_encoder)
        sources = (*config.data.sources, *config.data.heldout)
        self.reader = AnswerReader(
            whole.image_encoder.config,
            {source.name: cast(Style, source.style) for source in sources},
            config.data.augment,
        )

    def loss(self, batch: Answers) -> Tensor:
        logits_PTV = self.model(batch.pictures, batch.ids_PT[:, :-1])
        said_PT = batch.supervised_PT[:, 1:]
        return F.cross_entropy(logits_PTV[said_PT].float(), batch.ids_PT[:, 1:][said_PT], reduction="sum")

    def n_tokens(self, batch: Answers) -> int:
        """Tokens that the encoder makes of the pictures."""
        return int(batch.pictures.valid_PN.sum()) * self.model.image_encoder.config.n_tokens

    def audio_seconds(self, batch: Answers) -> float:
        return 0.0

    def gauges(self) -> dict[str, float]:
        return {}

    def freeze_precision(self) -> None:
        """Nothing: what is frozen does not run."""

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """The prediction is the decoder's greedy answer of at most `max_new_tokens` letters."""
        prepared = [self.reader.prepare(raw) for raw in raws]
        exchanged = [self.reader.exchange(raw) for raw in raws]
        pictures = self.reader.collate(prepared).pictures.to(self.model.head.scores.weight.device)
        said = self.model.answer(pictures, [question for question, _ in exchanged], max_new_tokens)
        rows = [
            Shown(picture_of(raw, None), question, answer, text)
            for raw, (question, answer), text in zip(raws, exchanged, said, strict=True)
        ]
        return rows, share_right(rows)

    def export(self, directory: Path) -> None:
        self.whole.save_pretrained(directory)


def _picture(raw: RawSample, *, draw: bool) -> Image.Image:
    """The sample's one picture, or a frame of its one clip: the middle one, or any if `draw`."""
    pictures, clips = media_of(raw, "image"), media_of(raw, "video")
    if len(pictures) + len(clips) != 1:
        raise ValueError(
            f"the sample has {len(pictures)} pictures and {len(clips)} clips; this stage learns from samples with one"
        )
    if pictures:
        return load_image(pictures[0])
    frames = load_frames(clips[0], N_FRAMES)
    return frames[int(torch.randint(len(frames), ())) if draw else len(frames) // 2]
