"""The supervisor: it holds the mounts and sockets that outlive an agent that dies, and starts the next one.

Owns agent.lock, the sockets, the FUSE mounts with their descriptors and shared memory, the namespace of the
mounts that users serve, and one child, the agent proper. It does no input or output, has no threads and looks
at nothing that a job says, so that nothing a job does can hurt it. What connects while no agent lives waits
for the next one. The child is forked without exec: a new agent answers within milliseconds, and the readers
of its files, who wait meanwhile, hardly notice. What an agent needs of the one before it lies in files below
the socket's folder: see job/journal.py, fuse/server.py and cache/cache.py.

    SIGTERM, SIGINT   the agent ends its sessions, then all is unmounted; nothing of the service is left
    SIGHUP            the agent is killed and all code is loaded anew, with the mounts kept: an upgrade; not
                      where the new code or configuration cannot even be loaded, which a trial tells

An agent that was killed is started again. One that cannot start ends the supervisor with its exit status, but
not once agents have served: jobs may have files open, and the next try may do better. When the supervisor
itself is killed, its agent goes with it. systemd keeps the descriptors then (handover.py), and the supervisor
that it starts goes on as after an upgrade. Without systemd the mounts are dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bootseer_slurm import cgroups, mounts
from bootseer_slurm.agentapi import protocol
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import Mount
from bootseer_slurm.mounts import Namespace
from bootseer_slurm.service.handover import Handover, loads_anew
from bootseer_slurm.service.layouts import check_layouts
from bootseer_slurm.service.leftover import end_leftover

_log = logging.getLogger(__name__)

# What is read in parts is recorded, and readahead would blur the trace: with 1 MiB of it an import fetched
# 30 MB instead of 22. What is read whole wants the largest reads.
_READ_AHEAD_KB = {"blobs": 128, "checkpoints": 1024}
_STOPS = {signal.SIGTERM, signal.SIGINT}
_SIGNALS = {signal.SIGCHLD, signal.SIGHUP} | _STOPS
_PR_SET_PDEATHSIG = 1
_STOP_LIMIT_S = 25.0  # the agent gives its sessions 20 s, the systemd unit all of us 30 s
_LOOK_EVERY_S = 1.0
_SHORT_LIFE_S = 10.0  # an agent that is killed earlier than this, again and again, is started ever later
_PAUSES_S = (0.0, 0.0, 0.1, 0.5, 2.0, 5.0)
_GONE_LIMIT_S = 10.0  # for the agent of a supervisor that was killed

# Always overwritten by one write: a supervisor may be killed at any moment.
_RECORD_BYTES = 4096
_BACKLOG = 256  # prolog, steps and marks of a full node at once


@dataclass(slots=True)
class Resources:
    """Resources of an agent: mounts "blobs" and "checkpoints", sockets "root", "path" and "abstract".

    The abstract one is missing when another process has its name. private: where mounts are that users serve.
    """

    mounts: dict[str, Mount] = field(default_factory=dict)
    listeners: dict[str, socket.socket] = field(default_factory=dict)
    private: Namespace | None = None
    record: int = field(default_factory=lambda: os.memfd_create("bootseer-record", os.MFD_CLOEXEC))

    @classmethod
    def from_fds(cls, fds: dict[str, int]) -> Resources:
        """Take over another supervisor's. Raises KeyError, ValueError or OSError when they are not all."""
        resources = cls(record=fds["record"])
        for name, text in resources.read_record()["mounts"].items():
            fds_of_mount = fds[f"mount.{name}"], fds[f"ledger.{name}"]
            resources.mounts[name] = Mount.from_argument(text, fds_of_mount)
        resources.private = Namespace(fds["private"])
        for name, fd in fds.items():
            if name.startswith("listener."):
                resources.listeners[name.removeprefix("listener.")] = socket.socket(fileno=fd)
        return resources

    def fds(self) -> dict[str, int]:
        """The descriptors that the next supervisor needs, by name: last the record, without which none."""
        fds = {f"listener.{name}": each.fileno() for name, each in self.listeners.items()}
        for name, mount in self.mounts.items():
            fds[f"mount.{name}"], fds[f"ledger.{name}"] = mount.fds
        if self.private:
            fds["private"] = self.private.fd
        return fds | {"record": self.record}

    def read_record(self) -> dict[str, Any]:
        """The rest that the next supervisor needs. Raises ValueError."""
        return dict(json.loads(os.pread(self.record, _RECORD_BYTES, 0)))

    def write_record(self, agent: int) -> None:
        """Note all for the next supervisor. agent: the process that serves."""
        arguments = {name: mount.to_argument() for name, mount in self.mounts.items()}
        content = json.dumps({"agent": agent, "mounts": arguments}).encode()
        os.pwrite(self.record, content.ljust(_RECORD_BYTES), 0)

    def close(self) -> None:
        """Unmount all, and listen no more."""
        for listener in self.listeners.values():
            listener.close()
        for mount in self.mounts.values():
            mount.close()
        if self.private:
            self.private.close()


Serve = Callable[[Config, Resources], None]


class Supervisor:
    """Keeps an agent running on this node."""

    def __init__(self, config: Config, serve: Serve) -> None:
        """Make sure that it is the only one. serve: the agent's life, in the child. Raises BootseerError."""
        self._config = config
        self._serve = serve
        self._home = config.agent.socket.parent
        self._home.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._dying: list[int] = []  # agents that were killed and could not end yet
        self._stopping = False
        self._handover = Handover()
        received = self._handover.received
        self._lock_fd = received["lock"] if "lock" in received else _lock(self._home / "agent.lock")
        try:
            check_layouts(self._home)
            self._resources = Resources.from_fds(received)
            self._served = True  # jobs may have files open
        except (KeyError, ValueError, OSError, BootseerError):
            self._handover.give_up(but=self._lock_fd)
            self._resources = Resources()
            self._served = False

    def run(self) -> int:
        """Keep until told to stop; gives the exit status. Raises BootseerError when it cannot mount."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        cgroups.settle()
        if self._served:
            _wait_gone(self._resources.read_record()["agent"])
        else:
            _clear_left(self._config.agent.mounts, self._home)
        try:
            self._open()
            self._handover.tell_ready()
            return self._keep()
        finally:
            self._handover.forget(self._fds())
            end_leftover(self._handover.unit)
            for path in (self._config.agent.socket, self._home / protocol.ROOT_SOCKET_NAME):
                path.unlink(missing_ok=True)
            self._resources.close()

    def _open(self) -> None:
        """Open what is not there yet. Raises BootseerError."""
        for name, read_ahead_kb in _READ_AHEAD_KB.items():
            if name not in self._resources.mounts:
                point = self._config.agent.mounts / name
                self._resources.mounts[name] = Mount.open(point, read_ahead_kb=read_ahead_kb)
        if self._resources.private is None:
            try:
                self._resources.private = Namespace.create()
            except OSError as error:
                raise BootseerError(f"no mount namespace can be made: {error.strerror}") from error
        self._open_sockets()
        kept = self._handover.received if self._served else {}
        self._handover.store({name: fd for name, fd in self._fds().items() if name not in kept})
        self._resources.write_record(0)  # names nothing that is not stored

    def _open_sockets(self) -> None:
        listeners = self._resources.listeners
        if "root" not in listeners:
            listeners["root"] = _listen(str(self._home / protocol.ROOT_SOCKET_NAME), 0o600)
        if "path" not in listeners:
            listeners["path"] = _listen(str(self._config.agent.socket))
        if "abstract" not in listeners:
            try:
                listeners["abstract"] = _listen(protocol.ABSTRACT_SOCKET)
            except BootseerError as error:  # any user can hold this name: no reason to serve nobody
                _log.warning("%s; marks from containers are lost", error.message)

    def _keep(self) -> int:
        short_lives = 0
        while True:
            self._dying = [pid for pid in self._dying if os.waitpid(pid, os.WNOHANG)[0] == 0]
            start_s = time.monotonic()
            try:
                status = self._watch(self._start())
            except OSError as error:
                _log.error("no agent can be started: %s", error)
                status = 71  # EX_OSERR
            lived_s = time.monotonic() - start_s
            self._served = self._served or lived_s >= _SHORT_LIFE_S
            if self._stopping or (status >= 0 and not self._served):
                return max(status, 0)
            short_lives = short_lives + 1 if lived_s < _SHORT_LIFE_S else 0
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
            _log.error("the agent %s and is started again", how)
            time.sleep(_PAUSES_S[min(short_lives, len(_PAUSES_S) - 1)])

    def _start(self) -> int:
        """Fork an agent; gives its process id."""
        supervisor = os.getpid()
        pid = os.fork()
        if pid:
            self._resources.write_record(pid)
            return pid
        status = 70  # EX_SOFTWARE (sysexits.h)
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != supervisor:
                os._exit(status)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._serve(self._config, self._resources)
            status = 0
        except BootseerError as error:
            _log.error("%s%s", error.message, f" (hint: {error.hint})" if error.hint else "")
            status = error.exit_status
        except BaseException:
            _log.exception("the agent failed")
        finally:
            logging.shutdown()
            os._exit(status)  # not the supervisor's way out of here, and no waiting for threads

    def _watch(self, child: int) -> int:
        """Wait for the agent's end: its exit status, or minus the signal that killed it."""
        deadline_s: float | None = None
        upgrade = False
        while True:
            info = signal.sigtimedwait(_SIGNALS, _LOOK_EVERY_S)
            ended, wait_status = os.waitpid(child, os.WNOHANG)
            if not ended and info is None and _leader_is_dead(child):
                self._dying.append(child)
                ended, wait_status = child, signal.SIGKILL
            self._stopping = self._stopping or (info is not None and info.si_signo in _STOPS)
            if ended and upgrade and not self._stopping:
                self._load_anew()
            if ended:
                return os.waitstatus_to_exitcode(wait_status)
            if deadline_s is not None and time.monotonic() > deadline_s:
                _log.error("the agent does not end: killed")
                os.kill(child, signal.SIGKILL)
                deadline_s = time.monotonic() + _STOP_LIMIT_S
            elif info is not None and info.si_signo in _STOPS:
                os.kill(child, signal.SIGTERM)
                deadline_s = deadline_s or time.monotonic() + _STOP_LIMIT_S
            elif info is not None and info.si_signo == signal.SIGHUP and deadline_s is None:
                upgrade = upgrade or loads_anew(_STOPS)
                if upgrade:
                    os.kill(child, signal.SIGKILL)

    def _fds(self) -> dict[str, int]:
        """All descriptors that the next supervisor needs."""
        return {"lock": self._lock_fd} | self._resources.fds()

    def _load_anew(self) -> None:
        """Become a supervisor of the code that is installed now."""
        _log.warning("SIGHUP: loading the code anew; files stay mounted")
        self._resources.write_record(0)
        try:
            self._handover.exec_anew(self._fds())
        except OSError as error:
            _log.error("the code cannot be loaded anew, the old goes on: %s", error)


def _listen(address: str, mode: int = 0o666) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not address.startswith("\0"):
            with contextlib.suppress(FileNotFoundError):
                Path(address).unlink()
        listener.bind(address)
        if not address.startswith("\0"):
            Path(address).chmod(mode)  # before it listens
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        shown = address.replace("\0", "@")
        raise BootseerError(
            f"{shown}: cannot listen: {error.strerror}", hint="is an agent running?"
        ) from error
    return listener


def _leader_is_dead(pid: int) -> bool:
    """Whether a process was killed and only cannot end: one of its threads waits for a file of its own.

    Such a thread does not come back before the next agent answers it, and then it ends.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def _wait_gone(pid: int) -> None:
    """Wait until no thread of a killed agent runs any more, which may have taken requests."""
    deadline_s = time.monotonic() + _GONE_LIMIT_S
    while pid and Path(f"/proc/{pid}").exists() and not _leader_is_dead(pid):
        if time.monotonic() > deadline_s:  # then it is another process by now
            break
        time.sleep(0.01)


def _clear_left(run: Path, home: Path) -> None:
    """Take away what a supervisor left that was killed: its mounts show nothing any more, its jobs are lost.

    run: above the mounts. home: the socket's folder.
    """
    run.mkdir(mode=0o755, parents=True, exist_ok=True)
    for name in (*_READ_AHEAD_KB, "env", "images"):
        with contextlib.suppress(FileExistsError):
            (run / name).mkdir(mode=0o755)  # not exist_ok: that would look at a dead mount
        for mount in reversed(mounts.mounts_below(run / name)):
            with contextlib.suppress(OSError):
                mounts.unmount(mount.point)
    for name in ("env", "images"):
        (run / name).chmod(0o700)  # what lies there is for nobody else; jobs see theirs through a shadow
        # Nothing but empty folders is removed: the configuration may name a place that holds more.
        for folder in (*(run / name).glob("*/*"), *(run / name).glob("*")):
            with contextlib.suppress(OSError):
                folder.rmdir()
    for folder in (home / "jobs", home / "ending", home / "events", home / "ended"):
        with contextlib.suppress(FileNotFoundError):
            for file in folder.iterdir():
                with contextlib.suppress(OSError):
                    file.unlink()
    for file in home.glob("*.nodes"):
        file.unlink()


def _lock(path: Path) -> int:
    """Take the lock of a node's only agent; it is held until the process ends, and the file stays."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BootseerError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise BootseerError(f"{path}: an agent runs already", hint="`bootseer status` shows it") from error
    return fd
