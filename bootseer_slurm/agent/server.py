"""The node agent: one process as root on each node, which answers the operations of agentapi (SO_PEERCRED).

On disk, beside the socket: what journal.py keeps of each job, and the node tables of the FUSE mounts; beside
these mounts: env/ and images/, root's alone, where environments and images are mounted. The mounts and the
sockets themselves are the keeper's (keeper.py), which starts this process again when it dies.

One thread answers one connection. A client has 2 s in all to send its request. Connections beyond their room
(room.py) are closed at once: no user can keep the hook, the plugin or another user from being answered.
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
from collections.abc import Callable

from bootseer_slurm.agent.journal import Journal
from bootseer_slurm.agent.keeper import Kept
from bootseer_slurm.agent.request import Job, number
from bootseer_slurm.agent.room import Room
from bootseer_slurm.agent.session import Session
from bootseer_slurm.agent.shelf import Shelf
from bootseer_slurm.agent.table import Table
from bootseer_slurm.agentapi import protocol
from bootseer_slurm.agentapi.operations import OPERATIONS, Asker, Operation
from bootseer_slurm.agentapi.protocol import Message, first
from bootseer_slurm.cache.cache import Cache
from bootseer_slurm.config import Config
from bootseer_slurm.env.mounting import unpacked_folder
from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.fetch.spare import Spare
from bootseer_slurm.fuse import Server
from bootseer_slurm.image.packer import Packer
from bootseer_slurm.image.signing import read_key, sign

_log = logging.getLogger(__name__)

_REQUEST_TIMEOUT_S = 2.0
_ACCEPT_PAUSE_S = 0.2  # after an error, which is a lack of descriptors or memory
_METRICS_END_S = 1.0
_TEND_EVERY_S = 60.0  # others fill the cache's disk too
_PACK_BEGIN_S = 10.0
_PACK_TIMEOUT_S = 800.0  # for mksquashfs, after its last byte came
_SAVE_ROUNDS = 10  # what a crash of the node can cost of the cache, in rounds; syncing is slow
_IMAGE_MARGIN_S = 60.0  # for looking it up, twice
_ATTACH_MARGIN_S = 8.0  # for seeing that the originals are the same, and making the mounts


class Agent:
    """Serves this node until it is told to stop."""

    def __init__(self, config: Config, kept: Kept) -> None:
        """Open the cache. Raises BootseerError."""
        self._config = config
        self._listeners = kept.listeners
        self._home = config.agent.socket.parent
        self._node = os.uname().nodename.split(".")[0]
        self._cache = Cache(
            config.cache.path,
            max_bytes=config.cache.max_bytes,
            min_free_bytes=config.cache.min_free_bytes,
            live=self._home / "cache",
        )
        self._servers = {
            name: Server(mount, self._home / f"{name}.nodes") for name, mount in kept.mounts.items()
        }
        self._shelf = Shelf(self._cache, self._servers, config.agent.blobs.parent / "images")
        self._packer = Packer(
            config.cache.path / ".packing",
            max_bytes=config.cache.max_bytes,
            min_free_bytes=config.cache.min_free_bytes,
        )
        self._journal = Journal(self._home)
        self._spare = Spare()
        observe_all = config.report.observe == "all"
        self._table = Table(self._session, self._journal, observe_all=observe_all)
        self._say_observe_all(observe_all)
        self._room = Room()
        self._slow_s = slow_operations(config)
        # One method answers one operation, and has its name.
        self._answers: dict[str, Callable[[Message, int, list[int]], Message]] = {
            op: getattr(self, f"_{op}") for op in OPERATIONS
        }
        self._stop = threading.Event()
        self._start_ns = time.time_ns()

    def _session(self, job: Job, node: str) -> Session:
        return Session(job, node or self._node, self._config, self._shelf, self._journal, self._spare)

    def _say_observe_all(self, observe_all: bool) -> None:
        """Have the hook tell every job, or only those that asked."""
        said = self._home / "observe-all"
        said.touch() if observe_all else said.unlink(missing_ok=True)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then end the sessions. Raises BootseerError."""
        for number_ in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number_, lambda *_: self._stop.set())
        for reason in self._cache.check():
            _log.warning("cache: %s", reason)
        for server in self._servers.values():
            server.start()
        self._table.restore()
        threading.Thread(target=self._settle, daemon=True).start()
        for name, listener in self._listeners.items():
            public = name == "abstract"
            threading.Thread(target=self._accept, args=(listener, public), daemon=True).start()
        threading.Thread(target=self._table.reap, args=(self._stop,), daemon=True).start()
        threading.Thread(target=self._tend, daemon=True).start()
        metrics = self._start_metrics()
        _log.info("agent serves %s", self._config.agent.socket, extra={"node": self._node})
        self._spare.prepare()
        self._stop.wait()
        self._spare.close()
        self._packer.close()
        self._table.end_all("agent stopped")
        self._shelf.close_idle(all_of_them=True)
        if metrics is not None:
            metrics.join(_METRICS_END_S)

    def _start_metrics(self) -> threading.Thread | None:
        """Have the figures written, where the site wants them."""
        path = self._config.agent.metrics
        if path is None:
            return None
        from bootseer_slurm.agent.metrics import Metrics  # other agents need not load it

        metrics = Metrics(self._table, self._shelf, self._cache)
        thread = threading.Thread(target=metrics.keep_written, args=(path, self._stop), daemon=True)
        thread.start()
        return thread

    def _settle(self) -> None:
        """Let go of what an agent before this one had and nobody took up (a thread of its own)."""
        self._table.wait_restored()
        self._shelf.settle()
        self._cache.forget_left()
        used = {f"{job.job_id}.{job.restart}" for job in self._table.jobs()}
        unpacked = unpacked_folder(self._config.cache.path)
        for folder in unpacked.iterdir() if unpacked.exists() else ():
            if folder.name not in used:
                shutil.rmtree(folder, ignore_errors=True)

    def _tend(self) -> None:
        """Keep the cache within its bounds, and its state on disk (a thread of its own)."""
        rounds = 0
        while not self._stop.wait(_TEND_EVERY_S):
            rounds += 1
            try:
                self._shelf.close_idle()  # first: what was removed of the cache takes its room until then
                self._cache.make_room()
                if rounds % _SAVE_ROUNDS == 0:
                    self._cache.save()
            except (BootseerError, OSError) as error:  # the next round may do better
                _log.warning("cache: %s", error)

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
            operation = OPERATIONS.get(op)
            if not _may_ask(operation, public, uid):
                raise InputError(f"{op[:40]!r} is for root on this node")
            if operation is None:
                raise InputError(f"unknown request {op[:40]!r}")
            if operation.slow:  # so that its client can tell this from an agent that hangs
                link.sendall(protocol.encode([("WAIT", str(int(self._slow_s[op] * 1000)))]))
            return [("STATUS", "ok"), *self._answers[op](message, uid, fds)]
        except (BootseerError, ValueError) as error:
            return [("STATUS", "error"), ("MESSAGE", _line(error))]
        except OSError:
            raise
        except Exception:
            _log.exception("request failed")
            return [("STATUS", "error"), ("MESSAGE", "the agent failed; its log says where")]

    # The operations (agentapi/operations.py); a reply's descriptors are appended to `fds`

    def _prolog(self, message: Message, uid: int, fds: list[int]) -> Message:
        self._table.begin(message)
        return []

    def _epilog(self, message: Message, uid: int, fds: list[int]) -> Message:
        # Not by restart count: the epilog of a requeued run already says the next one (Slurm 22.05).
        job_id = number(message, "JOB_ID")
        with contextlib.suppress(NotFound):
            self._cancel_packing(self._table.find(job_id).job)
        self._table.end(job_id, "job ended")
        return []

    def _attach(self, message: Message, uid: int, fds: list[int]) -> Message:
        session = self._table.step(message)
        if session is None:
            return []
        memory_bytes = number(message, "MEMORY_MB", "0") * 2**20
        binds, environ = session.attach(first(message, "STEP_ID"), memory_bytes)
        reply: Message = [("SETENV", f"{name}={value}") for name, value in environ.items()]
        for bind in binds:
            if len(fds) == protocol.DESCRIPTOR_LIMIT:
                os.close(bind.fd)
                continue
            reply.append(("BIND", f"{len(fds)}:{bind.device}:{bind.inode}:{bind.path}"))
            fds.append(bind.fd)
        return reply

    def _stage(self, message: Message, uid: int, fds: list[int]) -> Message:
        self._table.find(number(message, "JOB_ID")).stage(
            first(message, "NAME"),
            t_ns=number(message, "TIME_NS"),
            step=first(message, "STEP_ID"),
            task=_task(message),
            detail=first(message, "DETAIL") or None,
        )
        return []

    def _mark(self, message: Message, uid: int, fds: list[int]) -> Message:
        time_ns, step = number(message, "TIME_NS"), first(message, "STEP_ID") or None
        self._own(message, uid).mark(first(message, "NAME"), t_ns=time_ns, step=step, task=_task(message))
        return []

    def _status(self, message: Message, uid: int, fds: list[int]) -> Message:
        jobs = [{"job": job.job_id, "restart": job.restart} for job in self._table.jobs()]
        status = {"node": self._node, "pid": os.getpid(), "start_ns": self._start_ns, "jobs": jobs}
        return [("STATUS_JSON", json.dumps(status))]

    def _image(self, message: Message, uid: int, fds: list[int]) -> Message:
        session = self._own(message, uid)
        try:
            path, digest = session.image(first(message, "URI"), first(message, "DIGEST"))
        except NotFound:
            return [("NOTFOUND", "1")]
        return [("PATH", path), ("DIGEST", digest)]

    def _mount(self, message: Message, uid: int, fds: list[int]) -> Message:
        fds.append(self._shelf.clone_mount(first(message, "IMAGE"), uid))
        return []

    def _pack(self, message: Message, uid: int, fds: list[int]) -> Message:
        if not read_key(self._config.image.site_key) or self._config.image.kernel_mount == "off":
            raise InputError("this node signs no images")
        kind = "environment" if first(message, "KIND") == "environment" else "image"
        owner = self._own(message, uid).job.uid
        fd, ticket = self._packer.start(owner, kind, first(message, "COMPRESSION"))
        fds.append(fd)
        return [("TICKET", ticket)]

    def _packed(self, message: Message, uid: int, fds: list[int]) -> Message:
        owner = self._own(message, uid).job.uid
        packed = self._packer.finish(owner, first(message, "TICKET"), timeout_s=_PACK_TIMEOUT_S)
        fds.append(packed.fd)
        signature = sign(read_key(self._config.image.site_key), owner, packed.manifest.id)
        return [("MANIFEST_ID", packed.manifest.id), ("SIGNATURE", signature)]

    def _cancel_packing(self, job: Job) -> None:
        """End what is packed for a user whose last job ends."""
        if all(other.uid != job.uid or other is job for other in self._table.jobs()):
            self._packer.cancel(job.uid)

    def _own(self, message: Message, uid: int) -> Session:
        session = self._table.find(number(message, "JOB_ID"))
        if uid not in (0, session.job.uid):
            raise InputError(f"job {session.job.job_id} is another user's")
        return session


def slow_operations(config: Config) -> dict[str, float]:
    """How long each operation may take that is slow, in seconds."""
    return {
        "attach": config.prefetch.attach_wait_s + _ATTACH_MARGIN_S,
        "image": config.prefetch.hot_wait_s + _IMAGE_MARGIN_S,
        "pack": _PACK_BEGIN_S,
        "packed": _PACK_TIMEOUT_S,
    }


def _may_ask(operation: Operation | None, public: bool, uid: int) -> bool:
    """Whether a user may ask this by one of the sockets; root may ask what is not known, to be told so."""
    if operation is not None and operation.asker is Asker.ANYONE:
        return True
    if public:  # the abstract name may be another process's
        return False
    return uid == 0 or (operation is not None and operation.asker is Asker.USER)


def _task(message: Message) -> int | None:
    return number(message, "TASK") if first(message, "TASK") else None


def _line(error: Exception) -> str:
    return str(error).replace("\0", " ")[:500]
