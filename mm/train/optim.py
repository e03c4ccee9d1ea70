"""AdamW over a stage's parameter groups, and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from mm.train.config import OptimConfig


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups of `mm.stages.apply`. Each group remembers its peak learning rate, which the schedule scales."""
    groups = [{**group, "peak_lr": group["lr"]} for group in groups]
    return torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), fused=True)


def schedule(step: int, config: OptimConfig) -> float:
    """Share of the peak learning rate in step `step` (counted from 0): linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, share: float) -> dict[str, float]:
    """Scales every group's peak; returns the learning rates by name."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
