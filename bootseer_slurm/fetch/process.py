"""The agent's end of a fetch process.

Owns the process, the ring of memory shared with it, and one thread that takes its replies. The ring is
divided into slots: a read fills one, and the agent checks and stores the bytes straight from there. Demand
reads never wait for prefetch, for some slots are kept for them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from bootseer_slurm import errors
from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.fetch.turns import Turns

_log = logging.getLogger(__name__)

_DEMAND_SLOTS = 4  # as many blocked readers as are served at once beside the prefetch
_MESSAGE_BYTES = 64 * 1024
_RESOLVE_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class User:
    """Whose rights a fetch process has."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(slots=True)
class Reply:
    """What the fetch process answered; the receiver closes the descriptors."""

    fields: dict[str, Any]
    fds: list[int]


class FetchProcess:
    """A running fetch process. Thread-safe."""

    def __init__(self, user: User, store_uri: str, *, streams: int, timeout_s: float) -> None:
        """Start it. streams: parallel prefetch reads. timeout_s: when a read has failed.

        Raises StoreError when it cannot be started.
        """
        self.user = user
        self._timeout_s = timeout_s
        self.turns = Turns()
        self._ids = itertools.count()
        self._waiting: dict[int, Future[Reply]] = {}
        self._lock = threading.Lock()
        slots = streams + _DEMAND_SLOTS
        self._slots: dict[bool, queue.LifoQueue[int]] = {True: queue.LifoQueue(), False: queue.LifoQueue()}
        for slot in range(slots):
            self._slots[slot >= streams].put(slot)
        ring_fd = os.memfd_create("bootseer-ring", os.MFD_CLOEXEC)
        os.ftruncate(ring_fd, slots * CHUNK_BYTES)
        self._ring = memoryview(mmap.mmap(ring_fd, 0))
        self._link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = _start(user, far, ring_fd, slots, store_uri)
        except (OSError, subprocess.SubprocessError) as error:
            self._link.close()
            raise StoreError(f"fetch process of uid {user.uid} cannot be started: {error}") from error
        finally:
            far.close()
            os.close(ring_fd)
        self._receiver = threading.Thread(
            target=self._receive, name=f"fetch-{self._process.pid}", daemon=True
        )
        self._receiver.start()

    def call(
        self, op: str, *, fds: tuple[int, ...] = (), timeout_s: float = _RESOLVE_TIMEOUT_S, **fields: Any
    ) -> Reply:
        """Ask for one operation and wait, before the prefetch's reads.

        Raises the error that it gave, StoreError on a timeout.
        """
        with self.turns.demand():
            return self._call(op, fds, timeout_s, fields)

    def _call(self, op: str, fds: tuple[int, ...], timeout_s: float, fields: dict[str, Any]) -> Reply:
        number = next(self._ids)
        future: Future[Reply] = Future()
        message = json.dumps({"op": op, "id": number, **fields}).encode()
        with self._lock:
            self._waiting[number] = future
        try:
            socket.send_fds(self._link, [message], fds)
        except OSError as error:
            raise StoreError(f"the fetch process is gone: {error.strerror}") from error
        try:
            reply = future.result(timeout_s)
        except FutureTimeout:
            raise StoreError(f"no answer from the file system in {timeout_s:g} s") from None
        if "error" in reply.fields:
            raise _error(reply.fields)
        return reply

    @contextlib.contextmanager
    def read(
        self, handle: int, index: int, offset: int, size_bytes: int, *, demand: bool
    ) -> Iterator[memoryview]:
        """A range of an object, at most CHUNK_BYTES; the bytes are valid inside the block only.

        Raises StoreError when it fails, takes too long, or ends early.
        """
        fields = {"handle": handle, "object": index, "offset": offset, "size_bytes": size_bytes}
        if demand:
            with self.turns.demand(), self._read(self._slots[True], fields, size_bytes) as view:
                yield view
        else:
            step_bytes, start = self.turns.step_bytes, time.monotonic()
            with self._read(self._slots[False], fields, step_bytes) as view:
                self.turns.measured(size_bytes, -(-size_bytes // step_bytes), time.monotonic() - start)
                yield view

    @contextlib.contextmanager
    def _read(
        self, slots: queue.LifoQueue[int], fields: dict[str, Any], step_bytes: int
    ) -> Iterator[memoryview]:
        size_bytes: int = fields["size_bytes"]
        try:
            slot = slots.get(timeout=self._timeout_s)
        except queue.Empty:
            raise StoreError("all reads in flight are stuck") from None
        # A slot whose read timed out is never used again: the process may still write to it.
        fields |= {"slot": slot, "step_bytes": step_bytes}
        count = self._call("read", (), self._timeout_s, fields).fields.get("count")
        try:
            if count != size_bytes:
                raise StoreError(f"a read ended after {count} of {size_bytes} bytes")
            start = slot * CHUNK_BYTES
            yield self._ring[start : start + size_bytes]
        finally:
            slots.put(slot)

    def kill(self) -> None:
        """End the process at once; calls under way fail with StoreError."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        if threading.current_thread() is not self._receiver:
            self._receiver.join()
        self._link.close()

    def _receive(self) -> None:
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._link, _MESSAGE_BYTES, 4)
                if not message:
                    break
                fields = json.loads(message)
                future = self._waiting.pop(fields["id"], None)
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("fetch process of uid %d: %s", self.user.uid, error)
                break
            if future is None:
                for fd in fds:
                    os.close(fd)
            else:
                future.set_result(Reply(fields, list(fds)))
        self._process.kill()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_result(Reply({"error": "the fetch process ended", "class": "StoreError"}, []))


def _start(
    user: User, link: socket.socket, ring_fd: int, slots: int, store_uri: str
) -> subprocess.Popen[bytes]:
    arguments = [str(link.fileno()), str(ring_fd), str(CHUNK_BYTES), str(slots), store_uri]
    privileged = os.geteuid() == 0
    return subprocess.Popen(
        [sys.executable, "-I", "-m", "bootseer_slurm.fetch.child", *arguments],
        pass_fds=(link.fileno(), ring_fd),
        stdin=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
        start_new_session=True,
        user=user.uid if privileged else None,
        group=user.gid if privileged else None,
        extra_groups=list(user.groups) if privileged else None,
    )


def _error(fields: dict[str, Any]) -> BootseerError:
    cls = getattr(errors, str(fields.get("class")), StoreError)
    if not (isinstance(cls, type) and issubclass(cls, BootseerError)):
        cls = StoreError
    return cls(str(fields["error"])[:500])
