"""Loads Llama checkpoints (Hugging Face, Meta, GGUF) and exports the Hugging Face layout, strictly both ways."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from lm import gguf, hub
from lm.config import PRESETS, LlamaConfig, RopeScaling
from lm.model import Llama

# Names in the checkpoints -> names in `Llama`; `{}` stands for the layer index.

HUGGINGFACE_KEYS = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.input_layernorm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.self_attn.k_proj.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.self_attn.v_proj.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.self_attn.o_proj.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.post_attention_layernorm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.mlp.gate_proj.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.up_proj.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.down_proj.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

META_KEYS = {
    "tok_embeddings.weight": "embed_tokens.weight",
    "layers.{}.attention_norm.weight": "layers.{}.input_layernorm.weight",
    "layers.{}.attention.wq.weight": "layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm.weight": "layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward.w1.weight": "layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w3.weight": "layers.{}.mlp.up_proj.weight",
    "layers.{}.feed_forward.w2.weight": "layers.{}.mlp.down_proj.weight",
    "norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}

GGUF_KEYS = {
    "token_embd.weight": "embed_tokens.weight",
    "blk.{}.attn_norm.weight": "layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "layers.{}.mlp.down_proj.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}

# Which dimension Meta's model parallelism splits (Llama 3; Llama 2 differs); what is not here every rank holds whole.
META_SPLIT_DIM = {
    "tok_embeddings.weight": 0,
    "layers.{}.attention.wq.weight": 0,
    "layers.{}.attention.wk.weight": 0,
    "layers.{}.attention.wv.weight": 0,
    "layers.{}.attention.wo.weight": 1,
    "layers.{}.feed_forward.w1.weight": 0,
    "layers.{}.feed_forward.w3.weight": 0,
    "layers.{}.feed_forward.w2.weight": 1,
    "output.weight": 0,
}

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


# ----------------------------------------------------------------------------------------------------- load and export


def load_llama(source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Llama:
    """Loads a language model, strictly: every tensor of the checkpoint is used and every parameter is filled.

    Args:
        source: a Hugging Face directory or Hub id, a directory in Meta's layout (`params.json`, `consolidated.*.pth`),
            a `.gguf` file, a registry name of `lm.hub`, or "debug" for a tiny random model.
        dtype: type of the parameters; None keeps the checkpoint's (FP32 for GGUF).
        device: where to put them; CPU when None.

    Raises:
        ValueError: if the source is not found, is not a plain Llama, or a tensor is missing, left over or mis-shaped.
    """
    if str(source) == "debug":
        return Llama(PRESETS["debug"]()).init_weights().to(device=device, dtype=dtype)
    if str(source) in PRESETS and not Path(source).exists():
        raise ValueError(
            f"source: {str(source)!r} is a preset, a shape without weights; give a checkpoint, or build a random model "
            f"with Llama(PRESETS[{str(source)!r}]()).init_weights()"
        )
    path = hub.resolve(source)
    if path.suffix == ".gguf":
        config, state = _read_gguf(path, dtype)
    elif (path / "config.json").is_file():
        config, state = _read_huggingface(path)
    elif (path / "params.json").is_file():
        config, state = _read_meta(path)
    else:
        raise ValueError(f"source: {path} is no .gguf file and has neither config.json nor params.json in it")
    with torch.device("meta"):
        model = Llama(config)
    load_strict(model, state, str(path))
    del state  # so that the cast frees each tensor as it goes and two copies of the model never coexist
    return model.to(device=device, dtype=dtype or model.embed_tokens.weight.dtype)


def export_huggingface(model: Llama, directory: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` (sharded above 5 GB) as transformers' `LlamaForCausalLM` reads."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(llama_state_to_huggingface(model.state_dict()), directory)
    config = huggingface_config(model.config) | {"torch_dtype": str(model.norm.weight.dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_strict(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Loads a state dict, or explains all that does not fit at once.

    Modules on the meta device take the tensors over; others are copied into, keeping their dtype and device.

    Args:
        what: names the checkpoint in the message.

    Raises:
        ValueError: if tensors are missing, left over or mis-shaped.
    """
    expected = module.state_dict()
    problems = [
        _listing("missing", [key for key in expected if key not in state]),
        _listing("left over", [key for key in state if key not in expected]),
        _listing(
            "mis-shaped",
            [
                f"{key} {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
                for key, tensor in expected.items()
                if key in state and state[key].shape != tensor.shape
            ],
        ),
    ]
    if any(problems):
        raise ValueError(
            f"{what} does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}. "
            "Check that its configuration belongs to these weights and that the download is complete"
        )
    module.load_state_dict(state, assign=any(tensor.is_meta for tensor in expected.values()))


def _listing(problem: str, keys: list[str], limit: int = 8) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{problem}: {', '.join(keys[:limit])}{more}"


def rename_keys(tensors: Mapping[str, Tensor], table: Mapping[str, str], what: str) -> dict[str, Tensor]:
    """Translates names by a table whose `{}` stand for indices, such as a layer's.

    Raises:
        ValueError: if a tensor is not in the table.
    """
    unknown = [key for key in tensors if _INDEX.sub("{}", key) not in table]
    if unknown:
        raise ValueError(f"{what} holds tensors that this model has no place for: {_listing('left over', unknown)}")
    return {table[_INDEX.sub("{}", key)].format(*_INDEX.findall(key)): tensor for key, tensor in tensors.items()}


# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_safetensors(directory: str | Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    """Reads `model.safetensors`, or all shards that `model.safetensors.index.json` lists, onto the CPU.

    Raises:
        ValueError: if the file or a shard is missing or damaged.
    """
    directory = Path(directory)
    index = directory / f"{name}.index.json"
    files = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else [name]
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = directory / Path(file).name  # an index never points outside its folder
        if not path.is_file():
            raise ValueError(f"source: {directory} lacks {path.name}; save or convert the weights as safetensors")
        try:
            tensors |= safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"source: {path} is damaged ({error}); download it again") from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, or raises a `ValueError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"source: {path} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"source: {path} must hold a JSON object")
    return content


def llama_config_from_huggingface(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the fields of a Llama `config.json`, or of the text part of a larger one.

    Raises:
        ValueError: if a field is missing, or asks for something that `Llama` does not do.
    """
    for key, supported in {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None,
    }.items():  # fmt: skip
        if config.get(key, supported) != supported:
            raise ValueError(f"source: {key}={config[key]!r} in config.json is not supported, only {supported!r}")

    def value(key: str) -> Any:
        if key not in config:
            raise ValueError(f"source: config.json lacks {key!r}")
        return config[key]

    # transformers 5 gathers in rope_parameters what was rope_theta and rope_scaling. Defaults are those of
    # transformers, which leaves them out of old files.
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    return LlamaConfig(
        vocab_size=value("vocab_size"),
        dim=value("hidden_size"),
        n_layers=value("num_hidden_layers"),
        n_heads=value("num_attention_heads"),
        n_kv_heads=config.get("num_key_value_heads") or value("num_attention_heads"),
        ffn_dim=value("intermediate_size"),
        head_dim=config.get("head_dim") or 0,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        rope_scaling=_rope_scaling_from_huggingface(rope),
        max_seq_len=config.get("max_position_embeddings", 2048),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def _rope_scaling_from_huggingface(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"source: RoPE scaling {kind!r} in config.json is not supported, only 'default' and 'llama3'")
    try:
        return RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_seq_len=rope["original_max_position_embeddings"],
        )
    except KeyError as error:
        raise ValueError(f"source: the llama3 RoPE scaling in config.json lacks {error}") from error


def huggingface_config(config: LlamaConfig) -> dict[str, Any]:
    """The `config.json` of transformers' `LlamaForCausalLM`, in the spelling that versions 4 and 5 both read.

    Token ids are null: what begins and ends a text is the tokenizer's knowledge.
    """
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.ffn_dim,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def llama_state_from_huggingface(tensors: Mapping[str, Tensor], what: str = "the checkpoint") -> dict[str, Tensor]:
    """State dict of `Llama` from the tensors of transformers' `LlamaForCausalLM`."""
    # Old versions of transformers saved the RoPE frequencies, which follow from the configuration.
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(".rotary_emb.inv_freq")}
    return rename_keys(kept, HUGGINGFACE_KEYS, what)


def llama_state_to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `llama_state_from_huggingface`."""
    return rename_keys(state, {ours: theirs for theirs, ours in HUGGINGFACE_KEYS.items()}, "the model")


def _read_huggingface(directory: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    raw = read_json(directory / "config.json")
    if raw.get("model_type") != "llama":
        hint = "; load it with mm.MultimodalLlama.from_pretrained" if raw.get("model_type") == "mllama" else ""
        raise ValueError(f"source: {directory} holds a {raw.get('model_type')!r} model, not 'llama'{hint}")
    config = llama_config_from_huggingface(raw)
    state = llama_state_from_huggingface(read_safetensors(directory), str(directory))
    if config.tie_embeddings:
        _drop_tied_head(state, directory)
    return config, state


def _drop_tied_head(state: dict[str, Tensor], directory: Path) -> None:
    """Some writers store the tied head a second time."""
    head, table = state.pop("lm_head.weight", None), state.get("embed_tokens.weight")
    if head is not None and table is not None and not torch.equal(head, table):
        raise ValueError(
            f"source: {directory} says tie_word_embeddings, but its lm_head.weight differs from embed_tokens.weight; "
            "set tie_word_embeddings to false in config.json if the head was trained apart"
        )


# ------------------------------------------------------------------------------------------------------- Meta and GGUF


def half_rotated(weight: Tensor, n_heads: int) -> Tensor:
    """Reorders a q or k projection from Meta's RoPE layout to ours.

    Meta (and llama.cpp) rotate neighbouring rows of a head, `(0, 1), (2, 3), ...`; Hugging Face and we rotate row `i`
    with row `i + head_dim / 2`.
    """
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _half_rotate_state(state: dict[str, Tensor], config: LlamaConfig) -> None:
    for i in range(config.n_layers):
        for name, n_heads in (("q_proj", config.n_heads), ("k_proj", config.n_kv_heads)):
            key = f"layers.{i}.self_attn.{name}.weight"
            if key in state and len(state[key]) == n_heads * config.head_dim:  # else load_strict names it
                state[key] = half_rotated(state[key], n_heads)


def _read_gguf(path: Path, dtype: torch.dtype | None) -> tuple[LlamaConfig, dict[str, Tensor]]:
    tensors = gguf.read_weights(path, dtype)
    config = gguf.config_from_metadata(gguf.read_metadata(path), tensors)
    tensors.pop(gguf.ROPE_FACTORS, None)  # now in config.rope_scaling
    state = rename_keys(tensors, GGUF_KEYS, str(path))
    _half_rotate_state(state, config)
    return config, state


def _read_meta(directory: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    params = read_json(directory / "params.json")
    if any(key.startswith("vision_") for key in params):
        raise ValueError(f"source: {directory} holds Llama 3.2 Vision; load it with mm.MultimodalLlama.from_pretrained")
    tensors = read_meta_shards(directory)
    tensors.pop("rope.freqs", None)  # follows from the configuration
    state = rename_keys(tensors, META_KEYS, str(directory))
    if "embed_tokens.weight" not in state:
        raise ValueError(f"source: {directory} lacks the tensor tok_embeddings.weight")
    # Meta stores a head even where it is the table.
    tied = "lm_head.weight" not in state or torch.equal(state["lm_head.weight"], state["embed_tokens.weight"])
    if tied:
        state.pop("lm_head.weight", None)
    config = llama_config_from_meta(params, vocab_size=state["embed_tokens.weight"].shape[0], tied=tied)
    _half_rotate_state(state, config)
    return config, state


def llama_config_from_meta(params: Mapping[str, Any], *, vocab_size: int, tied: bool) -> LlamaConfig:
    """Reads `params.json`, which leaves out the vocabulary size of Llama 2 and the head tying.

    Raises:
        ValueError: if a field is missing.
    """
    for key in ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps"):
        if key not in params:
            raise ValueError(f"source: params.json lacks {key!r}")
    dim, scaled = params["dim"], params.get("use_scaled_rope", False)
    # Neither is the factor of the RoPE scaling stored: it is 32 for Llama 3.2 1B and 3B, the only tied ones, else 8.
    scaling = RopeScaling(factor=32.0 if tied else 8.0) if scaled else None
    # 2/3 of 4 * dim, times a multiplier, rounded up.
    ffn_dim = int((params.get("ffn_dim_multiplier") or 1.0) * int(2 * 4 * dim / 3))
    return LlamaConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=params["n_layers"],
        n_heads=params["n_heads"],
        n_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        ffn_dim=-(-ffn_dim // params["multiple_of"]) * params["multiple_of"],
        norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10_000.0),
        rope_scaling=scaling,
        max_seq_len=131_072 if scaled else 8192,
        tie_embeddings=tied,
    )


def read_meta_shards(directory: str | Path, split_dim: Mapping[str, int] = META_SPLIT_DIM) -> dict[str, Tensor]:
    """Reads `consolidated.*.pth` without executing code from them, and joins the ranks of model parallelism.

    Raises:
        ValueError: if there are none, or they are no state dicts of the same tensors.
    """
    files = sorted(Path(directory).glob("consolidated.*.pth"))
    if not files:
        raise ValueError(f"source: {directory} has params.json but no consolidated.*.pth")
    try:
        ranks = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"source: {directory} holds a damaged or unsafe consolidated.*.pth ({error})") from error
    if any(rank.keys() != ranks[0].keys() for rank in ranks):
        raise ValueError(f"source: the consolidated.*.pth of {directory} hold different tensors; download them again")
    tensors = {}
    for key in ranks[0]:
        dim = split_dim.get(_INDEX.sub("{}", key))
        parts = [rank[key] for rank in ranks]
        tensors[key] = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
    return tensors
