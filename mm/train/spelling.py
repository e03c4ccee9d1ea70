"""Stage speech-ctc: the encoder spells what it hears; a warm start for small budgets, and the probe of pre-training.

Shape letters: B rows, T mel frames (10 ms), M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.shards import Sample as RawSample
from data.speech import speech_length
from mm.processor import read_mel
from mm.sheet import Shown, mel_picture
from mm.train.config import UNVARIED, AugmentConfig, TrainConfig
from mm.train.encoders import read_encoder, save_encoder
from mm.train.reading import recording_of, spelling_of
from mm.train.showing import recognition_scores, share_right
from speech.conformer import PRESETS, Conformer
from speech.ctc import CTCProbe, spell
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
    """Reads each sample as its recording and its spelling (`mm.train.reading.spelling_of`)."""

    stack: int
    augment: AugmentConfig
    log_mel: LogMel = field(repr=False)

    def length(self, raw: RawSample) -> int:
        return speech_length(raw)

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Utterance:
        vary = self.augment if augment else UNVARIED
        text = self.answer(raw)
        mel_TM = vary.vary_mel(read_mel(recording_of(raw), self.log_mel, vary.vary_waveform))
        letters = spell(text)
        # One encoder frame for each letter, and a blank between equal ones.
        if (n_needed := len(letters) + sum(a == b for a, b in pairwise(letters))) > -(-len(mel_TM) // self.stack):
            raise ValueError(
                f"{len(mel_TM)} mel frames are too few to spell {text!r}, which needs {n_needed * self.stack}"
            )
        return Utterance(mel_TM, text, f"{raw.source}/{raw.key}")

    def answer(self, raw: RawSample) -> str:
        return spelling_of(raw)

    def count(self, sample: Utterance) -> int:
        return len(sample.text)

    def collate(self, samples: Sequence[Utterance]) -> Utterances:
        return Utterances(
            pad_sequence([utterance.mel_TM for utterance in samples], batch_first=True),
            torch.tensor([len(utterance.mel_TM) for utterance in samples]),
            [utterance.text for utterance in samples],
            [utterance.key for utterance in samples],
        )


class Spelling:
    """A Conformer, new or from an export, and the head that is thrown away."""

    def __init__(self, config: TrainConfig) -> None:
        source = config.model.encoder
        assert source is not None
        encoder = Conformer(PRESETS[source]()) if source in PRESETS else read_encoder(source, Conformer)
        self.model = CTCProbe(encoder)
        self.features = FeaturesConfig(n_mels=encoder.config.n_mels)
        self.reader = SpellingReader(encoder.config.stack, config.data.augment, LogMel(self.features))

    def loss(self, batch: Utterances) -> Tensor:
        return self.model.loss(batch.mel_BTM, batch.n_frames_B, batch.texts).loss_sum

    def n_tokens(self, batch: Utterances) -> int:
        return int(self.model.encoder.config.n_outputs(batch.n_frames_B).sum())

    def audio_seconds(self, batch: Utterances) -> float:
        return int(batch.n_frames_B.sum()) * self.features.hop / self.features.sample_rate

    def gauges(self) -> dict[str, float]:
        return {}

    def freeze_precision(self) -> None:
        """Nothing: all of it trains."""

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """The prediction is the greedy spelling."""
        utterances = [self.reader.prepare(raw) for raw in raws]
        batch = self.reader.collate(utterances).to(self.model.head.weight.device)
        said = self.model.decode(batch.mel_BTM, batch.n_frames_B)
        rows = [
            Shown(mel_picture(utterance.mel_TM), raw.key, utterance.text, text)
            for raw, utterance, text in zip(raws, utterances, said, strict=True)
        ]
        return rows, share_right(rows) | recognition_scores(rows, ["English"])

    def export(self, directory: Path) -> None:
        save_encoder(self.model.encoder, directory)
