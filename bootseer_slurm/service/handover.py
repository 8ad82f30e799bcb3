"""Handing descriptors on to the next supervisor: at an upgrade by exec, at a restart by systemd's store.

Owns: what is said to systemd (sd_notify(3)), the variables in which names and numbers come, and the trial
before an upgrade. Does not own the descriptors. Children get nothing of it: the variables are taken out of
the environment.

    BOOTSEER_HANDED_ON                        {name: number}, from the process that this one was
    LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES    from systemd (sd_listen_fds(3)): what was stored before

systemd keeps what is stored over a restart of the service, and lets go of it when the service is stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Set

_log = logging.getLogger(__name__)

# Another layout of what is handed over needs another name here: a supervisor of the code before then sees its
# trial fail, for an agent runs already, and goes on.
_HANDED_ON = "BOOTSEER_HANDED_ON"
_TRIAL = "trial"  # instead: a process that loads all the same, and ends
_NOTIFY = "NOTIFY_SOCKET"
_UNIT = "BOOTSEER_UNIT"  # the unit's name, as the unit says it
_FIRST_FD = 3  # SD_LISTEN_FDS_START
_TRIAL_LIMIT_S = 30.0
_TRIAL_LOOK_S = 0.1


def is_trial() -> bool:
    """Whether this process only shows that the code and the configuration can be loaded."""
    return os.environ.get(_HANDED_ON) == _TRIAL


class Handover:
    """What this process was handed, and who keeps it for the next one."""

    def __init__(self) -> None:
        """Take what was handed to this process: `received`, by name; `unit` is "" where it is no service."""
        self._notify = os.environ.pop(_NOTIFY, "")
        self.unit = os.environ.pop(_UNIT, "")
        handed_on = os.environ.pop(_HANDED_ON, "")
        listen = [os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
        self.received: dict[str, int] = json.loads(handed_on) if handed_on else _listed(*listen)
        for fd in self.received.values():
            os.set_inheritable(fd, False)

    def store(self, fds: Mapping[str, int]) -> None:
        """Have systemd keep these."""
        for name, fd in fds.items():
            # No polling: systemd would let go of a /dev/fuse whose mount is broken for a moment, say.
            self._tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])

    def forget(self, names: Iterable[str]) -> None:
        """Have systemd let go of these."""
        for name in names:
            self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def give_up(self, *, but: int) -> None:
        """Close all that was handed over but one, and have systemd let go of it."""
        self.forget(self.received)
        for fd in self.received.values():
            if fd != but:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def tell_ready(self) -> None:
        """Say that who connects is answered."""
        self._tell("READY=1")

    def exec_anew(self, fds: Mapping[str, int]) -> None:
        """Become a process of the code that is installed now, with these. Raises OSError."""
        handed_on = {_HANDED_ON: json.dumps(dict(fds)), _NOTIFY: self._notify, _UNIT: self.unit}
        for fd in fds.values():
            os.set_inheritable(fd, True)
        try:
            os.execve(sys.executable, sys.orig_argv, os.environ | handed_on)
        finally:
            for fd in fds.values():
                os.set_inheritable(fd, False)

    def _tell(self, text: str, fds: Iterable[int] = ()) -> None:
        if not self._notify:
            return
        address = f"\0{self._notify[1:]}" if self._notify.startswith("@") else self._notify
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
                link.connect(address)
                socket.send_fds(link, [text.encode()], list(fds))
        except OSError as error:
            _log.error("systemd is not told %s: %s", text.splitlines(), error)


def _listed(pid: str, count: str, names: str) -> dict[str, int]:
    """What systemd handed over, if it was to this process."""
    with contextlib.suppress(ValueError):
        if int(pid) == os.getpid():
            return dict(zip(names.split(":"), range(_FIRST_FD, _FIRST_FD + int(count)), strict=False))
    return {}


def loads_anew(stops: Set[signal.Signals]) -> bool:
    """Try the code and the configuration that are installed now, in a process that serves nobody.

    False too when one of `stops` is pending: signals that this process blocks, and ends by.
    """
    try:
        reason = _try_out(stops)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    if _is_told_to_stop(stops):
        _log.info("SIGHUP: told to stop meanwhile, nothing is loaded")
        return False
    if reason:
        _log.error("SIGHUP: the code that is installed now does not start, the old goes on: %s", reason)
    return not reason


def _try_out(stops: Set[signal.Signals]) -> str:
    """Why the trial failed, "" when it did not. Raises OSError, SubprocessError."""
    trial = subprocess.Popen(
        sys.orig_argv,
        executable=sys.executable,
        env=os.environ | {_HANDED_ON: _TRIAL},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    deadline_s = time.monotonic() + _TRIAL_LIMIT_S
    with trial:
        while True:
            try:
                said = trial.communicate(timeout=_TRIAL_LOOK_S)[1]
                return f"exit status {trial.returncode}: {said.strip()}" if trial.returncode else ""
            except subprocess.TimeoutExpired:
                if _is_told_to_stop(stops) or time.monotonic() > deadline_s:
                    trial.kill()
                    return f"no end within {_TRIAL_LIMIT_S:g} s"


def _is_told_to_stop(stops: Set[signal.Signals]) -> bool:
    return not signal.sigpending().isdisjoint(stops)
