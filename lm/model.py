"""The Llama 3 decoder. It knows nothing of pictures, sound or adapters' insides.

Shape letters: B rows, T tokens of this call, S tokens seen so far (cache + T), D width, H heads, G kv heads, K head width.
Masks are boolean, True = may attend. Parameter names are those of Hugging Face's Llama without the `model.` prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import islice
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import LlamaConfig

#: What may run before decoder layer `i`: a map from the layer index to `h_BTD -> h_BTD`.
Adapters = Mapping[int, Callable[[Tensor], Tensor]]
NO_ADAPTERS: Adapters = MappingProxyType({})


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in FP32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        x_float = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x_float.to(x.dtype)


def rope_frequencies(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """Angular frequency of each rotary pair, `(head_dim / 2,)` FP32, with Llama 3.1 scaling where configured."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    freq = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    # Wavelengths beyond original/low are slowed by `factor`, below original/high kept, between interpolated.
    turns = scaling.original_max_seq_len * freq / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * freq / scaling.factor + keep * freq


def rope_tables(positions_BT: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(B, 1, T, head_dim)` FP32 of integer positions."""
    angles = positions_BT[..., None].float() * rope_frequencies(config, positions_BT.device)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def apply_rope(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pair `(i, i + K/2)` (Hugging Face's layout) by its angle, in the dtype of `x`."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos.to(x_BHTK.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x_BHTK.dtype)


class KVCache:
    """Keys and values of the self-attention layers, allocated once. Layers write; the decoder advances once per step.

    Args:
        batch_size: rows.
        max_len: tokens it can hold; writing past it raises `ValueError`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_len(self) -> int:
        return self.k.shape[3]

    def write(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores this call's keys and values after the first `length` and returns all of them so far."""
        end = self.length + k_BGTK.shape[2]
        if end > self.max_len:
            raise ValueError(f"KVCache holds {self.max_len} tokens but {end} are needed; make it with a larger max_len")
        self.k[layer, :, :, self.length : end] = k_BGTK
        self.v[layer, :, :, self.length : end] = v_BGTK
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens


class SharedPrefix(KVCache):
    """One row's cache as the beginning of every row of a single call, through which gradients may flow.

    Args:
        cache: of one row; it is not written to.
        batch_size: rows that begin with it.
    """

    def __init__(self, cache: KVCache, batch_size: int) -> None:
        self.length = cache.length
        self.k = cache.k[:, :, :, : self.length].expand(-1, batch_size, -1, -1, -1)
        self.v = cache.v[:, :, :, : self.length].expand(-1, batch_size, -1, -1, -1)

    def write(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """This call's keys and values behind those of the prefix; nothing is stored."""
        return torch.cat([self.k[layer], k_BGTK], dim=2), torch.cat([self.v[layer], v_BGTK], dim=2)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask_B1TS: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q_BHTK = apply_rope(heads(self.q_proj(x_BTD)), *rope)
        k_BGTK = apply_rope(heads(self.k_proj(x_BTD)), *rope)
        v_BGTK = heads(self.v_proj(x_BTD))
        if cache is not None:
            k_BGTK, v_BGTK = cache.write(self.layer, k_BGTK, v_BGTK)
        # Without a mask: a whole sequence is causal, one new token sees everything.
        is_causal = mask_B1TS is None and q_BHTK.shape[2] > 1
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, attn_mask=mask_B1TS, is_causal=is_causal, enable_gqa=True
        )
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config.dim, config.ffn_dim)

    def forward(
        self, h_BTD: Tensor, rope: tuple[Tensor, Tensor], mask_B1TS: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        h_BTD = h_BTD + self.self_attn(self.input_layernorm(h_BTD), rope, mask_B1TS, cache)
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))


class NewTokenRows(nn.Module):
    """Embeddings of tokens that the frozen table does not have; row `i` is the id `vocab_size + i`.

    They sit beside the table, as in Llama 3.2 Vision, so the table of the language model stays untouched.

    Attributes:
        frozen_rows: rows that get no gradient, so that those of one medium can train while the others stay as they are.
    """

    def __init__(self, n_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_rows, dim))
        self.frozen_rows: tuple[int, ...] = ()

    def forward(self, ids_BT: Tensor, table: nn.Embedding) -> Tensor:
        """Embeds ids from the table, or from the new rows where an id lies beyond the table."""
        new_BT = ids_BT - table.num_embeddings
        known = table(ids_BT.clamp(max=table.num_embeddings - 1))
        weight: Tensor = self.weight
        if self.frozen_rows:
            frozen = torch.tensor(self.frozen_rows, device=weight.device)
            weight = weight.index_copy(0, frozen, weight.detach()[frozen])
        rows = F.embedding(new_BT.clamp(min=0), weight).to(known.dtype)
        return torch.where((new_BT >= 0)[..., None], rows, known)


class Llama(nn.Module):
    """Llama 3 decoder (section 3.2): token ids in, next-token logits out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Llama:
        """Fills every matrix from N(0, 0.02) (norms stay one), reproducibly. Returns itself."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        return self

    def forward(
        self,
        ids_BT: Tensor,
        *,
        valid_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits `(B, T, vocab_size)` of the next token after each token. Arguments as in `hidden`."""
        return self.logits(self.hidden(self.embed_tokens(ids_BT), valid_BS=valid_BS, cache=cache))

    def hidden(
        self,
        h_BTD: Tensor,
        *,
        valid_BS: Tensor | None = None,
        cache: KVCache | None = None,
        adapters: Adapters = NO_ADAPTERS,
        n_layers: int | None = None,
    ) -> Tensor:
        """Runs the decoder on embeddings and returns its normalised output `(B, T, D)`.

        Args:
            h_BTD: token embeddings.
            valid_BS: False where a row has padding, over the cached tokens and these T; None when there is none.
            cache: keys and values of earlier tokens; this call's are added and the cache advances by T.
            adapters: what runs before which layer.
            n_layers: stop after that many layers and return what the last of them puts out, without the final norm.
        """
        past = cache.length if cache is not None else 0
        n_tokens = h_BTD.shape[1]
        if past + n_tokens > self.config.max_seq_len:
            raise ValueError(
                f"{past + n_tokens} tokens are more than this model's max_seq_len of {self.config.max_seq_len}; "
                "shorten the prompt or lower max_new_tokens"
            )
        rope = rope_tables(token_positions(h_BTD, valid_BS, past), self.config)
        mask = attention_mask(valid_BS, n_tokens, past, h_BTD.device)
        for i, layer in enumerate(islice(self.layers, n_layers)):
            if i in adapters:
                h_BTD = adapters[i](h_BTD)
            h_BTD = layer(h_BTD, rope, mask, cache)
        if cache is not None:
            cache.advance(n_tokens)
        return self.norm(h_BTD) if n_layers is None else h_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Output head: `(..., D)` to `(..., vocab_size)`."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden_BTD, head.weight)


def token_positions(h_BTD: Tensor, valid_BS: Tensor | None, past: int) -> Tensor:
    """Rotary position of each of the T tokens `(B, T)`: its rank among the row's real tokens (padding gets 0)."""
    n_rows, n_tokens = h_BTD.shape[:2]
    if valid_BS is None:
        return torch.arange(past, past + n_tokens, device=h_BTD.device).expand(n_rows, -1)
    return (valid_BS.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def attention_mask(valid_BS: Tensor | None, n_tokens: int, past: int, device: torch.device) -> Tensor | None:
    """Causal mask over cached and new tokens `(B, 1, T, S)`, or None where SDPA's own causality says the same."""
    if valid_BS is None and (past == 0 or n_tokens == 1):
        return None
    query = torch.arange(past, past + n_tokens, device=device)[:, None]
    key = torch.arange(past + n_tokens, device=device)
    causal_TS = key <= query
    if valid_BS is None:
        return causal_TS[None, None]
    # A padded query may see itself, else softmax over nothing gives NaN.
    return (causal_TS & (valid_BS[:, None, :] | (key == query)))[:, None]
