"""Values as they are written, with the rule of every token and what is said, for the text normaliser.

What is said comes from the value, never from the text and its rules, so the one checks the other. Rules are those of
`speech.tn_rules`, by name; tokens are cut as `speech.tn_tokens` cuts them.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from num2words import num2words

from data.make.canvas import Split
from data.make.sentences import split_of
from data.make.templates import CITIES, DAYS, FIRST_NAMES, JOBS, MONTHS, PLACES, items, ordinal

SURNAMES = items(
    "Smith Jones Brown Taylor Wilson Evans Walker White Roberts Green Hall Wood Harris Martin Cooper King Lee Moore Clark "
    "Baker Hill Turner Parker Cook Young Allen Wright Scott Adams Nelson Carter Mitchell Perez Campbell Stewart Morris "
    "Rogers Reed Morgan Bell Murphy Bailey Rivera Kelly Cox Howard Ward Torres Peterson Gray Watson Brooks Sanders Price"
)
STREETS = items(
    "Main Oak Maple Elm Park Lake Hill Church Washington Mill River Spring Market Bridge Garden Forest Sunset Station "
    "Union Cedar Pine Walnut Chestnut Harbor Meadow Valley Willow Prospect"
)
SAINTS = items("Peter Paul John Mary Andrew Patrick George Nicholas Francis Anne Helena Louis Moritz Lucia")
RULERS = items("Henry Louis George Edward Charles James William Richard Philip Gregory Elizabeth Catherine Ivan Leo")
SPELT = items("FBI CIA USA UK EU UN BBC CNN IBM DNA PDF HTML CPU GPU USB TV DVD PhD CEO CFO ATM GPS VIP HIV AI PC ID")
SAID = items("NASA NATO UNESCO OPEC RADAR LASER SCUBA UNICEF FIFA")
#: Written alike as a word that is shouted and as letters that are spelt.
BOTH = items("IT US WHO OR PIN AM IS")
UNITS = {
    **{
        "kg": "kilograms",
        "g": "grams",
        "mg": "milligrams",
        "km": "kilometers",
        "cm": "centimeters",
        "mm": "millimeters",
    },
    **{
        "m": "meters",
        "in": "inches",
        "ft": "feet",
        "lb": "pounds",
        "lbs": "pounds",
        "oz": "ounces",
        "ml": "milliliters",
    },
    **{"GB": "gigabytes", "MB": "megabytes", "kHz": "kilohertz", "kW": "kilowatts", "mph": "miles per hour"},
    **{"km/h": "kilometers per hour", "m/s": "meters per second", "min": "minutes", "sec": "seconds", "hrs": "hours"},
    **{"°C": "degrees celsius", "°F": "degrees fahrenheit"},
}
ABBREVIATIONS = {
    **{"Mr": "mister", "Mrs": "missus", "Ms": "miz", "Prof": "professor", "Gen": "general", "Capt": "captain"},
    **{"Sgt": "sergeant", "Rev": "reverend", "Gov": "governor", "Sen": "senator"},
}
COINS = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
SITES = items("example python weather recipes museum library bookshop airport hospital football garden music travel")
ENDINGS = {"com": "com", "org": "org", "net": "net", "co.uk": "co dot U K"}
TENS = items("hundreds tens twenties thirties forties fifties sixties seventies eighties nineties")
EMOJI = items("😀 😂 👍 🎉 ❤ 🚀 🔥 ✨")


class Piece(NamedTuple):
    """A part of a sample: tokens with the names of their rules, and what is said."""

    tokens: tuple[tuple[str, str], ...]
    spoken: str


@dataclass(frozen=True, kw_only=True)
class Material:
    """Words and sentences that a split draws from.

    Attributes:
        nouns: concrete things, animals and people.
        sentences: plain prose that may come before a sample.
    """

    nouns: Sequence[str]
    sentences: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a value is drawn with. Long numbers and all words of the two splits are different ones."""

    rng: random.Random
    split: Split
    material: Material

    def number(self, low: int, high: int) -> int:
        while True:
            number = self.rng.randint(low, high)
            if high < 100 or (zlib.crc32(str(number).encode()) % 10 == 0) == (self.split == "heldout"):
                return number

    def word(self, words: Sequence[str]) -> str:
        """Of a list, the words of this split; of a short one that is all held by the other split, any."""
        return self.rng.choice([word for word in words if split_of(word.lower()) == self.split] or words)


def say(number: int, to: str = "cardinal") -> str:
    """A number in words without hyphens and commas."""
    return num2words(number, to=to).replace(",", "").replace("-", " ")


def say_digits(digits: str) -> str:
    return " ".join(say(int(digit)) for digit in digits if digit.isdecimal())


def token(text: str, rule: str, spoken: str) -> Piece:
    return Piece(((text, rule),), spoken)


def joined(text: str, rule: str, spoken: str) -> Piece:
    """Several tokens that one rule reads."""
    first, *rest = _cut(text)
    return Piece(((first, rule), *((part, "JOIN") for part in rest)), spoken)


def together(*pieces: Piece) -> Piece:
    return Piece(
        tuple(pair for piece in pieces for pair in piece.tokens),
        " ".join(piece.spoken for piece in pieces if piece.spoken),
    )


def silent(text: str, rule: str = "DELETE") -> Piece:
    return token(text, rule, "")


SPACE = silent(" ")


def _cut(text: str) -> list[str]:
    return [match[0] for match in re.finditer(r"[^\W\d_]+|\d+|\s+|(.)\1*", text)]


def plain(text: str) -> Piece:
    """Words and punctuation that are read as they stand.

    Raises:
        ValueError: the text has digits or symbols.
    """
    cut = _cut(text)
    pairs: list[tuple[str, str]] = []
    words: list[str] = []
    for before, part, after in zip(["", *cut], cut, [*cut[1:], ""], strict=False):
        inside = before.isalpha() and after.isalpha()
        if part.isalpha():
            joins = len(pairs) > 1 and pairs[-1][1] == "JOIN"
            pairs.append((part, "JOIN" if joins else "WORD"))
            words[-1 if joins else len(words) :] = [(words[-1] + "'" if joins else "") + part.lower()]
        elif part == "'" and inside:
            pairs.append((part, "JOIN"))
        elif part.isspace() or part in "'\"" or (part == "-" and inside):
            pairs.append((part, "DELETE"))
        elif part[0] in ",.?!:;()-":
            pairs.append((part, "PAUSE"))
        else:
            raise ValueError(f"text {text!r}: {part!r} is neither a word nor punctuation; give it a slot of its own")
    return Piece(tuple(pairs), " ".join(words))


# --- numbers ----------------------------------------------------------------------------------------------------------


def year(d: Draw) -> Piece:
    value = d.number(1700, 2030) if d.rng.random() < 0.8 else d.number(1066, 2099)
    return token(str(value), "YEAR", say(value, "year"))


def decade(d: Draw) -> Piece:
    century, ten = d.rng.choice([17, 18, 19]), d.rng.choice([0, *range(2, 10)])
    return joined(f"{century}{ten}0s", "YEAR", f"{say(century)} {TENS[ten]}")


def house(d: Draw) -> Piece:
    value = d.number(1101, 9899)
    return token(str(value), "YEAR", say(value, "year"))


def count(d: Draw) -> Piece:
    value = d.number(1100, 2099) if d.rng.random() < 0.6 else d.number(13, 9999)
    return token(str(value), "CARDINAL", say(value))


def big(d: Draw) -> Piece:
    value = d.number(1100, d.rng.choice([99_999, 9_999_999]))
    return joined(f"{value:,}", "CARDINAL", say(value))


def small(d: Draw) -> Piece:
    value = d.number(2, 40)
    return token(str(value), "CARDINAL", say(value))


def code(d: Draw) -> Piece:
    low, high = d.rng.choice([(100, 999), (1000, 2099), (1000, 9999), (10_000, 99_999)])
    digits = str(d.number(low, high))
    return token(digits, "DIGITS", say_digits(digits))


def rank(d: Draw) -> Piece:
    value = d.number(1, 31) if d.rng.random() < 0.7 else d.number(32, 400)
    return joined(ordinal(value), "ORDINAL", say(value, "ordinal"))


def decimal(d: Draw) -> Piece:
    whole, part = d.number(0, 99), str(d.number(1, 99))
    return joined(f"{whole}.{part}", "DECIMAL", f"{say(whole)} point {say_digits(part)}")


def version(d: Draw) -> Piece:
    parts = [d.number(0, 20) for _ in range(3)]
    return joined(".".join(map(str, parts)), "DECIMAL", " point ".join(map(say, parts)))


def percent(d: Draw) -> Piece:
    return together(d.rng.choice([small, decimal])(d), token("%", "SYMBOL", "percent"))


def _part(d: Draw, denominators: Sequence[int]) -> tuple[str, str]:
    bottom = d.rng.choice(denominators)
    top = d.rng.randint(1, min(bottom - 1, 9))
    name = {2: "half", 4: "quarter"}.get(bottom, say(bottom, "ordinal"))
    return f"{top}/{bottom}", f"{say(top)} {name if top == 1 else name + 's'}"


def fraction(d: Draw) -> Piece:
    text, spoken = _part(d, [2, 3, 4, 4, 5, 8, 10, 12, 16])
    return joined(text, "FRACTION", spoken)


def mixed(d: Draw) -> Piece:
    whole = d.number(1, 12)
    text, spoken = _part(d, [2, 3, 4, 8])
    return joined(f"{whole} {text}", "FRACTION", f"{say(whole)} and {spoken}")


def span(d: Draw) -> Piece:
    low = d.number(2, 50)
    high = low + d.rng.randint(1, 40)
    dash = token(d.rng.choice("-\u2013"), "TO", "to")
    return together(token(str(low), "CARDINAL", say(low)), dash, token(str(high), "CARDINAL", say(high)))


def years(d: Draw) -> Piece:
    return together(year(d), token(d.rng.choice("-\u2013"), "TO", "to"), year(d))


def score(d: Draw) -> Piece:
    ours, theirs = d.number(0, 9), d.number(0, 9)
    mark = token(d.rng.choice("-:"), "TO", "to")
    return together(token(str(ours), "CARDINAL", say(ours)), mark, token(str(theirs), "CARDINAL", say(theirs)))


def size(d: Draw) -> Piece:
    a, b = d.number(2, 40), d.number(2, 40)
    mark = token(d.rng.choice("x\u00d7"), "TIMES", "by")
    return together(token(str(a), "CARDINAL", say(a)), mark, token(str(b), "CARDINAL", say(b)))


def minus(d: Draw) -> Piece:
    return together(token("-", "SYMBOL", "minus"), small(d))


# --- dates and times --------------------------------------------------------------------------------------------------


def month_day(d: Draw) -> Piece:
    month, day = d.number(1, 12), d.number(1, 28)
    return together(
        token(str(month), "MONTH", MONTHS[month - 1].lower()), silent("/"), token(str(day), "DAY", say(day, "ordinal"))
    )


def full_date(d: Draw) -> Piece:
    return together(month_day(d), silent("/"), year(d))


def iso_date(d: Draw) -> Piece:
    month, day = d.number(1, 12), d.number(1, 28)
    return together(
        *(year(d), silent("-"), token(f"{month:02d}", "MONTH", MONTHS[month - 1].lower())),
        *(silent("-"), token(f"{day:02d}", "DAY", say(day, "ordinal"))),
    )


def long_date(d: Draw) -> Piece:
    name, day = d.rng.choice(MONTHS), d.number(1, 31)
    month = token(name, "WORD", name.lower())
    if d.rng.random() < 0.3 and name != "May":
        month = together(token(name[:3], "MONTH", name.lower()), silent("."))
    said = say(day, "ordinal")
    if d.rng.random() < 0.3:
        date = together(token(str(day), "DAY_OF", f"the {said} of"), SPACE, token(name, "WORD", name.lower()))
        return together(date, SPACE, year(d)) if d.rng.random() < 0.5 else date
    last = token(str(day), "DAY", said) if d.rng.random() < 0.6 else joined(ordinal(day), "DAY", said)
    date = together(month, SPACE, last)
    return together(date, silent(",", "PAUSE"), SPACE, year(d)) if d.rng.random() < 0.5 else date


def clock(d: Draw) -> Piece:
    hour, minute = d.number(1, 12), d.rng.choice([0, 0, 5, 15, 30, 45, d.rng.randint(1, 59)])
    first, colon = token(str(hour), "HOUR", say(hour)), silent(":")
    if d.rng.random() < 0.5:
        half = together(SPACE, joined(*d.rng.choice([("am", "LETTERS", "A M"), ("pm", "LETTERS", "P M")])))
        if d.rng.random() < 0.3:
            return together(first, half)
        if minute == 0:
            return together(first, colon, silent("00"), half)
        return together(first, colon, token(f"{minute:02d}", "MINUTE", _minute(minute)), half)
    if d.rng.random() < 0.3:
        hour = d.number(13, 23)
        first = token(str(hour), "HOUR", say(hour))
    full = "o'clock" if hour <= 12 else "hundred"
    return together(first, colon, token(f"{minute:02d}", "MINUTE", _minute(minute) if minute else full))


def _minute(minute: int) -> str:
    return f"oh {say(minute)}" if minute < 10 else say(minute)


# --- money, measures, addresses ---------------------------------------------------------------------------------------


def money(d: Draw) -> Piece:
    sign, (coin, hundredth) = d.rng.choice(list(COINS.items()))
    whole, choice = d.number(1, 99) if d.rng.random() < 0.5 else d.number(100, 9999), d.rng.random()
    if choice < 0.3:
        part, scale = d.rng.randint(1, 9), d.rng.choice(["million", "billion"])
        return joined(
            f"{sign}{whole % 100}.{part} {scale}", "CURRENCY", f"{say(whole % 100)} point {say(part)} {scale} {coin}s"
        )
    said = f"{say(whole)} {coin}{'s' * (whole != 1)}"
    if choice < 0.6:
        cents = d.rng.randint(2, 99)
        many = "pence" if hundredth == "penny" else hundredth + "s"
        return joined(f"{sign}{whole:,}.{cents:02d}", "CURRENCY", f"{said} and {say(cents)} {many}")
    if choice < 0.7 and sign == "€":
        return joined(f"{whole} €", "CURRENCY", said)
    return joined(f"{sign}{whole:,}", "CURRENCY", said)


def measure(d: Draw) -> Piece:
    unit, name = d.rng.choice(list(UNITS.items()))
    gap = [SPACE] if d.rng.random() < 0.6 or unit == "in" else []
    return together(d.rng.choice([small, small, decimal])(d), *gap, joined(unit, "UNIT", name))


def phone(d: Draw) -> Piece:
    area, first, last = d.number(200, 999), d.number(200, 999), d.number(1000, 9999)
    text = d.rng.choice(
        [f"{first}-{last}", f"({area}) {first}-{last}", f"{area}-{first}-{last}", f"+1 {area} {first} {last}"]
    )
    return joined(text, "TELEPHONE", ("plus " if "+" in text else "") + say_digits(text))


def site(d: Draw) -> Piece:
    name, (ending, said) = d.word(SITES), d.rng.choice(list(ENDINGS.items()))
    start, before = d.rng.choice([("www.", "W W W dot "), ("", ""), ("https://", "H T T P S colon slash slash ")])
    path = d.word(d.material.nouns) if d.rng.random() < 0.4 else None
    text = f"{start}{name}.{ending}" + (f"/{path}" if path else "")
    return joined(text, "URL", f"{before}{name} dot {said}" + (f" slash {path}" if path else ""))


def mail(d: Draw) -> Piece:
    user, name, (ending, said) = d.word(FIRST_NAMES).lower(), d.word(SITES), d.rng.choice(list(ENDINGS.items()))
    return joined(f"{user}@{name}.{ending}", "URL", f"{user} at {name} dot {said}")


def handle(d: Draw) -> Piece:
    """A name with marks in it, which is read character by character."""
    letters = "".join(d.rng.choices("abcdefghjkmnpqrstwxyz", k=2))
    mark, said = d.rng.choice([("_", "underscore"), ("-", "dash"), (".", "dot"), ("#", "hash")])
    digit = d.rng.randint(2, 9)
    return joined(f"{letters}{mark}{digit}", "VERBATIM", f"{' '.join(letters.upper())} {said} {say(digit)}")


# --- words ------------------------------------------------------------------------------------------------------------


def _word(text: str) -> Piece:
    return token(text, "WORD", text.lower())


def spelt(d: Draw) -> Piece:
    text = d.word(SPELT)
    return token(text, "LETTERS", " ".join(text.upper()))


def pronounced(d: Draw) -> Piece:
    return _word(d.word(SAID))


def both(d: Draw) -> Piece:
    text = d.rng.choice(BOTH[:3])
    return token(text, "LETTERS", " ".join(text))


def shouted(d: Draw) -> Piece:
    text = d.rng.choice(BOTH)
    return together(_word(d.word(d.material.nouns).upper()), SPACE, _word(text))


def doctor(d: Draw) -> Piece:
    text, said = d.rng.choice([("Dr", "doctor"), ("Dr", "doctor"), *ABBREVIATIONS.items()])
    rule = "TITLE" if text == "Dr" else "ABBREVIATION"
    return together(token(text, rule, said), *_dot(d), SPACE, _word(d.word(SURNAMES)))


def saint(d: Draw) -> Piece:
    return together(token("St", "TITLE", "saint"), *_dot(d), SPACE, _word(d.word(SAINTS)))


def mount(d: Draw) -> Piece:
    return together(token("Mt", "TITLE", "mount"), *_dot(d), SPACE, _word(d.word(SURNAMES)))


def street(d: Draw) -> Piece:
    """Not at the end of a sentence."""
    return together(_street(d), *_dot(d))


def last_street(d: Draw) -> Piece:
    """With the full stop that ends the sentence, too."""
    return together(_street(d), silent(".", "PAUSE"))


def _street(d: Draw) -> Piece:
    text, said = d.rng.choice([("St", "street"), ("St", "street"), ("Dr", "drive"), ("Dr", "drive"), ("Ave", "avenue")])
    name = _word(d.word(STREETS + SAINTS + SURNAMES))
    return together(name, SPACE, token(text, "STREET", said))


def _dot(d: Draw) -> list[Piece]:
    return [silent(".")] if d.rng.random() < 0.8 else []


def numero(d: Draw) -> Piece:
    return together(token("No", "ABBREVIATION", "number"), silent("."), SPACE, small(d))


def versus(d: Draw) -> Piece:
    return together(token("vs", "ABBREVIATION", "versus"), *_dot(d))


def etc(d: Draw) -> Piece:
    return together(token("etc", "ABBREVIATION", "et cetera"), silent(".", "PAUSE"))


def eg(d: Draw) -> Piece:
    return joined(*d.rng.choice([("e.g.", "ABBREVIATION", "for example"), ("i.e.", "ABBREVIATION", "that is")]))


_ROMAN = items("I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI")


def ruler(d: Draw) -> Piece:
    number = d.rng.randint(2, 16)
    return together(_word(d.word(RULERS)), SPACE, token(_ROMAN[number - 1], "REGNAL", f"the {say(number, 'ordinal')}"))


def roman(d: Draw) -> Piece:
    number = d.rng.randint(2, 16)
    return token(_ROMAN[number - 1], "ROMAN", say(number))


def hashed(d: Draw) -> Piece:
    return together(token("#", "SYMBOL", "number"), small(d))


def tag(d: Draw) -> Piece:
    return together(token("#", "VERBATIM", "hash"), _word(d.word(d.material.nouns)))


def ampersand(d: Draw) -> Piece:
    return token("&", "SYMBOL", "and")


def emoji(d: Draw) -> Piece:
    return silent(d.rng.choice(EMOJI))


def _of(words: Sequence[str]) -> Callable[[Draw], Piece]:
    return lambda d: _word(d.word(words))


def noun(d: Draw) -> Piece:
    return _word(d.word(d.material.nouns))


def nouns(d: Draw) -> Piece:
    text = d.word(d.material.nouns)
    return _word(text[:-1] + "ies" if re.search("[^aeiou]y$", text) else text + ("es" if text[-1] in "sxhz" else "s"))


#: What a template may have in braces.
SLOTS: Mapping[str, Callable[[Draw], Piece]] = {
    **{
        maker.__name__: maker
        for maker in (
            *(
                year,
                decade,
                house,
                count,
                big,
                small,
                code,
                rank,
                decimal,
                version,
                percent,
                fraction,
                mixed,
                span,
                years,
            ),
            *(score, size, minus, month_day, full_date, iso_date, long_date, clock, money, measure, phone, site, mail),
            *(
                handle,
                spelt,
                pronounced,
                both,
                shouted,
                doctor,
                saint,
                mount,
                street,
                last_street,
                numero,
                versus,
                etc,
                eg,
            ),
            *(ruler, roman, hashed, tag, ampersand, emoji, noun, nouns),
        )
    },
    "name": _of(FIRST_NAMES),
    "surname": _of(SURNAMES),
    "city": _of(CITIES),
    "place": _of([place for place in PLACES if " " not in place]),
    "job": _of(JOBS),
    "weekday": _of(DAYS),
    "street_name": _of(STREETS),
}
