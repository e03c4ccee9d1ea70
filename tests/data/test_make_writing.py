"""Texts with rules: what is said comes from values, so it checks the rules; and the splits share nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from data.make import writing
from data.make.sentences import split_of
from data.make.templates import FIRST_NAMES
from data.make.written import SLOTS, SURNAMES, Draw, Material, plain
from data.shards import open_source
from speech.tn_rules import RULES_OF_KIND, Rule, speak, words_of
from speech.tn_tokens import split

NOUNS = ["horse", "lamp", "berry", "box", "kettle", "spoon", "violin", "ladder"]
MATERIAL = Material(nouns=NOUNS, sentences=["It was late.", "Don't go, he said.", "He is well known there, isn't he?"])
N = {"train": 2000, "heldout": 700}


def made(split_name: str, n: int) -> list[dict]:
    return list(islice(writing.samples(0, split_name, n, MATERIAL), n))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def samples() -> dict[str, list[dict]]:
    return {name: made(name, n) for name, n in N.items()}


def test_rules_say_what_was_meant(samples: dict[str, list[dict]]) -> None:
    used = Counter()
    for record in (record for some in samples.values() for record in some):
        tokens, rules = split(record["written"]), [Rule[name] for name in record["rules"]]
        assert len(tokens) == len(rules), record
        assert all(rule in RULES_OF_KIND[token.kind] for token, rule in zip(tokens, rules, strict=True)), record
        assert words_of(speak(tokens, rules)) == record["spoken"], record
        used.update(rules)
    assert used.keys() == set(Rule)  # every rule has examples


def test_every_kind_and_every_slot_is_made(samples: dict[str, list[dict]]) -> None:
    for some in samples.values():
        assert {record["kind"] for record in some} == set(writing.TEMPLATES)
    named = {slot for lines in writing.TEMPLATES.values() for line in lines for slot in writing._SLOT.findall(line)}
    assert named == set(SLOTS)


def test_the_splits_share_no_text_template_word_or_long_number(samples: dict[str, list[dict]]) -> None:
    train, heldout = ({record["written"] for record in samples[name]} for name in N)
    assert len(train) == N["train"] and len(heldout) == N["heldout"] and not train & heldout
    lines = [(i, line) for some in writing.TEMPLATES.values() for i, line in enumerate(some)]
    assert len({line for _, line in lines}) == len(lines)
    assert 0.15 < sum(writing.is_heldout(i) for i, _ in lines) / len(lines) < 0.25
    draws = {name: Draw(rng=random.Random(0), split=name, material=MATERIAL) for name in N}  # type: ignore[arg-type]
    numbers = {name: {draw.number(1000, 9999) for _ in range(300)} for name, draw in draws.items()}
    assert not numbers["train"] & numbers["heldout"]
    for name, draw in draws.items():
        for words in (FIRST_NAMES, SURNAMES):
            assert {split_of(draw.word(words).lower()) for _ in range(100)} == {name}


def test_the_same_seed_gives_the_same_samples() -> None:
    assert made("train", 50) == made("train", 50)
    assert [r["written"] for r in islice(writing.samples(1, "train", 50, MATERIAL), 50)] != [
        r["written"] for r in made("train", 50)
    ]


def test_the_same_characters_are_read_in_several_ways(samples: dict[str, list[dict]]) -> None:
    readings: dict[str, set[str]] = {}
    for record in samples["train"]:
        for token, rule in zip(split(record["written"]), record["rules"], strict=True):
            readings.setdefault(token.text, set()).add(rule)
    assert {"TITLE", "STREET"} <= readings["St"] and {"TITLE", "STREET"} <= readings["Dr"]
    assert {"WORD", "LETTERS"} <= readings["IT"] and {"WORD", "ABBREVIATION"} <= readings["No"]
    assert {"DELETE", "JOIN", "TO", "SYMBOL"} <= readings["-"] and {"DELETE", "JOIN"} <= readings["/"]
    assert len(readings["3"] & {"CARDINAL", "FRACTION", "MONTH", "DAY", "HOUR", "CURRENCY", "JOIN"}) >= 5


def test_files_are_sources_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "read_material", lambda split: MATERIAL)  # the real one needs Debian packages
    manifest = writing.make_writing(tmp_path, scale=0.001)
    assert manifest["samples"] == {"train": 60, "heldout": 2}
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    source = open_source(tmp_path / "train-writing.jsonl", name="writing")
    assert len(source) == 60
    assert source[0].metadata["written"] == source[0].messages[0]["content"][0]["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("heldout-writing.jsonl", "manifest.json", "train-writing.jsonl")
    ]


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scale"):
        writing.make_writing(tmp_path, scale=0)
    with pytest.raises(ValueError, match="neither a word nor punctuation"):
        plain("3 cats")
