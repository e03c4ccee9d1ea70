"""What was said, by ears and language model together. Not the paper's, for small budgets.

Small ears take a word for another that sounds alike. Of all that they hold possible, the language model that listens knows best
what anybody would say; so of the ears' hypotheses the likeliest under both is heard.

Shape letters: U frames of the adapter (80 ms), K symbols, C hypotheses, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lm.model import Llama
from lm.tokenizer import Tokenizer
from speech.hypotheses import Text, likely_texts

#: Weight of the language model's log probabilities; the ears' have weight one.
LM_WEIGHT = 0.6
#: What an English text costs a language model, about, for each byte, in nats; a text is not likelier for being shorter.
USUAL_COST = 1.0
#: Most frames that are decided at a time (20 s), and tokens before them that the language model knows.
SEGMENT, CONTEXT = 256, 64


@torch.no_grad()
def what_was_said(
    lm: Llama, tokenizer: Tokenizer, start_id: int, log_probs_UK: Tensor, symbols_UK: Tensor, token_ids: list[int]
) -> list[int]:
    """Tokens of the likeliest text, as the tokenizer writes it.

    Args:
        start_id: the token that starts a text.
        log_probs_UK, symbols_UK: the likeliest symbols of each frame; 0 is the blank.
        token_ids: the token of each other symbol.
    """

    @cache
    def write(symbol: int) -> Text:
        return tuple(tokenizer.letters(token_ids[symbol - 1]))

    said: list[int] = []
    for frames in segments(symbols_UK[:, 0] == 0):
        texts, heard = zip(*likely_texts(log_probs_UK[frames], symbols_UK[frames], write), strict=True)
        before = [start_id, *tokenizer.encode(tokenizer.decode(said))[-CONTEXT:]]
        written = [tokenizer.encode(tokenizer.decode(text)) for text in texts]
        usual_C = USUAL_COST * torch.tensor([float(len(text)) for text in texts])
        scores_C = torch.tensor(heard) + LM_WEIGHT * (plausibility(lm, before, written).cpu() + usual_C)
        said += texts[int(scores_C.argmax())]
    return tokenizer.encode(tokenizer.decode(said).removeprefix(" "))


def segments(is_blank_U: Tensor) -> Iterator[slice]:
    """Parts of a recording that are decided one after the other, cut where nothing is said."""
    start, n_frames = 0, len(is_blank_U)
    while n_frames - start > SEGMENT:
        half = start + SEGMENT // 2
        pauses = is_blank_U[half : start + SEGMENT].nonzero()
        end = half + int(pauses[-1]) + 1 if len(pauses) else start + SEGMENT
        yield slice(start, end)
        start = end
    yield slice(start, n_frames)


def plausibility(lm: Llama, before: list[int], texts: list[list[int]]) -> Tensor:
    """Log probability `(C,)` of each text after the tokens before it."""
    longest = max(len(text) for text in texts)
    ids_CT = torch.tensor(
        [before + text + [0] * (longest - len(text)) for text in texts], device=lm.embed_tokens.weight.device
    )
    hidden_CTD = lm.hidden(lm.embed_tokens(ids_CT))[:, len(before) - 1 :]
    scores = []
    for hidden_TD, text in zip(hidden_CTD, texts, strict=True):  # one by one: there may be many logits
        log_probs_TV = lm.logits(hidden_TD[: len(text)]).float().log_softmax(-1)
        scores.append(log_probs_TV[range(len(text)), text].sum())
    return torch.stack(scores)
