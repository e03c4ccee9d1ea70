"""Llama 3.2 Vision checkpoints, in Hugging Face's and in Meta's layout, to our state dicts and back, strictly.

Ours is the state dict of a module with the parts `lm`, `new_tokens`, `image_encoder` and `image_adapter`, as
`mm.MultimodalLlama` is. Three things are more than names:

- Hugging Face numbers self- and cross-attention layers in one list, and lays tile position tables out per aspect ratio.
- The image encoder's q, k and v projections are one in ours, three in both others.
- Meta rotates neighbouring rows of the language model's q and k heads (not of cross-attention: it has no positions).

Where running these weights differs, Meta's reference is right: transformers 5.23 takes the intermediate features one
block later, and lets tokens before the first picture attend to all pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lm.checkpoint import (
    HUGGINGFACE_KEYS,
    META_KEYS,
    half_rotated,
    huggingface_config,
    llama_config_from_huggingface,
    llama_config_from_meta,
)
from lm.checkpoint import META_SPLIT_DIM as LM_META_SPLIT_DIM
from lm.config import LlamaConfig
from lm.model import Llama, NewTokenRows
from vision.adapter import ImageAdapter, ImageAdapterConfig
from vision.encoder import ImageEncoder, ImageEncoderConfig, llama3_2_vision
from vision.tiling import PIXEL_MEAN, PIXEL_STD, supported_grids

State = dict[str, Tensor]

#: Rows of new embeddings: both layouts have exactly these; the first is the image token.
N_NEW_TOKENS = 8

# Names in the checkpoints -> names in ours; `{}` stands for an index, here of the encoder's blocks, or a language model
# layer's. The language model's own tables are in lm/checkpoint.py.

HUGGINGFACE_TOP = {
    "multi_modal_projector.weight": "image_adapter.projection.weight",
    "multi_modal_projector.bias": "image_adapter.projection.bias",
    "vision_model.patch_embedding.weight": "image_encoder.patch_embed.proj.weight",
    "vision_model.class_embedding": "image_encoder.class_embedding",
    "vision_model.gated_positional_embedding.gate": "image_encoder.gated_positional_embedding.gate",
    "vision_model.gated_positional_embedding.embedding": "image_encoder.gated_positional_embedding.embedding",
    "vision_model.gated_positional_embedding.tile_embedding.weight": (
        "image_encoder.gated_positional_embedding.tile_embedding"
    ),
    "vision_model.pre_tile_positional_embedding.gate": "image_encoder.pre_tile_positional_embedding.gate",
    "vision_model.pre_tile_positional_embedding.embedding.weight": (
        "image_encoder.pre_tile_positional_embedding.embedding"
    ),
    "vision_model.post_tile_positional_embedding.gate": "image_encoder.post_tile_positional_embedding.gate",
    "vision_model.post_tile_positional_embedding.embedding.weight": (
        "image_encoder.post_tile_positional_embedding.embedding"
    ),
    "vision_model.layernorm_pre.weight": "image_encoder.layernorm_pre.weight",
    "vision_model.layernorm_pre.bias": "image_encoder.layernorm_pre.bias",
    "vision_model.layernorm_post.weight": "image_encoder.layernorm_post.weight",
    "vision_model.layernorm_post.bias": "image_encoder.layernorm_post.bias",
}

HUGGINGFACE_CROSS = {
    "language_model.model.layers.{}.input_layernorm.weight": "image_adapter.blocks.{}.input_layernorm.weight",
    "language_model.model.layers.{}.cross_attn.q_proj.weight": "image_adapter.blocks.{}.cross_attn.q_proj.weight",
    "language_model.model.layers.{}.cross_attn.k_proj.weight": "image_adapter.blocks.{}.cross_attn.k_proj.weight",
    "language_model.model.layers.{}.cross_attn.v_proj.weight": "image_adapter.blocks.{}.cross_attn.v_proj.weight",
    "language_model.model.layers.{}.cross_attn.o_proj.weight": "image_adapter.blocks.{}.cross_attn.o_proj.weight",
    "language_model.model.layers.{}.cross_attn.q_norm.weight": "image_adapter.blocks.{}.cross_attn.q_norm.weight",
    "language_model.model.layers.{}.cross_attn.k_norm.weight": "image_adapter.blocks.{}.cross_attn.k_norm.weight",
    "language_model.model.layers.{}.cross_attn_attn_gate": "image_adapter.blocks.{}.cross_attn_attn_gate",
    "language_model.model.layers.{}.post_attention_layernorm.weight": (
        "image_adapter.blocks.{}.post_attention_layernorm.weight"
    ),
    "language_model.model.layers.{}.mlp.gate_proj.weight": "image_adapter.blocks.{}.mlp.gate_proj.weight",
    "language_model.model.layers.{}.mlp.up_proj.weight": "image_adapter.blocks.{}.mlp.up_proj.weight",
    "language_model.model.layers.{}.mlp.down_proj.weight": "image_adapter.blocks.{}.mlp.down_proj.weight",
    "language_model.model.layers.{}.cross_attn_mlp_gate": "image_adapter.blocks.{}.cross_attn_mlp_gate",
}

HUGGINGFACE_ENCODER = {
    "vision_model.transformer.layers.{}.input_layernorm.weight": "image_encoder.blocks.{}.norm1.weight",
    "vision_model.transformer.layers.{}.input_layernorm.bias": "image_encoder.blocks.{}.norm1.bias",
    "vision_model.transformer.layers.{}.self_attn.q_proj.weight": "image_encoder.blocks.{}.attn.q.weight",
    "vision_model.transformer.layers.{}.self_attn.k_proj.weight": "image_encoder.blocks.{}.attn.k.weight",
    "vision_model.transformer.layers.{}.self_attn.v_proj.weight": "image_encoder.blocks.{}.attn.v.weight",
    "vision_model.transformer.layers.{}.self_attn.o_proj.weight": "image_encoder.blocks.{}.attn.proj.weight",
    "vision_model.transformer.layers.{}.post_attention_layernorm.weight": "image_encoder.blocks.{}.norm2.weight",
    "vision_model.transformer.layers.{}.post_attention_layernorm.bias": "image_encoder.blocks.{}.norm2.bias",
    "vision_model.transformer.layers.{}.mlp.fc1.weight": "image_encoder.blocks.{}.mlp.fc1.weight",
    "vision_model.transformer.layers.{}.mlp.fc1.bias": "image_encoder.blocks.{}.mlp.fc1.bias",
    "vision_model.transformer.layers.{}.mlp.fc2.weight": "image_encoder.blocks.{}.mlp.fc2.weight",
    "vision_model.transformer.layers.{}.mlp.fc2.bias": "image_encoder.blocks.{}.mlp.fc2.bias",
}

META_TOP = {
    "text_model.learnable_embedding.weight": "new_tokens.weight",
    "vision_model.vision_projection.weight": "image_adapter.projection.weight",
    "vision_model.vision_projection.bias": "image_adapter.projection.bias",
    "vision_model.vision_encoder.conv1._linear.weight": "image_encoder.patch_embed.proj.weight",
    "vision_model.vision_encoder.class_embedding": "image_encoder.class_embedding",
    "vision_model.vision_encoder.positional_embedding": "image_encoder.gated_positional_embedding.embedding",
    "vision_model.vision_encoder.gated_positional_embedding": (
        "image_encoder.gated_positional_embedding.tile_embedding"
    ),
    "vision_model.vision_encoder.gated_positional_embedding_gate": "image_encoder.gated_positional_embedding.gate",
    "vision_model.vision_encoder.pre_tile_pos_embed.gate": "image_encoder.pre_tile_positional_embedding.gate",
    "vision_model.vision_encoder.pre_tile_pos_embed.embedding": "image_encoder.pre_tile_positional_embedding.embedding",
    "vision_model.vision_encoder.post_tile_pos_embed.gate": "image_encoder.post_tile_positional_embedding.gate",
    "vision_model.vision_encoder.post_tile_pos_embed.embedding": (
        "image_encoder.post_tile_positional_embedding.embedding"
    ),
    "vision_model.vision_encoder.ln_pre.weight": "image_encoder.layernorm_pre.weight",
    "vision_model.vision_encoder.ln_pre.bias": "image_encoder.layernorm_pre.bias",
    "vision_model.vision_encoder.ln_post.weight": "image_encoder.layernorm_post.weight",
    "vision_model.vision_encoder.ln_post.bias": "image_encoder.layernorm_post.bias",
}

META_CROSS = {
    "text_model.cross_attention_layers.{}.attention_norm.weight": "image_adapter.blocks.{}.input_layernorm.weight",
    "text_model.cross_attention_layers.{}.attention.wq.weight": "image_adapter.blocks.{}.cross_attn.q_proj.weight",
    "text_model.cross_attention_layers.{}.attention.wk.weight": "image_adapter.blocks.{}.cross_attn.k_proj.weight",
    "text_model.cross_attention_layers.{}.attention.wv.weight": "image_adapter.blocks.{}.cross_attn.v_proj.weight",
    "text_model.cross_attention_layers.{}.attention.wo.weight": "image_adapter.blocks.{}.cross_attn.o_proj.weight",
    "text_model.cross_attention_layers.{}.attention.q_norm.weight": "image_adapter.blocks.{}.cross_attn.q_norm.weight",
    "text_model.cross_attention_layers.{}.attention.k_norm.weight": "image_adapter.blocks.{}.cross_attn.k_norm.weight",
    "text_model.cross_attention_layers.{}.gate_attn": "image_adapter.blocks.{}.cross_attn_attn_gate",
    "text_model.cross_attention_layers.{}.ffn_norm.weight": "image_adapter.blocks.{}.post_attention_layernorm.weight",
    "text_model.cross_attention_layers.{}.feed_forward.w1.weight": "image_adapter.blocks.{}.mlp.gate_proj.weight",
    "text_model.cross_attention_layers.{}.feed_forward.w3.weight": "image_adapter.blocks.{}.mlp.up_proj.weight",
    "text_model.cross_attention_layers.{}.feed_forward.w2.weight": "image_adapter.blocks.{}.mlp.down_proj.weight",
    "text_model.cross_attention_layers.{}.gate_ffwd": "image_adapter.blocks.{}.cross_attn_mlp_gate",
}

META_ENCODER = {
    "vision_model.vision_encoder.transformer.resblocks.{}.ln_1.weight": "image_encoder.blocks.{}.norm1.weight",
    "vision_model.vision_encoder.transformer.resblocks.{}.ln_1.bias": "image_encoder.blocks.{}.norm1.bias",
    "vision_model.vision_encoder.transformer.resblocks.{}.attn.wq.weight": "image_encoder.blocks.{}.attn.q.weight",
    "vision_model.vision_encoder.transformer.resblocks.{}.attn.wk.weight": "image_encoder.blocks.{}.attn.k.weight",
    "vision_model.vision_encoder.transformer.resblocks.{}.attn.wv.weight": "image_encoder.blocks.{}.attn.v.weight",
    "vision_model.vision_encoder.transformer.resblocks.{}.attn.wo.weight": "image_encoder.blocks.{}.attn.proj.weight",
    "vision_model.vision_encoder.transformer.resblocks.{}.ln_2.weight": "image_encoder.blocks.{}.norm2.weight",
    "vision_model.vision_encoder.transformer.resblocks.{}.ln_2.bias": "image_encoder.blocks.{}.norm2.bias",
    "vision_model.vision_encoder.transformer.resblocks.{}.mlp.c_fc.weight": "image_encoder.blocks.{}.mlp.fc1.weight",
    "vision_model.vision_encoder.transformer.resblocks.{}.mlp.c_fc.bias": "image_encoder.blocks.{}.mlp.fc1.bias",
    "vision_model.vision_encoder.transformer.resblocks.{}.mlp.c_proj.weight": "image_encoder.blocks.{}.mlp.fc2.weight",
    "vision_model.vision_encoder.transformer.resblocks.{}.mlp.c_proj.bias": "image_encoder.blocks.{}.mlp.fc2.bias",
}

GATES = ("gate_attn", "gate_ffn")  # of the encoder's global blocks, in all three layouts

TILE_TABLES = {  # our tile position tables and the gates that they stand behind
    "image_encoder.gated_positional_embedding.tile_embedding": "image_encoder.gated_positional_embedding.gate",
    "image_encoder.pre_tile_positional_embedding.embedding": "image_encoder.pre_tile_positional_embedding.gate",
    "image_encoder.post_tile_positional_embedding.embedding": "image_encoder.post_tile_positional_embedding.gate",
}


def _global(table: Mapping[str, str]) -> dict[str, str]:
    """The table of the encoder's gated blocks, from that of its plain ones."""
    renamed = {
        theirs.replace(".transformer.", ".global_transformer."): ours.replace(".blocks.", ".global_blocks.")
        for theirs, ours in table.items()
    }
    stem = next(iter(renamed)).partition("{}")[0]
    return renamed | {f"{stem}{{}}.{gate}": f"image_encoder.global_blocks.{{}}.{gate}" for gate in GATES}


#: Which dimension Meta's model parallelism splits; what is not here every rank holds whole.
META_SPLIT_DIM = {
    **{f"text_model.{key}": dim for key, dim in LM_META_SPLIT_DIM.items()},
    **{
        key.replace("layers.", "text_model.cross_attention_layers."): dim
        for key, dim in LM_META_SPLIT_DIM.items()
        if key.startswith("layers.")
    },
    "text_model.learnable_embedding.weight": 0,
    "vision_model.vision_projection.weight": 0,
    "vision_model.vision_projection.bias": 0,
    "vision_model.vision_encoder.conv1._linear.weight": 0,
    **{
        f"vision_model.vision_encoder.{stack}.resblocks.{{}}.{key}": dim
        for stack in ("transformer", "global_transformer")
        for key, dim in {
            "attn.wq.weight": 0,
            "attn.wk.weight": 0,
            "attn.wv.weight": 0,
            "attn.wo.weight": 1,
            "mlp.c_fc.weight": 0,
            "mlp.c_fc.bias": 0,
            "mlp.c_proj.weight": 1,
        }.items()
    },
}


@dataclass(frozen=True, kw_only=True)
class MllamaConfigs:
    """Shapes of the parts of a Llama 3.2 Vision model."""

    lm: LlamaConfig
    encoder: ImageEncoderConfig
    adapter: ImageAdapterConfig
    image_token_id: int

    def build(self) -> nn.ModuleDict:
        """The parts, untrained; its state dict is what the converters make and take."""
        return nn.ModuleDict(
            {
                "lm": Llama(self.lm),
                "new_tokens": NewTokenRows(N_NEW_TOKENS, self.lm.dim),
                "image_encoder": ImageEncoder(self.encoder),
                "image_adapter": ImageAdapter(self.adapter),
            }
        )


# -------------------------------------------------------------------------------------------------------- Hugging Face


def from_huggingface(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[State, MllamaConfigs]:
    """Reads the tensors and the `config.json` of transformers' `MllamaForConditionalGeneration`.

    Raises:
        ValueError: a field is missing or asks for what we do not do; tensors are missing, unknown or mis-shaped.
    """
    configs = configs_from_huggingface(config)
    tensors = {_saved_name(key): tensor for key, tensor in tensors.items()}
    _check_fit(tensors, to_huggingface(_shapes(configs), configs)[0], "Hugging Face")
    state = {ours: tensors[theirs] for theirs, ours in _huggingface_names(configs).items()}
    parts = state["lm.embed_tokens.weight"].split([configs.lm.vocab_size, N_NEW_TOKENS])
    # Copies, because safetensors refuses tensors that share memory.
    state["lm.embed_tokens.weight"], state["new_tokens.weight"] = (part.clone() for part in parts)
    encoder, tables = configs.encoder, {}
    for key in TILE_TABLES:
        inner = (-1, encoder.width) if key.endswith("tile_embedding") else (encoder.width,)
        tables[key] = state[key].reshape(len(state[key]), encoder.max_tiles, *inner)[1:]  # line 0 means no picture
    shared = {key: _shared_by_grids(table) for key, table in tables.items()}
    # Training in transformers may have moved layouts apart; but behind a closed gate, as in a new model, a table does nothing.
    apart = [
        key
        for key, gate in TILE_TABLES.items()
        if state[gate].any() and not torch.equal(_per_grid(shared[key]), tables[key])
    ]
    configs = dataclasses.replace(configs, encoder=dataclasses.replace(encoder, positions_per_grid=bool(apart)))
    return _fuse_qkv(state | ({key: table.clone() for key, table in tables.items()} if apart else shared)), configs


def to_huggingface(state: Mapping[str, Tensor], configs: MllamaConfigs) -> tuple[State, dict[str, Any]]:
    """Inverse of `from_huggingface`: tensors and `config.json`, as transformers 4 and 5 read them.

    Raises:
        ValueError: transformers' Mllama has no place for something in the configuration, or the tensors are not its.
    """
    config = configs_to_huggingface(configs)
    read_back = configs_from_huggingface(config)
    per_grid = dataclasses.replace(read_back.encoder, positions_per_grid=configs.encoder.positions_per_grid)
    _check_expressible(configs, dataclasses.replace(read_back, encoder=per_grid), "Hugging Face")
    _check_fit(state, _shapes(configs), "our")
    split = _split_qkv(state)
    split["lm.embed_tokens.weight"] = torch.cat([split["lm.embed_tokens.weight"], split.pop("new_tokens.weight")])
    for key in TILE_TABLES:
        table = split[key] if configs.encoder.positions_per_grid else _per_grid(split[key])
        split[key] = torch.cat([torch.zeros_like(table[:1]), table]).flatten(1)
    return {theirs: split[ours] for theirs, ours in _huggingface_names(configs).items()}, config


def image_processor_config(encoder: ImageEncoderConfig) -> dict[str, Any]:
    """`preprocessor_config.json`, with which transformers tiles pictures as we do."""
    return {
        "image_processor_type": "MllamaImageProcessor",
        "processor_class": "MllamaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": int(Image.Resampling.BILINEAR),
        "size": {"height": encoder.tile_size, "width": encoder.tile_size},
        "do_pad": True,
        "max_image_tiles": encoder.max_tiles,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
    }


def configs_from_huggingface(config: Mapping[str, Any]) -> MllamaConfigs:
    """Reads the `config.json` of `MllamaForConditionalGeneration`."""
    try:
        text, vision = config["text_config"], config["vision_config"]
        cross_attention_layers = text["cross_attention_layers"]
        # Where the defaults of transformers' Mllama are not those of its Llama.
        defaults = {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 131_072}
        n_layers = text["num_hidden_layers"] - len(cross_attention_layers)
        lm = llama_config_from_huggingface({**defaults, **text, "num_hidden_layers": n_layers})
        encoder = ImageEncoderConfig(
            tile_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            n_blocks=vision["num_hidden_layers"],
            n_heads=vision["attention_heads"],
            ffn_dim=vision["intermediate_size"],
            n_global_blocks=vision["num_global_layers"],
            feature_layers=tuple(vision["intermediate_layers_indices"]),
            max_tiles=vision["max_num_tiles"],
            released_padding_quirk=True,
        )
        image_token_id = config["image_token_index"]
    except KeyError as error:
        raise ValueError(f"config.json of Mllama lacks {error}") from error
    for key, supported in {
        "hidden_act": "gelu",
        "norm_eps": encoder.norm_eps,
        "num_channels": 3,
        "vision_output_dim": encoder.feature_dim,
        "supported_aspect_ratios": [list(grid) for grid in supported_grids(encoder.max_tiles)],
    }.items():
        if vision.get(key, supported) != supported:
            raise ValueError(f"config.json: vision_config.{key}={vision[key]!r} is not supported, only {supported!r}")
    layers = tuple(layer - i for i, layer in enumerate(cross_attention_layers))
    return MllamaConfigs(
        lm=lm, encoder=encoder, adapter=_adapter_config(lm, encoder, layers), image_token_id=image_token_id
    )


def configs_to_huggingface(configs: MllamaConfigs) -> dict[str, Any]:
    """The `config.json` of `MllamaForConditionalGeneration`."""
    lm, encoder = configs.lm, configs.encoder
    text = huggingface_config(lm) | {
        "model_type": "mllama_text_model",
        "num_hidden_layers": lm.n_layers + len(configs.adapter.layers),
        "cross_attention_layers": [layer + i for i, layer in enumerate(configs.adapter.layers)],
        "pad_token_id": None,
    }
    for key in ("architectures", "head_dim", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id"):
        del text[key]
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": configs.image_token_id,
        "text_config": text,
        "vision_config": {
            "model_type": "mllama_vision_model",
            "image_size": encoder.tile_size,
            "patch_size": encoder.patch_size,
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.n_blocks,
            "attention_heads": encoder.n_heads,
            "intermediate_size": encoder.ffn_dim,
            "num_global_layers": encoder.n_global_blocks,
            "intermediate_layers_indices": list(encoder.feature_layers),
            "max_num_tiles": encoder.max_tiles,
            "supported_aspect_ratios": [list(grid) for grid in supported_grids(encoder.max_tiles)],
            "vision_output_dim": encoder.feature_dim,
            "num_channels": 3,
            "hidden_act": "gelu",
            "norm_eps": encoder.norm_eps,
        },
    }


def _saved_name(key: str) -> str:
    """The name under which transformers saves a parameter, from that or from its name in the live model (version 5)."""
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    if key.startswith("model.language_model."):
        return key.replace("model.language_model.", "language_model.model.", 1)
    return key.removeprefix("model.")


def _huggingface_names(configs: MllamaConfigs) -> dict[str, str]:
    """Every saved name -> ours. A cross-attention layer counts as one more layer before the one that it precedes."""
    cross = configs.adapter.layers
    n_before = [sum(layer <= i for layer in cross) for i in range(configs.lm.n_layers)]
    lm = {f"language_model.{theirs}": f"lm.{ours}" for theirs, ours in HUGGINGFACE_KEYS.items()}
    return {
        **HUGGINGFACE_TOP,
        **_expand(lm, ((i + n, i) for i, n in enumerate(n_before))),
        **_expand(HUGGINGFACE_CROSS, ((layer + i, layer) for i, layer in enumerate(cross))),
        **_expand(HUGGINGFACE_ENCODER, ((i, i) for i in range(configs.encoder.n_blocks))),
        **_expand(_global(HUGGINGFACE_ENCODER), ((i, i) for i in range(configs.encoder.n_global_blocks))),
    }


def _per_grid(table: Tensor) -> Tensor:
    """A table over the rows and columns of tiles `(N, N, ...)` as one over layouts and their tiles."""
    grids = supported_grids(len(table))
    lines = table.new_zeros(len(grids), *table.shape[1:])
    for line, (rows, columns) in zip(lines, grids, strict=True):
        line[: rows * columns] = table[:rows, :columns].flatten(0, 1)
    return lines


def _shared_by_grids(table: Tensor) -> Tensor:
    """Inverse of `_per_grid`, if there is one. Places that no layout reaches become zero."""
    max_tiles = table.shape[1]
    shared = table.new_zeros(max_tiles, *table.shape[1:])
    for line, (rows, columns) in zip(table, supported_grids(max_tiles), strict=True):
        shared[:rows, :columns] = line[: rows * columns].unflatten(0, (rows, columns))
    return shared


# ---------------------------------------------------------------------------------------------------------------- Meta


def from_meta(
    tensors: Mapping[str, Tensor], params: Mapping[str, Any], encoder: ImageEncoderConfig | None = None
) -> tuple[State, MllamaConfigs]:
    """Reads the tensors (all ranks joined, see `META_SPLIT_DIM`) and the `params.json` of Meta's release.

    Args:
        encoder: shape of the image encoder, which `params.json` leaves out; that of the released models when None.

    Raises:
        ValueError: a field is missing; tensors are missing, unknown or mis-shaped.
    """
    configs = configs_from_meta(params, encoder)
    tensors = {key: tensor for key, tensor in tensors.items() if key != "text_model.rope.freqs"}  # from the config
    _check_fit(tensors, to_meta(_shapes(configs), configs)[0], "Meta")
    state = {ours: tensors[theirs] for theirs, ours in _meta_names(configs).items()}
    for key, n_heads in _rotated_keys(configs.lm):
        state[key] = half_rotated(state[key], n_heads)
    patch = configs.encoder.patch_size
    state["image_encoder.patch_embed.proj.weight"] = state["image_encoder.patch_embed.proj.weight"].unflatten(
        1, (3, patch, patch)
    )
    for table in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        state[f"image_encoder.{table}.embedding"] = state[f"image_encoder.{table}.embedding"].squeeze(2)
    return _fuse_qkv(state), configs


def to_meta(state: Mapping[str, Tensor], configs: MllamaConfigs) -> tuple[State, dict[str, Any]]:
    """Inverse of `from_meta`, for one rank: tensors and `params.json`.

    Raises:
        ValueError: Meta's model has no place for something in the configuration, or the tensors are not its.
    """
    params = configs_to_meta(configs)
    _check_expressible(configs, configs_from_meta(params, _like_released(configs.encoder)), "Meta")
    _check_fit(state, _shapes(configs), "our")
    split = _split_qkv(state)
    for key, n_heads in _rotated_keys(configs.lm):
        split[key] = split[key].unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    split["image_encoder.patch_embed.proj.weight"] = split["image_encoder.patch_embed.proj.weight"].flatten(1)
    for table in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        split[f"image_encoder.{table}.embedding"] = split[f"image_encoder.{table}.embedding"].unsqueeze(2)
    return {theirs: split[ours] for theirs, ours in _meta_names(configs).items()}, params


def configs_from_meta(params: Mapping[str, Any], encoder: ImageEncoderConfig | None = None) -> MllamaConfigs:
    """Reads `params.json`; `encoder` as in `from_meta`."""
    for key in ("vocab_size", "vision_chunk_size", "vision_num_cross_attention_layers"):
        if key not in params:
            raise ValueError(f"params.json lacks {key!r}")
    lm = llama_config_from_meta(params, vocab_size=params["vocab_size"], tied=False)
    tile_size, max_tiles = params["vision_chunk_size"], params.get("vision_max_num_chunks", 4)
    encoder = dataclasses.replace(encoder or llama3_2_vision(tile_size), tile_size=tile_size, max_tiles=max_tiles)
    n_blocks = params["vision_num_cross_attention_layers"]
    every = -(-lm.n_layers // n_blocks)  # counted from the last layer; rounding up is Meta's
    layers = tuple(range(lm.n_layers - 1, -1, -every))[:n_blocks][::-1]
    return MllamaConfigs(
        lm=lm, encoder=encoder, adapter=_adapter_config(lm, encoder, layers), image_token_id=lm.vocab_size
    )


def configs_to_meta(configs: MllamaConfigs) -> dict[str, Any]:
    """The `params.json` of Meta's release."""
    lm = configs.lm
    return {
        "dim": lm.dim,
        "n_layers": lm.n_layers,
        "n_heads": lm.n_heads,
        "n_kv_heads": lm.n_kv_heads,
        "vocab_size": lm.vocab_size,
        "ffn_dim_multiplier": (lm.ffn_dim + 0.5) / int(8 * lm.dim / 3),  # rounded down, so this says ffn_dim exactly
        "multiple_of": 1,
        "norm_eps": lm.norm_eps,
        "rope_theta": lm.rope_theta,
        "use_scaled_rope": lm.rope_scaling is not None,
        "vision_chunk_size": configs.encoder.tile_size,
        "vision_max_num_chunks": configs.encoder.max_tiles,
        "vision_num_cross_attention_layers": len(configs.adapter.layers),
    }


def _meta_names(configs: MllamaConfigs) -> dict[str, str]:
    """Every name of Meta's -> ours; cross-attention layers are counted by themselves."""
    lm = {f"text_model.{theirs}": f"lm.{ours}" for theirs, ours in META_KEYS.items()}
    return {
        **META_TOP,
        **_expand(lm, ((i, i) for i in range(configs.lm.n_layers))),
        **_expand(META_CROSS, enumerate(configs.adapter.layers)),
        **_expand(META_ENCODER, ((i, i) for i in range(configs.encoder.n_blocks))),
        **_expand(_global(META_ENCODER), ((i, i) for i in range(configs.encoder.n_global_blocks))),
    }


def _rotated_keys(lm: LlamaConfig) -> list[tuple[str, int]]:
    """Projections that RoPE rotates, with their heads."""
    return [
        (f"lm.layers.{i}.self_attn.{name}.weight", n_heads)
        for i in range(lm.n_layers)
        for name, n_heads in (("q_proj", lm.n_heads), ("k_proj", lm.n_kv_heads))
    ]


# ---------------------------------------------------------------------------------------------------------------- both


def _adapter_config(lm: LlamaConfig, encoder: ImageEncoderConfig, layers: tuple[int, ...]) -> ImageAdapterConfig:
    """Both layouts give the cross-attention blocks the language model's shape."""
    if layers and layers[-1] >= lm.n_layers:
        raise ValueError(f"cross-attention before layer {layers[-1]} of a language model that has {lm.n_layers} layers")
    return dataclasses.replace(ImageAdapterConfig.for_lm(lm, encoder.feature_dim, every=1), layers=layers)


def _like_released(encoder: ImageEncoderConfig) -> ImageEncoderConfig:
    """An encoder of this size with all that both layouts take for granted."""
    return dataclasses.replace(
        encoder, norm_eps=1e-5, act="gelu", attention_bias=False, pre_norm=True, released_padding_quirk=True,
        positions_per_grid=False, stem=None, stem_stages=(),
    )  # fmt: skip


def _expand(table: Mapping[str, str], indices: Iterable[tuple[int, int]]) -> dict[str, str]:
    """Fills `{}` with every (their index, our index); rows without it stay."""
    pairs = list(indices)
    return {theirs.format(i): ours.format(j) for i, j in pairs for theirs, ours in table.items()}


def _fuse_qkv(state: Mapping[str, Tensor]) -> State:
    """Joins the encoder's `attn.q`, `attn.k` and `attn.v` to timm's `attn.qkv`."""
    fused = {}
    for key, tensor in state.items():
        if key.endswith(".attn.q.weight"):
            parts = [state[key.replace(".attn.q.", f".attn.{name}.")] for name in "qkv"]
            fused[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        elif not key.endswith((".attn.k.weight", ".attn.v.weight")):
            fused[key] = tensor
    return fused


def _split_qkv(state: Mapping[str, Tensor]) -> State:
    """Inverse of `_fuse_qkv`."""
    split = {}
    for key, tensor in state.items():
        if key.endswith(".attn.qkv.weight"):
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                split[key.replace(".attn.qkv.", f".attn.{name}.")] = part.clone()  # safetensors refuses shared memory
        else:
            split[key] = tensor
    return split


def _shapes(configs: MllamaConfigs) -> State:
    """Our state dict without memory behind it."""
    with torch.device("meta"):
        return configs.build().state_dict()


def _check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], layout: str) -> None:
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - expected.keys()),
        "mis-shaped": [
            f"{key} {tuple(tensors[key].shape)}, expected {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in tensors and tensors[key].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        listing = "; ".join(
            f"{len(keys)} {problem}: {', '.join(keys[:8])}" for problem, keys in problems.items() if keys
        )
        raise ValueError(
            f"these tensors are not Llama 3.2 Vision in the {layout} layout with this configuration. {listing}. "
            "Check that the configuration belongs to the weights and that the download is complete"
        )


def _check_expressible(configs: MllamaConfigs, read_back: MllamaConfigs, layout: str) -> None:
    """A configuration fits a layout if it comes back from there unchanged."""
    ours, theirs = dataclasses.asdict(configs), dataclasses.asdict(read_back)
    lost = [
        f"{part}.{field}={value!r} (would be {theirs[part][field]!r})"
        for part in ("lm", "encoder", "adapter")
        for field, value in ours[part].items()
        if value != theirs[part][field]
    ]
    if configs.image_token_id != read_back.image_token_id:
        lost.append(f"image_token_id={configs.image_token_id} (would be {read_back.image_token_id})")
    if lost:
        raise ValueError(f"the {layout} layout of Llama 3.2 Vision cannot say {', '.join(lost)}")
