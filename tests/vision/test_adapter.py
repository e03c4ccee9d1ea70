"""The image adapter: placement, sizes, and the contract that pictures reach exactly the tokens that may see them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from lm.config import PRESETS, LlamaConfig
from lm.model import KVCache, Llama
from vision.adapter import OPEN_END, CrossMemory, ImageAdapter, ImageAdapterConfig, cross_layers, picture_spans
from vision.tiling import Pictures

LM = LlamaConfig(vocab_size=41, dim=30, n_layers=5, n_heads=15, n_kv_heads=3, ffn_dim=23, head_dim=2, rope_theta=1e4)
N_FEATURES, N_TOKENS = 19, 7  # feature width, tokens of a tile
CONFIG = dataclasses.replace(ImageAdapterConfig.for_lm(LM, N_FEATURES, every=2), layers=(1, 4))


@pytest.fixture(scope="module")
def lm() -> Llama:
    return randomise(Llama(LM), seed=1)


@pytest.fixture(scope="module")
def adapter() -> ImageAdapter:
    return randomise(ImageAdapter(CONFIG), seed=2)


def randomise(module, seed: int):
    """Fills a module with numbers at which every part matters, gates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 1))
    return module.eval()


def make_pictures(*grids: tuple[int, int]) -> Pictures:
    """Pictures of these grids; their pixels do not matter to the adapter."""
    return Pictures(torch.zeros(len(grids), 4, 3, 1, 1), torch.tensor(grids))


def make_features(n_pictures: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_pictures, 4, N_TOKENS, N_FEATURES, generator=generator)


# Row 0: text, a 1 x 3 picture, text, two pictures in a row, text. Row 1: text only. Row 2: a picture at once.
GRIDS = ((1, 3), (2, 2), (1, 1), (2, 1))
PLACES = {"row_P": torch.tensor([0, 0, 0, 2]), "position_P": torch.tensor([2, 5, 6, 0])}
N_ROWS, LENGTH = 3, 11
SEES = [  # pictures that each token sees, row by row
    [[], [], [0], [0], [0], [1], [1, 2], [1, 2], [1, 2], [1, 2], [1, 2]],
    [[]] * LENGTH,
    [[3]] * LENGTH,
]


def remember(adapter: ImageAdapter, features: Tensor) -> CrossMemory:
    return adapter.memory(features, make_pictures(*GRIDS), **PLACES, n_rows=N_ROWS)


def positions(n_tokens: int = LENGTH, n_rows: int = N_ROWS) -> Tensor:
    return torch.arange(n_tokens).expand(n_rows, -1)


def run(lm: Llama, adapter: ImageAdapter, features: Tensor, h_BTD: Tensor) -> Tensor:
    return lm.hidden(h_BTD, adapters=adapter.bind(remember(adapter, features), positions()))


@pytest.fixture(name="h_BTD")
def embeddings() -> Tensor:
    return torch.randn(N_ROWS, LENGTH, LM.dim, generator=torch.Generator().manual_seed(4))


# ---------------------------------------------------------------------------------------------------- shapes and sizes


@pytest.mark.parametrize(
    ("n_layers", "n_blocks", "expected"),
    [
        (32, 8, tuple(range(3, 32, 4))),  # Llama 3.2 Vision 11B
        (80, 20, tuple(range(3, 80, 4))),  # Llama 3.2 Vision 90B
        (126, 31, tuple(range(5, 126, 4))),  # Llama 3 405B
        (30, 7, (5, 9, 13, 17, 21, 25, 29)),  # SmolLM2 135M
        (5, 5, (0, 1, 2, 3, 4)),
    ],
)
def test_placement(n_layers, n_blocks, expected):
    assert cross_layers(n_layers, n_blocks) == expected


@pytest.mark.parametrize(
    ("preset", "n_blocks", "n_block", "n_total"),
    [
        ("llama3-8b", 8, 218_112_258, 1.745e9),
        ("llama3-70b", 20, 855_654_658, 17.11e9),
        ("llama3-405b", 31, 3_187_704_066, 98.8e9),
    ],
)
def test_sizes_of_the_paper(preset, n_blocks, n_block, n_total):
    with torch.device("meta"):
        adapter = ImageAdapter(ImageAdapterConfig.for_lm(PRESETS[preset](), 7680))
    sizes = [sum(p.numel() for p in block.parameters()) for _, block in adapter.layer_blocks()]
    assert sizes == [n_block] * n_blocks
    assert sum(sizes) == pytest.approx(n_total, rel=5e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "layers"),
        ({"layers": (4, 1)}, "layers"),
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (-1, 2)}, "layers"),
        ({"n_kv_heads": 2}, "n_kv_heads"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_bad_placements_are_refused():
    with pytest.raises(ValueError, match="n_blocks"):
        cross_layers(5, 6)
    with pytest.raises(ValueError, match="every"):
        ImageAdapterConfig.for_lm(LM, N_FEATURES, every=7)


def test_pictures_and_tokens_must_match(adapter):
    with pytest.raises(ValueError, match="1 pictures for 4 picture tokens"):
        adapter.memory(make_features(1), make_pictures((1, 1)), **PLACES, n_rows=N_ROWS)


# --------------------------------------------------------------------------------------------------------------- spans


@pytest.mark.parametrize(
    ("places", "spans"),  # (row, position) of each picture -> (start, end)
    [
        ([(0, 0)], [(0, OPEN_END)]),
        ([(0, 1), (0, 4)], [(1, 4), (4, OPEN_END)]),
        ([(0, 1), (0, 2), (0, 3)], [(1, OPEN_END), (2, OPEN_END), (3, OPEN_END)]),
        ([(0, 0), (0, 1), (0, 5), (0, 6), (0, 9)], [(0, 5), (1, 5), (5, 9), (6, 9), (9, OPEN_END)]),
        ([(0, 3), (1, 4)], [(3, OPEN_END), (4, OPEN_END)]),  # neighbours in different rows
        ([(1, 7), (0, 2), (1, 3)], [(7, OPEN_END), (2, OPEN_END), (3, 7)]),  # any order
    ],
)
def test_spans(places, spans):
    row_P, position_P = torch.tensor(places).unbind(1)
    start_P, end_P = picture_spans(row_P, position_P)
    assert list(zip(start_P.tolist(), end_P.tolist(), strict=True)) == spans


def test_every_token_attends_to_the_pictures_it_sees_as_in_transformers(adapter, h_BTD):
    """Each token is run alone through transformers' layer over just its pictures' real tiles: no mask, no packing."""
    text = MllamaTextConfig(
        hidden_size=LM.dim, num_attention_heads=15, num_key_value_heads=3, intermediate_size=23, pad_token_id=None,
        num_hidden_layers=1, cross_attention_layers=[0], vocab_size=41,
    )  # fmt: skip
    text._attn_implementation = "eager"
    features = make_features(len(GRIDS))
    adapters = adapter.bind(remember(adapter, features), positions())
    n_checked = 0
    for layer, block in adapter.layer_blocks():
        theirs = MllamaCrossAttentionDecoderLayer(text, layer_idx=0)
        theirs.load_state_dict(block.state_dict(), strict=True)  # the names are theirs
        ours = adapters[layer](h_BTD)
        for row, tokens in enumerate(SEES):
            for t, seen in enumerate(tokens):
                token = h_BTD[row, t][None, None]
                if seen:
                    tiles = torch.cat([features[p, : GRIDS[p][0] * GRIDS[p][1]].flatten(0, 1) for p in seen])
                    states = adapter.projection(tiles)[None]
                    expected = theirs(token, states, None, None, None)
                    torch.testing.assert_close(ours[row, t], expected[0, 0], rtol=1e-5, atol=1e-5)
                else:
                    assert torch.equal(ours[row, t], token[0, 0])
                n_checked += 1
    assert n_checked == 2 * N_ROWS * LENGTH


# ------------------------------------------------------------------------------------------------------------ contract


def test_a_new_adapter_changes_nothing(lm, h_BTD):
    torch.manual_seed(5)
    assert torch.equal(run(lm, ImageAdapter(CONFIG), make_features(4), h_BTD), lm.hidden(h_BTD))


def test_tokens_without_a_picture_get_the_language_model_bit_for_bit(lm, adapter, h_BTD):
    with_pictures, alone = run(lm, adapter, make_features(4), h_BTD), lm.hidden(h_BTD)
    assert torch.equal(with_pictures[1], alone[1])
    assert torch.equal(with_pictures[0, :2], alone[0, :2])
    assert not torch.isclose(with_pictures[0, 2:], alone[0, 2:]).all(-1).any()
    assert not torch.isclose(with_pictures[2], alone[2]).all(-1).any()


@pytest.mark.parametrize(("picture", "row", "first"), [(0, 0, 2), (1, 0, 5), (2, 0, 6), (3, 2, 0)])
def test_a_picture_changes_nothing_before_it_or_in_other_rows(lm, adapter, h_BTD, picture, row, first):
    features = make_features(4)
    other = features.clone()
    other[picture] = make_features(1, seed=6)
    before, after = run(lm, adapter, features, h_BTD), run(lm, adapter, other, h_BTD)
    same = (before == after).all(-1)
    assert same[row, :first].all()
    assert not same[row, first:].any()
    assert same[[r for r in range(N_ROWS) if r != row]].all()


def test_padded_tiles_are_never_read(adapter, h_BTD):
    features = make_features(4)
    hostile = features.clone()
    hostile[~make_pictures(*GRIDS).valid_PN] = torch.nan
    for layer, block in adapter.bind(remember(adapter, features), positions()).items():
        assert torch.equal(block(h_BTD), adapter.bind(remember(adapter, hostile), positions())[layer](h_BTD))


def test_prefill_and_steps_equal_the_whole_at_every_split(lm, adapter, h_BTD):
    memory = remember(adapter, make_features(4))
    whole = lm.hidden(h_BTD, adapters=adapter.bind(memory, positions()))
    for split in range(1, LENGTH):
        cache = KVCache(LM, N_ROWS, LENGTH)
        pieces = [slice(0, split), *(slice(t, t + 1) for t in range(split, LENGTH))]
        parts = [
            lm.hidden(h_BTD[:, piece], cache=cache, adapters=adapter.bind(memory, positions()[:, piece]))
            for piece in pieces
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_padded_batch_equals_the_row_alone(lm, adapter, h_BTD, side):
    features, lengths = make_features(4), [LENGTH, 5, 7]
    padded, valid = torch.randn(N_ROWS, LENGTH, LM.dim), torch.zeros(N_ROWS, LENGTH, dtype=torch.bool)
    place = [slice(LENGTH - n, None) if side == "left" else slice(0, n) for n in lengths]
    for row, n in enumerate(lengths):
        padded[row, place[row]], valid[row, place[row]] = h_BTD[row, :n], True
    position_BT = torch.where(valid, valid.long().cumsum(-1) - 1, -1)
    batch = lm.hidden(padded, valid_BS=valid, adapters=adapter.bind(remember(adapter, features), position_BT))
    assert batch.isfinite().all()
    for row, n in enumerate(lengths):
        mine = PLACES["row_P"] == row
        adapters = {}
        if mine.any():
            pictures = make_pictures(*(grid for grid, keep in zip(GRIDS, mine, strict=True) if keep))
            row_P, position_P = torch.zeros(int(mine.sum()), dtype=torch.long), PLACES["position_P"][mine]
            memory = adapter.memory(features[mine], pictures, row_P=row_P, position_P=position_P, n_rows=1)
            adapters = adapter.bind(memory, positions(n, 1))
        alone = lm.hidden(h_BTD[row : row + 1, :n], adapters=adapters)
        torch.testing.assert_close(batch[row, place[row]], alone[0], rtol=1e-4, atol=1e-5)


def test_rows_that_see_nothing_give_no_nan(lm, h_BTD):
    adapter = randomise(ImageAdapter(CONFIG), seed=2)
    memory = remember(adapter, make_features(4))
    position_BT = positions().clone()
    position_BT[1], position_BT[0, :5] = -1, -1  # all padding, and a padded beginning
    hidden = lm.hidden(h_BTD, adapters=adapter.bind(memory, position_BT))
    hidden.square().mean().backward()
    assert hidden.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters())


def test_half_precision_autocast_runs(lm, adapter, h_BTD):
    exact = run(lm, adapter, make_features(4), h_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(lm, adapter, make_features(4), h_BTD)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.99


def test_gates_are_read_per_layer():
    adapter = ImageAdapter(CONFIG)
    adapter.blocks["4"].cross_attn_mlp_gate.data.fill_(0.5)
    assert adapter.gates() == {1: (0.0, 0.0), 4: (0.0, pytest.approx(0.46212, abs=1e-5))}
