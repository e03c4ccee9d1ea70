"""An endless, shuffled, weighted mix of sources as batches, exactly resumable.

The order is a pure function of (seed, position), so resuming is arithmetic and costs the same anywhere:

    position --Mix--> source, n --SourceOrder--> raw sample --length--> bucket --decode, transform--> batch

Words: a *step* is one optimiser step and takes `batches_per_step` batches over all ranks and accumulation. Batch `u` of
the stream is number `u % batches_per_step` of its step, its *lane*; rank r of R takes the lanes r, r + R, ... Lanes
bucket by length on their own, so no rank reads what another trains on, and the batches do not depend on how many ranks
share them.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.shards import Sample, Source

logger = logging.getLogger(__name__)

_MIX_BLOCK = 1000  # samples over which the weights hold exactly; also their resolution
_MAX_ATTEMPTS = 20  # bad samples in a row after which a source is taken for broken
_GRACE = 1000  # samples before the bad fraction is judged
_ORDER, _WINDOW, _MIX, _BUCKET, _SUBSTITUTE, _TRANSFORM = range(6)  # separate streams of random numbers


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How samples become batches.

    Attributes:
        batch_size: samples in one batch (of one rank, in one accumulation step).
        batches_per_step: batches of one optimiser step over all ranks; the number of ranks must divide it.
        seed: changes every order.
        shuffle_window: samples shuffled together, after whole shards were; larger mixes more and reads less locally.
        bucket_batches: batches formed at a time from samples sorted by length; larger pads less.
        max_bad_fraction: the run stops once more than this fraction of the samples seen had to be skipped; until 1000
            were seen, it tolerates as many as of 1000.
        num_workers: processes that decode; 0 decodes in the caller's. One more measures lengths.
    """

    batch_size: int
    batches_per_step: int = 1
    seed: int = 0
    shuffle_window: int = 16_384
    bucket_batches: int = 16
    max_bad_fraction: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "batches_per_step", "shuffle_window", "bucket_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0 or self.num_workers < 0:
            raise ValueError(f"seed and num_workers cannot be negative, got {self.seed} and {self.num_workers}")
        if not 0 <= self.max_bad_fraction < 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1), got {self.max_bad_fraction}")


class SourceOrder:
    """The order in which a source's samples are drawn: `order[n]` for any n, each sample once per epoch.

    An epoch puts the shards in random order and then shuffles windows of `window` samples, so reading stays local.
    """

    def __init__(self, shard_sizes: np.ndarray, *, window: int, seed: tuple[int, ...]) -> None:
        self.sizes = np.asarray(shard_sizes)
        self.n_samples = int(self.sizes.sum())
        self.window = window
        self.seed = seed
        self._cached: tuple[int, int] | None = None

    def __getitem__(self, n: int) -> int:
        epoch, offset = divmod(n, self.n_samples)
        window, row = divmod(offset, self.window)
        if self._cached != (epoch, window):
            self._cached, self._indices = (epoch, window), self._window(epoch, window)
        return int(self._indices[row])

    def _window(self, epoch: int, window: int) -> np.ndarray:
        shards = np.random.default_rng((*self.seed, _ORDER, epoch)).permutation(len(self.sizes))
        ends = self.sizes[shards].cumsum()
        offsets = np.arange(window * self.window, min((window + 1) * self.window, self.n_samples))
        which = np.searchsorted(ends, offsets, side="right")
        # An offset's distance from its shard's end is the same in the permuted and in the stored order.
        indices = self.sizes.cumsum()[shards[which]] - (ends[which] - offsets)
        return np.random.default_rng((*self.seed, _WINDOW, epoch, window)).permutation(indices)


class Pick(NamedTuple):
    """Which sample stands at a position of the stream."""

    position: int
    source: int
    row: int


class Mix:
    """Weighted mix of sources: every 1000 positions hold each source in proportion to its weight, in random order."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], *, seed: int, window: int) -> None:
        if len(weights) != len(sources) or any(not np.isfinite(weight) or weight <= 0 for weight in weights):
            raise ValueError(f"weights: need one positive number for each of {len(sources)} sources, got {weights}")
        self.seed = seed
        self.orders = [
            SourceOrder(source.shard_sizes, window=window, seed=(seed, i)) for i, source in enumerate(sources)
        ]
        share = np.asarray(weights, dtype=np.float64) / np.sum(weights) * _MIX_BLOCK
        self.quota = np.floor(share).astype(np.int64)
        largest_rest = np.argsort(self.quota - share, kind="stable")
        self.quota[largest_rest[: _MIX_BLOCK - self.quota.sum()]] += 1
        for source, quota in zip(sources, self.quota, strict=True):
            if quota == 0:
                raise ValueError(f"weights: {source.name!r} gets under 1/{_MIX_BLOCK} of the mix; raise its weight")
        self._cached: int | None = None

    def pick(self, position: int) -> Pick:
        block, slot = divmod(position, _MIX_BLOCK)
        self._load(block)
        source = int(self._sources[slot])
        n = block * int(self.quota[source]) + int(self._ranks[slot])
        return Pick(position, source, self.orders[source][n])

    def drawn(self, position: int) -> list[int]:
        """Samples of each source before a position."""
        block, slot = divmod(position, _MIX_BLOCK)
        self._load(block)
        return (block * self.quota + np.bincount(self._sources[:slot], minlength=len(self.quota))).tolist()

    def _load(self, block: int) -> None:
        if self._cached == block:
            return
        self._cached = block
        rng = np.random.default_rng((self.seed, _MIX, block))
        self._sources = rng.permutation(np.repeat(np.arange(len(self.quota)), self.quota))
        self._ranks = np.empty(_MIX_BLOCK, dtype=np.int64)
        for source, quota in enumerate(self.quota):
            self._ranks[self._sources == source] = np.arange(quota)


class Skip(NamedTuple):
    """A sample that was left out: `row` of a source."""

    source: str
    row: int
    error: str
    cause: str


class Item(NamedTuple):
    """A sample on its way: what the last stage made of it, and the bad samples whose place it takes."""

    pick: Pick
    value: Any = None
    skipped: tuple[Skip, ...] = ()


class Stage(Dataset[Item]):
    """Applies a function to raw samples, in whichever process. A bad sample gives way to a random one of its source.

    torch's CPU generator is seeded by the position, so random transforms that draw from it repeat exactly, too.
    """

    def __init__(self, sources: Sequence[Source], function: Callable[[Sample], Any], seed: int) -> None:
        self.sources = sources
        self.function = function
        self.seed = seed

    def __getitem__(self, item: Item) -> Item:
        pick, skipped = item.pick, item.skipped
        source = self.sources[pick.source]
        while True:
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(self._transform_seed(pick))
                    return Item(pick, self.function(source[pick.row]), skipped)
            except (ValueError, OSError) as error:
                skipped += (Skip(source.name, pick.row, str(error), cause_of(error)),)
                if len(skipped) == _MAX_ATTEMPTS:
                    raise ValueError(
                        f"{_MAX_ATTEMPTS} samples of source {source.name!r} in a row are bad, the last one so: {error}"
                    ) from error
                rng = np.random.default_rng((self.seed, _SUBSTITUTE, pick.position, len(skipped)))
                pick = pick._replace(row=int(rng.integers(len(source))))

    def _transform_seed(self, pick: Pick) -> int:
        return int(np.random.SeedSequence((self.seed, _TRANSFORM, pick.position)).generate_state(1)[0])


def cause_of(error: Exception) -> str:
    """An error's message without what differs from sample to sample (numbers, quoted names), to count by."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return kind + re.sub(r"b?'[^']*'|b?\"[^\"]*\"|\d[\d.,]*", "*", str(error))[:120]


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Item]) -> tuple[Any, list[Skip]]:
        return self.collate([item.value for item in items]), [skip for item in items for skip in item.skipped]


class BatchStream:
    """Endless batches of a weighted mix of sources.

    Use one iterator at a time; a new one goes on after the last batch that was taken.

    Args:
        sources: what to read, with different names.
        prepare: decodes and transforms one sample; `ValueError` and `OSError` skip it, anything else stops the run.
        collate: makes a batch of what `prepare` returned.
        length: size of a sample (number of tokens, say) by which batches are bucketed; None keeps the shuffled order.
        weights: share of each source in the mix; equal when None.
        rank, world_size: this process among those that share the stream.

    `prepare`, `collate` and `length` run in worker processes and must be picklable.

    Attributes:
        wait_seconds: how long the consumer waited for the latest batch.
        skipped: bad samples of this rank's batches so far: source -> cause -> count.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: StreamConfig,
        *,
        prepare: Callable[[Sample], Any],
        collate: Callable[[list[Any]], Any] = list,
        length: Callable[[Sample], int] | None = None,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        names = [source.name for source in sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources: need at least one, each with its own name, got {names}")
        if not 0 <= rank < world_size or config.batches_per_step % world_size:
            raise ValueError(
                f"batches_per_step {config.batches_per_step} must be a multiple of world_size {world_size}, "
                f"and rank {rank} below it"
            )
        self.sources, self.config = list(sources), config
        self.prepare, self.collate, self.length = prepare, collate, length
        self.rank, self.world_size = rank, world_size
        self.weights = [float(weight) for weight in weights or [1.0] * len(names)]
        self.mix = Mix(self.sources, self.weights, seed=config.seed, window=config.shuffle_window)
        self.wait_seconds = 0.0
        self.skipped: dict[str, Counter[str]] = {name: Counter() for name in names}
        self._n_batches = 0  # of this rank

    @property
    def epochs(self) -> dict[str, float]:
        """Times that each source has been gone through, over all ranks."""
        drawn = self.mix.drawn(self._n_batches * self.world_size * self.config.batch_size)
        return {source.name: n / len(source) for source, n in zip(self.sources, drawn, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Position after the latest batch, plain values only. Save it between steps: then any world size can go on."""
        return {
            "batches": self._n_batches * self.world_size,
            "skipped": {name: dict(causes) for name, causes in self.skipped.items()},
            "recipe": self._recipe(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position; affects iterators made from now on.

        Raises:
            ValueError: the saved stream had other sources or settings, so its position means nothing here.
        """
        saved, recipe = state["recipe"], self._recipe()
        changed = [
            f"{key} was {saved.get(key)}, is {recipe.get(key)}" for key in recipe if saved.get(key) != recipe[key]
        ]
        if changed:
            raise ValueError(f"state: saved from another stream ({'; '.join(changed)}); resume with the same settings")
        self._n_batches, rest = divmod(state["batches"], self.world_size)
        if rest:
            raise ValueError(f"state: {state['batches']} batches do not share out among {self.world_size} ranks")
        self.skipped = {name: Counter(causes) for name, causes in state["skipped"].items()}

    def _recipe(self) -> dict[str, Any]:
        """All that the order depends on."""
        recipe = asdict(self.config)
        for name in ("num_workers", "max_bad_fraction"):
            del recipe[name]
        recipe["bucket_batches"] = self._window_batches
        return recipe | {"sources": [[source.name, len(source)] for source in self.sources], "weights": self.weights}

    @property
    def _window_batches(self) -> int:
        return 1 if self.length is None else self.config.bucket_batches

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader(self.prepare, self._buckets(), _Collate(self.collate), self.config.num_workers))
        while True:
            start = time.perf_counter()
            batch, skips = next(batches)
            self.wait_seconds = time.perf_counter() - start
            self._n_batches += 1
            self._count(skips)
            yield batch

    def _windows(self) -> Iterator[list[Item]]:
        """This rank's items, one window of one lane at a time, from the window that holds the current position."""
        size = self._window_batches * self.config.batch_size
        lanes = self.config.batches_per_step
        first = self._n_batches // (self._window_batches * (lanes // self.world_size))
        for window in itertools.count(first):
            for lane in range(self.rank, lanes, self.world_size):
                start = (window * lanes + lane) * size
                yield [Item(self.mix.pick(position)) for position in range(start, start + size)]

    def _buckets(self) -> Iterator[list[Item]]:
        """This rank's batches as items to prepare, from the current position."""
        n_lanes = self.config.batches_per_step // self.world_size
        skip = self._n_batches % (self._window_batches * n_lanes)
        windows: Iterator[list[Item]] = self._windows()
        if self.length is not None:
            windows = iter(self._loader(self.length, windows, list, min(1, self.config.num_workers)))
        while True:
            lanes = [self._bucket(window) for window in itertools.islice(windows, n_lanes)]
            yield from itertools.islice((batch for step in zip(*lanes, strict=True) for batch in step), skip, None)
            skip = 0

    def _bucket(self, window: list[Item]) -> list[list[Item]]:
        """Batches of samples of similar length, in random order."""
        if self.length is None:
            return [window]
        size = self.config.batch_size
        ordered = sorted(window, key=lambda item: item.value)
        rng = np.random.default_rng((self.config.seed, _BUCKET, window[0].pick.position))
        return [ordered[i * size : (i + 1) * size] for i in rng.permutation(self._window_batches)]

    def _loader(
        self, function: Callable[[Sample], Any], batches: Iterable[list[Item]], collate: Callable, num_workers: int
    ) -> DataLoader:
        return DataLoader(
            Stage(self.sources, function, self.config.seed),
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=num_workers,
            generator=torch.Generator(),  # else it draws from the global one, and the trainer's dropout would change
        )

    def _count(self, skips: Sequence[Skip]) -> None:
        for skip in skips:
            causes = self.skipped[skip.source]
            causes[skip.cause] += 1
            if causes[skip.cause] == 1:
                logger.warning(
                    "skipped sample %d of source %r: %s; more of this kind are only counted",
                    skip.row, skip.source, skip.error,
                )  # fmt: skip
        bad = sum(causes.total() for causes in self.skipped.values())
        seen = self._n_batches * self.config.batch_size
        if bad > self.config.max_bad_fraction * max(seen, _GRACE):
            table = {name: dict(causes.most_common(5)) for name, causes in self.skipped.items() if causes}
            raise ValueError(
                f"sources: {bad} bad samples among {seen}, more than max_bad_fraction {self.config.max_bad_fraction}, "
                f"by cause: {table}; repair or drop the source, or raise max_bad_fraction"
            )
