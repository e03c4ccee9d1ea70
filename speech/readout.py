"""What a small adapter says, heard in the language model's own words. Not the paper's, for small budgets.

A last linear layer of few inputs cannot put every token's embedding where the language model has it. Trained to tell tokens
apart, as `speech-align` does, it puts out vectors ten times as long that hardly point there (docs/LOG.md). What it means is plain
from its scores all the same. So the language model hears the mixture of its own embeddings that the scores stand for. Frames
with nothing new to say, as in CTC, it does not hear at all: to repeat what is said several times over, with silence between,
is hard for a frozen language model, and to repeat a text is not.

Shape letters: B rows, U frames of the adapter (80 ms), C frames of a chunk, D LM width, V vocabulary, R tokens that can be heard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Frames of a row whose scores exist at one time: with 15,000 tokens, 31 MB.
CHUNK = 512


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
        self.token_ids.copy_(torch.tensor(token_ids))
        self.log_scale.fill_(math.log(10 / self.embeddings(table_VD).float().square().sum(-1).mean().item()))

    def embeddings(self, table_VD: Tensor) -> Tensor:
        """Of its tokens, `(R, D)`, out of the language model's table."""
        return table_VD[self.token_ids.long()]

    def scores(self, x_BUD: Tensor, embeddings_RD: Tensor) -> Tensor:
        """Logits `(B, U, 1 + R)`, the blank's first, FP32."""
        return F.linear(x_BUD, torch.cat([self.blank[None], embeddings_RD])).float() * self.log_scale.exp()

    def forward(self, x_BUD: Tensor, table_VD: Tensor) -> tuple[Tensor, Tensor]:
        """What the language model hears.

        Args:
            x_BUD: frames of the adapter, any number.
            table_VD: the language model's token embeddings.

        Returns:
            heard_BUD: for each frame the mixture of its tokens, the blank left out.
            is_heard_BU: False where the blank is the best, or the best token is that of the frame before.
        """
        embeddings_RD = self.embeddings(table_VD)
        before_B1 = torch.zeros(len(x_BUD), 1, dtype=torch.int64, device=x_BUD.device)
        heard, is_heard = [], []
        for x_BCD in x_BUD.split(CHUNK, dim=1):
            scores_BCR = self.scores(x_BCD, embeddings_RD)
            best_BC = scores_BCR.argmax(-1)
            is_heard.append((best_BC > 0) & (best_BC != torch.cat([before_B1, best_BC[:, :-1]], dim=1)))
            heard.append(scores_BCR[..., 1:].softmax(-1).to(embeddings_RD.dtype) @ embeddings_RD)
            before_B1 = best_BC[:, -1:]
        return torch.cat(heard, dim=1), torch.cat(is_heard, dim=1)
