"""Stage tts-vocoder: waveforms from their own log-mel frames and pitch (section 8.1.2).

First by the energy distance of spectra, for which the vocoder speaks twice with different noise; then discriminators judge it, too.
Discriminators train in the same steps: their loss is added, and no gradient of either side reaches the other.

Shape letters: B crops, N samples, T frames, M mel bins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from data.shards import Sample as RawSample
from data.voice import read_voice
from mm.eval.voice_measures import fidelity, means
from mm.sheet import Shown
from mm.train.config import TrainConfig, VocodingConfig
from mm.train.discriminators import Discriminators, LogSpectra, deceived, distance, unlike
from mm.train.mel_prediction import Utterance, Utterances, collate_utterances, mel_pair, start_part, utterance_of
from mm.train.objective import Objective
from mm.voice import load_part, save_part
from speech.acoustic import AcousticModel
from speech.streaming import take
from speech.vocoder import Vocoder
from speech.voice_features import LogMelVoice, VoiceFeaturesConfig

#: Frames read on both sides of a crop, for the windows of its first and last log-mel frames.
MARGIN = 2
#: Between the noise of two draws.
APART = 2**24


@dataclass
class Crops:
    """Stretches of one or more utterances.

    Attributes:
        waveform_BN: with `MARGIN` frames on both sides.
        f0_BT: pitch in Hz of the frames between the margins.
        noise_at_B: number of the first frame, by which its noise is told.
        utterances: where the crops' log-mel frames come from the acoustic model, what it is to say.
        row_B, start_B: of each crop, its utterance and first frame.
    """

    waveform_BN: Tensor
    f0_BT: Tensor
    noise_at_B: Tensor
    row_B: Tensor
    start_B: Tensor
    utterances: Utterances | None
    keys: list[str]

    def to(self, device: torch.device | str) -> Crops:
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        utterances = self.utterances.to(device) if self.utterances else None
        return dataclasses.replace(self, **tensors, utterances=utterances)


@dataclass
class CroppedUtterance:
    """Crops of one utterance."""

    crops: Crops
    utterance: Utterance | None


@dataclass(frozen=True)
class CropReader:
    """Cuts crops at random out of each utterance.

    Attributes:
        speaks: whether the acoustic model will be asked for the log-mel frames.
    """

    config: VocodingConfig
    features: VoiceFeaturesConfig
    speaks: bool

    def length(self, raw: RawSample) -> int:
        return sum(phone[4] for phone in raw.metadata["phones"]) if self.speaks else 0  # crops are all of one length

    def prepare(self, raw: RawSample, *, augment: bool = False) -> CroppedUtterance:
        hop, n_frames = self.features.hop, self.config.frames
        sample = read_voice(raw, sample_rate=self.features.sample_rate, hop=hop)
        assert sample.waveform_N is not None
        missing = max(0, n_frames - len(sample.f0_T))
        f0_T = F.pad(sample.f0_T, (0, missing))
        waveform_N = F.pad(sample.waveform_N, (MARGIN * hop, (MARGIN + missing) * hop))
        start_B = torch.randint(len(f0_T) - n_frames + 1, (self.config.crops,))
        key = f"{raw.source}/{raw.key}"
        crops = Crops(
            waveform_BN=waveform_N.unfold(0, (n_frames + 2 * MARGIN) * hop, hop)[start_B],
            f0_BT=f0_T.unfold(0, n_frames, 1)[start_B],
            noise_at_B=torch.randint(APART, start_B.shape),
            row_B=torch.zeros_like(start_B),
            start_B=start_B,
            utterances=None,
            keys=[key] * len(start_B),
        )
        return CroppedUtterance(crops, utterance_of(sample, self.features) if self.speaks else None)

    def count(self, sample: CroppedUtterance) -> int:
        return len(sample.crops.keys)

    def collate(self, samples: Sequence[CroppedUtterance]) -> Crops:
        parts = [sample.crops for sample in samples]
        row_B = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part.keys) for part in parts]))
        utterances = [sample.utterance for sample in samples if sample.utterance is not None]
        return Crops(
            waveform_BN=torch.cat([part.waveform_BN for part in parts]),
            f0_BT=torch.cat([part.f0_BT for part in parts]),
            noise_at_B=torch.cat([part.noise_at_B for part in parts]),
            row_B=row_B,
            start_B=torch.cat([part.start_B for part in parts]),
            utterances=collate_utterances(utterances) if utterances else None,
            keys=[key for part in parts for key in part.keys],
        )


class Vocoding(Objective[nn.ModuleDict, CropReader]):
    """A vocoder, and the discriminators that are thrown away."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config.model.vocoding
        self.vocoder: Vocoder = start_part(config)
        self.features, self.delay = self.vocoder.config.features, self.vocoder.config.delay
        if self.config.frames < 2 * self.delay + self.config.judged:
            raise ValueError(
                f"model.vocoding.frames: the vocoder is {self.delay} frames late, so {self.config.frames} leave less than "
                f"{self.config.judged} to judge; take {2 * self.delay + self.config.judged} or more"
            )
        self.discriminators = Discriminators(self.config.channels)
        self.judge, self.log_mel = LogSpectra(self.features.sample_rate), LogMelVoice(self.features)
        parts = {
            "vocoder": self.vocoder,
            "discriminators": self.discriminators,
            "judge": self.judge,
            "log_mel": self.log_mel,
        }
        self.acoustic: AcousticModel | None = None
        if self.config.mels_from is not None:
            parts["acoustic"] = self.acoustic = load_part(self.config.mels_from, "acoustic")
        self.model = nn.ModuleDict(parts)
        self.reader = CropReader(self.config, self.features, self.acoustic is not None)
        self._is_judged = False
        self._gauges: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        self._is_judged = self.config.judged_from is not None and step >= self.config.judged_from

    def loss(self, batch: Crops) -> Tensor:
        """In evaluation the distance of spectra alone, which can be compared from step to step."""
        hop = self.features.hop
        noise_at_B = torch.cat([batch.noise_at_B, batch.noise_at_B + APART])
        state = dataclasses.replace(self.vocoder.init_state(len(noise_at_B)), position_B=noise_at_B)
        mel_BTM, f0_BT = self._mels(batch).repeat(2, 1, 1), batch.f0_BT.repeat(2, 1)
        n_B = torch.full_like(noise_at_B, self.config.frames)
        made_BTN, _ = self.vocoder.follow(mel_BTM, f0_BT, n_B, state)
        # The first frames lack what sounded before the crop.
        made_BN = made_BTN[:, 2 * self.delay :].flatten(1)
        real_BN = batch.waveform_BN[:, (MARGIN + self.delay) * hop :][:, : made_BN.shape[1]]
        made_BN, again_BN = made_BN.chunk(2)

        spectra = [x.chunk(3) for x in self.judge(torch.cat([real_BN, made_BN, again_BN]))]
        real, made, again = zip(*spectra, strict=True)
        spectral = (distance(real, made) + distance(real, again) - distance(made, again)).sum()
        self._gauges = {"spectral": spectral.detach() / len(real_BN)}
        loss = self.config.spectral * spectral
        if self._is_judged and torch.is_grad_enabled():
            n_judged = self.config.judged * hop
            loss = loss + self._judged(real_BN[:, -n_judged:], made_BN[:, -n_judged:])
        return loss

    def _judged(self, real_BN: Tensor, made_BN: Tensor) -> Tensor:
        """What the discriminators have to learn, and what they say to the vocoder."""
        both = self.discriminators(torch.cat([real_BN, made_BN.detach()]))
        real, taken_for_made = ([[x.chunk(2)[i] for x in layers] for layers in both] for i in range(2))
        mistaken_B = deceived([x[-1] for x in real], 1) + deceived([x[-1] for x in taken_for_made], 0)
        frozen = {name: parameter.detach() for name, parameter in self.discriminators.named_parameters()}
        made = functional_call(self.discriminators, frozen, (made_BN,))
        deceived_B, unlike_B = deceived([x[-1] for x in made], 1), unlike(real, made)
        for name, x_B in {"discriminators": mistaken_B, "deceived": deceived_B, "unlike": unlike_B}.items():
            self._gauges[name] = x_B.detach().mean()
        return (mistaken_B + deceived_B + self.config.matching * unlike_B).sum()

    @torch.no_grad()
    def _mels(self, batch: Crops) -> Tensor:
        """The crops' log-mel frames: true ones, or what the acoustic model makes of the utterances."""
        if self.acoustic is None:
            with torch.autocast(batch.waveform_BN.device.type, enabled=False):
                return self.log_mel(batch.waveform_BN)[:, MARGIN:-MARGIN]
        assert batch.utterances is not None
        said = self.acoustic(batch.utterances.phones, batch.utterances.prosody_BN3, batch.utterances.frames_BN)
        mel_BTM = F.pad(said.mel_BTM, (0, 0, 0, self.config.frames))
        return take(mel_BTM[batch.row_B], batch.start_B, self.config.frames)

    def n_tokens(self, batch: Crops) -> int:
        return batch.f0_BT.numel()

    def audio_seconds(self, batch: Crops) -> float:
        return batch.f0_BT.numel() * self.features.hop / self.features.sample_rate

    def gauges(self) -> dict[str, float]:
        """Parts of the last loss."""
        return {name: value.item() for name, value in self._gauges.items()}

    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """Draws true frames above those of what the vocoder says, and measures it."""
        device = self.vocoder.head.weight.device
        rows, scores = [], []
        for raw in raws:
            sample = read_voice(raw, sample_rate=self.features.sample_rate, hop=self.features.hop)
            assert sample.waveform_N is not None
            mel_1TM = self.log_mel(sample.waveform_N[None].to(device))
            given_1TM = mel_1TM
            if self.acoustic is not None:
                one = collate_utterances([utterance_of(sample, self.features)]).to(device)
                given_1TM = self.acoustic(one.phones, one.prosody_BN3, one.frames_BN).mel_BTM
            made_1N = self.vocoder(given_1TM, sample.f0_T[None].to(device))
            made_mel_TM = self.log_mel(made_1N)[0].cpu()
            scores.append(fidelity(mel_1TM[0].cpu(), made_mel_TM, sample.f0_T, sample.f0_T))
            found = f"MCD {means(scores[-1:])['mcd_db']:.2f} dB"
            rows.append(Shown(mel_pair(mel_1TM[0].cpu(), made_mel_TM), sample.text, found))
        # The pitch is what it was told; `mm eval voice` looks for it in what is heard.
        return rows, {name: value for name, value in means(scores).items() if name in ("mel_l1", "mcd_db")}

    def export(self, directory: Path) -> None:
        save_part(self.vocoder, directory, "vocoder")
