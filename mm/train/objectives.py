"""What a stage optimises: how its samples are read, its loss, its predictions, and what it exports.

An objective knows the model and the data's meaning; the trainer knows neither.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from open_clip import SimpleTokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.images import load_image
from data.shards import Sample as RawSample
from lm.checkpoint import load_strict, read_json
from mm.checkpoint import compose
from mm.config import from_mapping
from mm.generate import generate
from mm.model import MultimodalLlama
from mm.processor import Batch, Processor, Sample, Style
from mm.train.config import DTYPES, TrainConfig
from mm.train.loss import count_targets, next_token_loss
from vision.contrastive import ContrastiveModel
from vision.encoder import PRESETS, ImageEncoder, ImageEncoderConfig
from vision.pretrained import init_stem
from vision.tiling import Pictures, Tiles, tile_image


class Reader(Protocol):
    """Turns raw samples into batches; runs in worker processes, so it is small and picklable."""

    def length(self, raw: RawSample) -> int:
        """Tokens of a sample, by which batches are bucketed."""

    def prepare(self, raw: RawSample) -> Any:
        """Decodes a sample; raises `ValueError` for one that cannot be used."""

    def answer(self, raw: RawSample) -> str:
        """What a prediction should say."""

    def count(self, sample: Any) -> int:
        """How many loss terms a prepared sample adds; the loss is their mean over the global batch."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Batches prepared samples."""


class Objective(Protocol):
    """A model under training."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def reader(self) -> Reader: ...

    def loss(self, batch: Any) -> Tensor:
        """Sum of the batch's loss terms."""

    def n_tokens(self, batch: Any) -> int:
        """Text tokens, padding not counted."""

    def gauges(self) -> dict[str, float]:
        """Values of the model worth plotting."""

    def predict(self, raws: Sequence[RawSample], max_new_tokens: int) -> list[str]:
        """The model's answer for each sample."""

    def freeze_precision(self) -> None:
        """Holds what is frozen in the compute dtype."""

    def export(self, directory: Path) -> None:
        """Writes what the next stage starts from."""


def make_objective(config: TrainConfig) -> Objective:
    """Builds the stage's model, on the CPU and in FP32."""
    return Contrastive(config) if config.stage_spec.loss == "contrastive" else NextToken(config)


# ---------------------------------------------------------------------------------------------------- next token


def as_caption(raw: RawSample) -> list[dict[str, Any]]:
    """The sample's pictures with its caption, whatever else was asked about them."""
    if raw.caption is None or not raw.caption.strip():
        raise ValueError(f"sample {raw.key!r} of {raw.source!r} has no caption (.txt), which style plain needs")
    pictures = [{"type": "image", "image": picture} for picture in pictures_of(raw)]
    caption = {"role": "assistant", "content": [{"type": "text", "text": raw.caption.strip()}]}
    return [{"role": "user", "content": pictures}, caption]


def split_answer(raw: RawSample, messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """A sample's messages without its last answer, and that answer.

    Raises:
        ValueError: the assistant does not speak last.
    """
    *before, last = messages
    if last["role"] != "assistant":
        raise ValueError(f"sample {raw.key!r} of {raw.source!r} does not end with an answer")
    return before, _text(last)


def last_question(raw: RawSample) -> str:
    """The text of the user's last turn."""
    turns = [message for message in raw.messages if message["role"] == "user"]
    return _text(turns[-1]) if turns else ""


def pictures_of(raw: RawSample) -> list[bytes]:
    """A sample's encoded pictures in reading order."""
    contents = [message["content"] for message in raw.messages]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def _text(message: Mapping[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


@dataclass(frozen=True)
class ConversationReader:
    """Reads samples as conversations or captions for next-token prediction.

    Attributes:
        styles: source name -> "chat" or "plain".
        max_tokens: longer samples are refused.
    """

    processor: Processor
    styles: dict[str, Style]
    max_tokens: int

    def messages(self, raw: RawSample) -> list[dict[str, Any]]:
        return as_caption(raw) if self.styles[raw.source] == "plain" else raw.messages

    def length(self, raw: RawSample) -> int:
        return len(self.processor.tokenize(self.messages(raw), style=self.styles[raw.source]).ids)

    def prepare(self, raw: RawSample) -> Sample:
        sample = self.processor.encode(self.messages(raw), style=self.styles[raw.source], key=f"{raw.source}/{raw.key}")
        if len(sample.ids) > self.max_tokens:
            raise ValueError(f"{len(sample.ids)} tokens are more than the language model's {self.max_tokens}")
        if self.count(sample) == 0:
            raise ValueError("nothing in the sample is supervised")
        return sample

    def prompt(self, raw: RawSample) -> list[dict[str, Any]]:
        """The sample's messages before its last answer."""
        return split_answer(raw, self.messages(raw))[0]

    def answer(self, raw: RawSample) -> str:
        return split_answer(raw, self.messages(raw))[1]

    def count(self, sample: Sample) -> int:
        return count_targets(sample)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return self.processor.collate(samples, pad_side="right")


class NextToken:
    """Next-token prediction with the frozen language model: image-adapter, image-anneal, image-sft."""

    def __init__(self, config: TrainConfig) -> None:
        self.model = load_model(config)
        self.dtype = DTYPES[config.dtype]
        self.reader = ConversationReader(
            self.model.processor,
            {source.name: cast(Style, source.style) for source in (*config.data.sources, *config.data.heldout)},
            self.model.config.lm.max_seq_len,
        )

    def loss(self, batch: Batch) -> Tensor:
        return next_token_loss(self.model, batch)

    def n_tokens(self, batch: Batch) -> int:
        return int(batch.valid_BT.sum())

    def gauges(self) -> dict[str, float]:
        assert self.model.image_adapter is not None
        gates = self.model.image_adapter.gates()
        return {f"gates/{kind}.{i}": pair[k] for i, pair in gates.items() for k, kind in enumerate(("attn", "mlp"))}

    def freeze_precision(self) -> None:
        self.model.lm.to(self.dtype)

    def predict(self, raws: Sequence[RawSample], max_new_tokens: int) -> list[str]:
        """Greedy answers, in each source's own style."""
        answers: dict[int, str] = {}
        for style in set(self.reader.styles.values()):
            rows = [i for i, raw in enumerate(raws) if self.reader.styles[raw.source] == style]
            prompts = [self.reader.prompt(raws[i]) for i in rows]
            replies = generate(self.model, messages=prompts, style=style, max_new_tokens=max_new_tokens) if rows else []
            assert isinstance(replies, list)
            answers |= {i: reply.text.strip() for i, reply in zip(rows, replies, strict=True)}
        return [answers[i] for i in range(len(raws))]

    def export(self, directory: Path) -> None:
        self.model.save_pretrained(directory)


def load_model(config: TrainConfig) -> MultimodalLlama:
    """The model that a stage of next-token prediction starts from."""
    source = config.model
    if source.init_from:
        model = MultimodalLlama.from_pretrained(source.init_from)
    else:
        assert source.lm is not None
        model = compose(source.lm, source.image)
    if model.config.image is None or model.image_encoder is None:
        raise ValueError(
            f"model.init_from: {source.init_from} has no image part; start image-adapter from lm and image"
        )
    if source.encoder:
        load_encoder(source.encoder, model.image_encoder)
    if source.stem:
        init_stem(model.image_encoder, source.stem)
    if source.open_gates is not None:
        assert model.image_adapter is not None
        model.image_adapter.open_gates(source.open_gates)
    if source.swap_lm:
        model.swap_lm(source.swap_lm)
    if config.data.tile_size:
        model.resize_tiles(config.data.tile_size)
    return model


# --------------------------------------------------------------------------------------------------- contrastive


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

    def prepare(self, raw: RawSample) -> Pair:
        pictures = pictures_of(raw)
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


class Contrastive:
    """Pictures and their captions meet in one space: image-encoder."""

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

    def freeze_precision(self) -> None:
        """Nothing: what is frozen here is small."""

    def predict(self, raws: Sequence[RawSample], max_new_tokens: int) -> list[str]:
        """The nearest of the samples' captions."""
        device = self.model.logit_scale.device
        pairs = [self.reader.prepare(raw) for raw in raws]
        pictures = Pictures.collate([pair.tiles for pair in pairs]).to(device)
        return self.model.zero_shot(pictures, sorted({pair.caption for pair in pairs}))

    def export(self, directory: Path) -> None:
        save_encoder(self.model.image_encoder, directory)


def save_encoder(encoder: ImageEncoder, directory: Path) -> None:
    """Writes an image encoder as `encoder.safetensors` and `config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, directory / "encoder.safetensors")
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(encoder.config), indent=2) + "\n")


def load_encoder(directory: str | Path, encoder: ImageEncoder) -> None:
    """Fills an encoder from `save_encoder`'s files; positions are interpolated where the tile size differs.

    Raises:
        ValueError: the files are missing, or of an encoder of another shape; says in what.
    """
    directory = Path(directory)
    if not (directory / "encoder.safetensors").exists():
        raise ValueError(
            f"model.encoder: {directory} is no export of stage image-encoder; it has no encoder.safetensors"
        )
    saved_config = from_mapping(
        ImageEncoderConfig, read_json(directory / "config.json"), str(directory / "config.json")
    )
    saved = ImageEncoder(saved_config)
    load_strict(saved, load_file(directory / "encoder.safetensors"), str(directory))
    if saved_config.tile_size != encoder.config.tile_size:
        saved.resize(encoder.config.tile_size)
    for name, value in dataclasses.asdict(encoder.config).items():
        if getattr(saved.config, name) != value:
            raise ValueError(f"model.encoder: {directory} has {name} {getattr(saved.config, name)}, this model {value}")
    encoder.load_state_dict(saved.state_dict())
