"""The video adapter: placement, sizes, and the contract that clips reach exactly the tokens that may see them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lm.config import PRESETS as LM_PRESETS
from lm.config import LlamaConfig
from lm.model import KVCache, Llama
from mm.config import IMAGE_PRESETS
from video.adapter import VideoAdapter, VideoAdapterConfig
from video.aggregator import AggregatorConfig
from video.clips import Clips
from vision.adapter import CrossMemory, ImageAdapter, ImageAdapterConfig, chain_adapters
from vision.encoder import PRESETS as ENCODER_PRESETS
from vision.tiling import Pictures

LM = LlamaConfig(vocab_size=41, dim=30, n_layers=5, n_heads=15, n_kv_heads=3, ffn_dim=23, head_dim=2, rope_theta=1e4)
N_FEATURES, N_TOKENS, WIDTH, N_TILES = 19, 5, 14, 2
IMAGE = dataclasses.replace(ImageAdapterConfig.for_lm(LM, N_FEATURES, every=2), layers=(1, 4))
CONFIG = VideoAdapterConfig(
    **{field.name: getattr(IMAGE, field.name) for field in dataclasses.fields(IMAGE)} | {"layers": (4,)},
    aggregator=AggregatorConfig(
        width=WIDTH, n_layers=1, n_heads=3, head_dim=7, ffn_dim=11, n_tokens=N_TOKENS, max_tiles=N_TILES, factor=3,
        n_time_steps=7,
    ),
)  # fmt: skip

# Row 0: text, a clip of 5 frames, a picture, text, a clip of one frame, text. Row 1: text only. Row 2: clip, picture.
N_FRAMES, GRIDS = (5, 1, 4), ((1, 2), (1, 1), (2, 1))
PLACES = {"row_V": torch.tensor([0, 0, 2]), "position_V": torch.tensor([2, 6, 1])}
PICTURES = Pictures(torch.zeros(2, 1, 3, 1, 1), torch.ones(2, 2, dtype=torch.long))
PICTURE_PLACES = {"row_P": torch.tensor([0, 2]), "position_P": torch.tensor([4, 2])}
N_ROWS, LENGTH = 3, 11


def randomise(module, seed: int):
    """Fills a module with numbers at which every part matters, gates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 1))
    return module.eval()


@pytest.fixture(scope="module")
def lm() -> Llama:
    return randomise(Llama(LM), seed=1)


@pytest.fixture(scope="module")
def adapter() -> VideoAdapter:
    return randomise(VideoAdapter(CONFIG), seed=2)


@pytest.fixture(scope="module")
def image_adapter() -> ImageAdapter:
    return randomise(ImageAdapter(IMAGE), seed=3)


@pytest.fixture(name="h_BTD")
def embeddings() -> Tensor:
    return torch.randn(N_ROWS, LENGTH, LM.dim, generator=torch.Generator().manual_seed(4))


def make_clips(n_frames=N_FRAMES, grids=GRIDS) -> Clips:
    grid_P2 = torch.tensor([grid for n, grid in zip(n_frames, grids, strict=True) for _ in range(n)])
    return Clips(Pictures(torch.zeros(len(grid_P2), N_TILES, 3, 1, 1), grid_P2), torch.tensor(n_frames))


def make_features(n: int = sum(N_FRAMES), n_tiles: int = N_TILES, seed: int = 5) -> Tensor:
    return torch.randn(n, n_tiles, N_TOKENS, N_FEATURES, generator=torch.Generator().manual_seed(seed))


def remember(adapter: VideoAdapter, features: Tensor) -> CrossMemory:
    return adapter.memory(features, make_clips(), **PLACES, n_rows=N_ROWS)


def positions(n_tokens: int = LENGTH, n_rows: int = N_ROWS) -> Tensor:
    return torch.arange(n_tokens).expand(n_rows, -1)


def run(lm: Llama, adapter: VideoAdapter, features: Tensor, h_BTD: Tensor) -> Tensor:
    return lm.hidden(h_BTD, adapters=adapter.bind(remember(adapter, features), positions()))


# --------------------------------------------------------------------------------------------------- shapes and sizes


@pytest.mark.parametrize(
    ("preset", "layers", "total"),
    [
        ("llama3-8b", (15, 31), 0.6e9),
        ("llama3-70b", (15, 31, 47, 63, 79), 4.6e9),
        ("llama3-405b", (17, 33, 49, 65, 81, 97, 113), None),  # the paper gives no number
    ],
)
@pytest.mark.parametrize("tile_size", [224, 448])
def test_placement_and_sizes_of_the_paper(preset, layers, total, tile_size):
    lm, encoder = LM_PRESETS[preset](), dataclasses.replace(ENCODER_PRESETS["vit-h-14"](), tile_size=tile_size)
    image = ImageAdapterConfig.for_lm(lm, encoder.feature_dim)
    with torch.device("meta"):
        adapter = VideoAdapter(VideoAdapterConfig.for_lm(lm, image, encoder))
    assert adapter.config.layers == layers
    assert adapter.config.aggregator.max_tiles == 4 and adapter.config.aggregator.factor == 16
    if total:
        assert sum(p.numel() for p in adapter.parameters()) == pytest.approx(total, rel=0.035)


@pytest.mark.parametrize(
    ("lm", "preset", "layers", "most"),
    [("smollm2-135m", "bundled", (13, 21, 29), 3_500_000), ("debug", "debug", None, 100_000)],
)
def test_small_presets_stay_small(lm, preset, layers, most):
    config = LM_PRESETS[lm]()
    image = IMAGE_PRESETS[preset](config)
    with torch.device("meta"):
        adapter = VideoAdapter(VideoAdapterConfig.for_lm(config, image.adapter, image.encoder, preset))
    assert adapter.config.layers == (layers or image.adapter.layers)
    assert sum(p.numel() for p in adapter.parameters()) <= most


def test_bad_presets_are_refused():
    encoder = ENCODER_PRESETS["debug"]()
    with pytest.raises(ValueError, match="choose one of debug, bundled, paper"):
        VideoAdapterConfig.for_lm(LM, IMAGE, encoder, "papper")
    with pytest.raises(ValueError, match="there are only 2"):
        VideoAdapterConfig.for_lm(LM, IMAGE, encoder, "paper")


def test_clips_and_tokens_must_match(adapter):
    with pytest.raises(ValueError, match="1 clips for 3 clip tokens"):
        adapter.memory(make_features(4), make_clips((4,), ((1, 2),)), **PLACES, n_rows=N_ROWS)


# ----------------------------------------------------------------------------------------------------------- contract


def test_memory_is_the_effective_frames_of_each_row(adapter):
    """Row by row, clip by clip, without padding in between: 5 frames of 2 tiles are 2 effective frames, and so on."""
    features, clips = make_features(), make_clips()
    x, n_effective = adapter.aggregator(adapter.projection(features), clips)
    assert n_effective.tolist() == [2, 1, 2]
    row_0 = torch.cat([x[0].flatten(0, 1), x[1].flatten(0, 1), x[2, 0]])
    row_2 = x[3:].flatten(0, 2)
    memory = remember(adapter, features)
    for layer, block in adapter.layer_blocks():
        for row, expected in ((0, row_0), (2, row_2)):
            for ours, theirs in zip(memory.kv[layer], block.cross_attn.keys_values(expected), strict=True):
                torch.testing.assert_close(ours[row, :, : len(expected)], theirs.transpose(0, 1), rtol=1e-4, atol=1e-5)
    position_1T1 = positions(n_rows=1)[..., None]
    seen_BT = ((memory.start_BM[:, None] <= position_1T1) & (position_1T1 < memory.end_BM[:, None])).sum(-1)
    assert seen_BT[0].tolist() == [0, 0, *[4 * N_TOKENS] * 4, *[N_TOKENS] * 5]
    assert not seen_BT[1].any()
    assert seen_BT[2].tolist() == [0, *[4 * N_TOKENS] * 10]


def test_a_new_adapter_changes_nothing(lm, h_BTD):
    torch.manual_seed(6)
    adapter = VideoAdapter(CONFIG)
    assert torch.equal(run(lm, adapter, make_features(), h_BTD), lm.hidden(h_BTD))
    adapter.open_gates(0.5)
    assert adapter.gates() == {4: (pytest.approx(0.46212, abs=1e-5),) * 2}
    assert torch.equal(run(lm, adapter, make_features(), h_BTD), lm.hidden(h_BTD))


def test_tokens_without_a_clip_get_the_language_model_bit_for_bit(lm, adapter, h_BTD):
    with_clips, alone = run(lm, adapter, make_features(), h_BTD), lm.hidden(h_BTD)
    sees = torch.tensor([[t >= 2 for t in range(LENGTH)], [False] * LENGTH, [t >= 1 for t in range(LENGTH)]])
    assert torch.equal(with_clips[~sees], alone[~sees])
    assert not torch.isclose(with_clips[sees], alone[sees]).all(-1).any()


@pytest.mark.parametrize(
    ("frame", "row", "tokens"), [(0, 0, range(2, 6)), (4, 0, range(2, 6)), (5, 0, range(6, 11)), (9, 2, range(1, 11))]
)
def test_a_frame_reaches_the_tokens_from_its_clip_to_the_next(adapter, h_BTD, frame, row, tokens):
    features = make_features()
    other = features.clone()
    other[frame] = make_features(1, seed=7)
    before, after = (adapter.bind(remember(adapter, x), positions())[4](h_BTD) for x in (features, other))
    changed_BT = (before != after).any(-1)
    assert changed_BT.nonzero().tolist() == [[row, t] for t in tokens]


def test_padded_tiles_are_never_read(lm, adapter, h_BTD):
    features = make_features()
    hostile = features.clone()
    hostile[~make_clips().frames.valid_PN] = torch.nan
    assert torch.equal(run(lm, adapter, features, h_BTD), run(lm, adapter, hostile, h_BTD))


def test_pictures_and_clips_do_not_hide_each_other(lm, adapter, image_adapter, h_BTD):
    """A clip before a picture is seen after it, and each medium changes no token before it and no other row."""

    def both(clip_features: Tensor, picture_features: Tensor) -> Tensor:
        pictures = image_adapter.memory(picture_features, PICTURES, **PICTURE_PLACES, n_rows=N_ROWS)
        adapters = chain_adapters(
            adapter.bind(remember(adapter, clip_features), positions()), image_adapter.bind(pictures, positions())
        )
        return lm.hidden(h_BTD, adapters=adapters)

    clips, pictures = make_features(), make_features(2, 1)
    before = both(clips, pictures)
    other_clip, other_picture = clips.clone(), pictures.clone()
    other_clip[0], other_picture[0] = make_features(1, seed=7), make_features(1, 1, seed=7)
    for changed, first in ((both(other_clip, pictures), 2), (both(clips, other_picture), 4)):
        assert (before != changed).any(-1).nonzero().tolist() == [[0, t] for t in range(first, LENGTH)]


def test_the_video_block_runs_before_the_image_block(adapter, image_adapter, h_BTD):
    pictures = image_adapter.memory(make_features(2, 1), PICTURES, **PICTURE_PLACES, n_rows=N_ROWS)
    video, image = (
        adapter.bind(remember(adapter, make_features()), positions()),
        image_adapter.bind(pictures, positions()),
    )
    chained = chain_adapters(video, image)
    assert set(chained) == {1, 4}
    assert torch.equal(chained[4](h_BTD), image[4](video[4](h_BTD)))
    assert not torch.equal(chained[4](h_BTD), video[4](image[4](h_BTD)))
    assert torch.equal(chained[1](h_BTD), image[1](h_BTD))


def test_prefill_and_steps_equal_the_whole_at_every_split(lm, adapter, h_BTD):
    memory = remember(adapter, make_features())
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
    features, lengths = make_features(), [LENGTH, 5, 7]
    padded, valid = torch.randn(N_ROWS, LENGTH, LM.dim), torch.zeros(N_ROWS, LENGTH, dtype=torch.bool)
    place = [slice(LENGTH - n, None) if side == "left" else slice(0, n) for n in lengths]
    for row, n in enumerate(lengths):
        padded[row, place[row]], valid[row, place[row]] = h_BTD[row, :n], True
    position_BT = torch.where(valid, valid.long().cumsum(-1) - 1, -1)
    batch = lm.hidden(padded, valid_BS=valid, adapters=adapter.bind(remember(adapter, features), position_BT))
    assert batch.isfinite().all()
    per_clip = features.split(N_FRAMES)
    for row, n in enumerate(lengths):
        mine = [v for v in range(len(N_FRAMES)) if PLACES["row_V"][v] == row]
        adapters = {}
        if mine:
            memory = adapter.memory(
                torch.cat([per_clip[v] for v in mine]),
                make_clips([N_FRAMES[v] for v in mine], [GRIDS[v] for v in mine]),
                row_V=torch.zeros(len(mine), dtype=torch.long),
                position_V=PLACES["position_V"][mine],
                n_rows=1,
            )
            adapters = adapter.bind(memory, positions(n, 1))
        alone = lm.hidden(h_BTD[row : row + 1, :n], adapters=adapters)
        torch.testing.assert_close(batch[row, place[row]], alone[0], rtol=1e-4, atol=1e-5)


def test_a_clip_that_rests_starts_as_its_picture_is_seen(lm, h_BTD):
    """In a smaller shape too, as far as what it leaves out has no weight: exactly, but for tokens being brought to one size."""
    image = randomise(ImageAdapter(IMAGE), seed=3)
    smaller = dataclasses.replace(CONFIG, n_heads=9, ffn_dim=8)
    adapter = randomise(VideoAdapter(smaller), seed=6)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        image.projection.bias.zero_()
        narrow = [torch.randn(shape, generator=generator) for shape in ((LM.dim, WIDTH), (WIDTH, N_FEATURES))]
        image.projection.weight.copy_(narrow[0] @ narrow[1])
        block = image.blocks["4"]
        for head in (0, 3, 6, 8, 10, 14):  # two of each group of five
            block.cross_attn.o_proj.weight[:, 2 * head : 2 * head + 2] = 0
        block.mlp.down_proj.weight[:, 1::2] = 0
        block.mlp.down_proj.weight[:, 16:] = 0
        picture_1NLF = make_features(1)
        picture_1NLF = 3 * picture_1NLF / image.projection(picture_1NLF).square().mean(-1, keepdim=True).sqrt()
    adapter.start_from(image, picture_1NLF)
    with torch.no_grad():
        adapter.aggregator.time_scale.zero_()
        adapter.aggregator.time_shift.zero_()
    clips = make_clips((3,), ((1, 2),))
    place = {"position_V": torch.tensor([2]), "row_V": torch.tensor([0])}
    memory = adapter.memory(picture_1NLF.expand(3, -1, -1, -1), clips, **place, n_rows=1)
    pictures = Pictures(torch.zeros(1, N_TILES, 3, 1, 1), torch.tensor([[1, 2]]))
    seen = image.memory(picture_1NLF, pictures, row_P=place["row_V"], position_P=place["position_V"], n_rows=1)
    only = {4: image.bind(seen, positions(n_rows=1))[4]}
    expected = lm.hidden(h_BTD[:1], adapters=only)
    assert not torch.allclose(expected, lm.hidden(h_BTD[:1]), atol=1e-2)
    actual = lm.hidden(h_BTD[:1], adapters=adapter.bind(memory, positions(n_rows=1)))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_what_cannot_start_from_the_image_adapter_says_so():
    image = ImageAdapter(dataclasses.replace(IMAGE, layers=(1,)))
    with pytest.raises(ValueError, match=r"block 4 has no image block to start from; those are \['1'\]"):
        VideoAdapter(CONFIG).start_from(image, make_features(1))
    with pytest.raises(ValueError, match="5 heads of keys, 2 wide, cannot start from 3 that are 2 wide"):
        VideoAdapter(dataclasses.replace(CONFIG, n_kv_heads=5)).start_from(ImageAdapter(IMAGE), make_features(1))


def test_gradients_reach_every_parameter_and_nothing_else(h_BTD):
    lm, adapter = randomise(Llama(LM), seed=1).requires_grad_(False), randomise(VideoAdapter(CONFIG), seed=2)
    features = make_features()
    run(lm, adapter, features, h_BTD).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters())
    assert features.grad is None and all(p.grad is None for p in lm.parameters())


def test_resizing_and_regrouping_are_kept_in_the_config():
    adapter = VideoAdapter(CONFIG)
    adapter.resize(3)
    adapter.regroup(2)
    assert (adapter.config.aggregator.n_tokens, adapter.config.aggregator.factor) == (10, 2)
    fresh = VideoAdapter(adapter.config)
    fresh.load_state_dict(adapter.state_dict(), strict=True)


def test_half_precision_autocast_runs(lm, adapter, h_BTD):
    exact = run(lm, adapter, make_features(), h_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(lm, adapter, make_features(), h_BTD)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.99
