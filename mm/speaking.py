"""A voice beside the language model: text is decoded on the caller's thread, audio is made on another (section 8.2.2).

The language model is run as it is without a voice; its features are a reference to what a layer put out anyway.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from lm.features import LayerTap, empty_prompt, text_ends
from lm.generate import Step
from lm.model import KVCache
from speech.normalizer import LMFeatures
from speech.voice import Voice, VoiceStream

if TYPE_CHECKING:
    from mm.model import MultimodalLlama

#: Tokens of a given text whose features are computed at a time, and after which the language model forgets what came before.
PIECE, CONTEXT = 32, 512
#: Seconds of audio that the voice is to be ahead of its listener before the language model competes with it for the processor.
AHEAD = 1.0


@dataclass(frozen=True)
class Speech:
    """A spoken text.

    Attributes:
        audio: float32 `(samples,)`, about -1 to 1.
        skipped: what nobody can say, such as emoji, as it is written.
    """

    audio: np.ndarray
    sample_rate: int
    skipped: tuple[str, ...]


def voice_of(model: MultimodalLlama) -> Voice:
    """The model's voice.

    Raises:
        ValueError: it has none, or one that reads features of another language model.
    """
    if model.voice is None:
        raise ValueError(
            "speak: this model has no voice; put one into the folder `voice` beside its adapters (`mm voice`), "
            "or set `model.voice = mm.voice.load_voice(folder)`"
        )
    lm = model.voice.config.lm
    if lm is not None and (lm.dim != model.config.lm.dim or lm.layer >= model.config.lm.n_layers):
        raise ValueError(
            f"speak: the voice reads layer {lm.layer} of {lm.source}, {lm.dim} wide; this language model has "
            f"{model.config.lm.n_layers} layers, {model.config.lm.dim} wide: use a voice that was trained with it, "
            "or with text alone"
        )
    return model.voice


class Speaker:
    """Says the rows of a batch while they are decoded. Leaving it as a context stops it.

    Args:
        model: whose voice speaks; `tap` goes into its decoder.

    Raises:
        ValueError: the model has no voice that fits.
    """

    def __init__(self, model: MultimodalLlama, n_rows: int) -> None:
        voice = voice_of(model)
        self.sample_rate = voice.sample_rate
        self.tap = LayerTap(model.config.lm, voice.config.lm.layer) if voice.config.lm else None
        self._streams = [voice.stream() for _ in range(n_rows)]
        self._previous: Sequence[Step | None] = []
        self._said: list[list[np.ndarray]] = [[] for _ in range(n_rows)]
        self._text: queue.SimpleQueue[tuple[int, str, Tensor | None, bool] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards what follows
        self._audio: deque[tuple[int, np.ndarray]] = deque()
        self._n_to_say = 0  # pieces of text that the voice is not done with
        # By the clock, of listeners who began with the first audio.
        self._heard_until: list[float | None] = [None] * n_rows
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="voice", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.cancel()
        self._text.put(None)
        self._thread.join()

    def along(self, steps: Iterable[list[Step | None]]) -> Iterator[list[Step | None]]:
        """The same steps, heard as they pass."""
        for step in steps:
            self._take(step)
            yield step
        self._text.put(None)

    def ready(self) -> Iterator[tuple[int, np.ndarray]]:
        """Rows and the audio that was made for them meanwhile.

        While a row has less than `AHEAD`, this waits for what can be made of the text that there is: a language model writes
        faster than anyone speaks, and both at once would slow each other.
        """
        return self._pieces(lambda: self._n_to_say > 0 and self._is_short())

    def rest(self) -> Iterator[tuple[int, np.ndarray]]:
        """All the audio that is still to come, once all steps have passed."""
        return self._pieces(lambda: not self._ended)

    def speech(self, row: int) -> Speech:
        """All that a row said, once nothing is to come."""
        audio = np.concatenate([np.zeros(0, np.float32), *self._said[row]])
        return Speech(audio, self.sample_rate, tuple(self._streams[row].skipped))

    def _take(self, steps: Sequence[Step | None]) -> None:
        """Hands text on: with features once they exist, which is when the next step was made; an end has none."""
        for row, step in enumerate(self._previous):
            if step is not None and not step.finished:
                self._say(row, step.text, self.tap.h_BTD[row, -1] if self.tap else None)  # type: ignore[index]
        for row, step in enumerate(steps):
            if step is not None and step.finished:
                self._say(row, step.text, None, is_last=True)
        self._previous = steps

    def _say(self, row: int, text: str, features_F: Tensor | None, is_last: bool = False) -> None:
        with self._changed:
            self._n_to_say += 1
        self._text.put((row, text, features_F, is_last))

    def _pieces(self, expects_more: Callable[[], bool]) -> Iterator[tuple[int, np.ndarray]]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._audio or self._ended or not expects_more())
                if not self._audio:
                    if self._error is not None:
                        raise self._error
                    return
                row, audio_N = self._audio.popleft()
            self._said[row].append(audio_N)
            yield row, audio_N

    def _is_short(self) -> bool:
        return any(until is None or until - time.monotonic() < AHEAD for until in self._heard_until)

    def _run(self) -> None:
        try:
            while (item := self._text.get()) is not None:
                row, text, features_F, is_last = item
                stream = self._streams[row]
                for waveform_N in stream.finish(text) if is_last else stream.push(text, features_F):
                    self._made(row, waveform_N.cpu().numpy())
                with self._changed:
                    self._n_to_say -= 1
                    self._changed.notify_all()
        except BaseException as error:  # shown where the audio is waited for
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _made(self, row: int, audio_N: np.ndarray) -> None:
        with self._changed:
            begins = max(self._heard_until[row] or 0.0, time.monotonic())
            self._heard_until[row] = begins + len(audio_N) / self.sample_rate
            self._audio.append((row, audio_N))
            self._changed.notify_all()


def speak(model: MultimodalLlama, text: str) -> Speech:
    """Says a text.

    Raises:
        ValueError: the model has no voice that fits.
    """
    stream = voice_of(model).stream()
    pieces = [waveform_N.cpu().numpy() for waveform_N in speak_pieces(model, text, stream)]
    audio = np.concatenate([np.zeros(0, np.float32), *pieces])
    return Speech(audio, stream.voice.sample_rate, tuple(stream.skipped))


def speak_pieces(model: MultimodalLlama, text: str, stream: VoiceStream) -> Iterator[Tensor]:
    """Waveforms `(N,)` of a text, as they are made."""
    for piece, features_F in written_pieces(model, text, stream.voice.config.lm):
        yield from stream.push(piece, features_F)
    yield from stream.finish()


def written_pieces(model: MultimodalLlama, text: str, lm: LMFeatures | None) -> Iterator[tuple[str, Tensor | None]]:
    """A text as the language model would write it, token by token, with features of these; word by word if none are wanted.

    Features are as if the model had written the text as its answer to an empty prompt, as in training.
    """
    if lm is None:
        yield from ((piece, None) for piece in re.findall(r"\S+\s*|\s+", text))
        return
    tokenizer = model.processor.chat.tokenizer
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of characters, which no tokenizer takes
    ids = tokenizer.encode(text)
    ends = [*text_ends(tokenizer, ids)[:-1], len(text)]
    for start, end, features_F in zip([0, *ends], ends, _features(model, ids, lm.layer), strict=False):
        yield text[start:end], features_F


@torch.inference_mode()
def _features(model: MultimodalLlama, ids: Sequence[int], layer: int) -> Iterator[Tensor]:
    llama = model.lm
    prompt, weight = empty_prompt(model.processor.chat), llama.embed_tokens.weight
    context = min(CONTEXT, llama.config.max_seq_len - len(prompt))

    def run(some: Sequence[int], cache: KVCache) -> Tensor:
        ids_1T = torch.tensor([some], dtype=torch.int64, device=weight.device)
        return llama.hidden(llama.embed_tokens(ids_1T), cache=cache, n_layers=layer)[0]

    for first in range(0, len(ids), context):
        stretch = ids[first : first + context]
        cache = KVCache(llama.config, 1, len(prompt) + len(stretch), dtype=weight.dtype, device=weight.device)
        run(prompt, cache)
        for i in range(0, len(stretch), PIECE):
            yield from run(stretch[i : i + PIECE], cache)
