"""The optimiser of a stage's parameter groups, and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from mm.train.config import OptimConfig
from mm.train.muon import Muon


class Optimizers:
    """Optimisers of different parameters, used as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizers:
    """AdamW over the groups of `mm.stages.apply`, or Muon over those of matrices that are in no head.

    Each group remembers its peak learning rate, which the schedule scales.
    """
    by_muon: list[dict[str, Any]] = []
    by_adamw: list[dict[str, Any]] = []
    for group in groups:
        suits_muon = config.matrices == "muon" and group["matrices"] and group["name"] != "head"
        (by_muon if suits_muon else by_adamw).append({**group, "peak_lr": group["lr"]})
    optimizers: list[torch.optim.Optimizer] = []
    if by_muon:
        optimizers.append(Muon(by_muon))
    if by_adamw:
        optimizers.append(torch.optim.AdamW(by_adamw, betas=(config.betas[0], config.betas[1]), fused=True))
    return Optimizers(*optimizers)


def schedule(step: int, config: OptimConfig) -> float:
    """Share of the peak learning rate in step `step` (counted from 0): linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: Optimizers, share: float) -> dict[str, float]:
    """Scales every group's peak; returns the learning rates by name."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
