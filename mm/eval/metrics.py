"""How right answers are: exact matches, shared words, errors of recognition and translation, each with its 95% interval."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jiwer
import numpy as np
from rapidfuzz.distance import Levenshtein

from mm.languages import find_language

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


def choice_accuracy(predictions: Sequence[str], answers: Sequence[str]) -> Estimate:
    """Share of predictions that begin with the right letter: `B`, `b.`, `(B)` and `B. left` all choose B."""
    chosen = [re.match(r"\W*([A-Za-z])\b", prediction) for prediction in predictions]
    return proportion([c is not None and c[1].upper() == a for c, a in zip(chosen, answers, strict=True)])


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


@lru_cache
def whisper_normaliser(language: str) -> Callable[[str], str]:
    """Whisper's text normaliser of a language, by English name: its English one, or the basic one for all others.

    Raises:
        ValueError: the language is unknown.
    """
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer() if find_language(language).code == "en" else BasicTextNormalizer()


def wer(predictions: Sequence[str], references: Sequence[str], language: str = "English") -> Estimate:
    """Word error rate after Whisper's normaliser: edits of words, per word of all references; may exceed 1.

    Raises:
        ValueError: the language is unknown, or a reference has no words.
    """
    return _error_rate(predictions, references, whisper_normaliser(language))


def wer_by_ear(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Estimate:
    """Word error rate in English where spelling is free: what a listener can write in more than one way is right in any of them.

    Args:
        references: ways to write each; the nearest counts. Digits beside each other are one number, however they are grouped.

    Raises:
        ValueError: a reference has no words.
    """
    normalised = whisper_normaliser("English")

    def words(text: str) -> str:
        figures = re.sub(r"\bone\b", "1", normalised(text))  # which the normaliser leaves as it may be a pronoun
        return re.sub(r"(?<=\d)\s+(?=\d)", "", figures)

    nearest = [
        min(_edits(words(predicted), words(way), way) for way in ways)
        for predicted, ways in zip(predictions, references, strict=True)
    ]
    return ratio([edits for edits, _ in nearest], [length for _, length in nearest])


def cer(predictions: Sequence[str], references: Sequence[str], language: str = "English") -> Estimate:
    """Character error rate after Whisper's normaliser, for which spaces do not count; else as `wer`."""
    normalised = whisper_normaliser(language)
    return _error_rate(predictions, references, lambda text: " ".join("".join(normalised(text).split())))


def recognition_errors(predictions: Sequence[str], references: Sequence[str], language: str) -> Estimate:
    """WER or CER, whichever the paper has for the language (section 8.3.2)."""
    return {"WER": wer, "CER": cer}[find_language(language).error_rate](predictions, references, language)


def contains_answer(reply: str, answer: str, language: str = "English") -> bool:
    """Whether the answer's words stand in a reply, next to each other, after Whisper's normaliser ("four" is "4")."""
    normalised = whisper_normaliser(language)
    return f" {' '.join(normalised(answer).split())} " in f" {' '.join(normalised(reply).split())} "


def _error_rate(predictions: Sequence[str], references: Sequence[str], spaced: Callable[[str], str]) -> Estimate:
    """Edits per unit of the references; `spaced` sets the units of a text apart by spaces."""
    counted = [_edits(spaced(p), spaced(r), r) for p, r in zip(predictions, references, strict=True)]
    return ratio([edits for edits, _ in counted], [length for _, length in counted])


def _edits(predicted: str, reference: str, original: str) -> tuple[int, int]:
    """How many words are wrong, and how many there are."""
    aligned = jiwer.process_words(reference, predicted)
    length = aligned.hits + aligned.substitutions + aligned.deletions
    if length == 0:
        raise ValueError(f"references: {original!r} has no words once it is normalised; leave it out")
    return aligned.substitutions + aligned.deletions + aligned.insertions, length


#: sacrebleu knows Chinese, Japanese and Korean; its default would take a Thai sentence, which has no spaces, for one word.
_BLEU_TOKENIZERS = {"th": "char"}


def bleu(predictions: Sequence[str], references: Sequence[str], target: str) -> Estimate:
    """Corpus BLEU of translations into a language, by sacrebleu; 0.295 is what papers write as 29.5.

    Args:
        target: English name of the language; sacrebleu's tokenizer depends on it, and Thai counts by character.

    Raises:
        ValueError: the language is unknown, or its tokenizer is not installed.
    """
    from sacrebleu.metrics import BLEU  # slow to import

    code = find_language(target).code
    try:
        scorer = BLEU(trg_lang=code, tokenize=_BLEU_TOKENIZERS.get(code))
    except RuntimeError as error:
        raise ValueError(f"target: BLEU in {target} needs `pip install 'sacrebleu[{code}]'`") from error
    rows = [scorer.corpus_score([p], [[r]]) for p, r in zip(predictions, references, strict=True)]
    stats_NK = np.array([[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in rows])

    def corpus_bleu(stats_K: np.ndarray) -> float:
        (sys_len, ref_len), (counts, totals) = stats_K[:2].tolist(), np.split(stats_K[2:], 2)
        score = BLEU.compute_bleu(counts.tolist(), totals.tolist(), sys_len, ref_len, scorer.smooth_method)
        return score.score / 100

    resampled = [corpus_bleu(stats_NK[draw_N].sum(0)) for draw_N in _draws(len(stats_NK))]
    return _percentiles(corpus_bleu(stats_NK.sum(0)), resampled)


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
    draw_RN = _draws(len(numerator_N))
    resampled_R = numerator_N[draw_RN].sum(-1) / denominator_N[draw_RN].sum(-1)
    return _percentiles(float(numerator_N.sum() / denominator_N.sum()), resampled_R)


def _draws(n: int) -> np.ndarray:
    """Indices of the bootstrap's resamples `(N_RESAMPLES, n)`, the same for the same n."""
    return np.random.default_rng(0).integers(0, n, (N_RESAMPLES, n))


def _percentiles(value: float, resampled: Sequence[float] | np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
