"""Prompts with media in, text and speech out: whole (`generate`) or as it is made (`stream`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lm.features import LayerTap
from lm.generate import GeneratedText, Step, collect, decode_prompts, gather
from lm.model import KVCache
from lm.sampling import SamplingParams
from mm.processor import Style
from mm.speaking import Speaker, Speech

if TYPE_CHECKING:
    from mm.model import MultimodalLlama

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class AudioDelta:
    """A piece of the spoken answer, float32 `(samples,)`; the next one begins where it ends."""

    audio: np.ndarray
    sample_rate: int


@dataclass(frozen=True)
class Done:
    """The end of an answer. `reason` is "stop" (end token or stop string) or "length"."""

    generation: Generation


Event = TextDelta | AudioDelta | Done


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: without special tokens and stop strings.
        tokens: sampled ids, the end token included.
        reason: "stop" (end token or stop string) or "length" (max_new_tokens or the context is full).
        audio: the text as speech, float32 `(samples,)`; None unless it was to be spoken. Comparisons leave it out.
        sample_rate: of the audio, in Hz.
        skipped: what is in the text and nobody can say, such as emoji.
    """

    text: str
    tokens: list[int]
    reason: str
    audio: np.ndarray | None = field(default=None, compare=False)
    sample_rate: int | None = None
    skipped: tuple[str, ...] = ()


def generate(
    model: MultimodalLlama,
    prompt: str | Sequence[str] | None = None,
    *,
    image: Any = None,
    video: Any = None,
    audio: Any = None,
    messages: Messages | Sequence[Messages] | None = None,
    style: Style = "chat",
    speak: bool = False,
    **sampling: Any,
) -> Generation | list[Generation]:
    """Answers one prompt, or a batch of prompts (each row as if it were alone).

    Args:
        prompt: one user turn, or a list of them for a batch.
        image: a path, bytes, PIL picture or array; a list of them for one prompt with several pictures. With a list of prompts, a
            list with the pictures (or None) of each. Pictures come before the text.
        video: a path, bytes or `(T, C, H, W)` array; lists as for `image`. Clips come after pictures, before recordings.
        audio: a path, bytes or `(waveform, sample_rate)`; lists as for `image`. Recordings come after pictures and clips, before
            the text; without any text they are a spoken question.
        messages: a conversation `[{"role": ..., "content": ...}]` instead of a prompt, or a list of conversations.
        style: "chat" for models that follow instructions; "plain" continues media and text as a base model does.
        speak: also says the answers, while they are decoded; their texts stay the same.
        **sampling: fields of `lm.sampling.SamplingParams`: max_new_tokens, temperature (0 = greedy), top_k, top_p, min_p,
            repetition_penalty, seed, stop.

    Raises:
        ValueError: a broken medium, an unknown option, a prompt beyond the context, neither prompt nor messages, or no voice.
    """
    conversations, is_batch = _conversations(prompt, {"image": image, "video": video, "audio": audio}, messages)
    params = _sampling(sampling)
    if not speak:
        generations = [_generation(row) for row in collect(_decode(model, conversations, params, style))]
    else:
        with Speaker(model, len(conversations)) as speaker:
            rows = collect(speaker.along(_decode(model, conversations, params, style, tap=speaker.tap)))
            for _ in speaker.rest():
                pass
            generations = [_generation(row, speaker.speech(i)) for i, row in enumerate(rows)]
    return generations if is_batch else generations[0]


def stream(
    model: MultimodalLlama,
    prompt: str | Messages | None = None,
    *,
    image: Any = None,
    video: Any = None,
    audio: Any = None,
    speak: bool = False,
    **sampling: Any,
) -> Iterator[Event]:
    """Answers one prompt or conversation, yielding `TextDelta`s as they are made and one `Done` at the end.

    With `speak`, `AudioDelta`s come in between, as soon as they are made. Closing the iterator stops the voice, too.

    Args: as `generate`; `prompt` may also be a list of messages.
    """
    media = {"image": image, "video": video, "audio": audio}
    if prompt is None or isinstance(prompt, str):
        conversations, is_batch = _conversations(prompt, media, None)
    else:
        conversations, is_batch = _conversations(None, media, prompt)
    if is_batch:
        raise ValueError("stream: takes one prompt or conversation; use generate for a batch")
    params = _sampling(sampling)
    if not speak:
        yield from _stream(_decode(model, conversations, params))
        return
    with Speaker(model, 1) as speaker:
        steps = speaker.along(_decode(model, conversations, params, tap=speaker.tap))
        yield from _stream(steps, speaker)


def _stream(decoded: Iterator[list[Step | None]], speaker: Speaker | None = None) -> Iterator[Event]:
    steps = []
    for (step,) in decoded:
        assert step is not None  # the only row
        steps.append(step)
        if step.text:
            yield TextDelta(step.text)
        if speaker is not None:
            yield from (AudioDelta(audio, speaker.sample_rate) for _, audio in speaker.ready())
    if speaker is not None:
        yield from (AudioDelta(audio, speaker.sample_rate) for _, audio in speaker.rest())
    yield Done(_generation(gather(steps), speaker.speech(0) if speaker else None))


def _generation(row: GeneratedText, speech: Speech | None = None) -> Generation:
    spoken = vars(speech) if speech else {}
    return Generation(row.text, row.ids, row.finished, **spoken)


def _sampling(options: dict[str, Any]) -> SamplingParams:
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise ValueError(f"generate: unknown option {name!r}; sampling options are {', '.join(known)}")
    return SamplingParams(**options)


def _conversations(
    prompt: str | Sequence[str] | None,
    media: Mapping[str, Any],
    messages: Messages | Sequence[Messages] | None,
) -> tuple[list[Messages], bool]:
    """Normalises the calling conventions to a list of conversations, and tells whether a batch was asked for."""
    given = {kind: sources for kind, sources in media.items() if sources is not None}
    if (prompt is None) == (messages is None) and not given:
        raise ValueError("generate: give either a prompt or messages")
    if messages is not None:
        if prompt is not None or given:
            raise ValueError("generate: with messages, put the text and the media into their content")
        is_batch = bool(messages) and not isinstance(messages[0], dict)
        return (list(messages) if is_batch else [messages]), is_batch  # type: ignore[arg-type,list-item]
    if prompt is None or isinstance(prompt, str):
        return [_user_turn(prompt, given)], False
    if not prompt:
        raise ValueError("prompt: the batch is empty; give at least one")
    for kind, sources in given.items():
        if not isinstance(sources, list) or len(sources) != len(prompt):
            raise ValueError(f"{kind}: a batch of {len(prompt)} prompts needs a list with what goes with each, or None")
    return [_user_turn(text, {kind: given[kind][i] for kind in given}) for i, text in enumerate(prompt)], True


def _user_turn(prompt: str | None, media: Mapping[str, Any]) -> Messages:
    parts: list[dict[str, Any]] = []
    for kind, sources in media.items():
        sources = sources if isinstance(sources, list) else [sources]
        parts += [{"type": kind, kind: source} for source in sources if source is not None]
    if prompt:
        parts.append({"type": "text", "text": prompt})
    return [{"role": "user", "content": parts}]


def _decode(
    model: MultimodalLlama,
    conversations: Sequence[Messages],
    params: SamplingParams,
    style: Style = "chat",
    tap: LayerTap | None = None,
) -> Iterator[list[Step | None]]:
    """Steps of all rows as they are made; the tap keeps what a layer puts out."""
    processor = model.processor
    assert model.tokenizer is not None
    samples = [processor.encode(messages, style=style, add_generation_prompt=True) for messages in conversations]
    with torch.inference_mode():
        media = model.encode_media(processor.collate(samples, pad_side="left").to(model.device))

    def decoder(ids_BT: Tensor, valid_BS: Tensor | None, cache: KVCache) -> Tensor:
        seen = media if cache.length == 0 else replace(media, speech_KD=None)  # what is sampled is no audio token
        return model.decode(ids_BT, valid_BS=valid_BS, media=seen, cache=cache, tap=tap)

    prompt_ids = [sample.ids for sample in samples]
    return decode_prompts(model.lm, decoder, model.tokenizer, prompt_ids, params, processor.chat.stop_ids)
