"""What a stage optimises: how its samples are read, its loss, its predictions, and what it exports.

An objective knows the model and the data's meaning; the trainer knows neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from data.shards import Sample as RawSample
from data.speech import speech_length
from mm.checkpoint import compose, give
from mm.config import PART_OF_MEDIUM
from mm.generate import generate
from mm.model import MultimodalLlama
from mm.processor import Batch, Processor, Sample, Style
from mm.sheet import Shown
from mm.train.answering import Answering
from mm.train.config import DTYPES, UNVARIED, AugmentConfig, TrainConfig
from mm.train.contrastive import Contrastive
from mm.train.encoders import load_encoder
from mm.train.feature_cache import FeatureCache
from mm.train.loss import count_targets, next_token_loss
from mm.train.masked_speech import MaskedSpeech
from mm.train.mel_prediction import MelPrediction
from mm.train.naming import Naming
from mm.train.normalizing import Normalizing
from mm.train.prosody_prediction import ProsodyPrediction
from mm.train.reading import as_caption, first_question, media_of, one_exchange, split_answer
from mm.train.showing import picture_of, recognition_scores, share_right
from mm.train.spelling import Aligning, Spelling
from mm.train.vocoding import Vocoding
from vision.pretrained import init_stem
from vision.tiling import Pictures, tile_image

#: Media that every sample must have in the stages that learn from them: what else it shows goes through frozen parts.
NEEDED = {"audio": "recording", "video": "clip"}


class Reader(Protocol):
    """Turns raw samples into batches; runs in worker processes, so it is small and picklable."""

    def length(self, raw: RawSample) -> int:
        """Size of a sample (tokens, or milliseconds), by which batches are bucketed; opens no medium."""

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Any:
        """Decodes a sample, varied as the run's `data.augment` says if `augment`.

        What it draws comes from torch's global generator, which the caller seeds.

        Raises:
            ValueError: the sample cannot be used.
        """

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
        """Tokens, padding not counted; encoder frames where speech alone is trained."""

    def audio_seconds(self, batch: Any) -> float:
        """Length of the batch's recordings."""

    def gauges(self) -> dict[str, float]:
        """Values of the model worth plotting."""

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """What the model makes of held-out samples: drawn, one entry each, and scored, by name."""

    def freeze_precision(self) -> None:
        """Holds what is frozen in the compute dtype."""

    def export(self, directory: Path) -> None:
        """Writes what the next stage starts from."""


@runtime_checkable
class FollowsSteps(Protocol):
    """An objective whose loss depends on how far the run is."""

    def begin(self, step: int) -> None:
        """Told before each step which one it is, counted from 0."""


def make_objective(config: TrainConfig) -> Objective:
    """Builds the stage's model, on the CPU and in FP32."""
    match config.stage_spec.loss:
        case "contrastive":
            return Contrastive(config)
        case "letters":
            return Answering(config, load_model(config))
        case "best-rq":
            return MaskedSpeech(config)
        case "ctc":
            return Spelling(config)
        case "token-ctc":
            return Aligning(config, load_model(config))
        case "caption-words":
            return Naming(config, load_model(config))
        case "next-token":
            return NextToken(config)
        case "rules":
            return Normalizing(config)
        case "prosody":
            return ProsodyPrediction(config)
        case "mel":
            return MelPrediction(config)
        case "waveform":
            return Vocoding(config)


@dataclass(frozen=True)
class ConversationReader:
    """Reads samples as conversations or captions for next-token prediction.

    Attributes:
        styles: source name -> "chat" or "plain".
        tasks: source name -> what is asked about its recordings (`mm.train.config.TASKS`); None leaves it to the samples.
        max_tokens: longer samples are refused.
        augment: how recordings are varied for training.
        medium: kind of medium that the stage learns from.
        one_question: names of the sources whose conversations give one question: the first, or in training any.
    """

    processor: Processor
    styles: dict[str, Style]
    tasks: dict[str, str | None]
    max_tokens: int
    augment: AugmentConfig
    medium: str
    one_question: frozenset[str] = frozenset()

    def messages(self, raw: RawSample, *, draw: bool = False) -> list[dict[str, Any]]:
        """What is read of a sample; `draw` takes any question where one is enough."""
        if self.styles[raw.source] == "plain":
            return as_caption(raw)
        if raw.source not in self.one_question:
            return raw.messages
        return one_exchange(raw, draw=draw)

    def length(self, raw: RawSample) -> int:
        # Draws what `prepare` will: the stream seeds both alike, and this is the first thing that either draws.
        encoded = self.processor.tokenize(self.messages(raw, draw=True), style=self.styles[raw.source])
        speech, n_audio_tokens = self.processor.speech, 0
        if speech and any(span.kind == "audio" for span in encoded.media):
            n_samples = speech_length(raw) * speech.features.sample_rate // 1000
            n_audio_tokens = speech.n_tokens(speech.features.n_frames(n_samples))
        return len(encoded.ids) + n_audio_tokens

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Sample:
        if self.medium in NEEDED and not media_of(raw, self.medium):
            raise ValueError(f"the sample has no {NEEDED[self.medium]}, and nothing else is learnt from")
        if self.medium == "audio":
            self._check_question(raw)
        vary = self.augment if augment else UNVARIED
        sample = self.processor.encode(
            self.messages(raw, draw=augment),
            style=self.styles[raw.source],
            key=f"{raw.source}/{raw.key}",
            augment_audio=vary.vary_waveform,
        )
        sample.mels = [vary.vary_mel(mel_TM) for mel_TM in sample.mels]
        if len(sample.ids) > self.max_tokens:
            raise ValueError(f"{len(sample.ids)} tokens are more than max_tokens {self.max_tokens}")
        if self.count(sample) == 0:
            raise ValueError("nothing in the sample is supervised")
        return sample

    def _check_question(self, raw: RawSample) -> None:
        """Refuses recordings about which nothing was asked or answered."""
        if raw.messages[-1]["role"] != "assistant":
            raise ValueError("the sample has no reply yet; see mm.train.dialogue_targets")
        if self.tasks[raw.source] is None and "conversations" not in raw.metadata:
            raise ValueError("the sample is a recording with a text; say what is asked by the source's `task`")

    def task(self, raw: RawSample) -> str | None:
        return self.tasks[raw.source] or raw.metadata.get("task")

    def prompt(self, raw: RawSample) -> list[dict[str, Any]]:
        """The sample's messages before its first answer."""
        return split_answer(raw, self.messages(raw))[0]

    def answer(self, raw: RawSample) -> str:
        return split_answer(raw, self.messages(raw))[1]

    def count(self, sample: Sample) -> int:
        return count_targets(sample)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return self.processor.collate(samples, pad_side="right")


class NextToken:
    """Next-token prediction with the frozen language model: every stage of a whole model."""

    def __init__(self, config: TrainConfig) -> None:
        self.model = load_model(config)
        self.dtype = DTYPES[config.dtype]
        self.medium = config.medium
        self.features: FeatureCache | None = None
        if config.data.feature_cache is not None:
            assert self.model.image_encoder is not None
            self.features = FeatureCache(config.data.feature_cache, self.model.image_encoder)
        sources = (*config.data.sources, *config.data.heldout)
        max_seq_len = self.model.config.lm.max_seq_len
        self.reader = ConversationReader(
            self.model.processor,
            {source.name: cast(Style, source.style) for source in sources},
            {source.name: source.task for source in sources},
            min(config.data.max_tokens or max_seq_len, max_seq_len),
            config.data.augment,
            config.medium,
            frozenset(source.name for source in sources if source.one_question),
        )

    def loss(self, batch: Batch) -> Tensor:
        if self.features is not None and batch.clips is not None:
            batch = replace(batch, frame_features_PNLF=self.features(batch.clips))
        return next_token_loss(self.model, batch)

    def n_tokens(self, batch: Batch) -> int:
        return int(batch.valid_BT.sum())

    def audio_seconds(self, batch: Batch) -> float:
        speech = self.model.config.speech
        if speech is None or batch.n_frames_A is None:
            return 0.0
        return int(batch.n_frames_A.sum()) * speech.features.hop / speech.features.sample_rate

    def gauges(self) -> dict[str, float]:
        """How far the gates under training are open."""
        adapter = {"image": self.model.image_adapter, "video": self.model.video_adapter}.get(self.medium)
        gates = adapter.gates() if adapter is not None else {}
        return {f"gates/{kind}.{i}": pair[k] for i, pair in gates.items() for k, kind in enumerate(("attn", "mlp"))}

    def freeze_precision(self) -> None:
        """The language model alone: frozen eyes go into the export, where nothing may have rounded them."""
        self.model.lm.to(self.dtype)

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """Transcripts are scored by their errors, other answers by the share that is right."""
        log_mel = self.model.processor.log_mel
        rows = [
            Shown(picture_of(raw, log_mel), first_question(raw), self.reader.answer(raw), answer)
            for raw, answer in zip(raws, self.predict(raws, max_new_tokens), strict=True)
        ]
        transcribed = [i for i, raw in enumerate(raws) if self.reader.task(raw) == "asr"]
        languages = [str(raws[i].metadata.get("language") or "English") for i in transcribed]
        others = [row for i, row in enumerate(rows) if i not in transcribed]
        return rows, share_right(others) | recognition_scores([rows[i] for i in transcribed], languages)

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
