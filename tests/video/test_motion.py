"""Local motion: starts as large as told, looks around in time and place, sees change alone, never mixes clips or tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.video.test_aggregator import CONFIG, GRIDS, N_FRAMES, WIDTH, make_clips, make_features
from video.aggregator import TemporalAggregator
from video.clips import Clips
from video.motion import LocalMotion

SIDE = 5
N_TOKENS = SIDE * SIDE + 1


def make_motion() -> LocalMotion:
    motion = LocalMotion(WIDTH, 6, 1e-5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in motion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return motion.eval()


def features_of(clips: Clips) -> Tensor:
    return make_features(clips, n_tokens=N_TOKENS)


def test_it_starts_as_large_as_it_is_told():
    """Features as large as tokens of an image part may be."""
    torch.manual_seed(0)
    motion, clips = LocalMotion(WIDTH, 6, 1e-5), make_clips()
    motion.start_at(4.0)
    features, valid_PN = 4 * features_of(clips), clips.frames.valid_PN
    added = (motion(features, clips) - features)[valid_PN][:, 1:]
    assert added.square().mean().sqrt().item() == pytest.approx(4.0, rel=0.4)


def test_a_clip_in_a_batch_equals_the_clip_alone():
    motion, clips = make_motion(), make_clips()
    features = features_of(clips)
    together = motion(features, clips).split(N_FRAMES)
    for mine, own, n, grid in zip(features.split(N_FRAMES), together, N_FRAMES, GRIDS, strict=True):
        n_tiles = grid[0] * grid[1]
        alone = motion(mine[:, :n_tiles], make_clips((n,), (grid,), n_tiles))
        assert not torch.allclose(alone, mine[:, :n_tiles], atol=1e-2)
        torch.testing.assert_close(own[:, :n_tiles], alone, rtol=1e-5, atol=1e-5)


def test_padded_tiles_are_never_read():
    motion, clips = make_motion(), make_clips()
    features, valid_PN = features_of(clips), clips.frames.valid_PN
    hostile = features.masked_fill(~valid_PN[..., None, None], torch.nan)
    assert torch.equal(motion(features, clips)[valid_PN], motion(hostile, clips)[valid_PN])


def test_what_rests_is_the_same_whatever_it_shows():
    motion, clips = make_motion(), make_clips((6,), ((1, 1),), n_tiles=1)
    one, other = (features_of(clips)[i : i + 1].expand(6, -1, -1, -1) for i in (0, 1))
    assert not torch.allclose(one, other, atol=0.1)
    torch.testing.assert_close(motion(one, clips) - one, motion(other, clips) - other, rtol=1e-4, atol=1e-4)


def test_it_sees_its_clip_three_patches_around_and_no_class_token():
    motion, clips = make_motion(), make_clips((20,), ((1, 2),), n_tiles=2)
    features = features_of(clips)
    features.requires_grad_()
    corner = 1  # the token after the class token is the top left patch
    motion(features, clips)[10, 1, corner].sum().backward()
    assert features.grad is not None
    seen_TNL = features.grad.abs().sum(-1) > 0
    assert seen_TNL.any((1, 2)).all()  # seven frames to either side by convolution, the others in the mean of the clip
    assert seen_TNL.any((0, 2)).tolist() == [False, True]
    around = seen_TNL[:, 1, 1:].any(0).unflatten(0, (SIDE, SIDE))
    assert around[:4, :4].all() and not around[4:].any() and not around[:, 4:].any()
    assert not seen_TNL[:, :, 0].any()
    assert torch.equal(motion(features, clips)[:, :, 0], features[:, :, 0])


def test_an_aggregator_with_it_tells_a_clip_from_its_reverse_within_a_group():
    """Also where time is switched off, so that it is the convolutions that tell."""
    torch.manual_seed(0)
    aggregator = TemporalAggregator(dataclasses.replace(CONFIG, n_tokens=N_TOKENS, motion_channels=6, factor=5)).eval()
    with torch.no_grad():
        aggregator.time_scale.zero_()
        aggregator.time_shift.zero_()
        clips = make_clips((5,), ((1, 1),), n_tiles=1)
        features = features_of(clips)
        assert aggregator.motion is not None
        aggregator.motion.up_proj.weight.zero_()
        torch.testing.assert_close(aggregator(features, clips)[0], aggregator(features.flip(0), clips)[0])
        aggregator.motion.start_at(1.0)
        apart = aggregator(features, clips)[0] - aggregator(features.flip(0), clips)[0]
    assert apart.abs().mean() > 1e-3


def test_tiles_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="motion_channels: 7 tokens are no class token and a square of patches"):
        dataclasses.replace(CONFIG, n_tokens=7, motion_channels=4)
