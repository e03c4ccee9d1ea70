"""TN rules: what is said for a written token, given the rule that a tagger, or a person, chose for it (section 8.1.2).

Every TN token has one rule. `JOIN` makes a token part of the item that the tokens before it began; an item is read as a whole
by the rule of its first token:

    rule           reads                     as
    -------------  ------------------------  -----------------------------------------------------
    WORD           Café, don't               cafe, don't
    LETTERS        FBI, a.m.                 F B I, A M            (capitals are names of letters)
    ABBREVIATION   etc., e.g., Mr.           et cetera, for example, mister
    TITLE          Dr, St, Mt                doctor, saint, mount  (before a name)
    STREET         Dr, St, Ave               drive, street, avenue (after a name)
    ROMAN          IV                        four
    REGNAL         VIII                      the eighth
    CARDINAL       1,234                     one thousand two hundred and thirty four
    ORDINAL        3rd                       third
    DIGITS         407                       four zero seven
    DECIMAL        3.14, 2.0.1               three point one four, two point zero point one
    FRACTION       3/4, 1 1/2, ½             three quarters, one and one half, one half
    YEAR           1999, 1990s               nineteen ninety nine, nineteen nineties  (house numbers, too)
    MONTH          3, Mar                    march
    DAY            4, 4th                    fourth
    DAY_OF         4, 4th                    the fourth of         (before the name of a month)
    HOUR           7                         seven
    MINUTE         05, 30, 00                oh five, thirty, o'clock (after noon in 24 hours: hundred)
    CURRENCY       $5.30, 3 €, $2 million    five dollars and thirty cents, three euros, two million dollars
    UNIT           kg, km/h                  kilograms, kilometers per hour (singular after "one")
    TELEPHONE      +1 (555) 123-4567         plus one five five five one two three four five six seven
    URL            www.cats.org, al@x.com    W W W dot cats dot org, al at x dot com
    SYMBOL         &, %, #                   and, percent, number
    TO             -, :, –                   to                    (10-20, 3:2)
    TIMES          x, ×                      by                    (3x4)
    VERBATIM       a_#                       A underscore hash     (character by character)
    PAUSE          , . ? ! : ; ( –           a pause of its kind
    DELETE         spaces, hyphens, quotes   nothing
    JOIN           any                       belongs to the item before it

A rule that does not fit its text (a tagger may err) leaves it to the plain reading: letters as words, digits as numbers. What has
no plain reading either, such as emoji, control characters or words in another script, is dropped, and said to be.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import partial
from typing import Literal

from num2words import num2words

from speech.tn_tokens import Kind, TNToken

#: Tokens of the longest item; also how many may wait for a place to break at.
MAX_ITEM = 64
#: More digits than this are read one by one.
MAX_NUMBER = 15


class Rule(StrEnum):
    """See the table at the top of the file."""

    WORD = auto()
    LETTERS = auto()
    ABBREVIATION = auto()
    TITLE = auto()
    STREET = auto()
    ROMAN = auto()
    REGNAL = auto()
    CARDINAL = auto()
    ORDINAL = auto()
    DIGITS = auto()
    DECIMAL = auto()
    FRACTION = auto()
    YEAR = auto()
    MONTH = auto()
    DAY = auto()
    DAY_OF = auto()
    HOUR = auto()
    MINUTE = auto()
    CURRENCY = auto()
    UNIT = auto()
    TELEPHONE = auto()
    URL = auto()
    SYMBOL = auto()
    TO = auto()
    TIMES = auto()
    VERBATIM = auto()
    PAUSE = auto()
    DELETE = auto()
    JOIN = auto()


_NUMBERS = {
    *(Rule.CARDINAL, Rule.ORDINAL, Rule.DIGITS, Rule.DECIMAL, Rule.FRACTION),
    *(Rule.YEAR, Rule.MONTH, Rule.DAY, Rule.DAY_OF, Rule.HOUR, Rule.MINUTE),
}
#: Rules that a token of each kind may have.
RULES_OF_KIND: dict[Kind, frozenset[Rule]] = {
    kind: frozenset({Rule.JOIN, Rule.DELETE, *rules})
    for kind, rules in {
        Kind.LETTERS: {
            *(Rule.WORD, Rule.LETTERS, Rule.ABBREVIATION, Rule.TITLE, Rule.STREET, Rule.ROMAN, Rule.REGNAL, Rule.MONTH),
            *(Rule.UNIT, Rule.URL, Rule.TIMES, Rule.VERBATIM),
        },
        Kind.DIGITS: {*_NUMBERS, Rule.CURRENCY, Rule.TELEPHONE, Rule.URL, Rule.VERBATIM},
        Kind.SPACE: {Rule.PAUSE},
        Kind.PUNCTUATION: {Rule.SYMBOL, Rule.TO, Rule.VERBATIM, Rule.PAUSE, Rule.TELEPHONE, Rule.UNIT},
        Kind.SYMBOL: {
            *(Rule.SYMBOL, Rule.TO, Rule.TIMES, Rule.VERBATIM, Rule.PAUSE),
            *(Rule.CURRENCY, Rule.TELEPHONE, Rule.FRACTION, Rule.UNIT),
        },
        Kind.OTHER: set[Rule](),
    }.items()
}
#: Items that follow each other with nothing said between them and form one expression.
_FAMILIES = {
    **dict.fromkeys((Rule.MONTH, Rule.DAY, Rule.DAY_OF, Rule.YEAR), "date"),
    **dict.fromkeys((Rule.HOUR, Rule.MINUTE), "time"),
}


@dataclass(frozen=True)
class Spoken:
    """What is said, or not said, for a stretch of the text.

    Attributes:
        kind: "word"; "pause", whose text is one of `, . ? ! : ; -`; or "dropped", whose text nobody can say.
        text: a word in lower case, or the name of a letter as a capital.
        tokens: first and last TN token of the item that it comes from, by their number in the text.
    """

    kind: Literal["word", "pause", "dropped"]
    text: str
    tokens: tuple[int, int]


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(text: str) -> dict[str, str]:
    """`& and|% percent` -> what each stands for."""
    return dict(entry.split(" ", 1) for entry in text.split("|"))  # type: ignore[misc]  # always two


_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_TITLES = _table("dr doctor|st saint|mt mount|ft fort")
_STREETS = _table(
    "dr drive|st street|ave avenue|rd road|blvd boulevard|ln lane|ct court|pl place|sq square|hwy highway"
)
_ABBREVIATIONS = _table(
    "mr mister|mrs missus|ms miz|prof professor|gen general|capt captain|sgt sergeant|lt lieutenant|rev reverend|"
    "gov governor|sen senator|jr junior|sr senior|etc et cetera|eg for example|ie that is|vs versus|no number|"
    "approx approximately|dept department|est established|inc incorporated|co company|corp corporation|ltd limited|"
    "fig figure|vol volume|pp pages|apt apartment|min minutes|max maximum|govt government|"
    "mon monday|tue tuesday|wed wednesday|thu thursday|fri friday|sat saturday|sun sunday"
)
#: Unit -> one of it/many of it.
_UNITS = _table(
    "m meter/meters|km kilometer/kilometers|cm centimeter/centimeters|mm millimeter/millimeters|mi mile/miles|"
    'ft foot/feet|in inch/inches|" inch/inches|yd yard/yards|g gram/grams|kg kilogram/kilograms|mg milligram/milligrams|'
    "lb pound/pounds|lbs pound/pounds|oz ounce/ounces|t ton/tons|l liter/liters|ml milliliter/milliliters|gal gallon/gallons|"
    "s second/seconds|sec second/seconds|ms millisecond/milliseconds|min minute/minutes|h hour/hours|hr hour/hours|"
    "hrs hour/hours|hz hertz/hertz|khz kilohertz/kilohertz|mhz megahertz/megahertz|ghz gigahertz/gigahertz|"
    "kb kilobyte/kilobytes|mb megabyte/megabytes|gb gigabyte/gigabytes|tb terabyte/terabytes|w watt/watts|"
    "kw kilowatt/kilowatts|v volt/volts|mph mile per hour/miles per hour|\u00b0 degree/degrees|"
    "\u00b0c degree celsius/degrees celsius|\u00b0f degree fahrenheit/degrees fahrenheit|"
    "km/h kilometer per hour/kilometers per hour|m/s meter per second/meters per second"
)
#: Currency sign -> one, many, a hundredth, hundredths (none where there are no such coins).
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "", ""),
}
_SCALES = _table("k thousand|m million|mn million|b billion|bn billion")
_SYMBOLS = _table(
    "& and|% percent|+ plus|= equals|@ at|# number|/ slash|- minus|\u2212 minus|\u00d7 times|* times|\u00f7 divided by|"
    "< less than|> greater than|~ about|° degrees|± plus or minus|≈ about|≤ at most|≥ at least|© copyright|™ trademark|"
    "² squared|³ cubed|→ to|§ section|. point"
)
_CHARACTERS = _table(
    ". dot|- dash|_ underscore|/ slash|# hash|@ at|: colon|? question mark|* star|& and|= equals|+ plus|% percent|"
    "! exclamation mark|~ tilde|\\ backslash|$ dollar|, comma|; semicolon|( open bracket|) close bracket|' apostrophe|"
    '" quote|^ caret'
)
#: Mark -> its pause; three kinds of dashes, and line breaks, too.
_PAUSES = {
    **{mark: mark for mark in ",.?!:;-"},
    **dict.fromkeys("\u2013\u2014", "-"),
    **dict.fromkeys("…\n\r", "."),
    **dict.fromkeys("()[]", ","),
}
#: Letters that are no others with an accent, and the apostrophe of typesetters.
_LETTERS = str.maketrans(_table("ß ss|æ ae|Æ Ae|ø o|Ø O|œ oe|Œ Oe|ł l|Ł L|\u2019 '"))
#: Parts of an address that are spelt.
_SPELT = {"www", "http", "https", "ftp", "html", "php", "uk", "us", "tv", "io", "ai"}


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(value: int, to: str = "cardinal") -> list[str]:
    return num2words(value, to=to).replace(",", "").replace("-", " ").split()


def _digits(text: str) -> list[str] | None:
    return [word for digit in text if digit.isdecimal() for word in _number(int(digit))] or None


def _cardinal(text: str) -> list[str] | None:
    if not re.fullmatch(r"\d+|\d{1,3}(,\d{3})+", text):
        return None
    digits = text.replace(",", "")
    return _number(int(digits)) if len(digits) <= MAX_NUMBER else _digits(digits)


def _ordinal(text: str) -> list[str] | None:
    match = re.fullmatch(rf"(\d{{1,{MAX_NUMBER}}})(st|nd|rd|th)?", text.replace(",", ""), re.IGNORECASE)
    return _number(int(match[1]), "ordinal") if match else None


def _decimal(text: str) -> list[str] | None:
    whole, *parts = text.split(".")
    head = _cardinal(whole) if whole else []
    if head is None or not parts or not all(part.isdecimal() for part in parts):
        return None
    read = _digits if len(parts) == 1 else _cardinal  # 2.0.12 is a version
    return [*head, *(word for part in parts for word in ("point", *(read(part) or ())))]


def _parts(numerator: int, denominator: int) -> list[str]:
    names = {2: ("half", "halves"), 4: ("quarter", "quarters")}
    ordinal = " ".join(_number(denominator, "ordinal"))
    one, many = names.get(denominator, (ordinal, ordinal + "s"))
    return [*_number(numerator), *(one if numerator == 1 else many).split()]


def _fraction(text: str) -> list[str] | None:
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")  # ½ becomes 1⁄2
    match = re.fullmatch(r"(?:(\d{1,9})\s+)?(\d{1,9})/(\d{1,9})", text)
    if match is None or int(match[3]) < 2:
        return None
    whole = [*_number(int(match[1])), "and"] if match[1] else []
    return whole + _parts(int(match[2]), int(match[3]))


def _year(text: str) -> list[str] | None:
    match = re.fullmatch(r"(\d{1,4})(?:['\u2019]?(s))?", text)
    if match is None:
        return None
    words = _number(int(match[1]), "year" if len(match[1]) > 2 else "cardinal")
    if match[2]:
        words[-1] = words[-1][:-1] + "ies" if words[-1].endswith("y") else words[-1] + "s"
    return words


def _month(text: str) -> list[str] | None:
    if text.isdecimal():
        return [_MONTHS[int(text) - 1]] if len(text) <= 2 and 1 <= int(text) <= 12 else None
    found = [month for month in _MONTHS if len(text) >= 3 and month.startswith(text.casefold().rstrip("."))]
    return found[:1] or None


def _day(text: str, before: Sequence[str] = (), after: Sequence[str] = ()) -> list[str] | None:
    words = _ordinal(text)
    return [*before, *words, *after] if words else None


def _minute(text: str, previous: str) -> list[str] | None:
    if not text.isdecimal() or len(text) > 2:
        return None
    if int(text):
        return ["oh", *_number(int(text))] if text[0] == "0" else _number(int(text))
    return ["o'clock"] if not previous.isdecimal() or int(previous[:2]) <= 12 else ["hundred"]


def _currency(text: str) -> list[str] | None:
    sign = next((end for end in (text[:1], text[-1:]) if end in _CURRENCIES), None)
    match = re.fullmatch(r"(\d[\d,]*)(?:\.(\d+))?(?:\s?([a-z]+))?", text.strip(f"{sign} ").lower()) if sign else None
    if sign is None or match is None:
        return None
    whole, part, scale = match[1].replace(",", ""), match[2], match[3]
    one, many, cent, cents = _CURRENCIES[sign]
    if scale or (part and (len(part) != 2 or not cent)):
        words = _decimal(f"{whole}.{part}") if part else _cardinal(whole)
        return [*words, *([_SCALES.get(scale, scale)] if scale else []), many] if words else None
    said = [*(_cardinal(whole) or ()), one if int(whole) == 1 else many] if int(whole) or not int(part or 0) else []
    if not part or not int(part):
        return said
    return [*said, *(["and"] if said else []), *_number(int(part)), cent if int(part) == 1 else cents]


def _roman(text: str, before: Sequence[str], to: str) -> list[str] | None:
    if not re.fullmatch(r"(?=.)X{0,3}(IX|IV|V?I{0,3})", text):
        return None
    values = [{"X": 10, "V": 5, "I": 1}[letter] for letter in text]
    number = sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))
    return [*before, *_number(number, to)]


# --- words and marks --------------------------------------------------------------------------------------------------


def _latin(text: str) -> str:
    """Without accents; fancy letters and apostrophes become plain ones."""
    text = unicodedata.normalize("NFKD", text.translate(_LETTERS))
    return "".join(letter for letter in text if unicodedata.category(letter)[0] != "M")


def _word(text: str) -> list[str] | None:
    words = [word.strip("'") for word in re.split(r"[-\s]", _latin(text).lower())]
    return words if all(re.fullmatch(r"[a-z]+('[a-z]+)*", word) for word in words) else None


def _letters(text: str) -> list[str] | None:
    text = _latin(text)
    many = re.fullmatch(r"([A-Z.]{2,})'?s", text)
    letters = re.findall("[A-Z]", (many[1] if many else text).upper())
    return [*letters[:-1], letters[-1] + "'s" * bool(many)] if letters else None


def _named(names: dict[str, str], text: str) -> list[str] | None:
    name = names.get(re.sub(r"[^a-z]", "", text.lower()))
    return name.split() if name else None


def _unit(text: str, previous: str) -> list[str] | None:
    names = _UNITS.get(text.lower().rstrip("."))
    return names.split("/")[previous != "1"].split() if names else None


def _character(character: str) -> str | None:
    if character.isdecimal():
        return _number(int(character))[0]
    latin = _latin(character)
    return latin.upper() if re.fullmatch("[A-Za-z]", latin) else _CHARACTERS.get(character)


def _verbatim(text: str) -> list[str] | None:
    names = [_character(character) for character in text]
    return [word for name in names for word in name.split()] if all(names) else None  # type: ignore[union-attr]


def _url(text: str) -> list[str] | None:
    words: list[str] = []
    for part in re.findall(r"[^\W\d_]+|[\W\d_]", text):
        said = _word(part) if len(part) > 1 and part.lower() not in _SPELT else _verbatim(part)
        if said is None:
            return None
        words += said
    return words


def _telephone(text: str) -> list[str] | None:
    words = [["plus"] if character == "+" else _digits(character) or [] for character in text]
    return [word for some in words for word in some] or None


def _mark(names: dict[str, str], text: str) -> list[str] | None:
    return names[text[0]].split() if text[0] in names else None


#: Text of an item, text of the item before it -> words; None where the rule does not fit.
_READERS: dict[Rule, Callable[[str, str], list[str] | None]] = {
    Rule.MINUTE: _minute,
    Rule.UNIT: _unit,
    **{
        rule: lambda text, previous, read=read: read(text)  # type: ignore[misc]
        for rule, read in {
            Rule.WORD: _word,
            Rule.LETTERS: _letters,
            Rule.ABBREVIATION: partial(_named, _ABBREVIATIONS),
            Rule.TITLE: partial(_named, _TITLES),
            Rule.STREET: partial(_named, _STREETS),
            Rule.ROMAN: partial(_roman, before=(), to="cardinal"),
            Rule.REGNAL: partial(_roman, before=("the",), to="ordinal"),
            Rule.CARDINAL: _cardinal,
            Rule.ORDINAL: _ordinal,
            Rule.DIGITS: _digits,
            Rule.DECIMAL: _decimal,
            Rule.FRACTION: _fraction,
            Rule.YEAR: _year,
            Rule.MONTH: _month,
            Rule.DAY: _day,
            Rule.DAY_OF: partial(_day, before=("the",), after=("of",)),
            Rule.HOUR: _cardinal,
            Rule.CURRENCY: _currency,
            Rule.TELEPHONE: _telephone,
            Rule.URL: _url,
            Rule.SYMBOL: partial(_mark, _SYMBOLS),
            Rule.TO: lambda text: ["to"],
            Rule.TIMES: lambda text: ["by"],
            Rule.VERBATIM: _verbatim,
        }.items()
    },
}
_SILENT = frozenset({Rule.PAUSE, Rule.DELETE})


# --- items ------------------------------------------------------------------------------------------------------------


@dataclass
class _Item:
    """Tokens that are read together; `first` is the number of the first one in the text."""

    rule: Rule
    tokens: list[TNToken]
    first: int

    @property
    def is_space(self) -> bool:
        return self.tokens[0].kind is Kind.SPACE

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def span(self) -> tuple[int, int]:
        return self.first, self.first + len(self.tokens) - 1


class RuleReader:
    """Says tokens by their rules, one after another.

    Words are released where white space ends an item, never inside what has no space in it or what the rules read together, such
    as a number, a date or an address; but no more than `MAX_ITEM` tokens are held. What was released does not change.
    """

    def __init__(self) -> None:
        self._held: list[_Item] = []
        self._n_tokens = 0
        self._previous = ""

    def push(self, token: TNToken, rule: Rule) -> list[Spoken]:
        """Takes the next token with its rule and returns what is now certain."""
        rule = rule if rule in RULES_OF_KIND[token.kind] else _plain_rule(token)
        self._n_tokens += 1
        last = self._held[-1] if self._held else None
        if rule is Rule.JOIN and last and last.rule not in _SILENT and len(last.tokens) < MAX_ITEM:
            last.tokens.append(token)
            return []
        item = _Item(_plain_rule(token) if rule is Rule.JOIN else rule, [token], self._n_tokens - 1)
        released = self._release() if self._breaks_before(item) else []
        self._held.append(item)
        return released + (self._release() if item.is_space and self._family() is None else [])

    def flush(self) -> list[Spoken]:
        """Returns the rest; a new text may follow."""
        released = self._release()
        self._n_tokens, self._previous = 0, ""
        return released

    def _family(self) -> str | None:
        """Of the last held item that is said."""
        return next((_FAMILIES.get(item.rule) for item in reversed(self._held) if item.rule not in _SILENT), None)

    def _breaks_before(self, item: _Item) -> bool:
        if sum(len(held.tokens) for held in self._held) >= MAX_ITEM:
            return True
        is_apart = bool(self._held) and self._held[-1].is_space
        return is_apart and item.rule not in _SILENT and self._family() != _FAMILIES.get(item.rule)

    def _release(self) -> list[Spoken]:
        released = [spoken for item in self._held for spoken in self._read(item)]
        self._held = []
        return released

    def _read(self, item: _Item) -> list[Spoken]:
        if item.rule is Rule.PAUSE and item.text[0] in _PAUSES:
            return [Spoken("pause", _PAUSES[item.text[0]], item.span)]
        if item.rule in _SILENT:
            known = (
                item.tokens[0].kind not in (Kind.SYMBOL, Kind.OTHER) or item.text[0] in _SYMBOLS.keys() | _CHARACTERS
            )
            return [] if known else [Spoken("dropped", item.text, item.span)]
        words = _READERS[item.rule](item.text, self._previous)
        self._previous = item.text
        if words is None:
            return [spoken for i, token in enumerate(item.tokens) for spoken in _plain(token, item.first + i)]
        return [Spoken("word", word, item.span) for word in words]


def _plain_rule(token: TNToken) -> Rule:
    """What a token has where no better rule fits."""
    if token.kind is Kind.DIGITS:
        return Rule.CARDINAL
    if token.kind is Kind.PUNCTUATION:
        return Rule.PAUSE if token.text[0] in _PAUSES else Rule.DELETE
    return Rule.WORD if token.kind is Kind.LETTERS else Rule.DELETE


def _plain(token: TNToken, number: int) -> list[Spoken]:
    """A token read without its rule."""
    words: list[str] | None = None
    if token.kind is Kind.LETTERS:
        words = _word(token.text)
    elif token.kind is Kind.DIGITS:
        words = _cardinal(token.text) or _digits(token.text)
    elif token.kind in (Kind.SPACE, Kind.PUNCTUATION):
        words = []
    span = (number, number)
    return [Spoken("dropped", token.text, span)] if words is None else [Spoken("word", word, span) for word in words]


def speak(tokens: Iterable[TNToken], rules: Iterable[Rule]) -> list[Spoken]:
    """What is said for a whole text."""
    reader = RuleReader()
    return [spoken for pair in zip(tokens, rules, strict=True) for spoken in reader.push(*pair)] + reader.flush()


def words_of(spoken: Iterable[Spoken]) -> str:
    """The words alone, with spaces between them."""
    return " ".join(part.text for part in spoken if part.kind == "word")
