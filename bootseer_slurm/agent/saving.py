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
from typing import Any

from bootseer_slurm.agent.request import Job
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.events import EventLog
from bootseer_slurm.fetch.process import User
from bootseer_slurm.slurm.hostlist import expand

_log = logging.getLogger(__name__)

_LIMIT_S = 3600.0
_END_S = 10.0  # for it to clean up
_GENTLY = ("nice", "-n", "19", "ionice", "-c", "3")


@dataclass(frozen=True)
class ToSave:
    """An environment, and the image that the job named for it.

    installed: of one that was installed to, the class, fingerprint and folder of env.snapshot.Installed.
    view: gives a descriptor of a mount of what the job sees there.
    """

    path: str
    image: str
    installed: Sequence[str] = ()
    view: Callable[[], int] | None = None


class Saving:
    """The snapshots that one job makes on this node. Thread-safe."""

    def __init__(self, job: Job, log: EventLog, config: Config) -> None:
        self._job = job
        self._log = log
        self._config = config
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._over = False
        self._begun = False

    def begin(self, environments: Sequence[ToSave]) -> None:
        """Save these, one after the other. A second call does nothing."""
        with self._lock:
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
            begin_s = time.monotonic()
            try:
                said, failed = self._save(environment)
            except (BootseerError, OSError, subprocess.SubprocessError) as error:
                said, failed = str(error), True
            if self._over:
                return
            if environment.view and not failed and not said.endswith(" saved"):
                continue  # nothing was installed, or another start had installed it
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
            said, errors = process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._end(process)
            return "it took too long", True
        lines = said.strip().splitlines()
        if process.returncode:
            lines = [line for line in errors.splitlines() if line.startswith("bootseer")]
        return (lines or [f"exit status {process.returncode}"])[-1][:300], process.returncode != 0

    def _start(self, environment: ToSave) -> subprocess.Popen[str]:
        user = User.of(self._job.uid, self._job.gid)
        what = "save-installed" if environment.view else "save"
        command = [sys.executable, "-I", "-m", "bootseer_slurm", "env", what, environment.path]
        command += environment.installed
        command += ["--image", environment.image] if environment.image else []
        rights: dict[str, Any] = {"user": user.uid, "group": user.gid, "extra_groups": list(user.groups)}
        view_fd = -1
        if environment.view:
            view_fd = environment.view()
            groups = ",".join(map(str, user.groups))
            as_user = [str(view_fd), environment.path, str(user.uid), str(user.gid), groups]
            command = [sys.executable, "-I", "-m", "bootseer_slurm.agent.within", *as_user, *command]
            rights = {"pass_fds": (view_fd,)}
        try:
            return subprocess.Popen(
                [*_GENTLY, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd="/",
                env=_environ(user, self._config) | {"SLURM_JOB_ID": str(self._job.job_id)},
                start_new_session=True,
                **rights,
            )
        finally:
            if view_fd >= 0:
                os.close(view_fd)

    def stop(self) -> None:
        """The job is over: end what runs."""
        with self._lock:
            self._over = True
            process = self._process
        if process is not None:
            self._end(process)

    def _end(self, process: subprocess.Popen[str]) -> None:
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
