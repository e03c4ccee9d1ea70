"""`mm data make recorded-voice`: recordings of people who read, with their texts, to the shards of `mm data make voice`.

PocketSphinx finds where each phone is; its package brings an acoustic model of American English. It is told the front end's
pronunciation of every word, so its phones are the front end's one to one. Where a reader pauses without a mark, a pause with a
comma's is put in; where the text has a mark and the reader no pause, it gets a frame of the phone before.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchaudio.functional as AF

from data.audio import load_audio
from data.make.templates import items as words
from data.make.voice import SAMPLE_RATE, FrontEnd, Item, Measure, Said, Utterance, write_voice
from data.make.written import plain

#: One recording in `HELDOUT` is held out, by a hash of its name.
HELDOUT = 20
#: Shorter silences between words, in frames of 10 ms, belong to the phone before.
MIN_PAUSE = 5
ALIGNED_RATE, FRAMES_PER_SECOND = 16_000, 100
_IPA = words(
    "i ɪ ɛ æ ɑ ɔ ʊ u ʌ ə ɚ eɪ aɪ ɔɪ aʊ oʊ p b t d k ɡ t͡ʃ d͡ʒ f v θ ð s z ʃ ʒ h m n ŋ l ɹ w j"  # noqa: RUF001
)
_CMU = words("IY IH EH AE AA AO UH UW AH AH ER EY AY OY AW OW P B T D K G CH JH F V TH DH S Z SH ZH HH M N NG L R W Y")
_CMU_OF = dict(zip(_IPA, _CMU, strict=True))


class Recording(NamedTuple):
    """A file, what is read in it, and by whom."""

    key: str
    path: Path
    text: str
    speaker: str


def ljspeech(folder: Path) -> list[Recording]:
    """LJSpeech's layout: `metadata.csv` with name, text and normalised text, and `wavs/`.

    Raises:
        ValueError: a line is not of that form.
    """
    found = []
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE), start=1):
            if len(row) != 3:
                raise ValueError(f"corpus: line {number} of {folder / 'metadata.csv'} has {len(row)} fields; need 3")
            found.append(Recording(row[0], folder / "wavs" / f"{row[0]}.wav", row[2], "LJ"))
    return found


def libritts(folder: Path) -> list[Recording]:
    """LibriTTS's layout: at any depth, `speaker_chapter_paragraph_sentence.wav` beside its `.normalized.txt`."""
    return [
        Recording(
            text.name.removesuffix(".normalized.txt"),
            text.with_name(text.name.removesuffix(".normalized.txt") + ".wav"),
            text.read_text(encoding="utf-8").strip(),
            text.name.split("_")[0],
        )
        for text in sorted(folder.rglob("*.normalized.txt"))
    ]


def make_recorded_voice(
    corpus: str | Path, out: str | Path, front_end: FrontEnd, measure: Measure, *, limit: int | None, workers: int
) -> dict[str, Any]:
    """Writes `train-voice-0000.tar`, ..., `heldout-voice-0000.tar`, ... and `manifest.json`, as `data.make.voice.make_voice`.

    Texts with numbers, abbreviations or symbols are left out, as nobody said how they were read.

    Args:
        corpus: folder in the layout of LJSpeech or LibriTTS.
        limit: most recordings that are taken, from the first on; all when None.

    Returns:
        The manifest.

    Raises:
        ValueError: the corpus has neither layout, or PocketSphinx is missing.
    """
    corpus = Path(corpus)
    found = (ljspeech if (corpus / "metadata.csv").is_file() else libritts)(corpus)[:limit]
    if not found:
        raise ValueError(f"corpus: {corpus} has neither metadata.csv (LJSpeech) nor *.normalized.txt (LibriTTS)")
    decoder()
    numbers = {name: i for i, name in enumerate(sorted({recording.speaker for recording in found}))}
    said: dict[str, list[Utterance]] = {"train": [], "heldout": []}
    for recording in found:
        if (items := _items_of(recording.text, front_end)) is not None:
            split = "train" if zlib.crc32(recording.key.encode()) % HELDOUT else "heldout"
            utterance = Utterance(
                key=recording.key.replace(".", "-"),
                kind="recorded",
                text=recording.text,
                items=tuple(items),
                voice=recording.speaker,
                speaker=numbers[recording.speaker],
                recording=recording.path,
            )
            said[split].append(utterance)
    about = {"corpus": str(corpus), "limit": limit, "speakers": numbers}
    return write_voice(out, about, {split: some for split, some in said.items() if some}, align, measure, workers)


def _items_of(text: str, front_end: FrontEnd) -> list[Item] | None:
    try:
        items = front_end(plain(" ".join(re.sub("[\u201c\u201d]", '"', text).replace("\u2019", "'").split())).tokens)
    except ValueError:
        return None
    return items if any(item.word for item in items) else None


@cache
def decoder() -> Any:
    """PocketSphinx, once for a process.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from pocketsphinx import Decoder
    except ImportError as error:
        raise ValueError("alignment needs PocketSphinx: run `pip install pocketsphinx`") from error
    return Decoder(lm=None, loglevel="FATAL")


def align(batch: Sequence[Utterance]) -> Iterator[Said | None]:
    """Finds the phones of recordings; None where they cannot be found."""
    for utterance in batch:
        assert utterance.recording is not None
        waveform_N = load_audio(utterance.recording, SAMPLE_RATE)
        heard_N = AF.resample(waveform_N, SAMPLE_RATE, ALIGNED_RATE)
        pcm = (heard_N.clamp(-1, 1) * 32767).short().numpy()
        found = find_words(pcm, [item for item in utterance.items if item.word])
        yield None if found is None else (waveform_N.numpy(), *with_pauses(utterance.items, found))


#: A word's phones, or a silence, where the index is None: how many frames each lasts.
Found = list[tuple[int | None, list[int]]]


def find_words(pcm: np.ndarray, said: Sequence[Item]) -> Found | None:
    """Words, by their index, and the silences between them, in their order; None where the recording says something else."""
    sphinx = decoder()
    pronunciations = [" ".join(_CMU_OF[ipa] for ipa, _ in item.phones) for item in said]
    names = {phones: f"word{zlib.crc32(phones.encode()):08x}" for phones in pronunciations}
    for phones, name in names.items():
        if sphinx.lookup_word(name) is None:
            sphinx.add_word(name, phones, True)
    sphinx.set_align_text(" ".join(names[phones] for phones in pronunciations))
    try:
        for is_second in (False, True):  # words first, then the phones in them
            if is_second:
                sphinx.set_alignment()
            sphinx.start_utt()
            sphinx.process_raw(pcm.tobytes(), full_utt=True)
            sphinx.end_utt()
        found, number = Found(), 0
        for word in sphinx.get_alignment() or ():
            is_word = word.name.startswith("word")
            found.append((number if is_word else None, [phone.duration for phone in word]))
            number += is_word
    except RuntimeError:  # it found no way through the text
        return None
    fits = [len(frames) for index, frames in found if index is not None] == [len(item.phones) for item in said]
    return found if fits else None


def with_pauses(items: Sequence[Item], found: Found) -> tuple[list[Item], list[float]]:
    """Items with the pauses that were made, and where each phone ends in seconds.

    A pause that the text has and the reader does not gets one frame of the phone before.
    """
    spoken = [item for item in items if item.word]
    marks = dict(_pauses_before(items))
    made: list[Item] = []
    frames: list[int] = []
    silence = 0
    for index, lengths in [*found, (len(spoken), [])]:
        if index is None:
            silence += sum(lengths)
            continue
        pause = marks.get(index)
        if pause is None and silence >= MIN_PAUSE:
            pause = Item("", ",", (("|", 0),), spoken[index - 1].end)
        if pause is not None:
            if not silence and frames:
                silence, frames[-1] = 1, max(1, frames[-1] - 1)
            made.append(pause)
            frames.append(max(1, silence))
        elif frames:
            frames[-1] += silence
        silence = 0
        if index < len(spoken):
            made.append(spoken[index])
            frames += lengths
    return made, (np.cumsum(frames) / FRAMES_PER_SECOND).tolist()


def _pauses_before(items: Sequence[Item]) -> Iterator[tuple[int, Item]]:
    """Pauses, and the number of the word that comes after each."""
    n_words = 0
    for item in items:
        if item.word:
            n_words += 1
        else:
            yield n_words, item
