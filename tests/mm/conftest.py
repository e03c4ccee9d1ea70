"""Tiny training data on disk, for tests of the stages."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.shards import write_shard

COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="session")
def colour_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four plain pictures, each with its colour as the answer; they differ in size, so that tiles do."""
    samples = []
    for i, (name, colour) in enumerate(COLOURS.items()):
        file = io.BytesIO()
        Image.new("RGB", (31 + 29 * i, 37), colour).save(file, "PNG")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": name}]
        samples.append({"__key__": name, "png": file.getvalue(), "txt": name, "json": {"conversations": turns}})
    path = tmp_path_factory.mktemp("shards") / "colours.tar"
    write_shard(path, samples)
    return path


@pytest.fixture
def run_data(colour_shard: Path, tmp_path: Path) -> dict[str, Any]:
    """A small, complete run of image-adapter on the debug model, as plain data that a test may change."""
    return {
        "stage": "image-adapter",
        "output": str(tmp_path / "run"),
        "model": {"init_from": "debug"},
        "data": {"sources": [{"path": str(colour_shard)}], "heldout": [{"path": str(colour_shard)}], "window": 2},
        "optim": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "lr": {"encoder": 1e-3, "adapter": 1e-3, "gates": 1e-2},
        },
        "eval": {"every": 100, "samples": 4, "pictures": 3, "max_new_tokens": 3},
        "checkpoint": {"every": 100},
    }
