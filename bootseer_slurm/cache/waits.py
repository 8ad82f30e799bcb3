"""How long reads of a blob wait for blocks: the time in which any of them waits, and the longest wait of one.

Owns both figures for the blob, and for each of its users from a baseline on. A read that still waits counts
with its wait until now. Does not know which job a read is of. Times are of time.monotonic(). Thread-safe.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Waited(NamedTuple):
    """waited_s: the time in which at least one read waited. longest_s: the longest wait of a single read."""

    waited_s: float = 0.0
    longest_s: float = 0.0


@dataclass(slots=True, eq=False)
class Baseline:
    """Where somebody begins to count."""

    begin_s: float
    before_s: float  # waited by then
    longest_s: float = 0.0  # of the reads whose wait has ended since


class Waits:
    """The reads of one blob that wait for blocks."""

    def __init__(self) -> None:
        self._begun_s: dict[object, float] = {}  # of each read that waits now, the earliest in front
        self._any_from_s = 0.0
        self._past_s = 0.0
        self._baselines: list[Baseline] = []
        self._lock = threading.Lock()

    @property
    def any_now(self) -> bool:
        """Whether some read waits now."""
        return bool(self._begun_s)

    def longest_now_s(self) -> float:
        """How long the read that waits longest has waited until now; 0 where none waits."""
        with self._lock:
            begin_s = next(iter(self._begun_s.values()), None)
        return 0.0 if begin_s is None else time.monotonic() - begin_s

    def waited_s(self) -> float:
        """How long, in all, at least one read has waited."""
        with self._lock:
            return self._until(time.monotonic())

    def _until(self, now_s: float) -> float:
        return self._past_s + (now_s - self._any_from_s if self._begun_s else 0.0)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A read waits."""
        read = object()
        with self._lock:
            begin_s = time.monotonic()  # within the lock: so the earliest is in front
            if not self._begun_s:
                self._any_from_s = begin_s
            self._begun_s[read] = begin_s
        try:
            yield
        finally:
            with self._lock:
                now_s = time.monotonic()
                waited_s = self._until(now_s)
                del self._begun_s[read]
                if not self._begun_s:
                    self._past_s = waited_s
                for baseline in self._baselines:
                    own_s = now_s - max(begin_s, baseline.begin_s)
                    baseline.longest_s = max(baseline.longest_s, own_s)

    def baseline(self) -> Baseline:
        """Count from now on, until `forget`: of a read that waits already, only the rest of its wait."""
        with self._lock:
            now_s = time.monotonic()
            made = Baseline(now_s, self._until(now_s))
            self._baselines.append(made)
            return made

    def since(self, baseline: Baseline) -> Waited:
        """How long reads have waited since then."""
        with self._lock:
            now_s = time.monotonic()
            earliest_s = next(iter(self._begun_s.values()), now_s)
            own_s = now_s - max(earliest_s, baseline.begin_s)
            return Waited(self._until(now_s) - baseline.before_s, max(own_s, baseline.longest_s))

    def forget(self, baseline: Baseline) -> None:
        """Count for this one no more."""
        with self._lock:
            self._baselines.remove(baseline)
