"""The journal of a node's jobs, for the agent that is started when this one dies.

    <run>/jobs/<job id>             one record a line, as JSON: what began the session, then what was asked
                                    for beside that, and what was found; 0600
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
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from bootseer_slurm.artifacts.reattached import Found
from bootseer_slurm.job.request import Request
from bootseer_slurm.slurm.allocation import Job

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Began:
    """A session began. node: as Slurm names it, "" where it did not say. request: None of an observed job."""

    job: Job
    node: str
    request: Request | None


@dataclass(frozen=True, slots=True)
class Added:
    """A step, or an importer, asked for more."""

    request: Request


Record = Began | Added | Found
_TYPES: dict[str, type[Record]] = {each.__name__: each for each in (Began, Added, Found)}


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

    def begin(self, record: Began) -> None:
        """Keep what began a job's session. Without room for it the epilog may not come: a warning says so."""
        self._write(record.job.job_id, record, os.O_CREAT | os.O_TRUNC)

    def add(self, job_id: int, record: Added | Found) -> None:
        """Keep one record more, unless the session has just ended."""
        with contextlib.suppress(FileNotFoundError):
            self._write(job_id, record, os.O_APPEND)

    def _write(self, job_id: int, record: Record, flags: int) -> None:
        path = self._jobs / str(job_id)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
            try:
                os.write(fd, b"\n" + _encode(record) + b"\n")  # not behind a torn line
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

    def jobs(self) -> Iterator[tuple[int, Began, list[Added | Found]]]:
        """Each job, what began its session, and what came then, as an agent left them that was killed."""
        for path in sorted(self._jobs.iterdir()):
            if not path.name.isdecimal():
                continue
            records = _records(path)
            if records and isinstance(began := records[0], Began):
                yield int(path.name), began, [each for each in records if not isinstance(each, Began)]
            else:
                _log.error("%s: does not say what began the job's session", path, extra={"job": path.name})

    def endings(self) -> list[Began]:
        """The record that began each session that was just ending."""
        found = (_records(path)[:1] for path in sorted(self._ending.iterdir()))
        return [record for records in found for record in records if isinstance(record, Began)]


def _encode(record: Record) -> bytes:
    return json.dumps({type(record).__name__: asdict(record)}).encode()


def _records(path: Path) -> list[Record]:
    """A file's records; none where it cannot be read. A line may have been cut off.

    Fields that only another version knows are left out: an agent may be replaced by an older one.
    """
    records: list[Record] = []
    with contextlib.suppress(OSError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
                ((name, fields),) = json.loads(line).items()
                request = fields.get("request") or {}
                if "wishes" in request:  # as an agent before these rooms wrote it
                    request["wanted"] = request.pop("wishes")
                records.append(msgspec.convert(fields, _TYPES[name]))
    return records
