"""Opens audio: whatever form a user has it in becomes one mono float waveform at one rate, or a clear error."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
import torch
import torchaudio.functional as F
from av.container import InputContainer
from torch import Tensor

from data.files import open_media

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
MAX_SECONDS = 600.0
MIN_SECONDS = 0.1

# Audio is untrusted, so only plain containers: FFmpeg would also follow playlists to other files and addresses.
_FORMATS = "wav,w64,aiff,au,caf,flac,ogg,mp3,aac,amr,g722,mov,matroska,avi,mpegts,mpeg,flv,asf"
_COUNTED = {"wav", "w64", "aiff", "flac", "mov"}  # their headers state the true length; elsewhere it is an estimate
_COUNT_TOLERANCE = 0.05  # seconds: AAC in MP4 counts the encoder's padding
_RIFF_ENDLESS = 0x7FFF_0000  # bytes; programs that write to a pipe put a size from here up, as they know none
_RATES = (1_000, 384_000)
_SCALES: dict[torch.dtype, float] = {torch.int16: 2.0**15, torch.int32: 2.0**31}
_MAX_CHANNELS = 32
_LOUDEST_FLOAT = 10.0  # mixes may pass 1.0 a little; more than this are integers stored as floats
_SILENCE = 1e-4  # peak; -80 dB


@dataclass(frozen=True, kw_only=True)
class AudioClip:
    """A stretch of a recording, not yet decoded; `load_audio` opens it.

    Attributes:
        source: path or encoded bytes of the recording.
        start, seconds: where the stretch lies; `seconds` None means to the end.
        channel: the one to take, counted from 0; None averages all.
    """

    source: str | os.PathLike[str] | bytes
    start: float = 0.0
    seconds: float | None = None
    channel: int | None = None


def load_audio(source: Any, sample_rate: int = SAMPLE_RATE, max_seconds: float = MAX_SECONDS) -> Tensor:
    """Opens audio as one waveform; channels are averaged. A video gives its sound track.

    A file whose header promises more than it holds (WAV, FLAC, MP4, ...) is an error. MP3, Ogg and other streams of
    frames make no such promise: what is whole of a truncated one is returned, with a warning where it shows.

    Args:
        source: a path, encoded bytes, an `AudioClip`, or `(waveform, sample_rate)` with a NumPy or torch waveform
            `(samples,)`, `(channels, samples)` or `(samples, channels)` of int16, int32, uint8, or floats in [-1, 1].
        sample_rate: of the result, in Hz.
        max_seconds: longer audio is refused without being held in memory.

    Returns:
        `(samples,)` float32 in [-1, 1]; n samples at rate r become `round(n * sample_rate / r)`.

    Raises:
        ValueError: naming `audio`, for anything that is not whole, finite audio from 0.1 s to `max_seconds`.
    """
    if isinstance(source, (tuple, list)):
        waveform, rate = _from_pair(source)
        name = "the waveform"
        if len(waveform) > max_seconds * rate:
            raise _too_long(name, f"{len(waveform) / rate:.1f} s", max_seconds)
    else:
        clip = source if isinstance(source, AudioClip) else AudioClip(source=source)
        waveform, rate, name = _decode(clip, max_seconds)
    if len(waveform) < MIN_SECONDS * rate:
        held = f"only {len(waveform) / rate:.3f} s long" if len(waveform) else "without any samples"
        raise ValueError(f"audio: {name} is {held}; give at least {MIN_SECONDS} s")
    if not waveform.isfinite().all():
        raise ValueError(f"audio: {name} has NaN or infinite samples; repair what made it")
    if waveform.abs().max() < _SILENCE:
        logger.warning("audio: %s is silent", name)
    return resample(waveform, rate, sample_rate).clamp_(-1, 1)


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """Windowed-sinc resampling over the last axis, to `round(n * new_rate / rate)` samples, without audible aliasing."""
    if rate == new_rate:
        return waveform
    # The filter bank grows with both terms of the ratio; bounding one costs under 0.01% of pitch, at odd rates only.
    ratio = Fraction(rate, new_rate).limit_denominator(2000)
    n = round(Fraction(waveform.shape[-1] * new_rate, rate))
    # A Kaiser window with long sidelobes; torchaudio's default of 6 zero crossings folds treble back at -20 dB.
    waveform = F.resample(
        waveform,
        ratio.numerator,
        ratio.denominator,
        lowpass_filter_width=64,
        rolloff=0.945,
        resampling_method="sinc_interp_kaiser",
        beta=14.0,
    )
    return torch.nn.functional.pad(waveform, (0, max(0, n - waveform.shape[-1])))[..., :n]


def audio_seconds(source: str | os.PathLike[str] | bytes | AudioClip) -> float:
    """Duration by the header, which is quick; exact or, for streams such as MP3, an estimate.

    Raises:
        ValueError: naming `audio`, for what is not audio.
    """
    clip = source if isinstance(source, AudioClip) else AudioClip(source=source)
    if clip.seconds is not None:
        return clip.seconds
    with _open_track(clip.source) as (container, _, _):
        seconds = _header_seconds(container)
    if seconds == math.inf:
        return len(load_audio(clip, max_seconds=math.inf)) / SAMPLE_RATE
    return max(0.0, seconds - clip.start)


def encode_flac(waveform: Tensor, sample_rate: int = SAMPLE_RATE) -> bytes:
    """A `(samples,)` waveform in [-1, 1] as 16-bit FLAC."""
    file = io.BytesIO()
    soundfile.write(file, waveform.numpy(), sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _from_pair(pair: Any) -> tuple[Tensor, int]:
    if len(pair) != 2 or not isinstance(pair[0], (np.ndarray, Tensor)) or np.ndim(pair[1]) != 0:
        kinds = ", ".join(type(part).__name__ for part in pair)
        raise ValueError(f"audio: expected (waveform, sample_rate) with an array or tensor first, got ({kinds})")
    rate = float(pair[1])
    if not rate.is_integer() or not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(f"audio: the sample rate {pair[1]} is not a whole number of Hz in {_RATES[0]}..{_RATES[1]}")
    waveform = torch.as_tensor(np.ascontiguousarray(pair[0])) if isinstance(pair[0], np.ndarray) else pair[0]
    waveform = waveform.detach().cpu()
    if waveform.dtype == torch.uint8:
        waveform = (waveform.float() - 128) / 128
    elif waveform.dtype in _SCALES:
        waveform = waveform.float() / _SCALES[waveform.dtype]
    elif waveform.is_floating_point():
        waveform = waveform.float()
        if waveform.numel() and (peak := waveform.abs().max()) > _LOUDEST_FLOAT and peak.isfinite():
            raise ValueError(f"audio: float samples reach {peak:.0f}; scale them to [-1, 1], or give them as int16")
    else:
        raise ValueError(f"audio: {waveform.dtype} samples have no known scale; give int16, int32, uint8 or floats")
    if waveform.ndim == 2 and min(waveform.shape) <= _MAX_CHANNELS:
        waveform = (
            waveform.mean(dim=int(waveform.shape[1] < waveform.shape[0])) if waveform.numel() else waveform.view(-1)
        )
    if waveform.ndim != 1:
        shape = tuple(waveform.shape)
        raise ValueError(f"audio: the waveform is {shape}; give (samples,), (channels, samples) or (samples, channels)")
    return waveform, int(rate)


@contextlib.contextmanager
def _open_track(source: Any) -> Iterator[tuple[InputContainer, av.AudioStream, str]]:
    """An open recording, its first sound track, and what to call it in errors; FFmpeg's errors inside become ours."""
    file, name = open_media(source, "audio", "a path, bytes, or (waveform, sample_rate)")
    with file:
        start = file.read(16)
        if not start:
            raise ValueError(f"audio: {name} is empty")
        _check_riff(file, name)
        file.seek(0)
        headerless = "g722" if name.lower().rstrip("'").endswith(".g722") else None  # known by its name alone
        try:
            # FFmpeg is given the open file, never its name, which could be an address or a device.
            container = av.open(
                file, "r", format=headerless, options={"format_whitelist": _FORMATS}, metadata_errors="ignore"
            )
        except av.FFmpegError as error:
            raise ValueError(
                f"audio: {name} is no audio that can be read, or its header is cut off ({error.strerror}); "
                f"it starts with {start!r}"
            ) from error
        with container:
            if not container.streams.audio:
                raise ValueError(f"audio: {name} has no sound track")
            try:
                yield container, container.streams.audio[0], name
            except av.FFmpegError as error:
                raise ValueError(f"audio: {name} is broken ({error.strerror}); replace it with a whole file") from error


def _check_riff(file: BinaryIO, name: str) -> None:
    """Refuses a WAV that is shorter than its header says, which FFmpeg would take for a whole one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    riff, _, wave = struct.unpack("<4sI4s", file.read(12).ljust(12))
    while riff == b"RIFF" and wave == b"WAVE":
        kind, length = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        missing = file.tell() + length - size
        if kind == b"data" and missing > 0 and length < _RIFF_ENDLESS:
            raise ValueError(
                f"audio: {name} is cut short: {missing} of the {length} bytes that its header promises are missing; "
                "replace it with a whole file"
            )
        if kind == b"data" or missing >= 0:
            return
        file.seek(length + length % 2, os.SEEK_CUR)


def _header_seconds(container: InputContainer) -> float:
    """Duration by the header; infinite where that says none."""
    stream = container.streams.audio[0]
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return math.inf if container.duration is None else container.duration / av.time_base


def _too_long(name: str, length: str, max_seconds: float) -> ValueError:
    return ValueError(
        f"audio: {name} is {length} long, more than {max_seconds:g} s; cut it into parts or raise max_seconds"
    )


def _decode(clip: AudioClip, max_seconds: float) -> tuple[Tensor, int, str]:
    """A clip at its own rate, mono; never decodes more than `max_seconds` of what is kept."""
    end = math.inf if clip.seconds is None else clip.start + clip.seconds
    with _open_track(clip.source) as (container, stream, name):
        promised = _header_seconds(container)
        counted = container.format.name.split(",")[0] in _COUNTED and promised < math.inf
        length = f"{promised:.1f} s" if counted else f"about {promised:.0f} s"
        track_end = min(end, promised) if counted else end  # AAC in MP4 has padding beyond what is promised
        if counted and track_end - clip.start > max_seconds:
            raise _too_long(name, length, max_seconds)
        reader = _Reader(container, stream, name, clip.channel)
        kept: list[Tensor] = []
        n_kept = 0
        for position, block in reader.blocks(clip.start):
            rate = reader.rate
            first, last = round(clip.start * rate), (math.inf if track_end == math.inf else round(track_end * rate))
            block = block[max(0, first - position) : max(0, int(min(last - position, len(block))))]
            if len(block):  # an empty slice would keep its whole block in memory
                kept.append(block)
            n_kept += len(block)
            if n_kept > max_seconds * rate:
                raise _too_long(name, length, max_seconds)
            if reader.position >= last:
                break
        _check_whole(reader, promised=promised, counted=counted, end=end, name=name)
    return torch.cat(kept or [torch.empty(0)]), reader.rate, name


def _check_whole(reader: _Reader, *, promised: float, counted: bool, end: float, name: str) -> None:
    """Compares what was decoded with what the header, and the clip, ask for."""
    if not reader.rate or reader.n_bad > reader.n_good:
        raise ValueError(f"audio: {name} holds no sound that can be decoded; replace it with a whole file")
    reached = reader.position / reader.rate
    if promised < math.inf and reached < min(promised, end) - _COUNT_TOLERANCE:
        if counted:
            raise ValueError(
                f"audio: {name} is cut short: its header promises {promised:.2f} s and it holds {reached:.2f} s; "
                "replace it with a whole file"
            )
        logger.warning("audio: %s was said to last %.2f s and lasts %.2f s", name, promised, reached)
    if reader.n_bad:
        if counted:
            raise ValueError(f"audio: {name} is broken near {reached:.2f} s; replace it with a whole file")
        logger.warning("audio: %s has %d broken packets, which were left out", name, reader.n_bad)
    if end != math.inf and reached < end - MIN_SECONDS:
        raise ValueError(f"audio: {name} ends at {reached:.2f} s, before the end of the clip at {end:.2f} s")


class _Reader:
    """Decodes one track to mono float blocks.

    Attributes:
        rate: of the blocks; 0 until there was one.
        position: samples of the track up to the end of the last block.
        n_good, n_bad: packets that could be decoded, and that could not.
    """

    def __init__(self, container: InputContainer, stream: av.AudioStream, name: str, channel: int | None) -> None:
        self.container, self.stream, self.name, self.channel = container, stream, name, channel
        self.rate = self.position = self.n_good = self.n_bad = 0

    def blocks(self, start: float) -> Iterator[tuple[int, Tensor]]:
        """Position and samples of each block, from `start` seconds or before it."""
        # A seek lands on the exact sample where frames stand alone; elsewhere the way there is decoded.
        sought = start > 0 and self.stream.codec_context.name.startswith(("pcm_", "flac"))
        if sought:
            try:
                self.container.seek(int(start * av.time_base))
            except av.FFmpegError:  # FLAC without a seek table sometimes
                self.container.seek(0)
        to_float = av.AudioResampler(format="flt")  # packed: PyAV crashes on 8 and more separate planes
        for packet in self.container.demux(self.stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                self.n_bad += 1
                continue
            self.n_good += bool(frames)
            for frame in frames:
                if not self.rate:
                    self._check_format(frame)
                    self.position = round((frame.time or 0) * self.rate) if sought else 0
                try:
                    (block,) = to_float.resample(frame)
                except ValueError:
                    raise ValueError(
                        f"audio: {self.name} changes its rate or channels midway; encode it again"
                    ) from None
                samples = block.to_ndarray().reshape(-1, block.layout.nb_channels)
                mono = samples.mean(axis=1) if self.channel is None else samples[:, self.channel].copy()
                position, self.position = self.position, self.position + len(mono)
                yield position, torch.from_numpy(mono)

    def _check_format(self, frame: av.AudioFrame) -> None:
        self.rate = frame.sample_rate
        n_channels = frame.layout.nb_channels
        if not _RATES[0] <= self.rate <= _RATES[1]:
            raise ValueError(f"audio: {self.name} has a sample rate of {self.rate} Hz, not in {_RATES[0]}..{_RATES[1]}")
        if self.channel is not None and not 0 <= self.channel < n_channels:
            raise ValueError(f"audio: {self.name} has {n_channels} channels, so none with the number {self.channel}")
