"""GGUF files: written here in each format, and the real SmolLM2."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant

from lm.checkpoint import GGUF_KEYS, load_llama, rename_keys
from lm.config import LlamaConfig, RopeScaling
from lm.gguf import read_metadata, read_weights
from lm.model import Llama, rope_frequencies

# Rows of quantised tensors are whole blocks of 32 values, hence the round numbers.
CONFIG = LlamaConfig(
    vocab_size=53, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=96, rope_theta=10_000.0,
    max_seq_len=211,
)  # fmt: skip


def interleaved(weight, n_heads):
    """From our RoPE layout to that of GGUF: row `i` and row `i + K/2` of a head become neighbours."""
    first, second = weight.unflatten(0, (n_heads, 2, -1)).unbind(1)
    return torch.stack([first, second], dim=2).flatten(0, 2)


def gguf_tensors(model: Llama) -> dict[str, np.ndarray]:
    state = {
        key: interleaved(tensor, model.config.n_heads if "q_proj" in key else model.config.n_kv_heads)
        if "q_proj" in key or "k_proj" in key
        else tensor
        for key, tensor in model.state_dict().items()
    }
    return {k: t.numpy() for k, t in rename_keys(state, {v: k for k, v in GGUF_KEYS.items()}, "model").items()}


def write_gguf(path, config, tensors, quant=Quant.F32, architecture="llama", extra=()):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for key, value in extra:
        writer.add_string(key, value)
    for name, values in tensors.items():
        if values.dtype == np.uint8:  # already quantised blocks
            writer.add_tensor(name, values, raw_dtype=quant)
        elif values.ndim == 1 or quant == Quant.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(CONFIG).init_weights(seed=3)


@pytest.mark.parametrize(
    "quant", [Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_0, Quant.Q4_1], ids=lambda q: q.name
)
def test_each_format_gives_the_weights_it_stores(tmp_path, model, quant):
    loaded = load_llama(write_gguf(tmp_path / "model.gguf", CONFIG, gguf_tensors(model), quant))
    assert loaded.config == CONFIG
    for (name, ours), original in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        stored = original.numpy()
        if original.ndim > 1 and quant != Quant.F32:
            stored = gguf.quants.dequantize(gguf.quants.quantize(stored, quant), quant)
        assert ours.dtype == torch.float32 and np.array_equal(ours.numpy(), stored), name


@pytest.mark.parametrize("quant", [Quant.Q2_K, Quant.Q3_K, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K], ids=lambda q: q.name)
def test_k_quants_are_dequantised(tmp_path, quant):
    """The gguf package cannot quantise these, so blocks are bytes, too small for an infinite FP16 scale."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[quant]
    blocks = np.random.default_rng(0).integers(0, 60, size=(7, 3 * n_bytes), dtype=np.uint8)
    path = write_gguf(tmp_path / "model.gguf", CONFIG, {"token_embd.weight": blocks}, quant)
    weight = read_weights(path)["token_embd.weight"]
    assert weight.shape == (7, 3 * block) and weight.isfinite().all() and weight.std() > 0
    assert np.array_equal(weight.numpy(), gguf.quants.dequantize(blocks, quant))


@torch.no_grad()
def test_tied_head_and_dtype(tmp_path, model):
    tensors = gguf_tensors(model)
    del tensors["output.weight"]
    loaded = load_llama(write_gguf(tmp_path / "model.gguf", CONFIG, tensors), dtype=torch.bfloat16)
    assert loaded.config.tie_embeddings and loaded.lm_head is None
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_weights_are_writable_and_apart_from_the_file(tmp_path, model):
    path = write_gguf(tmp_path / "model.gguf", CONFIG, gguf_tensors(model))
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in load_llama(path).parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    assert torch.equal(load_llama(path).norm.weight, model.norm.weight)


def test_llama_3_1_rope_factors_become_the_scaling(tmp_path, model):
    base = replace(CONFIG, rope_theta=500_000.0)
    scaled = replace(base, rope_scaling=RopeScaling(factor=32.0))
    factors = (rope_frequencies(base) / rope_frequencies(scaled)).numpy()
    tensors = gguf_tensors(model)
    path = write_gguf(tmp_path / "scaled.gguf", base, tensors | {"rope_freqs.weight": factors})
    assert load_llama(path).config == scaled
    ones = {"rope_freqs.weight": np.ones_like(factors)}
    assert load_llama(write_gguf(tmp_path / "ones.gguf", base, tensors | ones)).config == base
    other = {"rope_freqs.weight": np.linspace(1, 4, 16, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"not the scaling of Llama 3\.1"):
        load_llama(write_gguf(tmp_path / "other.gguf", base, tensors | other))


def test_what_does_not_fit_is_named(tmp_path, model):
    tensors = gguf_tensors(model)

    def load(name, **changes):
        return load_llama(write_gguf(tmp_path / f"{name}.gguf", CONFIG, **({"tensors": tensors} | changes)))

    missing = {k: t for k, t in tensors.items() if k != "blk.1.ffn_up.weight"}
    with pytest.raises(ValueError, match=r"missing: layers\.1\.mlp\.up_proj\.weight"):
        load("missing", tensors=missing)
    with pytest.raises(ValueError, match=r"left over: blk\.0\.attn_q\.bias"):
        load("extra", tensors=tensors | {"blk.0.attn_q.bias": np.zeros(128, dtype=np.float32)})
    with pytest.raises(
        ValueError, match=r"mis-shaped: layers\.0\.self_attn\.k_proj\.weight \(32, 64\), expected \(64, 64\)"
    ):
        load("shape", tensors=tensors | {"blk.0.attn_k.weight": np.zeros((32, 64), dtype=np.float32)})
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        load("architecture", architecture="qwen2")
    with pytest.raises(ValueError, match="RoPE scaling 'yarn'"):
        load("yarn", extra=[("llama.rope.scaling.type", "yarn")])
    with pytest.raises(ValueError, match=r"lacks the tensor token_embd\.weight"):
        load("table", tensors={k: t for k, t in tensors.items() if k != "token_embd.weight"})


def test_files_that_are_no_gguf_are_refused(tmp_path, model):
    whole = write_gguf(tmp_path / "whole.gguf", CONFIG, gguf_tensors(model)).read_bytes()
    for name, content in {
        "text": b"not a model",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "head": whole[:40],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable GGUF file"):
            load_llama(path)
    with pytest.raises(ValueError, match="no file"):
        read_metadata(tmp_path / "absent.gguf")


@torch.no_grad()
def test_smollm2_says_what_transformers_says(smollm2_gguf):
    """Greedy text of the real file, against transformers reading the same file."""
    from transformers import AutoModelForCausalLM

    ours = load_llama(smollm2_gguf)
    oracle = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    tokens = {token: i for i, token in enumerate(read_metadata(smollm2_gguf)["tokenizer.ggml.tokens"])}
    prompt = "<|im_start|> user Ċ What Ġis Ġthe Ġcapital Ġof ĠFrance ? <|im_end|> Ċ <|im_start|> ass istant Ċ"
    ids = torch.tensor([[tokens[token] for token in prompt.split()]])
    torch.testing.assert_close(ours(ids), oracle(ids).logits, rtol=1e-4, atol=1e-3)
    expected = oracle.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    for _ in range(12):
        ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, expected)
    assert tokens["ĠParis"] in ids[0]
