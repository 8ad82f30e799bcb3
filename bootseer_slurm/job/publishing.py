"""Writing a job's small objects into the store: events, traces, what its class started from.

Always by the process of the job's user, so with his rights. Thread-safe.
"""

from __future__ import annotations

import logging
import math
import threading

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.slurm.allocation import Job
from bootseer_slurm.userproc.job_process import JobProcess
from bootseer_slurm.userproc.protocol import Request, Write

_log = logging.getLogger(__name__)

_PATIENCE_S = 10.0  # a shared file system may show others' new folders seconds later
_IMPATIENCE_S = 2.0  # with a store that was waited for already: the end of a session has 20 s in all


class Publisher:
    """Writes for one job."""

    def __init__(self, job: Job, process: JobProcess) -> None:
        self._job = job
        self.process = process
        self._events_lock = threading.Lock()
        self._clock_asked = False
        self._gave_up = False

    def write(self, request: Request, content: bytes) -> bool:
        """Have content written by a Write, KeepTrace or Remember; False, and a warning, if it is not."""
        patience_s = _IMPATIENCE_S if self._gave_up else _PATIENCE_S
        try:
            # All nodes of a job write at once; the rights of the folder that the first makes may come later.
            for attempt in Retrying(
                retry=retry_if_exception_type(StoreError),
                stop=stop_after_delay(patience_s),
                wait=wait_exponential(multiplier=0.2, max=2),
                reraise=True,
            ):
                with attempt:
                    self.process().write(request, content, timeout_s=patience_s)
        except BootseerError as error:
            self._gave_up = True
            what = type(request).__name__
            _log.warning("%s: not written: %s", what, error, extra={"job": self._job.job_id})
            return False
        self._gave_up = False
        return True

    def write_events(self, log: EventLog) -> None:
        """Write the events so far; the newest are written last."""
        with self._events_lock:
            folder = f"events/{self._job.folder_name}"
            self._ask_clock(log, f"{folder}/.{log.node}.clock")
            self.write(Write(f"{folder}/{log.node}.jsonl"), log.to_jsonl().encode())

    def _ask_clock(self, log: EventLog, path: str) -> None:
        """Have this node's clock compared with the store's, once; some stores do not tell."""
        if self._clock_asked or self._gave_up:
            return
        self._clock_asked = True
        try:
            offset_s, error_s = self.process().clock(path, timeout_s=_IMPATIENCE_S)
        except BootseerError as error:
            _log.debug("clock not compared: %s", error, extra={"job": self._job.job_id})
            return
        if math.isfinite(offset_s) and math.isfinite(error_s):
            log.emit("clock", "store", offset_ms=round(offset_s * 1e3, 3), error_ms=round(error_s * 1e3, 3))
