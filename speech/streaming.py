"""What every streaming module shares: states that are plain tensors, and slices that start elsewhere in every row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Memory of a streaming module between steps: tensors whose first dimension is the row.

    All zeros mean that a row has heard nothing yet. `vars(state)` is a dictionary of tensors to save, and
    `type(state)(**tensors)` makes the state again.
    """

    def reset(self, rows_B: Tensor) -> Self:
        """A state in which the rows that are True start a new stream; the others go on."""
        if not rows_B.any():  # as nearly always
            return self

        def cleared(tensor: Tensor) -> Tensor:
            return tensor.masked_fill(rows_B.view(-1, *[1] * (tensor.ndim - 1)), 0)

        return dataclasses.replace(self, **{name: cleared(tensor) for name, tensor in vars(self).items()})


def take(x: Tensor, start_B: Tensor, length: int, dim: int = 1) -> Tensor:
    """`x[b, ..., start_B[b] : start_B[b] + length, ...]` of every row b; past the end of `x` its last entry repeats."""
    index_BX = (start_B[:, None] + torch.arange(length, device=x.device)).clamp(max=x.shape[dim] - 1)
    shape = [1] * x.ndim
    shape[0], shape[dim] = index_BX.shape
    return x.take_along_dim(index_BX.view(shape), dim)


def counts(n_B: Tensor | None, x: Tensor) -> Tensor:
    """How many entries of dimension 1 each row really has: `n_B`, or all of them when None."""
    return torch.full((len(x),), x.shape[1], device=x.device) if n_B is None else n_B.to(x.device)


def ending(final: bool | Tensor, x: Tensor) -> Tensor:
    """Which rows of `x` end their stream, `(B,)`: `final`, which may be said for all of them at once."""
    return torch.as_tensor(final, device=x.device).expand(len(x))


def below(n_B: Tensor, length: int) -> Tensor:
    """Mask `(B, length)`: True at the first `n_B[b]` entries of row b."""
    return torch.arange(length, device=n_B.device) < n_B[:, None]
