"""`mm eval pictures`: what a model answers about held-out pictures, and what the same model says without looking.

Every question is asked three times: with its picture, without any (which is the language model alone), and with another
picture of the same kind. A model that looks is right in the first condition only.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data.images import load_image
from data.shards import Sample, Source
from mm.eval.files import heldout_sources, write_report
from mm.eval.metrics import Estimate, metrics_of
from mm.sheet import COLUMNS, Shown, contact_sheet

if TYPE_CHECKING:
    from mm.model import MultimodalLlama

Condition = Literal["picture", "no_picture", "shuffled"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
#: Tokens that an answer may have beyond the longest right one of its task; one that goes on is wrong anyway.
SLACK = 4


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a held-out picture.

    Attributes:
        key: name of the picture's sample.
        kind: of picture; `task` says what is asked of it.
        picture: encoded, as is `other`, a different picture of the kind.
    """

    key: str
    kind: str
    task: str
    question: str
    answer: str
    picture: bytes
    other: bytes

    def messages(self, condition: Condition) -> list[dict[str, Any]]:
        shown = {"picture": self.picture, "no_picture": None, "shuffled": self.other}[condition]
        content = [{"type": "image", "image": shown}] if shown is not None else []
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.question}]}]


@dataclass(frozen=True)
class Answered:
    """A question with the model's answer under each condition."""

    question: Question
    predictions: Mapping[Condition, str]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One metric of one task: over `n` questions, with the picture and under the two controls."""

    kind: str
    task: str
    metric: str
    n: int
    picture: Estimate
    no_picture: Estimate
    shuffled: Estimate


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
    answered = answer(MultimodalLlama.from_pretrained(model), questions, batch_size=batch_size)
    results = score(answered)
    out = write_report(out, model=model, limit=limit, results=results, predictions=map(_record, answered))
    _draw(answered, out / "contact-sheet.png")
    Console().print(table(results))
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
    return score(answer(model, choose_questions(sources, limit=limit, seed=seed), batch_size=batch_size))


def choose_questions(sources: Sequence[Source], *, limit: int, seed: int = 0) -> list[Question]:
    """Up to `limit` questions of each task, with the picture that stands in for theirs under "shuffled"."""
    if limit < 1:
        raise ValueError(f"limit: need at least one question per task, got {limit}")
    chosen: list[Question] = []
    for source in sources:
        tasks = defaultdict(list)
        for question in _read_questions(source, seed):
            tasks[question.task].append(question)
        for task, questions in sorted(tasks.items()):
            rng = random.Random(f"{seed}/{source.name}/{task}")
            chosen += rng.sample(questions, min(limit, len(questions)))
    return chosen


def _read_questions(source: Source, seed: int) -> list[Question]:
    samples = [source[i] for i in tqdm(range(len(source)), desc=f"reading {source.name}", leave=False, delay=2)]
    if len(samples) < 2:
        raise ValueError(f"source {source.name!r} has one picture only; shuffling needs at least two")
    pictures = [_picture(sample) for sample in samples]
    others = derangement(len(samples), seed)
    questions = []
    for i, sample in enumerate(samples):
        if not sample.metadata.get("questions"):
            raise ValueError(
                f"source {source.name!r}: the JSON of sample {sample.key!r} has no questions; evaluate shards of "
                "`mm data make pictures`"
            )
        for asked in sample.metadata["questions"]:
            questions.append(
                Question(key=sample.key, kind=source.name, picture=pictures[i], other=pictures[others[i]], **asked)
            )
    return questions


def _picture(sample: Sample) -> bytes:
    parts = (part for message in sample.messages for part in message["content"])
    picture = next((part["image"] for part in parts if part["type"] == "image"), None)
    if picture is None:
        raise ValueError(f"source {sample.source!r}: sample {sample.key!r} has no picture")
    return picture


def derangement(n: int, seed: int) -> list[int]:
    """A random permutation that leaves nothing in its place: each goes to its neighbour in a shuffled circle."""
    assert n >= 2
    circle = random.Random(seed).sample(range(n), n)
    partner = dict(pairwise([*circle, circle[0]]))
    return [partner[i] for i in range(n)]


def answer(model: MultimodalLlama, questions: Sequence[Question], *, batch_size: int) -> list[Answered]:
    """Asks every question under the three conditions, greedily; the order of the questions is kept."""
    if batch_size < 1:
        raise ValueError(f"batch_size: need at least 1, got {batch_size}")
    tokenizer = model.processor.chat.tokenizer
    predictions: list[dict[Condition, str]] = [{} for _ in questions]
    with tqdm(total=len(questions) * len(CONDITIONS), unit="answer", desc="asking") as bar:
        for group in _by_task(questions).values():
            # One task at a time, because its answers are about equally long; in order of length, to pad little.
            max_new_tokens = max(len(tokenizer.encode(questions[i].answer)) for i in group) + SLACK
            group.sort(key=lambda i: len(questions[i].question))
            for start in range(0, len(group), batch_size):
                rows = group[start : start + batch_size]
                for condition in CONDITIONS:
                    messages = [questions[i].messages(condition) for i in rows]
                    generations = model.generate(messages=messages, max_new_tokens=max_new_tokens)
                    assert isinstance(generations, list)
                    for i, generation in zip(rows, generations, strict=True):
                        predictions[i][condition] = generation.text
                    bar.update(len(rows))
    return [Answered(*pair) for pair in zip(questions, predictions, strict=True)]


def _by_task(questions: Sequence[Question]) -> dict[tuple[str, str], list[int]]:
    """Indices of the questions of each kind and task."""
    groups = defaultdict(list)
    for i, question in enumerate(questions):
        groups[question.kind, question.task].append(i)
    return dict(groups)


def score(answered: Sequence[Answered]) -> list[TaskResult]:
    """Every metric of every task, in the order of the questions."""
    results = []
    for (kind, task), group in _by_task([a.question for a in answered]).items():
        right = [answered[i].question.answer for i in group]
        for name, metric in metrics_of(task).items():
            estimates = {c: metric([answered[i].predictions[c] for i in group], right) for c in CONDITIONS}
            results.append(TaskResult(kind=kind, task=task, metric=name, n=len(group), **estimates))
    return results


def table(results: Sequence[TaskResult]) -> Table:
    """For people: a row per metric, in 80 columns."""
    caption = "95% intervals; CER: character error rate, less is better"
    view = Table(title="Held-out pictures", caption=caption, box=SIMPLE, show_edge=False, pad_edge=False)
    for heading in ("task", "metric"):
        view.add_column(heading, no_wrap=True)
    for heading in ("n", "picture", "no picture", "shuffled"):
        view.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        controls = (f"{r.no_picture.value:.1%}", f"{r.shuffled.value:.1%}")
        view.add_row(r.task, r.metric, str(r.n), str(r.picture), *controls)
    return view


def _record(answered: Answered) -> dict[str, Any]:
    q = answered.question
    asked = {"key": q.key, "kind": q.kind, "task": q.task, "question": q.question, "answer": q.answer}
    return asked | {"predictions": answered.predictions}


def _draw(answered: Sequence[Answered], path: Path) -> None:
    """A line of pictures per task."""
    rows = [answered[i] for group in _by_task([a.question for a in answered]).values() for i in group[:COLUMNS]]
    contact_sheet(
        [
            Shown(load_image(a.question.picture), a.question.question, a.question.answer, a.predictions["picture"])
            for a in rows
        ],
        path,
    )
