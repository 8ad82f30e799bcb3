"""Reading a blob through the cache, and what was read of it.

A Reader serves the blob's file in the FUSE file system and takes the prefetch's runs. One block is fetched
once, whoever asks. Threads: any number may call at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator

from bootseer_slurm.blob.trace import Recorder
from bootseer_slurm.cache.cache import PRESENT, CachedBlob
from bootseer_slurm.cache.fetching import Admit, Fetching, Push, Usage
from bootseer_slurm.cache.sources import Sources
from bootseer_slurm.cache.waits import Waits
from bootseer_slurm.errors import BootseerError, IntegrityError, StoreError

PATIENCE_S = 900.0  # a shared file system that stalls would hold its readers too; after this, EIO
# Who waits for a file system that lies in a blob cannot be killed. Slurm gives such a task 60 s
# (UnkillableStepTimeout) until it drains the node.
MOUNTED_PATIENCE_S = 40.0
# Wrong bytes may be right soon: an object is being replaced, or its server is being mended.
_DAMAGE_PATIENCE_S = 10.0
_RETRY_PAUSE_S = 0.5
_LOOK_S = 0.05

# Is told of each read, by its blocks, first to last, before it is served; must not wait.
OnRead = Callable[[int, int], None]


class Reader:
    """One blob as a file (fuse.File) and as a target of prefetch."""

    def __init__(self, blob: CachedBlob, *, mtime_ns: int) -> None:
        """mtime_ns: the time shown."""
        self.blob = blob
        self.uid, self.gid = blob.uid, blob.gid
        self.mtime_ns = mtime_ns
        self.patience_s = PATIENCE_S
        self.usage = Usage()
        self.waits = Waits()
        self.sources = Sources(blob.id)
        self.on_read: OnRead | None = None
        self._fetching = Fetching(blob, self.sources, self.usage)
        self._recorders: tuple[Recorder, ...] = ()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        return self.blob.layout.size_bytes

    def add_recorder(self, recorder: Recorder) -> None:
        """Have it told of every block that is read."""
        with self._lock:
            self._recorders = (*self._recorders, recorder)

    def remove_recorder(self, recorder: Recorder) -> None:
        with self._lock:
            self._recorders = tuple(each for each in self._recorders if each is not recorder)

    def ready(self, offset: int, size: int) -> int | None:
        """The cache file's descriptor when the whole range is there and checked (fuse.File)."""
        usage = self.usage
        usage.reads += 1
        usage.read_bytes += size
        usage.last_ns = time.time_ns()
        usage.first_ns = usage.first_ns or usage.last_ns
        block_bytes = self.blob.layout.block_bytes
        first, last = offset // block_bytes, (offset + size - 1) // block_bytes
        for recorder in self._recorders:
            recorder.touch(first, last)
        if (on_read := self.on_read) is not None:
            on_read(first, last)
        return self.blob.file.fd if self.blob.blocks.has(first, last) else None

    def fetch(self, offset: int, size: int) -> bytes:
        """The range, fetched first where it is not there (fuse.File). Raises OSError (EIO)."""
        layout = self.blob.layout
        end = min(offset + size, self.size_bytes)
        self.usage.reads_blocked += 1
        self.usage.miss_bytes += end - offset
        first, last = offset // layout.block_bytes, (end - 1) // layout.block_bytes
        unkept: dict[int, bytes] = {}
        try:
            with self._waiting():
                block = first
                while block <= last:
                    block += self._demand(block, last, unkept)
        except BootseerError as error:
            self.sources.tell("read_failed", error.message)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        if not unkept:
            return self.blob.file.read(offset, end - offset)
        parts = [
            unkept.get(block) or self.blob.file.read(block * layout.block_bytes, layout.block_size(block))
            for block in range(first, last + 1)
        ]
        start = offset - first * layout.block_bytes
        return b"".join(parts)[start : start + end - offset]

    def prefetch_run(self, limit_bytes: int | None = None) -> tuple[int, int]:
        """Fetch the first blocks that nobody has; gives offset and bytes, 0 bytes: none, or no room.

        A run stays within one chunk, and `limit_bytes`. Raises BootseerError when no source has the bytes.
        """
        last = self.blob.layout.blocks - 1
        while (first := self.blob.blocks.next_missing()) >= 0 and not self.blob.file.full:
            if claim := self._fetching.claims.run(first, last, limit_bytes):
                self._fetching.fetch(claim, demand=False)
                return first * self.blob.layout.block_bytes, self._fetching.bytes_of(first, claim.end)
        return 0, 0

    def prefetch_blocks(self, first: int, last: int, limit_bytes: int, *, push: Push | None = None) -> int:
        """Fetch those of these blocks that nobody has or fetches; gives the block to go on with.

        One read's worth: within one chunk and `limit_bytes`. push: gives the bytes to the kernel too.
        Raises BootseerError when no source has them.
        """
        block = first
        while block <= last and not self.blob.file.full:
            if claim := self._fetching.claims.run(block, last, limit_bytes):
                self._fetching.fetch(claim, demand=False, push=push)
                return claim.end
            block += 1
        return last + 1

    def prefetch_unit(
        self, first: int | None = None, last: int | None = None, *, admit: Admit, push: Push | None = None
    ) -> tuple[int, int]:
        """Fetch the first unit, as other nodes of the job exchange it, of which nobody has a part of these.

        Without blocks: of the whole blob. admit: is asked before anything but peers is read. Gives the first
        block that was fetched, and the one behind; twice the same where there is none.
        Raises BootseerError when no source has them.
        """
        claims = self._fetching.claims
        last = self.blob.layout.blocks - 1 if last is None else last
        block = claims.next_in_turn() if first is None else first
        while 0 <= block <= last and not self.blob.file.full:
            if claim := claims.unit(block, last):
                if self._fetching.fetch_of_peers(claim, push=push):
                    return claim.first, claim.end
                claim = claims.park(claim)
                with admit(self._fetching.bytes_of(claim.first, claim.end)):
                    if claims.take_back(claim):
                        self._fetching.fetch(claim, demand=False, push=push)
                return claim.first, claim.end
            block = claims.next_in_turn() if first is None else block + 1
        return last + 1, last + 1

    def _demand(self, block: int, last: int, unkept: dict[int, bytes]) -> int:
        """See that a block is in the cache, or in `unkept` when the disk is full.

        Brings what is missing behind it with it, up to `last`. Gives how many blocks are there now.
        """
        begin_s = time.monotonic()
        wrong_since_s: float | None = None
        while self.blob.blocks.states[block] != PRESENT:
            now_s = time.monotonic()
            is_late = now_s - begin_s > self.patience_s
            is_late |= wrong_since_s is not None and now_s - wrong_since_s > _DAMAGE_PATIENCE_S
            if claim := self._fetching.claims.demand(block, last):
                try:
                    self._fetching.fetch(claim, demand=True, unkept=unkept)
                    return claim.end - block
                except (StoreError, IntegrityError) as error:
                    if is_late or not self.sources.all:
                        raise
                    wrong_since_s = None if isinstance(error, StoreError) else wrong_since_s or now_s
                    time.sleep(_RETRY_PAUSE_S)
            elif is_late:
                raise StoreError("a block does not come that is being fetched")
            else:
                for exchange in self.sources.exchanges:
                    exchange.hurry(block)
                # Where other nodes are asked, the claim may come to wait for the link meanwhile.
                self.blob.blocks.wait(block, _LOOK_S if self.sources.exchanges else 1.0)
        return 1

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """A read waits for blocks."""
        begin_s = time.monotonic()
        try:
            with self.waits.one():
                yield
        finally:
            with self._lock:
                self.usage.blocked_s += time.monotonic() - begin_s
