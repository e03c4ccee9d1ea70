"""Evaluation: metrics against hand-computed values, controls that expose who does not look, and whole runs on tiny shards."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data.images import load_image
from data.shards import write_shard
from lm.generate import generate_text
from lm.sampling import SamplingParams
from mm.checkpoint import debug_model
from mm.eval.asking import SLACK, TaskResult, answer, score, table
from mm.eval.files import heldout_sources
from mm.eval.metrics import (
    Z_95,
    Estimate,
    character_error_rate,
    exact_match,
    mean_token_f1,
    proportion,
    ratio,
    spelling_accuracy,
    token_f1,
)
from mm.eval.pictures import CONDITIONS, choose_questions, derangement, evaluate, main
from mm.generate import Generation
from mm.sheet import GREEN, RED, Shown, contact_sheet

N_GREY, N_BLUE = 11, 7


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (13, 17), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_kind(folder: Path, kind: str, colours: list[tuple[int, int, int]]) -> None:
    """Plain pictures, each of its own brightness, with one question that needs it and one that does not."""

    def sample(i: int, colour: tuple[int, int, int]) -> dict[str, Any]:
        questions = [
            {"task": f"{kind}-level", "question": "How bright is it?", "answer": str(colour[2])},
            {"task": f"{kind}-sky", "question": "Is it the sky?", "answer": "No."},
        ]
        return {
            "__key__": f"{kind}-{i:03d}",
            "png": png(colour),
            "txt": str(colour[2]),
            "json": {"questions": questions},
        }

    write_shard(folder / f"heldout-{kind}-0000.tar", (sample(i, colour) for i, colour in enumerate(colours)))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_kind(tmp_path, "greys", [(i, i, i) for i in range(N_GREY)])
    write_kind(tmp_path, "blues", [(0, 0, 100 + i) for i in range(N_BLUE)])
    return tmp_path


class Photometer:
    """Answers by measuring the pixels; without a picture it guesses 3. Remembers how it was called."""

    def __init__(self) -> None:
        self.processor = debug_model().processor
        self.calls: list[tuple[int, int]] = []

    def generate(self, *, messages: list[Any], max_new_tokens: int) -> list[Generation]:
        self.calls.append((len(messages), max_new_tokens))
        return [Generation(text=self._answer(*conversation), tokens=[], reason="stop") for conversation in messages]

    def _answer(self, turn: dict[str, Any]) -> str:
        *pictures, text = turn["content"]
        if "sky" in text["text"]:
            return " no"
        levels = [np.asarray(load_image(part["image"]))[0, 0, 2] for part in pictures]
        return str(levels[0] if levels else 3)


# --- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "right", "same"),
    [
        (" Top  LEFT.\n", "top left", True),
        ("rock'n'roll!", "Rocknroll", True),
        ("10%", "10", True),
        ("top", "top left", False),
        ("", "3", False),
    ],
)
def test_exact_match_ignores_case_punctuation_and_spaces_alone(prediction: str, right: str, same: bool) -> None:
    assert exact_match(prediction, right) is same


def test_character_error_counts_edits_of_letters_per_letter() -> None:
    # c-a-r -> c-a-t-s: one substitution, one insertion; "housee": one deletion; the third is right however it is written.
    predictions, right = ["c a r", "h o u s e e", "Bee."], ["c a t s", "h o u s e", "b e e"]
    assert character_error_rate(predictions, right).value == pytest.approx(3 / 12)
    assert spelling_accuracy(predictions, right).value == pytest.approx(1 / 3)
    assert character_error_rate(["abcdef"], ["x"]).value == 6  # chatter is not capped


def test_token_f1_counts_repeated_words() -> None:
    assert token_f1("a red red bus", "A red bus and a car.") == pytest.approx(2 * 3 / (4 + 6))
    assert token_f1("", "a bus") == 0
    assert mean_token_f1(["a bus", "car"], ["a bus", "bus"]).value == pytest.approx(0.5)


@pytest.mark.parametrize(("right", "n"), [(8, 10), (1, 37), (131, 300)])
def test_wilson_ends_are_where_the_score_test_rejects(right: int, n: int) -> None:
    estimate = proportion([True] * right + [False] * (n - right))
    assert estimate.value == right / n
    assert estimate.low < estimate.value < estimate.high
    for end in (estimate.low, estimate.high):
        assert abs(estimate.value - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / n))


def test_wilson_is_not_certain_after_all_hits() -> None:
    assert proportion([True] * 20).high == 1 and 0.8 < proportion([True] * 20).low < 0.9


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).random(400)
    estimate = ratio(list(values), [1.0] * len(values))
    half = Z_95 * values.std() / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert [estimate.low, estimate.high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
    assert estimate == ratio(list(values), [1.0] * len(values))


@pytest.mark.parametrize("n", [2, 3, 5, 101])
def test_derangement_moves_everything(n: int) -> None:
    for seed in range(20):
        order = derangement(n, seed)
        assert sorted(order) == list(range(n)) and all(i != other for i, other in enumerate(order))
    assert derangement(n, 3) == derangement(n, 3)


# --- what is asked -------------------------------------------------------------------------------------------------


def test_who_looks_is_right_with_the_right_picture_only(shards: Path) -> None:
    results = {r.task: r for r in evaluate(Photometer(), heldout_sources(shards, "pictures"), batch_size=4)}  # type: ignore[arg-type]
    assert set(results) == {"greys-level", "greys-sky", "blues-level", "blues-sky"}
    assert [results["greys-level"].n, results["blues-level"].n] == [N_GREY, N_BLUE]
    for kind, guess in (("greys", 1 / N_GREY), ("blues", 0)):  # one grey has the brightness 3 that it guesses
        level, sky = results[f"{kind}-level"], results[f"{kind}-sky"]
        assert [estimate.value for estimate in level.scores.values()] == [1, guess, 0]
        assert [estimate.value for estimate in sky.scores.values()] == [1, 1, 1]


def test_pictures_are_shuffled_within_their_kind(shards: Path) -> None:
    questions = choose_questions(heldout_sources(shards, "pictures"), limit=100)
    for kind in ("greys", "blues"):
        mine = [q for q in questions if q.kind == kind]
        pictures = {q.picture for q in mine}
        assert {q.other for q in mine} == pictures and all(q.other != q.picture for q in mine)


def test_choice_is_limited_and_depends_on_the_seed_alone(shards: Path) -> None:
    sources = heldout_sources(shards, "pictures")
    questions = choose_questions(sources, limit=5)
    assert len(questions) == len(set(questions)) == 4 * 5
    assert questions == choose_questions(sources, limit=5)
    assert questions != choose_questions(sources, limit=5, seed=1)


def test_batches_hold_one_task_and_allow_its_longest_answer(shards: Path) -> None:
    model, questions = Photometer(), choose_questions(heldout_sources(shards, "pictures"), limit=100)
    answered = answer(model, questions, CONDITIONS, batch_size=4)  # type: ignore[arg-type]
    assert [a.question for a in answered] == questions
    # The debug tokenizer has a token per byte: blues say "106", "No."; greys "10", "No.". Each batch comes three times.
    batches = [
        (n, longest + SLACK)
        for sizes, longest in [([4, 3], 3), ([4, 3], 3), ([4, 4, 3], 2), ([4, 4, 3], 3)]
        for n in sizes
    ]
    assert model.calls == [batch for batch in batches for _ in CONDITIONS]


def test_words_and_stamps_have_their_own_metrics(tmp_path: Path) -> None:
    for kind in ("words", "stamps"):
        asked = [{"task": kind, "question": "How bright is it?", "answer": "b e e"}]
        samples = (
            {"__key__": f"{i}", "png": png((i, i, i)), "txt": "-", "json": {"questions": asked}} for i in range(3)
        )
        write_shard(tmp_path / f"heldout-{kind}-0000.tar", samples)
    answered = answer(
        Photometer(),  # type: ignore[arg-type]
        choose_questions(heldout_sources(tmp_path, "pictures"), limit=3),
        CONDITIONS,
        batch_size=3,
    )
    results = {(r.task, r.metric): r.scores["picture"].value for r in score(answered)}
    assert results == {
        ("stamps", "exact"): 0, ("stamps", "token F1"): 0, ("words", "CER"): 1, ("words", "exact"): 0,
    }  # fmt: skip


def test_table_fits_a_terminal_of_80_columns() -> None:
    def result(task: str, metric: str) -> TaskResult:
        most = Estimate(0.9876, 0.9765, 1.0)
        return TaskResult(kind="-", task=task, metric=metric, n=2000, scores=dict.fromkeys(CONDITIONS, most))

    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(table([result("chart-extreme", "exact"), result("stamps", "token F1")], "Held-out pictures"))
    assert "98.8% [97.7, 100.0]" in capture.get() and "token F1" in capture.get()
    assert "…" not in capture.get() and max(map(len, capture.get().splitlines())) <= 80


# --- the command ---------------------------------------------------------------------------------------------------


def test_main_writes_the_same_files_every_time(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    debug_model().save_pretrained(tmp_path / "model")
    first = main(tmp_path / "model", shards, tmp_path / "first", limit=3, batch_size=2)
    assert first == main(tmp_path / "model", shards, tmp_path / "second", limit=3, batch_size=2)
    printed = capsys.readouterr().out
    assert all(result.task in printed for result in first)
    for name in ("results.json", "predictions.jsonl", "contact-sheet.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    stored = json.loads((tmp_path / "first" / "results.json").read_text())["results"]
    assert [(r["task"], r["n"], r["picture"]["value"]) for r in stored] == [
        (r.task, 3, r.scores["picture"].value) for r in first
    ]
    lines = [json.loads(line) for line in (tmp_path / "first" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 3 and all(set(line["predictions"]) == set(CONDITIONS) for line in lines)


def test_without_a_picture_the_language_model_answers_alone(shards: Path) -> None:
    """The random model's gates are open, so its answers show whether a picture reached it."""
    model = debug_model()
    questions = [q for q in choose_questions(heldout_sources(shards, "pictures"), limit=2) if "sky" in q.task]
    processor = model.processor
    prompts = [processor.tokenize(q.messages("no_picture"), add_generation_prompt=True).ids for q in questions]
    params = SamplingParams(max_new_tokens=len("No.") + SLACK)
    alone = generate_text(model.lm, processor.chat.tokenizer, prompts, params, processor.chat.stop_ids)
    answered = answer(model, questions, CONDITIONS, batch_size=2)
    assert [a.predictions["no_picture"] for a in answered] == [row.text for row in alone]
    assert all(a.predictions["picture"] != a.predictions["no_picture"] for a in answered)


def test_wrong_arguments_are_named(shards: Path, tmp_path: Path) -> None:
    sources = heldout_sources(shards, "pictures")
    with pytest.raises(ValueError, match="limit"):
        choose_questions(sources, limit=0)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(Photometer(), sources, batch_size=0)  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="mm data make pictures"):
        main("debug", tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        ([{"__key__": "a", "png": png((1, 1, 1)), "txt": "x"}] * 1, "one picture"),
        ([{"__key__": key, "png": png((1, 1, 1)), "txt": "x"} for key in "ab"], "'a' has no questions"),
        (
            [{"__key__": key, "json": {"conversations": [{"from": "human", "value": "hi"}]}} for key in "ab"],
            "'a' has no picture",
        ),
    ],
)
def test_unsuitable_shards_are_named(tmp_path: Path, samples: list[dict[str, Any]], complaint: str) -> None:
    write_shard(tmp_path / "heldout-odd-0000.tar", samples)
    with pytest.raises(ValueError, match=complaint):
        choose_questions(heldout_sources(tmp_path, "pictures"), limit=1)


# --- the contact sheet ---------------------------------------------------------------------------------------------


def test_contact_sheet_shows_right_answers_in_green_and_wrong_ones_in_red(tmp_path: Path) -> None:
    picture = Image.new("RGB", (400, 300), (7, 11, 13))
    cells = [("red", {GREEN}), ("blue", {RED}), ("", {RED})]
    contact_sheet([Shown(picture, "What colour?", "Red.", said) for said, _ in cells], tmp_path / "new" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    for cell, (_, colours) in zip(np.split(sheet, 3, axis=1), cells, strict=True):
        seen = set(map(tuple, cell.reshape(-1, 3).tolist()))
        assert (7, 11, 13) in seen and seen & {GREEN, RED} == colours
    assert picture.size == (400, 300)  # the caller's picture is untouched


def test_contact_sheet_without_predictions_judges_nothing(tmp_path: Path) -> None:
    contact_sheet([Shown(Image.new("RGB", (5, 7)), "What colour?", "Black.")], tmp_path / "sheet.png")
    seen = set(map(tuple, np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3).tolist()))
    assert not seen & {GREEN, RED}


def test_contact_sheet_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows"):
        contact_sheet([], tmp_path / "sheet.png")
