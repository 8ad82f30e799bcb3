"""What an agent that is started again must know of its node's jobs.

    <run>/jobs/<job id>             one message a line, as JSON: the prolog's or the step's that began the
                                    session, then each that added something; 0600
    <run>/events/<job>.<restart>    the events so far (events.EventLog)

`run` is the socket's folder, in memory: after a reboot no job is left. The hook looks whether a job's file is
there. A session is here from its begin to its end. Thread-safe: a job's lines are written one at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from bootseer_slurm.agent.protocol import Message

_log = logging.getLogger(__name__)


class Journal:
    """The jobs' files below one folder."""

    def __init__(self, run: Path) -> None:
        self._jobs, self._events = run / "jobs", run / "events"
        self._jobs.mkdir(mode=0o755, exist_ok=True)
        self._events.mkdir(mode=0o700, exist_ok=True)

    def events_path(self, job_id: int, restart: int) -> Path:
        """Where the events of a job's start are kept."""
        return self._events / f"{job_id}.{restart}"

    def note(self, job_id: int, message: Message) -> None:
        """Keep a message of a job. Without room for it the epilog may not come: a warning says so."""
        path = self._jobs / str(job_id)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.write(fd, json.dumps(message).encode() + b"\n")
            finally:
                os.close(fd)
        except OSError as error:
            _log.warning("%s: cannot be written: %s", path, error.strerror, extra={"job": job_id})

    def forget(self, job_id: int) -> None:
        """The job's session is over; its events are in the store, or lost."""
        with contextlib.suppress(OSError):
            (self._jobs / str(job_id)).unlink()

    def forget_events(self, job_id: int, restart: int) -> None:
        """The events were handed on."""
        with contextlib.suppress(OSError):
            self.events_path(job_id, restart).unlink()

    def jobs(self) -> Iterator[tuple[int, list[Message]]]:
        """Each job and its messages, as an agent left them that was killed."""
        for path in sorted(self._jobs.iterdir()):
            with contextlib.suppress(OSError, ValueError):
                messages = [_message(line) for line in path.read_text().splitlines() if line.endswith("]")]
                if messages:
                    yield int(path.name), messages


def _message(line: str) -> Message:
    return [(str(key), str(value)) for key, value in json.loads(line)]
