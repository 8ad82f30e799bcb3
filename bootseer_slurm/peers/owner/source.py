"""The other nodes of a job as a source of a blob (cache.sources.Exchange).

They exchange whole units only: a claim of less is the store's. The process asks for a unit, or says that this
node is to read it from the store; then the others wait for it here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.cache.blob import CachedBlob
from bootseer_slurm.cache.sources import NotHere
from bootseer_slurm.errors import InputError, IntegrityError
from bootseer_slurm.peers import local
from bootseer_slurm.peers.local import MESSAGE_BYTES
from bootseer_slurm.peers.owner.process import PeerProcess

# What is read in parts goes in small units: a start touches few of its blocks. A start over 300 Mbit/s took
# 3.9 s with 1 MiB, 2.9 s with this, and 2.7 s with 128 KiB, with more of the cores (`scripts/demo --quick`).
_PARTS_BYTES = 2**18
_MOST_UNITS = 8 * (MESSAGE_BYTES - 1024)  # a bit for each goes in one message


def unit_bytes_of(kind: str) -> int:
    """What nodes exchange at a time of an artifact of this kind; the same on all nodes."""
    return CHUNK_BYTES if kind == "checkpoint" else _PARTS_BYTES


def _open_for_reading(blob: CachedBlob) -> int:
    """The data file anew. The process is the user's, and could write through the cache's own descriptor."""
    fd = os.open(f"/proc/self/fd/{blob.file.fd}", os.O_RDONLY | os.O_CLOEXEC)
    if os.getuid() == 0 and blob.uid and os.fstat(fd).st_uid == blob.uid:
        os.close(fd)
        raise InputError("the cache's disk has no ACLs, so its user could write what peers get")
    return fd


class PeerSource:
    """One blob among the nodes of one job. Thread-safe."""

    name = "peers"

    def __init__(self, process: PeerProcess, job_id: int, blob: CachedBlob, unit_bytes: int) -> None:
        """Let the other nodes have what is here. unit_bytes: of `unit_bytes_of`.

        Raises OSError, and InputError where nodes cannot exchange it.
        """
        layout = blob.layout
        self.job_id, self.place = job_id, process.place
        self._process = process
        self._blob = blob
        self._unit_bytes = unit_bytes
        self._unit_blocks = unit_bytes // layout.block_bytes
        if not self._unit_blocks or layout.chunk_bytes % unit_bytes:
            raise InputError(f"its chunks have {layout.chunk_bytes} bytes, and nodes exchange {unit_bytes}")
        units = -(-layout.blocks // self._unit_blocks)
        if units > _MOST_UNITS:
            raise InputError(f"{layout.size_bytes} bytes are more than nodes exchange of one blob")
        self._users = 1
        self._lock = threading.Lock()
        here = 0
        for unit in range(units):
            here |= self._is_here(unit) << unit
        fd = _open_for_reading(blob)
        try:
            bits = here.to_bytes(-(-here.bit_length() // 8), "little")
            # Under another name with another unit: a number of a unit must mean one thing on all nodes.
            name = hashlib.sha256(f"{blob.id} {unit_bytes}".encode()).hexdigest()
            opening = local.OpenBlob(0, name, layout.size_bytes, unit_bytes, bits)
            self._number = process.open(opening, fd)
        finally:
            os.close(fd)

    @property
    def unit_blocks(self) -> int:
        return self._unit_blocks if self._process.is_used else 0

    @property
    def is_closed(self) -> bool:
        """Whether no handle uses it any more."""
        return not self._users

    def share(self, blob: CachedBlob) -> bool:
        """Let one more handle of the job use it; False when it was closed, or the blob was meanwhile."""
        with self._lock:
            if self._users and self._blob is blob:
                self._users += 1
                return True
            return False

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        unit, within = divmod(offset, self._unit_bytes)
        if within or size_bytes != min(self._unit_bytes, self._blob.layout.size_bytes - offset):
            raise NotHere
        with self._process.get(self._number, unit, size_bytes, demand=demand) as view:
            if view is None:
                raise NotHere
            try:
                yield view
            except IntegrityError:
                self._process.say(local.Wrong(self._number, unit))
                raise

    def kept(self, first: int, count: int) -> None:
        for unit in self._units(first, count):
            if self._is_here(unit):
                self._process.say(local.Have(self._number, unit))

    def lost(self, first: int, count: int) -> None:
        for unit in self._units(first, count):
            self._process.say(local.Lost(self._number, unit))

    def hurry(self, block: int) -> None:
        self._process.hurry(self._number, block // self._unit_blocks)

    def close(self) -> None:
        """Exchange it no more, when the last handle says so."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._process.close_blob(self._number)

    def _units(self, first: int, count: int) -> range:
        return range(first // self._unit_blocks, (first + count - 1) // self._unit_blocks + 1)

    def _is_here(self, unit: int) -> bool:
        first = unit * self._unit_blocks
        return self._blob.blocks.has(first, min(first + self._unit_blocks, self._blob.layout.blocks) - 1)
