"""The agent's end of a job's peer process: asks for chunks, and tells what is here.

The process has its user's rights, and its user may stop it: nothing here waits for it to listen, and each
answer has an end. One that is silent for longer is ended, and the job goes on without peers. Threads: one of
its own, which takes what the process says; any number may call at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import msgspec

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers import local
from bootseer_slurm.peers.owner.asks import Ask, Asks

_log = logging.getLogger(__name__)

_SEND_BYTES = 2**20  # messages that the process has not taken yet
_LOOK_S = 0.5
_END_S = 5.0


class PeerProcess:
    """The peer process of one job, until `close`. counted: its last figures."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket, order: local.Order) -> None:
        """link: the agent's end of the process's socket. Raises OSError."""
        self.counted = local.Counted({}, {}, {}, (), ())
        self.place = order.node, len(order.addresses)
        self.port: int | None = None  # where it listens, once it does; 0: nowhere
        self._process = process
        self._link = link
        self._asks = Asks()
        self._blobs = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        ring_fd = os.memfd_create("bootseer-peers-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(ring_fd, order.slots * CHUNK_BYTES)
            # Who reads what the process has cut off would be killed (SIGBUS).
            fcntl.fcntl(ring_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            self._ring = mmap.mmap(ring_fd, 0)
            local.send_order(link, order, ring_fd)
        finally:
            os.close(ring_fd)
        self._thread = threading.Thread(target=self._take, name="peers", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the process has ended, or was."""
        return self._over.is_set()

    def open(self, blob: local.OpenBlob, fd: int) -> int:
        """Have a blob exchanged; gives its number from now on. fd: of its data file, for reading."""
        with self._lock:
            self._blobs += 1
            number = self._blobs
        self.say(msgspec.structs.replace(blob, blob=number), fd)
        return number

    def close_blob(self, blob: int) -> None:
        """Exchange it no more. Who waits for a chunk of it reads the store."""
        self._asks.end(blob)
        self.say(local.CloseBlob(blob))

    @contextlib.contextmanager
    def get(self, blob: int, chunk: int, size_bytes: int, *, demand: bool) -> Iterator[memoryview | None]:
        """The bytes of a chunk that no other thread asks for; None where the store is to be read.

        Whoever gets them compares their digests. He says Have, Wrong or Lost of it in any case.
        """
        with self._asks.one((blob, chunk), demand=demand) as ask:
            if not self.is_over:
                self.say(local.Want(blob, (chunk,), demand))
                self._wait(ask)
            arrived = ask.arrived
            # A copy: the process could change what is compared.
            yield memoryview(self._slot(arrived.slot, size_bytes)) if arrived else None

    def hurry(self, blob: int, chunk: int) -> None:
        """Somebody waits for a chunk that another thread asked for."""
        if self._asks.hurry((blob, chunk)):
            self.say(local.Want(blob, (chunk,), demand=True))

    def say(self, message: local.FromOwner, fd: int = -1) -> None:
        """Say something to the process, which is ended where it does not listen."""
        if self.is_over:
            return
        fds = [fd] if fd >= 0 else []
        try:
            socket.send_fds(self._link, [local.encode(message)], fds, socket.MSG_DONTWAIT)
        except BlockingIOError:
            _log.warning("process %d of peers does not listen: this job goes on without", self._process.pid)
            self._end()
        except OSError:
            self._end()

    def close(self) -> None:
        """End the process. Who waits for a chunk reads the store."""
        self._end()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._thread.join(_END_S)
        self._link.close()

    def _end(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._asks.end()

    def _wait(self, ask: Ask) -> None:
        """Wait for the answer. A process that gives none in time is ended."""
        while not ask.answered.wait(_LOOK_S) and time.monotonic() < ask.until_s:  # it may be hurried
            pass
        if not (ask.answered.is_set() or self.is_over):
            _log.warning("process %d of peers is silent: this job goes on without", self._process.pid)
            self._end()

    def _slot(self, slot: int, size_bytes: int) -> bytes:
        begin = slot * CHUNK_BYTES
        return self._ring[begin : begin + size_bytes]

    def _take(self) -> None:
        """Take what the process says, until it is gone (a thread of its own)."""
        try:
            while message := self._link.recv(local.MESSAGE_BYTES):
                match local.decode_from_child(message):
                    case local.Read(blob, chunk):
                        self._asks.answer((blob, chunk), None)
                    case local.Arrived(blob, chunk, slot) as arrived:
                        if (slot + 1) * CHUNK_BYTES > len(self._ring):
                            raise ValueError(f"there is no slot {slot}")
                        self._asks.answer((blob, chunk), arrived)
                    case local.Counted() as counted:
                        self.counted = counted
                    case local.Started(port):
                        self.port = port
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            if not self.is_over:
                _log.warning("process %d of peers: %s", self._process.pid, error)
        self._end()
