"""Video adapter: gated cross-attention from text to the effective frames of clips, before some image blocks (section 7.2).

Frames are encoded as pictures are, projected, merged by the temporal aggregator, and then seen as pictures are: a token sees the
latest clip at or before it, whatever pictures come between.

Shape letters: V clips of all rows, P frames of all clips, E effective frames of all clips, N tiles of a frame, L tokens of a tile,
F feature width, W aggregator width, X real tiles of all effective frames.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lm.config import LlamaConfig
from video.aggregator import AggregatorConfig, TemporalAggregator
from video.clips import Clips
from vision.adapter import (
    CrossAdapter,
    CrossAdapterConfig,
    CrossAttentionBlock,
    CrossMemory,
    ImageAdapter,
    ImageAdapterConfig,
)
from vision.encoder import ImageEncoderConfig

#: Sizes by name: index of the image block that the first video block precedes, and every how many there is another; changes to the
#: image blocks' shape; and the aggregator's shape, as wide as the language model where no width is given.
#:
#: Of the paper's we know the sums, 0.6B beside the 8B and 4.6B beside the 70B. Two and five blocks as large as image blocks take
#: 0.436B and 4.278B; the rest, about 0.16B and 0.32B, grows with the language model's width and not with its square. So the tokens
#: are as wide as the language model's, while attention and FFN inside the aggregator are as wide as the ViT-H/14, whose heads it
#: has; with the three layers of Idefics2's resampler and tiles of 448 pixels that gives 0.595B and 4.595B.
PRESETS: dict[str, dict[str, Any]] = {
    "debug": {
        "first": 0,
        "every": 1,
        "blocks": {},
        "aggregator": {
            "width": 24, "n_layers": 2, "n_heads": 3, "head_dim": 8, "ffn_dim": 32, "max_tiles": 2, "factor": 4,
            "n_time_steps": 8,
        },
    },
    "bundled": {  # 3.1M parameters: three of seven image blocks; of three such threes these saw most (docs/LOG.md)
        "first": -5,
        "every": 2,
        "blocks": {"n_heads": 6, "n_kv_heads": 3, "ffn_dim": 64},
        "aggregator": {
            "width": 192, "n_layers": 2, "n_heads": 6, "head_dim": 32, "ffn_dim": 320, "max_tiles": 1,
            "motion_channels": 64,
        },
    },
    "paper": {
        "first": 3,
        "every": 4,
        "blocks": {},
        "aggregator": {"n_layers": 3, "n_heads": 16, "head_dim": 80, "ffn_dim": 1280, "max_tiles": 4},
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VideoAdapterConfig(CrossAdapterConfig):
    """Shape of the video adapter (section 7.2).

    Attributes:
        aggregator: shape of the temporal aggregator; its `max_tiles` says into how many tiles a frame is cut at most.
    """

    aggregator: AggregatorConfig

    @property
    def memory_dim(self) -> int:
        """Width of the effective frames."""
        return self.aggregator.width

    @classmethod
    def for_lm(
        cls, lm: LlamaConfig, image: ImageAdapterConfig, encoder: ImageEncoderConfig, preset: str = "paper"
    ) -> VideoAdapterConfig:
        """An adapter beside a language model and its image adapter, in one of the sizes of `PRESETS`.

        Blocks run before every k-th image block, in the paper the fourth, the eighth, and so on.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        size = PRESETS[preset]
        layers = image.layers[size["first"] :: size["every"]]
        if not layers:
            raise ValueError(
                f"preset {preset!r} puts its first video block before image block {size['first'] + 1}, but there are only "
                f"{len(image.layers)}; give the image adapter more blocks"
            )
        aggregator = AggregatorConfig(
            **{"width": lm.dim, "n_tokens": encoder.n_tokens, "norm_eps": lm.norm_eps} | size["aggregator"]
        )
        shape = {field.name: getattr(image, field.name) for field in dataclasses.fields(CrossAdapterConfig)}
        return cls(**shape | size["blocks"] | {"layers": layers}, aggregator=aggregator)


class VideoAdapter(CrossAdapter):
    """Cross-attention to clips, through the temporal aggregator."""

    def __init__(self, config: VideoAdapterConfig) -> None:
        super().__init__(config)
        self.config = config
        self.aggregator = TemporalAggregator(config.aggregator)

    @torch.no_grad()
    def start_from(self, image: ImageAdapter, features_XLF: Tensor) -> None:
        """Begins as the image adapter, which knows what things look like and are called; what is new is time.

        Local motion, where the aggregator looks for it, is not known and starts random beside that.

        Effective frames start as means of frames, and blocks see them as the image block before the same layer sees pictures, as
        far as their size allows: tokens keep the directions in which the image adapter's projection is largest, blocks the
        heads and the FFN units with the largest weights.

        Args:
            features_XLF: the image encoder's output for anything, which tells how large tokens are.

        Raises:
            ValueError: a block is before a layer where the image adapter has none, or has other heads of keys and values.
        """
        projection = image.projection
        basis_DW = torch.linalg.svd(projection.weight.float(), full_matrices=False).U[:, : self.config.memory_dim]
        basis_DW = basis_DW.to(projection.weight.dtype)
        self.projection.weight.copy_(basis_DW.T @ projection.weight)
        self.projection.bias.copy_(basis_DW.T @ projection.bias)
        self.aggregator.start_as_mean(self.projection(features_XLF).square().mean().sqrt().item())
        for layer, block in self.layer_blocks():
            if str(layer) not in image.blocks:
                raise ValueError(
                    f"video: block {layer} has no image block to start from; those are {list(image.blocks)}"
                )
            block.start_from(cast(CrossAttentionBlock, image.blocks[str(layer)]), basis_DW)

    def effective_frames(self, features_PNLF: Tensor, clips: Clips) -> tuple[Tensor, Tensor]:
        """Projects and aggregates the features; see `TemporalAggregator.forward`."""
        return self.aggregator(self.projection(features_PNLF), clips)

    def memory(
        self, features_PNLF: Tensor, clips: Clips, *, row_V: Tensor, position_V: Tensor, n_rows: int
    ) -> CrossMemory:
        """Projects and aggregates the features, and computes every block's keys and values, of real tiles only.

        Args:
            features_PNLF: output of the image encoder for `clips.frames`.
            clips: what was encoded.
            row_V: row of each clip's token.
            position_V: index of that token in its row, not counting padding.
            n_rows: rows of the batch, with and without clips.
        """
        if not len(clips) == len(row_V) == len(position_V):
            raise ValueError(f"clips: {len(clips)} clips for {len(row_V)} clip tokens; give one token per clip")
        x_ENLW, n_effective_V = self.effective_frames(features_PNLF, clips)
        clip_E = torch.arange(len(clips), device=n_effective_V.device).repeat_interleave(n_effective_V)
        valid_EN = clips.valid_VN[clip_E]
        clip_X = clip_E[valid_EN.nonzero()[:, 0]]
        return self.remember(x_ENLW[valid_EN], clip_X, row_P=row_V, position_P=position_V, n_rows=n_rows)

    def first_block_alone(self) -> VideoAdapter:
        """The part of this adapter up to its first block; the parameters are this one's."""
        first = self.config.layers[0]
        with torch.device("meta"):
            part = VideoAdapter(dataclasses.replace(self.config, layers=(first,)))
        part.projection, part.aggregator = self.projection, self.aggregator
        part.blocks[str(first)] = self.blocks[str(first)]
        return part

    def resize(self, grid_size: int) -> None:
        """Follows the image encoder to tiles of `grid_size` x `grid_size` patches."""
        self.aggregator.resize(grid_size)
        self.config = dataclasses.replace(self.config, aggregator=self.aggregator.config)

    def regroup(self, factor: int) -> None:
        """Changes how many frames become one: 16 in pre-training, 32 in finetuning (7.5.2)."""
        self.aggregator.regroup(factor)
        self.config = dataclasses.replace(self.config, aggregator=self.aggregator.config)
