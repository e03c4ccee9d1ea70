"""The scheduler: every unit goes through every stage once, in order; audio comes early; the end reaches everybody."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from speech.scheduler import Chunks, Schedule, Scheduler, Work


class Row:
    """Stages that keep `lag` units back until the end and make `made` units of each, run as the scheduler says."""

    def __init__(self, scheduler: Scheduler, lags: tuple[int, ...], made: tuple[int, ...]) -> None:
        self.scheduler, self.lags, self.made = scheduler, lags, made
        self.held = [0] * len(lags)
        self.finals = [0] * len(lags)
        self.log: list[Work] = []
        self.n_out = 0

    def run(self) -> None:
        while work := self.scheduler.next():
            self.log.append(work)
            self.held[work.stage] += work.n
            keep = 0 if work.final else min(self.lags[work.stage], self.held[work.stage])
            n = (self.held[work.stage] - keep) * self.made[work.stage]
            self.held[work.stage] = keep
            self.finals[work.stage] += work.final
            if work.stage == len(self.lags) - 1:
                self.n_out += n
            self.scheduler.done(n)


@pytest.mark.parametrize("seed", range(30))
def test_every_unit_comes_out_once_however_it_arrives(seed: int) -> None:
    rng = random.Random(seed)
    stages = [
        Chunks(first=first, largest=first + rng.randrange(9), lookahead=rng.randrange(4))
        for first in rng.choices(range(1, 8), k=3)
    ]
    scheduler = Scheduler(stages, growth=rng.choice((1.0, 1.5, 3.0)))
    row = Row(scheduler, tuple(rng.choices(range(5), k=3)), (1, rng.randint(1, 7), 5))
    arrivals = rng.choices(range(7), k=rng.randrange(12))
    for n in arrivals:
        scheduler.arrived(n)
        row.run()
        assert not scheduler.finished
    scheduler.end()
    row.run()
    assert scheduler.finished and scheduler.next() is None
    assert row.n_out == sum(arrivals) * row.made[1] * 5
    assert row.finals == [1, 1, 1] if sum(arrivals) else row.log == []
    for i, chunks in enumerate(stages):
        calls = [work for work in row.log if work.stage == i]
        assert all(work.n <= chunks.largest + (chunks.lookahead if k == 0 else 0) for k, work in enumerate(calls))
        if len(calls) > 1:
            assert calls[0].n >= chunks.first + chunks.lookahead


def test_audio_comes_before_more_phones_are_taken_and_chunks_grow() -> None:
    row = Row(Scheduler([Chunks(first=1, largest=2, lookahead=1), Chunks(first=2, largest=4)]), (1, 0), (3, 1))
    row.scheduler.arrived(1)
    row.run()
    assert row.log == []
    row.scheduler.arrived(6)
    row.run()
    assert row.log == [
        *(Work(0, 3, False), Work(1, 4, False)),  # all that waits, up to the largest and the look-ahead
        *(Work(0, 2, False), Work(1, 4, False), Work(1, 4, False)),
        *(Work(0, 2, False), Work(1, 4, False)),
    ]
    row.scheduler.end()
    row.run()
    assert row.log[-3:] == [
        Work(0, 0, True),
        Work(1, 4, False),
        Work(1, 1, True),
    ]  # a stage's last call may have no units
    assert row.n_out == 21


def test_a_cancelled_voice_has_nothing_to_do() -> None:
    row = Row(Schedule.after(0, 0, 0).scheduler(), (0, 0, 0), (1, 5, 240))
    row.scheduler.arrived(50)
    assert row.scheduler.next() == Work(0, 8, False)
    row.scheduler.cancel()  # while the call runs
    row.scheduler.done(1)
    assert row.scheduler.next() is None and row.scheduler.finished


def test_offline_is_one_call_a_stage() -> None:
    row = Row(Scheduler([Chunks(first=10**9, largest=10**9)] * 3), (2, 1, 0), (1, 5, 240))
    for _ in range(9):
        row.scheduler.arrived(11)
        row.run()
    row.scheduler.end()
    row.run()
    assert row.log == [Work(0, 99, True), Work(1, 99, True), Work(2, 495, True)]


@pytest.mark.parametrize(("first", "largest"), [(0, 3), (4, 3)])
def test_chunks_must_have_a_size(first: int, largest: int) -> None:
    with pytest.raises(ValueError, match="first <= largest"):
        Chunks(first=first, largest=largest)


def test_it_needs_no_torch() -> None:
    code = "import sys, speech.scheduler; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
