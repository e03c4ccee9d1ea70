"""`mm eval video`: what a model answers about held-out clips, and what it says when it sees less of them.

Every question is asked five times: with its clip; without any, which is the language model alone; with the middle frame,
which is what a picture would tell; and with the clip's frames in random or reversed order, which is what a bag of
pictures would tell. A model that follows what happens is right in the first condition only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from data.make.canvas import strip
from data.shards import Sample, Source
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
from mm.eval.metrics import choice_accuracy, metrics_of
from mm.sheet import COLUMNS, Shown, contact_sheet
from video.frames import load_frames

if TYPE_CHECKING:
    from mm.model import MultimodalLlama

CONDITIONS = ("clip", "no_clip", "one_frame", "shuffled", "reversed")
#: How questions are put: as they are, with the paper's prompt for short answers, or with its one for a choice (section 7.7).
Style = Literal["open", "short", "choice"]
SHORT_ANSWER = "Answer the question using a single word or phrase. {question}"
MULTIPLE_CHOICE = (
    "Select the correct answer from the following options: {question}. "
    "Answer with the correct option letter and nothing else."
)


@dataclass(frozen=True, kw_only=True)
class ClipQuestion(Question):
    """A question about a held-out clip, as it is put; of a choice, the answer is a letter.

    Attributes:
        clip: encoded, or its path.
    """

    clip: bytes | Path

    def media(self, condition: str) -> list[dict[str, Any]]:
        if condition == "no_clip":
            return []
        return [{"type": "video", "video": self.clip if condition == "clip" else self._altered(condition)}]

    def _altered(self, condition: str) -> Tensor:
        """`(T, C, H, W)` uint8: one frame of the clip, or all of them in another order, the same at every call."""
        frames = load_frames(self.clip)
        if condition == "one_frame":
            frames = frames[len(frames) // 2 :][:1]
        elif condition == "reversed":
            frames = frames[::-1]
        else:
            assert condition == "shuffled"
            random.Random(self.key).shuffle(frames)
        return stacked(frames)


def stacked(frames: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)


def main(
    model: str | Path,
    shards: str | Path,
    out: str | Path,
    limit: int = 300,
    batch_size: int = 16,
    style: Style = "open",
) -> list[TaskResult]:
    """Evaluates a model, prints the table, and writes `results.json`, `predictions.jsonl` and `contact-sheet.png`.

    Args:
        model: as `MultimodalLlama.from_pretrained`.
        shards: folder of `mm data make clips`.
        out: folder; made if missing.
        limit: questions per task.
        batch_size: questions that are answered together.
        style: how questions are put.

    Raises:
        ValueError: an argument is wrong, the folder has no held-out shards, or the model takes no video.
    """
    from mm.model import MultimodalLlama

    questions = choose_questions(heldout_sources(shards, "clips"), limit=limit, style=style)
    answered = answer(MultimodalLlama.from_pretrained(model), questions, CONDITIONS, batch_size=batch_size)
    results = _score(answered, style)
    out = write_report(
        out,
        model=model,
        limit=limit,
        results=(result.record() for result in results),
        predictions=(a.record() for a in answered),
    )
    _draw(answered, out / "contact-sheet.png")
    Console().print(table(results, "Held-out clips"))
    return results


def evaluate(
    model: MultimodalLlama,
    sources: Sequence[Source],
    *,
    limit: int = 300,
    batch_size: int = 16,
    style: Style = "open",
    seed: int = 0,
) -> list[TaskResult]:
    """Scores of a model on held-out samples, whose JSON has `questions` with `task`, `question`, `answer`, and `options`
    for a choice.

    Args:
        sources: one per kind of clip.
        limit: questions per task; the choice depends on nothing but `seed`.
        batch_size: questions that are answered together; an answer does not depend on it.
        style: how questions are put.

    Raises:
        ValueError: an argument is wrong, or a sample has no questions, no options or no clip.
    """
    questions = choose_questions(sources, limit=limit, style=style, seed=seed)
    return _score(answer(model, questions, CONDITIONS, batch_size=batch_size), style)


def choose_questions(
    sources: Sequence[Source], *, limit: int, style: Style = "open", seed: int = 0
) -> list[ClipQuestion]:
    """Up to `limit` questions of each task, put in a style."""
    if style not in get_args(Style):
        raise ValueError(f"style: {style!r} is unknown; choose one of {', '.join(get_args(Style))}")
    return draw_questions((q for source in sources for q in _read_questions(source, style)), limit=limit, seed=seed)


def _read_questions(source: Source, style: Style) -> Iterator[ClipQuestion]:
    for sample, clip in read_samples(source, "video", "clip"):
        for asked in sample.metadata["questions"]:
            question, right = _put(asked, style, sample)
            yield ClipQuestion(
                key=sample.key, kind=source.name, task=asked["task"], question=question, answer=right, clip=clip
            )


def _put(asked: dict[str, Any], style: Style, sample: Sample) -> tuple[str, str]:
    """A question as it is put, and its right answer."""
    if style == "open":
        return asked["question"], asked["answer"]
    if style == "short":
        return SHORT_ANSWER.format(question=asked["question"]), asked["answer"]
    options = asked.get("options", [])
    if asked["answer"] not in options:
        raise ValueError(
            f"source {sample.source!r}: a question of sample {sample.key!r} has no options with its answer among them; "
            "add them to the JSON, or ask in another style"
        )
    letters = [chr(ord("A") + i) for i in range(len(options))]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    return MULTIPLE_CHOICE.format(question=f"{asked['question']} {listed}"), letters[options.index(asked["answer"])]


def _score(answered: Sequence[Answered[ClipQuestion]], style: Style) -> list[TaskResult]:
    return score(answered, metrics_of if style != "choice" else lambda task: {"letter": choice_accuracy})


def _draw(answered: Sequence[Answered[ClipQuestion]], path: Path) -> None:
    """A line of clips per task."""
    cells = [
        Shown(strip(load_frames(a.question.clip)), a.question.question, a.question.answer, a.predictions["clip"])
        for a in shown(answered, COLUMNS)
    ]
    contact_sheet(cells, path)
