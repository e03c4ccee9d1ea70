"""The stream's promises: one order whatever the workers and ranks, exact resume, weights, epochs, counted skips."""

from __future__ import annotations

import io
import itertools
import json
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import load_image
from data.shards import Sample, Source, open_source, write_shard
from data.stream import BatchStream, Item, Mix, SourceOrder, Stage, StreamConfig

SIZES = {"a": (7, 11, 5), "b": (13, 2), "c": (3,)}


def caption(sample: Sample) -> str:
    return sample.messages[-1]["content"][0]["text"]


def length(sample: Sample) -> int:
    return len(caption(sample))


def picture(sample: Sample) -> tuple[str, tuple[int, int]]:
    return sample.key, load_image(sample.messages[0]["content"][0]["image"]).size


def noisy(sample: Sample) -> float:
    return float(torch.rand(()))


def slow(sample: Sample) -> str:
    time.sleep(0.01)
    return sample.key


def faulty(sample: Sample) -> str:
    raise TypeError("a mistake of the programmer")


def jpeg(width: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, 29), 40).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Three sources with captions of many lengths."""
    folder = tmp_path_factory.mktemp("shards")
    for name, sizes in SIZES.items():
        (folder / name).mkdir()
        numbers = itertools.count()
        for shard, size in enumerate(sizes):
            rows = [(f"{name}{i}", "x" * (1 + 37 * i % 23)) for i in itertools.islice(numbers, size)]
            samples = [{"__key__": key, "jpg": b"", "txt": text} for key, text in rows]
            write_shard(folder / name / f"{shard}.tar", samples)
    return [open_source(folder / name, name=name) for name in SIZES]


def stream(sources: list[Source], **options: Any) -> BatchStream:
    config = StreamConfig(
        batch_size=options.pop("batch_size", 2),
        bucket_batches=options.pop("bucket_batches", 3),
        shuffle_window=options.pop("shuffle_window", 6),
        **{name: options.pop(name) for name in StreamConfig.__dataclass_fields__ if name in options},
    )
    return BatchStream(sources, config, **{"prepare": attrgetter("key"), "length": length} | options)


def take(stream: BatchStream, n: int) -> list[Any]:
    return list(itertools.islice(stream, n))


def test_same_seed_same_order(sources: list[Source]):
    assert take(stream(sources), 50) == take(stream(sources), 50)
    assert take(stream(sources), 50) != take(stream(sources, seed=1), 50)


@pytest.mark.parametrize("measure", [length, None])
def test_resume_at_every_position(sources: list[Source], measure: Callable | None):
    options = {"length": measure, "batches_per_step": 2}
    n_batches = 31
    whole = take(stream(sources, **options), n_batches + 5)
    running = stream(sources, **options)
    batches = iter(running)
    for position in range(n_batches):
        state = json.loads(json.dumps(running.state_dict()))
        resumed = stream(sources, **options)
        resumed.load_state_dict(state)
        assert take(resumed, 5) == whole[position : position + 5]
        assert next(batches) == whole[position]


def test_resume_costs_the_same_after_a_billion_batches(sources: list[Source]):
    far = stream(sources)
    far.load_state_dict(far.state_dict() | {"batches": 10**9})
    start = time.perf_counter()
    take(far, 1)
    assert time.perf_counter() - start < 5
    assert far.epochs["a"] == 2e9 * 0.334 / 23


def test_new_iterator_goes_on(sources: list[Source]):
    whole = take(stream(sources), 20)
    interrupted = stream(sources)
    assert [batch for n in (3, 1, 9, 7) for batch in take(interrupted, n)] == whole


def test_workers_change_nothing(sources: list[Source]):
    assert take(stream(sources, num_workers=2), 40) == take(stream(sources), 40)


def test_resume_with_workers(sources: list[Source]):
    """What workers had fetched ahead is neither lost nor repeated, in another number of workers."""
    whole = take(stream(sources), 20)
    first = stream(sources, num_workers=2)
    assert take(first, 7) == whole[:7]
    second = stream(sources, num_workers=1)
    second.load_state_dict(first.state_dict())
    assert take(second, 5) == whole[7:12]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_the_batches_of_one(sources: list[Source], world_size: int):
    alone = take(stream(sources, batches_per_step=4), 48)
    ranks = [
        take(stream(sources, batches_per_step=4, rank=rank, world_size=world_size), 48 // world_size)
        for rank in range(world_size)
    ]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == alone


def test_resume_on_another_number_of_ranks(sources: list[Source]):
    alone = take(stream(sources, batches_per_step=4), 40)
    pair = [stream(sources, batches_per_step=4, rank=rank, world_size=2) for rank in range(2)]
    for part in pair:
        take(part, 10)  # 5 steps of 2 batches a rank
    single = stream(sources, batches_per_step=4)
    single.load_state_dict(pair[1].state_dict())
    assert take(single, 20) == alone[20:]
    three = single.state_dict() | {"batches": 3}
    with pytest.raises(ValueError, match="3 batches do not share out among 2 ranks"):
        pair[0].load_state_dict(three)


def test_rank_reads_only_its_own_samples(sources: list[Source]):
    """No rank measures what another trains on."""
    seen: list[str] = []

    def spy(sample: Sample) -> int:
        seen.append(sample.key)
        return length(sample)

    half = stream(sources, batches_per_step=2, world_size=2, length=spy)
    trained = [key for batch in take(half, 6) for key in batch]
    assert Counter(seen) == Counter(trained)


def test_each_epoch_has_every_sample_once(sources: list[Source]):
    source = sources[0]
    keys = [key for batch in take(stream([source], batch_size=1, length=None), 3 * 23) for key in batch]
    epochs = [keys[:23], keys[23:46], keys[46:]]
    for epoch in epochs:
        assert sorted(epoch) == sorted(sample.key for sample in source)
    assert epochs[0] != epochs[1] != epochs[2]


def test_buckets_hold_each_sample_once(sources: list[Source]):
    """23 batches of a lane's windows of 3 x 2 need 138 samples, which are 6 whole epochs."""
    keys = [key for batch in take(stream([sources[0]]), 69) for key in batch]
    assert set(Counter(keys).values()) == {6}


def test_epochs_are_counted(sources: list[Source]):
    mixed = stream(sources, weights=[2, 1, 1])
    take(mixed, 1000)  # 2000 samples, two blocks of the mix
    assert mixed.epochs == {"a": 1000 / 23, "b": 500 / 15, "c": 500 / 3}


def test_buckets_save_padding(sources: list[Source]):
    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(batch) - sum(batch) for batch in batches)

    sorted_batches = take(stream([sources[0]], prepare=length, batch_size=4, bucket_batches=8), 64)
    raw_batches = take(stream([sources[0]], prepare=length, batch_size=4, length=None), 64)
    assert 0 < padded(sorted_batches) < 0.5 * padded(raw_batches)


def test_weights(sources: list[Source]):
    """Exact in every block of 1000, near anywhere."""
    mix = Mix(sources, [5, 3, 2], seed=3, window=6)
    drawn = np.array([mix.pick(position).source for position in range(5000)])
    for block in drawn.reshape(5, 1000):
        assert np.bincount(block).tolist() == [500, 300, 200]
    share = (drawn[:, None] == np.arange(3)).cumsum(0) / np.arange(1, 5001)[:, None]
    assert np.abs(share[200:] - [0.5, 0.3, 0.2]).max() < 0.1
    assert np.bincount(drawn[:1234]).tolist() == mix.drawn(1234)
    assert not (drawn[:1000] == drawn[1000:2000]).all()


def test_uneven_weights_fill_the_block(sources: list[Source]):
    assert Mix(sources, [1, 1, 1], seed=0, window=6).quota.tolist() == [334, 333, 333]
    with pytest.raises(ValueError, match="'c' gets under 1/1000"):
        Mix(sources, [1, 1, 1e-4], seed=0, window=6)
    for weights in ([1, 1], [1, 1, 0], [1, 1, float("nan")]):
        with pytest.raises(ValueError, match="weights: need one positive number"):
            Mix(sources, weights, seed=0, window=6)


def test_shuffle_stays_local_yet_mixes():
    """A window of 20 samples of shards of 10 touches at most 3 shards, in no particular order, each epoch anew."""
    order = SourceOrder(np.full(13, 10), window=20, seed=(5,))
    epochs = np.array([order[n] for n in range(260)]).reshape(2, 130)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(130))
        assert max(len(set(epoch[i : i + 20] // 10)) for i in range(0, 130, 20)) <= 3
        assert np.mean(np.diff(epoch) == 1) < 0.2
        assert (np.diff(epoch[::20]) < 0).any()
    assert (epochs[0] != epochs[1]).mean() > 0.8


def test_empty_shards_are_passed_over():
    order = SourceOrder(np.array([0, 3, 0, 2, 0]), window=4, seed=(0,))
    assert sorted(order[n] for n in range(5)) == list(range(5))


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Source, list[str]]:
    """40 pictures, of which 2 files are cut short, 1 is text and 1 has no caption; and the keys of those four."""
    samples = [{"__key__": f"{i:02d}", "jpg": jpeg(31 + i), "txt": "x" * (1 + i % 5)} for i in range(40)]
    for i in (3, 17):
        samples[i]["jpg"] = samples[i]["jpg"][:400]
    samples[11]["jpg"] = b"<html>not found</html>"
    samples[23]["txt"] = " "
    write_shard(tmp_path / "0.tar", samples)
    return open_source(tmp_path, name="web"), ["03", "17", "11", "23"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_replaced_and_counted(damaged: tuple[Source, list[str]], num_workers: int, caplog):
    source, bad = damaged
    options = {"prepare": picture, "batch_size": 4, "bucket_batches": 2, "num_workers": num_workers}
    run = stream([source], **options)
    with caplog.at_level(logging.WARNING, logger="data.stream"):
        batches = take(run, 20)  # two epochs
    keys = [key for batch in batches for key, _ in batch]
    assert len(keys) == 80 and not set(bad) & set(keys)
    assert all(size == (31 + int(key), 29) for batch in batches for key, size in batch)
    causes = run.skipped["web"]
    assert causes["the picture has no caption (sample * of shard *)"] >= 2
    assert any("is not a picture" in cause for cause in causes) and any("cut short" in cause for cause in causes)
    assert len(causes) == 3 and causes.total() >= 8
    assert sorted(record.args[0] for record in caplog.records)[1:] == [11, 23] and len(caplog.records) == 3

    half = stream([source], **options)
    take(half, 9)
    resumed = stream([source], **options | {"num_workers": 0})
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert take(resumed, 11) == batches[9:] and resumed.skipped == run.skipped


def test_too_many_bad_samples_stop_the_run(damaged: tuple[Source, list[str]]):
    run = stream([damaged[0]], prepare=picture, max_bad_fraction=0.05)
    with pytest.raises(
        ValueError, match=r"sources: 5[1-9] bad samples among \d+, more than max_bad_fraction 0\.05.*cut short"
    ):
        take(run, 1000)
    tolerant = stream([damaged[0]], prepare=picture, max_bad_fraction=0.2)
    take(tolerant, 600)
    assert tolerant.skipped["web"].total() > 100


def test_source_with_nothing_good_stops_the_run(tmp_path: Path):
    write_shard(tmp_path / "0.tar", [{"__key__": str(i), "jpg": b"junk", "txt": "x"} for i in range(30)])
    run = stream([open_source(tmp_path, name="web")], prepare=picture)
    with pytest.raises(ValueError, match=r"20 samples of source 'web' in a row are bad, .* image: .*is not a picture"):
        take(run, 1)


def test_mistakes_in_code_are_not_skipped(sources: list[Source]):
    with pytest.raises(TypeError, match="a mistake of the programmer"):
        take(stream(sources, prepare=faulty), 1)


def test_random_transforms_repeat_and_leave_the_global_generator(sources: list[Source]):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = take(stream(sources, prepare=noisy), 12)
    assert torch.equal(torch.get_rng_state(), before)
    assert take(stream(sources, prepare=noisy, num_workers=1), 12) == drawn
    assert torch.equal(torch.get_rng_state(), before)
    assert len({number for batch in drawn for number in batch}) == 24


def test_stage_can_be_sent_to_another_process(sources: list[Source]):
    item = Item(Mix(sources, [1, 1, 1], seed=0, window=6).pick(5))
    stage = Stage(sources, length, seed=0)
    assert pickle.loads(pickle.dumps(stage))[item] == stage[item]


def test_collate_and_wait(sources: list[Source]):
    run = stream(sources, prepare=slow, collate="+".join, length=None)
    (batch,) = take(run, 1)
    assert len(batch.split("+")) == 2 and 0.02 <= run.wait_seconds < 5


def test_state_of_another_stream_is_refused(sources: list[Source]):
    state = stream(sources).state_dict()
    for options in ({"batch_size": 4}, {"seed": 1}, {"length": None}, {"weights": [1, 2, 3]}, {"batches_per_step": 2}):
        with pytest.raises(ValueError, match="state: saved from another stream"):
            stream(sources, **options).load_state_dict(state)
    with pytest.raises(ValueError, match=r"sources was .*'c', 3"):
        stream(sources[:2]).load_state_dict(state)


def test_wrong_arguments(sources: list[Source]):
    with pytest.raises(ValueError, match="sources: need at least one, each with its own name"):
        stream([sources[0], sources[0]])
    with pytest.raises(ValueError, match="batches_per_step 3 must be a multiple of world_size 2"):
        stream(sources, batches_per_step=3, world_size=2)
    for name, value in {"batch_size": 0, "seed": -1, "max_bad_fraction": 1.5, "num_workers": -1}.items():
        with pytest.raises(ValueError, match=name):
            StreamConfig(**{"batch_size": 2} | {name: value})
