"""`mm data make pictures`: real WebDataset shards of every kind, with a fixed held-out split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.make.build import make_shards
from data.make.canvas import Kind
from data.make.charts import Charts
from data.make.emoji import Emoji
from data.make.shapes import Places, Shapes, Tallies
from data.make.stamps import Stamps
from data.make.words import Words

KINDS: Mapping[str, Callable[[], Kind]] = {
    kind.name: kind for kind in (Emoji, Shapes, Places, Tallies, Words, Stamps, Charts)
}


def make_pictures(
    out: str | Path, seed: int = 0, kinds: Sequence[str] = tuple(KINDS), scale: float = 1.0, workers: int = 2
) -> dict[str, Any]:
    """Writes shards of pictures; see `data.make.build.make_shards`."""
    return make_shards(out, KINDS, "pictures", seed=seed, kinds=kinds, scale=scale, workers=workers)
