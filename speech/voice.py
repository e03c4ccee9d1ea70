"""The voice: written text in, speech out, while the text is still being written (section 8.1.2).

    text, features --SpokenText--> words --Phonemizer--> phones --prosody--> durations, pitch, loudness
    phones, prosody --acoustic model--> log-mel frames, pitch --vocoder--> samples

Every part streams, and what comes out depends on the text and its features alone, not on the pieces in which they arrive, nor on
the schedule. Nothing is faded or mended at seams: there are none.

Shape letters: B rows (1 here), N phones, or samples of a waveform, T frames, S language-model tokens, F their feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from speech.acoustic import AcousticConfig, AcousticModel
from speech.normalizer import LMFeatures, NormalizerConfig, TextNormalizer
from speech.phone_batch import PhoneBatch, PhoneIds, PhoneStream
from speech.phones import Phone, Phonemizer
from speech.prosody import ProsodyConfig, ProsodyModel, durations
from speech.scheduler import Schedule
from speech.spoken_text import SpokenPart, SpokenText
from speech.vocoder import Vocoder, VocoderConfig

PROSODY, ACOUSTIC, VOCODER = range(3)  #: stages of the scheduler


@dataclass(frozen=True, kw_only=True)
class VoiceConfig:
    """The four trained parts of a voice."""

    normalizer: NormalizerConfig
    prosody: ProsodyConfig
    acoustic: AcousticConfig
    vocoder: VocoderConfig

    def __post_init__(self) -> None:
        read = {config.lm for config in (self.normalizer, self.prosody) if config.lm is not None}
        if len(read) > 1:
            raise ValueError(f"lm: normaliser and prosody model read different features: {read}")
        if self.normalizer.right_context is None:
            raise ValueError(
                "normalizer.right_context: one with unlimited right context cannot stream; take one with 3"
            )

    @property
    def lm(self) -> LMFeatures | None:
        """The features that it needs; None for a voice that reads text alone."""
        return self.normalizer.lm or self.prosody.lm


class Voice:
    """The trained parts in a row. It is no module: a model that has a voice neither trains nor casts it.

    Attributes:
        parts: the modules "normalizer", "prosody", "acoustic" and "vocoder". All but the vocoder run in FP64: rules and durations
            are whole numbers, and the phase is a sum over all pitch before, so what rounding differs by between large and
            small chunks would tip over or add up.
    """

    def __init__(self, config: VoiceConfig) -> None:
        self.config = config
        self.parts = nn.ModuleDict(
            {
                "normalizer": TextNormalizer(config.normalizer),
                "prosody": ProsodyModel(config.prosody),
                "acoustic": AcousticModel(config.acoustic),
            }
        ).double()
        self.parts["vocoder"] = Vocoder(config.vocoder)
        self.parts.eval()

    @property
    def sample_rate(self) -> int:
        return self.config.vocoder.features.sample_rate

    def to(self, device: torch.device | str | None) -> Self:
        """Moves the parts."""
        self.parts.to(device)
        return self

    def stream(self, *, speaker: int = 0, style: int = 0, schedule: Schedule | None = None) -> VoiceStream:
        """Begins an utterance.

        Args:
            speaker, style: who speaks, and how, by the numbers of the training data.
            schedule: when audio is made; small chunks first, then larger ones, when None.

        Raises:
            ValueError: what pronounces words is not installed.
        """
        if schedule is None:
            config = self.config
            schedule = Schedule.after(config.prosody.ahead + 1, config.acoustic.lookahead, config.vocoder.delay)
        return VoiceStream(self, speaker, style, schedule)


class VoiceStream:
    """One utterance; `Voice.stream` begins it. Use it from one thread at a time; `cancel` may come from any.

    Attributes:
        skipped: what nobody could say so far, as it was written.
    """

    def __init__(self, voice: Voice, speaker: int, style: int, schedule: Schedule) -> None:
        self.voice, self.skipped = voice, list[str]()
        parts: Any = voice.parts
        self._prosody, self._acoustic, self._vocoder = parts["prosody"], parts["acoustic"], parts["vocoder"]
        self._device = next(parts.parameters()).device
        self._spoken, self._phonemizer, self._phones = SpokenText(parts["normalizer"]), Phonemizer(), PhoneStream()
        self._scheduler = schedule.scheduler()
        self._who = [speaker], [style]
        self._states = [part.init_state(1) for part in (self._prosody, self._acoustic, self._vocoder)]
        self._features: list[Tensor] = []  # that the prosody model has not got yet
        self._n_features = 0
        self._to_time: list[
            PhoneIds
        ] = []  # phones that wait for their prosody, and those that have it and wait for frames
        self._to_shape: list[PhoneIds] = []
        self._prosody_N3 = torch.zeros(0, 3, dtype=torch.float64, device=self._device)
        self._mel_TM = torch.zeros(0, voice.config.vocoder.features.n_mels, device=self._device)
        self._f0_T = torch.zeros(0, dtype=torch.float64, device=self._device)

    def push(self, text: str, features_F: Tensor | None = None) -> Iterator[Tensor]:
        """Takes more text and yields the waveforms `(N,)` that can be made now, each as soon as it is; exhaust it.

        Args:
            text: what one language-model token added (it may be nothing yet); any piece, for a voice without features.
            features_F: the token's features, for a voice that was trained with them.

        Raises:
            ValueError: features are missing, or not expected.
        """
        config = self.voice.config
        if (features_F is None) != (config.lm is None):
            raise ValueError(
                f"features: this voice reads {f'those of {config.lm.source}' if config.lm else 'text alone'}"
            )
        if features_F is not None:
            features_F = features_F.to(self._device, torch.float64)
            self._features.append(features_F)
            self._n_features += 1
        yield from self._say(lambda: self._spoken.push(text, features_F if config.normalizer.lm else None))

    def finish(self, text: str = "") -> Iterator[Tensor]:
        """Takes what is left of the text, such as a last token without features, and yields all that is left to say."""
        yield from self._say(lambda: self._spoken.finish(text), final=True)

    def cancel(self) -> None:
        """Makes no more audio, after what is being made now."""
        self._scheduler.cancel()

    def _say(self, listen: Callable[[], list[SpokenPart]], final: bool = False) -> Iterator[Tensor]:
        if self._scheduler.finished:
            return
        parts = listen()
        self.skipped += [part.text for part in parts if part.kind == "dropped"]
        phones = self._phones.push(self._phonemizer(parts)) + (self._phones.finish() if final else [])
        self._to_time += map(self._ids, phones)
        self._scheduler.arrived(len(phones))
        if final:
            self._scheduler.end()
        while (work := self._scheduler.next()) is not None:
            if work.stage == PROSODY:
                self._scheduler.done(self._time(work.n, work.final))
            elif work.stage == ACOUSTIC:
                self._scheduler.done(self._shape(work.n, work.final))
            else:
                waveform_N = self._sound(work.n, work.final)
                self._scheduler.done(len(waveform_N))
                if len(waveform_N):
                    yield waveform_N

    def _ids(self, phone: Phone) -> PhoneIds:
        ids = PhoneIds.of(phone)
        # The last token of an answer that was cut has no features; its words see those of the token before.
        return ids._replace(chunk=max(0, min(ids.chunk, self._n_features - 1)))

    def _batch(self, phones: list[PhoneIds]) -> PhoneBatch:
        return PhoneBatch.collate([phones], *self._who).to(self._device)

    @torch.inference_mode()
    def _time(self, n: int, final: bool) -> int:
        """Gives the next phones to the prosody model; returns how many it is done with."""
        phones, self._to_time = self._to_time[:n], self._to_time[n:]
        features_1SF = None
        if (lm := self.voice.config.prosody.lm) is not None:
            features_1SF = (
                torch.stack(self._features)[None] if self._features else torch.zeros(1, 0, lm.dim).to(self._device)
            )
        self._features = []
        prosody_1N3, n_B, self._states[PROSODY] = self._prosody.step(
            self._batch(phones), features_1SF, self._states[PROSODY], final=final
        )
        self._to_shape += phones
        self._prosody_N3 = torch.cat([self._prosody_N3, prosody_1N3[0, : n_B[0]]])
        return int(n_B[0])

    @torch.inference_mode()
    def _shape(self, n: int, final: bool) -> int:
        """Gives phones with their prosody to the acoustic model; returns how many frames it made."""
        phones, self._to_shape = self._to_shape[:n], self._to_shape[n:]
        prosody_N3, self._prosody_N3 = self._prosody_N3[:n], self._prosody_N3[n:]
        mel_1TM, f0_1T, n_B, self._states[ACOUSTIC] = self._acoustic.step(
            self._batch(phones),
            prosody_N3[None],
            durations(prosody_N3[None, :, 0]),
            self._states[ACOUSTIC],
            final=final,
        )
        self._mel_TM = torch.cat([self._mel_TM, mel_1TM[0, : n_B[0]].float()])
        self._f0_T = torch.cat([self._f0_T, f0_1T[0, : n_B[0]]])
        return int(n_B[0])

    @torch.inference_mode()
    def _sound(self, n: int, final: bool) -> Tensor:
        """Gives frames to the vocoder; returns the samples that it made, if any."""
        mel_TM, self._mel_TM = self._mel_TM[:n], self._mel_TM[n:]
        f0_T, self._f0_T = self._f0_T[:n], self._f0_T[n:]
        waveform_1N, n_B, self._states[VOCODER] = self._vocoder.step(
            mel_TM[None], f0_T[None], self._states[VOCODER], final=final
        )
        return waveform_1N[0, : n_B[0]]
