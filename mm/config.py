"""What a multimodal model is made of, and strict reading of such descriptions from JSON and YAML."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Union

from lm.config import LlamaConfig
from speech.adapter import SpeechAdapterConfig
from speech.conformer import PRESETS as CONFORMER_PRESETS
from speech.conformer import ConformerConfig
from speech.features import FeaturesConfig
from video.adapter import VideoAdapterConfig
from vision.adapter import ImageAdapterConfig
from vision.encoder import PRESETS as ENCODER_PRESETS
from vision.encoder import ImageEncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The image part: encoder and cross-attention adapter (section 7.2)."""

    encoder: ImageEncoderConfig
    adapter: ImageAdapterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """The ears: features, encoder, adapter, and the two tokens that enclose a recording (section 8.2.1)."""

    features: FeaturesConfig
    encoder: ConformerConfig
    adapter: SpeechAdapterConfig
    start_id: int
    end_id: int

    def n_tokens(self, n_frames: int) -> int:
        """Embeddings that a recording of that many mel frames becomes; its two special tokens not counted."""
        return self.adapter.n_tokens(self.encoder.n_outputs(n_frames))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The video part: aggregator and cross-attention to clips, whose frames the image part encodes (section 7.2).

    Attributes:
        max_frames: most frames of a clip, sampled uniformly over it (16 in the paper's pre-training, 64 in its finetuning).
    """

    adapter: VideoAdapterConfig
    max_frames: int

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise ValueError(f"max_frames must be at least 1, got {self.max_frames}")


#: Kind of medium -> name of the part that takes it in.
PART_OF_MEDIUM = {"image": "image", "audio": "speech", "video": "video"}
_BLIND = "video: a model without an image part cannot look at frames; give it one first"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultimodalConfig:
    """A language model and the parts beside it.

    Attributes:
        chat: name of the chat format, "llama3" or "chatml".
        n_new_tokens: rows embedded beside the frozen token table; row i is id `lm.vocab_size + i`.
        media_ids: token id that stands for a medium in the text, by kind: for all of a picture or clip, for each embedding of
            speech.
        lm_source: where the language model is loaded from when it is not saved along.
    """

    lm: LlamaConfig
    chat: str
    image: ImageConfig | None = None
    speech: SpeechConfig | None = None
    video: VideoConfig | None = None
    n_new_tokens: int = 0
    media_ids: dict[str, int] = dataclasses.field(default_factory=dict)
    lm_source: str | None = None

    def __post_init__(self) -> None:
        for medium, part in PART_OF_MEDIUM.items():
            if getattr(self, part) and medium not in self.media_ids:
                raise ValueError(f"media_ids: a model's {part} part needs the id of its {medium} token")
        if self.video and not self.image:
            raise ValueError(_BLIND)
        enclosing = {"start_id": self.speech.start_id, "end_id": self.speech.end_id} if self.speech else {}
        for kind, token_id in (self.media_ids | enclosing).items():
            if token_id >= self.lm.vocab_size + self.n_new_tokens:
                raise ValueError(f"media_ids: id {token_id} of {kind!r} has no embedding row")

    @property
    def has_parts(self) -> bool:
        """Whether there is anything beside the language model."""
        return bool(self.image or self.speech or self.video)

    def new_token_rows(self, medium: str) -> tuple[int, ...]:
        """Rows of the new tokens that stand for a medium of this kind, or enclose it."""
        ids = {self.media_ids[medium]}
        if medium == "audio" and self.speech:
            ids |= {self.speech.start_id, self.speech.end_id}
        return tuple(sorted(token_id - self.lm.vocab_size for token_id in ids if token_id >= self.lm.vocab_size))


def _debug_image(lm: LlamaConfig) -> ImageConfig:
    encoder = ENCODER_PRESETS["debug"]()
    return ImageConfig(encoder=encoder, adapter=ImageAdapterConfig.for_lm(lm, feature_dim=encoder.feature_dim))


def _bundled_image(lm: LlamaConfig) -> ImageConfig:
    encoder = ENCODER_PRESETS["hybrid-s"]()
    # A narrow FFN keeps all adapters of the package under its 60 MB.
    adapter = ImageAdapterConfig.for_lm(lm, feature_dim=encoder.feature_dim, ffn_dim=192)
    return ImageConfig(encoder=encoder, adapter=adapter)


def _paper_image(lm: LlamaConfig) -> ImageConfig:
    encoder = ENCODER_PRESETS["vit-h-14"]()
    return ImageConfig(encoder=encoder, adapter=ImageAdapterConfig.for_lm(lm, feature_dim=encoder.feature_dim))


#: Image parts by name; each fits itself to the language model that it is given.
IMAGE_PRESETS: dict[str, Callable[[LlamaConfig], ImageConfig]] = {
    "debug": _debug_image,
    "bundled": _bundled_image,
    "paper": _paper_image,
}


#: Ears by name: presets of encoder and adapter.
SPEECH_PRESETS = {"debug": ("debug", "debug"), "bundled": ("bundled", "bundled"), "paper": ("llama3", "paper")}

#: Video parts by name: most frames of a clip. The adapter's preset (`video.adapter.PRESETS`) has the same name.
VIDEO_PRESETS = {"debug": 7, "bundled": 16, "paper": 16}


def with_parts(
    lm: LlamaConfig,
    *,
    image: str | None = None,
    speech: str | None = None,
    video: str | None = None,
    chat: str,
    lm_source: str | None = None,
) -> MultimodalConfig:
    """Configuration of a language model with new parts by name (`IMAGE_PRESETS`, `SPEECH_PRESETS`, `VIDEO_PRESETS`)."""
    config = MultimodalConfig(lm=lm, chat=chat, lm_source=lm_source)
    for part, preset in (("image", image), ("speech", speech), ("video", video)):
        if preset is not None:
            config = add_part(config, part, preset)
    return config


def add_part(config: MultimodalConfig, part: str, preset: str) -> MultimodalConfig:
    """Adds a new part of this name, "image", "speech" or "video"; its tokens are new rows after those that are there.

    Raises:
        ValueError: the model has such a part, or the preset is unknown.
    """
    if getattr(config, part) is not None:
        raise ValueError(f"{part}: this model has a {part} part already")
    return {"image": add_image, "speech": add_speech, "video": add_video}[part](config, preset)


def add_image(config: MultimodalConfig, preset: str) -> MultimodalConfig:
    """Adds a new image part; its token is a new row."""
    if preset not in IMAGE_PRESETS:
        raise ValueError(f"image preset {preset!r} is unknown; choose one of {', '.join(IMAGE_PRESETS)}")
    first = config.lm.vocab_size + config.n_new_tokens
    return dataclasses.replace(
        config,
        image=IMAGE_PRESETS[preset](config.lm),
        n_new_tokens=config.n_new_tokens + 1,
        media_ids=config.media_ids | {"image": first},
    )


def add_speech(config: MultimodalConfig, preset: str) -> MultimodalConfig:
    """Adds new ears; their tokens are three new rows: speech, and its start and end."""
    if preset not in SPEECH_PRESETS:
        raise ValueError(f"speech preset {preset!r} is unknown; choose one of {', '.join(SPEECH_PRESETS)}")
    encoder_preset, adapter_preset = SPEECH_PRESETS[preset]
    encoder = CONFORMER_PRESETS[encoder_preset]()
    first = config.lm.vocab_size + config.n_new_tokens
    speech = SpeechConfig(
        features=FeaturesConfig(n_mels=encoder.n_mels),
        encoder=encoder,
        adapter=SpeechAdapterConfig.for_lm(config.lm, encoder.dim, adapter_preset),
        start_id=first + 1,
        end_id=first + 2,
    )
    return dataclasses.replace(
        config, speech=speech, n_new_tokens=config.n_new_tokens + 3, media_ids=config.media_ids | {"audio": first}
    )


def add_video(config: MultimodalConfig, preset: str) -> MultimodalConfig:
    """Adds a new video part to a model that has an image part; a clip's token is a new row."""
    if preset not in VIDEO_PRESETS:
        raise ValueError(f"video preset {preset!r} is unknown; choose one of {', '.join(VIDEO_PRESETS)}")
    if config.image is None:
        raise ValueError(_BLIND)
    first = config.lm.vocab_size + config.n_new_tokens
    adapter = VideoAdapterConfig.for_lm(config.lm, config.image.adapter, config.image.encoder, preset)
    return dataclasses.replace(
        config,
        video=VideoConfig(adapter=adapter, max_frames=VIDEO_PRESETS[preset]),
        n_new_tokens=config.n_new_tokens + 1,
        media_ids=config.media_ids | {"video": first},
    )


def from_mapping(cls: type, data: Mapping[str, Any], where: str = "config") -> Any:
    """Builds a dataclass from plain data, nested dataclasses and tuples included.

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing key, or a value of the wrong type; names it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a mapping of {cls.__name__} fields, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys are {', '.join(fields)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a mapping, got {value!r}")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            raise ValueError(f"{where}: expected a number, got {value!r}") from None
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is int)):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
