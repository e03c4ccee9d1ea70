"""A small decoder that answers, letter by letter, from what an image encoder makes of a picture.

It is a warm start for small budgets: every answer asks the encoder for what it says, names and spelling alike, at a fraction of
what running a language model costs. The decoder is thrown away.

Shape letters: P pictures, N tiles of a picture, L tokens of a tile, F width of the features, X tokens of all tiles of a picture,
T letters, D width, V symbols.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision.encoder import ImageEncoder
from vision.tiling import Pictures

#: Symbols beside the 256 bytes of UTF-8: between question and answer, and after the answer.
ANSWER, END = 256, 257
N_SYMBOLS = 258
#: Most letters of question and answer together.
MAX_LETTERS = 160


def spell(question: str, answer: str) -> tuple[list[int], list[bool]]:
    """Ids of a question and its answer, and which of them the decoder has to say.

    Raises:
        ValueError: they are too long, or there is no answer.
    """
    asked, said = list(question.encode()), list(answer.encode())
    if not said:
        raise ValueError("there is no answer")
    if (n := len(asked) + len(said) + 2) > MAX_LETTERS:
        raise ValueError(f"question and answer have {n} letters; at most {MAX_LETTERS} can be written")
    return [*asked, ANSWER, *said, END], [False] * (len(asked) + 1) + [True] * (len(said) + 1)


class LetterDecoder(nn.Module):
    """A causal Transformer that looks at a picture's features.

    Args:
        feature_dim: F.
    """

    def __init__(self, feature_dim: int, width: int = 256, n_layers: int = 3, n_heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.projection = nn.Linear(feature_dim, width)
        self.letters = nn.Embedding(N_SYMBOLS, width)
        self.positions = nn.Parameter(torch.randn(MAX_LETTERS, width) * width**-0.5)
        layer = nn.TransformerDecoderLayer(
            width, n_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, n_layers, norm=nn.LayerNorm(width))
        self.scores = nn.Linear(width, N_SYMBOLS)

    def forward(self, features_PXF: Tensor, ids_PT: Tensor, hidden_PX: Tensor | None = None) -> Tensor:
        """Logits `(P, T, V)` of what follows each letter; `hidden_PX` is True at tokens of padded tiles."""
        n_letters = ids_PT.shape[1]
        mask_TT = nn.Transformer.generate_square_subsequent_mask(n_letters, device=ids_PT.device)
        h_PTD = self.layers(
            self.letters(ids_PT) + self.positions[:n_letters],
            self.projection(self.norm(features_PXF)),
            tgt_mask=mask_TT,
            tgt_is_causal=True,
            memory_key_padding_mask=hidden_PX,
        )
        return self.scores(h_PTD)


class LetterModel(nn.Module):
    """An image encoder and the decoder that is thrown away."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.image_encoder = encoder
        self.head = LetterDecoder(encoder.config.feature_dim)

    def forward(self, pictures: Pictures, ids_PT: Tensor) -> Tensor:
        """Logits `(P, T, V)`."""
        features_PXF, hidden_PX = self._look(pictures)
        return self.head(features_PXF, ids_PT, hidden_PX)

    @torch.no_grad()
    def answer(self, pictures: Pictures, questions: Sequence[str], max_letters: int) -> list[str]:
        """The likeliest letters, one after the other, of at most `max_letters`."""
        features_PXF, hidden_PX = self._look(pictures)
        answers = []
        for features_XF, hidden_X, question in zip(features_PXF, hidden_PX, questions, strict=True):
            ids, said = [*question.encode(), ANSWER], bytearray()
            while len(said) < max_letters and len(ids) < MAX_LETTERS:
                seen = torch.tensor([ids], device=features_PXF.device)
                best = int(self.head(features_XF[None], seen, hidden_X[None])[0, -1].argmax())
                if best in (ANSWER, END):
                    break
                ids.append(best)
                said.append(best)
            answers.append(said.decode(errors="replace"))
        return answers

    def _look(self, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Features `(P, X, F)`, and which of their tokens are padding `(P, X)`."""
        features_PNLF = self.image_encoder(pictures)
        hidden_PX = ~pictures.valid_PN.repeat_interleave(features_PNLF.shape[2], dim=1)
        return features_PNLF.flatten(1, 2), hidden_PX
