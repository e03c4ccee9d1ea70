"""What a small adapter says, heard in the language model's own words. Not the paper's, for small budgets.

A last linear layer of few inputs cannot put every token's embedding where the language model has it. Trained to tell tokens
apart, as `speech-align` does, it puts out vectors ten times as long that hardly point there (docs/LOG.md). What it means is plain
from its scores all the same. So the language model hears the mixture of its own embeddings that the scores stand for,
sharpened. Frames with nothing new to say, as in CTC, it does not hear at all: to repeat what is said several times over, with
silence between, is hard for a frozen language model, and to repeat a text is not.

The likeliest token of each frame need not make the likeliest text. Once it is decided what was said (`mm.hearing`), `as_written`
gives the language model that.

Shape letters: B rows, U frames of the adapter (80 ms), C frames of a chunk, D LM width, V vocabulary,
R tokens that can be heard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speech.hypotheses import N_SYMBOLS
from speech.streaming import StreamState, below, counts, ending, take

#: Mixtures are of scores times this: by the scores alone, a frozen language model hears many words at once, and rambles.
SHARPNESS = 3.0
#: Frames of a row whose scores exist at one time: with 15,000 tokens, 31 MB.
CHUNK = 512
#: Stands for a token where none is heard.
NOTHING = -1


@dataclass(frozen=True, kw_only=True)
class TokenReadoutState(StreamState):
    """Memory of a readout between steps.

    Attributes:
        best_B: the best token of each row's last frame, counted from 1; 0 is the blank.
    """

    best_B: Tensor


class TokenReadout(nn.Module):
    """Frames of the adapter as mixtures of the embeddings of some tokens.

    Args:
        dim: width of the language model.
        n_tokens: how many of its tokens can be heard.
    """

    def __init__(self, dim: int, n_tokens: int) -> None:
        super().__init__()
        self.token_ids: Tensor
        self.register_buffer("token_ids", torch.zeros(n_tokens, dtype=torch.int32))
        self.blank = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def start(self, token_ids: Sequence[int], table_VD: Tensor) -> None:
        """A new readout of these tokens: a frame that is exactly a token's embedding scores ten."""
        self.retoken(token_ids)
        self.log_scale.fill_(math.log(10 / self.embeddings(table_VD).float().square().sum(-1).mean().item()))

    def retoken(self, token_ids: Sequence[int]) -> None:
        """Hears other tokens than before. Nothing was learnt for any one of them: their embeddings are the language model's."""
        self.token_ids = self.token_ids.new_tensor(token_ids)

    def embeddings(self, table_VD: Tensor) -> Tensor:
        """Of its tokens, `(R, D)`, out of the language model's table."""
        return table_VD[self.token_ids.long()]

    def scores(self, x: Tensor, embeddings_RD: Tensor) -> Tensor:
        """Logits `(..., 1 + R)` of frames `(..., D)`, the blank's first, FP32."""
        x = x * self.log_scale.exp()
        # Apart, so that no gradient is computed for the embeddings, which are frozen.
        return torch.cat([F.linear(x, self.blank[None]), F.linear(x, embeddings_RD)], dim=-1).float()

    def forward(self, x_BUD: Tensor, table_VD: Tensor) -> tuple[Tensor, Tensor]:
        """What the language model hears.

        Args:
            x_BUD: frames of the adapter, any number.
            table_VD: the language model's token embeddings.

        Returns:
            heard_BUD: for each frame the mixture of its tokens, the blank left out.
            token_BU: the language model's id of the best token; -1, for nothing, where the blank is better, or the best token
                is that of the frame before.
        """
        heard_BUD, token_BU, _ = self._read(x_BUD, table_VD, self.init_state(len(x_BUD)))
        return heard_BUD, token_BU

    def likely(self, x_BUD: Tensor, table_VD: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest symbols of each frame, best first: their log probabilities and numbers, 0 the blank, `(B, U, K)`."""
        embeddings_RD = self.embeddings(table_VD)
        tops = []
        for x_BCD in x_BUD.split(CHUNK, dim=1):
            log_probs_BCR = self.scores(x_BCD, embeddings_RD).log_softmax(-1)
            tops.append(log_probs_BCR.topk(min(N_SYMBOLS, log_probs_BCR.shape[-1]), dim=-1))
        return torch.cat([top.values for top in tops], dim=1), torch.cat([top.indices for top in tops], dim=1)

    def init_state(self, batch_size: int) -> TokenReadoutState:
        """State of rows that have heard nothing."""
        return TokenReadoutState(best_B=self.token_ids.new_zeros(batch_size, dtype=torch.int64))

    def step(
        self,
        x_BUD: Tensor,
        table_VD: Tensor,
        state: TokenReadoutState,
        *,
        n_B: Tensor | None = None,
        final: bool | Tensor = False,
    ) -> tuple[Tensor, Tensor, TokenReadoutState]:
        """Reads what a stream brings next; together, what is heard in all steps is that of `forward`.

        Args:
            x_BUD: new frames of the adapter, any number, also none.
            table_VD: the language model's token embeddings.
            n_B: how many are real in each row; all when None.
            final: whether the stream ends here, for all rows or `(B,)`; the rows that end start anew in the state returned.

        Returns:
            heard_BUD, token_BU: as in `forward`; nothing past a row's end.
            state: for the next step.
        """
        n_B = counts(n_B, x_BUD)
        heard_BUD, token_BU, best_BU = self._read(x_BUD, table_VD, state)
        state = dataclasses.replace(
            state, best_B=take(torch.cat([state.best_B[:, None], best_BU], dim=1), n_B, 1)[:, 0]
        )
        final_B = ending(final, x_BUD)
        return heard_BUD, token_BU.masked_fill(~below(n_B, x_BUD.shape[1]), NOTHING), state.reset(final_B)

    def _read(self, x_BUD: Tensor, table_VD: Tensor, state: TokenReadoutState) -> tuple[Tensor, Tensor, Tensor]:
        """What frames that follow a state are heard as, as which token, and the best of each, counted from 1."""
        embeddings_RD = self.embeddings(table_VD)
        heard, best = [], []
        for x_BCD in x_BUD.split(CHUNK, dim=1):
            scores_BCR = self.scores(x_BCD, embeddings_RD)
            best.append(scores_BCR.argmax(-1))
            heard.append((SHARPNESS * scores_BCR[..., 1:]).softmax(-1).to(embeddings_RD.dtype) @ embeddings_RD)
        best_BU = torch.cat(best, dim=1)
        before_BU = torch.cat([state.best_B[:, None], best_BU[:, :-1]], dim=1)[:, : best_BU.shape[1]]
        token_BU = self.token_ids[best_BU - 1].long().masked_fill((best_BU == 0) | (best_BU == before_BU), NOTHING)
        return torch.cat(heard, dim=1), token_BU, best_BU


def as_written(heard_UD: Tensor, token_U: Tensor, tokens: Sequence[int], table_VD: Tensor) -> tuple[Tensor, Tensor]:
    """What is heard of a recording whose text is known, in the tokens of that text.

    Args:
        heard_UD, token_U: what a readout makes of the recording.
        tokens: of the text.
        table_VD: the language model's token embeddings.

    Returns:
        heard_UD, token_U: the tokens on the first frames, whose place does not matter; mixtures of those that the readout
            heard as such, so that gradients pass, embeddings of the others. As they were, if there are too few frames.
    """
    if len(tokens) > len(heard_UD):
        return heard_UD, token_U
    token_T = token_U.new_tensor(tokens)
    spelt_TD = table_VD[token_T].to(heard_UD.dtype)
    frames = (token_U != NOTHING).nonzero()[:, 0]
    for block in SequenceMatcher(None, token_U[frames].tolist(), tokens, autojunk=False).get_matching_blocks():
        spelt_TD[block.b : block.b + block.size] = heard_UD[frames[block.a : block.a + block.size]]
    rest_U = torch.full_like(token_U[len(tokens) :], NOTHING)
    return torch.cat([spelt_TD, heard_UD[len(tokens) :]]), torch.cat([token_T, rest_U])
