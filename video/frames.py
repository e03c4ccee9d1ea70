"""Opens video: whatever form a clip is in becomes a few RGB frames spread evenly over it, or a clear error.

A clip is cut into `max_frames` equal shares of time, and of each the frame is taken that is on screen at its centre: no
end of the clip is preferred, and a frame rate that varies changes nothing. A frame comes once, however long it stays on
screen; so a clip with no more than `max_frames` frames gives all of them.

Long clips are not decoded from end to end. A second reader of the same file, the scout, looks up where decoding could
begin anew (at a keyframe) before each wanted time, and the decoder jumps there where that is ahead of it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain, count, dropwhile, islice
from typing import Any, BinaryIO, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor

from data.files import open_media
from data.images import load_image
from video.hdr import HDR_TRANSFERS, to_standard_range

logger = logging.getLogger(__name__)

#: Most frames of a clip (section 7.2).
MAX_FRAMES = 64
#: Most pixels of a frame: 8192 x 4352, which is where the levels of H.264 end. Checked before anything is decoded.
MAX_PIXELS = 8192 * 4352
#: Larger frames are shrunk to this longer side as they are decoded, so 64 of them take at most 315 MB.
MAX_SIDE = 1280

# Video is untrusted, so only plain containers: FFmpeg would also follow playlists to other files and addresses.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
_ANIMATIONS = ("GIF", "WEBP")  # Pillow's; FFmpeg reads no animated WebP
_FRAME_SECONDS = 0.1  # of an animation's frame that says 0, as browsers have it
_LOOK_BACK = (0, 1, 5, 25)  # seconds; where a container has no index, a jump may land after the keyframe that is wanted


def load_frames(source: Any, max_frames: int = MAX_FRAMES) -> list[Image.Image]:
    """Opens a clip as at most `max_frames` different RGB frames of one size, spread evenly over its time.

    Rotated as its header says, with square pixels, transparency on white and HDR mapped to the standard range. Of a
    clip that is broken or cut short, what can be decoded is returned with a warning, if that reaches beyond its middle
    (of a GIF or WebP, which does not say how long it is, in any case).

    Args:
        source: a path or encoded bytes of MP4, MOV, MKV, WebM, AVI, MPEG, FLV, WMV, Ogg, GIF or animated WebP; or
            pixels: an array or tensor `(T, C, H, W)` or `(T, H, W, C)` with 1, 3 or 4 channels of bool, uint8, uint16,
            or floats in 0..1.
        max_frames: most frames to return.

    Raises:
        ValueError: naming `video`, for anything that is not a clip of which most can be decoded.
    """
    if max_frames < 1:
        raise ValueError(f"max_frames: need at least 1, got {max_frames}")
    if isinstance(source, (Tensor, np.ndarray)):
        return _from_array(source, max_frames)
    with _open_animation(source) as (animation, name):
        if animation is not None:
            return _from_animation(animation, name, max_frames)
    with _open_track(source) as scout, _open_track(source) as track:
        times = _centres(scout, max_frames)
        pictures = [track.picture(frame) for frame in _shown_at(times, track, scout)]
        track.check(times)
        logger.debug("video: decoded %d frames of %s for %d", track.n_frames, track.name, len(pictures))
    return pictures


def video_seconds(source: Any) -> float:
    """Duration of a path or encoded bytes: by the header, or where that says none, by the times of all frames.

    Raises:
        ValueError: naming `video`, for what is not video.
    """
    with _open_animation(source) as (animation, name):
        if animation is not None:
            return sum(_durations(animation, name))
    with _open_track(source) as track:
        return track.span()[1]


# --- pixels and animations --------------------------------------------------------------------------------------------


def _from_array(source: Tensor | np.ndarray, max_frames: int) -> list[Image.Image]:
    frames = torch.as_tensor(np.ascontiguousarray(source)) if isinstance(source, np.ndarray) else source
    shape = tuple(frames.shape)
    if len(shape) != 4:
        raise ValueError(f"video: shape {shape} is no clip; give (frames, channels, height, width)")
    if not len(frames):
        raise ValueError(f"video: shape {shape} holds no frames; give at least one")
    n = min(len(frames), max_frames)
    pictures = []
    for i in ((torch.arange(n) + 0.5) * len(frames) / n).long().tolist():
        try:
            pictures.append(load_image(frames[i], max_pixels=MAX_PIXELS))
        except ValueError as error:
            raise ValueError(f"video: frame {i}: {str(error).removeprefix('image: ')}") from None
    return [_shrink(picture) for picture in pictures]


@contextlib.contextmanager
def _open_animation(source: Any) -> Iterator[tuple[Image.Image | None, str]]:
    """A GIF or WebP, not yet decoded; None where it is something else."""
    file, name = open_media(source, "video", "a path, bytes, or a (frames, channels, height, width) tensor or array")
    with file:
        start = file.read(12)
        if not start:
            raise ValueError(f"video: {name} is empty")
        if not start.startswith(b"GIF8") and (start[:4], start[8:]) != (b"RIFF", b"WEBP"):
            yield None, name
            return
        file.seek(0)
        try:
            image = Image.open(file, formats=_ANIMATIONS)
        except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
            raise _broken_animation(name, error) from error
        _check_size(*image.size, name)
        yield image, name


def _durations(animation: Image.Image, name: str) -> list[float]:
    """Seconds of each frame, up to the first that cannot be decoded; the format does not say how many there should be."""
    seconds: list[float] = []
    try:
        for i in count():
            animation.seek(i)
            animation.load()
            seconds.append(animation.info.get("duration", 0) / 1000 or _FRAME_SECONDS)
    except EOFError:
        pass
    except Exception as error:
        if not seconds:
            raise _broken_animation(name, error) from error
        logger.warning("video: %s is cut short after %d frames", name, len(seconds))
    return seconds


def _broken_animation(name: str, error: Exception) -> ValueError:
    return ValueError(f"video: {name} is broken, cut short or too large ({error}); replace it with a whole file")


def _from_animation(animation: Image.Image, name: str, max_frames: int) -> list[Image.Image]:
    ends = np.cumsum(_durations(animation, name))
    if len(ends) <= max_frames:
        chosen = list(range(len(ends)))
    else:
        centres = (np.arange(max_frames) + 0.5) * ends[-1] / max_frames
        chosen = np.unique(np.searchsorted(ends, centres, side="right")).tolist()
    pictures = []
    for i in chosen:  # in order, since each frame is drawn over the one before it
        animation.seek(i)
        pictures.append(_shrink(load_image(animation)))
    return pictures


def _shrink(picture: Image.Image) -> Image.Image:
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"video: the frames of {name} have {width} x {height} pixels, more than {MAX_PIXELS}; scale it down"
        )


# --- containers of video streams --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_track(source: Any) -> Iterator[_Track]:
    """The video stream of an open file; FFmpeg's errors inside become ours."""
    file, name = open_media(source, "video", "a path, bytes, or a (frames, channels, height, width) tensor or array")
    with file, _open_container(file, name) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError(f"video: {name} has no video stream; give a clip, or pass sound as audio")
        _check_size(streams[0].width, streams[0].height, name)
        try:
            yield _Track(container, streams[0], name)
        except av.FFmpegError as error:
            raise ValueError(f"video: {name} is broken ({error.strerror}); replace it with a whole file") from error


def _open_container(file: BinaryIO, name: str) -> InputContainer:
    start = file.read(16)
    file.seek(0)
    try:
        # FFmpeg is given the open file, never its name, which could be an address or a device.
        return av.open(file, "r", options={"format_whitelist": _FORMATS}, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise ValueError(
            f"video: {name} is no video that can be read, or its header is cut off ({error.strerror}); "
            f"it starts with {start!r}"
        ) from error


class _Track:
    """Reads one video stream, from its start or from where it is told to.

    Attributes:
        n_frames, n_bad: frames decoded so far, and packets that could not be.
        reached: seconds at which the last decoded frame ends.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream, name: str) -> None:
        self.container, self.stream, self.name = container, stream, name
        assert stream.time_base is not None
        self.tick = float(stream.time_base)
        self.codec = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1" and self.codec.name in ("vp8", "vp9"):
            # FFmpeg's own decoders leave transparency out; libvpx has it.
            decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[self.codec.name]
            self.codec = cast(av.VideoCodecContext, av.CodecContext.create(decoder, "r"))
        self.codec.options = {"max_pixels": str(MAX_PIXELS)}  # also for frames that are larger than the header says
        self.converter = VideoReformatter()  # its tables are kept from frame to frame
        self.n_frames = self.n_bad = 0
        self.reached = 0.0
        self.layout: tuple[int, int, list[Image.Transpose]] | None = None

    def span(self) -> tuple[float, float]:
        """Start and duration in seconds; reads the whole file where the header does not say."""
        start = (self.stream.start_time or 0) * self.tick
        if self.stream.duration:
            return start, self.stream.duration * self.tick
        if self.container.duration:
            return start, (self.container.duration + (self.container.start_time or 0)) / av.time_base - start
        self.container.seek(0)
        ends = [self.time(packet) + (packet.duration or 0) * self.tick for packet in self.packets()]
        return start, max(ends, default=start) - start

    def packets(self) -> Iterator[av.Packet]:
        """From where the file stands to its end, or to where it cannot be read any more."""
        with contextlib.suppress(av.FFmpegError):
            yield from (packet for packet in self.container.demux(self.stream) if packet.size)

    def keyframes(self, seconds: float) -> Iterator[av.Packet]:
        """Packets from about `seconds` on, beginning where decoding can."""
        try:
            self.container.seek(max(0, round(seconds / self.tick)), stream=self.stream)
        except av.FFmpegError:  # no index and no way to do without
            self.container.seek(0)
        return dropwhile(lambda packet: not packet.is_keyframe, self.packets())

    def frames(self, packets: Iterator[av.Packet]) -> Iterator[av.VideoFrame]:
        """Decodes; what cannot be decoded is left out and counted."""
        self.codec.flush_buffers()
        for packet in chain(packets, [None]):  # the last one has the decoder give out what it holds back
            try:
                frames = self.codec.decode(packet)
            except av.FFmpegError:
                self.n_bad += 1
                continue
            for frame in frames:
                self.n_frames += 1
                self.reached = self.time(frame) + (frame.duration or 0) * self.tick
                yield frame

    def time(self, item: av.Packet | av.VideoFrame) -> float:
        """Seconds at which a packet's or a frame's picture appears."""
        ticks = item.pts if item.pts is not None else item.dts
        return self.reached if ticks is None else ticks * self.tick

    def picture(self, frame: av.VideoFrame) -> Image.Image:
        """RGB, turned and scaled as the first frame is: all frames of a clip have one size."""
        if self.layout is None:
            self.layout = (*self._size(frame), _turns(frame))
        width, height, turns = self.layout
        convert = partial(self.converter.reformat, frame, width, height)
        if frame.color_trc in HDR_TRANSFERS:
            pixels = to_standard_range(convert("rgb48le").to_ndarray(), frame.color_trc)
        else:
            has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
            pixels = convert("rgba" if has_alpha else "rgb24").to_ndarray()
        picture = load_image(Image.fromarray(pixels))  # lays transparency on white
        for turn in turns:
            picture = picture.transpose(turn)
        return picture

    def _size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Width and height with square pixels, at most `MAX_SIDE` each."""
        width, height = frame.width * float(self.stream.sample_aspect_ratio or 1), float(frame.height)
        scale = min(1.0, MAX_SIDE / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    def check(self, times: list[float]) -> None:
        """Compares what was decoded with what was asked for."""
        if not self.n_frames or self.n_bad > self.n_frames or self.reached < (times[0] + times[-1]) / 2:
            raise ValueError(
                f"video: {self.name} is broken or cut short: {self.n_frames} frames up to {self.reached:.2f} s of "
                f"{times[-1]:.2f} s can be decoded; replace it with a whole file"
            )
        if self.n_bad or self.reached < times[-1]:
            logger.warning(
                "video: %s is broken or cut short: %d packets cannot be decoded, and it ends at %.2f s of %.2f s",
                self.name, self.n_bad, self.reached, times[-1],
            )  # fmt: skip


def _turns(frame: av.VideoFrame) -> list[Image.Transpose]:
    """What makes a frame upright, by its display matrix: `x' = a x + c y`, `y' = b x + d y`."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return []
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    swaps = abs(b) > abs(a)
    across, down = (c, b) if swaps else (a, d)
    turns = [(swaps, Image.Transpose.TRANSPOSE)]
    turns += [(across < 0, Image.Transpose.FLIP_LEFT_RIGHT), (down < 0, Image.Transpose.FLIP_TOP_BOTTOM)]
    return [turn for applies, turn in turns if applies]


def _centres(scout: _Track, max_frames: int) -> list[float]:
    """Times to take frames at: the centres of `max_frames` shares, or the time of every frame if there are no more."""
    first = list(islice(scout.packets(), max_frames + 1))
    if not first:
        raise ValueError(f"video: {scout.name} holds no frames; replace it with a whole file")
    if len(first) <= max_frames:
        return sorted(map(scout.time, first))
    start, seconds = scout.span()
    return [start + (i + 0.5) * seconds / max_frames for i in range(max_frames)]


def _shown_at(times: list[float], track: _Track, scout: _Track) -> Iterator[av.VideoFrame]:
    """The frame on screen at each time, once; times ascend."""
    frames = track.frames(track.packets())
    shown, coming = None, next(frames, None)
    for time in times:
        position = track.reached if coming is None else track.time(coming)
        if (start := _jump(time, position, scout)) is not None:
            frames = track.frames(track.keyframes(start))
            shown, coming = None, next(frames, None)
        fresh = shown is None
        while coming is not None and (shown is None or track.time(coming) <= time):
            shown, coming, fresh = coming, next(frames, None), True
        if shown is not None and fresh:
            yield shown


def _jump(time: float, position: float, scout: _Track) -> float | None:
    """Where to go for the last keyframe up to a time; None where decoding on from `position` is no longer way."""
    for back in _LOOK_BACK:
        if time - back <= position:
            return None
        key = next(scout.keyframes(time - back), None)
        if key is not None and scout.time(key) <= time:
            return time - back if scout.time(key) > position else None
    return None
