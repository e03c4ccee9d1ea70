"""Next-token prediction with the frozen language model: every stage of a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.shards import Sample as RawSample
from data.speech import speech_length
from mm.generate import generate
from mm.model import MultimodalLlama
from mm.processor import Batch, Processor, Sample, Style
from mm.sheet import Shown
from mm.train.config import DTYPES, UNVARIED, AugmentConfig, TrainConfig
from mm.train.feature_cache import FeatureCache
from mm.train.loss import count_targets, next_token_loss
from mm.train.objective import Objective
from mm.train.reading import as_caption, first_question, media_of, one_exchange, read_varied, split_answer
from mm.train.showing import gate_gauges, picture_of, recognition_scores, share_right
from mm.train.start import load_model

#: Media that every sample must have in the stages that learn from them: what else it shows goes through frozen parts.
NEEDED = {"audio": "recording", "video": "clip"}
#: Rows of up to so many tokens are short: on a CPU, torch's fused attention is slow on the way back there (docs/LOG.md).
SHORT_ROW = 128


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
            hear=partial(read_varied, vary=vary),
        )
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


class NextToken(Objective[MultimodalLlama, ConversationReader]):
    """A whole model that learns to say what comes next."""

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
        with attention_for(batch.ids_BT):
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
        return gate_gauges(adapter) if adapter is not None else {}

    def freeze_precision(self) -> None:
        """The language model alone: frozen eyes go into the export, where nothing may have rounded them."""
        self.model.lm.to(self.dtype)

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """Transcripts are scored by their errors, other answers by the share that is right."""
        log_mel = self.model.processor.log_mel
        rows = [
            Shown(picture_of(raw, log_mel), first_question(raw.messages), self.reader.answer(raw), answer)
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


def attention_for(ids_BT: Tensor) -> AbstractContextManager[object]:
    """Within it, attention is computed as is faster for a step of training."""
    is_short = ids_BT.device.type == "cpu" and ids_BT.shape[1] <= SHORT_ROW
    return sdpa_kernel(SDPBackend.MATH) if is_short else nullcontext()
