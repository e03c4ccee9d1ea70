"""A training run's configuration: typed, from YAML with dotted overrides on top.

Precedence: command line, then YAML, then the defaults here. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from mm.config import from_mapping
from mm.stages import STAGES, LearningRates, Stage
from vision.contrastive import TextTowerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from.

    Attributes:
        init_from: a model to go on with, usually the `export` of an earlier stage; whatever `from_pretrained` takes.
        swap_lm: language model that replaces its own (image-sft).
        lm: language model to give eyes, together with `image`.
        image: name of the new image part (`mm.config.IMAGE_PRESETS`).
        encoder: in image-encoder the name of a shape (`vision.encoder.PRESETS`), in image-adapter an export of image-encoder.
        stem: name of pre-trained weights for a hybrid encoder's stem (`vision.pretrained`).
        open_gates: where the gates of the image part start, see `ImageAdapter.open_gates`; at zero, as released, when None.
        text: shape of the text tower of image-encoder.
    """

    init_from: str | None = None
    swap_lm: str | None = None
    lm: str | None = None
    image: str | None = None
    encoder: str | None = None
    stem: str | None = None
    open_gates: float | None = None
    text: TextTowerConfig = field(default_factory=TextTowerConfig)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Samples on disk, see docs/data.md.

    Attributes:
        path: folder or pattern of shards, or a LLaVA file.
        image_folder: where a LLaVA file's pictures lie; beside it when None.
        weight: share in the mix, relative to the other sources'.
        style: "chat" writes the model's conversation format and supervises answers; "plain" is a base model's captioning format.
    """

    path: str
    image_folder: str | None = None
    weight: float = 1.0
    style: str = "chat"

    def __post_init__(self) -> None:
        if self.style not in ("chat", "plain"):
            raise ValueError(f"style {self.style!r} of {self.path} is unknown; choose 'chat' or 'plain'")
        if self.weight <= 0:
            raise ValueError(f"weight of {self.path} must be positive, got {self.weight}; leave the source out instead")

    @property
    def name(self) -> str:
        """How logs and errors call it."""
        return f"{self.path} ({self.style})"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how.

    Attributes:
        heldout: sources for evaluation; none of their samples may be in `sources`.
        workers: processes that decode; 0 decodes in the training process. The order of samples does not depend on it.
        tile_size: side of a tile; the encoder's positions are interpolated to it. The model's own when None.
        window: batches whose samples are sorted by length together, so that batches need little padding.
        max_bad_fraction: the run stops once more of the samples than this had to be skipped.
    """

    sources: tuple[SourceConfig, ...]
    heldout: tuple[SourceConfig, ...] = ()
    workers: int = 0
    tile_size: int | None = None
    window: int = 16
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources: give at least one source")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to zero.

    Attributes:
        batch_size: samples of one optimiser step.
        micro_batch_size: samples that run at a time; changes memory, not the result. The whole batch when None.
        warmup: steps.
        clip: largest norm of the gradient.
    """

    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    lr: LearningRates
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.95)
    warmup: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"optim.{name} must be at least 1, got {value}")
        if self.warmup >= self.steps:
            raise ValueError(f"optim.warmup {self.warmup} must be less than optim.steps {self.steps}")
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


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end, of which the last `keep` stay."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """A line of metrics every `every` steps."""

    every: int = 1


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
        self._check_stage()

    def _check_model(self) -> None:
        model = self.model
        if self.stage_spec.loss == "contrastive":
            if model.encoder is None or model.init_from or model.lm or model.image:
                raise ValueError("model: stage image-encoder trains an encoder alone; give its preset as model.encoder")
        elif model.init_from is None and not (model.lm and model.image):
            raise ValueError("model: give init_from, or lm together with image")
        elif model.init_from and (model.lm or model.image or model.encoder or model.stem):
            raise ValueError(
                "model: init_from brings its language model, encoder and stem; leave lm, image, encoder and stem out"
            )
        if model.init_from and model.open_gates is not None:
            raise ValueError("model.open_gates: init_from brings gates that were trained; leave open_gates out")
        if model.swap_lm and not self.stage_spec.swaps_lm:
            raise ValueError(f"model.swap_lm: stage {self.stage} keeps its language model; image-sft swaps it")

    def _check_stage(self) -> None:
        if self.stage_spec.masks_prompts and any(source.style != "chat" for source in self.data.sources):
            raise ValueError(
                f"data.sources: stage {self.stage} supervises answers alone, so every source needs style: chat"
            )
        if self.stage_spec.loss == "contrastive" and self.optim.micro_batch_size not in (None, self.optim.batch_size):
            raise ValueError(
                "optim.micro_batch_size: a contrastive batch cannot be cut, its pairs are compared with each other; leave it out"
            )

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
