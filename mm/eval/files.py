"""What every evaluation reads and leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.shards import Source, open_source


def heldout_sources(directory: str | Path, maker: str) -> list[Source]:
    """The held-out shards of a folder that `mm data make {maker}` wrote, one source per kind.

    Raises:
        ValueError: there are none.
    """
    shards = sorted(Path(directory).glob("heldout-*-*.tar"))
    if not shards:
        raise ValueError(
            f"shards: {str(directory)!r} has no heldout-*.tar; make them with `mm data make {maker} --out {directory}`"
        )
    kinds = dict.fromkeys(shard.stem.removeprefix("heldout-").rpartition("-")[0] for shard in shards)
    return [open_source(Path(directory) / f"heldout-{kind}-*.tar", name=kind) for kind in kinds]


def write_report(
    out: str | Path,
    *,
    model: str | Path,
    limit: int,
    results: Iterable[Mapping[str, Any]],
    predictions: Iterable[Mapping[str, Any]],
) -> Path:
    """Writes `results.json` and `predictions.jsonl`.

    Args:
        out: folder; made if missing.
        results: one per line of the table.
        predictions: every question with its answers.

    Returns:
        The folder.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"model": str(model), "limit": limit, "results": list(results)}
    (out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "predictions.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
    return out
