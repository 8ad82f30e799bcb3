"""Making snapshots of environments that had none, once the start of a job is over.

On one node of the job, the first of its nodelist, and as the job's user: `bootseer env save`, with the least
claim on CPU and disk, so that the job hardly notices. It ends with the job. Owns that process; one thread
waits for it. What came of it is an event "snapshot".
"""

from __future__ import annotations

import contextlib
import logging
import pwd
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from bootseer_slurm.agent.request import Job
from bootseer_slurm.config import Config
from bootseer_slurm.errors import InputError
from bootseer_slurm.events import EventLog
from bootseer_slurm.fetch.process import User
from bootseer_slurm.slurm.hostlist import expand

_log = logging.getLogger(__name__)

_LIMIT_S = 3600.0
_END_S = 10.0  # for it to clean up
_GENTLY = ("nice", "-n", "19", "ionice", "-c", "3")


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

    def begin(self, environments: Sequence[str], image: str) -> None:
        """Save these folders, one after the other; image: as the job named it. A second call does nothing."""
        with self._lock:
            if self._begun or self._over or not environments or not self._is_first_node():
                return
            self._begun = True
        thread = threading.Thread(
            target=self._save_all, args=(environments, image), name="saving", daemon=True
        )
        thread.start()

    def _is_first_node(self) -> bool:
        try:
            return expand(self._job.nodelist)[:1] in ([], [self._log.node])
        except InputError:
            return False

    def _save_all(self, environments: Sequence[str], image: str) -> None:
        for path in environments:
            begin_s = time.monotonic()
            try:
                said, failed = self._save(path, image)
            except (OSError, subprocess.SubprocessError) as error:
                said, failed = str(error), True
            if self._over:
                return
            self._log.emit(
                "snapshot",
                "failed" if failed else "saved",
                target=path,
                what="environment",
                dur_s=time.monotonic() - begin_s,
                level="warning" if failed else "info",
                message=f"not saved: {said}" if failed else "saved for the next start",
            )

    def _save(self, path: str, image: str) -> tuple[str, bool]:
        """Run the command; gives what it said last, and whether it failed."""
        user = User.of(self._job.uid, self._job.gid)
        command = [*_GENTLY, sys.executable, "-I", "-m", "bootseer_slurm", "env", "save", path]
        with self._lock:
            if self._over:
                return "", True
            self._process = subprocess.Popen(
                [*command, *(["--image", image] if image else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd="/",
                env=_environ(user, self._config) | {"SLURM_JOB_ID": str(self._job.job_id)},
                user=user.uid,
                group=user.gid,
                extra_groups=list(user.groups),
                start_new_session=True,
            )
        try:
            _, said = self._process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._end(self._process)
            return "it took too long", True
        lines = [line for line in said.splitlines() if line.startswith("bootseer")]
        return (lines or [f"exit status {self._process.returncode}"])[-1][:300], self._process.returncode != 0

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
