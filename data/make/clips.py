"""`mm data make clips`: short clips with questions that no single frame answers, as real WebDataset shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.make.build import make_shards
from data.make.canvas import Kind
from data.make.events import Blinks, Changes, Order
from data.make.motions import Motions, Pairs, Races
from data.make.stills import Stills

KINDS: Mapping[str, Callable[[], Kind]] = {
    kind.name: kind for kind in (Motions, Races, Pairs, Order, Blinks, Changes, Stills)
}


def make_clips(
    out: str | Path, seed: int = 0, kinds: Sequence[str] = tuple(KINDS), scale: float = 1.0, workers: int = 2
) -> dict[str, Any]:
    """Writes shards of clips; see `data.make.build.make_shards`."""
    return make_shards(out, KINDS, "clips", seed=seed, kinds=kinds, scale=scale, workers=workers)
