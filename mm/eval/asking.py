"""Asking a model about held-out media under several conditions, and scoring what it says.

The first condition is the real one: the medium and the question. The others are controls, in which something that the
answer needs is missing; what a model gets right there, it does not owe to that.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rich.box import SIMPLE
from rich.table import Table
from tqdm import tqdm

from data.shards import Sample, Source
from mm.eval.metrics import Estimate, Metric, metrics_of

if TYPE_CHECKING:
    from mm.model import MultimodalLlama

#: Tokens that an answer may have beyond the longest right one of its task; one that goes on is wrong anyway.
SLACK = 4


@dataclass(frozen=True, kw_only=True)
class Question(ABC):
    """A question about a held-out sample.

    Attributes:
        key: the sample's name.
        kind: of medium; `task` says what is asked of it.
    """

    key: str
    kind: str
    task: str
    question: str
    answer: str

    @abstractmethod
    def media(self, condition: str) -> list[dict[str, Any]]:
        """The parts of the message that stand before the question."""

    def messages(self, condition: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [*self.media(condition), {"type": "text", "text": self.question}]}]


Q = TypeVar("Q", bound=Question)


@dataclass(frozen=True)
class Answered(Generic[Q]):
    """A question with the model's answer under each condition."""

    question: Q
    predictions: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """For `predictions.jsonl`."""
        q = self.question
        asked = {"key": q.key, "kind": q.kind, "task": q.task, "question": q.question, "answer": q.answer}
        return asked | {"predictions": self.predictions}


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One metric of one task over `n` questions, under each condition."""

    kind: str
    task: str
    metric: str
    n: int
    scores: Mapping[str, Estimate]

    def record(self) -> dict[str, Any]:
        """For `results.json`."""
        about = {"kind": self.kind, "task": self.task, "metric": self.metric, "n": self.n}
        return about | {condition: asdict(estimate) for condition, estimate in self.scores.items()}


def read_samples(source: Source, kind: str, noun: str) -> list[tuple[Sample, Any]]:
    """All samples of a source, each with its first medium of a kind.

    Args:
        kind: "image" or "video".
        noun: how people call it; `mm data make {noun}s` makes it.

    Raises:
        ValueError: a sample has no such medium, or no `questions` in its JSON, by name.
    """
    found = []
    for index in tqdm(range(len(source)), desc=f"reading {source.name}", leave=False, delay=2):
        sample = source[index]
        parts = (part for message in sample.messages for part in message["content"])
        medium = next((part[kind] for part in parts if part["type"] == kind), None)
        if medium is None:
            raise ValueError(f"source {sample.source!r}: sample {sample.key!r} has no {noun}")
        if not sample.metadata.get("questions"):
            raise ValueError(
                f"source {source.name!r}: the JSON of sample {sample.key!r} has no questions; evaluate shards of "
                f"`mm data make {noun}s`"
            )
        found.append((sample, medium))
    return found


def draw_questions(questions: Iterable[Q], *, limit: int, seed: int) -> list[Q]:
    """Up to `limit` questions of each task of each kind; which ones depends on nothing but `seed`.

    Raises:
        ValueError: the limit is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit: need at least one question per task, got {limit}")
    kinds: dict[str, dict[str, list[Q]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        kinds[question.kind][question.task].append(question)
    chosen: list[Q] = []
    for kind, tasks in kinds.items():
        for task, pool in sorted(tasks.items()):
            chosen += random.Random(f"{seed}/{kind}/{task}").sample(pool, min(limit, len(pool)))
    return chosen


def answer(
    model: MultimodalLlama, questions: Sequence[Q], conditions: Sequence[str], *, batch_size: int
) -> list[Answered[Q]]:
    """Asks every question under every condition, greedily; the order of the questions is kept.

    Raises:
        ValueError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: need at least 1, got {batch_size}")
    tokenizer = model.processor.chat.tokenizer
    predictions: list[dict[str, str]] = [{} for _ in questions]
    with tqdm(total=len(questions) * len(conditions), unit="answer", desc="asking") as bar:
        for group in by_task(questions).values():
            # One task at a time, because its answers are about equally long; in order of length, to pad little.
            max_new_tokens = max(len(tokenizer.encode(questions[i].answer)) for i in group) + SLACK
            group.sort(key=lambda i: len(questions[i].question))
            for start in range(0, len(group), batch_size):
                rows = group[start : start + batch_size]
                for condition in conditions:
                    messages = [questions[i].messages(condition) for i in rows]
                    generations = model.generate(messages=messages, max_new_tokens=max_new_tokens)
                    assert isinstance(generations, list)
                    for i, generation in zip(rows, generations, strict=True):
                        predictions[i][condition] = generation.text
                    bar.update(len(rows))
    return [Answered(*pair) for pair in zip(questions, predictions, strict=True)]


def by_task(questions: Sequence[Question]) -> dict[tuple[str, str], list[int]]:
    """Indices of the questions of each kind and task."""
    groups = defaultdict(list)
    for i, question in enumerate(questions):
        groups[question.kind, question.task].append(i)
    return dict(groups)


def score(
    answered: Sequence[Answered], metrics: Callable[[str], Mapping[str, Metric]] = metrics_of
) -> list[TaskResult]:
    """Every metric of every task under every condition, in the order of the questions.

    Args:
        metrics: of a task, by name.
    """
    results = []
    for (kind, task), group in by_task([a.question for a in answered]).items():
        right = [answered[i].question.answer for i in group]
        for name, metric in metrics(task).items():
            scores = {
                condition: metric([answered[i].predictions[condition] for i in group], right)
                for condition in answered[group[0]].predictions
            }
            results.append(TaskResult(kind=kind, task=task, metric=name, n=len(group), scores=scores))
    return results


def table(results: Sequence[TaskResult], title: str, caption: str = "") -> Table:
    """For people: a row per metric, in 80 columns; the first condition has its interval."""
    metrics = list(dict.fromkeys(result.metric for result in results))
    several = len(metrics) > 1
    caption = f"95% intervals{caption}" if several else f"95% intervals; all scores: {metrics[0]}{caption}"
    view = Table(title=title, caption=caption, box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in ["task", "metric"] if several else ["task"]:
        view.add_column(heading, no_wrap=True)
    for heading in ("n", *(condition.replace("_", " ") for condition in results[0].scores)):
        view.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        first, *controls = r.scores.values()
        name = [r.task, r.metric] if several else [r.task]
        view.add_row(*name, str(r.n), str(first), *(f"{control.value:.1%}" for control in controls))
    return view


def shown(answered: Sequence[Answered[Q]], n: int) -> Iterator[Answered[Q]]:
    """The first `n` of each task, for a contact sheet."""
    for group in by_task([a.question for a in answered]).values():
        yield from (answered[i] for i in group[:n])
