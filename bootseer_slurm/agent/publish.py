"""Writing a job's small objects into the store: events, traces, what its class started from.

Always through the job's fetch process, so with its user's rights. Thread-safe.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from bootseer_slurm.agent.request import Job
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.fetch.process import FetchProcess

_log = logging.getLogger(__name__)

_PATIENCE_S = 10.0  # a shared file system may show others' new folders seconds later
_IMPATIENCE_S = 2.0  # with a store that was waited for already: the end of a session has 20 s in all


class Publisher:
    """Writes for one job."""

    def __init__(self, job: Job, fetcher: Callable[[], FetchProcess]) -> None:
        """fetcher: gives the job's fetch process, or raises BootseerError."""
        self._job = job
        self._fetcher = fetcher
        self._events_lock = threading.Lock()
        self._clock_asked = False
        self._gave_up = False

    def write(self, op: str, content: bytes, **fields: Any) -> bool:
        """Have an operation of the fetch process write this; False, with a warning logged, when it cannot."""
        fd = os.memfd_create("bootseer-object", os.MFD_CLOEXEC)
        try:
            os.write(fd, content)
            patience_s = _IMPATIENCE_S if self._gave_up else _PATIENCE_S
            # All nodes of a job write at once; the rights of the folder that the first makes may come later.
            for attempt in Retrying(
                retry=retry_if_exception_type(StoreError),
                stop=stop_after_delay(patience_s),
                wait=wait_exponential(multiplier=0.2, max=2),
                reraise=True,
            ):
                with attempt:
                    self._fetcher().call(op, fds=(fd,), timeout_s=patience_s, **fields)
        except BootseerError as error:
            self._gave_up = True
            _log.warning("%s not written: %s", op, error, extra={"job": self._job.job_id})
            return False
        finally:
            os.close(fd)
        self._gave_up = False
        return True

    def write_events(self, log: EventLog) -> None:
        """Write the events so far; the newest are written last."""
        with self._events_lock:
            folder = f"events/{self._job.job_id}.{self._job.restart}"
            self._ask_clock(log, f"{folder}/.{log.node}.clock")
            self.write("write", log.to_jsonl().encode(), path=f"{folder}/{log.node}.jsonl")

    def _ask_clock(self, log: EventLog, path: str) -> None:
        """Have this node's clock compared with the store's, once; some stores do not tell."""
        if self._clock_asked or self._gave_up:
            return
        self._clock_asked = True
        try:
            fields = self._fetcher().call("clock", path=path, timeout_s=_IMPATIENCE_S).fields
            offset_ms, error_ms = float(fields["offset_s"]) * 1e3, float(fields["error_s"]) * 1e3
        except (BootseerError, LookupError, TypeError, ValueError, OverflowError) as error:
            _log.debug("clock not compared: %s", error, extra={"job": self._job.job_id})
            return
        log.emit("clock", "store", offset_ms=round(offset_ms, 3), error_ms=round(error_ms, 3))
