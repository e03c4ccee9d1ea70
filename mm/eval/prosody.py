"""`mm eval prosody`: how near predicted durations, pitch and loudness are to those of held-out recordings (section 8.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.shards import open_source
from mm.eval.files import write_report
from mm.eval.metrics import Estimate
from mm.eval.normalizer import in_batches, read_features
from mm.eval.prosody_measures import NAMES, contours, prosody_errors, rmse
from mm.sheet import Shown, contact_sheet
from mm.train.lm_features import TextFeatures
from mm.train.prosody_prediction import ProsodyReader, ProsodySample, phone_ids, predict
from mm.voice import load_part
from speech.normalizer import LMFeatures
from speech.prosody import ProsodyModel

N_SHOWN = 24


@dataclass(frozen=True, kw_only=True)
class ProsodyResult:
    """A line of the table.

    Attributes:
        features: the language model that is read; None for phones alone.
        lookahead: phones; None for all, which cannot stream.
        rmse: by `mm.eval.prosody_measures.NAMES`; each step is told what the one before predicted, as in use.
    """

    model: str
    features: str | None
    lookahead: int | None
    n: int
    rmse: Mapping[str, Estimate]


def main(models: Sequence[Path], source: str, out: Path, *, limit: int, batch_size: int) -> list[ProsodyResult]:
    """Evaluates exports of tts-prosody on the same recordings; writes `results.json`, `predictions.jsonl` and `contours.png`.

    Raises:
        ValueError: a model or the recordings cannot be read.
    """
    parts: dict[str, ProsodyModel] = {str(path): load_part(path, "prosody") for path in models}
    opened, reader = open_source(source, name=source), ProsodyReader({})
    raws = [opened[i] for i in range(min(limit, len(opened)))]
    samples = [reader.prepare(raw) for raw in raws]
    features: dict[LMFeatures, list[TextFeatures]] = {}  # those of one language model serve all that read them
    predicted: dict[str, list[Tensor]] = {}
    for name, prosody in parts.items():
        lm, given = prosody.config.lm, samples
        if lm is not None:
            if lm not in features:
                features[lm] = read_features(lm, raws, batch_size)
            given = [
                replace(sample, lm=read, phones=phone_ids(sample.spoken, read[1]))
                for sample, read in zip(samples, features[lm], strict=True)
            ]
        predicted[name] = in_batches(partial(predict, prosody, reader), given, batch_size, "timing")
    results = [score(name, parts[name], samples, rows) for name, rows in predicted.items()]
    Console().print(table(results))
    predictions = [
        {"key": sample.key, "text": sample.spoken.text, "true": sample.prosody_N3.tolist()}
        | {"predictions": {name: rows[i].tolist() for name, rows in predicted.items()}}
        for i, sample in enumerate(samples)
    ]
    write_report(out, model=", ".join(parts), limit=limit, results=map(asdict, results), predictions=predictions)
    last = predicted[str(models[-1])]
    shown = list(zip(samples, last, strict=True))[:: max(1, len(samples) // N_SHOWN)][:N_SHOWN]
    contact_sheet(
        [
            Shown(
                contours(sample.prosody_N3, row_N3),
                sample.spoken.text,
                str(prosody_errors(row_N3, sample.prosody_N3, sample.is_voiced_N)),
            )
            for sample, row_N3 in shown
        ],
        out / "contours.png",
    )
    return results


def score(
    name: str, prosody: ProsodyModel, samples: Sequence[ProsodySample], predicted: Sequence[Tensor]
) -> ProsodyResult:
    errors = [
        prosody_errors(row_N3, sample.prosody_N3, sample.is_voiced_N)
        for row_N3, sample in zip(predicted, samples, strict=True)
    ]
    config = prosody.config
    return ProsodyResult(
        model=name,
        features=f"{config.lm.source}, layer {config.lm.layer}" if config.lm else None,
        lookahead=config.lookahead,
        n=len(samples),
        rmse=rmse(errors),
    )


def table(results: Sequence[ProsodyResult]) -> Table:
    """For people: a line per model."""
    caption = f"RMSE over the phones of {results[0].n} recordings, with half of 95% intervals"
    view = Table(title="Prosody", caption=caption, box=SIMPLE, show_edge=False)
    for heading in ("features", "look-ahead"):
        view.add_column(heading)
    for heading in (name.replace("_", " ") for name in NAMES):
        view.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        ahead = "unlimited" if r.lookahead is None else str(r.lookahead)
        values = (f"{e.value:.3f} ± {(e.high - e.low) / 2:.3f}" for e in (r.rmse[name] for name in NAMES))
        view.add_row(r.features or "phones alone", ahead, *values)
    return view
