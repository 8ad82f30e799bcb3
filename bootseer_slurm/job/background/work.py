"""Work for a job's user that nobody waits for: with the least claim on CPU and disk, and ended with the job.

One process at a time, of this project's own programs, with the user's rights. Thread-safe.
"""

from __future__ import annotations

import contextlib
import pwd
import subprocess
import threading
from collections.abc import Callable, Sequence

from bootseer_slurm.config import Config
from bootseer_slurm.env.bytecode import RUN_NOTHING
from bootseer_slurm.identity import User
from bootseer_slurm.job.background.run_as_user import SeenAt, Task
from bootseer_slurm.job.context import JobContext
from bootseer_slurm.tail import last_lines

_LIMIT_S = 3600.0
_END_S = 10.0  # for it to clean up
_GENTLY = ("nice", "-n", "19", "ionice", "-c", "3")


class Background:
    """The background work of one job on this node."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self,
        arguments: Sequence[str],
        *,
        seen_at: SeenAt | None = None,
        fds: Sequence[int] = (),
        when_to_go_on: Callable[[], bool] = lambda: True,
    ) -> tuple[str, bool]:
        """Run `python -m ARGUMENTS` and wait; gives what it said last, and whether it failed.

        seen_at: a mount that the program sees in the place of a folder. fds: that it inherits. when_to_go_on:
        asked again and again; once it says so, the program's stdin ends. Raises OSError, ValueError or
        SubprocessError.
        """
        with self._turn:
            with self._lock:
                if self._context.phase.has_ended:
                    return "", True
                process = self._process = self._start(arguments, seen_at, fds)
            try:
                while not (
                    when_to_go_on() or self._context.phase.wait_end(1.0) or process.poll() is not None
                ):
                    pass
                assert process.stdin is not None
                process.stdin.close()
                lines = last_lines(process, _LIMIT_S)
            except subprocess.TimeoutExpired:
                self._end(process)
                return "it took too long", True
        if process.returncode:
            lines = [line for line in lines if line.startswith("bootseer")]
        return (lines or [f"exit status {process.returncode}"])[-1][:300], process.returncode != 0

    def _start(
        self, arguments: Sequence[str], seen_at: SeenAt | None, fds: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        job = self._context.job
        user = User.of(job.uid, job.gid)
        process = subprocess.Popen(
            [*_GENTLY, *Task(user, tuple(arguments), seen_at).command()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=_environ(user, self._context.config) | {"SLURM_JOB_ID": str(job.job_id)},
            start_new_session=True,
            pass_fds=fds,
        )
        self._context.group.add(process.pid)
        return process

    def stop(self) -> None:
        """The job is over: end what runs, and begin nothing more."""
        with self._lock:
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
        RUN_NOTHING: "1",
    }
    environ["TMPDIR"] = "/var/tmp"  # /tmp may be memory
    with contextlib.suppress(KeyError):
        environ["HOME"] = pwd.getpwuid(user.uid).pw_dir
    return environ
