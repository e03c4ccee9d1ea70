"""Clips in real files, encoded here: which frames are taken, how they look, how few are decoded, and what broken files say."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from video import frames
from video.frames import load_frames, video_seconds

RATE, WIDTH, HEIGHT = 25, 62, 46
MILLISECOND = Fraction(1, 1000)


def number_of(picture: Image.Image) -> int:
    """The number that `numbered` drew: seven bits, each a black or white stripe."""
    bits = np.asarray(picture.convert("L"))[picture.height // 2] > 127
    stripe = picture.width / 7
    return sum(int(bits[int((i + 0.5) * stripe)]) << i for i in range(7))


def numbered(i: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Frame i (modulo 128) as `(H, W, 3)` pixels."""
    stripe = (np.arange(width) * 7 // width).clip(0, 6)
    row = ((i >> stripe) & 1).astype(np.uint8) * 255
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def encode(
    pictures: Sequence[np.ndarray],
    container: str = "mp4",
    codec: str = "libx264",
    *,
    times: Sequence[int] | None = None,
    pixels: str = "yuv420p",
    source: str = "rgb24",
    gop: int = 12,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    setup: Any = lambda stream: None,
) -> bytes:
    """A clip of RGB pictures; `times` are in milliseconds, evenly at `RATE` where None."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, container_options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=RATE, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pixels, gop
        if times is not None:
            stream.codec_context.time_base = MILLISECOND
        setup(stream)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=source).reformat(format=pixels)
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1, RATE) if times is None else MILLISECOND
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def counted(n: int, *args: Any, **options: Any) -> bytes:
    return encode([numbered(i) for i in range(n)], *args, **options)


def shown(source: Any, max_frames: int) -> list[int]:
    return [number_of(picture) for picture in load_frames(source, max_frames)]


def decoded_in_full(clip: bytes) -> list[tuple[float, bytes]]:
    """Time and RGB of every frame, from the start on."""
    with av.open(io.BytesIO(clip)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24").tobytes()) for frame in container.decode(video=0)]


# --- which frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_frames", [1, 2, 5, 7, 29, 31, 37])
def test_frames_are_those_at_the_centres_of_equal_shares(max_frames: int) -> None:
    n = min(31, max_frames)
    assert shown(counted(31), max_frames) == [int((i + 0.5) * 31 / n) for i in range(n)]


def test_a_clip_of_variable_rate_is_sampled_by_time() -> None:
    """Forty frames in the first second, then five in four."""
    times = [25 * i for i in range(40)] + [1000 + 800 * i for i in range(5)]
    clip = counted(45, times=times)
    seconds = video_seconds(clip)
    centres = [1000 * (i + 0.5) * seconds / 11 for i in range(11)]
    wanted = [max(i for i, time in enumerate(times) if time <= centre) for centre in centres]
    assert shown(clip, 11) == sorted(set(wanted)) and len(set(wanted)) < 11  # the slow frames come once each
    assert shown(clip, 45) == list(range(45))


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1"}),
        ("mp4", "libx265", {"x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12"}),
        ("matroska", "libx264", {"bf": "2"}),
        ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        ("mpegts", "libx264", {"bf": "2"}),
        ("avi", "mpeg4", {}),
        ("flv", "libx264", {}),
        ("mpeg", "mpeg2video", {}),
    ],
)
def test_seeking_gives_the_frames_of_decoding_everything(container: str, codec: str, options: dict[str, str]) -> None:
    size = (70, 66) if codec == "libx265" else (WIDTH, HEIGHT)  # x265 corrupts memory on frames smaller than its blocks
    clip = encode([numbered(i, *size) for i in range(120)], container, codec, options=options)
    everything = decoded_in_full(clip)
    with av.open(io.BytesIO(clip)) as opened:
        stream = opened.streams.video[0]
        start = float((stream.start_time or 0) * stream.time_base)
    for max_frames in (3, 8, 40):
        centres = [start + (i + 0.5) * video_seconds(clip) / max_frames for i in range(max_frames)]
        wanted = dict.fromkeys(max(frame for frame in everything if frame[0] <= centre) for centre in centres)
        assert [picture.tobytes() for picture in load_frames(clip, max_frames)] == [pixels for _, pixels in wanted]


def test_a_long_clip_is_not_decoded_from_end_to_end(caplog: pytest.LogCaptureFixture) -> None:
    clip = counted(1000, options={"preset": "ultrafast"}, gop=10)
    with caplog.at_level(logging.DEBUG, "video.frames"):
        assert len(load_frames(clip, 8)) == 8
    n_decoded = caplog.records[-1].args[0]
    assert n_decoded <= 8 * (10 + 2)  # of each share one group of pictures at most, and what shows that it is over


def test_no_frame_is_decoded_twice_where_keyframes_are_far_apart(caplog: pytest.LogCaptureFixture) -> None:
    clip = counted(300, options={"preset": "ultrafast"}, gop=250)
    with caplog.at_level(logging.DEBUG, "video.frames"):
        load_frames(clip, 64)
    assert caplog.records[-1].args[0] <= 300


def test_animations_are_sampled_by_time(tmp_path: Path) -> None:
    pictures = [Image.fromarray(numbered(i)) for i in range(12)]
    durations = [100] * 10 + [1000, 0]  # the last one says nothing, which is 0.1 s
    for kind in ("gif", "webp"):
        pictures[0].save(
            tmp_path / f"a.{kind}", save_all=True, append_images=pictures[1:], duration=durations, lossless=True
        )
        assert shown(tmp_path / f"a.{kind}", 12) == list(range(12))
        assert shown(tmp_path / f"a.{kind}", 3) == [3, 10]  # 0.35, 1.05 and 1.75 s
        assert video_seconds(tmp_path / f"a.{kind}") == pytest.approx(2.1)


@pytest.mark.parametrize("form", ["tensor", "array", "channels last", "floats"])
def test_pixels_are_sampled_alike(form: str) -> None:
    clip = np.stack([numbered(i) for i in range(31)])
    sources = {
        "tensor": torch.from_numpy(clip).permute(0, 3, 1, 2),
        "array": clip.transpose(0, 3, 1, 2),
        "channels last": clip,
        "floats": torch.from_numpy(clip).permute(0, 3, 1, 2) / 255,
    }
    assert shown(sources[form], 5) == [3, 9, 15, 21, 27]
    assert [picture.tobytes() for picture in load_frames(sources[form])] == [frame.tobytes() for frame in clip]


def test_duration_is_that_of_the_header_or_of_the_frames(tmp_path: Path) -> None:
    for container in ("mp4", "matroska", "mpegts", "avi"):
        assert video_seconds(counted(50, container, "mpeg4")) == pytest.approx(2, abs=0.05)
    # As a browser records it: no duration, no index.
    live = counted(50, "webm", "libvpx", muxer={"live": "1"})
    with av.open(io.BytesIO(live)) as container:
        assert container.duration is None
    assert video_seconds(live) == pytest.approx(2, abs=0.05)
    assert np.abs(np.array(shown(live, 5)) - [5, 15, 25, 35, 45]).max() <= 1


# --- how they look ----------------------------------------------------------------------------------------------------


CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)  # and black


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_upright(degrees: int, mirrored: bool) -> None:
    clip = encode([CORNERS] * 3, setup=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored))
    # FFmpeg turns counterclockwise and then mirrors, as `av_display_rotation_set` and `av_display_matrix_flip` do.
    wanted = np.rot90(CORNERS, degrees // 90)
    wanted = wanted[:, ::-1] if mirrored else wanted
    picture = load_frames(clip)[0]
    assert picture.size == (wanted.shape[1], wanted.shape[0])
    assert np.abs(np.asarray(picture).astype(int) - wanted)[4:-4:8, 4:-4:8].max() < 40


def test_a_phone_held_upright_is_turned_clockwise() -> None:
    """The matrix that phones write."""
    matrix = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    clip = encode([CORNERS] * 3, setup=lambda stream: stream.set_display_matrix(matrix))
    assert number_of_red(load_frames(clip)[0]) == (1, 0)


def number_of_red(picture: Image.Image) -> tuple[int, int]:
    """Column and row of the red quarter."""
    red = np.argwhere(np.asarray(picture)[..., 0].astype(int) - np.asarray(picture)[..., 1:].max(-1) > 100)
    y, x = red.mean(0)
    return int(2 * x / picture.width), int(2 * y / picture.height)


def test_pixels_that_are_not_square_are_made_so() -> None:
    def anamorphic(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)

    assert load_frames(encode([CORNERS] * 3, "mp4", "mpeg4", setup=anamorphic))[0].size == (72, 32)


@pytest.mark.parametrize(
    ("container", "codec", "pixels", "options"),
    [
        ("webm", "libvpx-vp9", "yuva420p", {}),
        ("webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
        ("mov", "qtrle", "argb", {}),
    ],
)
def test_transparency_lies_on_white(container: str, codec: str, pixels: str, options: dict[str, str]) -> None:
    picture = np.zeros((32, 48, 4), np.uint8)
    picture[:, :24] = (255, 0, 0, 255)
    clip = encode([picture] * 5, container, codec, pixels=pixels, source="rgba", options=options)
    pictures = load_frames(clip)
    assert len(pictures) == 5
    for seen in (np.asarray(picture).astype(int) for picture in pictures):
        assert np.abs(seen[16, 8] - (255, 0, 0)).max() < 12 and np.abs(seen[16, 40] - 255).max() < 12


def test_transparent_animations_lie_on_white(tmp_path: Path) -> None:
    dot = [Image.new("RGBA", (9, 9)) for _ in range(3)]
    for i, picture in enumerate(dot):
        picture.putpixel((i, 4), (255, 0, 0, 255))
    for kind in ("gif", "webp"):
        dot[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=dot[1:], disposal=2, lossless=True)
        for i, picture in enumerate(load_frames(tmp_path / f"a.{kind}")):
            assert picture.getpixel((i, 4)) == (255, 0, 0) and picture.getpixel((8, 8)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("transfer", "level", "low", "high"),
    [
        ("smpte2084", 0.0, 0, 2),
        ("smpte2084", 0.38, 95, 106),  # 26 cd/m2, BT.2408's middle grey
        ("smpte2084", 0.58, 225, 240),  # 203 cd/m2, its white
        ("smpte2084", 1.0, 250, 255),
        ("arib-std-b67", 0.38, 95, 106),
        ("arib-std-b67", 0.75, 225, 240),
    ],
)
def test_hdr_is_mapped_to_the_standard_range(transfer: str, level: float, low: int, high: int) -> None:
    luma = np.full((64, 64), round(1023 * level), np.uint16)
    x265 = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    clip = encode([luma] * 3, "mp4", "libx265", pixels="yuv420p10le", source="gray10le", options={"x265-params": x265})
    for picture in load_frames(clip):
        seen = picture.getpixel((20, 20))
        assert max(seen) - min(seen) <= 2 and low <= seen[1] <= high


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 17), (101, 3)])
@pytest.mark.parametrize(
    ("container", "codec", "pixels"), [("webm", "libvpx-vp9", "yuv420p"), ("avi", "rawvideo", "bgr24")]
)
def test_odd_sizes(size: tuple[int, int], container: str, codec: str, pixels: str) -> None:
    width, height = size
    clip = encode([np.full((height, width, 3), 200, np.uint8)] * 3, container, codec, pixels=pixels)
    pictures = load_frames(clip)
    assert [picture.size for picture in pictures] == [size] * 3
    assert all(abs(picture.getpixel((width - 1, height - 1))[1] - 200) < 4 for picture in pictures)


def test_large_frames_are_shrunk_while_decoding() -> None:
    clip = encode([np.zeros((30, 2600, 3), np.uint8)] * 2, "avi", "mpeg4")
    assert {picture.size for picture in load_frames(clip)} == {(1280, 15)}
    assert load_frames(np.zeros((1, 3, 3000, 20), np.uint8))[0].size == (9, 1280)


def test_frames_have_one_size_where_the_stream_changes_it() -> None:
    small, large = (encode([np.full((h, 2 * h, 3), 90, np.uint8)] * 4, "mpegts", "mpeg2video") for h in (32, 48))
    assert {picture.size for picture in load_frames(small + large)} == {(64, 32)}


# --- what is refused --------------------------------------------------------------------------------------------------


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def picture_bytes(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return file.getvalue()


def huge() -> bytes:
    """A small clip whose header says otherwise."""
    clip = bytearray(encode([CORNERS] * 2, "avi", "rawvideo", pixels="bgr24"))
    struct.pack_into("<2i", clip, clip.index(b"strf") + 12, 7000, 7000)
    return bytes(clip)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("nowhere.mp4", "there is no file 'nowhere.mp4'"),
        ("https://example.com/a.mp4", "download the file"),
        (7, "cannot read a int; give a path"),
        (b"", "is empty"),
        (b"\0" * 100, "no video that can be read"),
        (b"<html><body>Not found</body></html>", "no video that can be read"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\n/etc/passwd\n", "no video that can be read"),
        (picture_bytes("PNG"), "no video that can be read"),
        (picture_bytes("GIF")[:20], "broken, cut short"),
        (b"GIF89a" + struct.pack("<HH", 8000, 8000) + picture_bytes("GIF")[10:], "8000 x 8000 pixels"),
        (b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + picture_bytes("GIF")[10:], "too large"),
        (sound(), "has no video stream"),
        (huge(), "7000 x 7000 pixels"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\) is no clip"),
        (np.zeros((0, 3, 8, 8), np.uint8), "holds no frames"),
        (np.zeros((2, 5, 8, 9), np.uint8), "frame 0: shape"),
        (torch.full((2, 3, 8, 8), 2.5), "frame 0: floats must be in 0..1"),
    ],
)  # fmt: skip
def test_what_is_no_clip_is_refused_by_name(source: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^video: .*{complaint}"):
        load_frames(source)


def test_a_clip_without_frames_is_refused() -> None:
    clip = encode([CORNERS] * 2, "avi", "mpeg4")
    with pytest.raises(ValueError, match=r"^video: .* holds no frames"):
        load_frames(clip[: clip.index(b"movi") + 4])


def test_max_frames_is_checked() -> None:
    with pytest.raises(ValueError, match="max_frames"):
        load_frames(np.zeros((1, 3, 2, 2), np.uint8), 0)


def test_a_frame_larger_than_its_header_says_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (encode([np.zeros((h, h, 3), np.uint8)] * 4, "mpegts", "mpeg2video") for h in (32, 96))
    monkeypatch.setattr(frames, "MAX_PIXELS", 64 * 64)
    with pytest.raises(ValueError, match=r"cut short: \d frames"):
        load_frames(small + large + large)


NOISE = np.random.default_rng(0).integers(0, 256, (100, HEIGHT, WIDTH, 3), np.uint8)


@pytest.mark.parametrize(
    ("container", "codec"), [("matroska", "mpeg4"), ("webm", "libvpx"), ("flv", "libx264"), ("mp4", "libx264")]
)
def test_a_clip_cut_short_gives_what_is_there_if_that_is_most(
    container: str, codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "clip"
    path.write_bytes(encode(NOISE, container, codec))
    if container == "mp4":  # with its index in front, as on the web
        with av.open(str(path)) as source, av.open(str(path) + ".mp4", "w", options={"movflags": "faststart"}) as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
        path = Path(str(path) + ".mp4")
    whole = load_frames(path, 16)
    clip = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        kept = load_frames(clip[: len(clip) * 8 // 10], 16)
    assert 10 <= len(kept) <= 14 and "cut short" in caplog.text
    n_same = sum(a.tobytes() == b.tobytes() for a, b in zip(kept, whole, strict=False))
    assert n_same >= len(kept) - 1  # the one at the cut may be another
    with pytest.raises(ValueError, match=r"^video: .*broken or cut short.* replace it"):
        load_frames(clip[: len(clip) * 3 // 10], 16)


def test_a_hole_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    clip = bytearray(encode(NOISE, "matroska", "mpeg4"))
    whole = load_frames(bytes(clip), 16)
    clip[len(clip) // 2 : len(clip) // 2 + 4000] = bytes(4000)
    with caplog.at_level(logging.WARNING):
        kept = load_frames(bytes(clip), 16)
    assert kept[0].tobytes() == whole[0].tobytes() and kept[-1].tobytes() == whole[-1].tobytes()
    assert len(kept) >= 13


def test_an_animation_cut_short_gives_what_is_there(caplog: pytest.LogCaptureFixture) -> None:
    file = io.BytesIO()
    pictures = [Image.fromarray(picture) for picture in NOISE[:10]]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
    clip = file.getvalue()
    assert len(load_frames(clip)) == 10
    assert 6 <= len(load_frames(clip[: len(clip) * 8 // 10])) <= 9
