"""What a run reads: its sources, and what objectives take out of a raw sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from data.make.sentences import spoken, transcript
from data.shards import Sample as RawSample
from data.shards import Source, open_source
from data.speech import open_speech
from mm.languages import asr_prompt, ast_prompt
from mm.processor import read_mel
from mm.train.config import AugmentConfig, SourceConfig
from speech.features import LogMel

T = TypeVar("T")

#: What the user says after a recording, given the language of the text; nothing where speech is to be answered.
PROMPTS: Mapping[str | None, Callable[[str], str] | None] = {"asr": asr_prompt, "translation": ast_prompt}


def open_training_source(source: SourceConfig, *, hears: bool) -> Source:
    """Opens pictures and clips, or recordings for a stage that hears.

    Raises:
        ValueError: a missing or unsuitable file, by name.
    """
    if not hears:
        return open_source(source.path, name=source.name, image_folder=source.image_folder)
    prompt = PROMPTS.get(source.task)
    return open_speech(source.path, source.format, name=source.name, language=source.language, prompt=prompt)


def read_once(
    sources: Iterable[SourceConfig], read: Callable[[RawSample], T], *, hears: bool, unit: str
) -> Iterator[T]:
    """Something of every sample, before training; those that cannot be read are left out, and are the stream's to count."""
    for source in sources:
        opened = open_training_source(source, hears=hears)
        for i in tqdm(range(len(opened)), desc=f"reading {source.name}", unit=unit, leave=False, delay=2):
            with suppress(ValueError):
                yield read(opened[i])


def as_caption(raw: RawSample) -> list[dict[str, Any]]:
    """The sample's pictures and clips with its caption, whatever else was asked about them."""
    if raw.caption is None or not raw.caption.strip():
        raise ValueError(f"sample {raw.key!r} of {raw.source!r} has no caption (.txt), which style plain needs")
    seen = [{"type": kind, kind: source} for kind in ("image", "video") for source in media_of(raw, kind)]
    caption = {"role": "assistant", "content": [{"type": "text", "text": raw.caption.strip()}]}
    return [{"role": "user", "content": seen}, caption]


def exchanges(raw: RawSample) -> list[list[dict[str, Any]]]:
    """Each question of a sample by itself: the system's message, all media so far, what is asked, and the answer.

    Raises:
        ValueError: the assistant never speaks.
    """
    system = [message for message in raw.messages if message["role"] == "system"]
    found: list[list[dict[str, Any]]] = []
    seen: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    for message in raw.messages:
        if message["role"] == "user":
            asked += message["content"]
        elif message["role"] == "assistant":
            found.append([*system, {"role": "user", "content": seen + asked}, message])
            seen, asked = seen + [part for part in asked if part["type"] != "text"], []
    if not found:
        raise ValueError(f"sample {raw.key!r} of {raw.source!r} has no answer")
    return found


def one_exchange(raw: RawSample, *, draw: bool) -> list[dict[str, Any]]:
    """One question of a sample by itself: the first, or any if `draw`, from torch's global generator."""
    found = exchanges(raw)
    return found[int(torch.randint(len(found), ())) if draw else 0]


def split_answer(raw: RawSample, messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """A sample's messages before its first answer, and that answer; later ones may be read off those before them.

    Raises:
        ValueError: the assistant never speaks.
    """
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            return list(messages[:i]), _text(message)
    raise ValueError(f"sample {raw.key!r} of {raw.source!r} has no answer")


def first_question(messages: Sequence[dict[str, Any]]) -> str:
    """The text of the user's first turn."""
    turns = [message for message in messages if message["role"] == "user"]
    return _text(turns[0]) if turns else ""


def media_of(raw: RawSample, kind: str) -> list[Any]:
    """A sample's encoded pictures ("image"), clips ("video") or recordings ("audio") in reading order."""
    contents = [message["content"] for message in raw.messages]
    return [part[kind] for content in contents for part in content if part["type"] == kind]


def recording_of(raw: RawSample) -> Any:
    """The one recording of a sample that is nothing else.

    Raises:
        ValueError: it has none, or several.
    """
    recordings = media_of(raw, "audio")
    if len(recordings) != 1:
        raise ValueError(f"the sample has {len(recordings)} recordings; this stage learns from samples with one")
    return recordings[0]


def read_varied(source: Any, log_mel: LogMel, vary: AugmentConfig) -> Tensor:
    """Opens a recording as mel frames `(T, M)`, varied; how many there are may vary, too."""
    return vary.vary_mel(read_mel(source, log_mel, vary.vary_waveform))


def spelling_of(raw: RawSample) -> str:
    """The transcript in the alphabet of `speech.ctc`: English in lower case, numbers in words, without punctuation.

    Raises:
        ValueError: there is no transcript, or it has what no one knows the sound of, such as symbols, or foreign letters.
    """
    text = raw.metadata.get("transcript") or raw.caption
    if not text:
        raise ValueError("the sample has no transcript")
    said = spoken(text)
    if said is None:
        raise ValueError(f"the transcript {text!r} cannot be spelt with a-z, space and apostrophe")
    return transcript(said)


def _text(message: Mapping[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
