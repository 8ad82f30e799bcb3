"""One job on this node, as all who work for it see it."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from bootseer_slurm.cgroups import JobGroup
from bootseer_slurm.config import Config
from bootseer_slurm.events import EventLog
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.slurm.allocation import Job

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobContext:
    """The job, its class, this node as Slurm names it, the job's events, its cgroup here, and its phase."""

    job: Job
    job_class: str
    node: str
    config: Config
    log: EventLog
    group: JobGroup
    phase: JobPhase = field(default_factory=JobPhase)

    def fault(self, name: str, message: str) -> None:
        """Tell the job's report what went wrong, and the log, unless it did so very often."""
        if self.log.emit("fault", name, level="warning", message=message):
            _log.warning("%s: %s", name, message, extra={"job": self.job.job_id})


class Threads:
    """The threads that work for one job. Thread-safe."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, work: object, *args: object) -> bool:
        """Do this in a thread of its own; False when the job is over."""
        with self._lock:
            if self._context.phase.has_ended:
                return False
            name = f"job-{self._context.job.job_id}"
            thread = threading.Thread(target=work, args=args, name=name, daemon=True)  # type: ignore[arg-type]
            thread.start()
            self._threads.append(thread)
        return True

    def join(self, timeout_s: float) -> None:
        """Wait for them, `timeout_s` together; once the job is over, when no more are started."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
