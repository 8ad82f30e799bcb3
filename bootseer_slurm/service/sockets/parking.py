"""Requests whose answer has to wait: kept without a thread each, and answered in turn.

Steps wait for what they are shown, some seconds at most. A job can begin many steps at once, and its user can
stop the process that its originals are looked at with. So what waits has no thread, and of what is answered
each user has a few at most: the hook and other users' steps never wait for them. What of one user waits is
bounded too. Thread-safe; one thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from bootseer_slurm.agentapi.protocol import Message

_log = logging.getLogger(__name__)

MOST_WAITING = 1024  # a descriptor each; a node begins as many steps at once only by intent
_MOST_WAITING_OF_USER = 256
_MOST_ANSWERED = 64  # at once: each has a thread
_MOST_OF_USER = 8
_LOOK_EVERY_S = 0.005  # a step's start waits for it
_LATE_S = 10.0  # a client that waits longer has gone


@dataclass(frozen=True, slots=True)
class Waiting:
    """An answer that waits. uid: whose it is. ready: tells whether it can be given before `deadline_s`; it is
    asked once in a round, however many steps of one job wait for it.

    answer: gives it, in a thread of its own; descriptors that go with it are appended to the list.
    """

    uid: int
    ready: Callable[[], bool]
    deadline_s: float
    answer: Callable[[list[int]], Message]


@dataclass(frozen=True, slots=True)
class Parked:
    """A request that waits. finish: called once, in a thread of its own; or drop, when it is too late."""

    waiting: Waiting
    finish: Callable[[], None]
    drop: Callable[[], None]


class Parking:
    """The requests that wait, in the order in which they came."""

    def __init__(self) -> None:
        self._parked: list[Parked] = []
        self._waiting: Counter[int] = Counter()  # by user: those that are parked
        self._answered: Counter[int] = Counter()  # by user: those that have a thread
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="parking", daemon=True).start()

    def add(self, parked: Parked) -> bool:
        """Answer a request as soon as it is ready; False when too many wait, of its user or in all."""
        uid = parked.waiting.uid
        with self._changed:
            if len(self._parked) >= MOST_WAITING or self._waiting[uid] >= _MOST_WAITING_OF_USER:
                return False
            self._waiting[uid] += 1
            self._parked.append(parked)
            self._changed.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._parked)
                begun, late = self._take(time.monotonic())
                if not begun and not late:
                    self._changed.wait(_LOOK_EVERY_S)
                    continue
            for parked in begun:
                self._start(parked)
            for parked in late:
                parked.drop()

    def _take(self, now_s: float) -> tuple[list[Parked], list[Parked]]:
        """Take out those whose turn it is, and those that nobody waits for any more."""
        begun, late, left = [], [], []
        is_ready = cache(_is_ready)  # of one job many steps may wait
        for parked in self._parked:
            waiting = parked.waiting
            has_room = self._answered.total() < _MOST_ANSWERED and self._answered[waiting.uid] < _MOST_OF_USER
            if now_s > waiting.deadline_s + _LATE_S:
                late.append(parked)
            elif has_room and (now_s >= waiting.deadline_s or is_ready(waiting.ready)):
                self._answered[waiting.uid] += 1
                begun.append(parked)
            else:
                left.append(parked)
        self._parked = left
        self._waiting = Counter(parked.waiting.uid for parked in left)
        return begun, late

    def _start(self, parked: Parked) -> None:
        try:
            threading.Thread(target=self._finish, args=(parked,), daemon=True).start()
        except (RuntimeError, MemoryError) as error:  # no thread can be started now
            _log.warning("a step is not answered: %s", error)
            self._give_back(parked)
            parked.drop()

    def _finish(self, parked: Parked) -> None:
        try:
            parked.finish()
        finally:
            self._give_back(parked)

    def _give_back(self, parked: Parked) -> None:
        uid = parked.waiting.uid
        with self._changed:
            self._answered[uid] -= 1
            if not self._answered[uid]:
                del self._answered[uid]
            self._changed.notify()


def _is_ready(ready: Callable[[], bool]) -> bool:
    try:
        return ready()
    except Exception:  # of one job: the others' steps wait for this thread
        _log.exception("a step is answered before it is ready")
        return True
