"""An owner of a peer process: what the agent is to it, for benchmarks and tests.

It reads chunks from a store that is given as a function, compares the digest of each block, and writes what
is right to a file. One thread takes what the process says; others read the store, side by side.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bootseer_slurm.blob.digest import BLAKE3, DIGEST_BYTES, digest_of, digest_slice
from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers import local
from bootseer_slurm.peers.policy import STREAMS
from scripts.lib.bench.engines_torrent import PIECE_BYTES as BLOCK_BYTES

_DEMANDS = 4
_END_S = 5.0

# Fills the memory with the bytes of a chunk, by its number. Raises OSError.
ReadStore = Callable[[int, memoryview], None]


@dataclass(frozen=True)
class Site:
    """The nodes of a job, as all of them see them."""

    addresses: Sequence[str]
    key: bytes = bytes(32)
    ports: Sequence[int] = (7070,)
    upload_bytes_per_s: float = 3e9

    def order(self, node: int) -> local.Order:
        """What a node's process is told."""
        nodes = tuple(range(len(self.addresses)))
        return local.Order(
            uid=os.getuid(),
            gid=os.getgid(),
            user_groups=tuple(os.getgroups()),
            key=self.key,
            node=node,
            addresses=tuple(self.addresses),
            ports=tuple(self.ports),
            blocks=(nodes,),
            upload_bytes_per_s=self.upload_bytes_per_s,
            slots=STREAMS + _DEMANDS,
        )


@dataclass(frozen=True)
class File:
    """What all nodes want. name: 64 hexadecimal digits. digests: of its blocks, one after the other."""

    name: str
    size_bytes: int
    digests: bytes
    chunk_bytes: int = CHUNK_BYTES

    @property
    def chunks(self) -> int:
        return -(-self.size_bytes // self.chunk_bytes)

    def bytes_of(self, chunk: int) -> int:
        """The size of a chunk."""
        return min(self.chunk_bytes, self.size_bytes - chunk * self.chunk_bytes)

    def is_right(self, chunk: int, view: memoryview) -> bool:
        """Whether these are the chunk's bytes."""
        first = chunk * (self.chunk_bytes // BLOCK_BYTES)
        blocks = (view[offset : offset + BLOCK_BYTES] for offset in range(0, len(view), BLOCK_BYTES))
        return all(
            digest_of(BLAKE3, block) == self.digests[digest_slice(first + number)]
            for number, block in enumerate(blocks)
        )


def digests_of(content: bytes | memoryview | mmap.mmap) -> bytes:
    """The digests of all blocks of some content."""
    view = memoryview(content)
    blocks = (view[offset : offset + BLOCK_BYTES] for offset in range(0, len(view), BLOCK_BYTES))
    digests = b"".join(digest_of(BLAKE3, block) for block in blocks)
    assert len(digests) % DIGEST_BYTES == 0
    return digests


# size: a file, a process, and the threads between them
class Owner:
    """A node's owner, and its peer process. counted: the last figures of that. store_reads: chunks."""

    def __init__(self, site: Site, node: int, file: File, path: Path, read: ReadStore) -> None:
        """path: where the file is written. Raises OSError."""
        order = site.order(node)
        self.file = file
        self.here: set[int] = set()
        self._blob = 0
        self.store_reads: list[int] = []
        self.counted: local.Counted | None = None
        self.port: int | None = None
        self._read = read
        self._changed = threading.Condition()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._fd, file.size_bytes)
        self._pool = ThreadPoolExecutor(STREAMS + _DEMANDS)
        self._ring = self._start(order)
        threading.Thread(target=self._take, daemon=True).start()

    def want(self, chunks: Sequence[int], *, demand: bool = False) -> None:
        """Have these fetched."""
        self.say(local.Want(self._blob, tuple(chunks), demand))

    def wait(self, chunks: Sequence[int], timeout_s: float) -> float | None:
        """When all of these were here; None where they are not in that time."""
        with self._changed:
            done = self._changed.wait_for(lambda: self.here.issuperset(chunks), timeout_s)
        return time.monotonic() if done else None

    def reopen(self) -> None:
        """Close the blob, and open it by another number, as if nothing of it were here."""
        with self._changed:
            self.here = set()
            self.say(local.CloseBlob(self._blob))
            self._blob += 1
        self._open()

    def close(self) -> None:
        """End the process."""
        self._link.close()
        self.process.kill()
        self.process.wait(_END_S)
        self._pool.shutdown()
        os.close(self._fd)

    def _start(self, order: local.Order) -> mmap.mmap:
        self._link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            command = [sys.executable, "-B", "-I", "-m", "bootseer_slurm.peers.child", str(far.fileno())]
            self.process = subprocess.Popen(
                command, pass_fds=(far.fileno(),), stdin=subprocess.DEVNULL, cwd="/"
            )
        ring_fd = os.memfd_create("peers-ring", os.MFD_CLOEXEC)
        try:
            os.ftruncate(ring_fd, order.slots * CHUNK_BYTES)
            local.send_order(self._link, order, ring_fd)
            self._open()
            return mmap.mmap(ring_fd, 0)
        finally:
            os.close(ring_fd)

    def _open(self) -> None:
        file = self.file
        opening = local.OpenBlob(self._blob, file.name, file.size_bytes, file.chunk_bytes)
        data_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY)
        try:
            socket.send_fds(self._link, [local.encode(opening)], [data_fd])
        finally:
            os.close(data_fd)

    def say(self, message: local.FromOwner) -> None:
        """Say something to the process."""
        try:
            self._link.send(local.encode(message))
        except OSError:
            pass  # it was ended

    def _take(self) -> None:
        while True:
            try:
                message = self._link.recv(local.MESSAGE_BYTES)
            except OSError:
                return
            if not message:
                return
            said = local.decode_from_child(message)
            match said:
                case local.Read(blob, chunk, _):
                    self._pool.submit(self._from_store, blob, chunk)
                case local.Arrived():
                    self._from_peer(said)
                case local.Counted():
                    self.counted = said
                case local.Started(port):
                    with self._changed:
                        self.port = port
                        self._changed.notify_all()

    def _from_store(self, blob: int, chunk: int) -> None:
        if blob != self._blob or chunk in self.here:
            return
        view = memoryview(bytearray(self.file.bytes_of(chunk)))
        self.store_reads.append(chunk)
        try:
            self._read(chunk, view)
        except OSError:
            self.say(local.Lost(blob, chunk))
            return
        assert self.file.is_right(chunk, view)
        self._keep(blob, chunk, view)

    def _from_peer(self, arrived: local.Arrived) -> None:
        begin = arrived.slot * CHUNK_BYTES
        # A copy: the process could change what is compared.
        view = memoryview(self._ring[begin : begin + self.file.bytes_of(arrived.chunk)])
        if self.file.is_right(arrived.chunk, view):
            self._keep(arrived.blob, arrived.chunk, view)
        else:
            self.say(local.Wrong(arrived.blob, arrived.chunk))

    def _keep(self, blob: int, chunk: int, view: memoryview) -> None:
        os.pwrite(self._fd, view, chunk * self.file.chunk_bytes)
        self.say(local.Have(blob, chunk))
        with self._changed:
            if blob == self._blob:
                self.here.add(chunk)
                self._changed.notify_all()
