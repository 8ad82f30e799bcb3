"""The time in which this process could work: seconds in which it was not scheduled do not count.

On a machine whose cores are all busy a process may stand still for longer than a node may be silent. What the
others said meanwhile it hears late, and it must not call them silent for that.
"""

from __future__ import annotations

import time

_LATE_S = 0.02  # less is no matter


class Clock:
    """Seconds that only go forward. They stand still while this process, which has one thread, does."""

    def __init__(self) -> None:
        self._away_s = 0.0
        self._woke_s = time.monotonic()
        self._woke_cpu_s = time.thread_time()

    def now_s(self) -> float:
        """The time."""
        return time.monotonic() - self._away_s

    def waits(self) -> None:
        """It has worked until now, and waits for nothing while it works."""
        self._pass(time.monotonic() - self._woke_s - (time.thread_time() - self._woke_cpu_s))

    def woke(self, until_s: float) -> None:
        """It has waited, until then at most."""
        self._pass(self.now_s() - until_s)
        self._woke_s, self._woke_cpu_s = time.monotonic(), time.thread_time()

    def _pass(self, away_s: float) -> None:
        if away_s >= _LATE_S:
            self._away_s += away_s
