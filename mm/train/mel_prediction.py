"""Stage tts-acoustic: log-mel frames and pitch from phones and their prosody, which here is the recording's own (section 8.1.2).

Shape letters: B rows, N phones, T frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.shards import Sample as RawSample
from data.voice import VoiceSample, read_voice
from mm.eval.voice_measures import fidelity, means
from mm.sheet import Shown, mel_picture
from mm.train.config import VOICE_PRESETS, TrainConfig
from mm.train.objective import Objective
from mm.voice import PARTS, load_part, save_part
from speech.acoustic import AcousticModel
from speech.phone_batch import PhoneBatch, PhoneIds
from speech.phone_prosody import phone_prosody
from speech.streaming import below
from speech.vocoder import MEL_MEAN, MEL_STD
from speech.voice_features import LogMelVoice, VoiceFeaturesConfig, log_power

#: Weights beside the log-mel bins' own error: of their change from frame to frame, of log pitch, of voicing.
CHANGE, PITCH, VOICING = 0.5, 5.0, 0.2


@dataclass
class Utterance:
    """What the acoustic model is given of one utterance."""

    phones: list[PhoneIds]
    prosody_N3: Tensor
    frames_N: Tensor
    speaker: int


@dataclass
class Utterances:
    """Several of them; zeros past a row's end."""

    phones: PhoneBatch
    prosody_BN3: Tensor
    frames_BN: Tensor

    def to(self, device: torch.device | str) -> Utterances:
        return Utterances(self.phones.to(device), self.prosody_BN3.to(device), self.frames_BN.to(device))


def utterance_of(sample: VoiceSample, features: VoiceFeaturesConfig) -> Utterance:
    """The phones of a recording with their true prosody."""
    assert sample.waveform_N is not None
    frames_N = torch.tensor([phone.frames for phone in sample.phones])
    loudness_T = sample.log_power_T
    if loudness_T is None:
        loudness_T = log_power(sample.waveform_N[None], features)[0]
    return Utterance(
        phones=[PhoneIds.make(phone.ipa, phone.stress, phone.place, phone.mark, 0) for phone in sample.phones],
        prosody_N3=phone_prosody(frames_N, sample.f0_T, loudness_T),
        frames_N=frames_N,
        speaker=sample.speaker,
    )


def collate_utterances(rows: Sequence[Utterance]) -> Utterances:
    return Utterances(
        PhoneBatch.collate([row.phones for row in rows], [row.speaker for row in rows]),
        _padded([row.prosody_N3 for row in rows]),
        _padded([row.frames_N for row in rows]),
    )


@dataclass
class Spoken:
    """An utterance, and how it sounds."""

    utterance: Utterance
    mel_TM: Tensor
    f0_T: Tensor
    key: str


@dataclass
class SpokenBatch:
    """Several of them; zeros past a row's end."""

    utterances: Utterances
    mel_BTM: Tensor
    f0_BT: Tensor
    keys: list[str]

    def to(self, device: torch.device | str) -> SpokenBatch:
        return SpokenBatch(self.utterances.to(device), self.mel_BTM.to(device), self.f0_BT.to(device), self.keys)


@dataclass(frozen=True)
class SpokenReader:
    """Reads whole utterances; each frame is a term of the loss."""

    log_mel: LogMelVoice

    def length(self, raw: RawSample) -> int:
        return sum(phone[4] for phone in raw.metadata["phones"])

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Spoken:
        features = self.log_mel.config
        sample = read_voice(raw, sample_rate=features.sample_rate, hop=features.hop)
        assert sample.waveform_N is not None
        mel_TM = self.log_mel(sample.waveform_N[None])[0]
        return Spoken(utterance_of(sample, features), mel_TM, sample.f0_T, f"{raw.source}/{raw.key}")

    def count(self, sample: Spoken) -> int:
        return len(sample.f0_T)

    def collate(self, samples: Sequence[Spoken]) -> SpokenBatch:
        return SpokenBatch(
            collate_utterances([sample.utterance for sample in samples]),
            _padded([sample.mel_TM for sample in samples]),
            _padded([sample.f0_T for sample in samples]),
            [sample.key for sample in samples],
        )


class MelPrediction(Objective[nn.ModuleDict, SpokenReader]):
    """An acoustic model."""

    def __init__(self, config: TrainConfig) -> None:
        self.acoustic: AcousticModel = start_part(config)
        self.model = nn.ModuleDict({"acoustic": self.acoustic})
        self.features = VoiceFeaturesConfig(n_mels=self.acoustic.config.n_mels)
        self.reader = SpokenReader(LogMelVoice(self.features))

    def loss(self, batch: SpokenBatch) -> Tensor:
        frames = self.acoustic(batch.utterances.phones, batch.utterances.prosody_BN3, batch.utterances.frames_BN)
        error_BTM = (frames.mel_BTM - batch.mel_BTM) / MEL_STD  # zeros past a row's end
        log_f0_BT, is_voiced_BT = batch.f0_BT.clamp(min=1).log(), batch.f0_BT > 0
        is_real_BT = below(frames.n_frames_B, batch.f0_BT.shape[1])
        change_BTM = error_BTM.diff(dim=1).where(is_real_BT[:, 1:, None], 0)
        voicing = F.binary_cross_entropy_with_logits(frames.voicing_BT, is_voiced_BT.float(), reduction="none")
        return (
            error_BTM.abs().mean(-1).sum()
            + CHANGE * change_BTM.abs().mean(-1).sum()
            + PITCH * (frames.log_f0_BT - log_f0_BT).abs().where(is_voiced_BT, 0).sum()
            + VOICING * voicing.where(is_real_BT, 0).sum()
        )

    def n_tokens(self, batch: SpokenBatch) -> int:
        return int(batch.utterances.phones.n_phones_B.sum())

    def audio_seconds(self, batch: SpokenBatch) -> float:
        return int(batch.utterances.frames_BN.sum()) * self.features.hop / self.features.sample_rate

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """Draws true frames above predicted ones, and measures these."""
        samples = [self.reader.prepare(raw) for raw in raws]
        batch = self.reader.collate(samples).to(self.acoustic.head.weight.device).utterances
        frames = self.acoustic(batch.phones, batch.prosody_BN3, batch.frames_BN)
        rows, scores = [], []
        for i, (raw, sample) in enumerate(zip(raws, samples, strict=True)):
            mel_TM = frames.mel_BTM[i, : len(sample.f0_T)].cpu()
            scores.append(fidelity(sample.mel_TM, mel_TM, sample.f0_T, frames.f0_BT[i, : len(sample.f0_T)].cpu()))
            rows.append(
                Shown(
                    mel_pair(sample.mel_TM, mel_TM), raw.metadata["text"], f"MCD {means(scores[-1:])['mcd_db']:.2f} dB"
                )
            )
        return rows, means(scores)

    def export(self, directory: Path) -> None:
        save_part(self.acoustic, directory, "acoustic")


def start_part(config: TrainConfig) -> Any:
    """The part of the voice that a stage trains: its own export, or a new one in the shape that the run names."""
    part, presets = VOICE_PRESETS[config.stage]
    if config.model.init_from is not None:
        return load_part(config.model.init_from, part)
    _, module_class = PARTS[part]
    return module_class(presets[getattr(config.model, part)]())


def mel_pair(mel_TM: Tensor, made_mel_TM: Tensor) -> Image.Image:
    """The true frames above the made ones."""
    pictures = [mel_picture((mel - MEL_MEAN) / MEL_STD) for mel in (mel_TM, made_mel_TM)]
    pair = Image.new("RGB", (pictures[0].width, 2 * pictures[0].height + 4), "white")
    for i, picture in enumerate(pictures):
        pair.paste(picture, (0, i * (picture.height + 4)))
    return pair


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
