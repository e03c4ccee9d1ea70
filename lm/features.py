"""What a layer in the middle of the language model puts out, as features of its tokens (section 8.1.2).

While an answer is decoded, a tap collects them at the cost of keeping a reference. For a text that is there already they are
computed as if the model had generated it as the answer to an empty user prompt.

Shape letters: B rows, T tokens of this call, S tokens of a text, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lm.chat import ChatFormat
from lm.config import LlamaConfig
from lm.generate import Step
from lm.model import NO_ADAPTERS, Adapters, KVCache, Llama, SharedPrefix
from lm.tokenizer import TextStream, Tokenizer


def features_layer(config: LlamaConfig) -> int:
    """How many layers have run when features are taken: 16 of Llama 3 8B's 32, and half elsewhere."""
    return config.n_layers // 2


class LayerTap:
    """Keeps what a layer puts out each time that the model runs.

    Args:
        layer: how many layers have run by then.

    Raises:
        ValueError: the tap cannot sit there.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        if not 1 <= layer < config.n_layers:
            raise ValueError(
                f"layer: a model of {config.n_layers} layers has a tap after 1 to {config.n_layers - 1}, not {layer}"
            )
        self.layer = layer
        self.h_BTD: Tensor | None = None

    def over(self, adapters: Adapters = NO_ADAPTERS) -> Adapters:
        """Adapters with the tap before whatever sits at its place; it changes nothing."""
        next_one = adapters.get(self.layer)

        def keep(h_BTD: Tensor) -> Tensor:
            self.h_BTD = h_BTD
            return h_BTD if next_one is None else next_one(h_BTD)

        return {**adapters, self.layer: keep}


def with_features(
    steps: Iterable[list[Step | None]], tap: LayerTap
) -> Iterator[tuple[list[Step | None], Tensor | None]]:
    """Decode steps, each with the features of its tokens `(B, D)`.

    A token's features exist once it has been fed, so a step comes out when the next one is made. The last step has none: it is
    the token that ends the answer, or, where `max_new_tokens` cut it, one that was never fed.

    Args:
        steps: of `lm.generate.decode_prompts`, whose decoder runs with the tap.
    """
    previous: list[Step | None] | None = None
    for step in steps:
        if previous is not None:
            assert tap.h_BTD is not None
            yield previous, tap.h_BTD[:, -1]
        previous = step
    if previous is not None:
        yield previous, None


def empty_prompt(chat: ChatFormat) -> list[int]:
    """Ids of an empty user turn and the header of the answer."""
    return chat.encode([{"role": "user", "content": ""}], add_generation_prompt=True).ids


def text_ends(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """How many characters of the text are known after each token."""
    stream, end, ends = TextStream(tokenizer), 0, []
    for i in ids:
        end += len(stream.push(i))
        ends.append(end)
    return ends


@torch.inference_mode()
def text_features(llama: Llama, prompt_ids: Sequence[int], texts: Sequence[Sequence[int]], layer: int) -> list[Tensor]:
    """Features of texts as answers to a prompt, which runs once, and no layer beyond the last that is needed.

    Args:
        prompt_ids: usually `empty_prompt`.
        texts: token ids of each text.
        layer: how many layers run.

    Returns:
        `(S, D)` for each text; they do not depend on the other texts.
    """
    weight = llama.embed_tokens.weight
    cache = KVCache(llama.config, 1, len(prompt_ids), dtype=weight.dtype, device=weight.device)
    llama.hidden(llama.embed_tokens(_ids(prompt_ids, weight)[None]), cache=cache, n_layers=layer)
    n_B = torch.tensor([len(ids) for ids in texts], device=weight.device)
    ids_BT = pad_sequence([_ids(ids, weight) for ids in texts], batch_first=True)
    valid_BS = torch.arange(-len(prompt_ids), ids_BT.shape[1], device=weight.device) < n_B[:, None]
    h_BTD = llama.hidden(
        llama.embed_tokens(ids_BT), valid_BS=valid_BS, cache=SharedPrefix(cache, len(texts)), n_layers=layer
    )
    return [h_TD[:n] for h_TD, n in zip(h_BTD, n_B.tolist(), strict=True)]


def _ids(ids: Sequence[int], weight: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=weight.device)
