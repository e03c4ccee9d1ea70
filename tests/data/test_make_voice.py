"""`mm data make voice`: what Festival is told, phones in their places, what texts say, and, where Festival is, real recordings."""

from __future__ import annotations

import random
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data.make import sentences, voice, writing
from data.make.voice import LEAD, TAIL, Item
from data.make.written import Material, plain
from data.shards import open_source
from data.voice import read_voice
from mm.voice_data import FrontEnd, measure

HELLO = Item("hello", "", (("h", 0), ("ə", 0), ("l", 0), ("oʊ", 1)), 5)
BEGIN, COMMA, END = Item("", "", (("|", 0),), 5), Item("", ",", (("|", 0),), 6), Item("", ".", (("|", 0),), 11)
LETTER = Item("A", "", (("eɪ", 1),), 8)  # noqa: RUF001


def test_words_are_entries_of_a_lexicon() -> None:
    assert voice._entry(HELLO) == """(lex.add.entry '("hello" nil (((hh ax) 0) ((l ow) 1))))"""
    assert voice._entry(LETTER) == """(lex.add.entry '("lettera" nil (((ey) 1))))"""
    extra = Item("extra", "", tuple((ipa, int(ipa == "ɛ")) for ipa in ["ɛ", "k", "s", "t", "ɹ", "ə"]), 0)
    assert voice._entry(extra).endswith("(((eh k) 1) ((s t r ax) 0))))")
    singer = Item("singer", "", (("s", 0), ("ɪ", 1), ("ŋ", 0), ("ɚ", 0)), 0)  # noqa: RUF001
    assert voice._entry(singer).endswith("(((s ih ng) 1) ((er) 0))))")
    full_stop = Item("", ".", (("|", 0),), 0)
    assert voice._line(7, [BEGIN, HELLO, full_stop, LETTER, COMMA, HELLO, END]) == '(say "7" "hello; lettera, hello.")'


def test_phones_fill_the_recording() -> None:
    items = [BEGIN, HELLO, END]
    segments = [("pau", 0.165), ("hh", 0.254), ("ax", 0.257), ("l", 0.335), ("ow", 0.43), ("pau", 0.7)]
    waveform = np.arange(0.7 * voice.SAMPLE_RATE, dtype=np.float32)
    placed = voice.place(items, waveform, segments)
    assert placed is not None
    cut, phones = placed
    assert [phone.frames for phone in phones] == [LEAD, 9, 1, 8, 9, TAIL]
    assert sum(phone.frames for phone in phones) * voice.HOP == len(cut)
    assert cut[0] == (16 - LEAD) * voice.HOP  # 0.165 s is 16 frames, as ties go to even numbers
    assert [phone.place for phone in phones] == [3, 1, 0, 0, 2, 3]
    assert [(phone.mark, phone.end) for phone in phones][-2:] == [("", 5), (".", 11)]
    # A short recording is filled up, and other segments are none of these phones.
    assert voice.place(items, waveform[:-10], segments)[0][-1] != 0  # type: ignore[index]
    assert len(voice.place(items, waveform[:5000], segments)[0]) == len(cut)  # type: ignore[index]
    assert voice.place(items, waveform, segments[:-1]) is None


def test_the_front_end_says_what_the_voice_says() -> None:
    pytest.importorskip("gruut")
    items = FrontEnd()(plain("Hello (you)!").tokens)
    assert [(item.word, item.mark, item.end) for item in items] == [
        *(("", "", 5), ("hello", "", 5), ("", ",", 7), ("you", "", 10), ("", ",", 11)),  # of two pauses, the first
    ]
    assert items[1].phones == (("h", 0), ("ɛ", 0), ("l", 0), ("oʊ", 1))
    numbers = (("3", "CARDINAL"), (" ", "DELETE"), ("mg", "UNIT"))
    assert [item.word for item in FrontEnd()(numbers)] == ["", "three", "milligrams", ""]
    with pytest.raises(ValueError, match="cut elsewhere"):
        FrontEnd()((("ab", "WORD"), ("c", "WORD")))


def test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {"one": sentences.Pool(1.0, ("A dog barks.", "It is late.", "The lamp is on."))}
    monkeypatch.setattr(
        writing, "read_material", lambda split: Material(nouns=["dog", "lamp"], sentences=["It is late."])
    )
    monkeypatch.setattr(sentences, "read_pools", lambda split: pool)
    monkeypatch.setattr(sentences, "question_pools", lambda split: pool)
    monkeypatch.setattr(
        sentences, "exchanges", lambda: iter([[f"Turn {word} now" for word in ("left", "right", "up")]])
    )
    some = list(islice(voice.texts(0, "train"), 60))
    assert some == list(islice(voice.texts(0, "train"), 60))
    written = ["".join(text for text, _ in piece.tokens) for _, piece in some]
    assert len(set(written)) == 60
    assert {kind for kind, _ in some} == set(voice.KINDS)
    assert all(1 <= len(piece.spoken.split()) <= voice.MAX_WORDS for _, piece in some)
    for line in voice.SHORT:  # every slot exists
        draw = writing.Draw(rng=random.Random(0), split="heldout", material=Material(nouns=["dog"], sentences=[]))
        assert writing.fill(line, draw).tokens


@pytest.mark.skipif(shutil.which("festival") is None, reason="needs Festival")
def test_real_recordings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("gruut", "parselmouth"):
        pytest.importorskip(module)
    try:
        voice.require_programs()
    except ValueError as error:
        pytest.skip(str(error))
    lines = ["Hello, Ann. How are you?", "There is a record of it - perhaps!", "It's February"]
    monkeypatch.setattr(voice, "texts", lambda seed, split: ((split, plain(line)) for line in lines))
    manifest = voice.make_voice(tmp_path, FrontEnd(), measure, scale=3 / voice.N_SAMPLES["train"])
    assert manifest["splits"]["train"] | {"hours": 0} == {
        "utterances": 3,
        "dropped": 0,
        "hours": 0,
        "shards": ["train-voice-0000.tar"],
    }
    opened = open_source(tmp_path / "train-voice-0000.tar", name="made")
    sample = read_voice(opened[0])
    assert [phone.mark for phone in sample.phones if phone.ipa == "|"] == ["", ",", ".", "?"]
    assert sample.waveform_N is not None and sample.log_power_T is not None
    start = 0
    vowels = ("oʊ", "aʊ", "u", "i", "ɚ")
    for phone in sample.phones:  # what is heard is where it should be
        frames = slice(start, start + phone.frames)
        if phone.ipa in vowels:
            assert (sample.f0_T[frames] > 0).float().mean() > 0.7, phone
        if phone.ipa == "|" and not phone.mark:
            assert sample.log_power_T[frames].mean() < -6
        start += phone.frames
    with pytest.raises(ValueError, match="seed 0"):
        voice.make_voice(tmp_path, FrontEnd(), measure, seed=1)
