"""What a stage optimises: how its samples are read, its loss, its predictions, and what it exports.

An objective knows the model and the data's meaning; the trainer knows neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from data.shards import Sample as RawSample
from mm.sheet import Shown


class Reader(Protocol):
    """Turns raw samples into batches; runs in worker processes, so it is small and picklable."""

    def length(self, raw: RawSample) -> int:
        """Size of a sample (tokens, or milliseconds), by which batches are bucketed; opens no medium."""

    def prepare(self, raw: RawSample, *, augment: bool = False) -> Any:
        """Decodes a sample, varied as the run's `data.augment` says if `augment`.

        What it draws comes from torch's global generator, which the caller seeds.

        Raises:
            ValueError: the sample cannot be used.
        """

    def count(self, sample: Any) -> int:
        """How many loss terms a prepared sample adds; the loss is their mean over the global batch."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Batches prepared samples."""


ModelT = TypeVar("ModelT", bound=nn.Module)
ReaderT = TypeVar("ReaderT", bound=Reader)


class Objective(ABC, Generic[ModelT, ReaderT]):
    """A model under training."""

    model: ModelT
    reader: ReaderT

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Sum of the batch's loss terms."""

    @abstractmethod
    def n_tokens(self, batch: Any) -> int:
        """Tokens, padding not counted; encoder frames where speech alone is trained."""

    @abstractmethod
    def examine(self, raws: Sequence[RawSample], max_new_tokens: int) -> tuple[list[Shown], dict[str, float]]:
        """What the model makes of held-out samples: drawn, one entry each, and scored, by name."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Writes what the next stage starts from."""

    def audio_seconds(self, batch: Any) -> float:
        """Length of the batch's recordings."""
        return 0.0

    def gauges(self) -> dict[str, float]:
        """Values of the model worth plotting."""
        return {}

    def freeze_precision(self) -> None:
        """Holds what is frozen in the compute dtype, where that is large."""

    def begin(self, step: int) -> None:
        """Told before each step which one it is, counted from 0; for losses that depend on it."""
