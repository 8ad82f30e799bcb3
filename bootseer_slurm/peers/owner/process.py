"""The agent's end of a job's peer process: asks for chunks, and tells what is here.

The process has its user's rights, and its user may stop it. Nothing here waits for it to listen (outbox.py).
While somebody waits for a chunk, the process says each 250 ms that it runs. Who hears nothing for a second
reads the store. Until the process is heard again nobody waits for it. Threads: one of its own, which takes
what the process says; any number may call at once.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import msgspec

from bootseer_slurm.peers import local
from bootseer_slurm.peers.owner.asks import Ask, Asks
from bootseer_slurm.peers.owner.outbox import Outbox
from bootseer_slurm.peers.owner.ring import Ring

_log = logging.getLogger(__name__)

_SILENT_S = 1.0
_LOOK_S = 0.1
# The process itself gives a chunk up after 10 s, or 3 s on demand, or later where the store is slow.
_MOST_S, _MOST_DEMAND_S = 15.0, 6.0
_CUT_OFF_S = 10.0  # after it nodes are tried again
_END_S = 5.0


class _Standing:
    """Whether a process is worth to be asked: it was heard, and it reaches other nodes."""

    def __init__(self) -> None:
        self._heard_s = time.monotonic()
        self._good_from_s = 0.0

    @property
    def is_good(self) -> bool:
        return time.monotonic() >= self._good_from_s

    def heard(self, *, is_cut_off: bool) -> None:
        """It says something; is_cut_off: that it reaches nobody."""
        self._heard_s = time.monotonic()
        if is_cut_off:
            self._good_from_s = self._heard_s + _CUT_OFF_S
        elif self._good_from_s == math.inf:
            self._good_from_s = 0.0

    def end_wait(self, since_s: float) -> bool:
        """Whether somebody who asked then has heard nothing for long; nobody asks until it is heard again."""
        if time.monotonic() - max(since_s, self._heard_s) <= _SILENT_S:
            return False
        self._good_from_s = math.inf
        return True


class PeerProcess:
    """The peer process of one job, until `close`. counted: its last figures."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket, order: local.Order) -> None:
        """link: the agent's end of the process's socket. Raises OSError."""
        self.counted = local.Counted({}, {}, {}, (), ())
        self.place = order.node, len(order.addresses)
        self._process = process
        self._link = link
        self._asks = Asks()
        self._numbers = itertools.count(1)
        self._open: set[int] = set()
        self._over = threading.Event()
        self._standing = _Standing()
        self._ring = Ring(order.slots)
        try:
            local.send_order(link, order, self._ring.fd)
        finally:
            self._ring.given()
        self._outbox = Outbox(link)
        self._thread = threading.Thread(target=self._take, name="peers", daemon=True)
        self._thread.start()

    @property
    def is_used(self) -> bool:
        """Whether it is worth to ask it: it runs, is heard, and reaches other nodes."""
        return not self._over.is_set() and self._standing.is_good

    def open(self, blob: local.OpenBlob, fd: int) -> int:
        """Have a blob exchanged; gives its number from now on. fd: of its data file, for reading."""
        number = next(self._numbers)
        self._open.add(number)
        self.say(msgspec.structs.replace(blob, blob=number), fd)
        return number

    def close_blob(self, blob: int) -> None:
        """Exchange it no more. Who waits for a chunk of it reads the store."""
        self._open.discard(blob)
        self._asks.end(blob)
        self.say(local.CloseBlob(blob))

    @contextlib.contextmanager
    def get(self, blob: int, chunk: int, size_bytes: int, *, demand: bool) -> Iterator[memoryview | None]:
        """The bytes of a chunk that no other thread asks for; None where the store is to be read.

        Whoever gets them compares their digests. He says Have, Wrong or Lost of it in any case.
        """
        with self._asks.one((blob, chunk), demand=demand) as ask:
            if self.is_used and blob in self._open:
                self.say(local.Want(blob, (chunk,), demand))
                self._wait(ask)
            yield self._ring.copy(ask.arrived.slot, size_bytes) if ask.arrived else None

    def hurry(self, blob: int, chunk: int) -> None:
        """Somebody waits for a chunk that another thread asked for."""
        if self._asks.hurry((blob, chunk)):
            self.say(local.Want(blob, (chunk,), demand=True))

    def say(self, message: local.FromOwner, fd: int = -1) -> None:
        """Say something to the process."""
        if not self._over.is_set() and not self._outbox.put(local.encode(message), fd):
            self._end("does not listen")

    def close(self) -> None:
        """End the process. Who waits for a chunk reads the store."""
        self._end("")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._thread.join(_END_S)
        self._outbox.close()
        self._link.close()

    def _end(self, why: str) -> None:
        if why and not self._over.is_set():
            _log.warning("process %d of peers %s: this job goes on without", self._process.pid, why)
        self._over.set()
        self._process.kill()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._asks.end()

    def _wait(self, ask: Ask) -> None:
        """Wait for the answer, as long as the process runs."""
        begin_s = time.monotonic()
        while not ask.answered.wait(_LOOK_S):
            most_s = _MOST_DEMAND_S if ask.demand else _MOST_S
            if self._standing.end_wait(begin_s) or time.monotonic() - begin_s > most_s:
                return

    def _take(self) -> None:
        """Take what the process says, until it is gone (a thread of its own)."""
        why = "has ended"
        try:
            while message := self._link.recv(local.MESSAGE_BYTES):
                self._hear(local.decode_from_child(message))
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            why = f"says what it may not ({type(error).__name__})"
        finally:
            self._end(why)
            self._ring.close()

    def _hear(self, said: local.FromChild) -> None:
        self._standing.heard(is_cut_off=isinstance(said, local.Alive) and said.is_cut_off)
        match said:
            case local.Read(blob, chunk):
                self._asks.answer((blob, chunk), None)
            case local.Arrived(blob, chunk, slot) as arrived:
                if not self._ring.has(slot):
                    raise ValueError(f"there is no slot {slot}")
                self._asks.answer((blob, chunk), arrived)
            case local.Counted() as counted:
                self.counted = counted
