"""`mm data make voice`: what Festival is told, phones in their places, what texts say, and, where Festival is, real recordings."""

from __future__ import annotations

import random
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.make import recorded_voice, sentences, voice, writing
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
    ends = [0.165, 0.254, 0.257, 0.335, 0.43, 0.7]
    waveform = np.arange(0.7 * voice.SAMPLE_RATE, dtype=np.float32)
    cut, phones = voice.place(waveform, items, ends)
    assert [phone.frames for phone in phones] == [LEAD, 9, 1, 8, 9, TAIL]
    assert sum(phone.frames for phone in phones) * voice.HOP == len(cut)
    assert cut[0] == (16 - LEAD) * voice.HOP  # 0.165 s is 16 frames, as ties go to even numbers
    assert [phone.place for phone in phones] == [3, 1, 0, 0, 2, 3]
    assert [(phone.mark, phone.end) for phone in phones][-2:] == [("", 5), (".", 11)]
    assert len(voice.place(waveform[:5000], items, ends)[0]) == len(cut)  # a short recording is filled up


def test_pauses_of_a_reader() -> None:
    you = Item("you", "", (("j", 0), ("u", 1)), 9)
    items = [BEGIN, HELLO, COMMA, you, HELLO, END]
    # A mark without a pause, a pause without a mark, and a short silence.
    found = [(None, [12]), (0, [5, 4, 3, 9]), (1, [6, 7]), (None, [20]), (2, [4, 4, 4, 4]), (None, [30])]
    made, ends = recorded_voice.with_pauses(items, found)
    assert [item.word or item.mark for item in made] == ["", "hello", ",", "you", ",", "hello", "."]
    frames = np.diff(np.round(np.array([0, *ends]) * 100)).astype(int).tolist()
    assert frames == [12, 5, 4, 3, 8, 1, 6, 7, 20, 4, 4, 4, 4, 30]
    assert made[4].end == you.end
    found[3] = (None, [4])
    made, ends = recorded_voice.with_pauses(items, found)
    frames = np.diff(np.round(np.array([0, *ends]) * 100)).astype(int).tolist()
    assert frames == [12, 5, 4, 3, 8, 1, 6, 11, 4, 4, 4, 4, 30] and len(made) == 6


def test_layouts_of_corpora(tmp_path: Path) -> None:
    (tmp_path / "lj").mkdir()
    (tmp_path / "lj" / "metadata.csv").write_text('LJ001-0001|Printed in 1455.|He said "no".\n')
    (recording,) = recorded_voice.ljspeech(tmp_path / "lj")
    assert recording == ("LJ001-0001", tmp_path / "lj" / "wavs" / "LJ001-0001.wav", 'He said "no".', "LJ")
    (tmp_path / "lj" / "metadata.csv").write_text("LJ001-0001|one field short\n")
    with pytest.raises(ValueError, match="line 1"):
        recorded_voice.ljspeech(tmp_path / "lj")
    chapter = tmp_path / "tts" / "84" / "121123"
    chapter.mkdir(parents=True)
    (chapter / "84_121123_000007_000001.normalized.txt").write_text("Yes.\n")
    (recording,) = recorded_voice.libritts(tmp_path / "tts")
    assert recording == ("84_121123_000007_000001", chapter / "84_121123_000007_000001.wav", "Yes.", "84")
    with pytest.raises(ValueError, match="neither"):
        recorded_voice.make_recorded_voice(tmp_path / "lj" / "no", tmp_path, list, measure, limit=None, workers=1)


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
        voice.make_voice(tmp_path, FrontEnd(), measure, seed=1, scale=3 / voice.N_SAMPLES["train"])

    # What an aligner finds in these recordings is near what the synthesiser says of them.
    pytest.importorskip("pocketsphinx")
    (tmp_path / "lj" / "wavs").mkdir(parents=True)
    rows = []
    for i in range(len(opened)):
        made = read_voice(opened[i])
        assert made.waveform_N is not None
        soundfile.write(tmp_path / "lj" / "wavs" / f"LJ-{i}.wav", made.waveform_N.numpy(), voice.SAMPLE_RATE)
        rows.append(f"LJ-{i}|{made.text}|{made.text}\n")
    (tmp_path / "lj" / "metadata.csv").write_text("".join(rows))
    out = tmp_path / "aligned"
    recorded_voice.make_recorded_voice(tmp_path / "lj", out, FrontEnd(), measure, limit=None, workers=1)
    aligned = open_source(out, name="aligned")
    assert len(aligned) == 3
    for i in range(3):
        found, true = read_voice(aligned[i]), read_voice(opened[int(aligned[i].key[-1])])
        assert [phone.ipa for phone in found.phones] == [phone.ipa for phone in true.phones]
        bounds = [np.cumsum([phone.frames for phone in sample.phones]) for sample in (found, true)]
        difference = bounds[0] - bounds[1]
        assert np.median(np.abs(difference - np.median(difference))) <= 2
