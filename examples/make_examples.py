"""Makes the pictures, clips and recordings of this folder and their questions, the same bytes on every run with the same packages.

    python examples/make_examples.py

All are of the held-out split, from a seed that no training or evaluation set uses. What it needs is what
`mm data make pictures`, `mm data make clips` and `mm data make speech` need; an error names what is missing.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from data.audio import encode_flac
from data.make import acoustics, sentences, templates, voices
from data.make.canvas import Drawn, Kind
from data.make.charts import Charts
from data.make.emoji import Emoji
from data.make.events import Changes, Order
from data.make.motions import Motions
from data.make.shapes import Shapes
from data.make.words import Words
from mm.languages import asr_prompt

FOLDER = Path(__file__).parent


def draw(kind: Kind, variant: int, index: int = 0) -> Drawn:
    """A held-out picture or clip; the variants below were chosen for their looks, not by what a model says of them."""
    return kind.draw(random.Random(f"examples/{kind.name}/{variant}"), "heldout", index)


def write_pictures() -> list[dict[str, str]]:
    """Draws the pictures; returns their questions."""
    emoji = Emoji()
    index_of = {name: index for index, (_, name) in enumerate(emoji.names)}
    pictures = {
        "elephant.png": draw(emoji, 3, index_of["elephant"]),
        "guitar.png": draw(emoji, 0, index_of["guitar"]),
        "shapes.png": draw(Shapes(), 1),
        "two-shapes.png": draw(Shapes(), 9),
        "word.png": draw(Words(), 5),
        "chart.png": draw(Charts(), 11),
    }
    questions = []
    for name, picture in pictures.items():
        picture.image.save(FOLDER / name)
        questions += [{"image": name, "question": q.question, "answer": q.answer} for q in picture.questions]
    return questions


def write_clips() -> list[dict[str, str]]:
    """Draws the clips; returns their questions."""
    clips = {"motion.mp4": draw(Motions(), 8), "order.mp4": draw(Order(), 0), "change.mp4": draw(Changes(), 0)}
    questions = []
    for name, clip in clips.items():
        _, content = clip.encode(random.Random(f"examples/{name}"))
        (FOLDER / name).write_bytes(content)
        questions += [{"video": name, "question": q.question, "answer": q.answer} for q in clip.questions]
    return questions


def say(name: str, text: str, voice: voices.Voice) -> None:
    """Has a sentence spoken into a file, between two short silences."""
    words = sentences.spoken(text)
    assert words is not None
    said, rate = voice.say(words)
    torch.manual_seed(0)  # the length of the silences is drawn
    waveform = acoustics.add_silence(acoustics.vocal_tract(torch.from_numpy(said), rate, 1.0))
    (FOLDER / name).write_bytes(encode_flac(acoustics.to_peak(waveform, -3)))


def write_recordings() -> list[dict[str, str]]:
    """Has a sentence to write down and a question to answer spoken; returns what is asked about them."""
    (sentence,) = sentences.draw_sentences(random.Random("examples/sentence/5"), sentences.read_pools("heldout"), 1)
    question = "What is the capital of Poland?"
    assert question in sentences.question_pools("heldout")["closed"].sentences
    say("sentence.flac", sentence, voices.SLT)
    say("question.flac", question, voices.AWB)
    transcript = sentences.transcript(sentences.spoken(sentence) or "")
    return [
        {"audio": "sentence.flac", "question": asr_prompt("English"), "answer": transcript},
        {"audio": "question.flac", "question": "", "answer": templates.closed_questions()[question]},
    ]


def main() -> None:
    questions = [*write_pictures(), *write_clips(), *write_recordings()]
    (FOLDER / "questions.json").write_text(json.dumps(questions, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
