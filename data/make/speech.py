"""`mm data make speech`: real WebDataset shards of synthesised and human speech, with fixed held-out sets."""

from __future__ import annotations

import json
import os
import random
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.audio import SAMPLE_RATE, encode_flac, load_audio
from data.make import acoustics, recordings, sentences, templates, voices
from data.make.acoustics import uniform
from data.make.canvas import Source
from data.shards import write_shard

KINDS = ("read", "dialogue", "human")
SHARD_SIZE = 500
#: Ranges of a training clip's tempo, pitch and vocal tract, as factors.
TEMPO, PITCH, TRACT = (0.8, 1.25), (0.85, 1.2), (0.88, 1.14)
#: The first clips of a shard talk in the background of others.
N_BABBLERS = 12


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Who says what.

    Attributes:
        voice: a name from `voices.VOICES`, or of people who were recorded.
        text: as it is written; None where nobody knows.
        recording: file of a human voice.
        answer: to a held-out question with one right answer.
    """

    voice: str
    language: str
    text: str | None = None
    recording: Path | None = None
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One set of clips.

    Attributes:
        name: start of the shard names; begins with its split.
        kind: which of `KINDS` it comes with.
        task: "asr", "dialogue", or "pre-training" where there is no transcript.
        n_clips: at scale 1; fewer where there are not so many.
        choose: draws that many clips.
    """

    name: str
    kind: str
    task: str
    n_clips: int
    choose: Callable[[random.Random, int], list[Clip]]

    @property
    def is_training(self) -> bool:
        return self.name.startswith("train-")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Clips `start`, `start + 1`, ... of a part, and the file that they fill."""

    part: Part
    seed: int
    start: int
    clips: Sequence[Clip]
    path: Path


# --- parts ------------------------------------------------------------------------------------------------------------


def _spoken_clips(
    rng: random.Random, n: int, *, pools: Mapping[str, sentences.Pool], voice: Callable[[random.Random], str]
) -> list[Clip]:
    texts = sentences.draw_sentences(rng, pools, n)
    return [Clip(voice=voice(rng), language="English", text=text) for text in texts]


def read(rng: random.Random, n: int) -> list[Clip]:
    return _spoken_clips(rng, n, pools=sentences.read_pools("train"), voice=voices.draw_voice)


def seen(rng: random.Random, n: int) -> list[Clip]:
    return _spoken_clips(rng, n, pools=sentences.read_pools("heldout"), voice=voices.draw_voice)


def unseen_voice(rng: random.Random, n: int) -> list[Clip]:
    return _spoken_clips(rng, n, pools=sentences.read_pools("heldout"), voice=lambda rng: voices.UNSEEN.name)


def dialogue(rng: random.Random, n: int) -> list[Clip]:
    return _spoken_clips(rng, n, pools=sentences.question_pools("train"), voice=voices.draw_voice)


def heldout_questions(rng: random.Random, n: int) -> list[Clip]:
    """Two of three from voices heard in training, and the right answer where there is one."""
    answers = templates.closed_questions()

    def voice(rng: random.Random) -> str:
        return voices.draw_voice(rng) if rng.random() < 2 / 3 else voices.UNSEEN.name

    clips = _spoken_clips(rng, n, pools=sentences.question_pools("heldout"), voice=voice)
    return [replace(clip, answer=answers.get(clip.text or "")) for clip in clips]


def human(rng: random.Random, n: int) -> list[Clip]:
    return _recorded_clips(rng, n, recordings.foreign_recordings())


def human_english(rng: random.Random, n: int) -> list[Clip]:
    return _recorded_clips(rng, n, recordings.english_recordings())


def _recorded_clips(rng: random.Random, n: int, found: Sequence[recordings.Recording]) -> list[Clip]:
    chosen = rng.sample(found, min(n, len(found)))
    return [Clip(voice=r.voice, language=r.language, text=r.text, recording=r.path) for r in chosen]


PARTS = (
    Part(name="train-read", kind="read", task="asr", n_clips=27_000, choose=read),
    Part(name="heldout-seen", kind="read", task="asr", n_clips=600, choose=seen),
    Part(name="heldout-unseen-voice", kind="read", task="asr", n_clips=400, choose=unseen_voice),
    Part(name="train-dialogue", kind="dialogue", task="dialogue", n_clips=6_000, choose=dialogue),
    Part(name="heldout-questions", kind="dialogue", task="dialogue", n_clips=450, choose=heldout_questions),
    Part(name="train-human", kind="human", task="pre-training", n_clips=11_000, choose=human),
    Part(name="heldout-human-en", kind="human", task="asr", n_clips=600, choose=human_english),
)
SOURCES: Mapping[str, Sequence[Source]] = {
    "read": (*voices.SOURCES, *sentences.SOURCES),
    "dialogue": (*voices.SOURCES, *sentences.SOURCES),
    "human": (*recordings.SOURCES, *recordings.ENGLISH_SOURCES),
}


# --- making -----------------------------------------------------------------------------------------------------------


def make_speech(
    out: str | Path, seed: int = 0, kinds: Sequence[str] = KINDS, scale: float = 1.0, workers: int = 2
) -> dict[str, Any]:
    """Writes `train-read-0000.tar`, ..., `heldout-human-en-0000.tar` and `manifest.json`.

    The bytes depend on seed, scale and the installed packages, never on `workers`. Finished shards are kept, so an
    interrupted run resumes.

    Args:
        out: folder; made if missing.
        kinds: "read" (sentences and their transcripts), "dialogue" (questions that wait for a language model's replies),
            "human" (recordings: other languages without transcripts, English held out).
        scale: factor on the number of clips.
        workers: processes.

    Returns:
        The manifest: seed, and per kind its parts with their clips, hours and shards, and its sources with licences.

    Raises:
        ValueError: an argument is wrong, something must be installed, or `out` was made with another seed or scale.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds: {sorted(unknown)} unknown; choose from {list(KINDS)}")
    if scale <= 0 or workers < 1:
        raise ValueError(f"need scale > 0 and workers >= 1, got scale {scale} and workers {workers}")
    out = Path(out)
    manifest = _open_manifest(out / "manifest.json", seed, scale)
    if set(kinds) - {"human"}:
        voices.require_programs()
    shards = [shard for part in PARTS if part.kind in kinds for shard in plan(part, out, seed, scale)]
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "manifest.json", manifest)  # before any shard, so that no later run mixes seeds or scales
    _write_shards([shard for shard in shards if not shard.path.exists()], workers)
    for kind in dict.fromkeys(kinds):
        parts = {part.name: _describe([s for s in shards if s.part is part]) for part in PARTS if part.kind == kind}
        manifest["kinds"][kind] = {"parts": parts, "sources": [asdict(source) for source in SOURCES[kind]]}
    _write_json(out / "manifest.json", manifest)
    return manifest


def plan(part: Part, out: Path, seed: int, scale: float) -> list[Shard]:
    """The shards of a part with what each clip will say."""
    rng = random.Random(f"{seed}/{part.name}")
    clips = part.choose(rng, max(1, round(part.n_clips * scale)))
    return [
        Shard(
            part=part,
            seed=seed,
            start=start,
            clips=clips[start : start + SHARD_SIZE],
            path=out / f"{part.name}-{start // SHARD_SIZE:04d}.tar",
        )
        for start in range(0, len(clips), SHARD_SIZE)
    ]


def _write_shards(shards: Sequence[Shard], workers: int) -> None:
    # Spawned, because the caller may run threads of PyTorch; each worker has one, as there are several workers.
    with (
        tqdm(total=sum(len(shard.clips) for shard in shards), unit="clip", desc="speech") as bar,
        ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        for count in pool.map(speak_shard, shards):  # an error cancels what has not begun
            bar.update(count)


def speak_shard(shard: Shard) -> int:
    """Speaks and writes one shard; returns its number of samples."""
    others = [_voice_of(clip) for clip in shard.clips[:N_BABBLERS]] if shard.part.is_training else []
    write_shard(shard.path, (sample(shard, i, others) for i in range(len(shard.clips))))
    return len(shard.clips)


def sample(shard: Shard, index: int, others: Sequence[Tensor]) -> dict[str, Any]:
    """Clip `index` of a shard as WebDataset writes it; its random numbers depend on nothing else."""
    clip, key = shard.clips[index], f"{shard.part.name}-{shard.start + index:06d}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{shard.seed}/{key}".encode()))
        waveform = _training_waveform(clip, others) if shard.part.is_training else _clean_waveform(clip)
    about = {"voice": clip.voice, "speaker": _speaker(clip), "duration": round(len(waveform) / SAMPLE_RATE, 3)}
    return {"__key__": key, "flac": encode_flac(waveform), **annotation(shard.part, clip, about)}


def _clean_waveform(clip: Clip) -> Tensor:
    """The voice as it is, after and before a silence."""
    return acoustics.to_peak(acoustics.add_silence(_voice_of(clip)), -3)


def _training_waveform(clip: Clip, others: Sequence[Tensor]) -> Tensor:
    """The voice at another tempo and pitch, from another head, and on the way to a microphone."""
    tract, tempo, pitch = (uniform(*limits) for limits in (TRACT, TEMPO, PITCH))
    voice = acoustics.add_silence(_voice_of(clip, tempo=tempo, pitch=pitch, tract=tract))
    return acoustics.to_peak(acoustics.disturb(voice, others), uniform(*acoustics.PEAK_DB))


def _voice_of(clip: Clip, *, tempo: float = 1.0, pitch: float = 1.0, tract: float = 1.0) -> Tensor:
    """The voice alone, `(samples,)` at 16 kHz. A recording has its own tempo and pitch; only the tract can change."""
    if clip.recording is not None:
        return acoustics.trim(acoustics.vocal_tract(load_audio(clip.recording), SAMPLE_RATE, tract))
    assert clip.text is not None
    text = sentences.spoken(clip.text)
    assert text is not None, clip  # pools hold nothing else
    # The tract speeds up and raises the voice, so the synthesiser is asked for what is then left to do.
    said, rate = voices.VOICES[clip.voice].say(text, tempo=tempo / tract, pitch=pitch / tract)
    return acoustics.trim(acoustics.vocal_tract(torch.from_numpy(said), rate, tract))


def _speaker(clip: Clip) -> str:
    return clip.voice if clip.recording is not None else voices.VOICES[clip.voice].speaker


def annotation(part: Part, clip: Clip, about: Mapping[str, Any]) -> dict[str, Any]:
    """`json` and, if the words are known, `txt`: what a recogniser should write, or a question as it is written."""
    common = {"task": part.task, "kind": part.kind, "language": clip.language, **about}
    if clip.text is None:
        return {"json": common | {"conversations": [{"from": "human", "value": "<audio>"}]}}
    words = sentences.transcript(sentences.spoken(clip.text) or "")
    if part.task == "dialogue":
        turns = [{"from": "human", "value": "<audio>"}]
        about = {"transcript": words, "question": clip.text, "answer": clip.answer, "conversations": turns}
        return {"txt": clip.text, "json": common | about}
    turns = [
        {"from": "human", "value": f"<audio>\nRepeat after me in {clip.language}:"},
        {"from": "gpt", "value": words},
    ]
    return {"txt": words, "json": common | {"transcript": words, "conversations": turns}}


# --- manifest ---------------------------------------------------------------------------------------------------------


def _open_manifest(path: Path, seed: int, scale: float) -> dict[str, Any]:
    manifest = json.loads(path.read_text()) if path.exists() else {"seed": seed, "scale": scale, "kinds": {}}
    if (manifest["seed"], manifest["scale"]) != (seed, scale):
        raise ValueError(
            f"out: {path.parent} holds speech of seed {manifest['seed']} and scale {manifest['scale']}; "
            "give the same ones or another folder"
        )
    return manifest


def _write_json(path: Path, content: Any) -> None:
    """A reader sees the whole file or none, also after a crash."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=2))
    os.replace(unfinished, path)


def _describe(shards: Sequence[Shard]) -> dict[str, Any]:
    seconds = [about["duration"] for shard in shards for about in _annotations(shard.path)]
    return {"clips": len(seconds), "hours": round(sum(seconds) / 3600, 3), "shards": [s.path.name for s in shards]}


def _annotations(path: Path) -> Iterable[dict[str, Any]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                yield json.load(tar.extractfile(member))  # type: ignore[arg-type]
