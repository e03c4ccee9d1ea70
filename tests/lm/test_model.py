"""The decoder against transformers, and its own invariants. Shapes are distinct primes where they can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig as OracleConfig
from transformers import LlamaForCausalLM

from lm.checkpoint import huggingface_config, llama_state_from_huggingface, load_strict
from lm.config import PRESETS, LlamaConfig, RopeScaling
from lm.model import KVCache, Llama, NewTokenRows, rope_frequencies

PARAMETER_COUNTS = {
    "debug": 157_488,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}

PLAIN = LlamaConfig(
    vocab_size=101, dim=25, n_layers=3, n_heads=5, n_kv_heads=5, head_dim=14, ffn_dim=29, rope_theta=10_000.0
)
GROUPED_SCALED_TIED = LlamaConfig(
    vocab_size=97, dim=18, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=31, norm_eps=1e-4,
    rope_scaling=RopeScaling(factor=5.0, original_max_seq_len=16), tie_embeddings=True,
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [PLAIN, GROUPED_SCALED_TIED], ids=["plain", "grouped-scaled-tied"])


def random_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """A model whose weights are large enough, norms included, for every part to matter."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 1))
    return model


def random_ids(config: LlamaConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def test_every_preset_has_its_exact_parameter_count():
    assert PARAMETER_COUNTS.keys() == PRESETS.keys() and len(PRESETS) == 9
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = Llama(preset())
        assert sum(p.numel() for p in model.parameters()) == PARAMETER_COUNTS[name], name


@CONFIGS
def test_logits_equal_transformers(config):
    torch.manual_seed(0)
    oracle = LlamaForCausalLM(OracleConfig(**huggingface_config(config))).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 1))
    state = llama_state_from_huggingface(oracle.state_dict())
    if config.tie_embeddings:
        del state["lm_head.weight"]
    model = Llama(config)
    load_strict(model, state, "oracle")
    ids = random_ids(config, 2, 43)  # longer than original_max_seq_len
    with torch.no_grad():
        torch.testing.assert_close(model(ids), oracle(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scaling_equals_transformers_at_the_released_settings(factor):
    config = LlamaConfig(
        vocab_size=2, dim=256, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=2, max_seq_len=131_072,
        rope_scaling=RopeScaling(factor=factor),
    )  # fmt: skip
    oracle = LlamaForCausalLM(OracleConfig(**huggingface_config(config))).model.rotary_emb.inv_freq
    scaled, unscaled = rope_frequencies(config), rope_frequencies(replace(config, rope_scaling=None))
    torch.testing.assert_close(scaled, oracle, rtol=1e-5, atol=0)
    assert scaled[0] == unscaled[0]  # the shortest wave is kept, the longest stretched
    torch.testing.assert_close(scaled[-1] * factor, unscaled[-1])


@CONFIGS
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole_at_every_split(config):
    model, ids = random_llama(config), random_ids(config, 3, 11)
    whole = model(ids)
    for split in range(1, 11):
        cache = KVCache(config, batch_size=3, max_len=11)
        parts = [model(ids[:, :split], cache=cache)]
        parts += [model(ids[:, t : t + 1], cache=cache) for t in range(split, 11)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        assert cache.length == 11


@torch.no_grad()
def test_chunked_prefill_equals_the_whole():
    config = GROUPED_SCALED_TIED
    model, ids = random_llama(config), random_ids(config, 2, 17)
    cache = KVCache(config, batch_size=2, max_len=19)
    parts = [model(chunk, cache=cache) for chunk in ids.split([7, 5, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_row_equals_the_row_alone(side):
    """Prefill in two chunks, then one step, in a batch of ragged rows; padding ids are arbitrary."""
    config = GROUPED_SCALED_TIED
    model = random_llama(config)
    lengths, width = [3, 13, 7], 13
    ids, step_ids = random_ids(config, 3, width), random_ids(config, 3, 1)
    position = torch.arange(width)
    valid = torch.stack([position >= width - n if side == "left" else position < n for n in lengths])
    cache = KVCache(config, batch_size=3, max_len=width + 1)
    prefill = torch.cat(
        [
            model(ids[:, :5], valid_BS=valid[:, :5], cache=cache),
            model(ids[:, 5:], valid_BS=valid, cache=cache),
        ],
        dim=1,
    )
    step_valid = torch.cat([valid, torch.ones(3, 1, dtype=torch.bool)], dim=1)
    step = model(step_ids, valid_BS=step_valid, cache=cache)
    assert prefill.isfinite().all()  # padded queries too
    for row in range(3):
        alone = model(torch.cat([ids[row, valid[row]], step_ids[row]])[None])[0]
        torch.testing.assert_close(prefill[row, valid[row]], alone[:-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step[row, 0], alone[-1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_does_not_depend_on_the_rest_of_its_batch():
    model, ids = random_llama(PLAIN), random_ids(PLAIN, 5, 7)
    other = ids.clone()
    other[1:] = (other[1:] + 1) % PLAIN.vocab_size
    assert torch.equal(model(ids)[0], model(other)[0])
    torch.testing.assert_close(model(ids)[:1], model(ids[:1]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_token_sees_no_later_one():
    model, ids = random_llama(PLAIN), random_ids(PLAIN, 1, 11)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % PLAIN.vocab_size
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:6], after[:6])
    assert all(not torch.allclose(before[t], after[t]) for t in range(6, 11))


def test_cache_overflow_and_too_long_a_sequence_are_refused():
    model = random_llama(PLAIN)
    cache = KVCache(PLAIN, batch_size=1, max_len=7)
    model(random_ids(PLAIN, 1, 5), cache=cache)
    with pytest.raises(ValueError, match="KVCache holds 7 tokens but 8 are needed"):
        model(random_ids(PLAIN, 1, 3), cache=cache)
    with pytest.raises(ValueError, match="max_seq_len"):
        model(torch.zeros(1, PLAIN.max_seq_len + 1, dtype=torch.int64))


@torch.no_grad()
def test_adapters_run_before_their_layers_and_identity_changes_nothing():
    model, ids = random_llama(PLAIN), random_ids(PLAIN, 2, 5)
    embedded = model.embed_tokens(ids)
    trace: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: trace.append(f"layer {i}"))
        for i, layer in enumerate(model.layers)
    ]

    def identity(name):
        def adapter(h_BTD):
            trace.append(name)
            return h_BTD

        return adapter

    adapted = model.hidden(embedded, adapters={0: identity("before 0"), 2: identity("before 2")})
    assert trace == ["before 0", "layer 0", "layer 1", "before 2", "layer 2"]
    for handle in handles:
        handle.remove()
    assert torch.equal(adapted, model.hidden(embedded))
    # What an adapter returns is what the layer gets: one that undoes the input leaves the output of zeros.
    zeroed = model.hidden(embedded, adapters={0: torch.zeros_like})
    assert torch.equal(zeroed, model.hidden(torch.zeros_like(embedded)))


@torch.no_grad()
def test_new_token_rows_embed_ids_beyond_the_table():
    table = torch.nn.Embedding(7, 5)
    rows = NewTokenRows(3, 5)
    rows.weight.copy_(torch.randn(3, 5))
    embedded = rows(torch.tensor([[6, 7, 0], [9, 8, 3]]), table)
    expected = torch.stack(
        [table.weight[6], rows.weight[0], table.weight[0], rows.weight[2], rows.weight[1], table.weight[3]]
    )
    assert torch.equal(embedded, expected.view(2, 3, 5))


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="give head_dim"):
        LlamaConfig(vocab_size=2, dim=7, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=3)
    with pytest.raises(ValueError, match="multiple of n_kv_heads"):
        LlamaConfig(vocab_size=2, dim=9, n_layers=1, n_heads=3, n_kv_heads=2, ffn_dim=3)
    with pytest.raises(ValueError, match="rope_scaling"):
        RopeScaling(factor=0.5)
