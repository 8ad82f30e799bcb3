"""What an agent that is started again must know of its node's jobs.

    <run>/jobs/<job id>             one message a line, as JSON: the prolog's or the step's that began the
                                    session, then each that added something, and what was
                                    found (held.py); 0600
    <run>/ending/<job>.<restart>    the same, of a session that is just ending
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
        self._jobs, self._ending, self._events = run / "jobs", run / "ending", run / "events"
        self._jobs.mkdir(mode=0o755, exist_ok=True)
        self._ending.mkdir(mode=0o700, exist_ok=True)
        self._events.mkdir(mode=0o700, exist_ok=True)

    def events_path(self, job_id: int, restart: int) -> Path:
        """Where the events of a job's start are kept."""
        return self._events / f"{job_id}.{restart}"

    def begin(self, job_id: int, message: Message) -> None:
        """Keep what began a job's session. Without room for it the epilog may not come: a warning says so."""
        self._write(job_id, message, os.O_CREAT | os.O_TRUNC)

    def note(self, job_id: int, message: Message) -> None:
        """Keep one message more, unless the session has just ended."""
        with contextlib.suppress(FileNotFoundError):
            self._write(job_id, message, os.O_APPEND)

    def _write(self, job_id: int, message: Message, flags: int) -> None:
        path = self._jobs / str(job_id)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
            try:
                os.write(fd, b"\n" + json.dumps(message).encode() + b"\n")  # not behind a torn line
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            _log.warning("%s: cannot be written: %s", path, error.strerror, extra={"job": job_id})

    def end(self, job_id: int, restart: int) -> None:
        """The job's session begins to end: a later one of this job has a file of its own."""
        with contextlib.suppress(OSError):
            (self._jobs / str(job_id)).rename(self._ending / f"{job_id}.{restart}")

    def forget(self, job_id: int, restart: int) -> None:
        """The session has ended, and its events were handed on."""
        for path in (self._ending / f"{job_id}.{restart}", self.events_path(job_id, restart)):
            with contextlib.suppress(OSError):
                path.unlink()

    def jobs(self) -> Iterator[tuple[int, list[Message]]]:
        """Each job and its messages, as an agent left them that was killed."""
        for path in sorted(self._jobs.iterdir()):
            if path.name.isdecimal() and (messages := _messages(path)):
                yield int(path.name), messages

    def endings(self) -> list[Message]:
        """What began each session that was just ending."""
        found = (_messages(path) for path in sorted(self._ending.iterdir()))
        return [messages[0] for messages in found if messages]


def _messages(path: Path) -> list[Message]:
    """A file's messages; none where it cannot be read. A line may have been cut off."""
    messages = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                messages.append(_message(line))
    return messages


def _message(line: str) -> Message:
    return [(str(key), str(value)) for key, value in json.loads(line)]
