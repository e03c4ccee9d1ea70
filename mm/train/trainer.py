"""The training loop of every stage: global batches in, checkpoints, logs and an export out.

Trained weights, their gradients and the optimiser are FP32; with `dtype: bfloat16` the computation is autocast and the frozen
language model is held in bf16 (section 7.3 reports that gradients accumulated in bf16 are unstable).
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.shards import Sample as RawSample
from data.stream import BatchStream, StreamConfig
from mm.sheet import contact_sheet
from mm.stages import apply
from mm.train import run_checkpoint
from mm.train.config import DTYPES, TrainConfig, load_config
from mm.train.objective import Reader
from mm.train.objectives import make_objective
from mm.train.optim import make_optimizer, schedule, set_learning_rates
from mm.train.reading import open_training_source
from mm.train.run_checkpoint import RunState
from mm.train.run_log import RunLog, draw_loss, record_start

logger = logging.getLogger(__name__)

#: Keys that may differ when a run goes on: they do not change what is learnt.
VOLATILE = (
    "output",
    "eval",
    "checkpoint",
    "log",
    "data.heldout",
    "data.feature_cache",
    "data.workers",
    "data.max_bad_fraction",
    "optim.micro_batch_size",
)


class TrainingError(RuntimeError):
    """Loss or gradient stopped being a number."""


@dataclass
class GlobalBatch:
    """The samples of one optimiser step, cut into micro-batches.

    Attributes:
        n_terms: loss terms (supervised tokens, pairs, codes or letters) over all micro-batches; the loss is the mean over
            these.
    """

    micro_batches: list[Any]
    n_terms: int


@dataclass(frozen=True)
class Collate:
    """Cuts a step's samples into micro-batches, in a worker process."""

    reader: Reader
    micro_batch_size: int

    def __call__(self, samples: Sequence[Any]) -> GlobalBatch:
        size = self.micro_batch_size
        cuts = [samples[i : i + size] for i in range(0, len(samples), size)]
        n_terms = sum(self.reader.count(sample) for sample in samples)
        return GlobalBatch([self.reader.collate(cut) for cut in cuts], max(n_terms, 1))  # short speech may have no mask


class Trainer:
    """One run of one stage.

    Args:
        config: the run; if its output folder holds checkpoints of the same run, training goes on from the last one.

    Raises:
        ValueError: a part of the configuration does not fit the data or the model, or the folder holds another run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.directory = Path(config.output)
        self.checkpoints = self.directory / "checkpoints"
        if run_checkpoint.steps(self.checkpoints):
            _check_same_run(config, self.directory / "config.yaml")
        torch.manual_seed(config.seed)
        self.objective = make_objective(config)
        self.device = torch.device(config.device)
        self.model = self.objective.model.to(self.device)
        optim = config.optim
        groups = apply(config.stage_spec, self.model, optim.lr, optim.weight_decay, optim.first_block)
        self.objective.freeze_precision()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(groups, config.optim)
        self.stream = self._open_stream()
        self.heldout = self._read_heldout()
        state = run_checkpoint.load_latest(self.checkpoints, self.trained, self.optimizer)
        self.step = state.step if state else 0
        self.audio_seconds = state.audio_seconds if state else 0.0
        if state:
            self.stream.load_state_dict(state.data)
        self.stop_requested = False

    def train(self) -> Path | None:
        """Runs the remaining steps and exports.

        Returns:
            The export, or None when a signal stopped the run; the same command goes on.

        Raises:
            TrainingError: loss or gradient is NaN or infinite.
        """
        config = self.config
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(config.to_yaml())
        record_start(self.directory, self.step)
        log = RunLog(self.directory, self.step)
        bar = tqdm(total=config.optim.steps, initial=self.step, desc=config.stage, unit="step", dynamic_ncols=True)
        try:
            with self._signals():
                self._loop(log, bar)
        finally:
            bar.close()
            log.close()
        if self.step < config.optim.steps:
            return None
        draw_loss(self.directory)
        self.objective.export(self.directory / "export")
        return self.directory / "export"

    def _loop(self, log: RunLog, bar: tqdm) -> None:
        config = self.config
        last = config.optim.steps
        batches = iter(self.stream)
        while self.step < last and not self.stop_requested:
            start = time.perf_counter()
            batch = next(batches)
            metrics = self.train_step(batch)
            seconds = time.perf_counter() - start
            self.audio_seconds += sum(map(self.objective.audio_seconds, batch.micro_batches))
            self.step += 1
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            if self.step % config.log.every == 0 or self.step == last:
                log.write(self.step, metrics | self._pace(batch, seconds) | self.objective.gauges())
            if self.heldout and (self.step % config.eval.every == 0 or self.step == last):
                log.write(self.step, self.evaluate())
            if self.step % config.checkpoint.every == 0 or self.step == last or self.stop_requested:
                state = RunState(self.step, self.stream.state_dict(), self.audio_seconds)
                run_checkpoint.save(self.checkpoints, state, self.trained, self.optimizer, keep=config.checkpoint.keep)

    def train_step(self, batch: GlobalBatch) -> dict[str, float]:
        """One optimiser step. The loss is the mean over the whole global batch, however that is cut.

        Raises:
            TrainingError: loss or gradient is NaN or infinite; weights are as before, the batch is saved.
        """
        share = schedule(self.step, self.config.optim)
        rates = set_learning_rates(self.optimizer, share)
        self.objective.begin(self.step)
        loss = self.accumulate(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.optim.clip).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            path = self._save_bad_batch(batch)
            raise TrainingError(
                f"step {self.step + 1}: loss is {loss}, norm of the gradient {norm}; the batch is in {path}. "
                "Look at its samples, or lower optim.lr"
            )
        with self._autocast():  # Muon multiplies, too
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm} | {f"lr/{name}": rate for name, rate in rates.items()}

    def accumulate(self, batch: GlobalBatch) -> float:
        """Adds the gradients of a global batch's mean loss to the trained parameters; returns that loss."""
        total = 0.0
        for micro_batch in batch.micro_batches:
            with self._autocast():
                loss = self.objective.loss(micro_batch.to(self.device)) / batch.n_terms
            if loss.requires_grad:  # not where no row has a picture
                loss.backward()
            total += loss.item()
        return total

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and answers on held-out samples; draws the answers as `samples/step_*.png`."""
        reader, size = self.objective.reader, self.config.optim.micro_batch_size or self.config.optim.batch_size
        shown = self.heldout[:: max(1, len(self.heldout) // self.config.eval.pictures)][: self.config.eval.pictures]
        with torch.random.fork_rng(devices=[]):  # evaluation changes nothing of the run, and is the same every time
            torch.default_generator.manual_seed(self.config.seed)
            batch = Collate(reader, size)([reader.prepare(raw) for raw in self.heldout])
            with self._autocast():
                losses = [self.objective.loss(part.to(self.device)).item() for part in batch.micro_batches]
                rows, scores = self.objective.examine(shown, self.config.eval.max_new_tokens)
        contact_sheet(rows, self.directory / "samples" / f"step_{self.step:06d}.png")
        return {"heldout/loss": sum(losses) / batch.n_terms} | {f"heldout/{name}": x for name, x in scores.items()}

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _pace(self, batch: GlobalBatch, seconds: float) -> dict[str, float]:
        n_tokens = sum(map(self.objective.n_tokens, batch.micro_batches))
        audio_hours = {"audio_hours": self.audio_seconds / 3600} if self.audio_seconds else {}
        return audio_hours | {
            "tokens_per_second": n_tokens / seconds,
            "step_seconds": seconds,
            "data_wait": self.stream.wait_seconds / seconds,
            "skipped": sum(causes.total() for causes in self.stream.skipped.values()),
        }

    def _open_stream(self) -> BatchStream:
        data, optim, reader = self.config.data, self.config.optim, self.objective.reader
        return BatchStream(
            [open_training_source(source, hears=self.config.hears) for source in data.sources],
            StreamConfig(
                batch_size=optim.batch_size,
                seed=self.config.seed,
                bucket_batches=data.window,
                max_bad_fraction=data.max_bad_fraction,
                num_workers=data.workers,
            ),
            prepare=partial(reader.prepare, augment=True),
            collate=Collate(reader, optim.micro_batch_size or optim.batch_size),
            length=reader.length,
            weights=[source.weight for source in data.sources],
        )

    def _read_heldout(self) -> list[RawSample]:
        """The same samples in every evaluation, as many of each held-out source, spread evenly over it.

        Bad ones are left out now, and not found after hours of training.
        """
        raws, bad = [], []
        sources = [open_training_source(source, hears=self.config.hears) for source in self.config.data.heldout]
        for source in sources:
            n = min(len(source), max(1, self.config.eval.samples // len(sources)))
            for row in range(n):
                try:
                    raw = source[row * len(source) // n]
                    with torch.random.fork_rng(devices=[]):
                        self.objective.reader.prepare(raw)
                    raws.append(raw)
                except (ValueError, OSError) as error:
                    bad.append(error)
        if bad and not raws:
            raise ValueError(f"data.heldout: none of its samples can be used; the first: {bad[0]}")
        if bad:
            logger.warning("data.heldout: left out %d samples; the first: %s", len(bad), bad[0])
        return raws

    def _save_bad_batch(self, batch: GlobalBatch) -> Path:
        path = self.directory / f"bad_batch_{self.step + 1:06d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(batch.micro_batches):
            tensors |= _tensors_of(micro_batch, str(i))
        keys = [key for micro_batch in batch.micro_batches for key in micro_batch.keys]
        self.directory.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"keys": "\n".join(keys)})
        return path

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """On the first Ctrl-C or SIGTERM, finishes the step and checkpoints; a second one kills as usual."""

        def request(number: int, frame: FrameType | None) -> None:
            self.stop_requested = True
            for name, handler in previous.items():
                signal.signal(name, handler)

        previous = {name: signal.signal(name, request) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)


def _tensors_of(value: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a batch and of the dataclasses in it, by their dotted names."""
    if isinstance(value, Tensor):
        return {name: value}
    fields = vars(value).items() if is_dataclass(value) else ()
    return {key: tensor for field, part in fields for key, tensor in _tensors_of(part, f"{name}.{field}").items()}


def _check_same_run(config: TrainConfig, path: Path) -> None:
    """Refuses to go on with checkpoints of another configuration."""
    before, now = _flatten(load_config(path).as_dict()), _flatten(config.as_dict())
    for key in sorted(before.keys() | now.keys()):
        is_volatile = any(key == name or key.startswith(f"{name}.") for name in VOLATILE)
        if not is_volatile and before.get(key) != now.get(key):
            raise ValueError(
                f"output: {config.output} holds checkpoints of another run ({key} was {before.get(key)}, is {now.get(key)}); "
                "choose another output folder, or delete this one"
            )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
