"""The node's cache: the blobs that jobs use and used, within bounds of bytes and of free disk.

Layout on disk: cache/disk.py. The folders above `data` are root's and closed (0700), so a user reaches it
only through a mount that is read-only. Blobs are kept apart by user: knowing a digest gives no right to the
bytes.

Pinned blobs stay. Nor does a blob go that an agent used which was killed, until `forget_left` says that the
jobs' sessions are known again. Of the others the longest unused goes first, when the cache has more than
max_bytes or the disk less than min_free_bytes, and then until there are 5 % more room than that.
One agent has one Cache; the command line works beside it through cache/survey.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache.blob import CachedBlob
from bootseer_slurm.cache.disk import Kept, Place, place_of, places, read_kept, remove
from bootseer_slurm.cache.live import IN_FLIGHT, MISSING, PRESENT, UNCHECKED, is_live
from bootseer_slurm.errors import BootseerError, IntegrityError

__all__ = ["IN_FLIGHT", "MISSING", "PRESENT", "UNCHECKED", "Cache", "CachedBlob"]

_log = logging.getLogger(__name__)

_STEP_BYTES = 64 * 2**20  # a blob writes this much between two looks at how much room is left
_STEPS = 100  # but it takes so many to fill a small cache
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


class Cache:
    """All blobs on this node. Thread-safe."""

    def __init__(self, root: Path, *, max_bytes: int, min_free_bytes: int, live: Path) -> None:
        """Open the cache. live: a folder on a tmpfs. Raises BootseerError when a folder cannot be used."""
        self._root = root
        self._live = live
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._step_bytes = max(1, min(_STEP_BYTES, max_bytes // _STEPS))
        self._blobs: dict[tuple[int, str], CachedBlob] = {}
        self._evicted_blobs = self._evicted_bytes = 0
        self._lock = threading.Condition()  # notified when a blob was let go
        for folder, hint in ((root, "see [cache] path"), (live, "see [agent] socket")):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.chmod(0o700)
            except OSError as error:
                raise BootseerError(f"cache {folder}: cannot be used: {error.strerror}", hint=hint) from error

    def acquire(self, blob_id: str, layout: Layout, digests: bytes | None, uid: int, gid: int) -> CachedBlob:
        """The blob, pinned until `release`.

        digests: None of an adopted file; blocks that it has already keep their digest, whatever layout says.
        Raises BootseerError when there is no room for even its state, IntegrityError when the id is not that
        of these digests.
        """
        with self._lock:
            while (blob := self._blobs.get((uid, blob_id))) is not None and not blob.pins:
                self._lock.wait()  # it is just being let go
            if blob is None:
                try:
                    blob = CachedBlob(
                        place_of(self._root, self._live, uid, blob_id),
                        layout,
                        digests,
                        gid=gid,
                        has_room=self._has_room,
                        step_bytes=self._step_bytes,
                    )
                except OSError as error:
                    raise BootseerError(f"cache {self._root}: {error.strerror}") from error
                self._blobs[uid, blob_id] = blob
            blob.pins += 1
            if blob.pins == 1:
                blob.full = not self._has_room(blob, 0)
        return blob

    def kept(self, blob_id: str, uid: int) -> Kept:
        """What the cache says of a blob. Raises IntegrityError or OSError when it has none."""
        return read_kept(place_of(self._root, self._live, uid, blob_id))

    def release(self, blob: CachedBlob, on_last: Callable[[], None] | None = None) -> None:
        """Save the blob's state and take a pin back. When it was the last, the latest `on_last` runs.

        Not under the lock: both may have to wait for the kernel, which may wait for a reader of the cache.
        """
        blob.touch()
        blob.save()
        with self._lock:
            blob.on_last = on_last or blob.on_last
            blob.pins -= 1
            if blob.pins:
                return
        try:
            blob.on_last()
        finally:
            blob.on_last = _nothing  # it may hold the blob, which lets go of its descriptors when it goes
            with self._lock:
                del self._blobs[blob.uid, blob.id]
                blob.let_go()
                self._lock.notify_all()
                self._evict_over(0)

    def save(self) -> None:
        """Put the state of all pinned blobs on disk. May take long; for a thread that has the time."""
        with self._lock:
            blobs = [blob for blob in self._blobs.values() if blob.pins]
            for blob in blobs:
                blob.pins += 1
        for blob in blobs:
            self.release(blob)

    def state(self) -> State:
        """How full it is now. Raises OSError."""
        sizes = [place.disk_bytes for place in places(self._root, self._live)]
        return State(
            blobs=len(sizes),
            used_bytes=sum(sizes),
            max_bytes=self._max_bytes,
            free_bytes=psutil.disk_usage(str(self._root)).free,
            min_free_bytes=self._min_free_bytes,
            evicted_blobs=self._evicted_blobs,
            evicted_bytes=self._evicted_bytes,
        )

    def make_room(self) -> bool:
        """Bring cache and disk back within their bounds; blobs keep blocks again where there is room.

        To be called from time to time: others fill the disk too. Gives False when what is in use is too much.
        """
        with self._lock:
            if not self._evict_over(0):
                return False
            if self._excess_bytes(0, slack=_SLACK) <= 0:
                for blob in self._blobs.values():
                    blob.full = False
            return True

    def check(self) -> list[str]:
        """Remove what is no blob, or no whole one; gives one line for each thing removed.

        For the start of an agent, before blobs are acquired. Reads no data.
        """
        removed = []
        for path in self._live.iterdir():
            uid, _, blob_id = path.name.partition(".")
            if not (is_live(path) and uid.isdecimal() and (self._root / uid / blob_id).is_dir()):
                path.unlink(missing_ok=True)
        for place in places(self._root, self._live):
            for left in place.folder.glob("*.new") if place.folder.is_dir() else ():
                with contextlib.suppress(OSError):
                    left.unlink()
            reason = _flaw(place)
            if reason:
                place.live.unlink(missing_ok=True)
                if remove(place):
                    removed.append(f"{place.folder}: {reason}")
        return removed

    def forget_left(self) -> None:
        """From now on, blobs that a killed agent used count as unused unless pinned; their state is saved.

        For an agent that has taken up its jobs' sessions again. May take long, as `save`.
        """
        for place in places(self._root, self._live):
            if not is_live(place.live):
                continue
            try:
                kept, gid = read_kept(place), (place.folder / "data").stat().st_gid
                blob = self.acquire(place.id, kept.layout, kept.digests, place.uid, gid)
            except (OSError, BootseerError) as error:
                _log.warning("%s: cannot be taken over: %s", place.folder, error)
                place.live.unlink(missing_ok=True)
                continue
            self.release(blob)

    def _has_room(self, blob: CachedBlob, more_bytes: int) -> bool:
        """Whether a blob can grow by so much; unused blobs go for it, but not for one that never fits."""
        with self._lock:
            if blob.layout.size_bytes > self._max_bytes:
                return self._excess_bytes(more_bytes) <= 0
            return self._evict_over(more_bytes)

    def _evict_over(self, more_bytes: int) -> bool:
        """Evict when there is not room for so much more; False when that does not make the room."""
        if self._excess_bytes(more_bytes) <= 0:
            return True
        excess_bytes = self._excess_bytes(more_bytes, slack=_SLACK)
        unused = [
            (place, place.disk_bytes)
            for place in places(self._root, self._live)
            if (place.uid, place.id) not in self._blobs
        ]
        for place, size_bytes in unused:
            if excess_bytes <= 0:
                break
            if remove(place):
                excess_bytes -= size_bytes
                self._evicted_blobs += 1
                self._evicted_bytes += size_bytes
                _log.info("removed unused blob %s", place.id)
        return self._excess_bytes(more_bytes) <= 0

    def _excess_bytes(self, more_bytes: int, *, slack: float = 0.0) -> int:
        """By how much cache or disk would be over their bounds with so much more; 0 or less: they are not."""
        used_bytes = sum(place.disk_bytes for place in places(self._root, self._live)) + more_bytes
        free_bytes = psutil.disk_usage(str(self._root)).free - more_bytes
        return max(
            used_bytes - int(self._max_bytes * (1 - slack)),
            int(self._min_free_bytes * (1 + slack)) - free_bytes,
        )


def _nothing() -> None:
    pass


def _flaw(place: Place) -> str:
    """What a folder lacks to be a blob's; "" when it lacks nothing."""
    try:
        kept = read_kept(place)
        data = os.lstat(place.folder / "data")
    except (IntegrityError, OSError) as error:
        return error.message if isinstance(error, IntegrityError) else f"{error.filename}: {error.strerror}"
    if not stat.S_ISREG(data.st_mode) or data.st_size != kept.layout.size_bytes:
        return "data has not the blob's size"
    if not is_live(place.live) and not (place.folder / "blocks").is_file():
        return "which blocks are there was never saved"
    return ""
