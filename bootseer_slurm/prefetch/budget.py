"""The memory of a node that the prefetch of one job may fill, as pages that the kernel keeps.

What is fetched is written to the cache's files, whose pages stay in memory while there is room; of hot blocks
the kernel is given pages of the FUSE file too (push). A checkpoint may be larger than the node's memory: of
what is brought beyond the budget the pages are given up, so that it lies on the node's disk only and does not
drive out what the start reads before it. Thread-safe.
"""

from __future__ import annotations

import threading

import psutil

from bootseer_slurm.cache.blob import CachedBlob

_SHARE = 2  # of the memory that is free, when the job comes
_PUSH_SHARE = 8
_BATCH_BYTES = 64 * 2**20  # of pages that are given up at once, for they are synced to the disk before


class MemoryBudget:
    """The budget of one job."""

    def __init__(self) -> None:
        free_bytes = psutil.virtual_memory().available
        self._limit_bytes = free_bytes // _SHARE
        self._push_limit_bytes = free_bytes // _PUSH_SHARE
        self._pushed_bytes = 0
        self._brought_bytes = 0
        self._beyond: list[tuple[CachedBlob, int, int]] = []
        self._beyond_bytes = 0
        self._lock = threading.Lock()

    def bound(self, job_bytes: int) -> None:
        """Have no more than what Slurm gave the job on this node."""
        with self._lock:
            self._limit_bytes = min(self._limit_bytes, job_bytes)
            self._push_limit_bytes = min(self._push_limit_bytes, job_bytes * _SHARE // _PUSH_SHARE)

    def may_push(self, size_bytes: int) -> bool:
        """Whether the kernel may be given so much; it then counts as given."""
        with self._lock:
            if self._pushed_bytes + size_bytes > self._push_limit_bytes:
                return False
            self._pushed_bytes += size_bytes
            return True

    def brought(self, blob: CachedBlob, offset: int, size_bytes: int) -> None:
        """Bytes of a checkpoint were written to the cache: those beyond the budget leave memory again."""
        with self._lock:
            self._brought_bytes += size_bytes
            if self._brought_bytes <= self._limit_bytes:
                return
            self._beyond.append((blob, offset, size_bytes))
            self._beyond_bytes += size_bytes
            if self._beyond_bytes < _BATCH_BYTES:
                return
            beyond, self._beyond, self._beyond_bytes = self._beyond, [], 0
        for each in {blob for blob, _, _ in beyond}:
            each.drop_pages((offset, count) for blob, offset, count in beyond if blob is each)
