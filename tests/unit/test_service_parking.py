"""Requests that wait: how often their jobs are asked, whose they are, and one that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from bootseer_slurm.service.sockets import parking
from bootseer_slurm.service.sockets.parking import Parked, Parking, Waiting


def parked(ready: Callable[[], bool], done: threading.Event, uid: int = 1, wait_s: float = 60.0) -> Parked:
    waiting = Waiting(uid, ready, time.monotonic() + wait_s, lambda fds: [])
    return Parked(waiting, done.set, done.set)


def test_a_job_is_asked_once_in_a_round_however_many_of_its_steps_wait() -> None:
    made, asked = Parking(), [0]

    def ready() -> bool:
        asked[0] += 1
        return False

    begin_s = time.monotonic()
    for _ in range(200):
        assert made.add(parked(ready, threading.Event()))
    time.sleep(0.5)
    rounds = (time.monotonic() - begin_s) / parking._LOOK_EVERY_S + 200  # one more for each that comes
    assert 0 < asked[0] <= rounds


def test_a_job_that_cannot_be_asked_holds_up_no_other() -> None:
    made, own, others = Parking(), threading.Event(), threading.Event()

    def fail() -> bool:
        raise LookupError

    made.add(parked(fail, own))
    made.add(parked(lambda: True, others))
    assert own.wait(20) and others.wait(20)


def test_one_users_steps_leave_room_for_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "_MOST_WAITING_OF_USER", 3)
    made, done = Parking(), threading.Event()
    assert [made.add(parked(lambda: False, done, uid=1)) for _ in range(4)] == [True] * 3 + [False]
    assert made.add(parked(lambda: True, done, uid=2))
    assert done.wait(20)


def test_room_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "_MOST_WAITING_OF_USER", 1)
    made = Parking()
    for _ in range(3):
        done = threading.Event()
        assert made.add(parked(lambda: True, done))
        assert done.wait(20)
