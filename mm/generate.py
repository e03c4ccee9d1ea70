"""Prompts with media in, text out: whole (`generate`) or as it is made (`stream`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.generate import Step, decode_loop
from lm.model import KVCache
from lm.sampling import SamplingParams

if TYPE_CHECKING:
    from mm.model import MultimodalLlama

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer. `reason` is "stop" (end token or stop string) or "length"."""

    generation: Generation


Event = TextDelta | Done


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: without special tokens and stop strings.
        tokens: sampled ids, the end token included.
        reason: "stop" (end token or stop string) or "length" (max_new_tokens or the context is full).
    """

    text: str
    tokens: list[int]
    reason: str


def generate(
    model: MultimodalLlama,
    prompt: str | Sequence[str] | None = None,
    *,
    image: Any = None,
    messages: Messages | Sequence[Messages] | None = None,
    **sampling: Any,
) -> Generation | list[Generation]:
    """Answers one prompt, or a batch of prompts (each row as if it were alone).

    Args:
        prompt: one user turn, or a list of them for a batch.
        image: a path, bytes, PIL picture or array; a list of them for one prompt with several pictures. With a list of prompts, a
            list with the pictures (or None) of each. Pictures come before the text.
        messages: a conversation `[{"role": ..., "content": ...}]` instead of a prompt, or a list of conversations.
        **sampling: fields of `lm.sampling.SamplingParams`: max_new_tokens, temperature (0 = greedy), top_k, top_p, min_p,
            repetition_penalty, seed, stop.

    Raises:
        ValueError: a broken medium, an unknown option, a prompt beyond the context, or neither prompt nor messages.
    """
    conversations, is_batch = _conversations(prompt, image, messages)
    rows = [_Row() for _ in conversations]
    for row, step in _decode(model, conversations, _sampling(sampling)):
        rows[row].add(step)
    generations = [row.generation() for row in rows]
    return generations if is_batch else generations[0]


def stream(
    model: MultimodalLlama,
    prompt: str | Messages | None = None,
    *,
    image: Any = None,
    **sampling: Any,
) -> Iterator[Event]:
    """Answers one prompt or conversation, yielding `TextDelta`s as they are made and one `Done` at the end.

    Args: as `generate`; `prompt` may also be a list of messages.
    """
    is_messages = prompt is not None and not isinstance(prompt, str)
    conversations, is_batch = _conversations(None, image, prompt) if is_messages else _conversations(prompt, image, None)
    if is_batch:
        raise ValueError("stream: takes one prompt or conversation; use generate for a batch")
    row = _Row()
    for _, step in _decode(model, conversations, _sampling(sampling)):
        row.add(step)
        if step.text:
            yield TextDelta(step.text)
    yield Done(row.generation())


class _Row:
    """Collects the steps of one row."""

    def __init__(self) -> None:
        self.text, self.tokens, self.reason = "", [], "length"

    def add(self, step: Step) -> None:
        self.text += step.text
        self.tokens.append(step.token_id)
        self.reason = step.finished or self.reason

    def generation(self) -> Generation:
        return Generation(self.text, self.tokens, self.reason)


def _sampling(options: dict[str, Any]) -> SamplingParams:
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise ValueError(f"generate: unknown option {name!r}; sampling options are {', '.join(known)}")
    return SamplingParams(**options)


def _conversations(
    prompt: str | Sequence[str] | None, image: Any, messages: Messages | Sequence[Messages] | None
) -> tuple[list[Messages], bool]:
    """Normalises the calling conventions to a list of conversations, and tells whether a batch was asked for."""
    if (prompt is None) == (messages is None) and image is None:
        raise ValueError("generate: give either a prompt or messages")
    if messages is not None:
        if prompt is not None or image is not None:
            raise ValueError("generate: with messages, put the text and the pictures into their content")
        is_batch = bool(messages) and not isinstance(messages[0], dict)
        return (list(messages) if is_batch else [messages]), is_batch  # type: ignore[list-item]
    if prompt is None or isinstance(prompt, str):
        return [_user_turn(prompt, image)], False
    images = [None] * len(prompt) if image is None else image
    if not isinstance(images, list | tuple) or len(images) != len(prompt):
        raise ValueError(f"image: a batch of {len(prompt)} prompts needs a list with the pictures (or None) of each")
    return [_user_turn(text, picture) for text, picture in zip(prompt, images, strict=True)], True


def _user_turn(prompt: str | None, image: Any) -> Messages:
    pictures = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    if prompt:
        parts.append({"type": "text", "text": prompt})
    return [{"role": "user", "content": parts}]


@torch.inference_mode()
def _decode(
    model: MultimodalLlama, conversations: Sequence[Messages], params: SamplingParams
) -> Iterator[tuple[int, Step]]:
    """Yields `(row, step)` as tokens are made."""
    processor = model.processor
    assert model.tokenizer is not None
    samples = [processor.encode(messages, add_generation_prompt=True) for messages in conversations]
    batch = processor.collate(samples, pad_side="left").to(model.device)
    n_rows, n_prompt = batch.ids_BT.shape
    n_tokens = n_prompt + params.max_new_tokens
    if n_tokens > model.config.lm.max_seq_len:
        raise ValueError(
            f"max_new_tokens: a prompt of {n_prompt} tokens and {params.max_new_tokens} new ones exceed this model's "
            f"max_seq_len of {model.config.lm.max_seq_len}; lower max_new_tokens or shorten the prompt"
        )
    cache = KVCache(model.config.lm, n_rows, n_tokens, dtype=model.lm.embed_tokens.weight.dtype, device=model.device)
    memory = model.encode_media(batch)
    valid_BS = F.pad(batch.valid_BT, (0, params.max_new_tokens), value=True) if batch.valid_BS is not None else None

    def feed(ids_BT: Tensor) -> Tensor:
        valid = None if valid_BS is None else valid_BS[:, : cache.length + ids_BT.shape[1]]
        return model.lm.logits(model.decode(ids_BT, valid_BS=valid, memory=memory, cache=cache)[:, -1])

    prompt_ids = [sample.ids for sample in samples]
    steps = decode_loop(
        feed(batch.ids_BT), lambda ids_B: feed(ids_B[:, None]), params, model.tokenizer, processor.chat.stop_ids, prompt_ids
    )
    for rows in steps:
        for row, step in enumerate(rows):
            if step is not None:
                yield row, step
