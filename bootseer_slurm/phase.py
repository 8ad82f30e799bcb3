"""How far a job is on this node: it starts, it trains, it has ended.

    STARTING → TRAINING → ENDED

The start is over at the mark training_started, when its reads are quiet, or at a limit of time; who sees that
says so here. All others look, or wait. Thread-safe.
"""

from __future__ import annotations

import threading
from enum import Enum


class Phase(Enum):
    """One of the three."""

    STARTING = "starting"
    TRAINING = "training"
    ENDED = "ended"


class JobPhase:
    """The phase of one job; its attributes are for looking at."""

    def __init__(self) -> None:
        self._phase = Phase.STARTING
        self.is_marked = False  # the job itself said that it trains
        self.is_announced = False  # a task said so, and the others' marks are waited for
        self._changed = threading.Condition()

    @property
    def now(self) -> Phase:
        return self._phase

    @property
    def is_starting(self) -> bool:
        return self._phase is Phase.STARTING

    @property
    def has_ended(self) -> bool:
        return self._phase is Phase.ENDED

    def announce(self) -> bool:
        """A task says that it trains; False where that is known, or the job has ended."""
        with self._changed:
            if self.is_announced or self._phase is Phase.ENDED:
                return False
            self.is_announced = True
            return True

    def take_announcement(self) -> None:
        """All that follows from the announced training is done: a later mark is announced again."""
        with self._changed:
            self.is_announced = False

    def train(self, *, marked: bool) -> None:
        """The start is over. marked: the job says so. Nothing changes for a job that has ended."""
        with self._changed:
            if self._phase is Phase.ENDED:
                return
            self.is_marked = self.is_marked or marked
            if self._phase is Phase.STARTING:
                self._phase = Phase.TRAINING
            self._changed.notify_all()

    def end(self) -> bool:
        """The job is over on this node; False where that is known already."""
        with self._changed:
            if self._phase is Phase.ENDED:
                return False
            self._phase = Phase.ENDED
            self._changed.notify_all()
            return True

    def wait_start_over(self, timeout_s: float) -> bool:
        """Wait until the start is over, `timeout_s` at most; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._phase is not Phase.STARTING, timeout_s)

    def wait_marked(self, timeout_s: float) -> bool:
        """Wait until the job says that it trains, or has ended; whether one of the two is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_marked or self.has_ended, timeout_s)

    def wait_end(self, timeout_s: float) -> bool:
        """Wait until the job has ended, `timeout_s` at most; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self.has_ended, timeout_s)
