"""The prefetch of one job on this node: brings blocks of what it starts from, several reads in flight.

Four queues, the first that has work goes on:

    ahead   of images and environments without a plan: what lies behind the job's reads (cache/ahead.py)
    hot     what a start touches: the tables of images, then the blocks of all plans by the time of touch, and
            both ends of checkpoints, where their headers are
    whole   checkpoints without a plan: all of them
    cold    the rest, once the start is over: one run at a time, and `cold_rate` bytes a second; not of
            checkpoints with a plan, for the next start has another one

Reads that somebody waits for go before all of these (fetch/turns.py). During the start nothing is fetched of
a blob with a plan but the plan, and of an image or environment without one nothing but what its readers come
to: the link is then the job's. Threads: `streams` of its own, started with the first part.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from bootseer_slurm.agent.hot import hot_times, runs
from bootseer_slurm.agent.memory import Memory
from bootseer_slurm.agent.part import Part
from bootseer_slurm.blob.trace import Plan
from bootseer_slurm.cache.ahead import Ahead
from bootseer_slurm.cache.reader import OnFault
from bootseer_slurm.config import PrefetchConfig
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.fetch.turns import Turns

_ATTEMPTS = 5
_ORDER = ("image", "environment", "checkpoint")
_AHEAD_MS = -2  # before all that plans name
# What the link brings in this time is brought ahead of a read, and one block at least. On a fast link a
# longer run costs fewer requests, each half a millisecond of CPU. On a slow one bytes in vain cost more:
# imports that touch 246 MB bring 17 MB in vain with one block, 67 MB with as many as were touched before.
_MOST_AHEAD_S = 0.005
# And this even behind a single block: a miss costs a reader 0.5 ms, which on a fast link is many blocks.
_LEAST_AHEAD_S = 0.003
_FORECAST_EVERY_S = 0.05
_FORECAST_MARGIN = 1.1  # what is late comes as soon as it is asked for: reads go before the prefetch
_OTHERS_S = 1.0  # a wait for a block that others fetch, before it is looked at again
_NO_PLAN = Plan()


@dataclass(slots=True, eq=False)
class _Work:
    """One part and how far it is. times_ms: when a start touches each hot block, in order; -1: at once."""

    part: Part
    times_ms: dict[int, int]
    planned: bool
    in_flight: int = 0
    hot_left: int = 0  # runs queued and in flight
    hot_over: bool = False  # there, failed, or dropped
    hot_there: bool = False
    exhausted: bool = False
    ended: bool = False
    start_s: float = field(default_factory=time.monotonic)
    in_time: bool = False  # as forecast at:
    forecast_s: float = -math.inf

    def lacking(self) -> list[int]:
        """The hot blocks that are not there."""
        blob = self.part.reader.blob
        return [block for block in self.times_ms if not blob.blocks.has(block, block)]


@dataclass(slots=True, order=True)
class _Run:
    """Hot blocks that one read may bring. at_ms: when a start touches them. ahead: they lie behind a read."""

    at_ms: int
    number: int
    first: int = field(compare=False)
    last: int = field(compare=False)
    work: _Work = field(compare=False)

    @property
    def ahead(self) -> bool:
        return self.at_ms == _AHEAD_MS

    @property
    def wanted(self) -> bool:
        return not self.work.ended if self.ahead else not self.work.hot_over


class Prefetch:
    """Brings parts until it is stopped. Thread-safe."""

    def __init__(
        self, turns: Turns, config: PrefetchConfig, memory: Memory, *, log: EventLog, on_fault: OnFault
    ) -> None:
        """turns: of the fetch process that reads. on_fault(name, message): told of what cannot be read."""
        self._turns = turns
        self._config = config
        self._log = log
        self._on_fault = on_fault
        self._works: list[_Work] = []
        self._hot: list[_Run] = []  # a heap
        self._numbers = itertools.count()
        self._memory = memory
        self._start_over = False
        self._cold_busy = False
        self._cold_from_s = 0.0
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)  # there is something to do
        self._hot_ends = threading.Condition(self._lock)  # of some part
        self._retrying = Retrying(
            retry=retry_if_exception_type(StoreError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_exponential(multiplier=0.2, max=5),
            sleep=self._pause,
            reraise=True,
        )
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(
        self,
        part: Part,
        *,
        plan: Plan = _NO_PLAN,
        first: Sequence[tuple[int, int]] = (),
        ends: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Bring this part's blocks too.

        first: ranges (offset, bytes) that its start needs at once. ends: those that come after all plans.
        """
        layout = part.reader.blob.layout
        self._log.emit("prefetch", "begin", bytes=layout.size_bytes, target=part.label, what=part.wish.kind)
        planned = bool(plan.blocks or plan.full_starts)
        times_ms = hot_times(layout, plan, first, ends if plan.blocks or not planned else ())
        work = _Work(part, times_ms, planned)
        lacking = work.lacking()
        with self._lock:
            self._works = [each for each in self._works if each.part is not part]  # it was dropped
            self._works.append(work)
            self._works.sort(key=lambda work: _ORDER.index(work.part.wish.kind))
            for block, first_block, last_block in runs(lacking, layout.chunk_bytes // layout.block_bytes):
                self._queue(work, times_ms[block], first_block, last_block)
            if not lacking:
                self._end_hot(work, there=True)
            while len(self._threads) < self._config.streams:
                self._threads.append(threading.Thread(target=self._stream, name="prefetch", daemon=True))
                self._threads[-1].start()
            self._settle(work)
            self._more.notify_all()
        if not (planned or work.ended or part.wish.kind == "checkpoint"):
            part.reader.on_read = functools.partial(self._bring_ahead, work, Ahead(layout.blocks))

    def _bring_ahead(self, work: _Work, ahead: Ahead, first: int, last: int) -> None:
        """Have what lies behind a read, which must not wait, brought before all that plans name."""
        blob = work.part.reader.blob
        blocks_per_s = self._turns.bytes_per_s / blob.layout.block_bytes
        most, least = (max(1, int(blocks_per_s * each)) for each in (_MOST_AHEAD_S, _LEAST_AHEAD_S))
        behind = ahead.touch(first, last, most, least_blocks=least)
        if behind is None or blob.blocks.has(*behind):
            return
        with self._lock:
            if not self._start_over:
                heapq.heappush(self._hot, _Run(_AHEAD_MS, next(self._numbers), *behind, work))
                self._more.notify()

    def drop(self, part: Part) -> None:
        """Bring no more of this part, which nobody will read; `add` brings it again."""
        with self._lock:
            for work in self._works:
                if work.part is part and not work.ended:
                    work.hot_over = work.exhausted = work.ended = True
                    self._forget_reads(work)
                    self._tell(work, "stopped")
            self._hot_ends.notify_all()

    def wait_hot(self, part: Part, timeout_s: float) -> bool:
        """Wait until what the part's start needs is there, or will be there before it is needed.

        A start touches its blocks one after the other, and the link goes on meanwhile: waiting for the last
        of them would cost the time that the first take. False when they are not, in that time or at all.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            work = next((work for work in self._works if work.part is part), None)
            while work is not None and not (work.hot_over or self._over.is_set()):
                left_s = deadline_s - time.monotonic()
                if time.monotonic() - work.forecast_s >= _FORECAST_EVERY_S:  # for all tasks
                    work.in_time, work.forecast_s = self._comes_in_time(work), time.monotonic()
                if left_s <= 0 or work.in_time:
                    return left_s > 0
                self._hot_ends.wait(min(left_s, _FORECAST_EVERY_S))
            return work is not None and work.hot_there

    def queued(self) -> tuple[int, int]:
        """How many runs of hot blocks wait, and how many parts that are read whole are not done."""
        with self._lock:
            return len(self._hot), sum(self._wants_more(work) for work in self._works)

    def start_over(self) -> None:
        """The job trains: all that is left is cold."""
        with self._lock:
            self._start_over = True
            self._hot = [run for run in self._hot if not run.ahead]
            for work in self._works:
                if not work.hot_over:
                    self._end_hot(work, there=False)
                self._settle(work)
            self._more.notify_all()

    def stop(self) -> None:
        """Begin no more reads; those in flight end with their fetch process."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            self._more.notify_all()
            self._hot_ends.notify_all()
            for work in self._works:
                self._forget_reads(work)
                if not work.ended:
                    self._tell(work, "stopped")

    def join(self, timeout_s: float) -> None:
        """Wait for the streams, each at most `timeout_s`."""
        for thread in self._threads:
            thread.join(timeout_s)

    # The streams

    def _stream(self) -> None:
        while chosen := self._next():
            work, run, cold = chosen
            failure: BootseerError | None = None
            try:
                if run is not None:
                    self._bring_hot(run)
                else:
                    self._bring_any(work, cold=cold)
            except BootseerError as error:
                failure = error
            except Exception as error:  # a stream that died would hold up what waits for it
                failure = StoreError(f"{type(error).__name__}: {error}")
            if failure and not self._over.is_set():
                self._on_fault("prefetch_failed", f"{work.part.label}: {failure.message}")
            with self._lock:
                work.in_flight -= 1
                if failure and run is None:
                    work.exhausted = True
                elif failure and run is not None and run.wanted and not run.ahead:
                    self._end_hot(work, there=False)
                if cold:
                    self._cold_busy = False
                    self._more.notify()
                self._settle(work)

    def _next(self) -> tuple[_Work, _Run | None, bool] | None:
        """Wait for a hot run, or a part to go on with, and whether that is cold; None at the end."""
        with self._lock:
            while not self._over.is_set():
                while self._hot:
                    run = heapq.heappop(self._hot)
                    if run.wanted:
                        run.work.in_flight += 1
                        return run.work, run, False
                cold = self._start_over
                work = next((each for each in self._works if self._wants_more(each)), None)
                pause_s = self._cold_from_s - time.monotonic() if cold else 0.0
                if work is not None and pause_s <= 0:
                    work.in_flight += 1
                    self._cold_busy = cold
                    return work, None, cold
                self._more.wait(pause_s if work is not None and pause_s > 0 else None)
        return None

    def _wants_more(self, work: _Work) -> bool:
        """Whether a part has something to do beside what is hot."""
        if self._start_over:
            return not (work.exhausted or self._cold_busy) and self._config.cold_rate_bytes > 0
        return not (work.exhausted or work.planned) and work.part.wish.kind == "checkpoint"

    def _bring_hot(self, run: _Run) -> None:
        work, first = run.work, run.first
        blob = work.part.reader.blob
        if not (blob.file.full or blob.blocks.has(first, run.last)):
            first = self._retried(work, first, run.last)
        else:
            first = run.last + 1
        with self._lock:
            if first <= run.last:
                self._queue(work, run.at_ms, first, run.last)
            if run.ahead:
                return
            work.hot_left -= 1
            if work.hot_left or work.hot_over:
                return
        # Others may have had some of them in flight, and failed.
        while (lacking := work.lacking()) and not (blob.file.full or work.hot_over or self._over.is_set()):
            blob.blocks.wait(lacking[0], _OTHERS_S)
            if not blob.blocks.has(lacking[0], lacking[0]):
                self._retried(work, lacking[0], lacking[0])
        with self._lock:
            if not work.hot_over:
                self._end_hot(work, there=not lacking)

    def _bring_any(self, work: _Work, *, cold: bool) -> None:
        begin_s = time.monotonic()
        count_bytes = self._retried(work)
        with self._lock:
            work.exhausted = work.exhausted or not count_bytes
            if cold:
                self._cold_from_s = begin_s + count_bytes / self._config.cold_rate_bytes

    def _retried(self, work: _Work, first: int = -1, last: int = -1) -> int:
        """Fetch a hot run, and give the block to go on with; or what is missing, and give its bytes."""
        if first < 0:
            return self._retrying(self._fetch_any, work)
        return self._retrying(self._fetch_hot, work, first, last)

    def _pause(self, pause_s: float) -> None:
        self._over.wait(pause_s)

    def _fetch_any(self, work: _Work) -> int:
        with self._turns.prefetch() as limit_bytes:
            if self._over.is_set():
                return 0
            offset, size_bytes = work.part.reader.prefetch_run(limit_bytes)
        self._account(work, offset, size_bytes)
        return size_bytes

    def _fetch_hot(self, work: _Work, first: int, last: int) -> int:
        reader = work.part.reader
        size_bytes = (last - first + 1) * reader.blob.layout.block_bytes
        with self._turns.prefetch(size_bytes, urgent=True) as limit_bytes:
            if self._over.is_set():
                return last + 1
            push = reader.push is not None and self._memory.may_push(limit_bytes)
            end = reader.prefetch_blocks(first, last, limit_bytes, push=push)
        block_bytes = reader.blob.layout.block_bytes
        self._account(work, first * block_bytes, (end - first) * block_bytes)
        return end

    def _account(self, work: _Work, offset: int, size_bytes: int) -> None:
        if work.part.wish.kind == "checkpoint":
            self._memory.brought(work.part.reader.blob, offset, size_bytes)

    # With the lock held

    def _forget_reads(self, work: _Work) -> None:
        """Be told no more of this part's reads; another job's prefetch may be."""
        told = work.part.reader.on_read
        if isinstance(told, functools.partial) and told.args[0] is work:
            work.part.reader.on_read = None

    def _comes_in_time(self, work: _Work) -> bool:
        """Whether each block that is not there yet will come before a start that begins now touches it."""
        lacking, rate_bytes = work.lacking(), self._turns.bytes_per_s
        if not lacking:
            return True  # and the stream that brought the last one is about to say so
        if not rate_bytes or any(work.times_ms[block] < 0 for block in lacking):
            return False
        begin_ms = min((at_ms for at_ms in work.times_ms.values() if at_ms > 0), default=0)
        block_bytes = work.part.reader.blob.layout.block_bytes
        return all(
            count * block_bytes / rate_bytes * _FORECAST_MARGIN < (work.times_ms[block] - begin_ms) / 1000
            for count, block in enumerate(lacking, start=1)
        )

    def _queue(self, work: _Work, at_ms: int, first: int, last: int) -> None:
        heapq.heappush(self._hot, _Run(at_ms, next(self._numbers), first, last, work))
        work.hot_left += at_ms != _AHEAD_MS

    def _end_hot(self, work: _Work, *, there: bool) -> None:
        work.hot_over, work.hot_there = True, there
        self._hot_ends.notify_all()
        if there and work.planned:
            layout = work.part.reader.blob.layout
            self._log.emit(
                "prefetch",
                "hot",
                bytes=sum(layout.block_size(block) for block in work.times_ms),
                blocks=len(work.times_ms),
                dur_s=time.monotonic() - work.start_s,
                target=work.part.label,
                what=work.part.wish.kind,
            )

    def _settle(self, work: _Work) -> None:
        """See whether a part is done with: all is there, or nothing more will be brought."""
        never = work.planned and work.part.wish.kind == "checkpoint"
        never = never or (not self._config.cold_rate_bytes and (work.planned or self._start_over))
        if work.hot_over and (never or (work.planned and work.part.reader.blob.complete)):
            work.exhausted = True
        if work.hot_over and work.exhausted and not (work.in_flight or work.ended or self._over.is_set()):
            work.ended = True
            self._tell(work, "end")

    def _tell(self, work: _Work, name: str) -> None:
        usage, before = work.part.reader.usage, work.part.before
        self._log.emit(
            "prefetch",
            name,
            bytes=usage.fetched_bytes - before.fetched_bytes,
            bytes_cached=work.part.cached_bytes,
            bytes_origin=usage.origin_bytes - before.origin_bytes,
            dur_s=time.monotonic() - work.start_s,
            source="store" if usage.store_bytes > before.store_bytes else "origin",
            target=work.part.label,
            what=work.part.wish.kind,
        )
