"""Llama 3.2 Vision: our parts against transformers' Mllama, and both checkpoint layouts there and back."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from lm.checkpoint import read_meta_shards
from lm.config import RopeScaling
from lm.model import KVCache
from vision import mllama
from vision.mllama import MllamaConfigs
from vision.tiling import Pictures

VOCAB, IMAGE, PAD, TILE, MAX_TILES = 37, 37, 36, 42, 4
CROSS = [1, 5]  # in transformers' numbering: before LM layers 1 and 4


@pytest.fixture(scope="module")
def theirs() -> MllamaForConditionalGeneration:
    """A small random Mllama in which everything matters: gates open, norms off one, position tables filled."""
    text = MllamaTextConfig(
        vocab_size=VOCAB, hidden_size=60, num_hidden_layers=7, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=53, cross_attention_layers=CROSS, pad_token_id=PAD, bos_token_id=0, eos_token_id=None,
        max_position_embeddings=131_072, rope_parameters={
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=22, num_hidden_layers=4, num_global_layers=2, attention_heads=2, intermediate_size=29,
        image_size=TILE, patch_size=14, intermediate_layers_indices=[1, 2], vision_output_dim=66,
    )  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    model = with_features_of_meta(MllamaForConditionalGeneration(config).eval())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift, scale = (1, 0.3) if "norm" in name and name.endswith("weight") else (0, 0.2)
            parameter.copy_(shift + random(*parameter.shape, scale=scale))
            if "gate" in name.rsplit(".", 1)[-1]:
                parameter.copy_(0.8 + random(1, scale=0.3))
        for name, parameter in model.named_parameters():
            if name.endswith(("tile_embedding.weight", "tile_positional_embedding.embedding.weight")):
                parameter.copy_(lay_out_per_aspect_ratio(random(4, 4, parameter.shape[1] // 4, scale=0.2)))
    return model


def with_features_of_meta(model: MllamaForConditionalGeneration) -> MllamaForConditionalGeneration:
    """Corrects which encoder features a model takes.

    Meta takes the states before blocks 3, 7, ..., as transformers did at first; transformers 5.23 takes those after.
    """
    indices = model.config.vision_config.intermediate_layers_indices
    model.model.vision_model.intermediate_layers_indices = [i - 1 for i in indices]
    return model


def lay_out_per_aspect_ratio(table: Tensor) -> Tensor:
    """The released checkpoints' tables: row 0 for no picture, then one row per grid, its tiles in reading order."""
    rows = [torch.zeros(4, table.shape[-1])]
    for height, width in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)):
        row = torch.zeros(4, table.shape[-1])
        for tile in range(height * width):
            row[tile] = table[tile // width, tile % width]
        rows.append(row)
    return torch.stack(rows).flatten(1)


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("mllama")
    theirs.save_pretrained(directory)
    return load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="module")
def loaded(saved) -> tuple[dict[str, Tensor], MllamaConfigs]:
    return mllama.from_huggingface(*saved)


@pytest.fixture(scope="module")
def ours(loaded) -> nn.ModuleDict:
    state, configs = loaded
    parts = configs.build().eval()
    parts.load_state_dict(state, strict=True)
    return parts


# -------------------------------------------------------------------------------------------------------------- parity


class Prompt(NamedTuple):
    """A row of text, and the grids of its pictures in order."""

    ids: list[int]
    grids: list[tuple[int, int]]


def tiles_of(prompts: list[Prompt]) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(h * w, 3, TILE, TILE, generator=generator) for h, w in p.grids] for p in prompts]


def left_padded(prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    length = max(len(p.ids) for p in prompts)
    ids_BT = torch.tensor([[PAD] * (length - len(p.ids)) + p.ids for p in prompts])
    valid_BT = torch.tensor([[False] * (length - len(p.ids)) + [True] * len(p.ids) for p in prompts])
    return ids_BT, valid_BT


def their_inputs(prompts: list[Prompt]) -> dict[str, Tensor]:
    ids_BT, valid_BT = left_padded(prompts)
    n_images, ratios = max(len(p.grids) for p in prompts), MllamaVisionConfig().supported_aspect_ratios
    pixels = torch.zeros(len(prompts), n_images, MAX_TILES, 3, TILE, TILE)
    ratio_ids = torch.zeros(len(prompts), n_images, dtype=torch.long)
    ratio_mask = torch.zeros(len(prompts), n_images, MAX_TILES, dtype=torch.long)
    ratio_mask[..., 0] = 1
    for row, (prompt, pictures) in enumerate(zip(prompts, tiles_of(prompts), strict=True)):
        for i, (grid, tiles) in enumerate(zip(prompt.grids, pictures, strict=True)):
            pixels[row, i, : len(tiles)] = tiles
            ratio_ids[row, i] = ratios.index(list(grid)) + 1
            ratio_mask[row, i, : len(tiles)] = 1
    cross_mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(ids, IMAGE) for ids in ids_BT.tolist()],
        [[h * w for h, w in p.grids] for p in prompts], MAX_TILES, ids_BT.shape[1],
    )  # fmt: skip
    return {
        "input_ids": ids_BT, "attention_mask": valid_BT.long(), "pixel_values": pixels, "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": ratio_mask, "cross_attention_mask": torch.from_numpy(cross_mask),
    }  # fmt: skip


@torch.no_grad()
def their_logits(model, prompts: list[Prompt], like_meta: bool) -> Tensor:
    """Logits of transformers.

    Args:
        like_meta: zero the cross-attention of tokens that see no picture, as Meta does; transformers gives them the
            mean of all values.
    """
    inputs = their_inputs(prompts)
    sees_BT1 = inputs["cross_attention_mask"].flatten(2).any(-1, keepdim=True)

    def mask(module, args, output):
        return output[0] * sees_BT1, *output[1:]

    layers = [model.model.language_model.layers[i].cross_attn for i in CROSS] if like_meta else []
    hooks = [layer.register_forward_hook(mask) for layer in layers]
    try:
        return model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def our_memory(parts: nn.ModuleDict, prompts: list[Prompt]):
    tiles = [tile for row in tiles_of(prompts) for tile in row]
    tiles_PNCHW = torch.stack([torch.cat([t, t.new_zeros(MAX_TILES - len(t), *t.shape[1:])]) for t in tiles])
    pictures = Pictures(tiles_PNCHW, torch.tensor([grid for p in prompts for grid in p.grids]))
    places = [(row, i) for row, p in enumerate(prompts) for i, token in enumerate(p.ids) if token == IMAGE]
    row_P, position_P = torch.tensor(places).unbind(1)
    features = parts["image_encoder"](pictures)
    return parts["image_adapter"].memory(features, pictures, row_P=row_P, position_P=position_P, n_rows=len(prompts))


@torch.no_grad()
def our_logits(parts: nn.ModuleDict, prompts: list[Prompt]) -> Tensor:
    ids_BT, valid_BT = left_padded(prompts)
    position_BT = torch.where(valid_BT, valid_BT.long().cumsum(-1) - 1, -1)
    h_BTD = parts["new_tokens"](ids_BT, parts["lm"].embed_tokens)
    adapters = parts["image_adapter"].bind(our_memory(parts, prompts), position_BT)
    return parts["lm"].logits(parts["lm"].hidden(h_BTD, valid_BS=valid_BT, adapters=adapters))


def row(text: str, *grids: tuple[int, int]) -> Prompt:
    """`#` stands for a picture, `_` for the beginning of text, a letter for a token."""
    ids = [IMAGE if c == "#" else 0 if c == "_" else ord(c) - ord("a") + 1 for c in text]
    assert ids.count(IMAGE) == len(grids)
    return Prompt(ids, list(grids))


def assert_same(actual: Tensor, expected: Tensor, prompts: list[Prompt]) -> None:
    _, valid_BT = left_padded(prompts)
    torch.testing.assert_close(actual[valid_BT], expected[valid_BT], rtol=1e-4, atol=1e-4)
    assert expected[valid_BT].std() > 0.5  # not a comparison of zeros


PICTURE_FIRST = {
    "one tile": [row("#abcde", (1, 1))],
    "two side by side": [row("#fghij", (1, 2))],
    "three on top of each other": [row("#klmno", (3, 1))],
    "four in a row": [row("#pqrst", (1, 4))],
    "four in a square": [row("#pqrst", (2, 2))],
    "several pictures": [row("#ab#cde#f", (1, 1), (2, 1), (1, 3))],
    "pictures seen together": [row("##ab###cd", (1, 2), (1, 1), (2, 2), (4, 1), (1, 1))],
    "left-padded": [row("#abcdefg#hi", (2, 1), (1, 1)), row("#xyz", (1, 4)), row("##uvw", (2, 2), (1, 2))],
}


@pytest.mark.parametrize("prompts", PICTURE_FIRST.values(), ids=PICTURE_FIRST)
def test_logits_equal_those_of_transformers(theirs, ours, prompts):
    assert_same(our_logits(ours, prompts), their_logits(theirs, prompts, like_meta=False), prompts)


TEXT_FIRST = {
    "one": [row("_abc#defg", (2, 2))],
    "several": [row("_ab#cd##ef#", (1, 1), (3, 1), (1, 2), (2, 2))],
    "left-padded with a text row": [row("_abcdef#gh", (1, 3)), row("_uvwxy"), row("_#z", (2, 1))],
}


@pytest.mark.parametrize("prompts", TEXT_FIRST.values(), ids=TEXT_FIRST)
def test_logits_equal_those_of_meta_before_the_first_picture(theirs, ours, prompts):
    assert_same(our_logits(ours, prompts), their_logits(theirs, prompts, like_meta=True), prompts)


def test_transformers_alone_shows_pictures_to_the_text_before_them(theirs, ours):
    """Why the tests above correct it: transformers' beginning of text depends on a picture that comes later."""
    one, other = [row("_abc#defg", (2, 2))], [row("_abc#defg", (1, 2))]  # other tiles, other pixels

    def change(logits_of) -> float:
        return (logits_of(one) - logits_of(other))[:, :4].abs().max().item()

    assert change(lambda prompts: their_logits(theirs, prompts, like_meta=False)) > 1e-2
    assert change(lambda prompts: our_logits(ours, prompts)) == 0


def test_uncorrected_transformers_takes_features_one_block_later(theirs, loaded):
    """Why the fixture corrects it; the weights were trained with Meta's features."""
    plain = MllamaForConditionalGeneration(theirs.config).eval()
    plain.load_state_dict(theirs.state_dict())
    state, configs = loaded
    later = dataclasses.replace(configs, encoder=dataclasses.replace(configs.encoder, feature_layers=(2, 3))).build()
    later.load_state_dict(state)
    prompts = PICTURE_FIRST["several pictures"]
    assert_same(our_logits(later.eval(), prompts), their_logits(plain, prompts, like_meta=False), prompts)


@torch.no_grad()
def test_greedy_generation_equals_that_of_transformers(theirs, ours, loaded):
    prompts, n_new = PICTURE_FIRST["left-padded"], 7
    expected = theirs.generate(**their_inputs(prompts), max_new_tokens=n_new, do_sample=False)
    ids_BT, valid_BS = left_padded(prompts)
    lm, memory, last = ours["lm"], our_memory(ours, prompts), ids_BT
    cache = KVCache(loaded[1].lm, len(prompts), ids_BT.shape[1] + n_new)
    for _ in range(n_new):
        position_BS = torch.where(valid_BS, valid_BS.long().cumsum(-1) - 1, -1)
        adapters = ours["image_adapter"].bind(memory, position_BS[:, cache.length :])
        h_BTD = ours["new_tokens"](last, lm.embed_tokens)
        last = lm.logits(lm.hidden(h_BTD, valid_BS=valid_BS, cache=cache, adapters=adapters)[:, -1:]).argmax(-1)
        ids_BT, valid_BS = torch.cat([ids_BT, last], 1), torch.cat([valid_BS, torch.ones_like(last).bool()], 1)
    assert ids_BT.tolist() == expected.tolist()


# -------------------------------------------------------------------------------------------------------- Hugging Face


def test_huggingface_comes_back_exactly_and_loads_in_transformers(theirs, saved, loaded, tmp_path):
    tensors, config = mllama.to_huggingface(*loaded)
    assert tensors.keys() == saved[0].keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in saved[0].items())
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, report = MllamaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    prompts = PICTURE_FIRST["several pictures"]
    model = with_features_of_meta(model.eval())
    assert torch.equal(their_logits(model, prompts, False), their_logits(theirs, prompts, False))


def test_a_model_that_was_trained_on_in_transformers_keeps_its_tile_positions_for_each_aspect_ratio(theirs, saved):
    """There every line of the tables moves on its own, those of padded tiles too."""
    model = with_features_of_meta(copy.deepcopy(theirs))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("tile_embedding.weight", "tile_positional_embedding.embedding.weight")):
                parameter[1:] = 0.2 * torch.randn(parameter[1:].shape, generator=generator)
    state, configs = mllama.from_huggingface(model.state_dict(), saved[1])
    assert configs.encoder.positions_per_grid
    parts = configs.build().eval()
    parts.load_state_dict(state, strict=True)
    for prompts in PICTURE_FIRST.values():
        assert_same(our_logits(parts, prompts), their_logits(model, prompts, like_meta=False), prompts)
    again, _ = mllama.from_huggingface(*mllama.to_huggingface(state, configs))
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    with pytest.raises(ValueError, match=r"Meta layout of Llama 3.2 Vision cannot say encoder.positions_per_grid=True"):
        mllama.to_meta(state, configs)


def test_names_of_the_live_model_are_read_too(theirs, saved, loaded):
    state, configs = mllama.from_huggingface(theirs.state_dict(), saved[1])
    assert configs == loaded[1]
    assert all(torch.equal(state[key], tensor) for key, tensor in loaded[0].items())


def test_huggingface_config_says_what_is_where(loaded):
    configs = loaded[1]
    assert (configs.lm.n_layers, configs.adapter.layers, configs.image_token_id) == (5, (1, 4), IMAGE)
    assert configs.lm.rope_scaling == RopeScaling()
    assert configs.encoder.feature_layers == (1, 2) and configs.encoder.released_padding_quirk
    assert mllama.configs_from_huggingface(mllama.configs_to_huggingface(configs)) == configs


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ("vision_config", {"norm_eps": 1e-6}, "norm_eps"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1], [2, 2]]}, "supported_aspect_ratios"),
        ("vision_config", {"vision_output_dim": 64}, "vision_output_dim=64"),
        ("text_config", {"cross_attention_layers": [1, 6]}, "before layer 5"),
        ("text_config", {"cross_attention_layers": [1, 2]}, "ascending"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_configs_that_we_cannot_run_are_refused(saved, part, change, message):
    with pytest.raises(ValueError, match=message):
        mllama.configs_from_huggingface(saved[1] | {part: saved[1][part] | change})


def test_missing_config_fields_are_named(saved):
    vision = {key: value for key, value in saved[1]["vision_config"].items() if key != "image_size"}
    with pytest.raises(ValueError, match="lacks 'image_size'"):
        mllama.configs_from_huggingface(saved[1] | {"vision_config": vision})


def test_every_tensor_that_does_not_fit_is_named(saved):
    tensors, config = dict(saved[0]), saved[1]
    del tensors["vision_model.class_embedding"]
    tensors["vision_model.extra"] = torch.zeros(1)
    tensors["language_model.model.layers.1.cross_attn.k_norm.weight"] = torch.ones(7)
    with pytest.raises(ValueError) as error:
        mllama.from_huggingface(tensors, config)
    for part in (
        "missing: vision_model.class_embedding",
        "unknown: vision_model.extra",
        "k_norm.weight (7,), expected (10,)",
    ):
        assert part in str(error.value)


def test_tile_positions_trained_apart_behind_a_closed_gate_are_shared(saved):
    key = "vision_model.pre_tile_positional_embedding"
    tensors = saved[0] | {f"{key}.embedding.weight": torch.randn_like(saved[0][f"{key}.embedding.weight"])}
    state, configs = mllama.from_huggingface(tensors | {f"{key}.gate": torch.zeros(1)}, saved[1])
    assert (
        state["image_encoder.pre_tile_positional_embedding.embedding"].any() and not configs.encoder.positions_per_grid
    )
    _, configs = mllama.from_huggingface(tensors, saved[1])
    assert configs.encoder.positions_per_grid


@pytest.mark.parametrize("write", [mllama.to_huggingface, mllama.to_meta])
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("encoder", {"attention_bias": True}, "encoder.attention_bias=True"),
        ("encoder", {"released_padding_quirk": False}, "encoder.released_padding_quirk=False"),
        ("adapter", {"ffn_dim": 31}, "adapter.ffn_dim=31"),
        ("lm", {"head_dim": 14}, "lm.head_dim=14"),
    ],
)
def test_what_a_layout_cannot_say_is_not_written(loaded, write, part, change, message):
    state, configs = loaded
    changed = dataclasses.replace(configs, **{part: dataclasses.replace(getattr(configs, part), **change)})
    with pytest.raises(ValueError, match=message):
        write(state, changed)


@pytest.mark.parametrize("write", [mllama.to_huggingface, mllama.to_meta])
def test_only_eight_new_tokens_are_written(loaded, write):
    state, configs = loaded
    with pytest.raises(ValueError, match=r"new_tokens.weight \(3, 60\), expected \(8, 60\)"):
        write(state | {"new_tokens.weight": torch.zeros(3, 60)}, configs)


def test_meta_has_one_placement(loaded):
    state, configs = loaded
    changed = dataclasses.replace(configs, adapter=dataclasses.replace(configs.adapter, layers=(0, 3)))
    with pytest.raises(ValueError, match=r"adapter.layers=\(0, 3\) \(would be \(1, 4\)\)"):
        mllama.to_meta(state, changed)


# ---------------------------------------------------------------------------------------------------------------- Meta

#: Of the first layer of every stack; the gated stack repeats the plain one and adds two gates.
META_TENSORS = {
    "text_model.": ("tok_embeddings.weight learnable_embedding.weight norm.weight output.weight"),
    "text_model.layers.0.": (
        "attention_norm.weight ffn_norm.weight attention.wq.weight attention.wk.weight attention.wv.weight "
        "attention.wo.weight feed_forward.w1.weight feed_forward.w2.weight feed_forward.w3.weight"
    ),
    "text_model.cross_attention_layers.0.": (
        "attention_norm.weight ffn_norm.weight attention.wq.weight attention.wk.weight attention.wv.weight "
        "attention.wo.weight attention.q_norm.weight attention.k_norm.weight feed_forward.w1.weight "
        "feed_forward.w2.weight feed_forward.w3.weight gate_attn gate_ffwd"
    ),
    "vision_model.": ("vision_projection.weight vision_projection.bias"),
    "vision_model.vision_encoder.": (
        "conv1._linear.weight class_embedding positional_embedding gated_positional_embedding "
        "gated_positional_embedding_gate pre_tile_pos_embed.embedding pre_tile_pos_embed.gate "
        "post_tile_pos_embed.embedding post_tile_pos_embed.gate ln_pre.weight ln_pre.bias ln_post.weight "
        "ln_post.bias"
    ),
    "vision_model.vision_encoder.transformer.resblocks.0.": (
        "ln_1.weight ln_1.bias ln_2.weight ln_2.bias attn.wq.weight attn.wk.weight attn.wv.weight "
        "attn.wo.weight mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias"
    ),
}


@pytest.fixture(scope="module")
def meta(loaded):
    return mllama.to_meta(*loaded)


def test_meta_comes_back_exactly(loaded, meta):
    (state, configs), (tensors, params) = loaded, meta
    back, configs_back = mllama.from_meta(tensors | {"text_model.rope.freqs": torch.ones(5)}, params, configs.encoder)
    assert configs_back == configs
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_meta_layout_has_the_names_and_shapes_of_the_reference(meta):
    tensors = meta[0]
    stack = "vision_model.vision_encoder.global_transformer.resblocks.0."
    plain = {stem + name for stem, names in META_TENSORS.items() for name in names.split()}
    gated = {name.replace(".transformer.", ".global_transformer.") for name in plain if "resblocks" in name}
    expected = {*plain, *gated, f"{stack}gate_attn", f"{stack}gate_ffn"}
    first = {name for name in tensors if not any(part.isdigit() and part != "0" for part in name.split("."))}
    assert first == expected
    assert tensors["vision_model.vision_encoder.conv1._linear.weight"].shape == (22, 3 * 14 * 14)
    assert tensors["vision_model.vision_encoder.gated_positional_embedding"].shape == (4, 4, 10, 22)
    assert tensors["vision_model.vision_encoder.pre_tile_pos_embed.embedding"].shape == (4, 4, 1, 22)
    assert tensors["text_model.learnable_embedding.weight"].shape == (8, 60)


def test_meta_rotates_self_attention_only(loaded, meta):
    """A head's rows 0, 1, 2, ... of Meta's are ours 0, 5, 1, 6, ...; cross-attention has no positions."""
    (state, _), (tensors, _) = loaded, meta
    order = [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]
    query = state["lm.layers.2.self_attn.q_proj.weight"].view(6, 10, 60)[:, order].flatten(0, 1)
    assert torch.equal(tensors["text_model.layers.2.attention.wq.weight"], query)
    key = state["image_adapter.blocks.4.cross_attn.k_proj.weight"]
    assert torch.equal(tensors["text_model.cross_attention_layers.1.attention.wk.weight"], key)


def test_meta_ranks_are_joined(meta, tmp_path):
    """Two ranks, cut the way that fairscale's column- and row-parallel layers cut."""
    tensors, n_cut = meta[0], 0
    ranks: list[dict[str, Tensor]] = [{}, {}]
    by_rows = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "c_fc.weight", "c_fc.bias")
    by_rows += ("output.weight", "tok_embeddings.weight", "learnable_embedding.weight", "_linear.weight")
    by_rows += ("projection.weight", "projection.bias")
    by_columns = ("wo.weight", "w2.weight", "c_proj.weight")
    for name, tensor in tensors.items():
        dim = 0 if name.endswith(by_rows) else 1 if name.endswith(by_columns) else None
        n_cut += dim is not None
        for rank, part in zip(ranks, [tensor] * 2 if dim is None else tensor.tensor_split(2, dim), strict=True):
            rank[name] = part.contiguous()
    for i, rank in enumerate(ranks):
        torch.save(rank, tmp_path / f"consolidated.{i:02d}.pth")
    joined = read_meta_shards(tmp_path, mllama.META_SPLIT_DIM)
    assert n_cut == 3 + 3 + 7 * (5 + 2) + 7 * (4 + 2)  # tables and head, conv and projection, decoder and ViT blocks
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in tensors.items())


def test_meta_params_must_be_whole(meta):
    tensors, params = meta
    with pytest.raises(ValueError, match="lacks 'vision_chunk_size'"):
        mllama.from_meta(tensors, {key: value for key, value in params.items() if key != "vision_chunk_size"})


RELEASED = {
    "vocab_size": 128_256, "norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True, "n_kv_heads": 8,
    "vision_chunk_size": 560, "vision_max_num_chunks": 4,
}  # fmt: skip
RELEASED_11B = RELEASED | {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
    "vision_num_cross_attention_layers": 8,
}  # fmt: skip
RELEASED_90B = RELEASED | {
    "dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096,
    "vision_num_cross_attention_layers": 20,
}  # fmt: skip


@pytest.mark.parametrize(
    ("params", "n_parameters", "cross_attention_layers"),
    [(RELEASED_11B, 10.629e9, range(3, 40, 5)), (RELEASED_90B, 88.552e9, range(3, 100, 5))],
    ids=["11B", "90B"],
)
def test_released_models_have_their_size_and_placement(params, n_parameters, cross_attention_layers):
    configs = mllama.configs_from_meta(params)
    with torch.device("meta"):
        parts = configs.build()
    assert sum(p.numel() for p in parts.parameters()) == pytest.approx(n_parameters, rel=5e-5)
    text = mllama.configs_to_huggingface(configs)["text_config"]
    assert text["cross_attention_layers"] == list(cross_attention_layers)
