"""Image adapter: gated cross-attention from text to picture features, beside an untouched language model (section 7.2).

`CrossAdapter` is what every adapter of this kind shares; `ImageAdapter` fills it with pictures, `video.adapter` with clips.

Shape letters: B rows, T tokens of this call, D LM width, H heads, G kv heads, K head width, P pictures (of all rows),
N tiles of a picture, L tokens of a tile, F feature width, M memory tokens of a row, W memory width, X real tiles (of all rows).
Masks are boolean, True = may attend. Block parameter names are those of Hugging Face's Mllama cross-attention layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import LlamaConfig
from lm.model import Adapters, FeedForward, RMSNorm
from vision.tiling import Pictures

#: End of a span that no later picture closes: beyond every text position.
OPEN_END = torch.iinfo(torch.int64).max


def cross_layers(n_layers: int, n_blocks: int) -> tuple[int, ...]:
    """LM layers before which a cross-attention block runs: every k-th, counted back from the last layer.

    With `k = n_layers // n_blocks` this is Llama 3.2 Vision's placement (32 layers, 8 blocks: 3, 7, ..., 31) and gives
    the 405B model the 31 blocks that "after every fourth layer" of section 7.2 implies (5, 9, ..., 125).
    """
    if not 1 <= n_blocks <= n_layers:
        raise ValueError(f"n_blocks must lie between 1 and the {n_layers} layers of the language model, got {n_blocks}")
    every = n_layers // n_blocks
    return tuple(n_layers - 1 - every * i for i in reversed(range(n_blocks)))


@dataclass(frozen=True, kw_only=True)
class CrossAdapterConfig:
    """Shape of gated cross-attention blocks beside a language model.

    Attributes:
        feature_dim: width of the image encoder's output (7680 in the paper).
        layers: indices of the LM layers before which a block runs, ascending.
    """

    lm_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    feature_dim: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # a list as read from JSON
        if not self.layers or list(self.layers) != sorted({i for i in self.layers if i >= 0}):
            raise ValueError(f"layers must be ascending LM layer indices, at least one, got {self.layers}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def memory_dim(self) -> int:
        """Width of the projected features that keys and values are made of."""
        return self.lm_dim


@dataclass(frozen=True, kw_only=True)
class ImageAdapterConfig(CrossAdapterConfig):
    """Shape of the image adapter (section 7.2); attention has the language model's heads."""

    @classmethod
    def for_lm(
        cls, lm: LlamaConfig, feature_dim: int, *, every: int = 4, ffn_dim: int | None = None
    ) -> ImageAdapterConfig:
        """The paper's adapter for a language model: one block per `every` LM layers, each as wide as an LM layer."""
        if not 1 <= every <= lm.n_layers:
            raise ValueError(
                f"every must lie between 1 and the {lm.n_layers} layers of the language model, got {every}"
            )
        return cls(
            lm_dim=lm.dim,
            n_heads=lm.n_heads,
            n_kv_heads=lm.n_kv_heads,
            head_dim=lm.head_dim,
            ffn_dim=lm.ffn_dim if ffn_dim is None else ffn_dim,
            norm_eps=lm.norm_eps,
            feature_dim=feature_dim,
            layers=cross_layers(lm.n_layers, lm.n_layers // every),
        )


def picture_spans(row_P: Tensor, position_P: Tensor) -> tuple[Tensor, Tensor]:
    """Text positions of its row that see each picture, `start_P <= position < end_P` (Llama 3.2 Vision's rule).

    A picture is seen from its own token up to the next picture of its row. Pictures without a token between them share
    the end of the last one, so the text after them sees them all. Clips, among themselves, follow the same rule.

    Args:
        row_P: row of each picture's token.
        position_P: index of that token in its row, not counting padding.
    """
    position_P1, position_1P = position_P[:, None], position_P[None]
    same_row_PP = row_P[:, None] == row_P

    def first_position(candidates_PP: Tensor) -> Tensor:
        return torch.where(candidates_PP, position_1P, OPEN_END).amin(1)

    followed_P = (same_row_PP & (position_1P == position_P1 + 1)).any(1)
    last_of_run_P = first_position(same_row_PP & ~followed_P & (position_1P >= position_P1))
    return position_P, first_position(same_row_PP & (position_1P > last_of_run_P[:, None]))


@dataclass(frozen=True, kw_only=True)
class CrossMemory:
    """Keys and values of a batch's pictures (or clips) for every block; computed once, read by every chunk and decode step.

    Attributes:
        kv: LM layer index -> keys and values, each `(B, G, M, K)`.
        start_BM, end_BM: text positions `start <= position < end` see a memory token; equal where a row is padded.
    """

    kv: dict[int, tuple[Tensor, Tensor]]
    start_BM: Tensor
    end_BM: Tensor


class CrossAttention(nn.Module):
    """Grouped-query attention from text to memory, with normalised queries and keys and without positions."""

    def __init__(self, config: CrossAdapterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.lm_dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.memory_dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.memory_dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.lm_dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(..., G, K)` of projected tokens `(..., W)`."""
        k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        return self.k_norm(k), v

    def forward(self, x_BTD: Tensor, kv: tuple[Tensor, Tensor], mask_B1TM: Tensor) -> Tensor:
        q_BHTK = self.q_norm(self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, *kv, attn_mask=mask_B1TM, is_causal=False, enable_gqa=True)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))


class CrossAttentionBlock(nn.Module):
    """Cross-attention and feed-forward, each behind a tanh gate that starts at zero, so a new block changes nothing."""

    def __init__(self, config: CrossAdapterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.lm_dim, config.norm_eps)
        self.cross_attn = CrossAttention(config)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(config.lm_dim, config.norm_eps)
        self.mlp = FeedForward(config.lm_dim, config.ffn_dim)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, h_BTD: Tensor, *, kv: tuple[Tensor, Tensor], mask_B1TM: Tensor, sees_BT1: Tensor) -> Tensor:
        """Adds what the memory says to the tokens that see any of it.

        Args:
            h_BTD: LM hidden states.
            kv: this block's keys and values `(B, G, M, K)`.
            mask_B1TM: memory tokens that a text token sees; not empty in any line.
            sees_BT1: tokens that see something; the others come back bit for bit.
        """
        # The gates in the residual's dtype: an FP32 gate beside a bf16 LM would promote every later layer to FP32.
        attn_gate, mlp_gate = (
            gate.tanh().to(h_BTD.dtype) for gate in (self.cross_attn_attn_gate, self.cross_attn_mlp_gate)
        )
        x_BTD = h_BTD + attn_gate * self.cross_attn(self.input_layernorm(h_BTD), kv, mask_B1TM)
        x_BTD = x_BTD + mlp_gate * self.mlp(self.post_attention_layernorm(x_BTD))
        return torch.where(sees_BT1, x_BTD, h_BTD)

    @torch.no_grad()
    def start_from(self, other: CrossAttentionBlock, basis_DW: Tensor) -> None:
        """Begins as a block that is no smaller: of each group of heads, and of the FFN, what weighs most there.

        Args:
            basis_DW: the memory that this block sees, in terms of the other's.

        Raises:
            ValueError: the other has heads of another width, or other groups.
        """
        ours, theirs, width = self.cross_attn, other.cross_attn, self.cross_attn.head_dim
        if ours.k_norm.weight.shape != theirs.k_norm.weight.shape or len(ours.k_proj.weight) != len(
            theirs.k_proj.weight
        ):
            raise ValueError(
                f"blocks: {len(ours.k_proj.weight) // width} heads of keys, {width} wide, cannot start from "
                f"{len(theirs.k_proj.weight) // theirs.head_dim} that are {theirs.head_dim} wide"
            )
        n_groups = len(ours.k_proj.weight) // width
        query_GHKD = theirs.q_proj.weight.unflatten(0, (n_groups, -1, width))
        output_GHKD = theirs.o_proj.weight.T.unflatten(0, (n_groups, -1, width))
        n_heads = len(ours.q_proj.weight) // width // n_groups
        head_GH = output_GHKD.square().sum((2, 3)).topk(n_heads).indices.sort().values
        head_GHKD = head_GH[..., None, None].expand(-1, -1, *query_GHKD.shape[2:])
        ours.q_proj.weight.copy_(query_GHKD.gather(1, head_GHKD).flatten(0, 2))
        ours.o_proj.weight.copy_(output_GHKD.gather(1, head_GHKD).flatten(0, 2).T)
        ours.k_proj.weight.copy_(theirs.k_proj.weight @ basis_DW)
        ours.v_proj.weight.copy_(theirs.v_proj.weight @ basis_DW)
        size_X = (
            other.mlp.up_proj.weight.norm(dim=1)
            * other.mlp.gate_proj.weight.norm(dim=1)
            * other.mlp.down_proj.weight.norm(dim=0)
        )
        unit_X = size_X.topk(len(self.mlp.up_proj.weight)).indices.sort().values
        self.mlp.up_proj.weight.copy_(other.mlp.up_proj.weight[unit_X])
        self.mlp.gate_proj.weight.copy_(other.mlp.gate_proj.weight[unit_X])
        self.mlp.down_proj.weight.copy_(other.mlp.down_proj.weight[:, unit_X])
        alike = (
            (self.input_layernorm, other.input_layernorm),
            (self.post_attention_layernorm, other.post_attention_layernorm),
        )
        for mine, its in (*alike, (ours.q_norm, theirs.q_norm), (ours.k_norm, theirs.k_norm)):
            mine.weight.copy_(its.weight)
        self.cross_attn_attn_gate.copy_(other.cross_attn_attn_gate)
        self.cross_attn_mlp_gate.copy_(other.cross_attn_mlp_gate)


class CrossAdapter(nn.Module):
    """Projection of the encoder's features and the cross-attention blocks, keyed by LM layer index."""

    def __init__(self, config: CrossAdapterConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.feature_dim, config.memory_dim)
        self.blocks = nn.ModuleDict({str(layer): CrossAttentionBlock(config) for layer in config.layers})

    def layer_blocks(self) -> Iterator[tuple[int, CrossAttentionBlock]]:
        """LM layer index and the block that runs before that layer."""
        for layer, block in self.blocks.items():
            assert isinstance(block, CrossAttentionBlock)
            yield int(layer), block

    def remember(
        self, x_XLW: Tensor, picture_X: Tensor, *, row_P: Tensor, position_P: Tensor, n_rows: int
    ) -> CrossMemory:
        """Every block's keys and values, packed row by row.

        Args:
            x_XLW: projected tokens of all real tiles, in order.
            picture_X: the picture (or clip) that each tile belongs to.
            row_P: row of each picture's token.
            position_P: index of that token in its row, not counting padding.
            n_rows: rows of the batch, with and without pictures.
        """
        row_X = row_P[picture_X]
        slot_X = (row_X[:, None] == row_X).tril(-1).sum(1)  # rank of a tile among its row's
        n_slots = int(slot_X.max()) + 1

        def pack(x_XL: Tensor) -> Tensor:
            """Puts each row's tiles one after the other: `(X, L, ...)` to `(B, M, ...)`, zero where a row has fewer."""
            packed = x_XL.new_zeros(n_rows, n_slots, *x_XL.shape[1:])
            packed[row_X, slot_X] = x_XL
            return packed.flatten(1, 2)

        kv = {}
        for layer, block in self.layer_blocks():
            k_XLGK, v_XLGK = block.cross_attn.keys_values(x_XLW)
            kv[layer] = pack(k_XLGK).transpose(1, 2), pack(v_XLGK).transpose(1, 2)
        n_tokens = x_XLW.shape[1]
        start_BM, end_BM = (pack(x_P[picture_X, None].expand(-1, n_tokens)) for x_P in picture_spans(row_P, position_P))
        return CrossMemory(kv=kv, start_BM=start_BM, end_BM=end_BM)

    def bind(self, memory: CrossMemory, position_BT: Tensor) -> Adapters:
        """What `Llama.hidden` runs before each layer for the tokens of one call.

        Args:
            memory: what the tokens may look at.
            position_BT: index of each token in its row, not counting padding; -1 for padding.
        """
        position_BT1 = position_BT[..., None]
        visible_BTM = (memory.start_BM[:, None] <= position_BT1) & (position_BT1 < memory.end_BM[:, None])
        sees_BT1 = visible_BTM.any(-1, keepdim=True)
        # A token that sees nothing attends to anything, else softmax over nothing gives NaN; its result is not used.
        mask_B1TM = (visible_BTM | ~sees_BT1)[:, None]
        return {
            layer: partial(block, kv=memory.kv[layer], mask_B1TM=mask_B1TM, sees_BT1=sees_BT1)
            for layer, block in self.layer_blocks()
        }

    @torch.no_grad()
    def open_gates(self, value: float) -> None:
        """Opens every gate and zeroes the projections behind them, so that a new adapter still starts as nothing.

        A gate that starts at zero beside random projections wanders about zero and turns their sign over and over, which holds
        them back on small budgets (docs/LOG.md). This way the projections learn at once and keep their sign.
        """
        for _, block in self.layer_blocks():
            block.cross_attn_attn_gate.fill_(value)
            block.cross_attn_mlp_gate.fill_(value)
            block.cross_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()

    def gates(self) -> dict[int, tuple[float, float]]:
        """How far each block is open: LM layer index -> (tanh of its attention gate, tanh of its feed-forward gate)."""
        return {
            layer: (block.cross_attn_attn_gate.tanh().item(), block.cross_attn_mlp_gate.tanh().item())
            for layer, block in self.layer_blocks()
        }


def chain_adapters(*adapters: Adapters) -> Adapters:
    """One set of adapters that runs several; before a layer that more than one has, in the order given here."""
    chained: dict[int, Callable[[Tensor], Tensor]] = {}
    for layer, run in (item for each in adapters for item in each.items()):
        chained[layer] = partial(_run_both, chained[layer], run) if layer in chained else run
    return chained


def _run_both(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], h_BTD: Tensor) -> Tensor:
    return second(first(h_BTD))


class ImageAdapter(CrossAdapter):
    """Cross-attention to pictures."""

    def __init__(self, config: ImageAdapterConfig) -> None:
        super().__init__(config)
        self.config = config

    def memory(
        self, features_PNLF: Tensor, pictures: Pictures, *, row_P: Tensor, position_P: Tensor, n_rows: int
    ) -> CrossMemory:
        """Projects the features and computes every block's keys and values, of real tiles only.

        Args:
            features_PNLF: output of the image encoder.
            pictures: what was encoded; tells real tiles from padding.
            row_P: row of each picture's token.
            position_P: index of that token in its row, not counting padding.
            n_rows: rows of the batch, with and without pictures.
        """
        valid_PN = pictures.valid_PN
        if not len(valid_PN) == len(row_P) == len(position_P):
            raise ValueError(
                f"pictures: {len(valid_PN)} pictures for {len(row_P)} picture tokens; give one token per picture"
            )
        x_XLW = self.projection(features_PNLF[valid_PN])
        picture_X = valid_PN.nonzero()[:, 0]
        return self.remember(x_XLW, picture_X, row_P=row_P, position_P=position_P, n_rows=n_rows)
