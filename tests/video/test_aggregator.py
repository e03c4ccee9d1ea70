"""The temporal aggregator: transformers' perceiver resampler, time, and that clips and padding never mix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from video.aggregator import AggregatorConfig, TemporalAggregator
from video.clips import Clips
from vision.tiling import Pictures

WIDTH, N_TOKENS, FACTOR = 14, 5, 3
CONFIG = AggregatorConfig(
    width=WIDTH, n_layers=2, n_heads=3, head_dim=7, ffn_dim=4 * WIDTH, n_tokens=N_TOKENS, max_tiles=4, factor=FACTOR,
    n_time_steps=7,
)  # fmt: skip

# A full and a short group; a group of one frame; full groups of another grid; a clip shorter than a group.
N_FRAMES = (5, 1, 6, 2)
GRIDS = ((1, 2), (2, 2), (1, 3), (1, 2))
N_EFFECTIVE = (2, 1, 2, 1)


def make_aggregator(config: AggregatorConfig = CONFIG) -> TemporalAggregator:
    """An aggregator of numbers at which every part matters."""
    aggregator = TemporalAggregator(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in aggregator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return aggregator.eval()


def make_clips(n_frames=N_FRAMES, grids=GRIDS, n_tiles: int = 4) -> Clips:
    """Clips of these lengths and grids; their pixels do not matter to the aggregator."""
    grid_P2 = torch.tensor([grid for n, grid in zip(n_frames, grids, strict=True) for _ in range(n)])
    return Clips(Pictures(torch.zeros(len(grid_P2), n_tiles, 3, 1, 1), grid_P2), torch.tensor(n_frames))


def make_features(clips: Clips, seed: int = 2, width: int = WIDTH, n_tokens: int = N_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*clips.frames.tiles_PNCHW.shape[:2], n_tokens, width, generator=generator)


# ------------------------------------------------------------------------------------------------------------- oracle


def test_every_effective_frame_is_that_of_transformers_resampler():
    """Each group alone, its real tiles only, through Idefics2's resampler, whose latents are where ours start."""
    aggregator, clips = make_aggregator(), make_clips()
    features = make_features(clips)
    ours, n_effective = aggregator(features, clips)
    assert tuple(n_effective.tolist()) == N_EFFECTIVE
    timed = aggregator.add_time(features, clips)
    effective = 0
    for frames, grid in zip(timed.split(N_FRAMES), GRIDS, strict=True):
        n_tiles = grid[0] * grid[1]
        for group in frames[:, :n_tiles].split(FACTOR):
            theirs = Idefics2PerceiverResampler(
                Idefics2PerceiverConfig(
                    hidden_size=WIDTH, resampler_n_latents=n_tiles * N_TOKENS, resampler_depth=2, resampler_n_heads=3,
                    resampler_head_dim=7, num_key_value_heads=3, rms_norm_eps=CONFIG.norm_eps,
                )
            )  # fmt: skip
            state = {name: tensor for name, tensor in aggregator.state_dict().items() if not name.startswith("time_")}
            state["latents"] = (state["latents"][:n_tiles] + group.mean(0)).flatten(0, 1)
            theirs.load_state_dict(state, strict=True)  # the names are theirs
            context = group.flatten(0, 2)[None]
            expected = theirs.eval()(context, torch.ones(context.shape[:2], dtype=torch.bool))
            torch.testing.assert_close(ours[effective, :n_tiles].flatten(0, 1), expected[0], rtol=1e-4, atol=1e-5)
            assert not ours[effective, n_tiles:].any()
            effective += 1
    assert effective == len(ours) == sum(N_EFFECTIVE)


# --------------------------------------------------------------------------------------------------------------- time


def test_a_clip_of_as_many_frames_as_time_steps_takes_each_row_of_the_tables():
    aggregator, clips = make_aggregator(), make_clips((7,), ((1, 1),), n_tiles=1)
    features = make_features(clips)
    expected = features * (1 + aggregator.time_scale[:, None, None]) + aggregator.time_shift[:, None, None]
    torch.testing.assert_close(aggregator.add_time(features, clips), expected)


def test_at_first_a_latent_starts_from_a_cosine_transform_of_its_place():
    """Over a whole clip the mean is that of the frames plus, channel by channel, a term of their cosine transform."""
    aggregator, clips = TemporalAggregator(CONFIG), make_clips((7,), ((1, 1),), n_tiles=1)
    aggregator.time_shift.data.zero_()
    features = make_features(clips)
    phase_K111 = torch.exp(-1j * torch.pi * torch.arange(7) / 14).view(-1, 1, 1, 1)
    terms = (torch.fft.fft(features, n=14, dim=0)[:7] * phase_K111).real / 7  # the cosine transform through the FFT's
    start = aggregator.add_time(features, clips).mean(0)
    for channel in range(WIDTH):
        expected = terms[0, ..., channel] + terms[1 + channel % 3, ..., channel]
        torch.testing.assert_close(start[..., channel], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n_frames", "times"),
    [
        (1, [3.0]),  # the middle of the clip
        (2, [1.25, 4.75]),
        (14, [0, *(i / 2 + 0.25 for i in range(12)), 6]),
    ],
)
def test_time_is_that_of_the_clip(n_frames, times):
    """With a table that counts its rows, a frame of zeros reads where in the clip it stands."""
    aggregator, clips = make_aggregator(), make_clips((n_frames,), ((1, 1),), n_tiles=1)
    aggregator.time_shift.data.copy_(torch.arange(7)[:, None].expand(7, WIDTH))
    shown = aggregator.add_time(torch.zeros(n_frames, 1, N_TOKENS, WIDTH), clips)
    torch.testing.assert_close(shown[:, 0, 0, 0], torch.tensor(times))


def test_order_matters_within_a_group_and_among_groups():
    aggregator, clips = make_aggregator(), make_clips((6,), ((1, 1),), n_tiles=1)
    features = make_features(clips)
    features[3:] = features[:3]  # two groups of the same frames
    x, _ = aggregator(features, clips)
    assert not torch.isclose(x[0], x[1], atol=1e-3).all()
    swapped, _ = aggregator(features[[1, 0, 2, 3, 4, 5]], clips)
    assert not torch.isclose(x[0], swapped[0], atol=1e-3).all()
    assert torch.equal(x[1], swapped[1])


# ----------------------------------------------------------------------------------------------------------- contract


def test_a_clip_in_a_batch_equals_the_clip_alone():
    aggregator, clips = make_aggregator(), make_clips()
    features = make_features(clips)
    together = aggregator(features, clips)[0].split(N_EFFECTIVE)
    for mine, own, n, grid in zip(features.split(N_FRAMES), together, N_FRAMES, GRIDS, strict=True):
        n_tiles = grid[0] * grid[1]  # alone, a clip has no padded tiles
        alone, _ = aggregator(mine[:, :n_tiles], make_clips((n,), (grid,), n_tiles))
        torch.testing.assert_close(own[:, :n_tiles], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("frame", "group"), [(0, 0), (4, 1), (5, 2), (6, 3), (11, 4), (13, 5)])
def test_a_frame_changes_its_own_group_alone(frame, group):
    aggregator, clips = make_aggregator(), make_clips()
    features = make_features(clips)
    other = features.clone()
    other[frame] += 1
    changed_E = (aggregator(features, clips)[0] != aggregator(other, clips)[0]).flatten(1).any(1)
    assert changed_E.nonzero().flatten().tolist() == [group]


def test_padded_tiles_are_never_read():
    aggregator, clips = make_aggregator(), make_clips()
    features = make_features(clips)
    hostile = features.clone()
    hostile[~clips.frames.valid_PN] = torch.nan
    assert torch.equal(aggregator(features, clips)[0], aggregator(hostile, clips)[0])


def test_a_new_factor_needs_no_new_parameter():
    aggregator, clips = make_aggregator(), make_clips()
    before = aggregator.state_dict()
    aggregator.regroup(2)
    x, n_effective = aggregator(make_features(clips), clips)
    assert n_effective.tolist() == [3, 1, 3, 1] and len(x) == 8
    fresh = TemporalAggregator(dataclasses.replace(CONFIG, factor=2)).eval()
    fresh.load_state_dict(before, strict=True)
    assert torch.equal(fresh(make_features(clips), clips)[0], x)


def test_larger_tiles_keep_the_layout_of_the_latents():
    aggregator = make_aggregator()
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
    aggregator.latents.data[:, 1:, 0], aggregator.latents.data[:, 1:, 1] = rows.flatten(), columns.flatten()
    class_token = aggregator.latents[:, :1].clone()
    aggregator.resize(4)
    assert aggregator.latents.requires_grad and aggregator.latents.shape == (4, 17, WIDTH)
    assert torch.equal(aggregator.latents[:, :1], class_token)
    patches = aggregator.latents[:, 1:].unflatten(1, (4, 4))
    assert (patches[:, 1:, :, 0] > patches[:, :-1, :, 0]).all() and (patches[:, :, 1:, 1] > patches[:, :, :-1, 1]).all()
    clips = make_clips()
    x, _ = aggregator(make_features(clips, n_tokens=17), clips)
    assert x.shape == (6, 4, 17, WIDTH)


def test_gradients_reach_every_parameter():
    aggregator, clips = make_aggregator(), make_clips()
    features = make_features(clips).requires_grad_()
    weight = torch.randn(6, 4, N_TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    (aggregator(features, clips)[0] * weight).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in aggregator.parameters())
    assert features.grad is not None
    read_PN = features.grad.flatten(2).any(-1)
    assert torch.equal(read_PN, clips.frames.valid_PN)


@pytest.mark.parametrize("change", ["n_layers", "max_tiles", "factor", "n_time_steps"])
def test_bad_configs_are_refused(change):
    with pytest.raises(ValueError, match=change):
        dataclasses.replace(CONFIG, **{change: 0})


@pytest.mark.parametrize(
    ("config", "message"),
    [({"n_tokens": 17}, "call resize"), ({"width": 15}, "of width 15"), ({"max_tiles": 3}, "max_tiles 3")],
)
def test_features_that_do_not_fit_are_refused(config, message):
    clips = make_clips()
    with pytest.raises(ValueError, match=message):
        TemporalAggregator(dataclasses.replace(CONFIG, **config))(make_features(clips), clips)
