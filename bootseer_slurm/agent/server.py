"""The node agent: one process as root on each node, its sockets and the jobs it knows.

Owns the sockets, who may ask what (SO_PEERCRED), and the table of sessions, one for each job id. On disk,
beside the socket: agent.lock, held while an agent lives, and jobs/<job id>, an empty file for each session,
by which the hook knows a job that asked for Bootseer only in a step; beside the FUSE mount: env/, root's
alone, where sessions mount environments.

One thread answers one connection. A client has 2 s in all to send its request. Root's connections have room
of their own; other users' are few for each user and bounded in all, and those beyond are closed at once: no
user can keep the hook, the plugin or another user from being answered. One thread reaps lost sessions.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from bootseer_slurm import mounts
from bootseer_slurm.agent import protocol
from bootseer_slurm.agent.protocol import Message, first
from bootseer_slurm.agent.request import Request, number, parse_job, parse_request
from bootseer_slurm.agent.session import Session
from bootseer_slurm.agent.shelf import Shelf
from bootseer_slurm.blob.cache import Cache
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.fuse import Server

_log = logging.getLogger(__name__)

_BACKLOG = 256  # prolog, steps and marks of a full node at once
_ROOT_CONNECTIONS = 64
_USER_CONNECTIONS = 8  # of each user
_USERS_CONNECTIONS = 48  # of all users but root
_REQUEST_TIMEOUT_S = 2.0
_ACCEPT_PAUSE_S = 0.2  # after an error, which is a lack of descriptors or memory
_ATTACH_MARGIN_S = 5.0  # for seeing that the originals are the same, and making the mounts
_PUBLIC = ("mark", "status")
_END_LIMIT_S = 20.0  # for all sessions when the agent stops; the systemd unit allows 30 s
# An interactive job may pause between its steps; what is lost by waiting is some disk.
_REAP_EVERY_S = 1800.0
_REAP_AGE_S = 3600.0
_REAP_AGE_WITHOUT_STEP_S = 86400.0  # an allocation may wait long for its first step on this node
_STEP_TITLE = re.compile(r"^slurmstepd: \[(\d+)\.")


def jobs_with_steps() -> set[int]:
    """The jobs that have a step on this node: each step's slurmstepd names it, "slurmstepd: [1234.batch]"."""
    jobs: set[int] = set()
    for process in psutil.process_iter(["name"]):
        if (process.info["name"] or "").startswith("slurmstepd"):
            with contextlib.suppress(psutil.NoSuchProcess):
                jobs.update(map(int, _STEP_TITLE.findall(" ".join(process.cmdline()))))
    return jobs


class _Room:
    """How many connections are served at once: root's apart from other users', and few of each of these."""

    def __init__(self) -> None:
        self._root = threading.Semaphore(_ROOT_CONNECTIONS)
        self._users: Counter[int] = Counter()
        self._lock = threading.Lock()

    def take(self, uid: int) -> bool:
        """Take room for one connection: root waits for it, another user gets False when there is none."""
        if uid == 0:
            return self._root.acquire()
        with self._lock:
            if self._users[uid] >= _USER_CONNECTIONS or self._users.total() >= _USERS_CONNECTIONS:
                return False
            self._users[uid] += 1
            return True

    def give_back(self, uid: int) -> None:
        if uid == 0:
            self._root.release()
            return
        with self._lock:
            self._users[uid] -= 1
            if not self._users[uid]:
                del self._users[uid]


@dataclass(slots=True)
class _Entry:
    """A session in the table. absent: rounds in a row in which its job had no step on this node."""

    session: Session
    begin_s: float
    had_step: bool = False
    absent: int = 0


class Agent:
    """Serves this node until it is told to stop."""

    def __init__(self, config: Config) -> None:
        """Make sure that it is the only one, and open the cache. Raises BootseerError."""
        self._config = config
        self._home = config.agent.socket.parent
        self._home.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock_fd = _lock(self._home / "agent.lock")  # first of all: the rest would break another agent
        self._node = os.uname().nodename.split(".")[0]
        self._cache = Cache(
            config.cache.path, max_bytes=config.cache.max_bytes, min_free_bytes=config.cache.min_free_bytes
        )
        self._files = Server(config.agent.blobs)
        self._shelf = Shelf(self._cache, self._files)
        self._sessions: dict[int, _Entry] = {}
        self._endings: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._room = _Room()
        self._stop = threading.Event()
        self._start_ns = time.time_ns()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then end the sessions and unmount. Raises BootseerError."""
        for number_ in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number_, lambda *_: self._stop.set())
        self._clear_left()
        self._files.start()
        listeners = [(self._listen(str(self._config.agent.socket)), False)]
        try:
            listeners.append((self._listen(protocol.ABSTRACT_SOCKET), True))
        except BootseerError as error:  # any user can hold this name: no reason to serve nobody
            _log.warning("%s; marks from containers are lost", error.message)
        for listener, public in listeners:
            threading.Thread(target=self._accept, args=(listener, public), daemon=True).start()
        threading.Thread(target=self._reap, daemon=True).start()
        _log.info("agent serves %s", self._config.agent.socket, extra={"node": self._node})
        self._stop.wait()
        for listener, _ in listeners:
            listener.close()
        self._config.agent.socket.unlink(missing_ok=True)
        self._end_all()
        self._files.stop()

    def _end_all(self) -> None:
        """End the sessions, all at once, and wait for them and for those that are ending already."""
        with self._lock:
            jobs = list(self._sessions)
        for job_id in jobs:
            self._end(job_id, "agent stopped")
        deadline_s = time.monotonic() + _END_LIMIT_S
        for thread in self._endings:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _clear_left(self) -> None:
        """Take away what an agent left that was killed: its mounts show nothing any more."""
        blobs = self._config.agent.blobs
        blobs.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            blobs.mkdir(mode=0o755)  # not exist_ok: that would look at a dead mount
        environments = blobs.parent / "env"
        for mount in (*mounts.mounts_below(blobs), *mounts.mounts_below(environments)):
            with contextlib.suppress(OSError):
                mounts.unmount(mount.point)
        environments.mkdir(mode=0o700, exist_ok=True)
        environments.chmod(0o700)  # jobs' environments are for nobody else; an agent made it 0755 once
        # Nothing but empty folders is removed: the configuration may name a place that holds more.
        for folder in (*environments.glob("*/*"), *environments.glob("*")):
            with contextlib.suppress(OSError):
                folder.rmdir()
        jobs = self._home / "jobs"
        jobs.mkdir(mode=0o755, exist_ok=True)
        for file in jobs.iterdir():
            with contextlib.suppress(OSError):
                file.unlink()

    def _listen(self, address: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not address.startswith("\0"):
                with contextlib.suppress(FileNotFoundError):
                    Path(address).unlink()
            listener.bind(address)
            if not address.startswith("\0"):
                Path(address).chmod(0o666)
            listener.listen(_BACKLOG)
        except OSError as error:
            shown = address.replace("\0", "@")
            raise BootseerError(
                f"{shown}: cannot listen: {error.strerror}", hint="is an agent running?"
            ) from error
        return listener

    def _accept(self, listener: socket.socket, public: bool) -> None:
        while not self._stop.is_set():
            try:
                link, _ = listener.accept()
                self._admit(link, public)
            except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no thread can be started
                if not self._stop.is_set():
                    _log.warning("connection not taken: %s", error)
                self._stop.wait(_ACCEPT_PAUSE_S)

    def _admit(self, link: socket.socket, public: bool) -> None:
        """Have a connection served, or close it where its user has too many."""
        _, uid, _ = protocol.peer(link)
        if not self._room.take(uid):
            link.close()
            return
        try:
            threading.Thread(target=self._serve, args=(link, public, uid), daemon=True).start()
        except BaseException:
            self._room.give_back(uid)
            link.close()
            raise

    def _serve(self, link: socket.socket, public: bool, uid: int) -> None:
        fds: list[int] = []
        try:
            with link:
                reply = self._reply(link, public, uid, fds)
                content = protocol.encode(reply)
                sent = socket.send_fds(link, [content], fds)
                link.sendall(content[sent:])
        except (OSError, ValueError) as error:
            _log.debug("client went away: %s", error)
        finally:
            for fd in fds:
                os.close(fd)
            self._room.give_back(uid)

    def _reply(self, link: socket.socket, public: bool, uid: int, fds: list[int]) -> Message:
        try:
            message = protocol.receive_request(link, _REQUEST_TIMEOUT_S)
            link.settimeout(_REQUEST_TIMEOUT_S)  # for the reply
            op = first(message, "OP")
            if op not in _PUBLIC and (public or uid != 0):
                raise InputError(f"{op[:40]!r} is for root on this node")
            if op == "attach":
                # So that the plugin can tell an agent that waits for a file system from a hung one.
                wait_ms = int((self._config.prefetch.attach_wait_s + _ATTACH_MARGIN_S) * 1000)
                link.sendall(protocol.encode([("WAIT", str(wait_ms))]))
                return [("STATUS", "ok"), *self._attach(message, fds)]
            if op == "status":
                return [("STATUS", "ok"), ("STATUS_JSON", json.dumps(self._status()))]
            if op == "prolog":
                self._prolog(message)
            elif op == "epilog":
                self._epilog(message)
            elif op == "mark":
                self._mark(message, uid)
            elif op == "stage":
                self._stage(message)
            else:
                raise InputError(f"unknown request {op[:40]!r}")
        except (BootseerError, ValueError) as error:
            return [("STATUS", "error"), ("MESSAGE", str(error).replace("\0", " ")[:500])]
        except OSError:
            raise
        except Exception:
            _log.exception("request failed")
            return [("STATUS", "error"), ("MESSAGE", "the agent failed; its log says where")]
        return [("STATUS", "ok")]

    def _prolog(self, message: Message) -> None:
        job, request = parse_job(message), parse_request(message)
        self._end(job.job_id, "requeued")  # a session of this job is of an earlier start
        if request is None:
            return
        session = Session(job, first(message, "NODENAME") or self._node, self._config, self._shelf)
        with self._lock:
            self._keep(session)
        session.begin(request, hook_start_ns=number(message, "HOOK_START_NS", "0"))

    def _epilog(self, message: Message) -> None:
        # Not by restart count: the epilog of a requeued run already says the next one (Slurm 22.05).
        self._end(number(message, "JOB_ID"), "job ended")

    def _keep(self, session: Session) -> None:
        """Put a session into the table, and tell the hook of it; the caller holds the lock."""
        self._sessions[session.job.job_id] = _Entry(session, time.monotonic())
        try:
            (self._home / "jobs" / str(session.job.job_id)).touch(mode=0o644)
        except OSError as error:
            _log.warning("the epilog may not come: %s", error, extra={"job": session.job.job_id})

    def _end(self, job_id: int, reason: str) -> None:
        """Take a job's session out of the table, if there is one, and end it in a thread."""
        with self._lock:
            entry = self._sessions.get(job_id)
            if entry is None:
                return
            thread = threading.Thread(target=entry.session.end, args=(reason,), daemon=True)
            thread.start()
            del self._sessions[job_id]
            with contextlib.suppress(OSError):
                (self._home / "jobs" / str(job_id)).unlink()
            self._endings = [each for each in self._endings if each.is_alive()] + [thread]

    def _reap(self) -> None:
        """End, round by round, the sessions whose epilog was lost (a thread of its own)."""
        while not self._stop.wait(_REAP_EVERY_S):
            try:
                for job_id in self._without_step(jobs_with_steps()):
                    _log.warning("no step left and no epilog", extra={"job": job_id})
                    self._end(job_id, "no step left")
            except (psutil.Error, OSError, RuntimeError) as error:  # the next round may do better
                _log.warning("cannot look for sessions without a step: %s", error)

    def _without_step(self, jobs: set[int]) -> list[int]:
        """Note which jobs have a step in this round; give those whose session is to be ended."""
        over = []
        with self._lock:
            for job_id, entry in self._sessions.items():
                entry.had_step |= job_id in jobs
                # Two rounds, for a job has no step for a moment between one and the next.
                entry.absent = 0 if job_id in jobs else entry.absent + 1
                age_s = _REAP_AGE_S if entry.had_step else _REAP_AGE_WITHOUT_STEP_S
                if entry.absent >= 2 and time.monotonic() - entry.begin_s > age_s:
                    over.append(job_id)
        return over

    def _attach(self, message: Message, fds: list[int]) -> Message:
        job, request = parse_job(message), parse_request(message)
        step = first(message, "STEP_ID")
        with self._lock:
            entry = self._sessions.get(job.job_id)
            if entry is None and request is not None:  # asked for in the step only, or a lost prolog
                session = Session(job, first(message, "NODENAME") or self._node, self._config, self._shelf)
                self._keep(session)
                session.begin(request, hook_start_ns=None)
                entry = self._sessions[job.job_id]
            if entry is None or entry.session.job.uid != job.uid:
                return []
            entry.had_step, entry.absent = True, 0
        session = entry.session
        session.add(request or Request(observe=True))
        binds, environ = session.attach(step)
        reply: Message = [("SETENV", f"{name}={value}") for name, value in environ.items()]
        for bind in binds:
            if len(fds) == protocol.DESCRIPTOR_LIMIT:
                os.close(bind.fd)
                continue
            reply.append(("BIND", f"{len(fds)}:{bind.device}:{bind.inode}:{bind.path}"))
            fds.append(bind.fd)
        return reply

    def _session(self, message: Message) -> Session:
        job_id = number(message, "JOB_ID")
        with self._lock:
            entry = self._sessions.get(job_id)
        if entry is None:
            raise NotFound(f"job {job_id} did not ask for Bootseer on this node")
        return entry.session

    def _mark(self, message: Message, uid: int) -> None:
        session = self._session(message)
        if uid not in (0, session.job.uid):
            raise InputError(f"job {session.job.job_id} is another user's")
        task = number(message, "PROC_ID") if first(message, "PROC_ID") else None
        time_ns, step = number(message, "TIME_NS"), first(message, "STEP_ID") or None
        session.mark(first(message, "NAME"), t_ns=time_ns, step=step, task=task)

    def _stage(self, message: Message) -> None:
        task = number(message, "TASK") if first(message, "TASK") else None
        self._session(message).stage(
            first(message, "NAME"),
            t_ns=number(message, "TIME_NS"),
            step=first(message, "STEP_ID"),
            task=task,
            detail=first(message, "DETAIL") or None,
        )

    def _status(self) -> dict[str, object]:
        with self._lock:
            held = [entry.session.job for entry in self._sessions.values()]
        jobs = [{"job": job.job_id, "restart": job.restart} for job in held]
        return {"node": self._node, "pid": os.getpid(), "start_ns": self._start_ns, "jobs": jobs}


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
