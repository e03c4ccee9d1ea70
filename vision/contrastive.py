"""Contrastive pre-training of the image encoder on pictures and their captions (section 7.2, as in CLIP and MetaCLIP).

The text tower, the tokenizer and the loss are open_clip's; after this stage only the image encoder is kept.

Shape letters: P pictures, N tiles of a picture, D encoder width, B texts, T tokens of a text, E shared width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip import ClipLoss, SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from vision.encoder import ImageEncoder
from vision.tiling import Pictures


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Shape of the text tower and of the space that it shares with pictures.

    Attributes:
        context_length: tokens of a caption, start and end included; longer captions are cut.
        embed_dim: width of the shared space.
    """

    width: int = 256
    n_layers: int = 4
    n_heads: int = 4
    context_length: int = 32
    embed_dim: int = 256

    def __post_init__(self) -> None:
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} must be a multiple of n_heads {self.n_heads}")


class ContrastiveOutput(NamedTuple):
    """Loss, and the share of pictures whose own caption is the nearest of the batch."""

    loss: Tensor
    accuracy: Tensor


class ContrastiveModel(nn.Module):
    """An image encoder and a text tower that meet in one space.

    Args:
        encoder: what is trained; its final features are used, not the intermediate ones.
        text: the tower beside it.
    """

    MAX_SCALE = 100.0  # CLIP's bound, against runaway confidence

    def __init__(self, encoder: ImageEncoder, text: TextTowerConfig) -> None:
        super().__init__()
        self.tokenizer = SimpleTokenizer(context_length=text.context_length)
        self.image_encoder = encoder
        self.image_projection = nn.Linear(encoder.config.width, text.embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=encoder.config.width**-0.5)
        self.text_encoder = TextTransformer(
            context_length=text.context_length,
            vocab_size=self.tokenizer.vocab_size,
            width=text.width,
            heads=text.n_heads,
            layers=text.n_layers,
            output_dim=text.embed_dim,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.loss = ClipLoss()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Captions to ids `(B, context_length)`, padded with zeros."""
        return self.tokenizer(list(texts))

    def embed_pictures(self, pictures: Pictures) -> Tensor:
        """Unit vectors `(P, E)`: the class token, averaged over a picture's real tiles."""
        class_PND = self.image_encoder(pictures)[:, :, 0, : self.image_encoder.config.width]
        weight_PN = pictures.valid_PN / pictures.valid_PN.sum(-1, keepdim=True)
        pooled_PD = torch.einsum("pnd,pn->pd", class_PND, weight_PN.to(class_PND.dtype))
        return F.normalize(self.image_projection(pooled_PD), dim=-1)

    def embed_texts(self, ids_BT: Tensor) -> Tensor:
        """Unit vectors `(B, E)` of tokenised captions."""
        return F.normalize(self.text_encoder(ids_BT), dim=-1)

    def forward(self, pictures: Pictures, ids_PT: Tensor) -> ContrastiveOutput:
        """Loss of a batch in which caption i belongs to picture i and to no other."""
        image_PE, text_PE = self.embed_pictures(pictures), self.embed_texts(ids_PT)
        loss = self.loss(image_PE, text_PE, self.logit_scale.exp().clamp(max=self.MAX_SCALE))
        nearest_P = (image_PE @ text_PE.T).argmax(-1)
        return ContrastiveOutput(
            loss, (nearest_P == torch.arange(len(nearest_P), device=nearest_P.device)).float().mean()
        )

    @torch.no_grad()
    def zero_shot(self, pictures: Pictures, texts: Sequence[str]) -> list[str]:
        """The nearest of the texts for each picture."""
        ids_BT = self.tokenize(texts).to(self.logit_scale.device)
        similarity_PB = self.embed_pictures(pictures) @ self.embed_texts(ids_BT).T
        return [texts[i] for i in similarity_PB.argmax(-1).tolist()]
