"""The streams of one job's prefetch: threads that read as the queue says, and again where a read fails."""

from __future__ import annotations

import functools
import threading
import time

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from bootseer_slurm.cache.sources import OnFault
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.prefetch.budget import MemoryBudget
from bootseer_slurm.prefetch.queue import Queue
from bootseer_slurm.prefetch.work import Run, Work
from bootseer_slurm.userproc.link import Link

_ATTEMPTS = 5
_OTHERS_S = 1.0  # a wait for a block that others fetch, before it is looked at again


class Streams:
    """So many threads for one job."""

    def __init__(
        self,
        queue: Queue,
        link: Link,
        budget: MemoryBudget,
        phase: JobPhase,
        on_fault: OnFault,
        *,
        count: int,
    ) -> None:
        self._queue = queue
        self._link = link
        self._budget = budget
        self._phase = phase
        self._on_fault = on_fault
        self._count = count
        self._threads: list[threading.Thread] = []
        self._retrying = Retrying(
            retry=retry_if_exception_type(StoreError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_exponential(multiplier=0.2, max=5),
            sleep=self._pause,
            reraise=True,
        )

    def _pause(self, pause_s: float) -> None:
        self._phase.wait_end(pause_s)

    def start(self) -> None:
        """Start those that do not run; with the queue's lock held."""
        while len(self._threads) < self._count:
            self._threads.append(threading.Thread(target=self._stream, name="prefetch", daemon=True))
            self._threads[-1].start()

    def join(self, timeout_s: float) -> None:
        """Wait for them, `timeout_s` together."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _stream(self) -> None:
        while chosen := self._queue.next():
            work, run = chosen.work, chosen.run
            failure: BootseerError | None = None
            count_bytes: int | None = None
            try:
                count_bytes = self._bring_hot(run) if run else self._retrying(self._fetch_any, work)
            except BootseerError as error:
                failure = error
            except Exception as error:  # a stream that died would hold up what waits for it
                failure = StoreError(f"{type(error).__name__}: {error}")
            if failure and not self._phase.has_ended:
                self._on_fault("prefetch_failed", f"{work.layer.label}: {failure.message}")
            self._queue.done(chosen, count_bytes)

    def _bring_hot(self, run: Run) -> int:
        """Bring a run; what its read does not bring is queued again. Gives 0, for it counts no bytes."""
        work, first = run.work, run.first
        blob = work.layer.handle.reader.blob
        if not (blob.file.full or blob.blocks.has(first, run.last)):
            first = self._retrying(self._fetch_hot, work, first, run.last)
        else:
            first = run.last + 1
        with self._queue.lock:
            if first <= run.last:
                self._queue.push(work, run.at_ms, first, run.last)
            if run.ahead:
                return 0
            work.hot_left -= 1
            if work.hot_left or work.hot_over:
                return 0
        # Others may have had some of them in flight, and failed.
        while (lacking := work.lacking()) and not (blob.file.full or work.hot_over or self._phase.has_ended):
            blob.blocks.wait(lacking[0], _OTHERS_S)
            if not blob.blocks.has(lacking[0], lacking[0]):
                self._retrying(self._fetch_hot, work, lacking[0], lacking[0])
        with self._queue.lock:
            if not work.hot_over:
                self._queue.end_hot(work, there=not lacking)
        return 0

    def _fetch_any(self, work: Work) -> int:
        """Fetch what is missing, one run; gives its bytes."""
        reader = work.layer.handle.reader
        if reader.sources.unit_blocks:
            first, end = self._fetch_unit(work, urgent=False)
            return (end - first) * reader.blob.layout.block_bytes
        with self._link.prefetch() as limit_bytes:
            if self._phase.has_ended:
                return 0
            offset, size_bytes = reader.prefetch_run(limit_bytes)
        self._account(work, offset, size_bytes)
        return size_bytes

    def _fetch_hot(self, work: Work, first: int, last: int) -> int:
        """Fetch what one read can bring of a run; gives the block to go on with."""
        handle = work.layer.handle
        if handle.reader.sources.unit_blocks:
            return self._fetch_unit(work, first, last, urgent=True)[1]
        block_bytes = handle.reader.blob.layout.block_bytes
        with self._link.prefetch((last - first + 1) * block_bytes, urgent=True) as limit_bytes:
            if self._phase.has_ended:
                return last + 1
            push = handle.push
            if push is not None and not self._budget.may_push(limit_bytes):
                push = None
            end = handle.reader.prefetch_blocks(first, last, limit_bytes, push=push)
        self._account(work, first * block_bytes, (end - first) * block_bytes)
        return end

    def _fetch_unit(
        self, work: Work, first: int | None = None, last: int | None = None, *, urgent: bool
    ) -> tuple[int, int]:
        """Fetch what nodes exchange at a time; gives its first block, and the one behind.

        Only what comes over the link to the store waits for its turn there.
        """
        reader, push = work.layer.handle.reader, work.layer.handle.push if urgent else None
        block_bytes = reader.blob.layout.block_bytes
        if push is not None and not self._budget.may_push(reader.sources.unit_blocks * block_bytes):
            push = None
        admit = functools.partial(self._link.prefetch, urgent=urgent)
        begin, end = reader.prefetch_unit(first, last, admit=admit, push=push)
        self._account(work, begin * block_bytes, (end - begin) * block_bytes)
        return begin, end

    def _account(self, work: Work, offset: int, size_bytes: int) -> None:
        if work.layer.ref.kind == "checkpoint":
            self._budget.brought(work.layer.handle.reader.blob, offset, size_bytes)
