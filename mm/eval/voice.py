"""`mm eval voice`: is a voice understood, is it like the voice that it learnt from, and does it speak in time?

Held-out sentences are said from their text alone. A recogniser that this package did not train writes them down, and the training
voice's own recordings of them, which is what could be had at best.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data.shards import Sample
from data.voice import read_voice
from mm.eval.files import heldout_sources, write_report
from mm.eval.metrics import Estimate, ratio, wer, wer_by_ear
from mm.eval.recogniser import Recogniser
from mm.eval.voice_measures import Fidelity, fidelity, means, warped
from mm.eval.voice_timing import PROMPTS, Playback, TimedSpeech, play, say
from mm.model import MultimodalLlama
from mm.speaking import voice_of
from speech.voice_features import LogMelVoice, VoiceFeaturesConfig, pitch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Sentences whose latency is measured, and those that are drawn and kept as files.
N_LATENCY, N_SHOWN = 50, 4
#: Tokens of an answer that is played.
ANSWER_TOKENS = 80


@dataclass(frozen=True, kw_only=True)
class Said:
    """A held-out sentence, said by the voice and by the voice that it learnt from."""

    key: str
    text: str
    spoken: str
    recording_N: np.ndarray
    timed: TimedSpeech
    heard: str
    heard_recording: str
    fidelity: Fidelity | None


@dataclass(frozen=True, kw_only=True)
class VoiceResult:
    """A line of the table.

    Attributes:
        n: sentences, or answers.
        value, low, high: with a 95% interval where there is one.
        recording: the same of the training voice's recordings, where it means something.
    """

    metric: str
    unit: str
    n: int
    value: float
    low: float | None = None
    high: float | None = None
    recording: float | None = None


def main(
    model: str,
    shards: Path,
    out: Path,
    *,
    voice: Path | None = None,
    limit: int = 200,
    recogniser: Path | None = None,
) -> list[VoiceResult]:
    """Evaluates a voice and writes `results.json`, `report.md`, `predictions.jsonl`, `voice.png` and `samples/`.

    Args:
        model: as `MultimodalLlama.from_pretrained`.
        shards: folder of `mm data make voice`.
        voice: folder of another voice than the model's own.
        recogniser: folder of a Whisper model.

    Raises:
        ValueError: a part is missing or does not fit.
    """
    if limit < 1:
        raise ValueError(f"limit: need at least one sentence, got {limit}")
    hear = Recogniser(recogniser)
    samples = [source[i] for source in heldout_sources(shards, "voice") for i in range(len(source))][:limit]
    loaded = MultimodalLlama.from_pretrained(model)
    if voice is not None:
        from mm.voice import load_voice

        loaded.voice = load_voice(voice)
    said = [say_sentence(loaded, sample, hear) for sample in tqdm(samples, desc="speaking", unit="sentence")]
    played = [play(loaded, prompt, ANSWER_TOKENS) for prompt in tqdm(PROMPTS, desc="playing", unit="answer")]
    results = [*understood(said), *likeness(said), *speed(said), *playback(played)]
    records = [_record(s) for s in said] + [asdict(answer) for answer in played]
    write_report(out, model=voice or model, limit=limit, results=map(asdict, results), predictions=records)
    (out / "report.md").write_text(report(results, str(voice or model)))
    _keep(said, voice_of(loaded).sample_rate, out / "samples")
    draw(said, played, out / "voice.png")
    Console().print(table(results))
    return results


def say_sentence(model: MultimodalLlama, sample: Sample, hear: Recogniser) -> Said:
    """Says a sentence on one thread, and has it and its recording written down and compared."""
    features = voice_of(model).config.vocoder.features
    read, spoken = read_voice(sample, sample_rate=features.sample_rate, hop=features.hop), sample.metadata["spoken"]
    assert read.waveform_N is not None
    recording_N = read.waveform_N.numpy()
    with one_thread():
        timed = say(model, read.text)
    heard = [hear(audio, features.sample_rate) if len(audio) else "" for audio in (timed.audio, recording_N)]
    return Said(
        key=sample.key,
        text=read.text,
        spoken=spelt(spoken),
        recording_N=recording_N,
        timed=timed,
        heard=heard[0],
        heard_recording=heard[1],
        fidelity=compare(recording_N, timed.audio, features) if len(timed.audio) else None,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one core."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


def spelt(spoken: str) -> str:
    """Names of letters as people, and Whisper, write them: `F B I` is FBI."""
    return re.sub(r"\b([A-Z]) (?=[A-Z]\b)", r"\1", spoken)


def compare(recording_N: np.ndarray, made_N: np.ndarray, config: VoiceFeaturesConfig) -> Fidelity:
    """Distances along the path on which the two belong together."""
    log_mel = LogMelVoice(config)
    mel_TM, made_mel_UM = (log_mel(torch.from_numpy(x_N)[None])[0] for x_N in (recording_N, made_N))
    f0_T, made_f0_U = (torch.from_numpy(pitch(x_N, config)) for x_N in (recording_N, made_N))
    t_P, u_P = warped(mel_TM, made_mel_UM)
    return fidelity(mel_TM[t_P], made_mel_UM[u_P], f0_T[t_P], made_f0_U[u_P])


def understood(said: Sequence[Said]) -> list[VoiceResult]:
    """Word error rates: of all, of sentences with numbers, dates and the like, and of all by the letter.

    A recogniser may write `3/4` or `www.` as the text has it or as it is said; only by the letter, the former is wrong.
    """
    with_digits = [s for s in said if re.search(r"[\d$%&@]", s.text)]
    results = []
    for name, rows, by_letter in (
        ("WER", said, False),
        ("WER with digits or symbols", with_digits, False),
        ("WER by the letter", said, True),
    ):
        if not rows:
            continue
        score, control = (
            wer(heard, [s.spoken for s in rows]) if by_letter else wer_by_ear(heard, [(s.spoken, s.text) for s in rows])
            for heard in ([s.heard for s in rows], [s.heard_recording for s in rows])
        )
        results.append(_line(name, "%", len(rows), score, 100, recording=100 * control.value))
    return results


def likeness(said: Sequence[Said]) -> list[VoiceResult]:
    rows = [s.fidelity for s in said if s.fidelity is not None]
    if not rows:
        return []
    n_frames = [row.n_frames for row in rows]
    distortion = ratio([row.cepstra for row in rows], n_frames)
    voicing = ratio([row.voicing for row in rows], n_frames)
    f0 = VoiceResult(metric="F0 RMSE", unit="Hz", n=len(rows), value=means(rows)["f0_rmse_hz"])
    return [
        _line("mel-cepstral distortion", "dB", len(rows), distortion),
        f0,
        _line("voicing errors", "%", len(rows), voicing, 100),
    ]


def speed(said: Sequence[Said]) -> list[VoiceResult]:
    """Real-time factor, and first audio after the first three words."""
    seconds = [_seconds(s) for s in said]
    results = []
    if sum(seconds):
        factor = ratio([s.timed.seconds for s in said], seconds)
        results.append(_line("real-time factor, one core", "", len(said), factor))
    waits = [s.timed.first_audio for s in said if s.timed.first_audio is not None][:N_LATENCY]
    if waits:
        for share in (50, 95):
            wait = 1000 * float(np.percentile(waits, share))
            results.append(VoiceResult(metric=f"first audio, p{share}", unit="ms", n=len(waits), value=wait))
        n_words = float(np.median([s.timed.words_at_first_audio for s in said if s.timed.first_audio is not None]))
        results.append(VoiceResult(metric="words begun at first audio", unit="", n=len(waits), value=n_words))
    return results


def playback(played: Sequence[Playback]) -> list[VoiceResult]:
    """Underruns at normal speed, with the language model decoding at the same time."""
    spoken = [answer for answer in played if answer.seconds]
    if not spoken:
        return []
    values = (
        ("underruns", "", float(sum(answer.underruns for answer in spoken))),
        ("buffer that would avoid them", "s", max(answer.silence for answer in spoken)),
        ("first audio after first text, median", "ms", 1000 * float(np.median([a.first_audio for a in spoken]))),
    )
    return [VoiceResult(metric=metric, unit=unit, n=len(spoken), value=value) for metric, unit, value in values]


def _line(
    metric: str, unit: str, n: int, score: Estimate, factor: float = 1.0, recording: float | None = None
) -> VoiceResult:
    low, high = factor * score.low, factor * score.high
    return VoiceResult(
        metric=metric, unit=unit, n=n, value=factor * score.value, low=low, high=high, recording=recording
    )


def _seconds(said: Said) -> float:
    return len(said.timed.audio) / VoiceFeaturesConfig().sample_rate


def _record(said: Said) -> dict[str, Any]:
    timed = {name: value for name, value in vars(said.timed).items() if name != "audio"}
    about = {name: getattr(said, name) for name in ("key", "text", "spoken", "heard", "heard_recording")}
    return about | timed | {"fidelity": asdict(said.fidelity) if said.fidelity else None}


def _cells(result: VoiceResult) -> tuple[str, str, str, str]:
    digits = 3 if result.unit == "" and result.value < 10 and result.low is not None else 1
    value = f"{result.value:.{digits}f} {result.unit}".strip()
    if result.low is not None:
        value += f" [{result.low:.{digits}f}, {result.high:.{digits}f}]"
    recording = "" if result.recording is None else f"{result.recording:.{digits}f} {result.unit}"
    return result.metric, str(result.n), value, recording


def table(results: Sequence[VoiceResult]) -> Table:
    """For people, in 80 columns."""
    caption = "95% intervals; recording: the training voice itself; first audio: after three words, of one core's work"
    view = Table(title="Voice", caption=caption, box=SIMPLE, show_edge=False, pad_edge=False)
    view.add_column("metric")
    for heading in ("n", "voice", "recording"):
        view.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        view.add_row(*_cells(result))
    return view


def report(results: Sequence[VoiceResult], model: str) -> str:
    """The same table in Markdown."""
    lines = [f"# Voice of {model}", "", "| metric | n | voice | recording |", "|---|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(result))} |" for result in results)]) + "\n"


def _keep(said: Sequence[Said], sample_rate: int, folder: Path) -> None:
    """A few sentences as files, beside their recordings."""
    folder.mkdir(exist_ok=True)
    for s in said[:N_SHOWN]:
        soundfile.write(folder / f"{s.key}.wav", s.timed.audio, sample_rate)
        soundfile.write(folder / f"{s.key}-recording.wav", s.recording_N, sample_rate)


def draw(said: Sequence[Said], played: Sequence[Playback], path: Path) -> None:
    """Log-mel and pitch of recordings and of the voice, how long first audio takes, and how far ahead of the player it stays."""
    from matplotlib.figure import Figure  # slow to import

    shown = said[:N_SHOWN]
    figure = Figure(figsize=(12, 2.2 * (len(shown) + 1)), layout="constrained")
    axes_LD = figure.subplots(len(shown) + 1, 2, squeeze=False)
    for (left, right), s in zip(axes_LD, shown, strict=False):
        _draw_speech(left, s.recording_N, f"recording: {s.text}")
        _draw_speech(right, s.timed.audio, f"voice, heard as: {s.heard}")
    left, right = axes_LD[-1]
    left.hist([1000 * s.timed.first_audio for s in said if s.timed.first_audio is not None][:N_LATENCY], bins=20)
    left.set_title("ms of work from the third word to the first audio", fontsize=8, loc="left")
    for answer in played:
        right.plot(answer.lead, linewidth=1)
    right.axhline(0, color="black", linewidth=0.5)
    right.set_title("seconds of audio ready when the next piece comes, answers being decoded", fontsize=8, loc="left")
    figure.savefig(path, dpi=100)


def _draw_speech(axes: Axes, waveform_N: np.ndarray, title: str) -> None:
    config = VoiceFeaturesConfig()
    axes.set_title(textwrap.fill(title, 90, max_lines=2, placeholder=" ..."), fontsize=8, loc="left", parse_math=False)
    axes.tick_params(labelsize=7)
    if len(waveform_N) == 0:
        return
    mel_TM, f0_T = LogMelVoice(config)(torch.from_numpy(waveform_N)[None])[0], pitch(waveform_N, config)
    seconds = len(mel_TM) * config.hop / config.sample_rate
    axes.imshow(mel_TM.T, origin="lower", aspect="auto", extent=(0, seconds, 0, config.n_mels), cmap="magma")
    axes.set_yticks([])
    over = axes.twinx()
    over.plot(np.linspace(0, seconds, len(f0_T)), np.where(f0_T > 0, f0_T, math.nan), color="cyan", linewidth=1)
    over.set_ylim(50, 400)
    over.tick_params(labelsize=7)
