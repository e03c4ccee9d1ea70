"""`mm eval pictures`: what a model answers about held-out pictures, and what the same model says without looking.

Every question is asked three times: with its picture, without any (which is the language model alone), and with another
picture of the same kind. A model that looks is right in the first condition only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from data.images import load_image
from data.shards import Source
from mm.eval.asking import (
    Answered,
    Question,
    TaskResult,
    answer,
    draw_questions,
    read_samples,
    score,
    shown,
    table,
)
from mm.eval.files import heldout_sources, write_report
from mm.sheet import COLUMNS, Shown, contact_sheet

if TYPE_CHECKING:
    from mm.model import MultimodalLlama

CONDITIONS = ("picture", "no_picture", "shuffled")


@dataclass(frozen=True, kw_only=True)
class PictureQuestion(Question):
    """A question about a held-out picture.

    Attributes:
        picture: encoded, as is `other`, a different picture of the kind.
    """

    picture: bytes
    other: bytes

    def media(self, condition: str) -> list[dict[str, Any]]:
        picture = {"picture": self.picture, "no_picture": None, "shuffled": self.other}[condition]
        return [{"type": "image", "image": picture}] if picture is not None else []


def main(
    model: str | Path, shards: str | Path, out: str | Path, limit: int = 300, batch_size: int = 32
) -> list[TaskResult]:
    """Evaluates a model, prints the table, and writes `results.json`, `predictions.jsonl` and `contact-sheet.png`.

    Args:
        model: as `MultimodalLlama.from_pretrained`.
        shards: folder of `mm data make pictures`.
        out: folder; made if missing.
        limit: questions per task.
        batch_size: questions that are answered together.

    Raises:
        ValueError: an argument is wrong, or the folder has no held-out shards.
    """
    from mm.model import MultimodalLlama

    questions = choose_questions(heldout_sources(shards, "pictures"), limit=limit)
    answered = answer(MultimodalLlama.from_pretrained(model), questions, CONDITIONS, batch_size=batch_size)
    results = score(answered)
    out = write_report(
        out,
        model=model,
        limit=limit,
        results=(result.record() for result in results),
        predictions=(a.record() for a in answered),
    )
    _draw(answered, out / "contact-sheet.png")
    Console().print(table(results, "Held-out pictures", "; CER: character error rate, less is better"))
    return results


def evaluate(
    model: MultimodalLlama, sources: Sequence[Source], *, limit: int = 300, batch_size: int = 32, seed: int = 0
) -> list[TaskResult]:
    """Scores of a model on held-out samples, whose JSON has `questions` with `task`, `question` and `answer`.

    Args:
        sources: one per kind of picture; pictures are shuffled within a source.
        limit: questions per task; the choice depends on nothing but `seed`.
        batch_size: questions that are answered together; an answer does not depend on it.

    Raises:
        ValueError: an argument is wrong, or a sample has no questions or no picture.
    """
    questions = choose_questions(sources, limit=limit, seed=seed)
    return score(answer(model, questions, CONDITIONS, batch_size=batch_size))


def choose_questions(sources: Sequence[Source], *, limit: int, seed: int = 0) -> list[PictureQuestion]:
    """Up to `limit` questions of each task, with the picture that stands in for theirs under "shuffled"."""
    return draw_questions((q for source in sources for q in _read_questions(source, seed)), limit=limit, seed=seed)


def _read_questions(source: Source, seed: int) -> Iterator[PictureQuestion]:
    if len(source) < 2:
        raise ValueError(f"source {source.name!r} has one picture only; shuffling needs at least two")
    samples = read_samples(source, "image", "picture")
    for (sample, picture), other in zip(samples, derangement(len(samples), seed), strict=True):
        for asked in sample.metadata["questions"]:
            yield PictureQuestion(
                key=sample.key,
                kind=source.name,
                task=asked["task"],
                question=asked["question"],
                answer=asked["answer"],
                picture=picture,
                other=samples[other][1],
            )


def derangement(n: int, seed: int) -> list[int]:
    """A random permutation that leaves nothing in its place: each goes to its neighbour in a shuffled circle."""
    assert n >= 2
    circle = random.Random(seed).sample(range(n), n)
    partner = dict(pairwise([*circle, circle[0]]))
    return [partner[i] for i in range(n)]


def _draw(answered: Sequence[Answered[PictureQuestion]], path: Path) -> None:
    """A line of pictures per task."""
    cells = [
        Shown(load_image(a.question.picture), a.question.question, a.question.answer, a.predictions["picture"])
        for a in shown(answered, COLUMNS)
    ]
    contact_sheet(cells, path)
