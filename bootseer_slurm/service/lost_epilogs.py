"""Epilogs whose message no agent took: the hook leaves a file for each, which is found here.

    <run>/ended/<job id>    empty; its time of change says when the epilog was

A job's end must not hang on one message within 0.1 s: agents hang, die and are busy. Such a file says that
the job's start before this time is over. The hook of a later start (a requeue) says a later time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class LostEpilogs:
    """The files below one folder, which is root's alone."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "ended"
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def all(self) -> Iterator[tuple[int, int]]:
        """Each job, and when its epilog was, in ns since the epoch."""
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.name.isdecimal():
                    yield int(path.name), self.time_ns(int(path.name))

    def time_ns(self, job_id: int) -> int:
        """When a job's epilog was, 0 where none was lost."""
        try:
            return (self._folder / str(job_id)).stat().st_mtime_ns
        except OSError:
            return 0

    def forget(self, job_id: int) -> None:
        """The start that it was of is over for the agent too."""
        with contextlib.suppress(OSError):
            (self._folder / str(job_id)).unlink()
