"""Next-token loss that never holds the logits of a batch, nor computes twice what all its rows begin with.

Shape letters: B rows, T tokens, N supervised tokens of a batch, D LM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.model import KVCache, SharedPrefix
from mm.model import MultimodalLlama
from mm.processor import Batch, Sample

#: Supervised tokens whose logits exist at one time: at a vocabulary of 128k, 256 rows are 131 MB.
CHUNK = 256


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of N tokens through a frozen output head.

    The gradient of the hidden states is made along with the loss, chunk by chunk, so logits are computed once and not kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grads: list[Tensor] = []
        for hidden, target in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
                loss = F.cross_entropy(head(hidden).float(), target, reduction="sum")
            if ctx.needs_input_grad[0]:
                grads += torch.autograd.grad(loss, hidden)
            total += loss.detach()
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_outputs[0].to(grad_ND.dtype) * grad_ND, None, None, None


def count_targets(sample: Sample) -> int:
    """Supervised tokens of a sample that something predicts: the first id of a row has nothing before it."""
    return sum(sample.supervised[1:])


def count_shared(model: MultimodalLlama, batch: Batch) -> int:
    """How many tokens all rows begin with that nothing under training can change, such as a system prompt.

    They end before the first medium, and before the first token whose successor is supervised.
    """
    ids_BT, config = batch.ids_BT, model.config
    shared_BT = batch.valid_BT & (ids_BT == ids_BT[:1]) & (ids_BT < config.lm.vocab_size)
    for media_id in config.media_ids.values():
        shared_BT &= ids_BT != media_id
    shared_BT[:, :-1] &= ~batch.supervised_BT[:, 1:]
    shared_BT[:, -1] = False  # something is left to compute
    return int(shared_BT.all(0).long().cumprod(0).sum())


def hidden_after(model: MultimodalLlama, batch: Batch, n_shared: int) -> Tensor:
    """Decoder output `(B, T - n_shared, D)` of what follows the first `n_shared` tokens, which run once, as one row.

    It is that of `model.hidden` to rounding. In the bundled model's chat format a third of the tokens is shared (docs/LOG.md).
    """
    media = model.encode_media(batch)
    weight = model.lm.embed_tokens.weight
    prefix = KVCache(model.config.lm, 1, n_shared, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        model.decode(batch.ids_BT[:1, :n_shared], cache=prefix)
    rest_BT = batch.ids_BT[:, n_shared:]
    return model.decode(rest_BT, valid_BS=batch.valid_BS, media=media, cache=SharedPrefix(prefix, len(rest_BT)))


def next_token_loss(model: MultimodalLlama, batch: Batch, chunk: int = CHUNK) -> Tensor:
    """Sum of the cross-entropies of the batch's supervised tokens, FP32; the caller divides by the global count.

    Raises:
        ValueError: a supervised token lies beyond the language model's vocabulary.
    """
    supervised_BT = batch.supervised_BT[:, 1:]
    target_N = batch.ids_BT[:, 1:][supervised_BT]
    if target_N.numel() and int(target_N.max()) >= model.config.lm.vocab_size:
        raise ValueError("supervised: a token beyond the vocabulary, such as a picture's, cannot be predicted; mask it")
    n_shared = count_shared(model, batch)
    hidden_BTD = hidden_after(model, batch, n_shared) if n_shared else model.hidden(batch)
    hidden_ND = hidden_BTD[:, :-1][supervised_BT[:, n_shared:]]
    return ChunkedCrossEntropy.apply(hidden_ND, target_N, model.lm.logits, chunk)
