"""When a voice's audio comes: speed and latency of its own work, and whether playing it runs dry while text is being decoded.

Speed and latency are processor time of one thread, which other programs on the machine do not change; playback is by the clock.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm.generate import AudioDelta
from mm.model import MultimodalLlama
from mm.speaking import voice_of, written_pieces

#: Words that are there when the wait for audio begins.
WORDS = 3
_WORDS = re.compile(rf"\s*(?:\S+\s+){{{WORDS - 1}}}\S+")
#: What the language model is asked while its answers are played.
PROMPTS = (
    "Tell me a short story about a cat.",
    "What can I do on a rainy day?",
    "Why is the sky blue?",
    "How do I make a cup of tea?",
    "Describe your favourite place.",
    "What is a whale?",
    "Explain how a bicycle stays upright.",
    "Write a letter to a friend.",
)


@dataclass(frozen=True, kw_only=True)
class TimedSpeech:
    """A text that was said, and what that took.

    Attributes:
        seconds: for all of it, without the language model's work.
        first_audio: seconds of it between the existence of `WORDS` words and the first audio; None for a shorter text.
        words_at_first_audio: words that had been begun when it came.
    """

    audio: np.ndarray
    skipped: tuple[str, ...]
    seconds: float
    first_audio: float | None
    words_at_first_audio: int


def say(model: MultimodalLlama, text: str) -> TimedSpeech:
    """Says a text as if a language model wrote it that takes no time. Let torch use one thread.

    Raises:
        ValueError: the model has no voice that fits.
    """
    stream, words = voice_of(model).stream(), _WORDS.match(text)
    pieces = [*written_pieces(model, text, stream.voice.config.lm)]
    audio, seconds, waited, n_written, n_words = [np.zeros(0, np.float32)], 0.0, 0.0, 0, 0
    for i in range(len(pieces) + 1):
        made = stream.push(*pieces[i]) if i < len(pieces) else stream.finish()
        n_written += len(pieces[i][0]) if i < len(pieces) else 0
        last = time.thread_time()
        while True:
            waveform_N = next(made, None)
            now = time.thread_time()
            seconds += now - last
            if len(audio) == 1 and words is not None and n_written >= words.end():
                waited += now - last
            last = now
            if waveform_N is None:
                break
            if len(audio) == 1:
                n_words = len(text[:n_written].split())
            audio.append(waveform_N.cpu().numpy())
    return TimedSpeech(
        audio=np.concatenate(audio),
        skipped=tuple(stream.skipped),
        seconds=seconds,
        first_audio=waited if words is not None and len(audio) > 1 else None,
        words_at_first_audio=n_words,
    )


@dataclass(frozen=True, kw_only=True)
class Playback:
    """Playing an answer from its first audio on, at its own speed, while it is still being written.

    Attributes:
        underruns: how often there was nothing to play before the end, and `silence` for how many seconds in all.
        first_audio: seconds from the first text to the first audio.
        lead: seconds of audio that were ready when each next piece came; negative after an underrun.
        seconds: of audio; None of it leaves the other figures without meaning.
    """

    prompt: str
    text: str
    underruns: int
    silence: float
    first_audio: float
    lead: tuple[float, ...]
    seconds: float


def play(model: MultimodalLlama, prompt: str, max_new_tokens: int) -> Playback:
    """Has a prompt answered and spoken, with the arrival of every piece noted."""
    came: list[tuple[float, float]] = []  # when, and for how long it plays
    text, began = "", None
    for event in model.stream(prompt, max_new_tokens=max_new_tokens, speak=True):
        began = time.perf_counter() if began is None else began
        if isinstance(event, AudioDelta):
            came.append((time.perf_counter() - began, len(event.audio) / event.sample_rate))
        text += getattr(event, "text", "")
    underruns, silence, lead = run_dry(came)
    first = came[0][0] if came else 0.0
    return Playback(
        prompt=prompt,
        text=text,
        underruns=underruns,
        silence=silence,
        first_audio=first,
        lead=tuple(lead),
        seconds=sum(seconds for _, seconds in came),
    )


def run_dry(came: Sequence[tuple[float, float]]) -> tuple[int, float, list[float]]:
    """Underruns of a player that starts with the first piece, their seconds in all, and its lead at each next piece.

    Args:
        came: when each piece came, and for how many seconds it plays.
    """
    lead, silence, n = [], 0.0, 0
    until = came[0][0] if came else 0.0
    for i, (at, seconds) in enumerate(came):
        if i:
            lead.append(until - at)
        if at > until:
            n, silence, until = n + 1, silence + at - until, at
        until += seconds
    return n, silence, lead
