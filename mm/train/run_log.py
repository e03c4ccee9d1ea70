"""What a run leaves for people: metrics as JSON lines and TensorBoard, how it was started, its loss curve."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.jsonl"
PACKAGES = (
    "torch",
    "torchvision",
    "torchaudio",
    "timm",
    "open_clip_torch",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "webdataset",
)


def read_log(directory: Path) -> list[dict[str, Any]]:
    """Complete lines of the log; a line that a kill cut short is left out."""
    records = []
    for line in (directory / LOG_FILE).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class RunLog:
    """Appends metrics; at the start, cuts away what a killed run wrote after its last checkpoint.

    Args:
        directory: run folder.
        step: the run goes on after this one; 0 for a new run.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.directory = directory
        path = directory / LOG_FILE
        kept = [record for record in read_log(directory) if record["step"] <= step] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, path)
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds one line; names with a slash are grouped in TensorBoard."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def record_start(directory: Path, step: int) -> None:
    """Notes the command, code and packages of every start of a run in `starts.jsonl`."""
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "after_step": step,
        "command": sys.argv,
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }
    with (directory / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")


def git_commit() -> str | None:
    """Commit of the code, with `-dirty` where files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def draw_loss(directory: Path) -> None:
    """Draws training and held-out loss over steps into `loss.png`."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    records = read_log(directory)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    training = [(record["step"], record["loss"]) for record in records if "loss" in record]
    heldout = [(record["step"], record["heldout/loss"]) for record in records if "heldout/loss" in record]
    steps, losses = zip(*training, strict=True)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="training")
    window = max(1, len(losses) // 50)
    smooth = [math.fsum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"training, mean of {window}")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), color="tab:orange", marker="o", label="held out")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=120)
