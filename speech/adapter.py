"""The speech adapter: encoder frames to embeddings of the language model, one for every 80 ms (section 8.2.1).

A convolution halves the frame rate, one rotary Transformer layer looks around, and a linear layer gives the width of the
language model. The layer is a pre-norm Llama layer (RMSNorm, SwiGLU) without a causal mask: what it makes is for a Llama to
read, and with the paper's sizes the adapter has 102M parameters for the 8B model, where the paper says about 100M.

Attention follows the encoder's rule (its own chunk and `left_chunks` before it), so what the encoder streams, the adapter
streams on. Offline is a single step from an empty state.

Shape letters: B rows, S encoder frames (40 ms), E encoder width, U tokens (80 ms), D width, H heads, K head width,
P tokens of left context.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import LlamaConfig
from lm.model import FeedForward, RMSNorm
from speech.conformer import ChunkedAttention, Chunks
from speech.readout import TokenReadout
from speech.streaming import StreamState, below, counts, ending, take

Count = TypeVar("Count", int, Tensor)

#: Sizes of the Transformer layer by name. The paper does not give its heads; these are as wide as those of the 8B and 70B models.
PRESETS: dict[str, dict[str, int]] = {
    "debug": {"dim": 32, "ffn_dim": 40, "n_heads": 2},
    "bundled": {"dim": 320, "ffn_dim": 512, "n_heads": 5},
    "paper": {"dim": 3072, "ffn_dim": 4096, "n_heads": 24},
}


@dataclass(frozen=True, kw_only=True)
class SpeechAdapterConfig:
    """Shape of a speech adapter.

    Attributes:
        kernel: encoder frames that the convolution sees: those of its token and `kernel - stride` before them.
        stride: encoder frames that become one token.
        chunk_frames: encoder frames of a chunk, as in the encoder (1500 = 60 s).
        left_chunks: chunks before its own that a token sees.
        n_readout: tokens of the language model as whose mixtures it is heard (`speech.readout`); 0: it is heard as it is, as in
            the paper.
    """

    encoder_dim: int
    lm_dim: int
    dim: int
    ffn_dim: int
    n_heads: int
    norm_eps: float = 1e-5
    kernel: int = 3
    stride: int = 2
    chunk_frames: int = 1500
    left_chunks: int = 1
    n_readout: int = 0

    def __post_init__(self) -> None:
        if self.dim % (2 * self.n_heads):
            raise ValueError(
                f"dim {self.dim} must be a multiple of twice n_heads {self.n_heads}: rotary positions turn pairs"
            )
        if not 1 <= self.stride <= self.kernel:
            raise ValueError(f"stride {self.stride} must be between 1 and kernel {self.kernel}, else frames are lost")
        if self.left_chunks < 0:
            raise ValueError(f"left_chunks must not be negative, got {self.left_chunks}")
        self.chunk_tokens()

    @classmethod
    def for_lm(cls, lm: LlamaConfig, encoder_dim: int, preset: str = "paper") -> SpeechAdapterConfig:
        """An adapter between an encoder and a language model, in one of the sizes of `PRESETS`."""
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        return cls(encoder_dim=encoder_dim, lm_dim=lm.dim, norm_eps=lm.norm_eps, **PRESETS[preset])

    def n_tokens(self, n_frames: Count) -> Count:
        """Tokens of that many encoder frames."""
        return -(-n_frames // self.stride)

    def chunk_tokens(self, chunk_frames: int | None = None) -> int:
        """Tokens of a chunk of `chunk_frames` encoder frames (the config's when None)."""
        frames = self.chunk_frames if chunk_frames is None else chunk_frames
        if frames < 1 or frames % self.stride:
            raise ValueError(f"chunk_frames must be a multiple of the stride {self.stride}, got {frames}")
        return frames // self.stride


@dataclass(frozen=True, kw_only=True)
class SpeechAdapterState(StreamState):
    """Memory of an adapter between steps.

    Attributes:
        frames_BSE: the last encoder frames, as many as a chunk has and the convolution's left context.
        n_unread_B: how many of them, at the end, wait for their chunk to fill.
        n_context_B: how many tokens, at the end of `keys` and `values`, there have been.
        keys, values: left context of the attention `(B, H, P, K)`, without rotary positions.
    """

    frames_BSE: Tensor
    n_unread_B: Tensor
    n_context_B: Tensor
    keys: Tensor
    values: Tensor


class SpeechAdapter(nn.Module):
    """Encoder frames `(B, S, E)` to embeddings `(B, U, lm_dim)`, U = ceil(S / 2)."""

    def __init__(self, config: SpeechAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv1d(config.encoder_dim, config.dim, config.kernel, config.stride)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = ChunkedAttention(config.dim, config.n_heads)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config.dim, config.ffn_dim)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.projection = nn.Linear(config.dim, config.lm_dim)
        #: Turns what `forward` and `step` put out into what is heard.
        self.readout = TokenReadout(config.lm_dim, config.n_readout) if config.n_readout else None

    @torch.no_grad()
    def match_embeddings(self, table_VD: Tensor) -> None:
        """Draws the last layer of a new adapter such that its embeddings are as large as the language model's own.

        PyTorch's default makes them several times larger, which drowns what the first layers of a frozen language model add.
        """
        rms = table_VD.float().square().mean().sqrt().item()
        self.projection.weight.normal_(std=rms * self.config.dim**-0.5)
        self.projection.bias.zero_()

    def forward(self, h_BSE: Tensor, n_B: Tensor, chunk_frames: int | None = None) -> tuple[Tensor, Tensor]:
        """Embeds whole utterances of any length.

        Args:
            h_BSE: output of the encoder; what lies past a row's end does not matter.
            n_B: encoder frames of each row.
            chunk_frames: encoder frames of a chunk, when not the config's.

        Returns:
            x_BUD: U = ceil(S / stride); a last token of too few frames is filled with zeros; zeros past a row's end.
            n_tokens_B: `ceil(n / stride)`.

        Raises:
            ValueError: the frames have another width than this adapter expects, there are none, or the lengths do not fit.
        """
        n_B = counts(n_B, h_BSE)
        self._check(h_BSE, n_B)
        if h_BSE.shape[1] == 0:
            raise ValueError("h: no frames to embed; give at least one")
        config = self.config
        n_outputs = config.n_tokens(h_BSE.shape[1])
        # A chunk no longer than the batch, and no more context than there are chunks before: no work on padding.
        size = min(config.chunk_tokens(chunk_frames), n_outputs)
        n_chunks = -(-n_outputs // size)
        state = self._empty_state(len(h_BSE), size, min(config.left_chunks, n_chunks - 1))
        h_BSE = h_BSE.to(state.frames_BSE.dtype).masked_fill(~below(n_B, h_BSE.shape[1])[..., None], 0)
        n_filled = n_chunks * size * config.stride
        h_BSE = F.pad(h_BSE, (0, 0, config.kernel - config.stride, n_filled - h_BSE.shape[1]))
        n_tokens_B = config.n_tokens(n_B)
        x_BUD, _, _ = self._embed(h_BSE, n_tokens_B, size, state)
        return x_BUD[:, :n_outputs], n_tokens_B

    def init_state(self, batch_size: int, chunk_frames: int | None = None) -> SpeechAdapterState:
        """State of rows that have heard nothing, for steps in chunks of `chunk_frames` (the config's when None)."""
        return self._empty_state(batch_size, self.config.chunk_tokens(chunk_frames), self.config.left_chunks)

    def step(
        self,
        h_BSE: Tensor,
        state: SpeechAdapterState,
        *,
        n_B: Tensor | None = None,
        final: bool | Tensor = False,
    ) -> tuple[Tensor, Tensor, SpeechAdapterState]:
        """Embeds what a stream brings next; together, the tokens of all steps are those of `forward`.

        Args:
            h_BSE: new encoder frames, any number, also none.
            n_B: how many are real in each row; all when None.
            final: whether the stream ends here, for all rows or `(B,)`; the rows that end start anew in the state returned.

        Returns:
            x_BUD: tokens of the chunks that are full, or at the end; zeros past a row's end.
            n_tokens_B: how many each row has.
            state: for the next step.
        """
        n_B = counts(n_B, h_BSE)
        self._check(h_BSE, n_B)
        final_B = ending(final, h_BSE)
        n_overlap = self.config.kernel - self.config.stride  # frames that the convolution sees before a chunk
        chunk = state.frames_BSE.shape[1] - n_overlap
        recent_BSE = torch.cat([state.frames_BSE, h_BSE.to(state.frames_BSE.dtype)], dim=1)
        n_unread_B = state.n_unread_B + n_B
        n_chunks_B = torch.where(final_B, -(-n_unread_B // chunk), n_unread_B // chunk)
        n_read_B = torch.minimum(n_unread_B, n_chunks_B * chunk)
        n_tokens_B = self.config.n_tokens(n_read_B)
        n_chunks = int(n_chunks_B.max())
        unread_BSE = take(recent_BSE, chunk - state.n_unread_B, n_overlap + n_chunks * chunk)
        unread_BSE = unread_BSE.masked_fill(~below(n_overlap + n_read_B, unread_BSE.shape[1])[..., None], 0)

        frames_BSE = take(recent_BSE, n_B, n_overlap + chunk)
        state = dataclasses.replace(state, frames_BSE=frames_BSE, n_unread_B=n_unread_B - n_read_B)
        if n_chunks == 0:
            return h_BSE.new_zeros(len(h_BSE), 0, self.config.lm_dim), n_tokens_B, state.reset(final_B)
        size = chunk // self.config.stride
        x_BUD, *past = self._embed(unread_BSE, n_tokens_B, size, state)
        n_left = state.keys.shape[2]
        keys, values = (take(x, n_chunks_B * size, n_left, dim=2) for x in past)
        n_context_B = (state.n_context_B + n_chunks_B * size).clamp(max=n_left)
        state = dataclasses.replace(state, n_context_B=n_context_B, keys=keys, values=values)
        return x_BUD[:, : int(n_tokens_B.max())], n_tokens_B, state.reset(final_B)

    def _embed(
        self, h_BSE: Tensor, n_tokens_B: Tensor, size: int, state: SpeechAdapterState
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeds whole chunks of `size` tokens that follow a state.

        Args:
            h_BSE: the convolution's left context, then the frames; zeros past a row's end.

        Returns:
            x_BUD: zeros past the `n_tokens_B` real tokens of a row.
            keys, values: of the state and then of these tokens.
        """
        x_BUD = self.conv(h_BSE.transpose(1, 2)).transpose(1, 2)
        chunks = Chunks.plan(
            n_tokens_B,
            state.n_context_B,
            size=size,
            n_chunks=x_BUD.shape[1] // size,
            n_left=state.keys.shape[2],
            head_dim=self.self_attn.head_dim,
        )
        y_BUD, keys, values = self.self_attn(self.input_layernorm(x_BUD), state.keys, state.values, chunks)
        x_BUD = x_BUD + y_BUD
        x_BUD = x_BUD + self.mlp(self.post_attention_layernorm(x_BUD))
        x_BUD = self.projection(self.norm(x_BUD))
        return x_BUD.masked_fill(~below(n_tokens_B, x_BUD.shape[1])[..., None], 0), keys, values

    def _empty_state(self, batch_size: int, chunk_tokens: int, left_chunks: int) -> SpeechAdapterState:
        config, zeros = self.config, partial(self.conv.weight.new_zeros, batch_size)
        context = (config.n_heads, left_chunks * chunk_tokens, self.self_attn.head_dim)
        return SpeechAdapterState(
            frames_BSE=zeros((chunk_tokens - 1) * config.stride + config.kernel, config.encoder_dim),
            n_unread_B=zeros(dtype=torch.int64),
            n_context_B=zeros(dtype=torch.int64),
            keys=zeros(*context),
            values=zeros(*context),
        )

    def _check(self, h_BSE: Tensor, n_B: Tensor) -> None:
        if h_BSE.ndim != 3 or h_BSE.shape[2] != self.config.encoder_dim:
            raise ValueError(
                f"h: need (rows, frames, {self.config.encoder_dim}), got {tuple(h_BSE.shape)}; "
                "use the encoder that this adapter was made for"
            )
        if n_B.shape != h_BSE.shape[:1] or bool((n_B > h_BSE.shape[1]).any()):
            raise ValueError(
                f"n: {n_B.tolist()} does not fit frames of shape {tuple(h_BSE.shape)}; "
                "give one length per row, no longer than the frames"
            )
