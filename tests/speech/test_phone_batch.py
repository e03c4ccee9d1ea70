"""Phones as tensors: the closed inventory, padding, and the pauses of an utterance."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch

from speech.phone_batch import IPA, MARKS, PhoneBatch, PhoneEmbedding, PhoneIds, PhoneStream
from speech.phones import PAUSE, Phone
from speech.spoken_text import SpokenPart


def phone(ipa: str, mark: str = "", stop: int = 1) -> Phone:
    return Phone(ipa, 0, ipa == PAUSE, ipa == PAUSE, mark, SpokenPart("word", "x", 0, 1, 0, stop))


def test_the_inventory_is_gruuts() -> None:
    gruut = pytest.importorskip("gruut_lang_en")
    lexicon = sqlite3.connect(f"file:{Path(gruut.__file__).parent / 'lexicon.db'}?mode=ro", uri=True)
    found = {
        symbol.lstrip("\u02c8\u02cc")
        for (symbols,) in lexicon.execute("SELECT phonemes FROM word_phonemes")
        for symbol in symbols.split()
    }
    assert found == set(IPA[3:])


def test_collate_pads_and_unknown_symbols_have_a_place() -> None:
    rows = [[phone(PAUSE), phone("h", stop=3), phone("ꭗ", stop=4)], [], [phone(PAUSE, "?")]]
    batch = PhoneBatch.collate(rows, speakers=[2, 0, 1])
    assert batch.ipa_BN.tolist() == [[2, IPA.index("h"), 1], [0, 0, 0], [2, 0, 0]]
    assert batch.chunk_BN.tolist() == [[0, 2, 3], [0, 0, 0], [0, 0, 0]]
    assert batch.place_BN[:, 0].tolist() == [3, 0, 3] and batch.mark_BN[2, 0] == MARKS.index("?")
    assert batch.n_phones_B.tolist() == [3, 0, 1] and batch.speaker_B.tolist() == [2, 0, 1]
    assert PhoneBatch.collate([[]]).ipa_BN.shape == (1, 0)
    x_BND = PhoneEmbedding(7, n_speakers=3)(batch)
    assert x_BND.shape == (3, 3, 7)
    ids = [PhoneIds.of(one) for one in rows[0]]
    assert torch.equal(PhoneBatch.collate([ids]).ipa_BN[0], batch.ipa_BN[0])


@pytest.mark.parametrize("cuts", [[7], [1] * 7, [0, 3, 4]])
def test_an_utterance_begins_and_ends_with_a_pause(cuts: list[int]) -> None:
    phones = [phone("h"), phone("i"), phone(PAUSE, ","), phone(PAUSE, "?"), phone("j"), phone("u", stop=5), phone("z")]
    stream, made, start = PhoneStream(), list[Phone](), 0
    for cut in cuts:
        made += stream.push(phones[start : start + cut])
        start += cut
    made += stream.finish()
    assert [one.mark if one.is_pause else one.ipa for one in made] == ["", "h", "i", ",", "j", "u", "z", "."]
    assert made[-1].source is phones[-1].source


def test_pauses_alone_and_nothing() -> None:
    assert PhoneStream().finish() == []
    stream = PhoneStream()
    assert [one.ipa for one in stream.push([phone(PAUSE, "!"), phone("o")])] == [PAUSE, "o"]
    assert stream.push([phone(PAUSE, "!")])[0].mark == "!" and stream.finish() == []
