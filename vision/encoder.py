"""The image encoder: a vision transformer over all tiles of a picture, with features of several layers (section 7.2).

Its blocks are timm's, so a pre-trained ViT initialises them (`vision.pretrained`). What Llama 3 adds are the gated
self-attention blocks on top, tile positions, and the concatenation of intermediate features; the realisation is that of
Llama 3.2 Vision. All gates start at zero, so a new encoder computes exactly the ViT that it was initialised from.

Shape letters: P pictures, N tiles of a picture, L tokens of a tile (class token first, then patches in reading order),
D width, F width of the features, R real tiles of all pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, PatchEmbed, QuickGELU, freeze_batch_norm_2d, resample_abs_pos_embed
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from vision.tiling import PIXEL_MEAN, PIXEL_STD, Pictures, supported_grids

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Shape of an image encoder.

    Attributes:
        tile_size: side of a tile in pixels.
        patch_size: side of a patch; with a stem, the stride of its finest stage.
        n_global_blocks: gated self-attention blocks after the ViT (8 in the paper).
        feature_layers: blocks, counted from 0, whose *input* is a feature beside the final output. The paper's layers
            4, 8, 16, 24 and 31 are blocks 3, 7, 15, 23 and 30.
        attention_bias: whether q, k, v and output projections have biases (CLIP's do, Llama 3.2 Vision's do not).
        pre_norm: a layer norm before the first block, as in CLIP.
        released_padding_quirk: reproduce Llama 3.2 Vision, whose real tokens attend to padded tiles, and to tokens that
            pad every tile to a multiple of eight. Needs batches padded to `max_tiles`. Without it padding is never seen
            and costs nothing.
        positions_per_grid: every layout of tiles has tile positions of its own, as in transformers; else a tile's row and column
            have them, whatever the layout, as in Meta's release.
        stem: name of a timm convolutional backbone that replaces the patch embedding (the hybrid of the ViT paper).
        stem_stages: which of its stages feed the encoder, finest first, as timm's `out_indices`.
    """

    tile_size: int
    patch_size: int
    width: int
    n_blocks: int
    n_heads: int
    ffn_dim: int
    n_global_blocks: int
    feature_layers: tuple[int, ...]
    max_tiles: int = 4
    norm_eps: float = 1e-5
    act: str = "gelu"
    attention_bias: bool = False
    pre_norm: bool = True
    released_padding_quirk: bool = False
    positions_per_grid: bool = False
    stem: str | None = None
    stem_stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.tile_size % self.patch_size:
            raise ValueError(f"tile_size {self.tile_size} must be a multiple of patch_size {self.patch_size}")
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} must be a multiple of n_heads {self.n_heads}")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act {self.act!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if list(self.feature_layers) != sorted(set(self.feature_layers) & set(range(self.n_blocks))):
            raise ValueError(
                f"feature_layers {self.feature_layers} must rise and lie in 0 to {self.n_blocks - 1}, "
                "the blocks of this encoder"
            )
        if bool(self.stem) != bool(self.stem_stages):
            raise ValueError(
                "stem and stem_stages go together: name a timm backbone and the stages to use, such as (3, 4)"
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def n_tokens(self) -> int:
        """Tokens of a tile, L: the patches and the class token."""
        return self.grid_size**2 + 1

    @property
    def n_padded_tiles(self) -> int | None:
        """Tiles to which every picture of a batch is padded, because the released encoder lets padding be seen; None where the
        largest picture decides."""
        return self.max_tiles if self.released_padding_quirk else None

    @property
    def feature_dim(self) -> int:
        """Width of the features, F."""
        return self.width * (1 + len(self.feature_layers))


class ConvStem(nn.Module):
    """Stages of a convolutional backbone, brought to the finest one's grid and stacked along the channels.

    Its batch norms are frozen: statistics of a few tiles are poor, and frozen ones make a tile's features its own.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, name: str, stages: tuple[int, ...], stride: int) -> None:
        super().__init__()
        backbone: Any = timm.create_model(name, features_only=True, out_indices=stages)
        if backbone.feature_info.reduction()[0] != stride:
            raise ValueError(
                f"patch_size {stride} must be the stride of the finest stem stage: "
                f"{name} stages {stages} have strides {backbone.feature_info.reduction()}"
            )
        self.num_features = sum(backbone.feature_info.channels())
        self.register_buffer("pixel_scale", torch.ones(3, 1, 1))
        self.register_buffer("pixel_shift", torch.zeros(3, 1, 1))
        self.set_pixel_statistics(backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])
        self.backbone = freeze_batch_norm_2d(backbone)

    def set_pixel_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Declares how the backbone wants pixels in 0 to 1 normalised.

        Tiles come normalised the encoder's way. The change from one to the other cannot be folded into the first
        convolution: its zero padding would then stand for another colour.
        """
        self.pixel_scale[:, 0, 0] = torch.tensor(PIXEL_STD) / torch.tensor(std)
        self.pixel_shift[:, 0, 0] = (torch.tensor(PIXEL_MEAN) - torch.tensor(mean)) / torch.tensor(std)

    def forward(self, tiles_RCHW: Tensor) -> Tensor:
        """Tiles to a map `(R, num_features, grid_size, grid_size)`."""
        pixels_RCHW = tiles_RCHW * self.pixel_scale + self.pixel_shift
        # Depthwise convolutions run over channels that lie beside each other; on a CPU 1.7 times as fast (docs/LOG.md).
        finest, *deeper = self.backbone(pixels_RCHW.contiguous(memory_format=torch.channels_last))
        return torch.cat([finest, *(F.interpolate(stage, size=finest.shape[-2:]) for stage in deeper)], dim=1)


def tile_table(config: ImageEncoderConfig, *inner: int) -> nn.Parameter:
    """Random entries `(*inner, width)` over the row and column of a tile, or over the layout and the tile's place in it."""
    n_lines = len(supported_grids(config.max_tiles)) if config.positions_per_grid else config.max_tiles
    return nn.Parameter(torch.randn(n_lines, config.max_tiles, *inner, config.width) * config.width**-0.5)


def lookup_tiles(table: Tensor, grid_P2: Tensor, n_tiles: int, *, per_grid: bool = False) -> Tensor:
    """Entries of a `tile_table` for every picture's tiles `(P, n_tiles, ...)`; of padded tiles zeros, or a layout's own."""
    if per_grid:
        grids_G2 = torch.tensor(supported_grids(table.shape[1]), device=grid_P2.device)
        layout_P = (grids_G2 == grid_P2[:, None]).all(-1).int().argmax(1)
        return table[layout_P, :n_tiles]
    index_N = torch.arange(n_tiles, device=grid_P2.device)
    rows_P1, columns_P1 = grid_P2[:, :1], grid_P2[:, 1:]
    valid_PN = index_N < rows_P1 * columns_P1
    row_PN = (index_N // columns_P1).where(valid_PN, 0)
    entries = table[row_PN, index_N % columns_P1]
    return entries * valid_PN.view(*valid_PN.shape, *[1] * (entries.ndim - 2))


class TilePositionEmbedding(nn.Module):
    """Tells the tiles of a picture apart; gated, so that it starts as nothing."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.per_grid = config.positions_per_grid
        self.embedding = tile_table(config)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, h_PNLD: Tensor, grid_P2: Tensor) -> Tensor:
        tile_PND = lookup_tiles(self.embedding, grid_P2, h_PNLD.shape[1], per_grid=self.per_grid)
        return h_PNLD + self.gate.tanh() * tile_PND[:, :, None]


class GatedPositionalEmbedding(nn.Module):
    """Positions within a tile, which a gate turns into positions within the whole picture."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.per_grid = config.positions_per_grid
        self.embedding = nn.Parameter(torch.randn(config.n_tokens, config.width) * config.width**-0.5)
        self.tile_embedding = tile_table(config, config.n_tokens)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, h_PNLD: Tensor, grid_P2: Tensor) -> Tensor:
        gate = self.gate.tanh()
        tile_PNLD = lookup_tiles(self.tile_embedding, grid_P2, h_PNLD.shape[1], per_grid=self.per_grid)
        return h_PNLD + (1 - gate) * self.embedding + gate * tile_PNLD

    @torch.no_grad()
    def resize(self, grid_size: int) -> None:
        """Interpolates both tables to tiles of `grid_size` x `grid_size` patches."""

        def resample(table_LD: Tensor) -> Tensor:
            return resample_abs_pos_embed(table_LD[None], [grid_size, grid_size])[0]

        tiles = torch.stack([torch.stack([resample(table_LD) for table_LD in row]) for row in self.tile_embedding])
        self.embedding = nn.Parameter(resample(self.embedding), requires_grad=self.embedding.requires_grad)
        self.tile_embedding = nn.Parameter(tiles, requires_grad=self.tile_embedding.requires_grad)


class EncoderBlock(Block):
    """timm's block in the shape of a configuration."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(
            config.width,
            config.n_heads,
            mlp_ratio=(config.ffn_dim + 0.5) / config.width,  # timm rounds the product down
            qkv_bias=config.attention_bias,
            act_layer=ACTIVATIONS[config.act],
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),  # type: ignore[arg-type]
        )
        if not config.attention_bias:  # timm has one switch for this bias and the MLP's
            self.attn.get_submodule("proj").register_parameter("bias", None)
        self.apply(init_weights_vit_timm)


class GatedBlock(EncoderBlock):
    """A block whose two branches pass tanh gates; the identity at first."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(config)
        self.gate_attn = nn.Parameter(torch.zeros(1))
        self.gate_ffn = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = x + self.gate_attn.tanh() * self.attn(self.norm1(x), attn_mask=attn_mask)
        return x + self.gate_ffn.tanh() * self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """Pictures to features, `(P, N, L, F)`."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        norm = partial(nn.LayerNorm, config.width, eps=config.norm_eps)
        self.patch_embed = _patch_embed(config)
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.pre_tile_positional_embedding = TilePositionEmbedding(config)
        self.gated_positional_embedding = GatedPositionalEmbedding(config)
        self.layernorm_pre = norm() if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_blocks))
        self.layernorm_post = norm()
        self.post_tile_positional_embedding = TilePositionEmbedding(config)
        self.global_blocks = nn.ModuleList(GatedBlock(config) for _ in range(config.n_global_blocks))

    def forward(self, pictures: Pictures) -> Tensor:
        """Encodes a batch of pictures; the tiles of one picture attend to each other, pictures never do.

        Args:
            pictures: tiles of this encoder's size, at most `max_tiles` a picture.

        Returns:
            features_PNLF: the final output, then the intermediate features with their channels interleaved (channel 0
                of every layer, channel 1 of every layer, ...). Zeros for padded tiles, except under the released quirk.
        """
        self._check(pictures)
        h_PNLD = self._embed(pictures)
        if self.config.released_padding_quirk:
            return self._encode_with_padding(h_PNLD, pictures)
        features_PNLF = h_PNLD.new_zeros(*h_PNLD.shape[:3], self.config.feature_dim)
        # Pictures with as many tiles run together, so there is nothing to mask and padding costs nothing.
        n_tiles_P = pictures.valid_PN.sum(-1)
        for n_tiles in n_tiles_P.unique().tolist():
            row_P = n_tiles_P == n_tiles
            features = self._encode(h_PNLD[row_P, :n_tiles], pictures.grid_P2[row_P])
            features_PNLF[row_P, :n_tiles] = features.to(features_PNLF.dtype)
        return features_PNLF

    def resize(self, tile_size: int) -> None:
        """Changes the tile size, as annealing does (7.4), by interpolating the positions. Makes new parameters."""
        self.config = dataclasses.replace(self.config, tile_size=tile_size)
        self.gated_positional_embedding.resize(self.config.grid_size)

    def _check(self, pictures: Pictures) -> None:
        n_tiles, size = pictures.tiles_PNCHW.shape[1], pictures.tiles_PNCHW.shape[-1]
        if size != self.config.tile_size:
            raise ValueError(
                f"pictures: tiles of {size} pixels do not suit this encoder's tile_size {self.config.tile_size}"
            )
        if n_tiles > self.config.max_tiles:
            raise ValueError(
                f"pictures: {n_tiles} tiles are more than this encoder's max_tiles {self.config.max_tiles}"
            )
        if self.config.released_padding_quirk and n_tiles != self.config.max_tiles:
            raise ValueError(
                "pictures: released_padding_quirk needs every picture padded to max_tiles; "
                f"use Pictures.collate(..., n_tiles={self.config.max_tiles})"
            )

    def _embed(self, pictures: Pictures) -> Tensor:
        """Patches, class token and positions, `(P, N, L, D)`."""
        valid_PN = pictures.valid_PN
        patches_RLD = self.patch_embed(pictures.tiles_PNCHW[valid_PN].to(self.class_embedding.dtype))
        # A padded tile is all zeros, and so are its patches: the embedding has no bias (positions take its part).
        h_PNLD = patches_RLD.new_zeros(*valid_PN.shape, *patches_RLD.shape[1:])
        h_PNLD[valid_PN] = patches_RLD
        h_PNLD = self.pre_tile_positional_embedding(h_PNLD, pictures.grid_P2)
        h_PNLD = torch.cat([self.class_embedding.expand(*valid_PN.shape, 1, -1), h_PNLD], dim=2)
        return self.layernorm_pre(self.gated_positional_embedding(h_PNLD, pictures.grid_P2))

    def _encode(self, h_PNLD: Tensor, grid_P2: Tensor, mask_P1SS: Tensor | None = None) -> Tensor:
        """Runs all blocks; the tiles of a picture are one sequence of S = N * L tokens."""
        n_tiles = h_PNLD.shape[1]
        h_PSD = h_PNLD.flatten(1, 2)
        taken = []
        for i, block in enumerate(self.blocks):
            if i in self.config.feature_layers:
                taken.append(h_PSD)
            h_PSD = block(h_PSD, attn_mask=mask_P1SS)
        h_PNLD = self.layernorm_post(h_PSD).unflatten(1, (n_tiles, -1))
        h_PSD = self.post_tile_positional_embedding(h_PNLD, grid_P2).flatten(1, 2)
        for block in self.global_blocks:
            h_PSD = block(h_PSD, attn_mask=mask_P1SS)
        if taken:
            h_PSD = torch.cat([h_PSD, torch.stack(taken, dim=-1).flatten(-2)], dim=-1)
        return h_PSD.unflatten(1, (n_tiles, -1))

    def _encode_with_padding(self, h_PNLD: Tensor, pictures: Pictures) -> Tensor:
        """As the released model does: padding takes part, and only padding is hidden from padding."""
        n_tokens = h_PNLD.shape[2]
        h_PNLD = F.pad(h_PNLD, (0, 0, 0, -n_tokens % 8))
        real_L = torch.arange(h_PNLD.shape[2], device=h_PNLD.device) < n_tokens
        real_PS = (pictures.valid_PN[..., None] & real_L).flatten(1)
        mask_P1SS = (real_PS[:, :, None] | real_PS[:, None, :])[:, None]
        return self._encode(h_PNLD, pictures.grid_P2, mask_P1SS)[:, :, :n_tokens]


def _patch_embed(config: ImageEncoderConfig) -> nn.Module:
    """Tiles `(R, 3, H, W)` to patches `(R, L - 1, D)`, without a bias."""
    if config.stem is None:
        return PatchEmbed(None, config.patch_size, embed_dim=config.width, bias=False)
    stem = ConvStem(config.stem, config.stem_stages, config.patch_size)
    return HybridEmbed(
        stem,
        config.tile_size,
        feature_size=config.grid_size,
        feature_ratio=config.patch_size,
        embed_dim=config.width,
        bias=False,
    )


def debug() -> ImageEncoderConfig:
    """A random encoder under 100k parameters for tests: 5 tokens a tile."""
    return ImageEncoderConfig(
        tile_size=28, patch_size=14, width=32, n_blocks=3, n_heads=2, ffn_dim=48, n_global_blocks=2,
        feature_layers=(1, 2),
    )  # fmt: skip


def hybrid_s() -> ImageEncoderConfig:
    """The bundled model's encoder: a small ViT on EfficientNet-Lite0, whose own output is among the features."""
    return ImageEncoderConfig(
        tile_size=128, patch_size=16, max_tiles=2, width=256, n_blocks=4, n_heads=4, ffn_dim=640, n_global_blocks=2,
        feature_layers=(0, 2, 3), stem="tf_efficientnet_lite0", stem_stages=(3, 4),
    )  # fmt: skip


def vit_h_14() -> ImageEncoderConfig:
    """The paper's encoder at its first resolution; fits MetaCLIP's ViT-H/14."""
    return ImageEncoderConfig(
        tile_size=224, patch_size=14, width=1280, n_blocks=32, n_heads=16, ffn_dim=5120, n_global_blocks=8,
        feature_layers=(3, 7, 15, 23, 30), act="quick_gelu", attention_bias=True,
    )  # fmt: skip


def llama3_2_vision(tile_size: int) -> ImageEncoderConfig:
    """The encoder of Llama 3.2 Vision 11B and 90B; 448 pixels for the 11B base model, 560 for the others."""
    return ImageEncoderConfig(
        tile_size=tile_size, patch_size=14, width=1280, n_blocks=32, n_heads=16, ffn_dim=5120, n_global_blocks=8,
        feature_layers=(3, 7, 15, 23, 30), released_padding_quirk=True,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], ImageEncoderConfig]] = {
    "debug": debug,
    "hybrid-s": hybrid_s,
    "vit-h-14": vit_h_14,
    "llama3.2-11b-448": partial(llama3_2_vision, 448),
    "llama3.2-11b-560": partial(llama3_2_vision, 560),
}
