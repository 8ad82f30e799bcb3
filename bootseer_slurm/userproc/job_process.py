"""The process of one job's user, started when it is first needed, and once again when it ended.

A process may end by its user, for want of memory, or since it was silent (channel.py). Who has handles of it
opens them in the next one (artifacts/source.py).
"""

from __future__ import annotations

import threading

from bootseer_slurm.cgroups import NO_GROUP, JobGroup
from bootseer_slurm.config import Config
from bootseer_slurm.errors import StoreError
from bootseer_slurm.identity import User
from bootseer_slurm.userproc.client import UserProcess, start_user_process
from bootseer_slurm.userproc.link import Link
from bootseer_slurm.userproc.spare import Spare, Started

_MOST_STARTS = 2  # for one job: its user may stop each


class JobProcess:
    """Gives the one process of a job that there is at a time. Thread-safe."""

    def __init__(self, uid: int, gid: int, config: Config, spare: Spare, group: JobGroup = NO_GROUP) -> None:
        self.link = Link()
        self._uid, self._gid = uid, gid
        self._config = config
        self._spare = spare
        self._group = group
        self._user: User | None = None
        self._process: UserProcess | None = None
        self._gone: list[UserProcess] = []
        self._starts = 0
        self._over = False
        self._lock = threading.Lock()

    def __call__(self) -> UserProcess:
        """The process. Raises StoreError when it cannot be started, or the job is over."""
        # Not under the lock: a directory service may be slow.
        user = self._user or User.of(self._uid, self._gid)
        with self._lock:
            self._user = user
            if self._process is not None and self._process.ended and not self._over:
                # Not here: one that a file system holds ends late.
                threading.Thread(target=self._process.kill, daemon=True).start()
                self._gone.append(self._process)
                self._process = None
            if self._process is None:
                if self._over:
                    raise StoreError("the job is over")
                if self._starts == _MOST_STARTS:
                    raise StoreError("the user's process ended, or was silent, and was started often enough")
                self._starts += 1
                self._process = start_user_process(
                    user,
                    self._config.store.uri,
                    streams=self._config.prefetch.streams,
                    timeout_s=self._config.store.timeout_s,
                    take=self._take,
                    link=self.link,
                )
            return self._process

    def _take(self) -> Started:
        started = self._spare.take()
        self._group.add(started.process.pid)  # while it is root's
        return started

    @property
    def started(self) -> bool:
        return self._process is not None

    def kill(self) -> None:
        """End the process; there is no other one. The next job's is started, which nobody waits for now."""
        with self._lock:
            self._over = True
            process = self._process
        if process is not None:
            process.kill()
        self._spare.prepare()

    def close(self) -> None:
        """Give back what the processes shared, once nobody reads any more."""
        for process in (*self._gone, self._process):
            if process is not None:
                process.close()
