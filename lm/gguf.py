"""Reads GGUF files of the llama architecture: metadata (which holds the vocabulary), configuration and weights.

The `gguf` package parses and dequantises; here is only what its metadata mean for us. Key names: lm/checkpoint.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lm.config import LlamaConfig, RopeScaling
from lm.model import rope_frequencies

ROPE_FACTORS = "rope_freqs.weight"


@lru_cache(maxsize=1)  # parsing takes seconds, and the tokenizer and the weights are read from the same file
def _open(path: Path, _modified_ns: int) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"source: {path} is not a readable GGUF file ({error}); download it again") from error


def open_gguf(path: str | Path) -> gguf.GGUFReader:
    """Opens a file, memory-mapped; the latest one stays open.

    Raises:
        ValueError: if the file does not exist, is truncated or is not GGUF.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"source: there is no file {path}")
    return _open(path, path.stat().st_mtime_ns)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Every key of the header with its value as a Python object, e.g. `tokenizer.ggml.tokens` as a list of strings."""
    return {key: field.contents() for key, field in open_gguf(path).fields.items()}


def read_weights(path: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor under its GGUF name, dequantised to `dtype` (FP32 when None), in PyTorch's order of dimensions.

    Raises:
        ValueError: if a tensor is in a format that the `gguf` package cannot dequantise.
    """
    weights = {}
    for tensor in open_gguf(path).tensors:
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"source: {tensor.name} of {path} is {tensor.tensor_type.name}, which the gguf package cannot "
                "dequantise; use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant"
            ) from error
        # np.array copies: unquantised values are views of the read-only file.
        weights[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype or torch.float32)
    return weights


def config_from_metadata(metadata: dict[str, Any], weights: dict[str, Tensor]) -> LlamaConfig:
    """The decoder's shape. Head tying, vocabulary size and RoPE scaling are told by the weights only.

    Raises:
        ValueError: if the file is no plain Llama, or scales RoPE in another way than Llama 3.1.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"source: this GGUF file holds the architecture {architecture!r}; only 'llama' is supported")

    def value(key: str) -> Any:
        if f"llama.{key}" not in metadata:
            raise ValueError(f"source: the GGUF file lacks the key llama.{key}")
        return metadata[f"llama.{key}"]

    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(
            f"source: RoPE scaling {metadata['llama.rope.scaling.type']!r} is not supported; "
            "Llama 3.1's scaling comes as the tensor rope_freqs.weight"
        )
    if "token_embd.weight" not in weights:
        raise ValueError("source: the GGUF file lacks the tensor token_embd.weight")
    n_heads = value("attention.head_count")
    config = LlamaConfig(
        vocab_size=weights["token_embd.weight"].shape[0],
        dim=value("embedding_length"),
        n_layers=value("block_count"),
        n_heads=n_heads,
        n_kv_heads=metadata.get("llama.attention.head_count_kv", n_heads),
        ffn_dim=value("feed_forward_length"),
        head_dim=metadata.get("llama.attention.key_length", 0),
        # Stored as FP32: 1e-5 would come back as 9.999999747e-06.
        norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=metadata.get("llama.rope.freq_base", 10_000.0),
        max_seq_len=value("context_length"),
        tie_embeddings="output.weight" not in weights,
    )
    if ROPE_FACTORS not in weights:
        return config
    return replace(config, rope_scaling=_rope_scaling(config, weights[ROPE_FACTORS].float()))


def _rope_scaling(unscaled: LlamaConfig, factors: Tensor) -> RopeScaling | None:
    """Llama 3.1 files store by how much each frequency is divided; only the largest of these is a free parameter."""
    if bool((factors == 1).all()):
        return None
    scaling = RopeScaling(factor=round(float(factors.max()), 3))
    expected = rope_frequencies(unscaled) / rope_frequencies(replace(unscaled, rope_scaling=scaling))
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"source: {ROPE_FACTORS} is not the scaling of Llama 3.1; no other one is supported")
    return scaling
