"""The link of one job on one node: who reads next, and how much the prefetch has in flight.

One link carries the job's own reads and the prefetch, first come first served: whoever reads waits behind
what the prefetch has in flight. So that is kept as small as fills the link: the delivered rate times the
shortest time a read ever took, twice, and _QUEUE_S more (twice the bandwidth-delay product, as BBR keeps to
for the same reason: Cardwell et al. 2016; with once, a rate that was measured low would stay low), and one
block at least. And no run begins while the agent reads for somebody who waits. A run is what is asked of the
user's process at once; it reads it in steps, of which one is in flight, and begins no step while it reads for
somebody who waits. Runs that plans name go before others.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

from bootseer_slurm.blob.manifest import BLOCK_BYTES, CHUNK_BYTES

_GAIN = 2
# How long others wait for us on a fast link: the time of a few of their own requests.
_QUEUE_S = 0.002
# On a slow link two halves of a block keep it busy: one on its way, one asked for.
_LEAST_BYTES = BLOCK_BYTES
_LEAST_STEP_BYTES = BLOCK_BYTES // 2
# Steps in flight, so that one that ends does not leave the link idle.
_STEPS = 4
# Asking costs the agent and the user's process half a millisecond of CPU.
_RUN_STEPS = 8
_SAMPLE_S = 0.05
# The rate is the best one seen, forgotten slowly: it falls when we hold back too.
_FORGET = 0.95
# Readers that never pause slow the prefetch, but do not stop it.
HOLD_S = 0.25


class Link:
    """The reads of one job on one node. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = 0
        self._waiting_from_s = 0.0  # when it last became more than 0
        # Runs that wait, each with a condition of its own: only the next one is woken.
        self._urgent_line: deque[threading.Condition] = deque()
        self._line: deque[threading.Condition] = deque()  # behind those
        self._in_flight_bytes = 0
        self._least_s = 1.0
        self._bytes_per_s = 0.0
        self._sample_bytes = 0
        self._sample_start_s = time.monotonic()

    @contextlib.contextmanager
    def demand(self) -> Iterator[None]:
        """Something that somebody waits for: it begins at once, and the prefetch holds meanwhile."""
        with self._lock:
            if not self._waiting:
                self._waiting_from_s = time.monotonic()
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._wake_next()

    @contextlib.contextmanager
    def prefetch(self, size_bytes: int = CHUNK_BYTES, *, urgent: bool = False) -> Iterator[int]:
        """A run that nobody waits for, when it may begin; gives the most bytes it may have.

        size_bytes: what it wants. A short run counts as what it is, so that many of them fill the link too.
        urgent: before all others that wait.
        """
        asked_s = time.monotonic()
        with self._lock:
            ticket = threading.Condition(self._lock)
            line = self._urgent_line if urgent else self._line
            line.append(ticket)
            try:
                while True:
                    step_bytes = min(self.step_bytes, size_bytes)
                    has_room = self._in_flight_bytes + step_bytes <= self._limit_bytes()
                    # In the order of asking: else a long run would wait until there are no short ones.
                    is_next = (self._urgent_line or self._line)[0] is ticket
                    held_s = self._held_s(asked_s)
                    if held_s <= 0 and is_next and (has_room or not self._in_flight_bytes):
                        break
                    ticket.wait(held_s if held_s > 0 and is_next else None)
            finally:
                line.remove(ticket)
                self._wake_next()
            if self._in_flight_bytes == 0:
                self._sample_bytes, self._sample_start_s = 0, time.monotonic()
            self._in_flight_bytes += step_bytes
        try:
            yield min(step_bytes * _RUN_STEPS, CHUNK_BYTES, size_bytes)
        finally:
            with self._lock:
                self._in_flight_bytes -= step_bytes
                self._wake_next()

    def _held_s(self, asked_s: float) -> float:
        """For how long a run still holds: for nobody, if at some time since it asked nobody waited."""
        if not self._waiting or self._waiting_from_s > asked_s:
            return 0.0
        return asked_s + HOLD_S - time.monotonic()

    def _wake_next(self) -> None:
        """Have the next run look whether it may begin. With the lock held."""
        if line := self._urgent_line or self._line:
            line[0].notify()

    @property
    def is_waited_for(self) -> bool:
        """Whether something is under way that somebody waits for."""
        return self._waiting > 0

    @property
    def step_bytes(self) -> int:
        """The bytes that the user's process reads with one call."""
        steps = self._limit_bytes() // _STEPS // _LEAST_STEP_BYTES
        return min(max(1, steps) * _LEAST_STEP_BYTES, CHUNK_BYTES)

    @property
    def bytes_per_s(self) -> float:
        """The rate of the prefetch, as far as it is known; 0 before it is."""
        return self._bytes_per_s

    def measured(self, size_bytes: int, steps: int, dur_s: float) -> None:
        """Learn from a run that ended."""
        with self._lock:
            self._least_s = min(self._least_s, dur_s / steps)
            self._sample_bytes += size_bytes
            now_s = time.monotonic()
            elapsed_s = now_s - self._sample_start_s
            if elapsed_s >= _SAMPLE_S:
                self._bytes_per_s = max(self._sample_bytes / elapsed_s, self._bytes_per_s * _FORGET)
                self._sample_bytes, self._sample_start_s = 0, now_s

    def _limit_bytes(self) -> int:
        return max(_LEAST_BYTES, int(self._bytes_per_s * (_GAIN * self._least_s + _QUEUE_S)))
