"""Bar and pie charts whose caption is their table."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from PIL import Image, ImageDraw

from data.make.canvas import Colour, Picture, Question, Source, Split, hsv, luma, photograph, plain_font, random_hue

LABELS: Mapping[Split, Sequence[str]] = {
    "train": (
        "apples", "pears", "plums", "figs", "kiwis", "dates", "nuts", "bread", "rice", "beans", "corn", "milk", "tea",
        "cats", "dogs", "birds", "fish", "cows", "sheep", "goats", "ducks", "bees", "frogs", "cars", "buses", "trains",
        "ships", "bikes", "books", "pens", "maps", "toys", "games", "songs", "films", "north", "south", "east", "west",
        "Anna", "Ben", "Carl", "Dora", "Emma", "Finn", "May", "June", "July", "math", "art", "music", "Rome", "Oslo",
    ),
    "heldout": (
        "lemons", "grapes", "soup", "cheese", "horses", "snails", "trucks", "planes", "cards", "poems", "Gina", "Hugo",
        "March", "sport", "juice", "Paris",
    ),
}  # fmt: skip
SIZES = ((256, 192), (256, 256), (320, 240))


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A table; a pie's values are percentages that add up to 100."""

    form: Literal["bar", "pie"]
    table: Mapping[str, int]

    def value(self, label: str) -> str:
        return f"{self.table[label]}%" if self.form == "pie" else str(self.table[label])


class Charts:
    """Held out are labels and the hues of bars and slices."""

    name: ClassVar[str] = "charts"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 6_000, "heldout": 500}
    sources: ClassVar[Sequence[Source]] = ()

    def draw(self, rng: random.Random, split: Split, index: int) -> Picture:
        chart = random_chart(rng, split)
        paint = paint_bars if chart.form == "bar" else paint_pie
        image = photograph(
            rng, paint(chart, rng.choice(SIZES), random_fills(rng, split, len(chart.table))), max_blur=0.4
        )
        caption = "\n".join(f"{label}: {chart.value(label)}" for label in chart.table)
        return Picture(image=image, caption=caption, questions=questions(rng, chart))


def random_chart(rng: random.Random, split: Split) -> Chart:
    """Two to five entries, of which one is the largest and one the smallest."""
    form: Literal["bar", "pie"] = rng.choice(["bar", "pie"])
    labels = rng.sample(LABELS[split], rng.randint(2, 5))
    while True:
        if form == "bar":
            values = [rng.randint(1, 20) for _ in labels]
        else:  # cuts at multiples of 5%, no slice under 10%
            cuts = [0, *sorted(rng.sample(range(10, 95, 5), len(labels) - 1)), 100]
            values = [high - low for low, high in pairwise(cuts)]
        extremes_are_unique = values.count(max(values)) == values.count(min(values)) == 1
        if extremes_are_unique and (form == "bar" or min(values) >= 10):
            return Chart(form=form, table=dict(zip(labels, values, strict=True)))


def random_fills(rng: random.Random, split: Split, count: int) -> list[Colour]:
    return [hsv(random_hue(rng, split), rng.uniform(0.35, 1), rng.uniform(0.4, 1)) for _ in range(count)]


def questions(rng: random.Random, chart: Chart) -> list[Question]:
    """Largest or smallest, how many, and the value of one entry."""
    parts = {"bar": "bars", "pie": "slices"}[chart.form]
    label = rng.choice(list(chart.table))
    which, pick = rng.choice([("largest", max), ("smallest", min)])
    extreme = pick(chart.table, key=lambda name: chart.table[name])
    return [
        Question(task="chart-extreme", question=f"Which is {which}?", answer=extreme),
        Question(task="chart-count", question=f"How many {parts} are there?", answer=str(len(chart.table))),
        Question(task="chart-value", question=f"What is the value of {label}?", answer=chart.value(label)),
    ]


def paint_bars(chart: Chart, size: tuple[int, int], fills: Sequence[Colour]) -> Image.Image:
    """Upright bars on a base line, the value above each and the label below."""
    width, height = size
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    font, margin, base, top = plain_font(13), 6, height - 24, 24
    slot = (width - 2 * margin) / len(chart.table)
    tallest = max(chart.table.values())
    for i, (label, value) in enumerate(chart.table.items()):
        middle = margin + (i + 0.5) * slot
        roof = base - (base - top) * value / tallest
        pen.rectangle((middle - 0.32 * slot, roof, middle + 0.32 * slot, base), fill=fills[i])
        pen.text((middle, roof - 2), chart.value(label), fill="black", font=font, anchor="mb")
        pen.text((middle, base + 4), label, fill="black", font=font, anchor="ma")
    pen.line((margin, base, width - margin, base), fill="black")
    return image


def paint_pie(chart: Chart, size: tuple[int, int], fills: Sequence[Colour]) -> Image.Image:
    """Slices clockwise from the top, the percentage inside each and the label beside it."""
    width, height = size
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    font, radius, x, y = plain_font(13), 0.34 * min(size), width / 2, height / 2
    start = -90.0
    for (label, value), fill in zip(chart.table.items(), fills, strict=True):
        end = start + 3.6 * value
        pen.pieslice((x - radius, y - radius, x + radius, y + radius), start, end, fill=fill, outline="white", width=2)
        across, down = (turn(math.radians((start + end) / 2)) * radius for turn in (math.cos, math.sin))
        ink = "black" if luma(fill) > 128 else "white"
        pen.text((x + 0.65 * across, y + 0.65 * down), chart.value(label), fill=ink, font=font, anchor="mm")
        side = "l" if across > 1e-6 else "r"
        pen.text((x + 1.12 * across, y + 1.12 * down), label, fill="black", font=font, anchor=side + "m")
        start = end
    return image
