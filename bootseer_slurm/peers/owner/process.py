"""The agent's end of a job's peer process: asks for chunks, and tells what is here.

The process has its user's rights, and its user may stop it: nothing here waits for it to listen, and each
answer has an end. One that is silent for longer is ended, and the job goes on without peers. Threads: one of
its own, which takes what the process says; any number may call at once.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers import local

_log = logging.getLogger(__name__)

# The process itself gives a chunk up after 10 s, or 3 s, unless its own reads of the store take longer.
_SILENT_S, _SILENT_DEMAND_S = 20.0, 5.0
_SEND_BYTES = 2**20  # messages that the process has not taken yet
_END_S = 5.0

# Of a job's chunk: the owner's number of the blob, and the chunk's own.
_Key = tuple[int, int]


@dataclass(slots=True)
class _Ask:
    """A chunk that somebody waits for. arrived: None where it is to be read from the store."""

    size_bytes: int
    demand: bool
    answered: threading.Event = field(default_factory=threading.Event)
    arrived: local.Arrived | None = None


class PeerProcess:
    """The peer process of one job, until `close`. counted: its last figures."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket, order: local.Order) -> None:
        """link: the agent's end of the process's socket. Raises OSError."""
        self.counted = local.Counted({}, {}, {}, (), ())
        self.port: int | None = None  # where it listens, once it does; 0: nowhere
        self._process = process
        self._link = link
        self._asks: dict[_Key, _Ask] = {}
        self._blobs = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        ring_fd = os.memfd_create("bootseer-peers-ring", os.MFD_CLOEXEC)
        try:
            os.ftruncate(ring_fd, order.slots * CHUNK_BYTES)
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

    def open(self, name: str, size_bytes: int, chunk_bytes: int, here: bytes, fd: int) -> int:
        """Have a blob exchanged; gives its number. fd: of its data file, for reading. here: of OpenBlob."""
        with self._lock:
            self._blobs += 1
            number = self._blobs
        self._say(local.OpenBlob(number, name, size_bytes, chunk_bytes, here), fd)
        return number

    def close_blob(self, blob: int) -> None:
        """Exchange it no more. Who waits for a chunk of it reads the store."""
        with self._lock:
            asks = [ask for (number, _), ask in self._asks.items() if number == blob]
        for ask in asks:
            ask.answered.set()
        self._say(local.CloseBlob(blob))

    @contextlib.contextmanager
    def get(self, blob: int, chunk: int, size_bytes: int, *, demand: bool) -> Iterator[memoryview | None]:
        """The bytes of a chunk that is on no thread's way; None where the store is to be read.

        Whoever gets them compares their digests, and says `have`, `wrong` or `lost` of it in any case.
        """
        ask = _Ask(size_bytes, demand)
        with self._lock:
            self._asks[blob, chunk] = ask
        try:
            if not self.is_over:
                self._say(local.Want(blob, (chunk,), demand))
                self._wait(ask)
            arrived = ask.arrived
            # A copy: the process could change what is compared.
            yield memoryview(self._slot(arrived.slot, size_bytes)) if arrived else None
        finally:
            with self._lock:
                self._asks.pop((blob, chunk), None)

    def hurry(self, blob: int, chunk: int) -> None:
        """Somebody waits for a chunk that another thread asked for."""
        with self._lock:
            ask = self._asks.get((blob, chunk))
            if ask is None or ask.demand:
                return
            ask.demand = True
        self._say(local.Want(blob, (chunk,), demand=True))

    def have(self, blob: int, chunk: int) -> None:
        """The chunk is in the data file."""
        self._say(local.Have(blob, chunk))

    def wrong(self, blob: int, chunk: int) -> None:
        """The chunk that came has a wrong digest."""
        self._say(local.Wrong(blob, chunk))

    def lost(self, blob: int, chunk: int) -> None:
        """The chunk cannot be had here now."""
        self._say(local.Lost(blob, chunk))

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
        with self._lock:
            asks = list(self._asks.values())
        for ask in asks:
            ask.answered.set()

    def _wait(self, ask: _Ask) -> None:
        """Wait for the answer. A process that gives none in time is ended."""
        if not ask.answered.wait(_SILENT_DEMAND_S if ask.demand else _SILENT_S) and not self.is_over:
            _log.warning("process %d of peers is silent: this job goes on without", self._process.pid)
            self._end()

    def _slot(self, slot: int, size_bytes: int) -> bytes:
        begin = slot * CHUNK_BYTES
        return self._ring[begin : begin + size_bytes]

    def _say(self, message: local.FromOwner, fd: int = -1) -> None:
        if self.is_over:
            return
        try:
            content = [local.encode(message)]
            if fd < 0:
                self._link.sendmsg(content, (), socket.MSG_DONTWAIT)
            else:
                socket.send_fds(self._link, content, [fd], socket.MSG_DONTWAIT)
        except BlockingIOError:
            _log.warning("process %d of peers does not listen: this job goes on without", self._process.pid)
            self._end()
        except OSError:
            self._end()

    def _take(self) -> None:
        """Take what the process says, until it is gone (a thread of its own)."""
        answers: dict[type, Callable[[local.FromChild], None]] = {}
        answers[local.Read] = answers[local.Arrived] = self._answer
        answers[local.Counted] = self._count
        answers[local.Started] = self._listens
        try:
            while message := self._link.recv(local.MESSAGE_BYTES):
                said = local.decode_from_child(message)
                answers[type(said)](said)
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            if not self.is_over:
                _log.warning("process %d of peers: %s", self._process.pid, error)
        self._end()

    def _answer(self, said: local.FromChild) -> None:
        assert isinstance(said, local.Read | local.Arrived)
        with self._lock:
            ask = self._asks.get((said.blob, said.chunk))
        if ask is None or ask.answered.is_set():
            return
        if isinstance(said, local.Arrived):
            if (said.slot + 1) * CHUNK_BYTES > len(self._ring):
                raise ValueError(f"there is no slot {said.slot}")
            ask.arrived = said
        ask.answered.set()

    def _count(self, said: local.FromChild) -> None:
        assert isinstance(said, local.Counted)
        self.counted = said

    def _listens(self, said: local.FromChild) -> None:
        assert isinstance(said, local.Started)
        self.port = said.port
