"""The prefetch of one job on this node: it brings blocks of the job's layers, several reads in flight.

Reads that somebody waits for go before the prefetch (userproc/link.py); queue.py has the order of the rest.
During the start nothing is fetched of a layer with a plan but the plan, and of an image or environment
without one nothing but what its readers come to: the link is then the job's. Threads: `streams` of its own,
started with the first layer.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.cache.sources import OnFault
from bootseer_slurm.config import PrefetchConfig
from bootseer_slurm.events import EventLog
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.prefetch.ahead import Ahead
from bootseer_slurm.prefetch.budget import MemoryBudget
from bootseer_slurm.prefetch.order import hot_times, in_turn, runs
from bootseer_slurm.prefetch.queue import Queue, tell_bytes
from bootseer_slurm.prefetch.streams import Streams
from bootseer_slurm.prefetch.work import AHEAD_MS, Work
from bootseer_slurm.userproc.link import Link

# What the link brings in this time is brought ahead of a read, and one block at least. On a fast link a
# longer run costs fewer requests, each half a millisecond of CPU. On a slow one bytes in vain cost more:
# imports that touch 246 MB bring 17 MB in vain with one block, 67 MB with as many as were touched before.
_MOST_AHEAD_S = 0.005
# And this even behind a single block: a miss costs a reader 0.5 ms, which on a fast link is many blocks.
_LEAST_AHEAD_S = 0.003
_FORECAST_EVERY_S = 0.05


class Scheduler:
    """Brings layers until the job ends. Thread-safe."""

    def __init__(
        self,
        link: Link,
        config: PrefetchConfig,
        budget: MemoryBudget,
        phase: JobPhase,
        log: EventLog,
        on_fault: OnFault,
    ) -> None:
        """link: of the process that reads. on_fault(name, message): told of what cannot be read."""
        self._link = link
        self._phase = phase
        self._log = log
        self._queue = Queue(phase, log, cold_rate_bytes=config.cold_rate_bytes)
        self._streams = Streams(self._queue, link, budget, phase, on_fault, count=config.streams)
        self._stopped = False

    def add(
        self,
        layer: Layer,
        *,
        first: Sequence[tuple[int, int]] = (),
        ends: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Bring this layer's blocks too, by its plan.

        first: ranges (offset, bytes) that its start needs at once. ends: those that come after all plans.
        """
        reader, plan = layer.handle.reader, layer.plan
        layout = reader.blob.layout
        kind = layer.ref.kind
        self._log.emit("prefetch", "begin", bytes=layout.size_bytes, target=layer.label, what=kind)
        planned = bool(plan.blocks or plan.full_starts)
        times_ms = hot_times(layout, plan, first, ends if plan.blocks or not planned else ())
        work = Work(layer, times_ms, planned)
        lacking = work.lacking()
        with self._queue.lock:
            self._queue.add(work)
            unit_blocks = reader.sources.unit_blocks or layout.chunk_bytes // layout.block_bytes
            wanted = list(runs(lacking, unit_blocks))
            at_once = [run for run in wanted if times_ms[run[0]] < 0]
            turned = [*at_once, *in_turn(wanted[len(at_once) :], reader.sources.turn)]
            for (block, _, _), (_, first_block, last_block) in zip(wanted, turned, strict=True):
                self._queue.push(work, times_ms[block], first_block, last_block)
            if not lacking:
                self._queue.end_hot(work, there=True)
            self._streams.start()
            self._queue.end_if_done(work)
            self._queue.wake_all()
        if not (planned or work.ended or kind == "checkpoint"):
            reader.on_read = functools.partial(self._bring_ahead, work, Ahead(layout.blocks))

    def _bring_ahead(self, work: Work, ahead: Ahead, first: int, last: int) -> None:
        """Have what lies behind a read, which must not wait, brought before all that plans name."""
        blob = work.layer.handle.reader.blob
        blocks_per_s = self._link.bytes_per_s / blob.layout.block_bytes
        most, least = (max(1, int(blocks_per_s * each)) for each in (_MOST_AHEAD_S, _LEAST_AHEAD_S))
        behind = ahead.touch(first, last, most, least_blocks=least)
        if behind is None or blob.blocks.has(*behind):
            return
        with self._queue.lock:
            if self._phase.is_starting:
                self._queue.push(work, AHEAD_MS, *behind)

    def drop(self, layer: Layer) -> None:
        """Bring no more of this layer, which nobody will read; `add` brings it again."""
        with self._queue.lock:
            for work in self._queue.works:
                if work.layer is layer and not work.ended:
                    work.hot_over = work.exhausted = work.ended = True
                    _forget_reads(work)
                    tell_bytes(self._log, "stopped", work)
            self._queue.wake_all()

    def wait_hot(self, layer: Layer, timeout_s: float) -> bool:
        """Wait until what the layer's start needs is there, or will be there before it is needed.

        A start touches its blocks one after the other, and the link goes on meanwhile: waiting for the last
        of them would cost the time that the first take. False when they are not, in that time or at all.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._queue.lock:
            work = next((work for work in self._queue.works if work.layer is layer), None)
            while work is not None and not (work.hot_over or self._phase.has_ended):
                left_s = deadline_s - time.monotonic()
                if time.monotonic() - work.forecast_s >= _FORECAST_EVERY_S:  # for all tasks
                    work.in_time = work.comes_in_time(self._link.bytes_per_s)
                    work.forecast_s = time.monotonic()
                if left_s <= 0 or work.in_time:
                    return left_s > 0
                self._queue.wait_hot(min(left_s, _FORECAST_EVERY_S))
            return work is not None and work.hot_there

    def queued(self) -> tuple[int, int]:
        """How many runs of hot blocks wait, and how many layers that are read whole are not done."""
        return self._queue.counts()

    def start_over(self) -> None:
        """The job trains: all that is left is cold."""
        self._queue.start_over()

    def stop(self) -> None:
        """The job has ended: begin no more reads; those in flight end with their process."""
        with self._queue.lock:
            if self._stopped:
                return
            self._stopped = True
            self._queue.wake_all()
            for work in self._queue.works:
                _forget_reads(work)
                if not work.ended:
                    tell_bytes(self._log, "stopped", work)

    def join(self, timeout_s: float) -> None:
        """Wait for the streams, `timeout_s` together."""
        self._streams.join(timeout_s)


def _forget_reads(work: Work) -> None:
    """Be told no more of this layer's reads; another job's prefetch may be."""
    reader = work.layer.handle.reader
    if isinstance(reader.on_read, functools.partial) and reader.on_read.args[0] is work:
        reader.on_read = None
