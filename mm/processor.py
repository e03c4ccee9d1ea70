"""Messages become samples, samples become batches. The only place where media meet token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.audio import load_audio
from data.images import load_image
from lm.chat import ChatFormat, Encoded, MediaSpan
from mm.config import SpeechConfig, VideoConfig
from speech.features import LogMel
from video.clips import Clips
from video.frames import load_frames
from vision.encoder import ImageEncoderConfig
from vision.tiling import Pictures, Tiles, tile_image

Style = Literal["chat", "plain"]


@dataclass
class Sample:
    """One conversation, ready to be batched.

    Attributes:
        supervised: True for ids whose prediction is trained.
        tiles: the pictures in reading order; picture k stands at index `picture_positions[k]` of `ids`.
        clips: the tiled frames of each clip in reading order; clip k stands at index `clip_positions[k]` of `ids`.
        mels: mel frames `(T, M)` of the recordings in reading order; each has as many audio tokens in `ids` as embeddings.
    """

    ids: list[int]
    supervised: list[bool]
    tiles: list[Tiles] = field(default_factory=list)
    picture_positions: list[int] = field(default_factory=list)
    clips: list[list[Tiles]] = field(default_factory=list)
    clip_positions: list[int] = field(default_factory=list)
    mels: list[Tensor] = field(default_factory=list)
    key: str = ""


def _nowhere() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Batch:
    """Rows of token ids with the pictures, clips and recordings of all rows, each flattened in reading order.

    Attributes:
        ids_BT: token ids, padded.
        valid_BT: False at padding.
        supervised_BT: ids whose prediction is trained.
        pictures: P pictures of all rows, or None.
        picture_row_P: row of each picture.
        picture_position_P: index of its token in the row, padding not counted.
        clips: V clips of all rows, or None.
        clip_row_V, clip_position_V: likewise of each clip.
        frame_features_PNLF: what the image encoder makes of the frames of `clips`, where that is known already.
        mel_ATM: mel frames of the A recordings of all rows, padded with zeros, or None.
        n_frames_A: mel frames of each.
    """

    ids_BT: Tensor
    valid_BT: Tensor
    supervised_BT: Tensor
    pictures: Pictures | None = None
    picture_row_P: Tensor = field(default_factory=_nowhere)
    picture_position_P: Tensor = field(default_factory=_nowhere)
    clips: Clips | None = None
    clip_row_V: Tensor = field(default_factory=_nowhere)
    clip_position_V: Tensor = field(default_factory=_nowhere)
    frame_features_PNLF: Tensor | None = None
    mel_ATM: Tensor | None = None
    n_frames_A: Tensor | None = None
    keys: list[str] = field(default_factory=list)

    @property
    def valid_BS(self) -> Tensor | None:
        """`valid_BT`, or None when nothing is padded, which lets attention take its fast path."""
        return None if bool(self.valid_BT.all()) else self.valid_BT

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Pictures | Clips)
        }
        return replace(self, **moved)


def read_mel(source: Any, log_mel: LogMel, augment: Callable[[Tensor], Tensor] = lambda waveform: waveform) -> Tensor:
    """Opens a recording as mel frames `(T, M)`; FP32, also where the caller autocasts.

    Args:
        source: whatever `data.audio.load_audio` opens.
        augment: changes the waveform `(samples,)` before its features are made.
    """
    waveform_N = augment(load_audio(source, log_mel.config.sample_rate))
    with torch.autocast("cpu", enabled=False):
        mel_1TM, _ = log_mel(waveform_N[None], torch.tensor([len(waveform_N)]))
    return mel_1TM[0]


def pad_frames(recordings: Sequence[Tensor], multiple: int = 64) -> Tensor:
    """Stacks recordings `(T, ...)`, filled with zeros to one length.

    It is a multiple of `multiple`, so that from batch to batch few shapes occur: a memory allocator that keeps what it was given
    would otherwise keep something for each of hundreds.
    """
    padded = pad_sequence(list(recordings), batch_first=True)
    n_missing = -padded.shape[1] % multiple
    return torch.cat([padded, padded.new_zeros(len(padded), n_missing, *padded.shape[2:])], dim=1)


class Processor:
    """Turns messages into samples and batches, for one chat format and one model's eyes and ears.

    Args:
        chat: writes messages as ids.
        image: the image encoder's configuration (tile size and count); None for a model without eyes.
        speech: the speech part's configuration; None for a model without ears.
        video: the video part's configuration; None for a model that takes no clips.
    """

    def __init__(
        self,
        chat: ChatFormat,
        image: ImageEncoderConfig | None = None,
        speech: SpeechConfig | None = None,
        video: VideoConfig | None = None,
    ) -> None:
        self.chat = chat
        self.image = image
        self.speech = speech
        self.video = video
        self.log_mel = LogMel(speech.features) if speech else None

    def tokenize(
        self, messages: Sequence[dict[str, Any]], *, style: Style = "chat", add_generation_prompt: bool = False
    ) -> Encoded:
        """Ids and media spans; media are not opened.

        Style "chat" is the model's conversation format. "plain" is a base model's: the media and text of all messages run on,
        without roles, for pre-training on captions.
        """
        if style == "chat":
            return self.chat.encode(messages, add_generation_prompt=add_generation_prompt)
        if style != "plain":
            raise ValueError(f"style {style!r} is unknown; choose 'chat' or 'plain'")
        parts: list[Any] = []
        for message in messages:
            content = message.get("content")
            if not isinstance(content, str | list | tuple):
                raise ValueError(f"messages: content must be text or a list of parts, not {type(content).__name__}")
            parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
        return self.chat.encode_plain(parts, end=not add_generation_prompt)

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        style: Style = "chat",
        add_generation_prompt: bool = False,
        key: str = "",
        hear: Callable[[Any, LogMel], Tensor] = read_mel,
    ) -> Sample:
        """Tokenises and opens the media.

        Args:
            hear: opens recordings.

        Raises:
            ValueError: a broken medium, or one that this model has no part for.
        """
        encoded = self.tokenize(messages, style=style, add_generation_prompt=add_generation_prompt)
        sample = Sample(ids=[], supervised=[], key=key)
        done = 0
        for span in encoded.media:
            sample.ids += encoded.ids[done : span.position]
            sample.supervised += encoded.supervised[done : span.position]
            done = span.position + 1
            if span.kind == "image" and self.image is not None:
                self._add_picture(sample, span, self.image)
            elif span.kind == "video" and self.image is not None and self.video is not None:
                self._add_clip(sample, span, self.image, self.video)
            elif span.kind == "audio" and self.speech is not None:
                self._add_recording(sample, span, self.speech, hear)
            else:
                raise ValueError(
                    f"{span.kind}: this model has no part that understands it; load one that has, such as 'bundled'"
                )
        sample.ids += encoded.ids[done:]
        sample.supervised += encoded.supervised[done:]
        return sample

    def _add_picture(self, sample: Sample, span: MediaSpan, image: ImageEncoderConfig) -> None:
        picture = load_image(span.source)
        sample.tiles.append(tile_image(picture, image.tile_size, image.max_tiles))
        sample.picture_positions.append(len(sample.ids))
        sample.ids.append(self.chat.media_ids["image"])
        sample.supervised.append(False)

    def _add_clip(self, sample: Sample, span: MediaSpan, image: ImageEncoderConfig, video: VideoConfig) -> None:
        """A clip is one token; its frames are of one size, so they are tiled alike."""
        max_tiles = min(image.max_tiles, video.adapter.aggregator.max_tiles)
        frames = load_frames(span.source, video.max_frames)
        sample.clips.append([tile_image(frame, image.tile_size, max_tiles) for frame in frames])
        sample.clip_positions.append(len(sample.ids))
        sample.ids.append(self.chat.media_ids["video"])
        sample.supervised.append(False)

    def _add_recording(
        self, sample: Sample, span: MediaSpan, speech: SpeechConfig, hear: Callable[[Any, LogMel], Tensor]
    ) -> None:
        """A recording is a start token, an audio token for each of its embeddings, and an end token."""
        assert self.log_mel is not None
        mel_TM = hear(span.source, self.log_mel)
        sample.mels.append(mel_TM)
        n_tokens = speech.n_tokens(len(mel_TM))
        sample.ids += [speech.start_id, *[self.chat.media_ids["audio"]] * n_tokens, speech.end_id]
        sample.supervised += [False] * (n_tokens + 2)

    def collate(self, samples: Sequence[Sample], *, pad_side: Literal["left", "right"] = "right") -> Batch:
        """Pads samples to one length: right for training, left for generation."""
        length = max(len(sample.ids) for sample in samples)

        def padded(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
            out = torch.zeros(len(rows), length, dtype=dtype)
            for i, row in enumerate(rows):
                start = length - len(row) if pad_side == "left" else 0
                out[i, start : start + len(row)] = torch.tensor(row, dtype=dtype)
            return out

        mels = [mel_TM for sample in samples for mel_TM in sample.mels]
        clips = [clip for sample in samples for clip in sample.clips]
        tiles = [tile for sample in samples for tile in sample.tiles]
        n_tiles = self.image.n_padded_tiles if self.image else None
        return Batch(
            ids_BT=padded([sample.ids for sample in samples], torch.int64),
            valid_BT=padded([[True] * len(sample.ids) for sample in samples], torch.bool),
            supervised_BT=padded([sample.supervised for sample in samples], torch.bool),
            pictures=Pictures.collate(tiles, n_tiles=n_tiles) if tiles else None,
            picture_row_P=torch.tensor([i for i, s in enumerate(samples) for _ in s.tiles], dtype=torch.int64),
            picture_position_P=torch.tensor([p for s in samples for p in s.picture_positions], dtype=torch.int64),
            clips=Clips.collate(clips, n_tiles=n_tiles) if clips else None,
            clip_row_V=torch.tensor([i for i, s in enumerate(samples) for _ in s.clips], dtype=torch.int64),
            clip_position_V=torch.tensor([p for s in samples for p in s.clip_positions], dtype=torch.int64),
            mel_ATM=pad_frames(mels) if mels else None,
            n_frames_A=torch.tensor([len(mel_TM) for mel_TM in mels]) if mels else None,
            keys=[sample.key for sample in samples],
        )
