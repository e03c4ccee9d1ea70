"""Checkpoints of a run: whatever a killed run needs to go on exactly, in a folder per step.

`step_000500/` holds `weights.safetensors` (trained tensors; frozen ones are loaded from their sources again), `optimizer.pt`
(optimiser and random state, read with `weights_only`) and `state.json` (`RunState`).
A folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mm.train.optim import Optimizers


@dataclass(frozen=True)
class RunState:
    """What a resumed run must know besides tensors.

    Attributes:
        data: position in the data.
        audio_seconds: length of the recordings so far.
    """

    step: int
    data: dict[str, Any]
    audio_seconds: float = 0.0


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    names = [path.name for path in directory.glob("step_*")]
    return sorted(int(match[1]) for match in (re.fullmatch(r"step_(\d+)", name) for name in names) if match)


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def save(
    directory: Path,
    state: RunState,
    trained: Mapping[str, nn.Parameter],
    optimizer: Optimizers,
    *,
    keep: int,
) -> None:
    """Writes a checkpoint and removes all but the last `keep`."""
    target = path_of(directory, state.step)
    partial = directory / f"partial_{state.step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: parameter.detach().contiguous() for name, parameter in trained.items()}, partial / "weights.safetensors"
    )
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    torch.save({"optimizer": optimizer.state_dict(), "random": random}, partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(vars(state)))
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    for step in steps(directory)[:-keep]:
        shutil.rmtree(path_of(directory, step))


def load_latest(directory: Path, trained: Mapping[str, nn.Parameter], optimizer: Optimizers) -> RunState | None:
    """Restores the last checkpoint into weights, optimiser and random generators; None when there is none.

    Raises:
        ValueError: the checkpoint holds other tensors than this run trains.
    """
    found = steps(directory)
    if not found:
        return None
    path = path_of(directory, found[-1])
    weights = load_file(path / "weights.safetensors")
    if weights.keys() != trained.keys():
        odd = sorted(weights.keys() ^ trained.keys())
        raise ValueError(
            f"{path}: holds other tensors than this run trains, such as {odd[0]}; choose another output folder"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"]["cpu"])
    if saved["random"]["cuda"]:
        torch.cuda.set_rng_state_all(saved["random"]["cuda"])
    return RunState(**json.loads((path / "state.json").read_text()))
