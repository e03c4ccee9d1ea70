"""Stage tts-prosody: duration, pitch and loudness of each phone of a recording are predicted (section 8.3.2).

The language model is read, never run: its features come from a folder of `mm.train.lm_features`.

The loss is the mean squared error of the three, each at variance 1: they are measured by their RMSE, and recordings of a
synthesised voice differ little where their texts do not. Half of it is what steps predict that are told the recording's own
prosody, half what they predict once told those predictions, as they will be told their own when the model speaks; else errors
would add up.

Shape letters: B rows, N phones, S language-model tokens, F their feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data.shards import Sample as RawSample
from data.voice import VoiceSample, read_voice
from mm.eval.prosody_measures import contours, prosody_errors, rmse
from mm.sheet import Shown
from mm.train.config import TrainConfig
from mm.train.lm_features import FeatureFolder, TextFeatures, open_features
from mm.train.objective import Objective
from mm.voice import save_part
from speech.phone_batch import PhoneBatch, PhoneIds
from speech.phone_prosody import phone_prosody
from speech.prosody import ProsodyModel
from speech.streaming import below
from speech.voice_features import VoiceFeaturesConfig


@dataclass
class ProsodySample:
    """An utterance: its phones, whose chunks count language-model tokens, and their prosody.

    Attributes:
        spoken: as it was read.
        is_voiced_N: whether any frame of a phone has a pitch.
        lm: features of the text, where the model reads any.
    """

    spoken: VoiceSample
    phones: list[PhoneIds]
    prosody_N3: Tensor
    is_voiced_N: Tensor
    lm: TextFeatures | None
    key: str


@dataclass
class ProsodyBatch:
    """Several of them; zeros past a row's end."""

    phones: PhoneBatch
    prosody_BN3: Tensor
    features_BSF: Tensor | None
    n_features_B: Tensor | None
    keys: list[str]

    def to(self, device: torch.device | str) -> ProsodyBatch:
        features_BSF, n_features_B = (
            None if x is None else x.to(device) for x in (self.features_BSF, self.n_features_B)
        )
        return ProsodyBatch(self.phones.to(device), self.prosody_BN3.to(device), features_BSF, n_features_B, self.keys)


@dataclass(frozen=True)
class ProsodyReader:
    """Reads samples of `mm data make voice`; each phone is three terms of the loss.

    Attributes:
        folders: source name -> its language-model features; empty for a model that reads phones alone.
    """

    folders: Mapping[str, FeatureFolder]

    def length(self, raw: RawSample) -> int:
        return len(raw.metadata["phones"])

    def prepare(self, raw: RawSample, *, augment: bool = False) -> ProsodySample:
        sample = read_voice(raw, waveform=False)
        if sample.log_power_T is None:
            raise ValueError(f"sample {raw.key!r} has no power.npy; make the voice again")
        frames_N = torch.tensor([phone.frames for phone in sample.phones])
        is_voiced_N = torch.stack([f0_T.any() for f0_T in sample.f0_T.split(frames_N.tolist())])
        lm = self.folders[raw.source][raw.key] if self.folders else None
        return ProsodySample(
            spoken=sample,
            phones=phone_ids(sample, lm[1] if lm else ()),
            prosody_N3=phone_prosody(frames_N, sample.f0_T, sample.log_power_T),
            is_voiced_N=is_voiced_N,
            lm=lm,
            key=f"{raw.source}/{raw.key}",
        )

    def count(self, sample: ProsodySample) -> int:
        return sample.prosody_N3.numel()

    def collate(self, samples: Sequence[ProsodySample]) -> ProsodyBatch:
        lm = [sample.lm[0] for sample in samples if sample.lm is not None]
        return ProsodyBatch(
            PhoneBatch.collate([sample.phones for sample in samples], [sample.spoken.speaker for sample in samples]),
            pad_sequence([sample.prosody_N3 for sample in samples], batch_first=True),
            pad_sequence(lm, batch_first=True) if lm else None,
            torch.tensor([len(features_SF) for features_SF in lm]) if lm else None,
            [sample.key for sample in samples],
        )


def phone_ids(sample: VoiceSample, ends: Sequence[int]) -> list[PhoneIds]:
    """The phones of an utterance. A phone's chunk ends with the token that completes its word or mark.

    Args:
        ends: characters of the text that are known after each language-model token; none for phones alone.
    """
    ids, chunk = [], 0
    for phone in sample.phones:
        while chunk < len(ends) - 1 and ends[chunk] < phone.end:
            chunk += 1
        ids.append(PhoneIds.make(phone.ipa, phone.stress, phone.place, phone.mark, chunk))
    return ids


class ProsodyPrediction(Objective[nn.ModuleDict, ProsodyReader]):
    """A new prosody model."""

    def __init__(self, config: TrainConfig) -> None:
        self.prosody = ProsodyModel(config.model.prosody)
        self.model = nn.ModuleDict({"prosody": self.prosody})
        self.reader = ProsodyReader(open_features(config.data, config.model.prosody.lm))

    def loss(self, batch: ProsodyBatch) -> Tensor:
        told_BN3, losses = batch.prosody_BN3, []
        for _ in range(2):
            predicted_BN3 = self.prosody(batch.phones, told_BN3, batch.features_BSF, batch.n_features_B)
            error_BN3 = (predicted_BN3 - batch.prosody_BN3) / self.prosody.prosody_std  # zeros past a row's end
            losses.append(error_BN3.square().sum())
            told_BN3 = predicted_BN3.detach()
        return 0.5 * (losses[0] + losses[1])

    def n_tokens(self, batch: ProsodyBatch) -> int:
        return int(batch.phones.n_phones_B.sum())

    def audio_seconds(self, batch: ProsodyBatch) -> float:
        is_real_BN = below(batch.phones.n_phones_B, batch.prosody_BN3.shape[1])
        frames = float(batch.prosody_BN3[..., 0].exp()[is_real_BN].sum())
        return frames * VoiceFeaturesConfig().hop / VoiceFeaturesConfig().sample_rate

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """Draws the true prosody and the predicted one, each step told its own predictions, and measures these."""
        samples = [self.reader.prepare(raw) for raw in raws]
        predicted = predict(self.prosody, self.reader, samples)
        errors = [
            prosody_errors(made_N3, sample.prosody_N3, sample.is_voiced_N)
            for made_N3, sample in zip(predicted, samples, strict=True)
        ]
        rows = [
            Shown(contours(sample.prosody_N3, made_N3), raw.metadata["text"], str(error))
            for raw, sample, made_N3, error in zip(raws, samples, predicted, errors, strict=True)
        ]
        return rows, {f"rmse_{name}": value.value for name, value in rmse(errors).items()}

    def export(self, directory: Path) -> None:
        save_part(self.prosody, directory, "prosody")


def predict(prosody: ProsodyModel, reader: ProsodyReader, samples: Sequence[ProsodySample]) -> list[Tensor]:
    """Prosody `(N, 3)` of each utterance, each step told what the one before predicted."""
    batch = reader.collate(samples).to(prosody.head.weight.device)
    predicted_BN3 = prosody.predict(batch.phones, batch.features_BSF, batch.n_features_B).cpu()
    return [row_N3[: len(sample.phones)] for row_N3, sample in zip(predicted_BN3, samples, strict=True)]
