"""Audio in every form and format opens as one mono waveform; anything else is a ValueError that names `audio`."""

from __future__ import annotations

import io
import logging
import math
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from data.audio import AudioClip, audio_seconds, encode_flac, load_audio, resample

RATE, N = 44_100, 44_101  # a prime number of samples


def tones(n: int, rate: int, *hertz: float) -> np.ndarray:
    """`(n, channels)` of rising tones, each under its own swell, so that a shift or a swap shows."""
    seconds = np.arange(n) / rate
    swell = np.sin(np.pi * np.arange(n) / n)
    return np.stack([0.5 * swell * np.sin(2 * np.pi * (f * seconds + 150 * seconds**2)) for f in hertz], axis=1)


STEREO = tones(N, RATE, 307.0, 467.0)
MONO_16K = resample(torch.from_numpy(STEREO.mean(axis=1)).float(), RATE, 16_000)


def encoded(samples: np.ndarray, rate: int, format: str, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def muxed(samples: np.ndarray, rate: int, format: str, codec: str, *, sound: bool = True, video: bool = False) -> bytes:
    """A file of mono sound, a black film, or both, in containers that soundfile does not write."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        film = container.add_stream("mpeg4", rate=5, width=32, height=16, pix_fmt="yuv420p") if video else None
        track = container.add_stream(codec, rate=rate, layout="mono") if sound else None
        for i in range(5 if film else 0):
            picture = av.VideoFrame.from_ndarray(np.zeros((16, 32, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 5)
            container.mux(film.encode(picture))
        if track:
            frame = av.AudioFrame.from_ndarray(samples.T.astype(np.float32).copy(), format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            context = track.codec_context
            fit = av.AudioResampler(context.format.name, "mono", rate, frame_size=context.frame_size or N)
            for part in [*fit.resample(frame), *fit.resample(None)]:
                container.mux(track.encode(part))
            container.mux(track.encode(None))
        if film:
            container.mux(film.encode(None))
    return file.getvalue()


PCM = np.round(STEREO * 2**15).astype(np.int16)
WAV = encoded(PCM, RATE, "WAV", "PCM_16")
FLAC = encoded(STEREO, RATE, "FLAC", "PCM_16")
MP3 = encoded(STEREO, RATE, "MP3", "MPEG_LAYER_III")


@pytest.mark.parametrize(
    ("format", "subtype", "bits"),
    [
        ("WAV", "PCM_U8", 8),
        ("WAV", "PCM_16", 16),
        ("WAV", "PCM_24", 24),
        ("WAV", "PCM_32", 24),
        ("WAV", "FLOAT", 24),
        ("FLAC", "PCM_16", 16),
        ("FLAC", "PCM_24", 24),
        ("AIFF", "PCM_16", 16),
        ("W64", "PCM_16", 16),
    ],
)
def test_lossless_formats(format: str, subtype: str, bits: int):
    waveform = load_audio(encoded(STEREO, RATE, format, subtype))
    assert waveform.dtype == torch.float32
    torch.testing.assert_close(waveform, MONO_16K, rtol=0, atol=2.0 ** (2 - bits) + 1e-6)


def similarity(one: Tensor, other: Tensor) -> float:
    n = min(len(one), len(other))
    return float(torch.nn.functional.cosine_similarity(one[:n], other[:n], dim=0))


@pytest.mark.parametrize("kind", ["mp3", "vorbis", "opus", "m4a", "mkv", "g722", "film"])
def test_lossy_formats_keep_time(kind: str, tmp_path: Path):
    mono = tones(N, 16_000, 307.0)
    if kind in ("mp3", "vorbis", "opus"):
        format, subtype = {"mp3": ("MP3", "MPEG_LAYER_III"), "vorbis": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}[kind]
        content = encoded(mono, 16_000, format, subtype)
    else:
        container, codec = {"m4a": ("mp4", "aac"), "mkv": ("matroska", "aac"), "g722": ("g722", "g722")}.get(
            kind, ("mp4", "aac")
        )
        content = muxed(mono, 16_000, container, codec, video=kind == "film")
    path = tmp_path / f"a sound.{kind}"
    path.write_bytes(content)
    waveform = load_audio(path)
    assert abs(len(waveform) - N) <= {"mp3": 0, "opus": 0, "m4a": 16, "film": 16}.get(kind, 1024)
    delay = 22 if kind == "g722" else 0  # of its filters, which no header tells
    assert similarity(waveform[delay:], torch.from_numpy(mono[:, 0]).float()) > 0.98
    assert audio_seconds(path) == pytest.approx(len(waveform) / 16_000, abs=0.07)


@pytest.mark.parametrize(
    "waveform",
    [
        PCM,
        PCM.T,
        torch.from_numpy(PCM),
        PCM.astype(np.int32) * 2**16,
        PCM / 2**15,
        torch.from_numpy(PCM.T / 2**15).float(),
        PCM.mean(axis=1, keepdims=True) / 2**15,
        PCM.mean(axis=1)[None] / 2**15,
        torch.from_numpy(PCM.mean(axis=1) / 2**15),
        np.asfortranarray(PCM)[::-1][::-1],
    ],
    ids=["int16", "channels first", "tensor", "int32", "float64", "float tensor", "n1", "1n", "n", "strided"],
)
def test_every_form_of_waveform_is_the_same(waveform):
    torch.testing.assert_close(load_audio((waveform, RATE)), MONO_16K, rtol=0, atol=1e-4)
    torch.testing.assert_close(load_audio(WAV), load_audio((waveform, RATE)), rtol=0, atol=2e-6)


def test_bytes_of_eight_bits_are_centred_at_128():
    waveform = load_audio((np.round(STEREO * 127 + 128).astype(np.uint8), RATE))
    torch.testing.assert_close(waveform, MONO_16K, rtol=0, atol=0.02)
    assert abs(float(waveform.mean())) < 1e-3


def test_forms_of_files(tmp_path: Path):
    path = tmp_path / "a.wav"
    path.write_bytes(WAV)
    for source in (path, str(path), WAV, bytearray(WAV), AudioClip(source=path)):
        assert torch.equal(load_audio(source), load_audio(WAV))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 47_993, 48_000])
def test_resampling_keeps_tones_and_their_length(rate: int):
    n = 9_973
    tone = torch.from_numpy(np.sin(2 * np.pi * 1_009 * np.arange(n) / rate)).float()
    got = resample(tone, rate, 16_000)
    assert len(got) == round(Fraction(n * 16_000, rate))
    want = torch.from_numpy(np.sin(2 * np.pi * 1_009 * np.arange(len(got)) / 16_000)).float()
    inner = slice(300, -300)
    torch.testing.assert_close(got[inner], want[inner], rtol=0, atol=0.03 if rate == 47_993 else 1e-3)


@pytest.mark.parametrize("hertz", [8_500, 9_000, 12_000, 20_000])
def test_resampling_does_not_alias(hertz: int):
    treble = torch.from_numpy(np.sin(2 * np.pi * hertz * np.arange(48_000) / 48_000)).float()
    assert resample(treble, 48_000, 16_000)[300:-300].abs().max() < 1e-3


@pytest.mark.parametrize(
    "content", [WAV, FLAC, MP3, encoded(STEREO, 48_000, "OGG", "OPUS")], ids=["wav", "flac", "mp3", "opus"]
)
def test_a_clip_is_a_slice(content: bytes):
    native = 48_000 if content[:4] == b"OggS" else RATE
    whole = load_audio(content, native)
    first, last = round(0.31 * native), round(0.84 * native)
    clip = load_audio(AudioClip(source=content, start=0.31, seconds=0.53), native)
    torch.testing.assert_close(clip, whole[first:last], rtol=0, atol=1e-6)
    assert audio_seconds(AudioClip(source=content, start=0.31, seconds=0.53)) == 0.53
    for start in (0.1, 0.2, 0.45, 0.6, 0.75, 0.8):
        clip = load_audio(AudioClip(source=content, start=start, seconds=0.11), native)
        torch.testing.assert_close(clip, whole[round(start * native) :][: len(clip)], rtol=0, atol=1e-6)
    torch.testing.assert_close(load_audio(AudioClip(source=content, start=0.31), native), whole[first:])
    with pytest.raises(ValueError, match=r"audio: .* ends at (0\.9|1\.0)\d s, before the end of the clip at 1\.80 s"):
        load_audio(AudioClip(source=content, start=0.8, seconds=1))


def test_a_channel_can_be_chosen():
    right = load_audio(AudioClip(source=FLAC, channel=1), RATE)
    torch.testing.assert_close(right, torch.from_numpy(STEREO[:, 1]).float(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"audio: .* has 2 channels, so none with the number 2"):
        load_audio(AudioClip(source=FLAC, channel=2))


def test_flac_round_trip():
    assert torch.allclose(load_audio(encode_flac(MONO_16K)), MONO_16K, atol=2**-15)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("none.wav", r"no file '.*none\.wav'"),
        ("bad\0name", "cannot open"),
        ("https://example.org/a.wav", "not fetched"),
        (b"", "is empty"),
        (b"What is this? " * 99, "no audio that can be read.*starts with b'What"),
        (np.random.default_rng(0).bytes(5_000), "audio"),
        (WAV[:30], "header is cut off"),
        (WAV[:44], "cut short"),
        (WAV[:-1], "1 of the 176404 bytes that its header promises are missing"),
        (WAV[: len(WAV) // 2], "bytes that its header promises are missing"),
        (FLAC[: len(FLAC) // 2], r"cut short: its header promises 1\.00 s and it holds 0\.\d+ s"),
        (encoded(np.zeros((0, 1)), RATE, "WAV", "PCM_16"), "no sound that can be decoded"),
        (encoded(np.full((N, 1), np.nan), RATE, "WAV", "FLOAT"), "NaN or infinite"),
        (encoded(STEREO[:4409], RATE, "WAV", "PCM_16"), r"only 0\.100 s"),
        (muxed(STEREO, RATE, "mp4", "aac", sound=False, video=True), "has no sound track"),
        (3.0, "cannot read a float"),
        ((np.zeros(0, np.float32), RATE), "without any samples"),
        ((np.array([0.0, np.inf] * N), RATE), "NaN or infinite"),
        ((STEREO * 32_768, RATE), r"float samples reach 1\d+; scale them"),
        ((PCM.astype(np.int64), RATE), "int64 samples have no known scale"),
        ((STEREO.reshape(1, 1, -1), RATE), r"the waveform is \(1, 1, 88202\)"),
        ((np.zeros((101, 103)), RATE), r"the waveform is \(101, 103\)"),
        ((RATE, STEREO), r"expected \(waveform, sample_rate\).*got \(int, ndarray\)"),
        ((STEREO, 0), "sample rate 0"),
        ((STEREO, 16_000.5), r"sample rate 16000\.5"),
        ((STEREO[:, 0], RATE, 2), "expected"),
    ],
)  # fmt: skip
def test_what_is_not_audio_is_named(source, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^audio: .*{cause}|^audio: {cause}"):
        load_audio(source)


def test_playlists_are_not_followed(tmp_path: Path):
    (tmp_path / "secret.wav").write_bytes(WAV)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile secret.wav\n")
    for name in ("list.m3u8", "list.ffconcat"):
        with pytest.raises(ValueError, match=r"audio: .*no audio that can be read"):
            load_audio(tmp_path / name)


def test_a_truncated_mp3_gives_what_is_whole(caplog: pytest.LogCaptureFixture):
    whole = load_audio(MP3)
    part = load_audio(MP3[: len(MP3) * 2 // 3])
    assert 0.5 * len(whole) < len(part) < 0.75 * len(whole)
    torch.testing.assert_close(part[:-2000], whole[: len(part) - 2000], rtol=0, atol=1e-3)
    assert "was said to last 1.00 s" in caplog.text


def test_a_wav_written_to_a_pipe_has_no_length():
    start = WAV.index(b"data") + 4
    endless = WAV[:start] + struct.pack("<I", 0xFFFF_FFFF) + WAV[start + 4 :]
    assert torch.equal(load_audio(endless), load_audio(WAV))


def test_long_audio_is_refused(tmp_path: Path):
    film = tmp_path / "two hours.wav"
    film.write_bytes(encoded(np.zeros((1, 1)), 8_000, "WAV", "PCM_U8")[:44])
    n = 2 * 3600 * 8_000
    with film.open("r+b") as file:
        header = file.read()
        file.seek(header.index(b"data") + 4)
        file.write(struct.pack("<I", n))
        file.truncate(44 + n)  # a hole, not 57 MB
    with pytest.raises(ValueError, match=r"audio: .*7200\.0 s long, more than 600 s; cut it into parts or raise"):
        load_audio(film)
    assert audio_seconds(film) == 7200
    with pytest.raises(ValueError, match=r"about 1 s long, more than 0\.5 s"):
        load_audio(MP3, max_seconds=0.5)
    with pytest.raises(ValueError, match=r"1\.0 s long, more than 0\.5 s"):
        load_audio((STEREO, RATE), max_seconds=0.5)
    assert len(load_audio(AudioClip(source=film, start=7_100, seconds=1))) == 16_000


def test_silent_and_clipped_audio_are_audio(caplog: pytest.LogCaptureFixture):
    clipped = load_audio(((STEREO * 9).clip(-1.5, 1.5), RATE))
    assert clipped.max() == 1 and clipped.min() == -1 and not caplog.records
    assert not load_audio((np.zeros(1_600, np.int16), 16_000)).any()
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "audio: the waveform is silent")
    ]


def test_the_shortest_audio():
    assert len(load_audio((np.ones(800, np.int16), 8_000))) == 1_600
    assert math.isclose(audio_seconds(encoded(STEREO[:4410], RATE, "FLAC", "PCM_16")), 0.1)
