"""Loading and exporting: Hugging Face directories written by transformers, Meta's layout, and every way to fail."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import LlamaConfig as OracleConfig
from transformers import LlamaForCausalLM

from lm.checkpoint import (
    META_KEYS,
    META_SPLIT_DIM,
    export_huggingface,
    half_rotated,
    llama_config_from_huggingface,
    llama_config_from_meta,
    load_llama,
    load_strict,
    read_safetensors,
    rename_keys,
)
from lm.config import PRESETS, LlamaConfig, RopeScaling
from lm.model import Llama, apply_rope, rope_frequencies, rope_tables

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 19,
}  # fmt: skip


def oracle_model(*, tied=False, rope=LLAMA3_ROPE) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = OracleConfig(
        vocab_size=53, hidden_size=21, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=10,
        intermediate_size=29, rms_norm_eps=1e-5, max_position_embeddings=211, rope_parameters=rope,
        tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


@torch.no_grad()
def assert_same_logits(ours, oracle):
    ids = torch.randint(53, (2, 31))
    torch.testing.assert_close(ours(ids), oracle(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def saved(tmp_path):
    """A directory written by transformers."""
    oracle_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# ------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("shard_size", ["5GB", "3KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_loads_what_transformers_saves(tmp_path, tied, shard_size):
    oracle = oracle_model(tied=tied)
    oracle.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard_size == "3KB"
    ours = load_llama(tmp_path)
    assert ours.config.rope_scaling == RopeScaling(original_max_seq_len=19)
    assert ours.config.rope_theta == 500_000.0 and ours.config.max_seq_len == 211
    assert_same_logits(ours, oracle)


def test_both_spellings_of_rope_scaling(saved):
    new = load_llama(saved).config
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit_json(saved / "config.json", rope_parameters=..., rope_theta=500_000.0, rope_scaling=scaling)
    assert load_llama(saved).config == new
    edit_json(saved / "config.json", rope_scaling=None)
    assert load_llama(saved).config == replace(new, rope_scaling=None)


def test_old_files_may_leave_out_defaults():
    config = llama_config_from_huggingface(
        {"vocab_size": 7, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 5}
    )
    assert (config.n_kv_heads, config.head_dim, config.rope_theta, config.norm_eps) == (3, 2, 10_000.0, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=32.0, original_max_seq_len=17)])
def test_export_loads_strictly_in_transformers(tmp_path, tied, scaling):
    config = replace(PRESETS["debug"](), tie_embeddings=tied, rope_scaling=scaling, norm_eps=1e-6)
    ours = Llama(config).init_weights(seed=5)
    export_huggingface(ours, tmp_path)
    oracle, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(ours, oracle.eval())
    again = load_llama(tmp_path)
    assert again.config == config
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_dtype_is_the_checkpoints_or_as_asked(tmp_path):
    export_huggingface(load_llama("debug", dtype=torch.bfloat16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in load_llama(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_llama(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    assert {p.device.type for p in load_llama(tmp_path, device="meta").parameters()} == {"meta"}


def test_derived_and_doubled_tensors_of_old_writers_are_accepted(tmp_path):
    oracle = oracle_model(tied=True)
    oracle.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    safetensors.torch.save_file(tensors, file)
    assert_same_logits(load_llama(tmp_path), oracle)
    tensors["lm_head.weight"] += 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but its lm_head\.weight differs"):
        load_llama(tmp_path)


def test_tensors_that_do_not_fit_are_all_named(saved):
    file = saved / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(23)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(
        ValueError,
        match=r"missing: layers\.1\.mlp\.up_proj\.weight; mis-shaped: norm\.weight \(23,\), expected \(21,\)",
    ):
        load_llama(saved)
    del tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing: embed_tokens\.weight, layers\.1"):
        load_llama(saved)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(30)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"left over: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_llama(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "lacks 'factor'"),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        ({"model_type": "qwen2"}, "'qwen2' model"),
        ({"model_type": "mllama"}, r"MultimodalLlama\.from_pretrained"),
        ({"num_key_value_heads": 2}, "multiple of n_kv_heads"),
        ({"num_hidden_layers": 3}, r"missing: layers\.2\.input_layernorm\.weight"),
    ],
)
def test_unsupported_configurations_are_refused(saved, changes, message):
    edit_json(saved / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_llama(saved)


def test_damaged_and_missing_files_are_named(tmp_path):
    oracle_model().save_pretrained(tmp_path, max_shard_size="3KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        load_llama(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_llama(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks secret\.safetensors"):
        read_safetensors(tmp_path / "model")


# ---------------------------------------------------------------------------------------------------------------- Meta

META_CONFIG = LlamaConfig(
    vocab_size=58, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=84, rope_theta=500_000.0,
    rope_scaling=RopeScaling(), max_seq_len=131_072,
)  # fmt: skip
META_PARAMS = {
    "dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 58, "multiple_of": 7, "norm_eps": 1e-5,
    "ffn_dim_multiplier": 1.3, "rope_theta": 500_000.0, "use_scaled_rope": True,
}  # fmt: skip


def interleaved(weight, n_heads):
    """From our RoPE layout to Meta's: row `i` and row `i + K/2` of a head become neighbours."""
    first, second = weight.unflatten(0, (n_heads, 2, -1)).unbind(1)
    return torch.stack([first, second], dim=2).flatten(0, 2)


def write_meta(directory, model, n_ranks=1):
    tensors = rename_keys(model.state_dict(), {ours: meta for meta, ours in META_KEYS.items()}, "model")
    for key in tensors:
        if key.endswith(("wq.weight", "wk.weight")):
            tensors[key] = interleaved(tensors[key], META_CONFIG.n_heads if "wq" in key else META_CONFIG.n_kv_heads)
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(META_PARAMS))
    for rank in range(n_ranks):
        part = {"rope.freqs": torch.ones(3)}
        for key, tensor in tensors.items():
            dim = META_SPLIT_DIM.get(key.replace(".0.", ".{}.").replace(".1.", ".{}."))
            part[key] = tensor if dim is None else tensor.chunk(n_ranks, dim)[rank].clone()
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")
    return directory


def test_meta_rope_layout_is_converted():
    """Attention scores by Meta's rotation of complex pairs equal ours on the reordered projections."""
    torch.manual_seed(0)
    n_heads, n_tokens, head_dim = 4, 11, META_CONFIG.head_dim
    x_BTD = torch.randn(1, n_tokens, META_CONFIG.dim)
    wq, wk = torch.randn(2, n_heads * head_dim, META_CONFIG.dim)

    def heads(weight):
        return (x_BTD @ weight.T).unflatten(-1, (n_heads, head_dim)).transpose(1, 2)

    angles = torch.arange(n_tokens)[:, None] * rope_frequencies(META_CONFIG)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.view_as_complex(heads(w).unflatten(-1, (-1, 2)).contiguous()) * turn for w in (wq, wk))
    expected = (q @ k.mH).real

    rope = rope_tables(torch.arange(n_tokens)[None], META_CONFIG)
    q, k = (apply_rope(heads(half_rotated(w, n_heads)), *rope) for w in (wq, wk))
    torch.testing.assert_close(q @ k.mT, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_meta_layout_in_one_or_several_files(tmp_path, n_ranks):
    model = Llama(META_CONFIG).init_weights(seed=2)
    loaded = load_llama(write_meta(tmp_path, model, n_ranks))
    assert loaded.config == META_CONFIG
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_meta_head_equal_to_the_table_is_tied(tmp_path):
    model = Llama(META_CONFIG).init_weights()
    model.lm_head.weight = model.embed_tokens.weight
    loaded = load_llama(write_meta(tmp_path, model))
    assert loaded.lm_head is None
    assert loaded.config == replace(META_CONFIG, tie_embeddings=True, rope_scaling=RopeScaling(factor=32.0))


@pytest.mark.parametrize(
    ("preset", "params"),
    [
        ("llama3-8b", {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}),
        ("llama3-70b", {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        (
            "llama3-405b",
            {"dim": 16_384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2},
        ),
        ("llama3.2-1b", {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5}),
        ("llama3.2-3b", {"dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0}),
    ],
)
def test_released_params_json_gives_the_preset(preset, params):
    expected = PRESETS[preset]()
    scaled = {"use_scaled_rope": True} if expected.rope_scaling else {}
    released = params | scaled | {"n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500_000.0}
    assert llama_config_from_meta(released, vocab_size=128_256, tied=expected.tie_embeddings) == expected


def test_meta_failures_are_named(tmp_path):
    directory = write_meta(tmp_path / "model", Llama(META_CONFIG), n_ranks=2)
    second = directory / "consolidated.01.pth"
    part = torch.load(second)
    torch.save({k: t for k, t in part.items() if k != "norm.weight"}, second)
    with pytest.raises(ValueError, match="hold different tensors"):
        load_llama(directory)
    second.unlink()
    with pytest.raises(ValueError, match=r"mis-shaped: .*q_proj\.weight \(12, 24\), expected \(24, 24\)"):
        load_llama(directory)
    (directory / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match=r"no consolidated\.\*\.pth"):
        load_llama(directory)
    edit_json(directory / "params.json", vision_chunk_size=448)
    with pytest.raises(ValueError, match=r"MultimodalLlama\.from_pretrained"):
        load_llama(directory)
    edit_json(directory / "params.json", vision_chunk_size=..., multiple_of=...)
    torch.save(part, second)
    with pytest.raises(ValueError, match=r"params\.json lacks 'multiple_of'"):
        load_llama(directory)


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_refused_not_run(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    directory = write_meta(tmp_path / "model", Llama(META_CONFIG))
    save({"norm.weight": Malicious()}, directory / "consolidated.00.pth")
    with pytest.raises(ValueError, match="damaged or unsafe"):
        load_llama(directory)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------------------- general


def test_load_strict_copies_into_a_built_module_and_fills_a_meta_one():
    state = {"weight": torch.randn(3, 2, dtype=torch.bfloat16), "bias": torch.zeros(3, dtype=torch.bfloat16)}
    built = nn.Linear(2, 3)
    weight = built.weight
    load_strict(built, state, "test")
    assert built.weight is weight and torch.equal(weight, state["weight"].float())
    meta = nn.Linear(2, 3, device="meta")
    load_strict(meta, state, "test")
    assert meta.weight.data_ptr() == state["weight"].data_ptr() and meta.weight.requires_grad


def test_long_lists_of_missing_tensors_are_cut_short(saved):
    edit_json(saved / "config.json", num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"missing: (layers[^,]+, ){7}layers\S+ and 19 more"):
        load_llama(saved)


def test_debug_is_the_same_random_model_every_time():
    first, second = load_llama("debug"), load_llama("debug")
    assert first.config == PRESETS["debug"]()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.embed_tokens.weight.std() > 0


def test_sources_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'llama3-8b' is a preset"):
        load_llama("llama3-8b")
    with pytest.raises(ValueError, match=r"neither config\.json nor params\.json"):
        load_llama(tmp_path)
    with pytest.raises(ValueError, match="no existing path, no Hub id"):
        load_llama(tmp_path / "absent")
