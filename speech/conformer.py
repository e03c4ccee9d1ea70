"""The speech encoder: a Conformer with rotary attention over stacked mel frames (section 8.2.1).

A frame sees its own chunk and `left_chunks` chunks before it. With the default chunk of 60 s, the longest utterance of the
paper, that is full context; longer audio runs on with carried context, in memory linear in its length; and small chunks
stream. Convolutions are causal and no norm looks beyond its frame, so one set of weights does all three.

Offline is a single step from an empty state: all chunks of all rows run at once, each beside its left context.

Shape letters: B rows, T mel frames (10 ms), M mel bins, S encoder frames (40 ms), D width, H heads, K head width,
C frames of a chunk, P frames of left context, W = P + C frames that a chunk sees, X chunks (of all rows).
Masks are boolean, True = may attend. Names are those of Hugging Face's Wav2Vec2-Conformer, of attention those of Llama.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.model import apply_rope
from speech.streaming import StreamState, below, counts, ending, take

Count = TypeVar("Count", int, Tensor)

ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """Shape of a Conformer.

    Attributes:
        stack: mel frames that are stacked into one encoder frame.
        conv_kernel: encoder frames that the depthwise convolution sees, the current one and those before it.
        chunk_frames: encoder frames of a chunk (1500 = 60 s).
        left_chunks: chunks before its own that a frame sees.
        dropout: of the output of every residual branch.
    """

    n_mels: int = 80
    stack: int = 4
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    conv_kernel: int = 7
    chunk_frames: int = 1500
    left_chunks: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dim % (2 * self.n_heads):
            raise ValueError(
                f"dim {self.dim} must be a multiple of twice n_heads {self.n_heads}: rotary positions turn pairs"
            )
        if self.chunk_frames < 1 or self.left_chunks < 0:
            raise ValueError(
                f"chunk_frames must be at least 1 and left_chunks 0, got {self.chunk_frames} and {self.left_chunks}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def n_outputs(self, n_frames: Count) -> Count:
        """Encoder frames of that many mel frames."""
        return -(-n_frames // self.stack)


@dataclass(frozen=True, kw_only=True)
class ConformerState(StreamState):
    """Memory of a Conformer between steps.

    Attributes:
        mel_BTM: the last mel frames, as many as a chunk has.
        n_unread_B: how many of them, at the end, wait for their chunk to fill.
        n_context_B: how many frames, at the end of `keys` and `values`, have been heard.
        keys, values: left context of every layer's attention `(B, n_layers, H, P, K)`, without rotary positions.
        conv: left context of every layer's convolution `(B, n_layers, conv_kernel - 1, D)`.
    """

    mel_BTM: Tensor
    n_unread_B: Tensor
    n_context_B: Tensor
    keys: Tensor
    values: Tensor
    conv: Tensor


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Which frames of one call see which, the same for all layers.

    Attributes:
        size: frames of a chunk, C.
        mask_X11W: what each chunk of each row sees; never nothing.
        rope: cosines and sines `(W, K)` of positions in the window. Attention depends on distances alone, so counting
            from the window's start is as good as from the stream's, which has no end.
    """

    size: int
    mask_X11W: Tensor
    rope: tuple[Tensor, Tensor]

    @classmethod
    def plan(cls, n_B: Tensor, n_context_B: Tensor, *, size: int, n_chunks: int, n_left: int, head_dim: int) -> Chunks:
        """Plans a call on `n_chunks * size` frames per row.

        Args:
            n_B: how many of these are real.
            n_context_B: how many of the `n_left` frames of context before them are real.
        """
        frame = torch.arange(-n_left, n_chunks * size, device=n_B.device)
        valid = (frame >= -n_context_B[:, None]) & (frame < n_B[:, None])
        mask_X11W = valid.unfold(1, n_left + size, size).flatten(0, 1)[:, None, None]
        frequency = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=n_B.device) / head_dim)
        angle = torch.arange(n_left + size, device=n_B.device)[:, None] * frequency.repeat(2)
        # A chunk of padding alone sees all, else softmax over nothing gives NaN; its result is not used.
        return cls(size=size, mask_X11W=mask_X11W | ~mask_X11W.any(-1, keepdim=True), rope=(angle.cos(), angle.sin()))


class ChunkedAttention(nn.Module):
    """Rotary self-attention of every chunk to itself and the frames before it."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x_BSD: Tensor, past_keys: Tensor, past_values: Tensor, chunks: Chunks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends, and returns keys and values `(B, H, P + S, K)`, of the past and then of these frames, too."""
        n_left = past_keys.shape[2]

        def heads(y_BSD: Tensor) -> Tensor:
            return y_BSD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def windows(y_BHSK: Tensor, size: int) -> Tensor:
            """Overlapping windows, one for each chunk: `(X, H, size, K)`."""
            return y_BHSK.unfold(2, size, chunks.size).permute(0, 2, 1, 4, 3).flatten(0, 1)

        keys, values = heads(self.k_proj(x_BSD)), heads(self.v_proj(x_BSD))
        keys = torch.cat([past_keys.to(keys.dtype), keys], dim=2)
        values = torch.cat([past_values.to(values.dtype), values], dim=2)
        cos, sin = chunks.rope
        q_XHCK = apply_rope(windows(heads(self.q_proj(x_BSD)), chunks.size), cos[n_left:], sin[n_left:])
        k_XHWK = apply_rope(windows(keys, n_left + chunks.size), cos, sin)
        v_XHWK = windows(values, n_left + chunks.size)
        y_XHCK = F.scaled_dot_product_attention(q_XHCK, k_XHWK, v_XHWK, attn_mask=chunks.mask_X11W)
        y_BSD = y_XHCK.transpose(1, 2).reshape(x_BSD.shape)
        return self.o_proj(y_BSD), keys, values


class FeedForward(nn.Module):
    """Two matrices with SiLU between them: with SwiGLU's three, 24 layers of these sizes would have 1.3B parameters."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(dim, ffn_dim, bias=False)
        self.output_dense = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.silu(self.intermediate_dense(x)))


class ConvolutionModule(nn.Module):
    """Gated causal depthwise convolution.

    Two departures from the Conformer paper: padding on the left only, so that the same weights stream; and a layer norm
    where it has a batch norm, which would let padding and other rows leak into a row's statistics.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.pointwise_conv1 = nn.Linear(dim, 2 * dim, bias=False)
        self.depthwise_conv = nn.Conv1d(dim, dim, kernel, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.pointwise_conv2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves, and returns the inputs of the convolution `(B, conv_kernel - 1 + S, D)`, the past first, too."""
        inputs = F.glu(self.pointwise_conv1(self.layer_norm(x_BSD)))
        inputs = torch.cat([past.to(inputs.dtype), inputs], dim=1)
        x_BSD = self.depthwise_conv(inputs.transpose(1, 2)).transpose(1, 2)
        return self.pointwise_conv2(F.silu(self.norm(x_BSD))), inputs


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.ffn1_layer_norm = nn.LayerNorm(config.dim)
        self.ffn1 = FeedForward(config.dim, config.ffn_dim)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.self_attn = ChunkedAttention(config.dim, config.n_heads)
        self.conv_module = ConvolutionModule(config.dim, config.conv_kernel)
        self.ffn2_layer_norm = nn.LayerNorm(config.dim)
        self.ffn2 = FeedForward(config.dim, config.ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, h_BSD: Tensor, past: tuple[Tensor, Tensor, Tensor], chunks: Chunks
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Runs the layer; `past` is the left context as keys, values and convolution inputs, and comes back longer."""
        h_BSD = h_BSD + 0.5 * self.dropout(self.ffn1(self.ffn1_layer_norm(h_BSD)))
        y_BSD, keys, values = self.self_attn(self.self_attn_layer_norm(h_BSD), *past[:2], chunks)
        h_BSD = h_BSD + self.dropout(y_BSD)
        y_BSD, inputs = self.conv_module(h_BSD, past[2])
        h_BSD = h_BSD + self.dropout(y_BSD)
        h_BSD = h_BSD + 0.5 * self.dropout(self.ffn2(self.ffn2_layer_norm(h_BSD)))
        return self.final_layer_norm(h_BSD), (keys, values, inputs)


class Conformer(nn.Module):
    """Log-mel frames to encoder frames `(B, S, D)`, one for every `stack` of them."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(config.stack * config.n_mels, config.dim)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.n_layers))

    def forward(self, mel_BTM: Tensor, n_frames_B: Tensor, chunk_frames: int | None = None) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances of any length.

        Args:
            mel_BTM: features; what lies past a row's end does not matter.
            n_frames_B: mel frames of each row.
            chunk_frames: encoder frames of a chunk, when not the config's.

        Returns:
            h_BSD: S = ceil(T / stack), the last group padded with zeros; zeros past a row's end.
            n_B: `ceil(n_frames / stack)`.

        Raises:
            ValueError: the features have other bins than this encoder, or lengths that do not fit.
        """
        n_frames_B = n_frames_B.to(mel_BTM.device)
        self._check(mel_BTM, n_frames_B)
        if mel_BTM.shape[1] == 0:
            raise ValueError("mel: no frames to encode; give at least one")
        n_outputs = self.config.n_outputs(mel_BTM.shape[1])
        # A chunk no longer than the batch, and no more context than there are chunks before: no work on padding.
        size = min(self._chunk_size(chunk_frames), n_outputs)
        n_chunks = -(-n_outputs // size)
        state = self._empty_state(len(mel_BTM), size, min(self.config.left_chunks, n_chunks - 1))
        n_B = self.config.n_outputs(n_frames_B)
        mel_BTM = mel_BTM.to(state.mel_BTM.dtype).masked_fill(~below(n_frames_B, mel_BTM.shape[1])[..., None], 0)
        mel_BTM = F.pad(mel_BTM, (0, 0, 0, n_chunks * size * self.config.stack - mel_BTM.shape[1]))
        h_BSD, _ = self._encode(mel_BTM, n_B, state)
        return h_BSD[:, :n_outputs], n_B

    def init_state(self, batch_size: int, chunk_frames: int | None = None) -> ConformerState:
        """State of rows that have heard nothing, for steps in chunks of `chunk_frames` (the config's when None)."""
        return self._empty_state(batch_size, self._chunk_size(chunk_frames), self.config.left_chunks)

    def step(
        self,
        mel_BTM: Tensor,
        state: ConformerState,
        *,
        n_frames_B: Tensor | None = None,
        final: bool | Tensor = False,
    ) -> tuple[Tensor, Tensor, ConformerState]:
        """Encodes what a stream brings next; together, the frames of all steps are those of `forward`.

        Args:
            mel_BTM: new mel frames, any number, also none.
            n_frames_B: how many are real in each row; all when None.
            final: whether the stream ends here, for all rows or `(B,)`; the rows that end start anew in the state returned.

        Returns:
            h_BSD: frames of the chunks that are full, or at the end; zeros past a row's end.
            n_B: how many each row has.
            state: for the next step.
        """
        n_frames_B = counts(n_frames_B, mel_BTM)
        self._check(mel_BTM, n_frames_B)
        mel_BTM = mel_BTM.to(state.mel_BTM.dtype)
        final_B = ending(final, mel_BTM)
        chunk = state.mel_BTM.shape[1]  # in mel frames
        recent_BTM = torch.cat([state.mel_BTM, mel_BTM], dim=1)
        n_unread_B = state.n_unread_B + n_frames_B
        n_chunks_B = torch.where(final_B, -(-n_unread_B // chunk), n_unread_B // chunk)
        n_read_B = torch.minimum(n_unread_B, n_chunks_B * chunk)
        n_B = self.config.n_outputs(n_read_B)
        unread_BTM = take(recent_BTM, chunk - state.n_unread_B, int(n_chunks_B.max()) * chunk)
        unread_BTM = unread_BTM.masked_fill(~below(n_read_B, unread_BTM.shape[1])[..., None], 0)

        state = dataclasses.replace(
            state, mel_BTM=take(recent_BTM, n_frames_B, chunk), n_unread_B=n_unread_B - n_read_B
        )
        if unread_BTM.shape[1] == 0:
            return mel_BTM.new_zeros(len(mel_BTM), 0, self.config.dim), n_B, state.reset(final_B)
        h_BSD, past = self._encode(unread_BTM, n_B, state)
        n_ahead_B = n_chunks_B * (chunk // self.config.stack)
        keys, values, conv = (
            torch.stack([take(x, n_ahead_B, old.shape[-2], dim=x.ndim - 2) for x in layers], dim=1)
            for layers, old in zip(past, (state.keys, state.values, state.conv), strict=True)
        )
        n_context_B = (state.n_context_B + n_ahead_B).clamp(max=keys.shape[3])
        state = dataclasses.replace(state, n_context_B=n_context_B, keys=keys, values=values, conv=conv)
        return h_BSD[:, : int(n_B.max())], n_B, state.reset(final_B)

    def _encode(
        self, mel_BTM: Tensor, n_B: Tensor, state: ConformerState
    ) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
        """Encodes whole chunks of mel frames that follow a state.

        Returns:
            h_BSD: zeros past the `n_B` real frames of a row.
            past: keys, values and convolution inputs of all layers, those of the state first.
        """
        size = state.mel_BTM.shape[1] // self.config.stack
        h_BSD = self.input_proj(mel_BTM.unflatten(1, (-1, self.config.stack)).flatten(2))
        chunks = Chunks.plan(
            n_B,
            state.n_context_B,
            size=size,
            n_chunks=h_BSD.shape[1] // size,
            n_left=state.keys.shape[3],
            head_dim=self.config.head_dim,
        )
        past = []
        for i, layer in enumerate(self.layers):
            h_BSD, layer_past = layer(h_BSD, (state.keys[:, i], state.values[:, i], state.conv[:, i]), chunks)
            past.append(layer_past)
        return h_BSD.masked_fill(~below(n_B, h_BSD.shape[1])[..., None], 0), tuple(zip(*past, strict=True))

    def _empty_state(self, batch_size: int, chunk_frames: int, left_chunks: int) -> ConformerState:
        config, zeros = self.config, partial(self.input_proj.weight.new_zeros, batch_size)
        context = (config.n_layers, config.n_heads, left_chunks * chunk_frames, config.head_dim)
        return ConformerState(
            mel_BTM=zeros(chunk_frames * config.stack, config.n_mels),
            n_unread_B=zeros(dtype=torch.int64),
            n_context_B=zeros(dtype=torch.int64),
            keys=zeros(*context),
            values=zeros(*context),
            conv=zeros(config.n_layers, config.conv_kernel - 1, config.dim),
        )

    def _chunk_size(self, chunk_frames: int | None) -> int:
        if chunk_frames is not None and chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1 encoder frame, got {chunk_frames}")
        return self.config.chunk_frames if chunk_frames is None else chunk_frames

    def _check(self, mel_BTM: Tensor, n_frames_B: Tensor) -> None:
        if mel_BTM.ndim != 3 or mel_BTM.shape[2] != self.config.n_mels:
            raise ValueError(
                f"mel: need (rows, frames, {self.config.n_mels} bins), got {tuple(mel_BTM.shape)}; "
                "make features with the encoder's n_mels"
            )
        if n_frames_B.shape != mel_BTM.shape[:1] or bool((n_frames_B > mel_BTM.shape[1]).any()):
            raise ValueError(
                f"n_frames: {n_frames_B.tolist()} does not fit features of shape {tuple(mel_BTM.shape)}; "
                "give one length per row, no longer than the features"
            )


def debug() -> ConformerConfig:
    return ConformerConfig(dim=24, n_layers=2, n_heads=2, ffn_dim=40)


def bundled() -> ConformerConfig:
    """Small enough that all trained parts of the package stay below 60 MB."""
    return ConformerConfig(dim=240, n_layers=8, n_heads=4, ffn_dim=336)


def llama3() -> ConformerConfig:
    """The paper's 1B encoder."""
    return ConformerConfig(dim=1536, n_layers=24, n_heads=24, ffn_dim=4096)


#: Encoders by name.
PRESETS: dict[str, Callable[[], ConformerConfig]] = {"debug": debug, "bundled": bundled, "llama3": llama3}
