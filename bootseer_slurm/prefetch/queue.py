"""The queues of one job's prefetch. The first that has work goes on:

    ahead   of images and environments without a plan: what lies behind the job's reads (prefetch/ahead.py)
    hot     what a start touches: the tables of images, then the blocks of all plans by the time of touch, and
            both ends of checkpoints, where their headers are
    whole   checkpoints without a plan: all of them
    cold    the rest, once the start is over: one run at a time, and `cold_rate` bytes a second; not of
            checkpoints with a plan, for the next start has another one

Thread-safe: its lock guards all work and runs.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import Any, NamedTuple

from bootseer_slurm.cache.fetching import Usage
from bootseer_slurm.events import EventLog
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.prefetch.work import AHEAD_MS, Run, Work

_ORDER = ("image", "environment", "checkpoint")


class Chosen(NamedTuple):
    """Work to go on with: a run of hot blocks, or whatever is missing; is that cold, and since when."""

    work: Work
    run: Run | None
    cold: bool
    begin_s: float


class Queue:
    """All work of one job."""

    def __init__(self, phase: JobPhase, log: EventLog, *, cold_rate_bytes: int) -> None:
        self.lock = threading.RLock()
        self.works: list[Work] = []
        self._phase = phase
        self._log = log
        self._cold_rate_bytes = cold_rate_bytes
        self._hot: list[Run] = []  # a heap
        self._numbers = itertools.count()
        self._is_cold = False  # the phase changes a moment before the queue does, which its lock guards
        self._cold_busy = False
        self._cold_from_s = 0.0
        self._more = threading.Condition(self.lock)  # there is something to do
        self._hot_ends = threading.Condition(self.lock)  # of some work

    def add(self, work: Work) -> None:
        """Take up new work; earlier work of the same layer was dropped."""
        with self.lock:
            self.works = [each for each in self.works if each.layer is not work.layer] + [work]
            self.works.sort(key=lambda each: _ORDER.index(each.layer.ref.kind))

    def push(self, work: Work, at_ms: int, first: int, last: int) -> None:
        """Queue a run of hot blocks."""
        with self.lock:
            heapq.heappush(self._hot, Run(at_ms, next(self._numbers), first, last, work))
            work.hot_left += at_ms != AHEAD_MS
            self._more.notify()

    def next(self) -> Chosen | None:
        """Wait for something to do; None at the job's end."""
        with self.lock:
            while not self._phase.has_ended:
                while self._hot:
                    run = heapq.heappop(self._hot)
                    if run.is_needed:
                        run.work.in_flight += 1
                        return Chosen(run.work, run, False, 0.0)
                cold = self._is_cold
                work = next((each for each in self.works if self._wants_more(each)), None)
                pause_s = self._cold_from_s - time.monotonic() if cold else 0.0
                if work is not None and pause_s <= 0:
                    work.in_flight += 1
                    self._cold_busy = cold
                    return Chosen(work, None, cold, time.monotonic())
                self._more.wait(pause_s if work is not None and pause_s > 0 else None)
        return None

    def done(self, chosen: Chosen, count_bytes: int | None) -> None:
        """A stream is done with what `next` gave it.

        count_bytes: brought of whatever was missing; 0: there is no more, or no room. None: it failed.
        """
        work, run, cold, begin_s = chosen
        with self.lock:
            work.in_flight -= 1
            if run is None:
                work.exhausted = work.exhausted or not count_bytes
            elif count_bytes is None and run.is_needed and not run.ahead:
                self.end_hot(work, there=False)
            if cold:
                self._cold_busy = False
                self._cold_from_s = begin_s + (count_bytes or 0) / self._cold_rate_bytes
                self._more.notify()
            self.end_if_done(work)

    def counts(self) -> tuple[int, int]:
        """How many runs of hot blocks wait, and how many layers that are read whole are not done."""
        with self.lock:
            return len(self._hot), sum(self._wants_more(work) for work in self.works)

    def start_over(self) -> None:
        """The job trains: all that is left is cold."""
        with self.lock:
            self._is_cold = True
            self._hot = [run for run in self._hot if not run.ahead]
            for work in self.works:
                if not work.hot_over:
                    self.end_hot(work, there=False)
                self.end_if_done(work)
            self._more.notify_all()

    def wait_hot(self, timeout_s: float) -> None:
        """Wait until the hot blocks of some work are over, `timeout_s` at most; with the lock held."""
        self._hot_ends.wait(timeout_s)

    def wake_all(self) -> None:
        """The job has ended, or work was dropped: have all that wait look again."""
        with self.lock:
            self._more.notify_all()
            self._hot_ends.notify_all()

    def end_hot(self, work: Work, *, there: bool) -> None:
        """The hot blocks of a work are there, or do not come; with the lock held."""
        work.hot_over, work.hot_there = True, there
        self._hot_ends.notify_all()
        if there and work.planned:
            layout = work.layer.handle.reader.blob.layout
            tell(
                self._log,
                "hot",
                work,
                bytes=sum(layout.block_size(block) for block in work.times_ms),
                blocks=len(work.times_ms),
            )

    def end_if_done(self, work: Work) -> None:
        """See whether a work is done: all is there, or nothing more will be brought; with the lock held."""
        kind, blob = work.layer.ref.kind, work.layer.handle.reader.blob
        never = work.planned and kind == "checkpoint"
        never = never or (not self._cold_rate_bytes and (work.planned or self._is_cold))
        if work.hot_over and (never or (work.planned and blob.complete)):
            work.exhausted = True
        if work.hot_over and work.exhausted and not (work.in_flight or work.ended or self._phase.has_ended):
            work.ended = True
            tell_bytes(self._log, "end", work)

    def _wants_more(self, work: Work) -> bool:
        """Whether a work has something to do beside its hot blocks."""
        if self._is_cold:
            return not (work.exhausted or self._cold_busy) and self._cold_rate_bytes > 0
        return not (work.exhausted or work.planned) and work.layer.ref.kind == "checkpoint"


def tell_bytes(log: EventLog, name: str, work: Work) -> None:
    """The event that says what was brought of a layer, and from where."""
    usage = work.layer.handle.usage
    tell(
        log,
        name,
        work,
        bytes=usage.fetched_bytes,
        bytes_cached=work.layer.handle.cached_bytes,
        bytes_origin=usage.origin_bytes,
        bytes_peers=usage.peer_bytes,
        source=_source(usage),
    )


def _source(usage: Usage) -> str:
    """The one source that the event names: other nodes only where nothing else gave bytes."""
    if usage.store_bytes:
        return "store"
    return "peers" if usage.peer_bytes and not usage.origin_bytes else "origin"


def tell(log: EventLog, name: str, work: Work, **figures: Any) -> None:
    dur_s = time.monotonic() - work.start_s
    log.emit("prefetch", name, dur_s=dur_s, target=work.layer.label, what=work.layer.ref.kind, **figures)
