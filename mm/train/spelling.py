"""Stages of CTC, warm starts for small budgets: speech-ctc, where the encoder spells what it hears, which is also the probe of
pre-training; and speech-align, where encoder and adapter write it in the language model's own embeddings.

Shape letters: B rows, T mel frames (10 ms), M mel bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.shards import Sample as RawSample
from data.speech import speech_length
from lm.tokenizer import Tokenizer
from mm.model import MultimodalLlama
from mm.processor import pad_frames
from mm.sheet import Shown, mel_picture
from mm.train.config import DTYPES, UNVARIED, AugmentConfig, TrainConfig
from mm.train.encoders import read_encoder, save_encoder
from mm.train.objective import Objective
from mm.train.reading import read_once, read_varied, recording_of, spelling_of
from mm.train.showing import recognition_scores, share_right
from speech.conformer import PRESETS, Conformer
from speech.ctc import CTCModel, CTCProbe, Symbols, TokenCTC, n_frames_needed
from speech.features import FeaturesConfig, LogMel


@dataclass
class Utterance:
    """A recording and what is said in it."""

    mel_TM: Tensor
    text: str
    key: str


@dataclass
class Utterances:
    """A batch of recordings, padded with zeros, and what is said in them."""

    mel_BTM: Tensor
    n_frames_B: Tensor
    texts: list[str]
    keys: list[str]

    def to(self, device: torch.device | str) -> Utterances:
        return Utterances(self.mel_BTM.to(device), self.n_frames_B.to(device), self.texts, self.keys)


@dataclass(frozen=True)
class SpellingReader:
    """Reads each sample as its recording and its spelling (`mm.train.reading.spelling_of`).

    Attributes:
        symbols: what spellings are written with in the end.
        stack: mel frames for each of them, at least.
    """

    symbols: Symbols
    stack: int
    augment: AugmentConfig
    log_mel: LogMel = field(repr=False)

    def length(self, raw: RawSample) -> int:
        return speech_length(raw)

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Utterance:
        vary = self.augment if augment else UNVARIED
        text = self.answer(raw)
        mel_TM = read_varied(recording_of(raw), self.log_mel, vary)
        if (n_needed := n_frames_needed(self.symbols.spell(text))) > -(-len(mel_TM) // self.stack):
            raise ValueError(
                f"{len(mel_TM)} mel frames are too few to spell {text!r}, which needs {n_needed * self.stack}"
            )
        return Utterance(mel_TM, text, f"{raw.source}/{raw.key}")

    def answer(self, raw: RawSample) -> str:
        return spelling_of(raw)

    def count(self, sample: Utterance) -> int:
        return len(self.symbols.spell(sample.text))

    def collate(self, samples: Sequence[Utterance]) -> Utterances:
        return Utterances(
            pad_frames([utterance.mel_TM for utterance in samples]),
            torch.tensor([len(utterance.mel_TM) for utterance in samples]),
            [utterance.text for utterance in samples],
            [utterance.key for utterance in samples],
        )


class Spelling(Objective[CTCModel, SpellingReader]):
    """A Conformer, new or from an export, and the head that is thrown away."""

    def __init__(self, config: TrainConfig) -> None:
        source = config.model.encoder
        assert source is not None
        encoder = Conformer(PRESETS[source]()) if source in PRESETS else read_encoder(source, Conformer)
        self._train(CTCProbe(encoder), encoder, FeaturesConfig(n_mels=encoder.config.n_mels), config)

    def _train(self, model: CTCModel, encoder: Conformer, features: FeaturesConfig, config: TrainConfig) -> None:
        self.model, self.encoder, self.features = model, encoder, features
        self.reader = SpellingReader(model.symbols, model.stack, config.data.augment, LogMel(features))

    def loss(self, batch: Utterances) -> Tensor:
        return self.model.loss(batch.mel_BTM, batch.n_frames_B, batch.texts).loss_sum

    def n_tokens(self, batch: Utterances) -> int:
        return int(self.encoder.config.n_outputs(batch.n_frames_B).sum())

    def audio_seconds(self, batch: Utterances) -> float:
        return int(batch.n_frames_B.sum()) * self.features.hop / self.features.sample_rate

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """The prediction is the greedy spelling."""
        utterances = [self.reader.prepare(raw) for raw in raws]
        batch = self.reader.collate(utterances).to(self.encoder.input_proj.weight.device)
        said = self.model.decode(batch.mel_BTM, batch.n_frames_B)
        rows = [
            Shown(mel_picture(utterance.mel_TM), raw.key, utterance.text, text)
            for raw, utterance, text in zip(raws, utterances, said, strict=True)
        ]
        return rows, share_right(rows) | recognition_scores(rows, ["English"])

    def export(self, directory: Path) -> None:
        save_encoder(self.encoder, directory)


class Tokens:
    """Some of a language model's tokens; a text is spelt with them if it has no others.

    Args:
        tokenizer: the language model's.
        token_ids: which of its tokens.
    """

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int]) -> None:
        self.tokenizer, self.token_ids = tokenizer, token_ids
        self._id = {token: i for i, token in enumerate(self.token_ids, start=1)}

    def __len__(self) -> int:
        return len(self.token_ids)

    def spell(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text)
        if unknown := [token for token in tokens if token not in self._id]:
            raise ValueError(f"text: the ears know no token {self.tokenizer.decode(unknown)!r}, which is in {text!r}")
        return [self._id[token] for token in tokens]

    def read(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([self.token_ids[i - 1] for i in ids])


class Aligning(Spelling):
    """A model's encoder and adapter, which learn to write in its language model's tokens.

    They get a readout of the tokens that occur in the run's transcripts, all of which are read once at the start, beside those that
    they know: over a whole vocabulary it would take most of the time.
    """

    def __init__(self, config: TrainConfig, whole: MultimodalLlama) -> None:
        encoder, adapter, speech = whole.speech_encoder, whole.speech_adapter, whole.config.speech
        assert encoder is not None and adapter is not None and speech is not None
        self.whole = whole
        tokenizer = whole.processor.chat.tokenizer
        known = set() if adapter.readout is None else set(adapter.readout.token_ids.tolist())
        whole.read_speech(sorted(known | {token for text in _transcripts(config) for token in tokenizer.encode(text)}))
        assert adapter.readout is not None
        tokens = Tokens(tokenizer, adapter.readout.token_ids.tolist())
        model = TokenCTC(encoder, adapter, tokens, whole.lm.embed_tokens.weight)
        self.dtype = DTYPES[config.dtype]
        self._train(model, encoder, speech.features, config)

    def freeze_precision(self) -> None:
        assert isinstance(self.model, TokenCTC)
        self.model.embeddings_RD = self.model.embeddings_RD.to(self.dtype)

    def export(self, directory: Path) -> None:
        self.whole.save_pretrained(directory)


def _transcripts(config: TrainConfig) -> Iterator[str]:
    """All transcripts that can be spelt; the others are the stream's to count."""
    return read_once((*config.data.sources, *config.data.heldout), spelling_of, hears=True, unit="transcript")
