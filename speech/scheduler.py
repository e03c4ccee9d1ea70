"""What each stage of a streaming voice may do next: a state machine without tensors, threads or clocks.

Stages stand in a row; each takes units of its own kind (phones, frames) and hands what it makes to the next one. A stage runs when
as many units wait for it as its chunk has, or when no more will come, and takes what is there. Chunks are small at the beginning,
so that audio comes early, and grow, so that later calls cost less. The last stage that can run goes first: what is nearly audio
becomes audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How many units a stage waits for, and how many it takes in a call.

    Attributes:
        first: what it waits for at first; later ever more, up to `largest`.
        largest: of any call; also how long a cancelled voice may go on, and how much a pause of the writer holds back.
        lookahead: units that its first call has on top, which keeps as many back.
    """

    first: int
    largest: int
    lookahead: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.largest:
            raise ValueError(f"chunks: need 1 <= first <= largest, got {self.first} and {self.largest}")


@dataclass(frozen=True)
class Work:
    """A call to make: stage `stage` takes the next `n` units that wait for it; `final` if they are its last."""

    stage: int
    n: int
    final: bool


@dataclass
class _Stage:
    largest: int
    chunk: float  # of the next call
    lookahead: int
    waiting: int = 0
    n_taken: int = 0
    ended: bool = False  # no more units will come
    finished: bool = False  # its last call is done, or never needed


class Scheduler:
    """Chooses the calls of one utterance.

    Usage: tell what arrives (`arrived`, `end`), make the calls that `next` returns until it returns None, and after each tell
    what it made (`done`). Work is handed out one call at a time.

    Args:
        stages: chunk sizes of the stages, from text to audio.
        growth: a stage's chunk after each of its calls, as a multiple of the chunk before.
    """

    def __init__(self, stages: Sequence[Chunks], growth: float = 1.3) -> None:
        if not stages or growth < 1:
            raise ValueError(f"scheduler: need at least one stage and a growth of 1 or more, got {stages} and {growth}")
        self._stages = [_Stage(chunks.largest, chunks.first, chunks.lookahead) for chunks in stages]
        self._growth = growth
        self._work: Work | None = None
        self._cancelled = False

    @property
    def finished(self) -> bool:
        """Whether nothing will ever be left to do."""
        return self._cancelled or self._stages[-1].finished

    def arrived(self, n: int) -> None:
        """The first stage got `n` more units."""
        assert not self._stages[0].ended
        self._stages[0].waiting += n

    def end(self) -> None:
        """The first stage gets no more units."""
        self._stages[0].ended = True

    def cancel(self) -> None:
        """Nothing is handed out any more. May be called at any time, from any thread."""
        self._cancelled = True

    def next(self) -> Work | None:
        """The call to make now; None when there is nothing to do until more arrives, or at all."""
        assert self._work is None, "the call before is not done"
        if self._cancelled:
            return None
        self._skip_silent()
        for i in reversed(range(len(self._stages))):
            stage = self._stages[i]
            more = 0 if stage.n_taken else stage.lookahead
            if stage.finished or (stage.waiting < stage.chunk + more and not stage.ended):
                continue
            n = min(stage.waiting, stage.largest + more)
            self._work = Work(i, n, final=stage.ended and n == stage.waiting)
            return self._work
        return None

    def done(self, made: int) -> None:
        """The call was made, and `made` units came out of it."""
        work, self._work = self._work, None
        assert work is not None
        stage = self._stages[work.stage]
        stage.waiting -= work.n
        stage.n_taken += work.n
        stage.chunk = min(stage.largest, stage.chunk * self._growth)
        stage.finished = work.final
        if work.stage + 1 < len(self._stages):
            after = self._stages[work.stage + 1]
            after.waiting += made
            after.ended = work.final

    def _skip_silent(self) -> None:
        """A stage that never got a unit needs no last call: where nothing is said, nothing runs."""
        ended = self._stages[0].ended
        for stage in self._stages:
            if not (ended and stage.waiting == stage.n_taken == 0):
                return
            stage.ended = stage.finished = True


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Chunk sizes of a voice, which change when audio is made and never what it is.

    Attributes:
        prosody, acoustic: in phones.
        vocoder: in frames.
    """

    prosody: Chunks
    acoustic: Chunks
    vocoder: Chunks
    growth: float = 1.3

    @classmethod
    def after(cls, prosody: int, acoustic: int, vocoder: int) -> Schedule:
        """The usual one, for models that keep so many units back.

        The first audio is at least 360 ms, time enough for a few more words to be written and said. Chunks grow slowly, as
        nothing is gained by waiting before the audio is well ahead.
        """
        return cls(
            prosody=Chunks(first=4, largest=8, lookahead=prosody + acoustic),
            acoustic=Chunks(first=4, largest=16, lookahead=acoustic),
            vocoder=Chunks(first=36, largest=64, lookahead=vocoder),
        )

    def scheduler(self) -> Scheduler:
        return Scheduler((self.prosody, self.acoustic, self.vocoder), self.growth)
