"""Reading a blob through the cache: the chain of sources, the checks, and what was read.

A Reader serves the blob's file in the FUSE file system and takes the prefetch's runs. One block is fetched
once, whoever asks; its bytes are shown only after their digest agreed. Sources are tried in order: the store,
then the original file, which has the same bytes. Threads: any number may call at once.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from bootseer_slurm.blob.cache import MISSING, PRESENT, CachedBlob
from bootseer_slurm.blob.manifest import DIGEST_BYTES
from bootseer_slurm.errors import BootseerError, IntegrityError, StoreError

_log = logging.getLogger(__name__)

_DEMAND_PATIENCE_S = 900.0  # a shared file system that stalls would hold its readers too; after this, EIO
_RETRY_PAUSE_S = 0.5
_NO_DIGEST = bytes(DIGEST_BYTES)

OnFault = Callable[[str, str], None]


class Source(Protocol):
    """Where a blob's bytes come from: "store" or "origin"."""

    name: str

    def read(self, offset: int, size_bytes: int, *, demand: bool) -> AbstractContextManager[memoryview]:
        """Bytes of the blob, a range within one chunk. Raises StoreError."""


@dataclass(slots=True)
class Usage:
    """What readers did with a blob, and where its bytes came from."""

    reads: int = 0
    read_bytes: int = 0
    miss_bytes: int = 0
    blocked_s: float = 0.0
    first_ns: int = 0
    last_ns: int = 0
    store_bytes: int = 0
    origin_bytes: int = 0


class Reader:
    """One blob as a file (fuse.File) and as a target of prefetch."""

    def __init__(self, blob: CachedBlob, *, mtime_ns: int) -> None:
        """mtime_ns: the time shown."""
        self.blob = blob
        self.size_bytes = blob.layout.size_bytes
        self.uid, self.gid = blob.uid, blob.gid
        self.mtime_ns = mtime_ns
        self.usage = Usage()
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

    def ready(self, offset: int, size: int) -> int | None:
        """The cache file's descriptor when the whole range is there and checked (fuse.File)."""
        usage = self.usage
        usage.reads += 1
        usage.read_bytes += size
        usage.last_ns = time.time_ns()
        usage.first_ns = usage.first_ns or usage.last_ns
        block_bytes = self.blob.layout.block_bytes
        if self.blob.has(offset // block_bytes, (offset + size - 1) // block_bytes):
            return self.blob.fd
        return None

    def fetch(self, offset: int, size: int) -> bytes:
        """The range, fetched first where it is not there (fuse.File). Raises OSError (EIO)."""
        start = time.monotonic()
        layout = self.blob.layout
        end = min(offset + size, self.size_bytes)
        self.usage.miss_bytes += end - offset
        first, last = offset // layout.block_bytes, (end - 1) // layout.block_bytes
        unkept: dict[int, bytes] = {}
        try:
            block = first
            while block <= last:
                block += self._demand(block, last, unkept)
        except BootseerError as error:
            self._tell("read_failed", error.message)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        finally:
            self.usage.blocked_s += time.monotonic() - start
        if not unkept:
            return self.blob.read(offset, end - offset)
        parts = [
            unkept.get(block) or self.blob.read(block * layout.block_bytes, layout.block_size(block))
            for block in range(first, last + 1)
        ]
        within = offset - first * layout.block_bytes
        return b"".join(parts)[within : within + end - offset]

    def prefetch_run(self, limit_bytes: int | None = None) -> bool:
        """Fetch the first blocks that nobody has; False when there are none, or no room for them.

        A run stays within one chunk, and `limit_bytes`. Raises BootseerError when no source has the bytes.
        """
        blob, layout = self.blob, self.blob.layout
        first = blob.next_missing()
        if first < 0 or blob.full:
            return False
        last = self._last_of_run(first, layout.blocks - 1)
        if limit_bytes is not None:
            last = min(last, first + max(1, limit_bytes // layout.block_bytes) - 1)
        count = blob.claim(first, last)
        if count:
            self._fetch_claimed(first, count, demand=False, unkept=None)
        return True

    def _last_of_run(self, first: int, last: int) -> int:
        """The last block that one read can bring with `first`: runs end with their chunk."""
        per_chunk = self.blob.layout.chunk_bytes // self.blob.layout.block_bytes
        return min((first // per_chunk + 1) * per_chunk - 1, last)

    def _demand(self, block: int, last: int, unkept: dict[int, bytes]) -> int:
        """See that a block is in the cache, or in `unkept` when the disk is full.

        Brings what is missing behind it with it, up to `last`. Gives how many blocks are there now.
        """
        deadline = time.monotonic() + _DEMAND_PATIENCE_S
        while self.blob.states[block] != PRESENT:
            count = self.blob.claim(block, self._last_of_run(block, last))
            if count == 0:
                self.blob.wait(block, 1.0)
                continue
            try:
                self._fetch_claimed(block, count, demand=True, unkept=unkept)
                return count
            except StoreError:
                if time.monotonic() > deadline or not self._sources:
                    raise
                time.sleep(_RETRY_PAUSE_S)
        return 1

    def _fetch_claimed(
        self, first: int, count: int, *, demand: bool, unkept: dict[int, bytes] | None
    ) -> None:
        """Fetch claimed blocks from the first source whose bytes are right, and end the claim."""
        layout = self.blob.layout
        offset = first * layout.block_bytes
        size_bytes = min(count * layout.block_bytes, self.size_bytes - offset)
        failure: BootseerError = StoreError("no source is left: its job is over")
        kept = False
        try:
            for source in tuple(self._sources):
                try:
                    with source.read(offset, size_bytes, demand=demand) as view:
                        self._check(first, count, view)
                        kept = self.blob.write(offset, view)
                        if not kept and unkept is not None:
                            for number in range(count):
                                start = number * layout.block_bytes
                                unkept[first + number] = bytes(view[start : start + layout.block_bytes])
                except BootseerError as error:
                    name = "corrupt_block" if isinstance(error, IntegrityError) else "source_failed"
                    self._tell(name, f"{source.name}: {error.message}")
                    failure = error
                    continue
                if source.name == "store":
                    self.usage.store_bytes += size_bytes
                else:
                    self.usage.origin_bytes += size_bytes
                if not kept:
                    self._tell("cache_full", "the cache's disk is full: blocks are served, not kept")
                return
            raise failure
        finally:
            self.blob.settle(first, count, PRESENT if kept else MISSING)

    def _check(self, first: int, count: int, view: memoryview) -> None:
        layout = self.blob.layout
        for number in range(count):
            block = first + number
            start = number * layout.block_bytes
            digest = hashlib.sha256(view[start : start + layout.block_bytes]).digest()
            place = slice(block * DIGEST_BYTES, (block + 1) * DIGEST_BYTES)
            expected = bytes(self.blob.digests[place])
            if self.blob.adopted and expected == _NO_DIGEST:
                self.blob.digests[place] = digest
            elif digest != expected:
                raise IntegrityError(f"block {block} has not the digest that was promised")

    def _tell(self, name: str, message: str) -> None:
        """Report a fault to each user, the first of each name only: a lost store fails thousands of reads."""
        with self._lock:
            untold = [on_fault for on_fault, told in self._users.items() if name not in told]
            for on_fault in untold:
                self._users[on_fault].add(name)
        for on_fault in untold:
            _log.warning("blob %s: %s: %s", self.blob.id[:12], name, message)
            on_fault(name, message)
