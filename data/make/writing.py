"""`mm data make writing`: sentences as they are written, with the rule of every token and what is said, some held out.

The same characters are read differently by what is said around them: 1999 is a year, a number of sheep or a code; 3/4 a date
or a share; "St." a saint or a street. So every kind has templates of its own, and one in five of them is never trained on;
neither are one in ten words and long numbers.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from data.make import sentences
from data.make.canvas import Split
from data.make.written import SLOTS, SPACE, Draw, Material, Piece, plain, together

N_SAMPLES: Mapping[Split, int] = {"train": 60_000, "heldout": 2_000}
#: Every fifth template is held out.
HELDOUT_TEMPLATE = 5
#: Share of the samples that begin with a sentence of prose.
PROSE = 0.3

#: Kind -> templates, one a line. The slots are those of `data.make.written.SLOTS`.
TEMPLATES: Mapping[str, Sequence[str]] = {
    kind: tuple(line.strip() for line in lines.strip().splitlines())
    for kind, lines in {
        "year": """
            In {year} the {noun} was invented in {city}.
            {name} was born in {year}.
            The war ended in {year}, and {name} went home to {place}.
            Nobody in {city} had a {noun} before {year}.
            {name} has lived in {place} since {year}.
            The {year} election was close.
            It was the summer of {year}.
            {name} lived in {city} from {years}.
            The company was founded in {year} by a {job}.
            Back in {year}, everyone wanted a {noun}.
            By {year} the {nouns} were gone.
            The law of {year} forbids it.
            {place} became independent in {year}.
            The {noun} was built between {year} and {year}.
            My favourite record is from {year}.
            In late {year}, {name} became a {job}.
            {name} graduated in {year} and moved to {city}.
            The history of the {noun} begins in {year}.
            Music of the {decade} was better.
            In the {decade}, {nouns} were cheap.
        """,
        "count": """
            There were {count} {nouns} in the hall.
            The {noun} has {count} parts.
            {name} sold {count} {nouns} last week.
            We counted {count} birds and {small} {nouns}.
            The tower is {count} steps high.
            They sent {count} soldiers to {place}.
            About {count} people saw the {noun}.
            {name} ran {count} meters.
            The library owns {count} books about the {noun}.
            In the box were {count} buttons.
            The flood destroyed {count} houses in {city}.
            He has written {count} pages so far.
            A {noun} can weigh {count} pounds.
            She paid for {count} tickets.
            The factory makes {count} {nouns} a day.
            {city} has {big} inhabitants.
            More than {big} {nouns} were sold.
            The total is {big}.
            We need {small} {nouns} and {small} chairs.
            {name} is {small} years old.
        """,
        "code": """
            The code is {code}.
            Please dial {code} for the {job}.
            My PIN is {code}.
            Enter {code} and press start.
            The last digits of the card are {code}.
            Call extension {code} and ask for {name}.
            The password for the {noun} is {code}.
            The zip code of that town is {code}.
            Flight {code} to {city} is late.
            Take bus {code} to the station.
            Your ticket number is {code}.
            The area code for {city} is {code}.
            To open the door, type {code}.
            The combination of the safe is {code}.
            Room {code} is next to the stairs.
        """,
        "address": """
            {name} lives at {house} {street_name} Street.
            The {noun} shop is at {house} {street} in {city}.
            Send the {noun} to {house} {street_name} Avenue.
            Deliver it to {house} {last_street}
            Our office moved to {house} {street_name} Road.
            The {job} lives on {last_street}
            Turn left on {street} and stop at the {noun}.
            The shop on {street} sells {nouns}.
            There is a new {noun} at the corner of {last_street}
            Go down {street} to the {noun}.
            The parade starts on {street} at noon.
            He parked on {last_street}
        """,
        "title": """
            {doctor} is here.
            I spoke with {doctor} about the {noun}.
            Is {doctor} a {job}?
            {doctor} and {doctor} went to {city}.
            Ask {doctor} to call me.
            The letter to {doctor} was never sent.
            Yesterday {doctor} bought a {noun}.
            They prayed to {saint} for rain.
            The church of {saint} is old.
            {saint} was born in {city}.
            On the feast of {saint} we eat fish.
            We climbed {mount} in spring.
            {mount} is covered with snow.
            The statue shows {saint} with a {noun}.
            According to {doctor}, it is nothing serious.
        """,
        "fraction": """
            Add {fraction} of a cup of sugar.
            {name} ate {fraction} of the cake.
            Only {fraction} of the {nouns} were sold.
            The recipe needs {fraction} cup of milk.
            Cut {fraction} of an inch off the {noun}.
            About {fraction} of all people own a {noun}.
            Fill {fraction} of the glass.
            The tank is {fraction} full.
            Use {mixed} cups of flour.
            The board is {mixed} inches thick.
            We waited {mixed} hours for the {job}.
            She finished {fraction} of the work.
            Nearly {fraction} of the vote went to {name}.
            Take {mixed} spoons of honey.
        """,
        "date": """
            We meet on {month_day}.
            The {noun} arrives on {month_day} at noon.
            The rent is due {month_day}.
            {name} was born on {full_date}.
            The meeting of {month_day} was cancelled.
            From {month_day} to {month_day} the shop is closed.
            The bill is dated {full_date}.
            See you on {weekday}, {month_day}.
            On {iso_date} the {noun} broke.
            The file was saved on {iso_date}.
            The party is on {long_date}.
            {name} arrived in {city} on {long_date} with a {noun}.
            The store opens {long_date}.
            On {weekday}, {long_date}, we leave for {place}.
            The deadline is {long_date}.
            It snowed on {long_date}.
            Her flight leaves {month_day} in the morning.
            The contract ends on {full_date}.
            They married on {month_day}.
            Please answer by {long_date}.
        """,
        "time": """
            The train leaves at {clock}.
            It is {clock} in {city}.
            Wake me at {clock}.
            We open at {clock} and close at {clock}.
            The show starts at {clock} on {weekday}.
            {name} called at {clock} about the {noun}.
            The bus comes at {clock}, not at {clock}.
            Dinner is at {clock}.
            By {clock} everyone was asleep.
            The {job} comes between {clock} and {clock}.
        """,
        "score": """
            {city} won {score}.
            The game ended {score}.
            We lost {score} against {place}.
            {name} beat the {job} {score}.
            At half time it was {score}.
            The final score was {score}.
            {place} leads {score} after an hour.
            Our team is behind {score}.
        """,
        "range": """
            Read pages {span} for {weekday}.
            It takes {span} minutes to boil.
            Children aged {span} are welcome.
            You will need {span} {nouns}.
            The trip takes {span} hours.
            Chapters {span} are about the {noun}.
            Between meals wait {span} minutes.
            The years {years} were hard.
        """,
        "minus": """
            It was {minus} degrees in {city}.
            The temperature fell to {minus} last night.
            The answer is {minus}, not {small}.
            At {minus} degrees the {noun} freezes.
            The balance of the account is {minus}.
            The lowest value was {minus}.
        """,
        "money": """
            The {noun} costs {money}.
            {name} paid {money} for it.
            They want {money} for the {noun}.
            The company earned {money} last year.
            I owe you {money}, {name}.
            A ticket is {money} or {money}.
            The house was sold for {money} in {year}.
            It is worth {money}.
            The {job} asked for {money} a day.
            The fine is {money}.
        """,
        "measure": """
            The {noun} weighs {measure}.
            The rope is {measure} long.
            Add {measure} of water.
            {name} walked {measure} to the {noun}.
            It is {measure} wide and {measure} high.
            The wind reached {measure}.
            The {noun} needs {measure} of space.
            At {measure} it melts.
            They drove {measure} without a stop.
            The table measures {measure} by {measure}.
            A room of {size} meters is enough.
            The picture is {size} inches.
            We put the {noun} {small} in the box.
            He had {small} in his hand and {small} in the bag.
        """,
        "percent": """
            About {percent} of the {nouns} are new.
            Prices rose by {percent} in {year}.
            {percent} of all people like {nouns}.
            The bank pays {percent}.
            Only {percent} voted for {name}.
            Sales fell {percent} in {place}.
        """,
        "decimal": """
            The average is {decimal}.
            The value of the {noun} is {decimal}.
            She got {decimal} points.
            Install version {version} first.
            Release {version} fixes the {noun}.
            Multiply {decimal} by {small}.
            The index rose to {decimal} on {weekday}.
            Version {decimal} is out.
        """,
        "rank": """
            This is the {rank} {noun}.
            {name} came in {rank}.
            It was her {rank} birthday.
            The {rank} time was the best.
            He lives on the {rank} floor.
            On the {rank} day it rained in {city}.
            The {rank} chapter is about a {noun}.
        """,
        "phone": """
            Call me at {phone}.
            My number is {phone}.
            For help, dial {phone}.
            {name} can be reached at {phone} after {clock}.
            Text {phone} to order a {noun}.
            The phone number of the {job} is {phone}.
        """,
        "web": """
            Visit {site} for more.
            The {noun} is on {site} now.
            Write to {mail} today.
            Send the {noun} to {mail}, please.
            You can read it at {site}.
            Her address is {mail}.
            Go to {site} and click on {noun}.
            I found a {noun} on {site}, {name}.
            Questions go to {mail}.
        """,
        "letters": """
            The {spelt} called {name}.
            He works for the {spelt} in {city}.
            A new {spelt} costs {money}.
            The {spelt} and the {spelt} disagree.
            {pronounced} sent a {noun} to the moon.
            {name} joined {pronounced} in {year}.
            The head of {pronounced} met the {spelt}.
            The {both} department fixed the {noun}.
            {name} works in {both} now.
            Officials of the {both} met in {city}.
            The {both} is sending a {job} to {place}.
            LOOK AT {shouted} HERE!
            STOP THE {shouted} GOING AWAY?
            WE WANT THE {shouted} NOT!
            GIVE THE {shouted} BACK!
            WHERE IS THE {shouted} GOING?
            Our {both} expert lost a {noun}.
            What is a {spelt}?
        """,
        "abbreviation": """
            Take bus {numero} to the {noun}.
            {numero} on the list is a {noun}.
            No. That is my {noun}.
            Are you sure? No. I am not.
            The match was {city} {versus} {city}.
            It is {name} {versus} the {job}.
            They sell {nouns}, {nouns}, {etc}
            Bring pens, paper, {etc}
            Some animals, {eg} {nouns}, sleep all winter.
            We need tools, {eg} a {noun}.
            He said no. She said yes.
            See {numero} for the {noun}.
        """,
        "roman": """
            {ruler} had a {noun}.
            The castle of {ruler} stands in {place}.
            King {ruler} was a cruel man.
            Under {ruler} the people were poor.
            World War {roman} began.
            Chapter {roman} is about a {noun}.
            Read part {roman} again.
            {name} watched the film Night {roman}.
            After {ruler} died, the war went on.
            In act {roman} the {job} dies.
            I think I know {name}.
            Section {roman} covers {nouns}.
        """,
        "symbol": """
            {hashed} on the list is a {noun}.
            We are {hashed} in {place}.
            Everyone posts {tag} today.
            The trend is {tag} again.
            {surname} {ampersand} {surname} sell {nouns}.
            Fish {ampersand} chips, please.
            My name there is {handle}.
            Type {handle} into the box.
            Log in as {handle}.
            Well done {emoji}
            I love the {noun} {emoji} {emoji}
            {emoji} See you on {weekday}!
        """,
        "question": """
            When was the {noun} invented? In {year}.
            How many {nouns} are there? About {count}.
            What is the code of the safe? It is {code}.
            When is the party? It is on {month_day}.
            What year was that? It was {year}.
            How much of the cake is left? It is {fraction}.
            How many people came? It was {count}.
            What is your PIN? It is {code}.
            When do we meet? On {month_day}.
            In which year did {name} die? It was {year}.
            How many {nouns} did you sell? {count}.
            Which number should I dial? {code}.
            What share did {name} get? {fraction}.
            What date is on the letter? {month_day}.
            When did {place} become free? {year}.
        """,
        "ahead": """
            {year} was a good year for {nouns}.
            {count} is the number of {nouns} that were sold.
            {code} is the code of the {noun}.
            {month_day} is the day of the party.
            {year} is when the war began.
            {fraction} is what {name} ate of the cake.
            {count} is how many {nouns} we need.
            {code} is what you have to dial.
            {month_day} is when {name} was born.
            {code} was the PIN of my card.
        """,
        "words": """
            {name} said: "I don't know the {noun}."
            The {job}'s {noun} is well-known (even in {city}).
            May I see the {noun}? You may.
            They march in March, and I am late.
            The sun sat low; he came in, sat down and was in the way.
            In {city}, a {job} saw {name}'s {noun}.
            It is in the {noun}, isn't it?
            Us and them: who is it?
        """,
    }.items()
}
_SLOT = re.compile(r"{(\w+)}")
_PLAIN = re.compile(r"[A-Z][a-z]*(?:'[a-z]+)?(?:[,;]? [A-Za-z]+(?:'[a-z]+)?)*[.?!]")


def is_heldout(template: int) -> bool:
    """Whether a template, by its number, is for the held-out split."""
    return template % HELDOUT_TEMPLATE == HELDOUT_TEMPLATE - 1


def fill(template: str, draw: Draw) -> Piece:
    """A template with values in its slots."""
    parts = _SLOT.split(template)
    return together(*(SLOTS[part](draw) if i % 2 else plain(part) for i, part in enumerate(parts)))


def sample(rng: random.Random, split: Split, material: Material) -> tuple[str, Piece]:
    """A kind and a sample of it, as likely from one kind as from another in proportion to its templates."""
    kinds = list(TEMPLATES)
    kind = rng.choices(kinds, [len(TEMPLATES[kind]) for kind in kinds])[0]
    heldout = split == "heldout"
    template = rng.choice([t for i, t in enumerate(TEMPLATES[kind]) if is_heldout(i) == heldout])
    piece = fill(template, Draw(rng=rng, split=split, material=material))
    if rng.random() < PROSE:
        piece = together(plain(rng.choice(material.sentences)), SPACE, piece)
    return kind, piece


def samples(seed: int, split: Split, n: int, material: Material) -> Iterator[dict[str, Any]]:
    """`n` samples, no two alike, as LLaVA records with the rules beside the turns."""
    rng, seen = random.Random(f"{seed}/{split}"), set[str]()
    while len(seen) < n:
        kind, piece = sample(rng, split, material)
        written = "".join(text for text, _ in piece.tokens)
        if written in seen:
            continue
        turns = [{"from": "human", "value": written}, {"from": "gpt", "value": piece.spoken}]
        yield {
            "id": f"{split}-{len(seen):06d}",
            "kind": kind,
            "written": written,
            "rules": [rule for _, rule in piece.tokens],
            "spoken": piece.spoken,
            "conversations": turns,
        }
        seen.add(written)


def read_material(split: Split) -> Material:
    """Nouns of WordNet, and sentences without digits that are sure to be read as they stand.

    Raises:
        ValueError: packages are missing.
    """
    texts = (text for pool in sentences.read_pools(split).values() for text in pool.sentences)
    return Material(
        nouns=[noun for noun in sentences.common_nouns() if sentences.split_of(noun) == split],
        sentences=[text for text in texts if _PLAIN.fullmatch(text)],
    )


def make_writing(out: str | Path, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Writes `train-writing.jsonl`, `heldout-writing.jsonl` and `manifest.json`.

    Args:
        out: folder; made if missing.
        scale: factor on the number of samples.

    Returns:
        The manifest: seed, scale, samples of each split, and sources with licences.

    Raises:
        ValueError: an argument is wrong, or a package is missing.
    """
    if scale <= 0:
        raise ValueError(f"scale: need more than 0, got {scale}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in get_args(Split):
        material, n = read_material(split), max(1, round(N_SAMPLES[split] * scale))
        records = tqdm(samples(seed, split, n, material), total=n, unit="sample", desc=split)
        _write(out / f"{split}-writing.jsonl", (json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        counts[split] = n
    manifest = {"seed": seed, "scale": scale, "samples": counts, "sources": [asdict(s) for s in sentences.SOURCES]}
    _write(out / "manifest.json", [json.dumps(manifest, indent=2) + "\n"])
    return manifest


def _write(path: Path, lines: Iterator[str] | Sequence[str]) -> None:
    """A reader sees the whole file or none, also after a crash."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(unfinished, path)
