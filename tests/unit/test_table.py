"""Faults are counted while prologs come: their table is not held for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

from bootseer_slurm.agent.table import Table, _Entry
from bootseer_slurm.events import Event


def test_counting_faults_holds_no_prolog_up() -> None:
    table = Table(cast(Any, None), cast(Any, None))
    free: list[bool] = []

    def prolog() -> None:
        if table._lock.acquire(timeout=1):
            free.append(True)
            table._lock.release()

    def events() -> list[Event]:
        other = threading.Thread(target=prolog)
        other.start()
        other.join()
        return [Event(1, 7, 0, "n1", "fault", "x"), Event(1, 7, 0, "n1", "mark", "y")]

    session = SimpleNamespace(log=SimpleNamespace(events=events))
    table._entries[7] = _Entry(cast(Any, session), 0.0)
    assert table.faults() == {"x": 1}
    assert free == [True]
