"""From logits to the next token of each row, and when a row's text is at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to end.

    Attributes:
        max_new_tokens: end a row after so many tokens.
        temperature: divides the logits; 0 takes the likeliest token and ignores the three filters.
        top_k: keep the k likeliest tokens.
        top_p: keep the likeliest tokens that together reach this probability.
        min_p: keep tokens with at least this share of the likeliest one's probability.
        repetition_penalty: weakens tokens that the prompt or the answer has; 1 does nothing.
        seed: the same for every row, so that a row does not depend on its batch; None draws a fresh one per row.
        stop: strings that end a row; they are not part of its text.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be 0 (greedy) or a positive number": 0 <= self.temperature < math.inf,
            "top_k must be at least 1, or None": self.top_k is None or self.top_k >= 1,
            "top_p must be above 0 and at most 1, or None": self.top_p is None or 0 < self.top_p <= 1,
            "min_p must be from 0 to 1, or None": self.min_p is None or 0 <= self.min_p <= 1,
            "repetition_penalty must be a positive number": 0 < self.repetition_penalty < math.inf,
            "stop must be strings with at least one character": all(isinstance(s, str) and s for s in stop),
        }
        for rule, holds in checks.items():
            if not holds:
                name = rule.split()[0]
                raise ValueError(f"{rule}; got {getattr(self, name)!r}")


class Sampler:
    """Chooses the next token of each row. A row's choices depend on its own logits, history and seed alone.

    Args:
        params: how to choose.
        prompt_ids: what each row has seen, for the repetition penalty; ids that have no logit are ignored.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[Sequence[int]]) -> None:
        self.params = params
        self._prompt_ids = prompt_ids
        self._seen_BV: Tensor | None = None
        self._generators = [torch.Generator() for _ in prompt_ids]
        for generator in self._generators:
            generator.seed() if params.seed is None else generator.manual_seed(params.seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Returns ids `(B,)` and remembers them."""
        logits_BV = logits_BV.float()
        if self.params.repetition_penalty != 1:
            if self._seen_BV is None:
                self._seen_BV = _seen(self._prompt_ids, logits_BV)
            logits_BV = penalise(logits_BV, self._seen_BV, self.params.repetition_penalty)
        ids_B = logits_BV.argmax(-1) if self.params.temperature == 0 else self._draw(logits_BV)
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV.scatter(1, ids_B[:, None], True)
        return ids_B

    def _draw(self, logits_BV: Tensor) -> Tensor:
        """Inverts the cumulative distribution at one CPU random number per row, so devices agree."""
        cumulative_BV = filter_logits(logits_BV, self.params).double().softmax(-1).cumsum(-1)
        uniform_B1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators])
        ids_B1 = torch.searchsorted(cumulative_BV, uniform_B1.to(logits_BV.device) * cumulative_BV[:, -1:], right=True)
        return ids_B1[:, 0]


def _seen(prompt_ids: Sequence[Sequence[int]], logits_BV: Tensor) -> Tensor:
    seen_BV = torch.zeros(logits_BV.shape, dtype=torch.bool)
    for row, ids in zip(seen_BV, prompt_ids, strict=True):
        row[[i for i in ids if i < len(row)]] = True
    return seen_BV.to(logits_BV.device)


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divides the positive logits of seen tokens by `penalty` and multiplies the negative ones."""
    weakened_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, weakened_BV, logits_BV)


def filter_logits(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Applies temperature, top-k, top-p and min-p in this order; what they drop becomes minus infinity."""
    logits_BV = logits_BV / params.temperature
    if params.top_k is not None:
        kth_B1 = logits_BV.topk(min(params.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if params.top_p is not None:
        ascending_BV, order_BV = logits_BV.sort(-1)
        drop_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - params.top_p
        drop_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -math.inf)
    if params.min_p is not None:
        probs_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(probs_BV < params.min_p * probs_BV.amax(-1, keepdim=True), -math.inf)
    return logits_BV


class StopChecker:
    """Cuts a streamed text before the first stop string; how the text was cut into pieces makes no difference.

    Attributes:
        stopped: a stop string has come; nothing more may be pushed.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """Takes more text and returns what is certain not to be part of a stop string."""
        assert not self.stopped
        self._held += text
        # The first to be complete; of several that end together, the longest.
        found = [(i + len(s), i) for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            start = min(found)[1]
            text, self._held = self._held[:start], ""
            return text
        keep = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """Returns what was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text
