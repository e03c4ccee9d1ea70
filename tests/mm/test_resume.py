"""A run that is killed and started again is the run that was never killed (contract 8)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mm.config import from_mapping
from mm.train import run_checkpoint
from mm.train.config import TrainConfig
from mm.train.run_log import read_log
from mm.train.trainer import Trainer


def run(data: dict[str, Any]) -> Trainer:
    trainer = Trainer(from_mapping(TrainConfig, data))
    trainer.train()
    return trainer


def losses(directory: str | Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; a step that appears twice would be an error."""
    records = [record for record in read_log(Path(directory)) if "loss" in record]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records}


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    step = run_checkpoint.steps(Path(directory) / "checkpoints")[-1]
    return load_file(run_checkpoint.path_of(Path(directory) / "checkpoints", step) / "weights.safetensors")


@pytest.fixture
def long_run(run_data: dict[str, Any]) -> dict[str, Any]:
    run_data["optim"] |= {"steps": 60, "warmup": 5}
    return run_data | {"checkpoint": {"every": 7, "keep": 2}}


def test_kill_9_and_resume_is_bit_for_bit(long_run: dict[str, Any], tmp_path: Path) -> None:
    killed = long_run | {"output": str(tmp_path / "killed")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(killed))
    command = [sys.executable, "-m", "mm.train.image_adapter", "--config", str(path)]
    log = tmp_path / "killed" / "log.jsonl"
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while not log.exists() or log.read_text().count("\n") < 17:
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL
    reached = run_checkpoint.steps(tmp_path / "killed" / "checkpoints")
    assert 14 <= reached[-1] < 60
    run(killed)
    run(long_run | {"output": str(tmp_path / "whole")})
    assert len(losses(tmp_path / "whole")) == 60
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "killed")[name], tensor), name


def test_ctrl_c_checkpoints_and_the_same_command_goes_on(long_run: dict[str, Any], tmp_path: Path) -> None:
    long_run["optim"]["matrices"] = "muon"
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the suite in the background
    long_run["optim"] |= {"steps": 9}
    trainer = Trainer(from_mapping(TrainConfig, long_run))
    step = trainer.train_step

    def interrupted(batch: Any) -> dict[str, float]:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batch)

    trainer.train_step = interrupted  # type: ignore[method-assign]
    assert trainer.train() is None
    assert run_checkpoint.steps(trainer.checkpoints) == [4]
    assert signal.getsignal(signal.SIGINT) is before
    run(long_run)
    run(long_run | {"output": str(tmp_path / "whole")})
    assert losses(long_run["output"]) == losses(tmp_path / "whole")


def test_log_is_cut_back_to_the_checkpoint(long_run: dict[str, Any]) -> None:
    long_run["optim"] |= {"steps": 9}
    run(long_run)
    log = Path(long_run["output"]) / "log.jsonl"
    expected = losses(long_run["output"])
    checkpoints = Path(long_run["output"]) / "checkpoints"
    assert run_checkpoint.steps(checkpoints) == [7, 9]
    (checkpoints / "step_000009").rename(checkpoints / "partial_000009")  # as if killed while writing it
    log.write_text(log.read_text() + '{"step": 9, "lo')
    run(long_run)
    assert losses(long_run["output"]) == expected


def test_keeps_the_last_checkpoints_only(long_run: dict[str, Any]) -> None:
    long_run["optim"] |= {"steps": 8}
    run(long_run | {"checkpoint": {"every": 2, "keep": 3}})
    assert run_checkpoint.steps(Path(long_run["output"]) / "checkpoints") == [4, 6, 8]


def test_another_run_in_the_same_folder_is_refused(long_run: dict[str, Any]) -> None:
    long_run["optim"] |= {"steps": 6}
    run(long_run)
    Trainer(from_mapping(TrainConfig, long_run | {"eval": {"every": 3}}))  # may differ
    with pytest.raises(ValueError, match="another run \\(seed was 0, is 1\\)"):
        Trainer(from_mapping(TrainConfig, long_run | {"seed": 1}))
