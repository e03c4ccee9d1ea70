"""`mm eval normalizer`: how many held-out texts are said without a mistake (Table 34 of the paper)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data.shards import Sample, open_source
from mm.eval.files import write_report
from mm.eval.metrics import Estimate, proportion
from mm.model import MultimodalLlama
from mm.train.lm_features import FeatureWriter, TextFeatures, written_text
from mm.voice import load_part
from speech.normalizer import LMFeatures, TextNormalizer, TokenBatch, best_rules
from speech.tn_rules import speak, words_of
from speech.tn_tokens import split

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class NormalizerResult:
    """A line of the table.

    Attributes:
        features: the language model that is read; None for text alone.
        right_context: TN tokens; None for all.
        accuracy: share of samples of which every word is right.
        by_kind: the same for each kind of text.
    """

    model: str
    features: str | None
    right_context: int | None
    n: int
    accuracy: Estimate
    by_kind: Mapping[str, Estimate]


def main(models: Sequence[Path], source: Path, out: Path, *, limit: int, batch_size: int) -> list[NormalizerResult]:
    """Evaluates exports of tts-normalizer on the same texts and writes `results.json` and `predictions.jsonl`.

    Raises:
        ValueError: a model or the texts cannot be read.
    """
    normalizers = {str(path): load_part(path, "normalizer") for path in models}
    opened = open_source(source, name=str(source))
    samples = [opened[i] for i in range(min(limit, len(opened)))]
    features: dict[LMFeatures, list[TextFeatures]] = {}  # those of one language model serve all that read them
    said: dict[str, list[str]] = {}
    for name, normalizer in normalizers.items():
        lm = normalizer.config.lm
        if lm is not None and lm not in features:
            features[lm] = read_features(lm, samples, batch_size)
        said[name] = predict(normalizer, samples, features[lm] if lm else None, batch_size)
    results = [score(name, normalizers[name], samples, texts) for name, texts in said.items()]
    Console().print(table(results))
    predictions = [
        {"key": sample.key, "kind": sample.metadata.get("kind"), "written": written_text(sample.metadata)}
        | {"spoken": sample.metadata["spoken"], "predictions": {name: texts[i] for name, texts in said.items()}}
        for i, sample in enumerate(samples)
    ]
    write_report(out, model=", ".join(normalizers), limit=limit, results=map(asdict, results), predictions=predictions)
    return results


def read_features(lm: LMFeatures, samples: Sequence[Sample], batch_size: int) -> list[TextFeatures]:
    """Features of all texts, from the language model itself.

    Raises:
        ValueError: it cannot be loaded, or has another width than the normaliser was trained with.
    """
    model = MultimodalLlama.from_pretrained(lm.source)
    if model.lm.config.dim != lm.dim:
        raise ValueError(f"features: {lm.source} has width {model.lm.config.dim}, but the normaliser reads {lm.dim}")
    writer = FeatureWriter(model, lm.layer)
    return in_batches(
        lambda some: writer([written_text(sample.metadata) for sample in some]), samples, batch_size, "reading"
    )


@torch.inference_mode()
def predict(
    normalizer: TextNormalizer, samples: Sequence[Sample], features: Sequence[TextFeatures] | None, batch_size: int
) -> list[str]:
    """The words of every text."""

    def speak_some(some: Sequence[tuple[Sample, TextFeatures | None]]) -> list[str]:
        rows = [split(written_text(sample.metadata)) for sample, _ in some]
        lm = [read for _, read in some if read is not None] or None
        batch = TokenBatch.whole(rows, lm, normalizer.config.max_chars)
        rules = best_rules(normalizer(batch), batch.n_tokens_B)
        return [words_of(speak(row, chosen)) for row, chosen in zip(rows, rules, strict=True)]

    known: Sequence[TextFeatures | None] = features or [None] * len(samples)
    pairs = list(zip(samples, known, strict=True))
    return in_batches(speak_some, pairs, batch_size, "speaking")


def in_batches(
    call: Callable[[Sequence[Item]], list[Made]], items: Sequence[Item], batch_size: int, what: str
) -> list[Made]:
    """What `call` makes of all items, `batch_size` at a time, behind a progress bar that says `what`."""
    made: list[Made] = []
    for start in tqdm(range(0, len(items), batch_size), desc=what, unit="batch"):
        made += call(items[start : start + batch_size])
    return made


def score(name: str, normalizer: TextNormalizer, samples: Sequence[Sample], said: Sequence[str]) -> NormalizerResult:
    """A sample is right if all of its words are."""
    hits = [text == sample.metadata["spoken"] for text, sample in zip(said, samples, strict=True)]
    kinds: dict[str, list[bool]] = defaultdict(list)
    for sample, hit in zip(samples, hits, strict=True):
        kinds[str(sample.metadata.get("kind"))].append(hit)
    config = normalizer.config
    return NormalizerResult(
        model=name,
        features=f"{config.lm.source}, layer {config.lm.layer}" if config.lm else None,
        right_context=config.right_context,
        n=len(hits),
        accuracy=proportion(hits),
        by_kind={kind: proportion(some) for kind, some in sorted(kinds.items())},
    )


def table(results: Sequence[NormalizerResult]) -> Table:
    """For people: a line per model."""
    view = Table(title="Text normalisation", caption="whole samples right, 95% intervals", box=SIMPLE, show_edge=False)
    for heading in ("features", "right context"):
        view.add_column(heading)
    for heading in ("n", "accuracy"):
        view.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        context = "unlimited" if r.right_context is None else str(r.right_context)
        view.add_row(r.features or "text alone", context, str(r.n), str(r.accuracy))
    return view
