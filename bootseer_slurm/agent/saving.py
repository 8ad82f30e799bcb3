"""Making snapshots of environments that had none, or that a start installed to, once that start is over.

On one node of the job, the first of its nodelist, and as the job's user: `bootseer env save`, with the least
claim on CPU and disk, so that the job hardly notices. What a start installed is saved where it is seen over
the snapshot, as the job's steps see it (within.py). It ends with the job. Owns that process; one thread waits
for it. What came of it is an event "snapshot".
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bootseer_slurm.agent.request import Job
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.events import EventLog
from bootseer_slurm.fetch.process import User
from bootseer_slurm.slurm.hostlist import expand
from bootseer_slurm.tail import last_lines

_log = logging.getLogger(__name__)

_LIMIT_S = 3600.0
_END_S = 10.0  # for it to clean up
# How often it is looked whether a start has installed something, where the job does not say that it trains.
_LOOKS, _LOOK_EVERY_S = 10, 60.0
_GENTLY = ("nice", "-n", "19", "ionice", "-c", "3")


class View(NamedTuple):
    """What a job sees in the place of a folder: the descriptor of a mount; the folder's device and inode."""

    fd: int
    device: int
    inode: int


@dataclass(frozen=True)
class ToSave:
    """An environment, and how the command is told what it is used in.

    installed: of one that was installed to, the class, fingerprint and folder of env.snapshot.Installed.
    view: gives what the job sees there; its descriptor is the caller's to close.
    """

    path: str
    options: Sequence[str] = ()
    installed: Sequence[str] = ()
    view: Callable[[], View] | None = None


class Saving:
    """The snapshots that one job makes on this node. Thread-safe."""

    def __init__(self, job: Job, log: EventLog, config: Config) -> None:
        self._job = job
        self._log = log
        self._config = config
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._process: subprocess.Popen[bytes] | None = None
        self._over = False
        self._begun = False
        self._trains = False

    def begin(self, environments: Sequence[ToSave], *, trains: bool) -> None:
        """Save these, one after the other, those that are installed to last.

        trains: the job says so. Else its installer may still run: what is installed is looked at again, some
        times and once more when it does say so. A second call tells no more than that.
        """
        with self._changed:
            self._trains = self._trains or trains
            self._changed.notify_all()
            if self._begun or self._over or not environments or not self._is_first_node():
                return
            self._begun = True
        thread = threading.Thread(target=self._save_all, args=(environments,), name="saving", daemon=True)
        thread.start()

    def _is_first_node(self) -> bool:
        try:
            return expand(self._job.nodelist)[:1] in ([], [self._log.node])
        except InputError:
            return False

    def _save_all(self, environments: Sequence[ToSave]) -> None:
        for environment in environments:
            if environment.view is None:
                self._try(environment, last=True)
        installed_to = [environment for environment in environments if environment.view]
        for number in range(_LOOKS if installed_to else 0):
            with self._lock:
                last = self._trains or number == _LOOKS - 1
            for environment in installed_to:
                self._try(environment, last=last)
            with self._changed:
                if not last:
                    self._changed.wait_for(lambda: self._trains or self._over, _LOOK_EVERY_S)
                if last or self._over:
                    return

    def _try(self, environment: ToSave, *, last: bool) -> None:
        """Save it, and tell so. Of what is installed nothing may be there; only the last failure is told."""
        begin_s = time.monotonic()
        try:
            said, failed = self._save(environment)
        except (BootseerError, OSError, ValueError, subprocess.SubprocessError) as error:
            said, failed = str(error), True
        if self._over or (environment.view and not (last if failed else said.endswith(" saved"))):
            return
        self._log.emit(
            "snapshot",
            "failed" if failed else "saved",
            target=environment.path,
            what="environment",
            dur_s=time.monotonic() - begin_s,
            level="warning" if failed else "info",
            message=f"not saved: {said}" if failed else "saved for the next start",
        )

    def _save(self, environment: ToSave) -> tuple[str, bool]:
        """Run the command; gives what it said last, and whether it failed."""
        with self._lock:
            if self._over:
                return "", True
            process = self._process = self._start(environment)
        try:
            lines = last_lines(process, _LIMIT_S)
        except subprocess.TimeoutExpired:
            self._end(process)
            return "it took too long", True
        if process.returncode:
            lines = [line for line in lines if line.startswith("bootseer")]
        return (lines or [f"exit status {process.returncode}"])[-1][:300], process.returncode != 0

    def _start(self, environment: ToSave) -> subprocess.Popen[bytes]:
        user = User.of(self._job.uid, self._job.gid)
        what = "save-installed" if environment.view else "save"
        command = [sys.executable, "-I", "-m", "bootseer_slurm", "env", what, environment.path]
        command += [*environment.installed, *environment.options]
        rights: dict[str, Any] = {"user": user.uid, "group": user.gid, "extra_groups": list(user.groups)}
        view = environment.view() if environment.view else None
        if view:
            groups = ",".join(map(str, user.groups))
            seen = [*map(str, view), environment.path, str(user.uid), str(user.gid), groups]
            command = [sys.executable, "-I", "-m", "bootseer_slurm.agent.within", *seen, *command]
            rights = {"pass_fds": (view.fd,)}
        try:
            return subprocess.Popen(
                [*_GENTLY, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=_environ(user, self._config) | {"SLURM_JOB_ID": str(self._job.job_id)},
                start_new_session=True,
                **rights,
            )
        finally:
            if view:
                os.close(view.fd)

    def stop(self) -> None:
        """The job is over: end what runs."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            process = self._process
        if process is not None:
            self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)


def _environ(user: User, config: Config) -> dict[str, str]:
    environ = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "BOOTSEER_STORE_URI": config.store.uri,
        "BOOTSEER_AGENT_SOCKET": str(config.agent.socket),
    }
    environ["TMPDIR"] = "/var/tmp"  # /tmp may be memory
    with contextlib.suppress(KeyError):
        environ["HOME"] = pwd.getpwuid(user.uid).pw_dir
    return environ
