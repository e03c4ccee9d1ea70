"""A training run's configuration: typed, from YAML with dotted overrides on top.

Precedence: command line, then YAML, then the defaults here. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from data.augment_audio import SpecAugmentConfig, WaveformAugmentation, augment_waveform, spec_augment
from mm.config import PART_OF_MEDIUM, SPEECH_PRESETS, VIDEO_PRESETS, from_mapping
from mm.languages import find_language
from mm.stages import STAGES, LearningRates, Stage
from speech.acoustic import PRESETS as ACOUSTIC_PRESETS
from speech.bestrq import BestRQConfig
from speech.conformer import PRESETS as CONFORMER_PRESETS
from speech.normalizer import NormalizerConfig
from speech.prosody import PRESETS as PROSODY_PRESETS
from speech.prosody import ProsodyConfig
from speech.vocoder import PRESETS as VOCODER_PRESETS
from vision.contrastive import TextTowerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: What is asked about a recording that comes with nothing but a text: to write it down, to translate it, to reply.
TASKS = ("asr", "translation", "dialogue")


@dataclass(frozen=True, kw_only=True)
class VocodingConfig:
    """How tts-vocoder learns.

    Attributes:
        frames: length of a crop.
        crops: out of each utterance.
        mels_from: an export of tts-acoustic, whose log-mel frames the vocoder is given; those of the recordings when None.
        judged_from: step, counted from 0, from which on discriminators judge; never when None.
        judged: frames at a crop's end that they hear.
        channels: of the discriminators' first layers.
        spectral, matching: weights of the distance of spectra, and of that of the discriminators' features.
    """

    frames: int = 64
    crops: int = 4
    mels_from: str | None = None
    judged_from: int | None = None
    judged: int = 32
    channels: int = 32
    spectral: float = 15.0
    matching: float = 2.0

    def __post_init__(self) -> None:
        for name in ("frames", "crops", "judged", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"vocoding.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from. A key that the stage does not read is an error.

    Attributes:
        init_from: a model to go on with, usually the `export` of an earlier stage; whatever `from_pretrained` takes. In
            tts-acoustic and tts-vocoder an export of the same stage, instead of a name.
        swap_lm: language model that replaces its own (image-sft, video-sft).
        swap_image: a model whose image part replaces its own, such as an export of image-sft (video-sft).
        lm: language model to give eyes or ears, together with `image` or `speech`.
        image: name of the new image part (`mm.config.IMAGE_PRESETS`), for `lm`, or for an `init_from` that has none.
        speech: likewise of new ears (`mm.config.SPEECH_PRESETS`).
        video: name of the new video part (`mm.config.VIDEO_PRESETS`), for an `init_from` that has none.
        encoder: in image-encoder, speech-encoder and speech-ctc the name of a shape (`vision.encoder.PRESETS`,
            `speech.conformer.PRESETS`); in image-adapter an export of image-encoder; in speech-ctc, speech-align and
            speech an export of an earlier stage of speech.
        stem: name of pre-trained weights for a hybrid encoder's stem (`vision.pretrained`).
        open_gates: where the gates of a new image or video part start, see `CrossAdapter.open_gates`; at zero, as released, when
            None.
        from_image: whether a new video part starts from the image part (`VideoAdapter.start_from`); from random weights when not.
        text: shape of the text tower of image-encoder.
        best_rq: masks and codebooks of speech-encoder.
        normalizer: shape of tts-normalizer's model, and the language model whose features it reads.
        prosody: shape of tts-prosody's model, and the language model whose features it reads.
        acoustic, vocoder: name of a shape (`speech.acoustic.PRESETS`, `speech.vocoder.PRESETS`).
        vocoding: how tts-vocoder learns.
    """

    init_from: str | None = None
    swap_lm: str | None = None
    swap_image: str | None = None
    lm: str | None = None
    image: str | None = None
    speech: str | None = None
    video: str | None = None
    encoder: str | None = None
    stem: str | None = None
    open_gates: float | None = None
    from_image: bool = False
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    best_rq: BestRQConfig = field(default_factory=BestRQConfig)
    normalizer: NormalizerConfig = field(default_factory=NormalizerConfig)
    prosody: ProsodyConfig = field(default_factory=PROSODY_PRESETS["bundled"])
    acoustic: str | None = None
    vocoder: str | None = None
    vocoding: VocodingConfig = field(default_factory=VocodingConfig)

    def given(self) -> set[str]:
        """Names of the keys that differ from their defaults."""
        default = ModelConfig()
        return {key.name for key in dataclasses.fields(self) if getattr(self, key.name) != getattr(default, key.name)}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Samples on disk, see docs/data.md. A key that the stage does not read is an error.

    Attributes:
        path: folder or pattern of shards, a LLaVA file, or a corpus of speech.
        image_folder: where a LLaVA file's pictures lie; beside it when None.
        weight: share in the mix, relative to the other sources'.
        style: "chat" writes the model's conversation format and supervises answers; "plain" is a base model's captioning format.
        format: of a corpus of speech (`data.speech.open_speech`); told from `path` when None.
        task: what is asked about recordings that come with a text and no conversation: "asr" and "translation" use the
            paper's prompts, "dialogue" takes the text for the reply. Needed where there are such recordings.
        language: of the text, by English name or code; the corpus's own when None.
        features: folder that `python -m mm.train.lm_features` wrote for these texts (tts-normalizer, tts-prosody).
        one_question: whether a conversation gives one of its questions, drawn anew each time it comes up, with the media
            before it and without the other turns. For conversations whose answers can be read off each other.
    """

    path: str
    image_folder: str | None = None
    weight: float = 1.0
    style: str = "chat"
    format: str | None = None
    task: str | None = None
    language: str | None = None
    features: str | None = None
    one_question: bool = False

    def __post_init__(self) -> None:
        if self.style not in ("chat", "plain"):
            raise ValueError(f"style {self.style!r} of {self.path} is unknown; choose 'chat' or 'plain'")
        if self.weight <= 0:
            raise ValueError(f"weight of {self.path} must be positive, got {self.weight}; leave the source out instead")
        if self.one_question and self.style == "plain":
            raise ValueError(
                f"one_question of {self.path}: style plain reads captions; leave it out, or say style: chat"
            )
        if self.task not in (None, *TASKS):
            raise ValueError(f"task {self.task!r} of {self.path} is unknown; choose one of {', '.join(TASKS)}")
        if self.language is not None:
            find_language(self.language)
        elif self.task == "translation":
            raise ValueError(f"language of {self.path}: task translation needs the language that is translated into")

    @property
    def name(self) -> str:
        """How logs and errors call it."""
        return f"{self.path} ({self.task or self.style})"


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How recordings are varied, for training alone; None leaves them as they are.

    Attributes:
        waveform: speed and noise.
        spectrogram: SpecAugment's masks.
    """

    waveform: WaveformAugmentation | None = None
    spectrogram: SpecAugmentConfig | None = None

    def vary_waveform(self, waveform_N: Tensor) -> Tensor:
        return augment_waveform(waveform_N, self.waveform) if self.waveform else waveform_N

    def vary_mel(self, mel_TM: Tensor) -> Tensor:
        return spec_augment(mel_TM, self.spectrogram) if self.spectrogram else mel_TM


UNVARIED = AugmentConfig()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how.

    Attributes:
        heldout: sources for evaluation; none of their samples may be in `sources`.
        workers: processes that decode; 0 decodes in the training process. The order of samples does not depend on it.
        tile_size: side of a tile; the encoder's positions are interpolated to it. The model's own when None.
        max_frames: most frames of a clip; the model's own when None.
        factor: how many frames of a clip become one; the model's own when None.
        feature_cache: folder in which the frozen encoder's features of frames are kept (`mm.train.feature_cache`), in video and
            video-sft; nothing is kept when None.
        window: batches whose samples are sorted by length together, so that batches need little padding.
        max_bad_fraction: the run stops once more of the samples than this had to be skipped.
        max_tokens: longer samples of whole models count as bad; the language model's context when None.
        augment: of `sources`, in speech-ctc, speech-align and speech.
    """

    sources: tuple[SourceConfig, ...]
    heldout: tuple[SourceConfig, ...] = ()
    workers: int = 0
    tile_size: int | None = None
    max_frames: int | None = None
    factor: int | None = None
    feature_cache: str | None = None
    max_tokens: int | None = None
    augment: AugmentConfig = UNVARIED
    window: int = 16
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources: give at least one source")
        for name in ("max_frames", "factor", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to zero.

    Attributes:
        matrices: what updates the matrices of linear layers, heads apart: "adamw", or "muon", whose steps cost more and go
            further (`mm.train.muon`).
        batch_size: samples of one optimiser step.
        micro_batch_size: samples that run at a time; changes memory, not the result. The whole batch when None.
        first_block: of the cross-attention blocks only those before this layer of the language model or later ones train, and no
            gradient goes further back; the whole adapter trains when 0.
        warmup: steps.
        clip: largest norm of the gradient.
    """

    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    lr: LearningRates
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.95)
    matrices: str = "adamw"
    first_block: int = 0
    warmup: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"optim.{name} must be at least 1, got {value}")
        if self.first_block < 0:
            raise ValueError(f"optim.first_block must not be negative, got {self.first_block}")
        if self.warmup >= self.steps:
            raise ValueError(f"optim.warmup {self.warmup} must be less than optim.steps {self.steps}")
        if self.matrices not in ("adamw", "muon"):
            raise ValueError(f"optim.matrices {self.matrices!r} is unknown; choose 'adamw' or 'muon'")
        if len(self.betas) != 2:
            raise ValueError(f"optim.betas: AdamW takes two, got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out data, every `every` steps and at the end.

    Attributes:
        samples: held-out samples that the loss is measured on.
        pictures: of those, how many are answered and drawn.
        max_new_tokens: longest answer.
    """

    every: int = 500
    samples: int = 64
    pictures: int = 24
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            if getattr(self, key.name) < 1:
                raise ValueError(f"eval.{key.name} must be at least 1, got {getattr(self, key.name)}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end, of which the last `keep` stay."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """A line of metrics every `every` steps."""

    every: int = 1


#: Keys of `model` that a stage reads, by its loss and medium.
MODEL_KEYS = {
    ("contrastive", "image"): {"encoder", "stem", "text"},
    ("next-token", "image"): {"init_from", "swap_lm", "lm", "image", "encoder", "stem", "open_gates"},
    ("next-token", "video"): {"init_from", "swap_lm", "swap_image", "video", "open_gates", "from_image"},
    ("caption-words", "video"): {"init_from", "video", "from_image"},
    ("facts", "video"): {"init_from", "video", "from_image", "open_gates"},
    ("best-rq", "audio"): {"encoder", "best_rq"},
    ("ctc", "audio"): {"encoder"},
    ("token-ctc", "audio"): {"init_from", "lm", "speech", "encoder"},
    ("next-token", "audio"): {"init_from", "lm", "speech", "encoder"},
    ("rules", "text"): {"normalizer"},
    ("prosody", "voice"): {"prosody"},
    ("mel", "voice"): {"init_from", "acoustic"},
    ("waveform", "voice"): {"init_from", "vocoder", "vocoding"},
}
#: Losses that an encoder learns alone, and models of the voice that are told by the name of a shape.
ENCODER_LOSSES = ("contrastive", "best-rq", "ctc")
VOICE_PRESETS: dict[str, tuple[str, Mapping[str, Callable[[], Any]]]] = {
    "tts-acoustic": ("acoustic", ACOUSTIC_PRESETS),
    "tts-vocoder": ("vocoder", VOCODER_PRESETS),
}
#: Keys of `data` that only stages of these media read.
MEDIA_OF_DATA_KEY = {
    "tile_size": ("image", "video"),
    "max_frames": ("video",),
    "factor": ("video",),
    "feature_cache": ("video",),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run.

    Attributes:
        stage: a name in `mm.stages.STAGES`.
        output: run folder; a run that finds checkpoints there goes on from the last one.
        dtype: "float32", or "bfloat16" for mixed precision: trained weights and their gradients stay FP32.
        device: such as "cpu" or "cuda".
    """

    stage: str
    output: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage {self.stage!r} is unknown; choose one of {', '.join(STAGES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        for name in ("eval", "checkpoint", "log"):
            if getattr(self, name).every < 1:
                raise ValueError(f"{name}.every must be at least 1 step")
        self._check_model()
        self._check_data()
        self._check_first_block()

    def _check_model(self) -> None:
        model = self.model
        if stray := model.given() - MODEL_KEYS[self.stage_spec.loss, self.medium]:
            raise ValueError(f"model.{min(stray)}: stage {self.stage} does not read it; leave it out")
        if self.stage_spec.loss in ("next-token", "token-ctc", "caption-words", "facts"):
            self._check_whole_model()
        elif self.stage in VOICE_PRESETS:
            self._check_voice_model()
        elif model.encoder is None and self.stage_spec.loss in ENCODER_LOSSES:
            raise ValueError(f"model: stage {self.stage} trains an encoder alone; give its preset as model.encoder")
        elif self.stage_spec.loss == "best-rq" and model.encoder not in CONFORMER_PRESETS:
            presets = ", ".join(CONFORMER_PRESETS)
            raise ValueError(f"model.encoder: preset {model.encoder!r} is unknown; choose one of {presets}")

    def _check_voice_model(self) -> None:
        key, presets = VOICE_PRESETS[self.stage]
        name = getattr(self.model, key)
        if (name is None) == (self.model.init_from is None):
            raise ValueError(f"model: give either {key}, the name of a new model's shape, or init_from")
        if name not in (None, *presets):
            raise ValueError(f"model.{key}: {name!r} is unknown; choose one of {', '.join(presets)}")

    def _check_whole_model(self) -> None:
        model, part = self.model, PART_OF_MEDIUM[self.medium]
        is_new = getattr(model, part) is not None
        if model.init_from is None and not (model.lm and is_new):
            may_be_new = "lm" in MODEL_KEYS[self.stage_spec.loss, self.medium]
            raise ValueError("model: give init_from" + (f", or lm together with {part}" if may_be_new else ""))
        if model.init_from and model.lm:
            raise ValueError("model.lm: init_from brings its language model; leave lm out")
        for key in ("encoder", "stem", "open_gates", "from_image"):
            if getattr(model, key) not in (None, False) and not is_new:
                raise ValueError(f"model.{key}: init_from brings a {part} part, which was trained; leave {key} out")
        if model.from_image and model.open_gates is not None:
            raise ValueError("model.from_image: the gates come from the image part; leave open_gates out")
        for key in ("swap_lm", "swap_image"):
            if getattr(model, key) and not self.stage_spec.swaps_lm:
                raise ValueError(f"model.{key}: stage {self.stage} keeps what it starts from; finetuning swaps it")
        for key, presets in (("speech", SPEECH_PRESETS), ("video", VIDEO_PRESETS)):
            if getattr(model, key) not in (None, *presets):
                raise ValueError(f"model.{key}: {getattr(model, key)!r} is unknown; choose one of {', '.join(presets)}")

    def _check_data(self) -> None:
        sources = (*self.data.sources, *self.data.heldout)
        asks = self.hears and self.stage_spec.loss == "next-token"
        reads = {"image_folder": not self.hears, "format": self.hears, "task": asks, "language": asks}
        lm = {"rules": self.model.normalizer.lm, "prosody": self.model.prosody.lm}.get(self.stage_spec.loss)
        reads |= {"features": lm is not None, "one_question": self.stage_spec.loss == "next-token"}
        for source in sources:
            for key, is_read in reads.items():
                if getattr(source, key) not in (None, False) and not is_read:
                    raise ValueError(f"{key} of {source.path}: stage {self.stage} does not read it; leave it out")
        if (self.hears or self.stage_spec.masks_prompts) and any(source.style != "chat" for source in sources):
            raise ValueError(
                f"data.sources: stage {self.stage} supervises answers alone, so every source needs style: chat"
            )
        if self.data.max_tokens is not None and self.stage_spec.loss != "next-token":
            raise ValueError(f"data.max_tokens: stage {self.stage} does not read it; leave it out")
        for key, media in MEDIA_OF_DATA_KEY.items():
            if getattr(self.data, key) is not None and self.medium not in media:
                raise ValueError(f"data.{key}: stage {self.stage} does not read it; leave it out")
        if self.data.augment != UNVARIED and not (asks or self.stage_spec.loss in ("ctc", "token-ctc")):
            raise ValueError(f"data.augment: stage {self.stage} does not vary its samples; leave it out")
        if self.stage_spec.loss == "contrastive" and self.optim.micro_batch_size not in (None, self.optim.batch_size):
            raise ValueError(
                "optim.micro_batch_size: a contrastive batch cannot be cut, its pairs are compared with each other; leave it out"
            )

    def _check_first_block(self) -> None:
        if not self.optim.first_block:
            return
        if self.stage_spec.loss != "next-token" or self.medium not in ("image", "video"):
            raise ValueError(f"optim.first_block: stage {self.stage} trains no cross-attention blocks; leave it out")
        if self.optim.lr.encoder or self.optim.lr.stem:
            raise ValueError(
                "optim.first_block: the encoder learns through all blocks; set optim.lr.encoder and optim.lr.stem to 0"
            )

    @property
    def medium(self) -> str:
        """Kind of medium that the stage learns from."""
        return self.stage_spec.medium

    @property
    def hears(self) -> bool:
        """Whether the stage learns from recordings, which are read from more formats than pictures and clips."""
        return self.medium == "audio"

    @property
    def stage_spec(self) -> Stage:
        return STAGES[self.stage]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The resolved configuration, as `load_config` reads it."""
        return yaml.safe_dump(_plain(self.as_dict()), sort_keys=False)


def default_path(stage: str) -> Path:
    """The small, complete YAML of a stage that ships with the package."""
    return Path(__file__).parent / f"{stage.replace('-', '_')}.yaml"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and puts dotted overrides on top, such as `optim.steps=10` or `data.sources.0.path=a.tar`.

    Raises:
        ValueError: the file cannot be read; an unknown or missing key; a value out of range; an override without `=`.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config {path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"config {path}: expected a mapping of keys")
    for override in overrides:
        _override(data, override)
    return from_mapping(TrainConfig, data)


def _override(data: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r}: write it as key.sub=value")
    node: Any = data
    *parents, leaf = (int(key) if key.isdigit() else key for key in dotted.split("."))
    try:
        for key in parents:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[leaf] = yaml.safe_load(value)
    except (TypeError, IndexError, KeyError):
        raise ValueError(f"override {override!r}: the configuration has no place {dotted}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML: {error}") from None


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
