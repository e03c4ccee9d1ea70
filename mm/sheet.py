"""Contact sheets: pictures with the question, the right answer and what the model said, green where it is right.

Recordings are drawn as spectrograms, clips as some of their frames.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from data.make.canvas import plain_font
from mm.eval.metrics import exact_match

CELL, MARGIN, LINE, COLUMNS = 200, 8, 16, 6
#: Characters of a line, and lines of each of the three texts, in a cell.
CHARACTERS, LINES = 28, 2
HEIGHT = CELL + (3 * LINES + 1) * LINE
#: A spectrogram's size, and the range of normalised log-mel values that its colours span.
MEL_SIZE, MEL_RANGE = (CELL - 2 * MARGIN, 112), (-2.0, 3.0)
GREEN, RED, GREY, BLACK = (20, 130, 50), (190, 30, 30), (110, 110, 110), (0, 0, 0)


@dataclass(frozen=True)
class Shown:
    """A picture, what was asked about it, what is right, and what the model said (None where no model was asked)."""

    picture: Image.Image
    question: str
    answer: str
    prediction: str | None = None

    @property
    def is_right(self) -> bool:
        return self.prediction is not None and exact_match(self.prediction, self.answer)


def contact_sheet(rows: Sequence[Shown], path: str | Path) -> None:
    """Writes a PNG with one cell per entry; makes the folder where it is missing.

    Raises:
        ValueError: there is nothing to show.
    """
    if not rows:
        raise ValueError("rows: a contact sheet needs at least one picture")
    columns = min(COLUMNS, len(rows))
    sheet = Image.new("RGB", (columns * CELL, math.ceil(len(rows) / columns) * HEIGHT), "white")
    for i, shown in enumerate(rows):
        sheet.paste(_cell(shown), (i % columns * CELL, i // columns * HEIGHT))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def mel_picture(mel_TM: Tensor, hidden_T: Tensor | None = None) -> Image.Image:
    """Draws normalised log-mel frames, low notes at the bottom; frames that were hidden from the model are pale."""
    from matplotlib import colormaps  # slow to import

    low, high = MEL_RANGE
    level_MT = ((mel_TM.float() - low) / (high - low)).clamp(0, 1).T.flip(0).numpy()
    colours_MTC = colormaps["magma"](level_MT)[..., :3]
    if hidden_T is not None:
        colours_MTC[:, hidden_T.numpy()] = 0.2 * colours_MTC[:, hidden_T.numpy()] + 0.8
    return Image.fromarray((255 * colours_MTC).astype("uint8")).resize(MEL_SIZE)


def _cell(shown: Shown) -> Image.Image:
    """One entry, on a canvas of its own, so that wide letters do not run into the next one."""
    cell = Image.new("RGB", (CELL, HEIGHT), "white")
    picture = shown.picture.convert("RGB")  # a copy, which may be shrunk
    picture.thumbnail((CELL - 2 * MARGIN, CELL - 2 * MARGIN))
    cell.paste(picture, (MARGIN, MARGIN))
    pen, top = ImageDraw.Draw(cell), CELL
    texts = [(shown.question, GREY), (shown.answer, BLACK)]
    if shown.prediction is not None:
        texts.append((shown.prediction, GREEN if shown.is_right else RED))
    for text, colour in texts:
        # A model may answer with control characters, which no font can lay out.
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        for line in textwrap.wrap(text, CHARACTERS)[:LINES] or ["(nothing)"]:
            pen.text((MARGIN, top), line, fill=colour, font=plain_font(12))
            top += LINE
    return cell
