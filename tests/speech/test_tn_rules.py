"""TN rules: against num2words, what does not fit, and when words are released."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from num2words import num2words

from speech.tn_rules import MAX_ITEM, RULES_OF_KIND, Rule, RuleReader, Spoken, speak, words_of
from speech.tn_tokens import Kind, split


def read(text: str, first: Rule) -> str:
    """All of a text as one item."""
    tokens = split(text)
    return words_of(speak(tokens, [first, *[Rule.JOIN] * (len(tokens) - 1)]))


def oracle(value: float, to: str) -> str:
    return num2words(value, to=to).replace(",", "").replace("-", " ")


def test_numbers_are_num2words() -> None:
    rng = random.Random(0)
    numbers = [*range(130), *(rng.randrange(10 ** rng.randint(3, 14)) for _ in range(100))]
    for n in numbers:
        assert read(str(n), Rule.CARDINAL) == read(f"{n:,}", Rule.CARDINAL) == oracle(n, "cardinal")
        assert read(str(n), Rule.ORDINAL) == oracle(n, "ordinal")
        assert read(str(n), Rule.DIGITS) == " ".join(oracle(int(digit), "cardinal") for digit in str(n))
    for year in range(1001, 2100, 10):
        assert read(str(year), Rule.YEAR) == oracle(year, "year")
        assert read(f"{year / 100:.2f}", Rule.DECIMAL) == oracle(year / 100, "cardinal")


@pytest.mark.parametrize(
    ("text", "rule", "said"),
    [
        ("Café", Rule.WORD, "cafe"),
        ("don\u2019t", Rule.WORD, "don't"),
        ("FBI", Rule.LETTERS, "F B I"),
        ("CEOs", Rule.LETTERS, "C E O's"),
        ("a.m.", Rule.LETTERS, "A M"),
        ("e.g.", Rule.ABBREVIATION, "for example"),
        ("Dr", Rule.TITLE, "doctor"),
        ("Dr", Rule.STREET, "drive"),
        ("VIII", Rule.REGNAL, "the eighth"),
        ("XIV", Rule.ROMAN, "fourteen"),
        ("2.0.12", Rule.DECIMAL, "two point zero point twelve"),
        ("1 1/2", Rule.FRACTION, "one and one half"),
        ("3/4", Rule.FRACTION, "three quarters"),
        ("½", Rule.FRACTION, "one half"),
        ("1990s", Rule.YEAR, "nineteen nineties"),
        ("Mar", Rule.MONTH, "march"),
        ("3", Rule.MONTH, "march"),
        ("4th", Rule.DAY_OF, "the fourth of"),
        ("$5.30", Rule.CURRENCY, "five dollars and thirty cents"),
        ("£0.01", Rule.CURRENCY, "one penny"),
        ("1 €", Rule.CURRENCY, "one euro"),
        ("$2.5 million", Rule.CURRENCY, "two point five million dollars"),
        ("+1 (555) 123", Rule.TELEPHONE, "plus one five five five one two three"),
        ("https://www.cats.org/a1", Rule.URL, "H T T P S colon slash slash W W W dot cats dot org slash A one"),
        ("a_#", Rule.VERBATIM, "A underscore hash"),
        ("&", Rule.SYMBOL, "and"),
        ("٣٤", Rule.CARDINAL, "thirty four"),
    ],
)
def test_readings(text: str, rule: Rule, said: str) -> None:
    assert read(text, rule) == said


def test_units_and_minutes_know_what_stands_before_them() -> None:
    unit, time = [Rule.CARDINAL, Rule.DELETE, Rule.UNIT], [Rule.HOUR, Rule.DELETE, Rule.MINUTE]
    assert words_of(speak(split("1 kg"), unit)) == "one kilogram"
    assert words_of(speak(split("21 kg"), unit)) == "twenty one kilograms"
    assert [words_of(speak(split(text), time)) for text in ("7:00", "7:05", "15:00")] == [
        *("seven o'clock", "seven oh five", "fifteen hundred")
    ]


def test_a_rule_that_does_not_fit_leaves_it_to_the_plain_reading() -> None:
    assert read("13/45", Rule.URL) == "one three slash four five"
    assert read("hello", Rule.ROMAN) == read("hello", Rule.UNIT) == "hello"
    assert read("31", Rule.MONTH) == read("31", Rule.CURRENCY) == "thirty one"
    assert read("1" * 20, Rule.CARDINAL) == " ".join(["one"] * 20)


def test_what_cannot_be_said_is_dropped_and_said_to_be() -> None:
    tokens = split("hi \N{GRINNING FACE} привет \x00漢字 a")
    said = speak(tokens, [Rule.JOIN] * len(tokens))
    assert [(part.kind, part.text) for part in said] == [
        *(("word", "hi"), ("dropped", "\N{GRINNING FACE}"), ("dropped", "привет"), ("dropped", "\x00")),
        *(("dropped", "漢字"), ("word", "a")),
    ]


def test_random_rules_on_random_text_never_crash(random_text: Callable[..., str]) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        tokens = split(random_text(rng))
        rules = [rng.choice(list(Rule)) for _ in tokens]
        said = speak(tokens, rules)
        assert [part.tokens for part in said] == sorted(part.tokens for part in said)
        assert all(part.text for part in said)


def release(text: str, rules: str) -> list[tuple[str, list[str]]]:
    """What had been read when words came out, and the words."""
    reader, tokens, released = RuleReader(), split(text), []
    for token, rule in zip(tokens, rules.split(), strict=True):
        if said := reader.push(token, Rule[rule]):
            released.append((text[: token.end], [part.text for part in said]))
    return [*released, (text, [part.text for part in reader.flush()])]


def test_words_come_at_white_space_and_dates_in_one_piece() -> None:
    assert release(
        "on March 3, 1999 we won", "WORD DELETE MONTH DELETE DAY PAUSE DELETE YEAR DELETE WORD DELETE WORD"
    ) == [
        ("on ", ["on"]),
        ("on March 3, 1999 we", ["march", "third", ",", "nineteen", "ninety", "nine"]),
        ("on March 3, 1999 we ", ["we"]),
        ("on March 3, 1999 we won", ["won"]),
    ]
    assert release("pay $3 million now", "WORD DELETE CURRENCY JOIN JOIN JOIN DELETE WORD") == [
        ("pay ", ["pay"]),
        ("pay $3 million ", ["three", "million", "dollars"]),
        ("pay $3 million now", ["now"]),
    ]


def test_nothing_is_released_inside_what_has_no_space_whatever_the_rules() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        text = " ".join(
            rng.choice(["1,234.50", "3/4/1999", "www.cats.org/a-b", "10:30", "555-1234", "well-known"])
            for _ in range(9)
        )
        reader, tokens = RuleReader(), split(text)
        for token in tokens:
            if reader.push(token, rng.choice(sorted(RULES_OF_KIND[token.kind]))):
                assert token.kind is Kind.SPACE or text[token.start - 1] == " "


def test_an_endless_item_is_cut() -> None:
    reader, held = RuleReader(), 0
    for token in split("1," * 300):
        held = 0 if reader.push(token, Rule.JOIN) else held + 1
        assert held <= 2 * MAX_ITEM


def test_a_reader_begins_anew_after_the_end() -> None:
    reader = RuleReader()
    for _ in range(2):
        said = [part for token in split("a 1") for part in reader.push(token, Rule.JOIN)] + reader.flush()
        assert said == [Spoken("word", "a", (0, 0)), Spoken("word", "one", (2, 2))]
