"""How right answers are: exact matches, character errors and shared words, each with its 95% interval."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

Z_95 = 1.959964  #: half-width of a 95% interval in standard deviations
N_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A score with its 95% interval, as fractions."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


#: Scores predictions against as many right answers.
Metric = Callable[[Sequence[str], Sequence[str]], Estimate]


def normalise(text: str) -> str:
    """Folds case, drops punctuation and evens out spaces."""
    return " ".join(re.sub(r"[^\w\s]", "", text.casefold()).split())


def letters(text: str) -> str:
    """Letters alone: `H o u s e.` is `house`."""
    return "".join(filter(str.isalpha, text.casefold()))


def exact_match(prediction: str, answer: str) -> bool:
    return normalise(prediction) == normalise(answer)


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, each as often as it occurs."""
    predicted, right = normalise(prediction).split(), normalise(answer).split()
    shared = (Counter(predicted) & Counter(right)).total()
    return 2 * shared / (len(predicted) + len(right))


def accuracy(predictions: Sequence[str], answers: Sequence[str]) -> Estimate:
    """Share of exact matches."""
    return proportion(list(map(exact_match, predictions, answers)))


def spelling_accuracy(predictions: Sequence[str], answers: Sequence[str]) -> Estimate:
    """Share of words whose letters are all right."""
    return proportion([letters(p) == letters(a) for p, a in zip(predictions, answers, strict=True)])


def character_error_rate(predictions: Sequence[str], answers: Sequence[str]) -> Estimate:
    """Insertions, deletions and substitutions of letters, per letter of all answers; may exceed 1."""
    edits = [Levenshtein.distance(letters(p), letters(a)) for p, a in zip(predictions, answers, strict=True)]
    return ratio(edits, [len(letters(answer)) for answer in answers])


def mean_token_f1(predictions: Sequence[str], answers: Sequence[str]) -> Estimate:
    return ratio(list(map(token_f1, predictions, answers)), [1] * len(answers))


_EXACT: Mapping[str, Metric] = {"exact": accuracy}
_METRICS: Mapping[str, Mapping[str, Metric]] = {
    "words": {"CER": character_error_rate, "exact": spelling_accuracy},
    "stamps": {"exact": accuracy, "token F1": mean_token_f1},
}


def metrics_of(task: str) -> Mapping[str, Metric]:
    """By name, how answers of a task are scored."""
    return _METRICS.get(task, _EXACT)


def proportion(hits: Sequence[bool]) -> Estimate:
    """Share of hits with Wilson's score interval, which stays honest near 0 and 1."""
    n, p = len(hits), sum(hits) / len(hits)
    shrink = 1 + Z_95**2 / n
    centre = (p + Z_95**2 / (2 * n)) / shrink
    half = Z_95 * math.sqrt(p * (1 - p) / n + (Z_95 / (2 * n)) ** 2) / shrink
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum with the percentile bootstrap's interval over questions, from a fixed seed."""
    numerator_N, denominator_N = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    n = len(numerator_N)
    draw_RN = np.random.default_rng(0).integers(0, n, (N_RESAMPLES, n))
    ratio_R = numerator_N[draw_RN].sum(-1) / denominator_N[draw_RN].sum(-1)
    low, high = np.quantile(ratio_R, [0.025, 0.975])
    return Estimate(float(numerator_N.sum() / denominator_N.sum()), float(low), float(high))
