"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal, so that a step moves all directions of a matrix alike.

`torch.optim.Muon` is the same, but always multiplies in bf16, which is a loss on CPUs that lack it, and takes one matrix at a time.

Shape letters: X matrices of one shape, R rows, C columns, R <= C.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: Of the polynomial that takes singular values to about one: steep at zero, and near one soon rather than exactly.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonal(x_XRC: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values between about 0.7 and 1.2, by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x_XRC = x_XRC / (torch.linalg.matrix_norm(x_XRC, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram_XRR = x_XRC @ x_XRC.mT
        x_XRC = a * x_XRC + (b * gram_XRR + c * gram_XRR @ gram_XRR) @ x_XRC
    return x_XRC


class Muon(torch.optim.Optimizer):
    """Steps of AdamW's usual size, so that learning rates carry over (Liu et al. 2025).

    Args:
        params: matrices of layers; not embeddings, nor a last layer's.
        momentum: share of the past, as Nesterov's.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[min(parameter.shape), max(parameter.shape)].append(parameter)
            for (_, n_columns), parameters in alike.items():
                updates_XRC = orthogonal(
                    torch.stack([_wide(self._direction(p, group["momentum"])) for p in parameters])
                )
                size = -group["lr"] * 0.2 * n_columns**0.5
                for parameter, update_RC in zip(parameters, updates_XRC, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    _wide(parameter).add_(update_RC, alpha=size)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        past = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(past, momentum)


def _wide(x: Tensor) -> Tensor:
    """A view with no more rows than columns."""
    return x if x.shape[0] <= x.shape[1] else x.T
