"""The node agent: one process as root on each node, its sockets and the jobs it knows.

Owns the sockets, who may ask what (SO_PEERCRED), and the table of sessions, one for each job id. One thread
answers one connection; a client has 2 s to send its request, so none can hold a thread for long.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

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
_CONNECTIONS = 64
_REQUEST_TIMEOUT_S = 2.0
_ATTACH_MARGIN_S = 5.0  # for seeing that the originals are the same, and making the mounts
_PUBLIC = ("mark", "status")


class Agent:
    """Serves this node until it is told to stop."""

    def __init__(self, config: Config) -> None:
        """Open the cache and mount the FUSE file system. Raises BootseerError."""
        self._config = config
        self._node = os.uname().nodename.split(".")[0]
        self._cache = Cache(
            config.cache.path, max_bytes=config.cache.max_bytes, min_free_bytes=config.cache.min_free_bytes
        )
        self._files = Server(config.agent.blobs)
        self._shelf = Shelf(self._cache, self._files)
        self._sessions: dict[int, Session] = {}
        self._lock = threading.Lock()
        self._room = threading.Semaphore(_CONNECTIONS)
        self._stop = threading.Event()
        self._start_ns = time.time_ns()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then end the sessions and unmount. Raises BootseerError."""
        for number_ in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number_, lambda *_: self._stop.set())
        self._config.agent.socket.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._clear_left_mounts()
        self._files.start()
        listeners = [self._listen(str(self._config.agent.socket)), self._listen(protocol.ABSTRACT_SOCKET)]
        for listener, public in zip(listeners, (False, True), strict=True):
            threading.Thread(target=self._accept, args=(listener, public), daemon=True).start()
        _log.info("agent serves %s", self._config.agent.socket, extra={"node": self._node})
        self._stop.wait()
        for listener in listeners:
            listener.close()
        self._config.agent.socket.unlink(missing_ok=True)
        for session in list(self._sessions.values()):
            session.end("agent stopped")
        self._files.stop()

    def _clear_left_mounts(self) -> None:
        """Take away what an agent left that was killed: its mounts show nothing any more."""
        blobs = self._config.agent.blobs
        with contextlib.suppress(FileExistsError):
            blobs.mkdir(mode=0o755)  # not exist_ok: that would look at a dead mount
        for mount in (*mounts.mounts_below(blobs), *mounts.mounts_below(blobs.parent / "env")):
            with contextlib.suppress(OSError):
                mounts.unmount(mount.point)
        shutil.rmtree(blobs.parent / "env", ignore_errors=True)

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
            except OSError:
                return
            self._room.acquire()
            threading.Thread(target=self._serve, args=(link, public), daemon=True).start()

    def _serve(self, link: socket.socket, public: bool) -> None:
        fds: list[int] = []
        try:
            with link:
                link.settimeout(_REQUEST_TIMEOUT_S)
                reply = self._reply(link, public, fds)
                content = protocol.encode(reply)
                sent = socket.send_fds(link, [content], fds)
                link.sendall(content[sent:])
        except (OSError, ValueError) as error:
            _log.debug("client went away: %s", error)
        finally:
            for fd in fds:
                os.close(fd)
            self._room.release()

    def _reply(self, link: socket.socket, public: bool, fds: list[int]) -> Message:
        try:
            message, received = protocol.receive(link)
            for fd in received:
                os.close(fd)
            _, uid, _ = protocol.peer(link)
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
        if request is None:
            return
        session = Session(job, first(message, "NODENAME") or self._node, self._config, self._shelf)
        with self._lock:
            old = self._sessions.get(job.job_id)
            self._sessions[job.job_id] = session
        if old:
            threading.Thread(target=old.end, args=("requeued",), daemon=True).start()
        session.begin(request, hook_start_ns=number(message, "HOOK_START_NS", "0"))

    def _epilog(self, message: Message) -> None:
        # Not by restart count: the epilog of a requeued run already says the next one (Slurm 22.05).
        with self._lock:
            session = self._sessions.pop(number(message, "JOB_ID"), None)
        if session:
            threading.Thread(target=session.end, args=("job ended",), daemon=True).start()

    def _attach(self, message: Message, fds: list[int]) -> Message:
        job, request = parse_job(message), parse_request(message)
        step = first(message, "STEP_ID")
        with self._lock:
            session = self._sessions.get(job.job_id)
            if session is None and request is not None:  # this cluster's prolog is not enabled
                session = Session(job, first(message, "NODENAME") or self._node, self._config, self._shelf)
                self._sessions[job.job_id] = session
                session.begin(request, hook_start_ns=None)
        if session is None or session.job.uid != job.uid:
            return []
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
            session = self._sessions.get(job_id)
        if session is None:
            raise NotFound(f"job {job_id} did not ask for Bootseer on this node")
        return session

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
            jobs = [{"job": each.job.job_id, "restart": each.job.restart} for each in self._sessions.values()]
        return {"node": self._node, "pid": os.getpid(), "start_ns": self._start_ns, "jobs": jobs}
