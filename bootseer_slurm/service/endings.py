"""Sessions that are ending, each in a thread of its own, and the faults of those that have. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections import Counter

from bootseer_slurm.job.session import Session


class Endings:
    """The sessions of one agent that are ending."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._sessions: list[Session] = []
        self._past_faults: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self, session: Session, reason: str) -> None:
        """End a session, in a thread. Raises RuntimeError where none can be started."""
        thread = threading.Thread(target=self._end, args=(session, reason), daemon=True)
        with self._lock:
            thread.start()
            self._sessions.append(session)  # its thread takes it out only with this lock
            self._threads = [each for each in self._threads if each.is_alive()] + [thread]

    def _end(self, session: Session, reason: str) -> None:
        try:
            session.end(reason)
        finally:
            faults = faults_of(session)
            with self._lock:
                self._sessions.remove(session)
                self._past_faults += faults

    def state(self) -> tuple[list[Session], Counter[str]]:
        """The sessions that are ending, and how often each fault was told by those that have ended."""
        with self._lock:
            return list(self._sessions), self._past_faults.copy()

    def wait(self, limit_s: float) -> None:
        """Wait for all, `limit_s` together."""
        deadline_s = time.monotonic() + limit_s
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))


def faults_of(session: Session) -> Counter[str]:
    return Counter(event.name for event in session.context.log.events() if event.kind == "fault")
