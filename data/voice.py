"""Voices to learn from: recordings with the timing of every phone, and their pitch and loudness.

A sample of `mm data make voice` is `key.flac` (24 kHz), `key.f0.npy` (Hz of each frame, 0 where unvoiced), `key.power.npy`
(natural logarithm of the root mean square around each frame) and `key.json`: `text` as it is written, `spoken` in words, `voice`,
`speaker` (a number), and `phones`, each `[ipa, stress, place, mark, frames, end]`. Frames are 10 ms and fill the recording
without a rest.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from data.audio import load_audio
from data.shards import Sample


class VoicePhone(NamedTuple):
    """One phone, or a pause, of a recording.

    Attributes:
        ipa, stress, place, mark: as in `speech.phone_batch.PhoneIds`, the symbols as text.
        frames: how long it lasts.
        end: characters of the text up to the end of the word or mark that it belongs to.
    """

    ipa: str
    stress: int
    place: int
    mark: str
    frames: int
    end: int


@dataclass(frozen=True, kw_only=True)
class VoiceSample:
    """One utterance.

    Attributes:
        key: its name.
        text: as it is written.
        f0_T: Hz of each frame, 0 where unvoiced.
        log_power_T: natural logarithm of the root mean square around each frame; None where nobody measured it.
        waveform_N: samples in [-1, 1]; None where they were not asked for.
    """

    key: str
    text: str
    speaker: int
    phones: tuple[VoicePhone, ...]
    f0_T: Tensor
    log_power_T: Tensor | None
    waveform_N: Tensor | None = None


def read_voice(raw: Sample, *, sample_rate: int = 24_000, hop: int = 240, waveform: bool = True) -> VoiceSample:
    """Reads a sample of `mm data make voice`, or of any source that looks like one.

    Args:
        hop: samples of a frame.
        waveform: False leaves the recording closed, for models that learn from phones and their prosody alone.

    Raises:
        ValueError: a part is missing or does not fit the others, by the sample's name.
    """
    try:
        about: dict[str, Any] = raw.metadata
        phones = tuple(VoicePhone(*phone) for phone in about["phones"])
        f0_T = torch.from_numpy(raw.arrays["f0"].astype(np.float32))
        power = raw.arrays.get("power")
        log_power_T = None if power is None else torch.from_numpy(power.astype(np.float32))
        text, speaker = str(about["text"]), int(about["speaker"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"sample {raw.key!r} is none of `mm data make voice` ({error})") from error
    total = sum(phone.frames for phone in phones)
    if min((phone.frames for phone in phones), default=0) < 1 or total != len(f0_T):
        raise ValueError(f"sample {raw.key!r}: every phone needs a frame or more, and {len(f0_T)} in all, got {total}")
    recording = _recording(raw.messages[0]["content"][0]["audio"], total * hop, sample_rate) if waveform else None
    if recording is not None and len(recording) != total * hop:
        raise ValueError(f"sample {raw.key!r}: {total} frames of {hop} samples do not fill {len(recording)} samples")
    return VoiceSample(
        key=raw.key,
        text=text,
        speaker=speaker,
        phones=phones,
        f0_T=f0_T,
        log_power_T=log_power_T,
        waveform_N=recording,
    )


def _recording(source: Any, n_samples: int, sample_rate: int) -> Tensor:
    """As `load_audio`; what `mm data make voice` writes takes a quarter of the time, and training would wait for it."""
    if isinstance(source, bytes) and source.startswith(b"fLaC"):
        with contextlib.suppress(soundfile.LibsndfileError), soundfile.SoundFile(io.BytesIO(source)) as file:
            if (file.frames, file.samplerate, file.channels) == (n_samples, sample_rate, 1):
                return torch.from_numpy(file.read(dtype="float32"))
    return load_audio(source, sample_rate)
