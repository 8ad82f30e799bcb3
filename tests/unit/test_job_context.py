"""The threads of a job are waited for together, however many a user's file system holds."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

from bootseer_slurm.job.context import Threads
from bootseer_slurm.phase import JobPhase


def test_many_that_are_held_take_no_longer_than_one() -> None:
    job = SimpleNamespace(phase=JobPhase(), job=SimpleNamespace(job_id=1))
    threads, free = Threads(cast(Any, job)), threading.Event()
    for _ in range(100):
        assert threads.start(free.wait)
    begin_s = time.monotonic()
    threads.join(0.5)
    took_s = time.monotonic() - begin_s
    free.set()
    assert took_s < 25  # each for itself: 50 s
