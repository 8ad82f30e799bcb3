"""Reading a blob through the cache: the chain of sources, the checks, and what was read.

A Reader serves the blob's file in the FUSE file system and takes the prefetch's runs. One block is fetched
once, whoever asks; its bytes are shown only after their digest agreed. Sources are tried in order: what an
earlier boot left in the cache, the store, then the original file, which has the same bytes. Threads: any
number may call at once.

Bytes are pushed into the kernel's page cache only after their claim ended: the kernel waits for reads of the
same pages, and such a read may wait for the claim.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from bootseer_slurm.blob.trace import Recorder
from bootseer_slurm.cache.cache import MISSING, PRESENT, CachedBlob
from bootseer_slurm.cache.waits import Waits
from bootseer_slurm.errors import BootseerError, IntegrityError, StoreError

_log = logging.getLogger(__name__)

_DEMAND_PATIENCE_S = 900.0  # a shared file system that stalls would hold its readers too; after this, EIO
_RETRY_PAUSE_S = 0.5

OnFault = Callable[[str, str], None]
# Gives bytes from an offset on to the kernel, before anybody asks it for them.
Push = Callable[[int, memoryview], None]
# Is told of each read, by its blocks, first to last, before it is served; must not wait.
OnRead = Callable[[int, int], None]


class Source(Protocol):
    """Where a blob's bytes come from: "store" or "origin"; "cache" for what is to be checked again."""

    name: str

    def read(
        self, offset: int, size_bytes: int, *, demand: bool, fixed: bool
    ) -> AbstractContextManager[memoryview]:
        """Bytes of the blob, a range within one chunk. Raises StoreError.

        fixed: they stay what they are, so that what is checked is what is kept. Else whoever brings them may
        still change them, which saves a copy.
        """


@dataclass(slots=True)
class Usage:
    """What readers did with a blob, and where its bytes came from."""

    reads: int = 0
    reads_blocked: int = 0  # of these, how many had to wait
    read_bytes: int = 0
    miss_bytes: int = 0
    blocked_s: float = 0.0  # summed over reads that waited side by side
    first_ns: int = 0
    last_ns: int = 0
    store_bytes: int = 0
    origin_bytes: int = 0
    demand_bytes: int = 0  # of both, what a read waited for
    fetch_s: float = 0.0  # that reads of sources took, summed over those that ran side by side
    disk_s: float = 0.0  # and writes into the cache
    pushed_bytes: int = 0  # into the kernel's page cache: reads of these are not seen any more

    @property
    def fetched_bytes(self) -> int:
        """What came over the link."""
        return self.store_bytes + self.origin_bytes


class _Kept:
    """What is in the blob's own file since an earlier boot (a Source)."""

    name = "cache"

    def __init__(self, blob: CachedBlob) -> None:
        self._blob = blob

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        try:
            content = self._blob.file.read(offset, size_bytes)
        except OSError as error:
            raise StoreError(f"the cache's file cannot be read: {error.strerror}") from error
        yield memoryview(content)


class Reader:
    """One blob as a file (fuse.File) and as a target of prefetch."""

    def __init__(self, blob: CachedBlob, *, mtime_ns: int) -> None:
        """mtime_ns: the time shown."""
        self.blob = blob
        self.size_bytes = blob.layout.size_bytes
        self.uid, self.gid = blob.uid, blob.gid
        self.mtime_ns = mtime_ns
        self.usage = Usage()
        self.waits = Waits()
        self.push: Push | None = None
        self.on_read: OnRead | None = None
        self._kept = _Kept(blob)
        self._recorders: tuple[Recorder, ...] = ()
        self._users: dict[OnFault, set[str]] = {}  # and of what each was told already
        self._sources: list[Source] = []
        self._lock = threading.Lock()

    def add_user(self, sources: list[Source], on_fault: OnFault) -> None:
        """Use these sources too; those named "store" before those named "origin".

        on_fault(name, message): told of damage, a full disk, a lost store.
        """
        with self._lock:
            self._users[on_fault] = set()
            self._sources = sorted([*self._sources, *sources], key=lambda source: source.name != "store")

    def remove_user(self, sources: list[Source], on_fault: OnFault) -> None:
        with self._lock:
            self._users.pop(on_fault, None)
            self._sources = [source for source in self._sources if source not in sources]

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

    @property
    def is_waited_for(self) -> bool:
        """Whether some read waits for blocks now."""
        return self.waits.any_now

    def waited_s(self) -> float:
        """How long, in all, at least one read has waited for blocks."""
        return self.waits.waited_s()

    @contextlib.contextmanager
    def _wait(self) -> Iterator[None]:
        """A read waits for blocks."""
        begin_s = time.monotonic()
        try:
            with self.waits.one():
                yield
        finally:
            with self._lock:
                self.usage.blocked_s += time.monotonic() - begin_s

    def fetch(self, offset: int, size: int) -> bytes:
        """The range, fetched first where it is not there (fuse.File). Raises OSError (EIO)."""
        layout = self.blob.layout
        end = min(offset + size, self.size_bytes)
        self.usage.reads_blocked += 1
        self.usage.miss_bytes += end - offset
        first, last = offset // layout.block_bytes, (end - 1) // layout.block_bytes
        unkept: dict[int, bytes] = {}
        try:
            with self._wait():
                block = first
                while block <= last:
                    block += self._demand(block, last, unkept)
        except BootseerError as error:
            self._tell("read_failed", error.message)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        if not unkept:
            return self.blob.file.read(offset, end - offset)
        parts = [
            unkept.get(block) or self.blob.file.read(block * layout.block_bytes, layout.block_size(block))
            for block in range(first, last + 1)
        ]
        within = offset - first * layout.block_bytes
        return b"".join(parts)[within : within + end - offset]

    def prefetch_run(self, limit_bytes: int | None = None) -> tuple[int, int]:
        """Fetch the first blocks that nobody has; gives offset and bytes, 0 bytes: none, or no room.

        A run stays within one chunk, and `limit_bytes`. Raises BootseerError when no source has the bytes.
        """
        first = self.blob.blocks.next_missing()
        while first >= 0 and not self.blob.file.full:
            end = self._prefetch(first, self.blob.layout.blocks - 1, limit_bytes, push=False)
            if end > first:
                return first * self.blob.layout.block_bytes, self._bytes_of(first, end)
            first = self.blob.blocks.next_missing()  # others were faster
        return 0, 0

    def prefetch_blocks(self, first: int, last: int, limit_bytes: int, *, push: bool = False) -> int:
        """Fetch those of these blocks that nobody has or fetches; gives the block to go on with.

        One read's worth: within one chunk and `limit_bytes`. push: give the bytes to the kernel too.
        Raises BootseerError when no source has them.
        """
        block = first
        while block <= last and not self.blob.file.full:
            end = self._prefetch(block, last, limit_bytes, push=push)
            if end > block:
                return end
            block += 1
        return last + 1

    def _prefetch(self, first: int, last: int, limit_bytes: int | None, *, push: bool) -> int:
        """Fetch from `first` on what one read can bring; gives the block behind, `first` if it needs none."""
        last = self._last_of_run(first, last)
        if limit_bytes is not None:
            last = min(last, first + max(1, limit_bytes // self.blob.layout.block_bytes) - 1)
        count, unchecked = self.blob.blocks.claim(first, last)
        if count:
            self._fetch_claimed(first, count, unchecked=unchecked, demand=False, push=push)
        return first + count

    def _bytes_of(self, first: int, end: int) -> int:
        block_bytes = self.blob.layout.block_bytes
        return min(end * block_bytes, self.size_bytes) - first * block_bytes

    def _last_of_run(self, first: int, last: int) -> int:
        """The last block that one read can bring with `first`: runs end with their chunk."""
        per_chunk = self.blob.layout.chunk_bytes // self.blob.layout.block_bytes
        return min((first // per_chunk + 1) * per_chunk - 1, last)

    def _demand(self, block: int, last: int, unkept: dict[int, bytes]) -> int:
        """See that a block is in the cache, or in `unkept` when the disk is full.

        Brings what is missing behind it with it, up to `last`. Gives how many blocks are there now.
        """
        deadline = time.monotonic() + _DEMAND_PATIENCE_S
        while self.blob.blocks.states[block] != PRESENT:
            count, unchecked = self.blob.blocks.claim(block, self._last_of_run(block, last))
            if count == 0:
                self.blob.blocks.wait(block, 1.0)
                continue
            try:
                self._fetch_claimed(block, count, unchecked=unchecked, demand=True, unkept=unkept)
                return count
            except StoreError:
                if time.monotonic() > deadline or not self._sources:
                    raise
                time.sleep(_RETRY_PAUSE_S)
        return 1

    def _fetch_claimed(
        self,
        first: int,
        count: int,
        *,
        unchecked: bool,
        demand: bool,
        push: bool = False,
        unkept: dict[int, bytes] | None = None,
    ) -> None:
        """Fetch claimed blocks from the first source whose bytes are right, and end the claim."""
        offset, size_bytes = first * self.blob.layout.block_bytes, self._bytes_of(first, first + count)
        # Nothing promises an unmanaged file's bytes: its user, who brings them, is shown what he brought.
        # One who changes them meanwhile has a digest kept that is not theirs, and loses the block at a check.
        fixed = not self.blob.unmanaged
        failure: BootseerError = StoreError("no source is left: its job is over")
        claimed = True
        try:
            sources: tuple[Source, ...] = tuple(self._sources)
            for source in (self._kept, *sources) if unchecked else sources:
                begin_s = time.monotonic()
                try:
                    with source.read(offset, size_bytes, demand=demand, fixed=fixed) as view:
                        learn = self.blob.unmanaged and source is not self._kept
                        self.blob.blocks.check(first, count, view, learn=learn)
                        fetched_s = time.monotonic()
                        kept = source is self._kept or self.blob.file.write(offset, view)
                        written_s = time.monotonic()
                        if not kept and unkept is not None:
                            self._put_aside(first, view, unkept)
                        self.blob.blocks.end_claim(first, count, PRESENT if kept else MISSING)
                        claimed = False
                        if push and kept:
                            self._push(offset, view)
                except BootseerError as error:
                    name = "corrupt_block" if isinstance(error, IntegrityError) else "source_failed"
                    self._tell(name, f"{source.name}: {error.message}")
                    failure = error
                    continue
                if source is not self._kept:
                    self.usage.fetch_s += fetched_s - begin_s
                    self.usage.disk_s += written_s - fetched_s
                if source.name == "store":
                    self.usage.store_bytes += size_bytes
                elif source.name == "origin":
                    self.usage.origin_bytes += size_bytes
                if demand and source is not self._kept:
                    self.usage.demand_bytes += size_bytes
                if not kept:
                    self._tell("cache_full", "the cache's disk is full: blocks are served, not kept")
                return
            raise failure
        finally:
            if claimed:
                self.blob.blocks.end_claim(first, count, MISSING)

    def _put_aside(self, first: int, view: memoryview, unkept: dict[int, bytes]) -> None:
        block_bytes = self.blob.layout.block_bytes
        for start in range(0, len(view), block_bytes):
            unkept[first + start // block_bytes] = bytes(view[start : start + block_bytes])

    def _push(self, offset: int, view: memoryview) -> None:
        push = self.push
        if push is None:
            return
        try:
            push(offset, view)
        except (OSError, BootseerError) as error:
            _log.debug("blob %s: not pushed: %s", self.blob.id[:12], error)
        else:
            self.usage.pushed_bytes += len(view)

    def _tell(self, name: str, message: str) -> None:
        """Report a fault to each user, the first of each name only: a lost store fails thousands of reads."""
        with self._lock:
            untold = [on_fault for on_fault, told in self._users.items() if name not in told]
            for on_fault in untold:
                self._users[on_fault].add(name)
        for on_fault in untold:
            _log.warning("blob %s: %s: %s", self.blob.id[:12], name, message)
            on_fault(name, message)
