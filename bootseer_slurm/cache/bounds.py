"""The bounds of the node's cache: bytes that it may take, and bytes that must stay free on its disk.

Above a bound the blobs go that nobody uses, the longest unused first, until there are 5 % more room than
that. Whether a blob is in use its folder tells (cache/disk.py), so this module knows no blob in memory.

What is in use cannot go, so a user's blobs in use may not take all: the last eighth of the room is for users
with less than their share of it, half or less. Thread-safe.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from bootseer_slurm.cache.disk import blob_folders, remove

_log = logging.getLogger(__name__)

_STEP_BYTES = 64 * 2**20  # a blob writes this much between two looks at how much room is left
_STEPS = 100  # but it takes so many to fill a small cache
_RESERVE = 1 / 8  # of the room: a job lasts for days, and others begin meanwhile
_SLACK = 0.05  # an eviction goes on to this much below the bounds: not every start should have to evict


@dataclass(frozen=True, slots=True)
class State:
    """How full the cache is, and what was removed from it since the agent started."""

    blobs: int
    used_bytes: int
    max_bytes: int
    free_bytes: int
    min_free_bytes: int
    evicted_blobs: int
    evicted_bytes: int


class Bounds:
    """How much the cache may hold, and the eviction of what is too much."""

    def __init__(self, root: Path, live: Path, *, max_bytes: int, min_free_bytes: int) -> None:
        """root, live: the cache's folders. min_free_bytes: of the disk that root is on."""
        self.step_bytes = max(1, min(_STEP_BYTES, max_bytes // _STEPS))
        self._root = root
        self._live = live
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._evicted_blobs = self._evicted_bytes = 0
        self._lock = threading.Lock()

    def refusal(self, more_bytes: int, *, blob_bytes: int, uid: int) -> str:
        """Why a blob of so many bytes, in use by this user, cannot grow by so much; "" when it can.

        Unused blobs go for it; none goes for a blob that never fits.
        """
        with self._lock:
            never_fits = blob_bytes > self._max_bytes
            fits = self._excess_bytes(more_bytes) <= 0 if never_fits else self._evict(more_bytes)
            return self._beyond_share(uid, more_bytes) if fits else "the cache's disk is full"

    def enforce(self) -> bool:
        """Evict until cache and disk are within their bounds; False when what is in use is too much."""
        with self._lock:
            return self._evict(0)

    @property
    def has_slack(self) -> bool:
        """Whether there is as much room as an eviction makes."""
        return self._excess_bytes(0, slack=_SLACK) <= 0

    def state(self) -> State:
        """How full it is now. Raises OSError."""
        sizes = [folder.disk_bytes for folder in blob_folders(self._root, self._live)]
        return State(
            blobs=len(sizes),
            used_bytes=sum(sizes),
            max_bytes=self._max_bytes,
            free_bytes=psutil.disk_usage(str(self._root)).free,
            min_free_bytes=self._min_free_bytes,
            evicted_blobs=self._evicted_blobs,
            evicted_bytes=self._evicted_bytes,
        )

    def _beyond_share(self, uid: int, more_bytes: int) -> str:
        """Why a user's blobs in use would with so much more take what others are to find; "" if not."""
        folders = blob_folders(self._root, self._live)
        in_use: Counter[int] = Counter({uid: more_bytes})
        for folder in folders:
            if folder.live.exists():  # of a killed agent's too
                in_use[folder.uid] += folder.disk_bytes
        used_bytes = sum(folder.disk_bytes for folder in folders)
        free_bytes = psutil.disk_usage(str(self._root)).free
        room_bytes = min(self._max_bytes, used_bytes + free_bytes - self._min_free_bytes)
        if in_use.total() <= (1 - _RESERVE) * room_bytes or in_use[uid] <= room_bytes / max(2, len(in_use)):
            return ""
        if len(in_use) == 1:
            return "the cache is full, but for an eighth that is kept for other users"
        return f"user {uid}'s share of the cache is used up"

    def _evict(self, more_bytes: int) -> bool:
        """Evict when there is not room for so much more; False when that does not make the room."""
        if self._excess_bytes(more_bytes) <= 0:
            return True
        excess_bytes = self._excess_bytes(more_bytes, slack=_SLACK)
        for folder in blob_folders(self._root, self._live):
            if excess_bytes <= 0:
                break
            size_bytes = folder.disk_bytes
            if remove(folder):
                excess_bytes -= size_bytes
                self._evicted_blobs += 1
                self._evicted_bytes += size_bytes
                _log.info("removed unused blob %s", folder.id)
        return self._excess_bytes(more_bytes) <= 0

    def _excess_bytes(self, more_bytes: int, *, slack: float = 0.0) -> int:
        """By how much cache or disk would be over their bounds with so much more; 0 or less: they are not."""
        used_bytes = sum(folder.disk_bytes for folder in blob_folders(self._root, self._live)) + more_bytes
        free_bytes = psutil.disk_usage(str(self._root)).free - more_bytes
        return max(
            used_bytes - int(self._max_bytes * (1 - slack)),
            int(self._min_free_bytes * (1 + slack)) - free_bytes,
        )
