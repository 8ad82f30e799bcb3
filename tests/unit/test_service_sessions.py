"""Faults are counted while prologs come: their table is not held for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

from bootseer_slurm.events import Event
from bootseer_slurm.service.sessions import Sessions, _Row


def test_a_session_that_is_ending_is_among_all() -> None:
    sessions = Sessions(cast(Any, None), Mock(), Mock())
    may_end = threading.Event()
    log = SimpleNamespace(events=list)
    session = SimpleNamespace(
        context=SimpleNamespace(log=log, job=SimpleNamespace(restart=0)), end=lambda _: may_end.wait(10)
    )
    sessions._rows[7] = _Row(cast(Any, session), 0.0, 0)
    sessions.end(7, "job ended")
    assert sessions.all() == [] and sessions.all(with_ending=True) == [session]
    may_end.set()
    sessions._endings.wait(10)
    assert sessions.all(with_ending=True) == []


def test_counting_faults_holds_no_prolog_up() -> None:
    sessions = Sessions(cast(Any, None), cast(Any, None), cast(Any, None))
    free: list[bool] = []

    def prolog() -> None:
        if sessions._lock.acquire(timeout=1):
            free.append(True)
            sessions._lock.release()

    def events() -> list[Event]:
        other = threading.Thread(target=prolog)
        other.start()
        other.join()
        return [Event(1, 7, 0, "n1", "fault", "x"), Event(1, 7, 0, "n1", "mark", "y")]

    session = SimpleNamespace(context=SimpleNamespace(log=SimpleNamespace(events=events)))
    sessions._rows[7] = _Row(cast(Any, session), 0.0, 0)
    assert sessions.faults() == {"x": 1}
    assert free == [True]
