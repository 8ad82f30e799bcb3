"""The agent's end of a fetch process.

Owns the process, the ring of memory shared with it, and one thread that takes its replies. The ring is
divided into slots: a read fills one, and the agent copies the bytes before it compares and stores them, where
there is a promise to compare with. Demand reads never wait for prefetch, for some slots are kept for them.

The process is its user's, who can do with it and with the ring what he likes. So the ring is sealed, for a
shrunk one would kill the agent (SIGBUS); what is in it may change at any time; and descriptors that come
with a reply are closed unless the operation has some to give.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import mmap
import os
import pwd
import queue
import socket
import subprocess
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from bootseer_slurm import errors
from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.fetch.spare import Spare, Started
from bootseer_slurm.fetch.turns import Turns
from bootseer_slurm.identity import User

_log = logging.getLogger(__name__)

_DEMAND_SLOTS = 4  # as many blocked readers as are served at once beside the prefetch
_MESSAGE_BYTES = 64 * 1024
_MESSAGE_FDS = 4
_REPLY_FDS = {"resolve": 3, "plan": 1}  # the original and two manifests; the plan
_RESOLVE_TIMEOUT_S = 20.0
_END_S = 5.0  # for a killed process; one held by a file system ends when that answers
_RING_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class NoAnswer(StoreError):
    """A file system or store did not answer in time."""


@dataclass(slots=True)
class Reply:
    """What the fetch process answered; the receiver closes the descriptors."""

    fields: dict[str, Any]
    fds: list[int]


class FetchProcess:
    """A running fetch process. Thread-safe."""

    def __init__(
        self, user: User, store_uri: str, *, streams: int, timeout_s: float, spare: Spare | None = None
    ) -> None:
        """Start it, or take the spare one.

        streams: parallel prefetch reads. timeout_s: when a read has failed. Raises StoreError when it cannot
        be started.
        """
        self.user = user
        self._timeout_s = timeout_s
        self.turns = Turns()
        self._ids = itertools.count()
        self._waiting: dict[int, tuple[str, Future[Reply]]] = {}
        self._lock = threading.Lock()
        slots = streams + _DEMAND_SLOTS
        self._slots: dict[bool, queue.LifoQueue[int]] = {True: queue.LifoQueue(), False: queue.LifoQueue()}
        for slot in range(slots):
            self._slots[slot >= streams].put(slot)
        self._copies: defaultdict[int, memoryview] = defaultdict(lambda: memoryview(bytearray(CHUNK_BYTES)))
        ring_fd = os.memfd_create("bootseer-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(ring_fd, slots * CHUNK_BYTES)
        fcntl.fcntl(ring_fd, fcntl.F_ADD_SEALS, _RING_SEALS)
        self._ring = memoryview(mmap.mmap(ring_fd, 0))
        order = {"slot_bytes": CHUNK_BYTES, "slots": slots, "store": store_uri, **_identity(user)}
        started: Started | None = None
        try:
            started = (spare or Spare()).take()
            socket.send_fds(started.link, [json.dumps(order).encode()], [ring_fd])
        except (OSError, subprocess.SubprocessError) as error:
            if started is not None:
                started.end()
            raise StoreError(f"fetch process of uid {user.uid} cannot be started: {error}") from error
        finally:
            os.close(ring_fd)
        self._process, self._link = started.process, started.link
        self._receiver = threading.Thread(
            target=self._receive, name=f"fetch-{self._process.pid}", daemon=True
        )
        self._receiver.start()

    def call(
        self, op: str, *, fds: tuple[int, ...] = (), timeout_s: float = _RESOLVE_TIMEOUT_S, **fields: Any
    ) -> Reply:
        """Ask for one operation and wait, before the prefetch's reads.

        Raises the error that it gave, NoAnswer on a timeout.
        """
        with self.turns.demand():
            number, future = self._send(op, fds, fields)
            try:
                return future.result(timeout_s)
            except FutureTimeout:
                self._waiting.pop(number, None)
                if future.cancel():
                    raise _no_answer(timeout_s) from None
                return future.result()  # it came this very moment

    def _send(self, op: str, fds: tuple[int, ...], fields: dict[str, Any]) -> tuple[int, Future[Reply]]:
        """Ask for one operation; the future gets the reply, or the error."""
        number = next(self._ids)
        future: Future[Reply] = Future()
        message = json.dumps({"op": op, "id": number, **fields}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
        with self._lock:
            try:
                # A stopped process takes no requests: the agent must not wait for it with the lock held.
                self._link.sendmsg([message], rights, socket.MSG_DONTWAIT)
                self._waiting[number] = op, future
            except OSError as error:
                future.set_exception(StoreError(f"the fetch process takes no requests: {error.strerror}"))
        return number, future

    @contextlib.contextmanager
    def read(
        self, handle: int, index: int, offset: int, size_bytes: int, *, demand: bool, fixed: bool = True
    ) -> Iterator[memoryview]:
        """A range of an object, at most CHUNK_BYTES; the bytes are valid inside the block only.

        fixed: they do not change any more. Else they lie in the ring, where the process can write to them.
        Raises StoreError when it fails, takes too long, or ends early.
        """
        fields: dict[str, Any] = {"handle": handle, "object": index}
        fields |= {"offset": offset, "size_bytes": size_bytes}
        if demand:
            fields |= {"demand": True}
            reading = self._read(self._slots[True], fields, size_bytes, fixed=fixed)
            with self.turns.demand(), reading as view:
                yield view
        else:
            step_bytes, start = self.turns.step_bytes, time.monotonic()
            with self._read(self._slots[False], fields, step_bytes, fixed=fixed) as view:
                self.turns.measured(size_bytes, -(-size_bytes // step_bytes), time.monotonic() - start)
                yield view

    @contextlib.contextmanager
    def _read(
        self, slots: queue.LifoQueue[int], fields: dict[str, Any], step_bytes: int, *, fixed: bool
    ) -> Iterator[memoryview]:
        size_bytes: int = fields["size_bytes"]
        try:
            slot = slots.get(timeout=self._timeout_s)
        except queue.Empty:
            raise StoreError("all reads in flight are stuck") from None
        _, future = self._send("read", (), fields | {"slot": slot, "step_bytes": step_bytes})
        try:
            try:
                count = future.result(self._timeout_s).fields.get("count")
            except FutureTimeout:
                raise _no_answer(self._timeout_s) from None
            if count != size_bytes:
                raise StoreError(f"a read ended after {count} of {size_bytes} bytes")
            view = self._ring[slot * CHUNK_BYTES :][:size_bytes]
            if fixed:
                copy = self._copies[slot][:size_bytes]
                copy[:] = view
                view = copy
            yield view
        finally:
            # Now, or when the late reply comes: until then the process may write to the slot.
            future.add_done_callback(lambda _: slots.put(slot))

    def kill(self) -> None:
        """End the process at once; calls under way fail with StoreError."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._receiver.join()  # it ends with the shutdown, even if the process does not
        with self._lock:
            self._link.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            _log.warning("fetch process of uid %d does not end: a file system holds it", self.user.uid)
            threading.Thread(target=self._process.wait, daemon=True).start()

    def _receive(self) -> None:
        try:
            while self._take_reply():
                pass
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            _log.warning("fetch process of uid %d: %s", self.user.uid, error)
        self._process.kill()
        with self._lock:
            with contextlib.suppress(OSError):
                self._link.shutdown(socket.SHUT_RDWR)  # nobody would take the answers to further requests
            waiting, self._waiting = self._waiting, {}
        for _, future in waiting.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(StoreError("the fetch process ended"))

    def _take_reply(self) -> bool:
        """Wait for a reply and give it to whoever waits for it; False at the end."""
        message, fds, _, _ = socket.recv_fds(self._link, _MESSAGE_BYTES, _MESSAGE_FDS)
        kept = 0
        try:
            if not message:
                return False
            fields = json.loads(message)
            with self._lock:
                op, future = self._waiting.pop(fields["id"], ("", None))
            if future is None or not future.set_running_or_notify_cancel():
                return True  # it is late
            if "error" in fields:
                future.set_exception(_error(fields))
            else:
                kept = _REPLY_FDS.get(op, 0)
                future.set_result(Reply(fields, fds[:kept]))
        finally:
            for fd in fds[kept:]:
                os.close(fd)
        return True


def _identity(user: User) -> dict[str, Any]:
    """Whom a fetch process becomes, and where clients of stores look for that user's credentials."""
    identity = {"uid": user.uid, "gid": user.gid, "groups": user.groups}
    with contextlib.suppress(KeyError):
        identity["home"] = pwd.getpwuid(user.uid).pw_dir
    return identity


def _error(fields: dict[str, Any]) -> BootseerError:
    cls = getattr(errors, str(fields.get("class")), StoreError)
    if not (isinstance(cls, type) and issubclass(cls, BootseerError)):
        cls = StoreError
    return cls(str(fields["error"])[:500])


def _no_answer(timeout_s: float) -> NoAnswer:
    return NoAnswer(f"no answer from the file system in {timeout_s:g} s")
