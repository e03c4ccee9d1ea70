"""`mm data make voice`: sentences, numbers and short answers in one synthesised voice, with the exact timing of every phone.

Festival's HTS voice of SLT speaks at 32 kHz, under a licence like BSD's, so that what learns from it may be shipped. It is told
how to pronounce every word, by the phones of the front end that the trained voice will have, and pauses at punctuation and
nowhere else. So its segments are the front end's phones one to one; a sentence where they are not is dropped and counted.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import soundfile
import torch
import torchaudio.functional as AF
from tqdm import tqdm

from data.audio import encode_flac
from data.make import sentences, writing
from data.make.canvas import Source, Split
from data.make.templates import items
from data.make.written import SPACE, Draw, Material, Piece, plain, together
from data.shards import ShardSource, write_shard
from data.voice import VoicePhone

N_SAMPLES = {"train": 3500, "heldout": 400}
SHARD_SIZE = 250
SAMPLE_RATE, HOP = 24_000, 240
#: Frames of the pauses that an utterance begins and ends with.
LEAD, TAIL = 10, 15
MAX_WORDS = 25
VOICE = "festival-slt-hts"
SOURCES = (Source(package="festvox-us-slt-hts", licence="CMU and HTS (BSD-like)"), *sentences.SOURCES)


class Item(NamedTuple):
    """A word or a pause.

    Attributes:
        word: in lower case, or the name of a letter as a capital; empty for a pause.
        mark: of a pause, its punctuation; empty for the one that an utterance begins with.
        phones: IPA symbols and their stress; a pause has one.
        end: characters of the written text up to the end of what it stands for.
    """

    word: str
    mark: str
    phones: tuple[tuple[str, int], ...]
    end: int


#: Written tokens and the names of their rules (`data.make.written`) to what is said.
FrontEnd = Callable[[Sequence[tuple[str, str]]], list[Item]]
#: A waveform at `SAMPLE_RATE` to the pitch of each frame in Hz, 0 where unvoiced, and the log power of each.
Measure = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """What one sample says.

    Attributes:
        kind: of text.
        text: as it is written.
        voice, speaker: who says it, by name and number.
        recording: where it is said; None if that is to come.
    """

    key: str
    kind: str
    text: str
    items: tuple[Item, ...]
    voice: str = VOICE
    speaker: int = 0
    recording: Path | None = None


#: An utterance as it was said: its waveform at `SAMPLE_RATE`, its items, and where each of their phones ends in seconds.
Said = tuple[np.ndarray, Sequence[Item], Sequence[float]]
#: Says utterances, in their order; None for those that cannot be used.
Speak = Callable[[Sequence[Utterance]], Iterable[Said | None]]


# --- texts ------------------------------------------------------------------------------------------------------------

#: Short answers; the slots are those of `data.make.written.SLOTS`. They come in both splits, filled with other words.
SHORT = tuple(
    line.strip()
    for line in """
        {noun}
        {noun}.
        {nouns}.
        {noun}!
        {noun}?
        A {noun}.
        The {noun}.
        The {noun}!
        My {noun}?
        Some {nouns}.
        Two {nouns}.
        A {noun} and a {noun}.
        {name}.
        {name}?
        {name}!
        Hello, {name}!
        Thank you, {name}.
        {city}.
        {place}.
        In {city}.
        In {place}, I think.
        From {city} to {city}.
        {small}.
        {count}.
        {year}.
        {money}.
        {percent}.
        {clock}.
        {month_day}.
        {weekday}.
        {decimal}.
        {rank}.
        Yes.
        No.
        Yes!
        No!
        Yes, of course.
        Yes, the {noun}.
        No, the {noun}.
        No, thank you.
        Of course!
        Sure.
        Maybe.
        Not really.
        I think so.
        I do not know.
        That is right.
        That is wrong.
        Good morning!
        Good night, {name}.
        How are you?
        I am fine, thanks.
        What is it?
        Is it a {noun}?
        Who is {name}?
        Where is {city}?
        It is a {noun}.
        It is {clock}.
        It was {year}.
        About {count}.
        There are {small}.
        There is one {noun}.
        I see a {noun}.
        I see {small} {nouns}.
        I like {nouns}.
        Well done!
        What a {noun}!
        Sorry, I cannot see that.
        """.strip().splitlines()
)
#: Kind of text -> its share.
KINDS = {"writing": 0.3, "prose": 0.35, "question": 0.1, "chat": 0.1, "short": 0.15}
#: Share of plain sentences that are shouted.
SHOUTED = 0.08


def texts(seed: int, split: Split) -> Iterator[tuple[str, Piece]]:
    """Kinds and texts with rules, no two alike, without an end."""
    rng, seen = random.Random(f"{seed}/voice/{split}"), set[str]()
    material = writing.read_material(split)
    pools = {"prose": sentences.read_pools(split), "question": sentences.question_pools(split)}
    turns = [turn for turns in sentences.exchanges() for turn in turns if sentences.split_of(turn) == split]
    while True:
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        if kind == "writing":
            piece = writing.sample(rng, split, material)[1]
        elif kind == "short":
            piece = _short(rng, split, material)
        else:
            (text,) = [rng.choice(turns)] if kind == "chat" else sentences.draw_sentences(rng, pools[kind], 1)
            try:
                piece = plain(_shouted(rng, " ".join(text.split())))
            except ValueError:  # it has numbers or symbols, and nobody said how to read these
                continue
        written = "".join(text for text, _ in piece.tokens)
        if written not in seen and 1 <= len(piece.spoken.split()) <= MAX_WORDS:
            seen.add(written)
            yield kind, piece


def _short(rng: random.Random, split: Split, material: Material) -> Piece:
    draw = Draw(rng=rng, split=split, material=material)
    n = 1 if rng.random() < 0.8 else 2
    pieces = [writing.fill(rng.choice(SHORT), draw) for _ in range(n)]
    return pieces[0] if n == 1 else together(pieces[0], SPACE, pieces[1])


def _shouted(rng: random.Random, text: str) -> str:
    return text[:-1] + "!" if text.endswith(".") and rng.random() < SHOUTED else text


def utterances(seed: int, split: Split, n: int, front_end: FrontEnd) -> list[Utterance]:
    made = list[Utterance]()
    for kind, piece in texts(seed, split):
        items = front_end(piece.tokens)
        if any(item.word for item in items):
            text = "".join(text for text, _ in piece.tokens)
            made.append(Utterance(key=f"{split}-{len(made):06d}", kind=kind, text=text, items=tuple(items)))
        if len(made) == n:
            break
    return made


# --- Festival ---------------------------------------------------------------------------------------------------------

_IPA = "i ɪ ɛ æ ɑ ɔ ʊ u ʌ ə ɚ eɪ aɪ ɔɪ aʊ oʊ p b t d k ɡ t͡ʃ d͡ʒ f v θ ð s z ʃ ʒ h m n ŋ l ɹ w j |"  # noqa: RUF001
_FESTIVAL = (
    "iy ih eh ae aa ao uh uw ah ax er ey ay oy aw ow p b t d k g ch jh f v th dh s z sh zh hh m n ng l r w y pau"
)
_RADIO = dict(zip(items(_IPA), items(_FESTIVAL), strict=True))
_VOWELS = set(items(_FESTIVAL)[:16])
#: Words are said as told, by a lexicon of nothing else, and phrases end at punctuation.
_PROGRAM = """
(voice_cmu_us_slt_arctic_hts)
(lex.create "front_end")
(lex.set.phoneset "radio")
(lex.select "front_end")
(mapcar (lambda (mark) (lex.add.entry (list mark 'punc nil))) '("." "," ":" ";" "!" "?"))
(define (token_to_words token name) (list name))
(Parameter.set 'Phrase_Method 'cart_tree)
(set! phrase_cart_tree
  '((lisp_token_end_punc in ("?" "." ":" "!" ";")) ((BB)) ((lisp_token_end_punc in (",")) ((B)) ((n.name is 0) ((BB)) ((NB))))))
(define (say name text)
  (unwind-protect
    (let ((said (utt.synth (eval (list 'Utterance 'Text text)))))
      (utt.save.segs said (string-append name ".segs"))
      (utt.save.wave said (string-append name ".wav") 'riff))
    (print name)))
"""


def require_programs() -> None:
    """
    Raises:
        ValueError: Festival or the voice is missing; names the command that installs them.
    """
    if shutil.which("festival") is None or not Path("/usr/share/festival/voices/us/cmu_us_slt_arctic_hts").is_dir():
        raise ValueError("the voice is missing: run `apt-get install festival festvox-us-slt-hts`")


def _name(word: str) -> str:
    """How Festival calls a word; letters are no articles or pronouns."""
    return f"letter{word.lower()}" if word[0].isupper() else word.strip("'")


def _entry(item: Item) -> str:
    """A word for Festival's lexicon: each consonant belongs to the vowel after it, the last ones to the last vowel."""
    radio = [(_RADIO[ipa], stress) for ipa, stress in item.phones]
    vowels = [i for i, (phone, _) in enumerate(radio) if phone in _VOWELS]
    starts = [0, *(_onset(radio, before, after) for before, after in pairwise(vowels)), len(radio)]
    syllables = (radio[start:end] for start, end in pairwise(starts))
    spelt = " ".join(
        f"(({' '.join(phone for phone, _ in syllable)}) {int(any(stress == 1 for _, stress in syllable))})"
        for syllable in syllables
    )
    return f'(lex.add.entry \'("{_name(item.word)}" nil ({spelt})))'


#: Pairs and triples of consonants that begin English words.
_ONSETS = set(
    items(
        "p-l p-r b-l b-r t-r t-w d-r d-w k-l k-r k-w g-l g-r g-w f-l f-r th-r sh-r s-p s-t s-k s-m s-n s-l s-w "
        "p-y b-y k-y g-y f-y v-y m-y n-y hh-y s-p-l s-p-r s-t-r s-k-r s-k-w s-k-y"
    )
)


def _onset(radio: Sequence[tuple[str, int]], before: int, after: int) -> int:
    """Where the syllable of vowel `after` begins: as many consonants as can begin a word, at most three."""
    for start in range(max(before + 1, after - 3), after):
        cluster = "-".join(phone for phone, _ in radio[start:after])
        if cluster in _ONSETS or (after - start == 1 and cluster != "ng"):
            return start
    return after


def _line(number: int, items: Sequence[Item]) -> str:
    """The words with Festival's punctuation. It takes a full stop before a small letter for an abbreviation's."""
    *inner, last = items
    words = "".join(f" {_name(item.word)}" if item.word else _INNER.get(item.mark, item.mark) for item in inner)
    return f'(say "{number}" "{words.strip()}{_LAST.get(last.mark, last.mark)}")'


_INNER, _LAST = {".": ";", "-": ","}, {"-": "."}


def speak(batch: Sequence[Utterance]) -> Iterator[Said | None]:
    """Has Festival say utterances; None where it failed, or where its segments are not the phones."""
    words = {_name(item.word): item for utterance in batch for item in utterance.items if item.word}
    lines = [_line(i, utterance.items) for i, utterance in enumerate(batch)]
    with tempfile.TemporaryDirectory() as folder:
        program = "\n".join([_PROGRAM, *map(_entry, words.values()), *lines])
        subprocess.run(["festival", "--pipe"], input=program, text=True, check=True, capture_output=True, cwd=folder)
        for i, utterance in enumerate(batch):
            yield _read_said(Path(folder) / str(i), utterance.items)


def _read_said(path: Path, items: Sequence[Item]) -> Said | None:
    if not path.with_suffix(".wav").exists():
        return None
    segments = re.findall(r"^\s*([\d.]+) \d+ (\S+)", path.with_suffix(".segs").read_text(), re.MULTILINE)
    if [name for _, name in segments] != [_RADIO[ipa] for item in items for ipa, _ in item.phones]:
        return None
    waveform, rate = soundfile.read(path.with_suffix(".wav"), dtype="float32")
    resampled = AF.resample(torch.from_numpy(waveform), rate, SAMPLE_RATE, lowpass_filter_width=32)
    return resampled.numpy(), items, [float(end) for end, _ in segments]


# --- samples ----------------------------------------------------------------------------------------------------------


def place(waveform: np.ndarray, items: Sequence[Item], ends: Sequence[float]) -> tuple[np.ndarray, list[VoicePhone]]:
    """Phones with their frames, and the samples that they fill.

    The pauses at the ends become `LEAD` and `TAIL` frames, or are as long as they are if they are shorter.
    """
    bounds = [0]
    for end in ends:
        bounds.append(max(bounds[-1] + 1, round(end * SAMPLE_RATE / HOP)))
    bounds[0], bounds[-1] = max(0, bounds[1] - LEAD), min(bounds[-1], bounds[-2] + TAIL)
    frames = [end - start for start, end in pairwise(bounds)]
    phones = [(item, i, *phone) for item in items for i, phone in enumerate(item.phones)]
    placed = [
        VoicePhone(ipa, stress, (i == 0) + 2 * (i == len(item.phones) - 1), item.mark, n, item.end)
        for (item, i, ipa, stress), n in zip(phones, frames, strict=True)
    ]
    cut = waveform[bounds[0] * HOP : bounds[-1] * HOP]
    return np.pad(cut, (0, sum(frames) * HOP - len(cut))), placed


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Utterances, and the file that they fill."""

    utterances: Sequence[Utterance]
    path: Path


def make_voice(
    out: str | Path, front_end: FrontEnd, measure: Measure, *, seed: int = 0, scale: float = 1.0, workers: int = 1
) -> dict[str, Any]:
    """Writes `train-voice-0000.tar`, ..., `heldout-voice-0000.tar`, ... and `manifest.json`.

    The bytes depend on seed, scale and the installed packages. Finished shards are kept, so an interrupted run resumes.

    Args:
        out: folder; made if missing.
        front_end, measure: what the trained voice reads texts with, and what finds pitch and loudness.
        scale: factor on the number of utterances.
        workers: processes; 1 works in this one.

    Returns:
        The manifest: seed, scale, per split its utterances, those dropped, hours and shards, and sources with licences.

    Raises:
        ValueError: an argument is wrong, something must be installed, or `out` was made with another seed or scale.
    """
    if scale <= 0 or workers < 1:
        raise ValueError(f"need scale > 0 and workers >= 1, got scale {scale} and workers {workers}")
    require_programs()
    about = {"seed": seed, "scale": scale, "voice": VOICE, "sources": [asdict(source) for source in SOURCES]}
    said = {
        split: utterances(seed, split, max(1, round(N_SAMPLES[split] * scale)), front_end) for split in get_args(Split)
    }
    return write_voice(out, about, said, speak, measure, workers)


def write_voice(
    out: str | Path,
    about: Mapping[str, Any],
    said: Mapping[str, Sequence[Utterance]],
    speak: Speak,
    measure: Measure,
    workers: int,
) -> dict[str, Any]:
    """Writes shards of utterances and the manifest.

    Args:
        about: what the bytes depend on, for the manifest.
        said: split -> its utterances.

    Returns:
        The manifest: `about`, and per split its utterances, those dropped, hours and shards.

    Raises:
        ValueError: `out` was made of something else.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(about)
    if different := [key for key in about if manifest.get(key) != about[key]]:
        key = different[0]
        raise ValueError(f"out: {out} was made with {key} {manifest.get(key)}, not {about[key]}; give another folder")
    _write_json(path, manifest)  # before any shard, so that no later run mixes seeds or scales
    shards = {split: plan(out, split, some) for split, some in said.items()}
    _write_shards([shard for some in shards.values() for shard in some], speak, measure, workers)
    manifest["splits"] = {split: _describe(some) for split, some in shards.items()}
    _write_json(path, manifest)
    return manifest


def plan(out: Path, split: str, said: Sequence[Utterance]) -> list[Shard]:
    return [
        Shard(utterances=said[start : start + SHARD_SIZE], path=out / f"{split}-voice-{start // SHARD_SIZE:04d}.tar")
        for start in range(0, len(said), SHARD_SIZE)
    ]


def _write_shards(shards: Sequence[Shard], speak: Speak, measure: Measure, workers: int) -> None:
    missing = [shard for shard in shards if not shard.path.exists()]
    write = partial(write_voice_shard, speak=speak, measure=measure)
    with ExitStack() as stack:
        total = sum(len(shard.utterances) for shard in missing)
        bar = stack.enter_context(tqdm(total=total, unit="utterance", desc="voice"))
        if workers == 1 or len(missing) < 2:
            for shard in missing:
                bar.update(write(shard))
            return
        # Spawned, because the caller may run threads of PyTorch; each worker has one, as there are several.
        pool = stack.enter_context(
            ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
        )
        for count in pool.map(write, missing):  # an error cancels what has not begun
            bar.update(count)


def write_voice_shard(shard: Shard, speak: Speak, measure: Measure) -> int:
    """Writes one shard; returns how many utterances it was to hold."""
    write_shard(shard.path, samples(shard.utterances, speak, measure))
    return len(shard.utterances)


def samples(batch: Sequence[Utterance], speak: Speak, measure: Measure) -> Iterator[dict[str, Any]]:
    """Utterances as WebDataset writes them, without those that cannot be used."""
    for utterance, said in zip(batch, speak(batch), strict=True):
        if said is None:
            continue
        waveform, phones = place(*said)
        f0_T, log_power_T = measure(waveform)
        yield {
            "__key__": utterance.key,
            "flac": encode_flac(torch.from_numpy(waveform), SAMPLE_RATE),
            "f0.npy": f0_T.astype(np.float16),
            "power.npy": log_power_T.astype(np.float16),
            "json": {
                "text": utterance.text,
                "spoken": " ".join(item.word for item in utterance.items if item.word).lower(),
                "kind": utterance.kind,
                "voice": utterance.voice,
                "speaker": utterance.speaker,
                "phones": phones,
            },
        }


def _describe(shards: Sequence[Shard]) -> dict[str, Any]:
    source = ShardSource([shard.path for shard in shards], name=str(shards[0].path))
    frames = sum(phone[4] for i in range(len(source)) for phone in source[i].metadata["phones"])
    return {
        "utterances": len(source),
        "dropped": sum(len(shard.utterances) for shard in shards) - len(source),
        "hours": round(frames * HOP / SAMPLE_RATE / 3600, 3),
        "shards": [shard.path.name for shard in shards],
    }


def _write_json(path: Path, content: Any) -> None:
    """A reader sees the whole file or none, also after a crash."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=2))
    os.replace(unfinished, path)
