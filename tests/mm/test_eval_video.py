"""Evaluation of clips: who follows what happens is right with the whole clip alone, and controls show what the others do."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data.make.film import encode_mp4
from data.shards import write_shard
from mm.checkpoint import debug_model
from mm.eval.asking import TaskResult, answer, table
from mm.eval.files import heldout_sources
from mm.eval.metrics import Estimate, choice_accuracy
from mm.eval.video import CONDITIONS, choose_questions, evaluate
from mm.generate import Generation
from video.frames import load_frames

N_CLIPS, N_FRAMES = 13, 9
ANSWERS = ("brighter", "darker")


def levels(i: int) -> list[int]:
    """Clip i gets steadily brighter or darker, around the same grey."""
    steps = [118 + 10 * (t - N_FRAMES // 2) for t in range(N_FRAMES)]
    return steps if i % 2 == 0 else steps[::-1]


def write_clips(folder: Path, **extra: Any) -> None:
    def sample(i: int) -> dict[str, Any]:
        clip = encode_mp4([Image.new("RGB", (32, 16), (level,) * 3) for level in levels(i)])
        questions = [
            {"task": "trend", "question": "Does it get brighter or darker?", "answer": ANSWERS[i % 2], **extra},
            {"task": "sky", "question": "Is it the sky?", "answer": "No.", "options": ["Yes.", "No."]},
        ]
        return {"__key__": f"{i:03d}", "mp4": clip, "txt": ANSWERS[i % 2], "json": {"questions": questions}}

    write_shard(folder / "heldout-greys-0000.tar", map(sample, range(N_CLIPS)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, options=["darker", "brighter"])
    return folder


class Watcher:
    """Answers by the brightness of the first and the last frame; what gets neither is darker to it. Remembers the frames."""

    def __init__(self) -> None:
        self.processor = debug_model().processor
        self.seen: list[list[int]] = []

    def generate(self, *, messages: list[Any], max_new_tokens: int) -> list[Generation]:
        return [Generation(text=self._answer(*conversation), tokens=[], reason="stop") for conversation in messages]

    def _answer(self, turn: dict[str, Any]) -> str:
        *clips, text = turn["content"]
        if "sky" in text["text"]:
            return "B" if "options" in text["text"] else "no"
        frames = [np.asarray(frame)[0, 0, 0] for clip in clips for frame in load_frames(clip["video"])]
        self.seen.append([int(level) for level in frames])
        word = "brighter" if frames and frames[-1] > frames[0] else "darker"
        return {"darker": "A.", "brighter": "(b) brighter"}[word] if "options" in text["text"] else f" {word.title()}."


@pytest.mark.parametrize("style", ["open", "short", "choice"])
def test_who_follows_the_clip_is_right_with_the_whole_clip_only(shards: Path, style: Any) -> None:
    watcher = Watcher()
    results = {r.task: r for r in evaluate(watcher, heldout_sources(shards, "clips"), batch_size=4, style=style)}  # type: ignore[arg-type]
    trend, sky = ({c: e.value for c, e in results[task].scores.items()} for task in ("trend", "sky"))
    guess = (N_CLIPS // 2) / N_CLIPS
    assert (trend["clip"], trend["no_clip"], trend["one_frame"], trend["reversed"]) == (1, guess, guess, 0)
    assert 0 < trend["shuffled"] < 1
    assert set(sky.values()) == {1} and results["trend"].n == N_CLIPS


def test_conditions_show_what_they_say(shards: Path) -> None:
    question = next(q for q in choose_questions(heldout_sources(shards, "clips"), limit=1) if q.task == "trend")
    whole = [frame.tobytes() for frame in load_frames(question.clip)]
    assert len(set(whole)) == N_FRAMES

    def shown(condition: str) -> list[bytes]:
        return [frame.tobytes() for part in question.media(condition) for frame in load_frames(part["video"])]

    assert [shown("clip"), shown("no_clip")] == [whole, []]
    assert shown("one_frame") == [whole[N_FRAMES // 2]]
    assert shown("reversed") == whole[::-1]
    assert shown("shuffled") == shown("shuffled") != whole and sorted(shown("shuffled")) == sorted(whole)


def test_questions_are_put_with_the_prompts_of_the_paper(shards: Path) -> None:
    sources = heldout_sources(shards, "clips")
    put = {
        s: {q.task: q for q in choose_questions(sources, limit=1, style=s)}["sky"] for s in ("open", "short", "choice")
    }
    assert {style: (q.question, q.answer) for style, q in put.items()} == {
        "open": ("Is it the sky?", "No."),
        "short": ("Answer the question using a single word or phrase. Is it the sky?", "No."),
        "choice": (
            "Select the correct answer from the following options: Is it the sky? A. Yes. B. No.. "
            "Answer with the correct option letter and nothing else.",
            "B",
        ),
    }


def test_a_choice_is_known_by_its_letter() -> None:
    said = ["B", " b.", "(B)", "B. left", "A or B", "Both", "left", ""]
    assert [choice_accuracy([text], ["B"]).value for text in said] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_the_answers_of_each_condition_are_recorded(shards: Path) -> None:
    questions = choose_questions(heldout_sources(shards, "clips"), limit=3)
    for answered in answer(Watcher(), questions, CONDITIONS, batch_size=2):  # type: ignore[arg-type]
        record = json.loads(json.dumps(answered.record()))
        assert set(record["predictions"]) == set(CONDITIONS) and record["answer"] == answered.question.answer


def test_table_fits_a_terminal_of_80_columns() -> None:
    most = Estimate(0.9876, 0.9765, 1.0)
    rows = [
        TaskResult(kind="-", task=task, metric="exact", n=2000, scores=dict.fromkeys(CONDITIONS, most))
        for task in ("direction", "previous")
    ]
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(table(rows, "Held-out clips"))
    assert (
        "98.8% [97.7, 100.0]" in capture.get() and "one frame" in capture.get() and "all scores: exact" in capture.get()
    )
    assert "…" not in capture.get() and max(map(len, capture.get().splitlines())) <= 80


def test_wrong_arguments_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="style: 'essay' is unknown"):
        choose_questions(heldout_sources(shards, "clips"), limit=1, style="essay")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mm data make clips"):
        heldout_sources(tmp_path, "clips")
    write_clips(tmp_path)
    with pytest.raises(ValueError, match="'000' has no options"):
        choose_questions(heldout_sources(tmp_path, "clips"), limit=1, style="choice")
