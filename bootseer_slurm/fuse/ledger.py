"""The ledger: what a mount's next server has to know of a server that was killed, in shared memory.

Owns: the layout of that memory. Does not own: the descriptor, which the Mount has, and the answers.

    inboxes   one for each reader thread, where the kernel puts the request that the thread takes
    parked    the reads that wait for bytes: (unique, node id, offset, size, pid), free where unique is 0
    lookups   how often the kernel looked a node up: (node id, count), free where node id is 0

An inbox is cleared before the next request is taken, which is after the last one was answered or parked. So
a request is lost at no moment; it may be found though it was answered, or found twice, and is then answered
again, which the kernel refuses (ENOENT). A record becomes valid with its first field, which is written last.

Every page is touched, and locked where that is allowed: the kernel cannot copy to or from a page that it
would have to bring in first for a process that is being killed, and the reader would get EIO.

Threads and processes: one process at a time, any thread; an inbox belongs to one thread.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
from struct import Struct
from typing import NamedTuple

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import protocol

_PARKED = Struct("=QQQII")
_PARKED_REST = Struct("=QQII")
_LOOKUPS = Struct("=QQ")
_UNIQUE = Struct("=Q")
_PARKED_SLOTS = 1 << 15
_LOOKUP_SLOTS = 1 << 15
_LIBC = ctypes.CDLL(None)


class Parked(NamedTuple):
    """A read that waits. slot: where in the table. offset and size: bytes, within the file.

    uid: whose file it is; not kept in the table.
    """

    slot: int
    unique: int
    node_id: int
    offset: int
    size: int
    pid: int
    uid: int = 0


class Lookups:
    """Counts of look-ups, by slot. Not thread-safe: the tree calls it under its lock."""

    def __init__(self, area: memoryview) -> None:
        """area: the table's bytes; what they say is taken over."""
        self._area = area
        self._free: list[int] = []
        self._found: dict[int, int] = {}
        for slot, (node_id, _) in enumerate(_LOOKUPS.iter_unpack(area)):
            if node_id:
                self._found[node_id] = slot
            else:
                self._free.append(slot)
        self._free.reverse()

    def take(self, node_id: int) -> tuple[int, int]:
        """Return (slot, count) of a node; the count is 0 unless an earlier server counted.

        Raises BootseerError when the table is full.
        """
        slot = self._found.pop(node_id, None)
        if slot is not None:
            return slot, _LOOKUPS.unpack_from(self._area, slot * _LOOKUPS.size)[1]
        if not self._free:
            raise BootseerError(f"more than {len(self._area) // _LOOKUPS.size} files and folders are served")
        slot = self._free.pop()
        self.write(slot, 0)
        _UNIQUE.pack_into(self._area, slot * _LOOKUPS.size, node_id)
        return slot, 0

    def write(self, slot: int, count: int) -> None:
        _UNIQUE.pack_into(self._area, slot * _LOOKUPS.size + _UNIQUE.size, count)

    def release(self, slot: int) -> None:
        """Give a slot back; its node is no more."""
        _UNIQUE.pack_into(self._area, slot * _LOOKUPS.size, 0)
        self._free.append(slot)

    def release_rest(self) -> None:
        """Give back the slots of nodes that were not taken over."""
        for slot in self._found.values():
            self.release(slot)
        self._found.clear()


class Ledger:
    """The memory behind a descriptor, mapped."""

    def __init__(self, fd: int, readers: int) -> None:
        """fd: of `create` with the same number of readers; may be closed afterwards."""
        area = mmap.mmap(fd, _size_bytes(readers))
        make_resident(area)
        view = memoryview(area)
        end = readers * protocol.REQUEST_BUFFER_BYTES
        self.inboxes = [
            view[start : start + protocol.REQUEST_BUFFER_BYTES]
            for start in range(0, end, protocol.REQUEST_BUFFER_BYTES)
        ]
        self._parked = view[end : end + _PARKED_SLOTS * _PARKED.size]
        self.lookups = Lookups(view[end + len(self._parked) :])
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._found = []
        for slot, record in enumerate(_PARKED.iter_unpack(self._parked)):
            if record[0]:
                self._found.append(Parked(slot, *record))
            else:
                self._free.put(slot)

    def found(self) -> list[Parked]:
        """Return the reads that the last server left, in the order in which the kernel asked."""
        return sorted(self._found, key=lambda parked: parked.unique)

    def unanswered(self, reader: int) -> memoryview | None:
        """Return what the last server may have left unanswered in an inbox, unless that read is parked."""
        inbox = self.inboxes[reader]
        length, opcode, unique = protocol.IN_HEADER.unpack_from(inbox)[:3]
        known = unique in {parked.unique for parked in self._found}
        if not protocol.IN_HEADER.size <= length <= len(inbox) or opcode in protocol.FORGETTING or known:
            return None
        return inbox[:length]

    def clear(self, reader: int) -> None:
        """Say that what lies in an inbox was answered or parked."""
        self.inboxes[reader][: protocol.IN_HEADER.size] = bytes(protocol.IN_HEADER.size)

    def park(self, unique: int, node_id: int, offset: int, size: int, pid: int, uid: int) -> Parked:
        """Note that a read waits; when the table is full, wait for room first."""
        slot = self._free.get()
        start = slot * _PARKED.size
        _PARKED_REST.pack_into(self._parked, start + _UNIQUE.size, node_id, offset, size, pid)
        _UNIQUE.pack_into(self._parked, start, unique)
        return Parked(slot, unique, node_id, offset, size, pid, uid)

    def release(self, parked: Parked) -> None:
        """Say that a read waits no more; to be called once, after its answer was sent."""
        _UNIQUE.pack_into(self._parked, parked.slot * _PARKED.size, 0)
        self._free.put(parked.slot)


def create(readers: int) -> int:
    """Return the descriptor of a new ledger's memory. Raises OSError."""
    fd = os.memfd_create("bootseer-ledger", os.MFD_CLOEXEC)
    os.ftruncate(fd, _size_bytes(readers))
    return fd


def make_outbox() -> memoryview:
    """Return memory for the longest reply, of which a killed process can still send all."""
    area = mmap.mmap(-1, protocol.MAX_READ_BYTES)
    make_resident(area)
    return memoryview(area)


def make_resident(area: mmap.mmap) -> None:
    """Touch every page for writing, and lock them where the system allows it (mlock(2)).

    In that order: locking alone maps a shared page for reading only.
    """
    for start in range(0, len(area), mmap.PAGESIZE):
        area[start] = area[start]
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    _LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(area)))


def _size_bytes(readers: int) -> int:
    tables = _PARKED_SLOTS * _PARKED.size + _LOOKUP_SLOTS * _LOOKUPS.size
    return readers * protocol.REQUEST_BUFFER_BYTES + tables
