"""The decode loop: over any `step(ids_B) -> logits_BV`, so that it serves text and, above, every medium."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lm.model import KVCache, Llama
from lm.sampling import Sampler, SamplingParams, StopChecker
from lm.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """What one decode step added to one row.

    Attributes:
        token_id: the token, which may be a stop token.
        text: text that became certain; empty while a character or a possible stop string is incomplete.
        finished: why the row ends with this step; None while it goes on.
    """

    token_id: int
    text: str
    finished: FinishReason | None


@dataclass(frozen=True)
class GeneratedText:
    """A finished row: its new ids (with the stop token, if one came), their text, and why it ended."""

    ids: list[int]
    text: str
    finished: FinishReason


class _Row:
    """Turns a row's tokens into steps until it is finished."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, stop_ids: Collection[int]) -> None:
        self.stream, self.stops = TextStream(tokenizer), StopChecker(params.stop)
        self.stop_ids, self.n_left = stop_ids, params.max_new_tokens
        self.finished: FinishReason | None = None

    def take(self, token_id: int) -> Step:
        self.n_left -= 1
        is_stop = token_id in self.stop_ids
        last = is_stop or self.n_left == 0
        text = "" if is_stop else self.stream.push(token_id)
        text = self.stops.push(text + self.stream.flush() if last else text)
        if self.stops.stopped or is_stop:
            self.finished = "stop"
        elif last:
            self.finished = "length"
        return Step(token_id, text + self.stops.flush() if last else text, self.finished)


def decode_loop(
    first_logits_BV: Tensor,
    step: Callable[[Tensor], Tensor],
    params: SamplingParams,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    prompt_ids: Sequence[Sequence[int]],
) -> Iterator[list[Step | None]]:
    """Samples token after token for every row until all rows are finished.

    Args:
        first_logits_BV: logits after the prompts.
        step: feeds one token per row to the model, advances its cache, and returns the next logits `(B, V)`. Rows that
            are finished get some token too; their logits are ignored. Not called once all rows are finished.
        params: how to sample, stop strings, the limit.
        tokenizer: for the text.
        stop_ids: tokens that end a row.
        prompt_ids: the rows' prompts, for the repetition penalty.

    Yields:
        One entry per row: its step, or None when it had finished before.
    """
    sampler = Sampler(params, prompt_ids)
    rows = [_Row(tokenizer, params, stop_ids) for _ in prompt_ids]
    logits_BV = first_logits_BV
    while True:
        ids_B = sampler(logits_BV)
        yield [None if row.finished else row.take(i) for row, i in zip(rows, ids_B.tolist(), strict=True)]
        if all(row.finished for row in rows):
            return
        logits_BV = step(ids_B)


#: Runs new tokens, `(ids_BT, valid_BS, cache) -> hidden_BTD`, as `Llama.hidden` does; above, with what the tokens may look at.
Decoder = Callable[[Tensor, Tensor | None, KVCache], Tensor]


@torch.inference_mode()
def decode_prompts(
    llama: Llama,
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int],
) -> Iterator[list[Step | None]]:
    """Continues prompts of any lengths as one left-padded batch; a row's answer does not depend on the others.

    Yields:
        As `decode_loop`.

    Raises:
        ValueError: no prompts, an empty one, or prompt and answer together exceed the model's `max_seq_len`.
    """
    if not prompt_ids or not all(prompt_ids):
        raise ValueError("prompt_ids: give at least one prompt, and at least one token in each")
    longest = max(map(len, prompt_ids))
    n_tokens = longest + params.max_new_tokens - 1  # the last token is never fed
    if n_tokens > llama.config.max_seq_len:
        raise ValueError(
            f"max_new_tokens: a prompt of {longest} tokens and {params.max_new_tokens} new ones exceed this model's "
            f"max_seq_len of {llama.config.max_seq_len}; lower max_new_tokens or shorten the prompt"
        )
    weight = llama.embed_tokens.weight
    ids_BT = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompt_ids], device=weight.device)
    n_padding_B1 = torch.tensor([[longest - len(ids)] for ids in prompt_ids], device=weight.device)
    valid_BS = torch.arange(n_tokens, device=weight.device) >= n_padding_B1 if n_padding_B1.any() else None
    cache = KVCache(llama.config, len(prompt_ids), n_tokens, dtype=weight.dtype, device=weight.device)

    def feed(ids_BT: Tensor) -> Tensor:
        valid = None if valid_BS is None else valid_BS[:, : cache.length + ids_BT.shape[1]]
        return llama.logits(decoder(ids_BT, valid, cache)[:, -1])

    yield from decode_loop(feed(ids_BT), lambda ids_B: feed(ids_B[:, None]), params, tokenizer, stop_ids, prompt_ids)


def collect(steps: Iterable[list[Step | None]]) -> list[GeneratedText]:
    """Runs the steps to their end and gathers each row's."""
    rows: list[list[Step]] = []
    for step_of_row in steps:
        rows = rows or [[] for _ in step_of_row]
        for row, step in zip(rows, step_of_row, strict=True):
            if step is not None:
                row.append(step)
    return [gather(row) for row in rows]


def gather(row: Sequence[Step]) -> GeneratedText:
    """A row's steps as one text."""
    finished = row[-1].finished
    assert finished is not None
    return GeneratedText([step.token_id for step in row], "".join(step.text for step in row), finished)


def generate_text(
    llama: Llama,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int],
) -> list[GeneratedText]:
    """Continues prompts with the text model alone; arguments as in `decode_prompts`."""

    def decoder(ids_BT: Tensor, valid_BS: Tensor | None, cache: KVCache) -> Tensor:
        return llama.hidden(llama.embed_tokens(ids_BT), valid_BS=valid_BS, cache=cache)

    return collect(decode_prompts(llama, decoder, tokenizer, prompt_ids, params, stop_ids))
