"""Configuration and presets of the language model core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1 frequency scaling: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1 or self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"rope_scaling: need factor >= 1 and high_freq_factor > low_freq_factor, got {self}")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a Llama decoder (section 3.2 of the paper).

    Attributes:
        vocab_size: rows of the frozen token table; ids at or above it belong to new-token rows.
        dim: width of the residual stream.
        ffn_dim: inner width of the SwiGLU feed-forward network.
        head_dim: width of one head; 0 stands for `dim // n_heads`.
        tie_embeddings: the output head is the token table.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    head_dim: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 8192
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # as read from JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.head_dim == 0:
            if self.dim % self.n_heads:
                raise ValueError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}; give head_dim")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")


def debug() -> LlamaConfig:
    """A random model under 1M parameters for tests; its vocabulary is 256 bytes plus special tokens."""
    return LlamaConfig(
        vocab_size=320, dim=48, n_layers=8, n_heads=6, n_kv_heads=2, ffn_dim=80,
        rope_theta=10_000.0, max_seq_len=512, tie_embeddings=True,
    )  # fmt: skip


def smollm2_135m() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49_152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536,
        rope_theta=100_000.0, tie_embeddings=True,
    )  # fmt: skip


def smollm2_360m() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49_152, dim=960, n_layers=32, n_heads=15, n_kv_heads=5, ffn_dim=2560,
        rope_theta=100_000.0, tie_embeddings=True,
    )  # fmt: skip


def smollm2_1_7b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49_152, dim=2048, n_layers=24, n_heads=32, n_kv_heads=32, ffn_dim=8192,
        rope_theta=130_000.0, tie_embeddings=True,
    )  # fmt: skip


def llama3_8b() -> LlamaConfig:
    return LlamaConfig(vocab_size=128_256, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14_336)


def llama3_70b() -> LlamaConfig:
    return LlamaConfig(vocab_size=128_256, dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28_672)


def llama3_405b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256, dim=16_384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53_248,
        rope_scaling=RopeScaling(), max_seq_len=131_072,
    )  # fmt: skip


def llama3_2_1b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256, dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192,
        rope_scaling=RopeScaling(factor=32.0), max_seq_len=131_072, tie_embeddings=True,
    )  # fmt: skip


def llama3_2_3b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256, dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192,
        rope_scaling=RopeScaling(factor=32.0), max_seq_len=131_072, tie_embeddings=True,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], LlamaConfig]] = {
    "debug": debug,
    "smollm2-135m": smollm2_135m,
    "smollm2-360m": smollm2_360m,
    "smollm2-1.7b": smollm2_1_7b,
    "llama3-8b": llama3_8b,
    "llama3-70b": llama3_70b,
    "llama3-405b": llama3_405b,
    "llama3.2-1b": llama3_2_1b,
    "llama3.2-3b": llama3_2_3b,
}
