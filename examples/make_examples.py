"""Draws the pictures of this folder and their questions, the same bytes on every run with the same fonts.

    python examples/make_examples.py

All are of the held-out split, from a seed that no training or evaluation set uses. The Debian packages that it needs are
those of `mm data make pictures`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from data.make.canvas import Kind, Picture
from data.make.charts import Charts
from data.make.emoji import Emoji
from data.make.shapes import Shapes
from data.make.words import Words

FOLDER = Path(__file__).parent


def draw(kind: Kind, variant: int, index: int = 0) -> Picture:
    """A held-out picture; the variants below were chosen for their looks, not by what a model says of them."""
    return kind.draw(random.Random(f"examples/{kind.name}/{variant}"), "heldout", index)


def main() -> None:
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
        questions += [{"picture": name, "question": q.question, "answer": q.answer} for q in picture.questions]
    (FOLDER / "questions.json").write_text(json.dumps(questions, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
