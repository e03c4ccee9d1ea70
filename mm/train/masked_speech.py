"""Stage speech-encoder: BEST-RQ, the codes of masked speech are predicted (section 8.3.1).

Shape letters: B rows, T mel frames (10 ms), M mel bins, S encoder frames (40 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.shards import Sample as RawSample
from data.speech import speech_length
from mm.processor import pad_frames, read_mel
from mm.sheet import Shown, mel_picture
from mm.train.config import TrainConfig
from mm.train.encoders import save_encoder
from mm.train.objective import Objective
from mm.train.reading import recording_of
from speech.bestrq import BestRQ, BestRQConfig, BestRQOutput, mask_frames, masked_groups, random_crop
from speech.conformer import PRESETS, Conformer
from speech.features import FeaturesConfig, LogMel


@dataclass
class MaskedClip:
    """An utterance, and which of its frames are hidden."""

    mel_TM: Tensor
    mask_T: Tensor
    key: str


@dataclass
class MaskedClips:
    """A batch of utterances, padded with zeros that are not hidden."""

    mel_BTM: Tensor
    n_frames_B: Tensor
    mask_BT: Tensor
    keys: list[str]

    def to(self, device: torch.device | str) -> MaskedClips:
        return MaskedClips(self.mel_BTM.to(device), self.n_frames_B.to(device), self.mask_BT.to(device), self.keys)


@dataclass(frozen=True)
class MaskedReader:
    """Reads each sample as its recording and draws the mask with it.

    The loss terms are then known before the first of them is computed, and do not depend on how a batch is cut.
    """

    config: BestRQConfig
    stack: int
    log_mel: LogMel = field(repr=False)

    def length(self, raw: RawSample) -> int:
        return speech_length(raw)

    def prepare(self, raw: RawSample, *, augment: bool = False) -> MaskedClip:
        mel_TM = random_crop(read_mel(recording_of(raw), self.log_mel), self.config.max_frames)
        mask_1T = mask_frames(torch.tensor([len(mel_TM)]), len(mel_TM), self.config)
        return MaskedClip(mel_TM, mask_1T[0], f"{raw.source}/{raw.key}")

    def count(self, sample: MaskedClip) -> int:
        n_frames = torch.tensor([len(sample.mel_TM)])
        return int(masked_groups(sample.mask_T[None], n_frames, self.stack).sum()) * self.config.n_codebooks

    def collate(self, samples: Sequence[MaskedClip]) -> MaskedClips:
        return MaskedClips(
            pad_frames([clip.mel_TM for clip in samples]),
            torch.tensor([len(clip.mel_TM) for clip in samples]),
            pad_frames([clip.mask_T for clip in samples]),
            [clip.key for clip in samples],
        )


class MaskedSpeech(Objective[BestRQ, MaskedReader]):
    """A Conformer, and the quantiser and heads that are thrown away."""

    def __init__(self, config: TrainConfig) -> None:
        assert config.model.encoder is not None
        encoder = Conformer(PRESETS[config.model.encoder]())
        self.model = BestRQ(encoder, config.model.best_rq)
        self.features = FeaturesConfig(n_mels=encoder.config.n_mels)
        self.reader = MaskedReader(config.model.best_rq, encoder.config.stack, LogMel(self.features))
        self._last: BestRQOutput | None = None

    def loss(self, batch: MaskedClips) -> Tensor:
        # The noise comes from PyTorch's own generator, row after row, so it does not depend on the cut either.
        self._last = self.model(batch.mel_BTM, batch.n_frames_B, mask_BT=batch.mask_BT)
        return self._last.loss_sum

    def n_tokens(self, batch: MaskedClips) -> int:
        return int(self.model.encoder.config.n_outputs(batch.n_frames_B).sum())

    def audio_seconds(self, batch: MaskedClips) -> float:
        return int(batch.n_frames_B.sum()) * self.features.hop / self.features.sample_rate

    def gauges(self) -> dict[str, float]:
        """Of the last micro-batch."""
        assert self._last is not None
        return {
            "masked_accuracy": self._last.accuracy.item(),
            "codebook_usage_entropy": self._last.codebook_usage_entropy.item(),
        }

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """Draws what was hidden, and how much of it was guessed."""
        rows, n_right, n_terms = [], 0.0, 0
        for raw in raws:
            clip = self.reader.prepare(raw)
            batch = self.reader.collate([clip]).to(self.model.heads.weight.device)
            output = self.model(batch.mel_BTM, batch.n_frames_B, mask_BT=batch.mask_BT)
            n_right += output.accuracy.item() * output.n_terms
            n_terms += output.n_terms
            found = f"{clip.mask_T.float().mean():.0%} hidden, {output.accuracy.item():.1%} of the codes found"
            rows.append(Shown(mel_picture(clip.mel_TM, clip.mask_T), raw.caption or raw.key, found))
        return rows, {"masked_accuracy": n_right / max(n_terms, 1)}

    def export(self, directory: Path) -> None:
        save_encoder(self.model.encoder, directory)
