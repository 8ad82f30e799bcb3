"""The cost of a start for the machine and the store's link, as curves over time.

A thread looks at both counters some times a second. When the report has said when training began, the curves
tell what had been used by then: whoever measures need not be there at that moment.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

LOOK_EVERY_S = 0.2


@dataclass
class Curve:
    """A counter that only grows, at some times (ns since the epoch)."""

    at_ns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at_ns: int, value: float) -> None:
        self.at_ns.append(at_ns)
        self.values.append(value)

    def value(self, at_ns: int) -> float:
        """The counter at a time, by a straight line between the looks around it."""
        after = bisect_left(self.at_ns, at_ns)
        if after == 0 or after == len(self.at_ns):
            return self.values[min(after, len(self.values) - 1)]
        share = (at_ns - self.at_ns[after - 1]) / (self.at_ns[after] - self.at_ns[after - 1])
        return self.values[after - 1] + share * (self.values[after] - self.values[after - 1])

    def growth(self, begin_ns: int, end_ns: int) -> float:
        """How much it grew between two times."""
        return self.value(end_ns) - self.value(begin_ns)


class Meter:
    """Measures from `with` until the end of the block. One thread."""

    def __init__(self, sent_bytes: Callable[[], int]) -> None:
        """sent_bytes: what the store has sent until now."""
        self.cpu_s = Curve()
        self.sent_bytes = Curve()
        self._read_sent_bytes = sent_bytes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="meter", daemon=True)

    def __enter__(self) -> Meter:
        self._add()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self._add()

    def _add(self) -> None:
        self.cpu_s.add(time.time_ns(), busy_s())
        self.sent_bytes.add(time.time_ns(), self._read_sent_bytes())


def busy_s() -> float:
    """CPU seconds that this machine has worked since it was started, of all its cores."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
