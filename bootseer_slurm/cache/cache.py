"""The node's cache: the blobs that jobs use and used, within bounds of bytes and of free disk.

Layout on disk: cache/disk.py. The folders above `data` are root's and closed (0700), so a user reaches it
only through a mount that is read-only. Blobs are kept apart by user: knowing a digest gives no right to the
bytes.

Pinned blobs stay. Nor does a blob go that an agent used which was killed, until `forget_left` says that the
jobs' sessions are known again. What goes of the others, and when: cache/bounds.py.
One agent has one Cache; the command line works beside it through cache/admin.py.
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

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache.blob import CachedBlob
from bootseer_slurm.cache.bounds import Bounds, State
from bootseer_slurm.cache.disk import (
    BlobFolder,
    CachedManifest,
    blob_folder,
    blob_folders,
    read_manifest,
    remove,
)
from bootseer_slurm.cache.live import IN_FLIGHT, MISSING, PRESENT, UNCHECKED, is_live
from bootseer_slurm.errors import BootseerError, IntegrityError

__all__ = ["IN_FLIGHT", "MISSING", "PRESENT", "UNCHECKED", "Cache", "CachedBlob"]

_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@dataclass(slots=True)
class _Pinned:
    """A blob in use, how many use it, and the call to make when the last of them releases it."""

    blob: CachedBlob
    pins: int = 0
    on_last: Callable[[], None] = _nothing


class Cache:
    """All blobs on this node. Thread-safe."""

    def __init__(self, root: Path, *, max_bytes: int, min_free_bytes: int, live: Path) -> None:
        """Open the cache. live: a folder on a tmpfs. Raises BootseerError when a folder cannot be used."""
        self._root = root
        self.live = live
        self._bounds = Bounds(root, live, max_bytes=max_bytes, min_free_bytes=min_free_bytes)
        self._pinned: dict[tuple[int, str], _Pinned] = {}
        self._changed = threading.Condition()  # notified when a blob was let go
        for folder, hint in ((root, "see [cache] path"), (live, "see [agent] socket")):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.chmod(0o700)
            except OSError as error:
                raise BootseerError(f"cache {folder}: cannot be used: {error.strerror}", hint=hint) from error

    def acquire(self, blob_id: str, layout: Layout, digests: bytes | None, uid: int, gid: int) -> CachedBlob:
        """The blob, pinned until `release`.

        digests: None of an unmanaged file; the blocks that it has keep their digest, whatever layout says.
        Raises BootseerError when there is no room for even its state, IntegrityError when the id is not that
        of these digests.
        """
        key = uid, blob_id
        with self._changed:
            while (pinned := self._pinned.get(key)) is not None and not pinned.pins:
                self._changed.wait()  # it is just being let go
            if pinned is None:
                folder = blob_folder(self._root, self.live, uid, blob_id)
                try:
                    blob = CachedBlob(folder, layout, digests, gid=gid, bounds=self._bounds)
                except OSError as error:
                    raise BootseerError(f"cache {self._root}: {error.strerror}") from error
                pinned = self._pinned[key] = _Pinned(blob)
            pinned.pins += 1
        return pinned.blob

    def manifest(self, blob_id: str, uid: int) -> CachedManifest:
        """The manifest that the cache has of a blob. Raises IntegrityError or OSError when it has none."""
        return read_manifest(blob_folder(self._root, self.live, uid, blob_id))

    def release(self, blob: CachedBlob, on_last: Callable[[], None] | None = None) -> None:
        """Save the blob's state and take a pin back. When it was the last, the latest `on_last` runs.

        Not under the lock: both may have to wait for the kernel, which may wait for a reader of the cache.
        """
        blob.folder.touch()
        blob.save()
        key = blob.uid, blob.id
        with self._changed:
            pinned = self._pinned[key]
            pinned.on_last = on_last or pinned.on_last
            pinned.pins -= 1
            if pinned.pins:
                return
        try:
            pinned.on_last()
        finally:
            with self._changed:
                del self._pinned[key]
                blob.let_go()
                self._changed.notify_all()
            self._bounds.enforce()

    def save(self) -> None:
        """Put the state of all pinned blobs on disk. May take long; for a thread that has the time."""
        with self._changed:
            blobs = [pinned.blob for pinned in self._pinned.values() if pinned.pins]
        for blob in blobs:
            blob.folder.touch()
            blob.save()

    def state(self) -> State:
        """How full it is now. Raises OSError."""
        return self._bounds.state()

    def make_room(self) -> bool:
        """Bring cache and disk back within their bounds; blobs keep blocks again where there is room.

        To be called from time to time: others fill the disk too. Gives False when what is in use is too much.
        """
        if not self._bounds.enforce():
            return False
        if self._bounds.has_slack:
            with self._changed:
                for pinned in self._pinned.values():
                    pinned.blob.file.full = False
        return True

    def check(self) -> list[str]:
        """Remove what is no blob, or no whole one; gives one line for each thing removed.

        For the start of an agent, before blobs are acquired. Reads no data.
        """
        removed = []
        for path in self.live.iterdir():
            uid, _, blob_id = path.name.partition(".")
            if not (is_live(path) and uid.isdecimal() and (self._root / uid / blob_id).is_dir()):
                path.unlink(missing_ok=True)
        for folder in blob_folders(self._root, self.live):
            for left in folder.path.glob("*.new") if folder.path.is_dir() else ():
                with contextlib.suppress(OSError):
                    left.unlink()
            reason = _flaw(folder)
            if reason:
                folder.live.unlink(missing_ok=True)
                if remove(folder):
                    removed.append(f"{folder.path}: {reason}")
        return removed

    def forget_left(self) -> None:
        """From now on, blobs that a killed agent used count as unused unless pinned; their state is saved.

        For an agent that has recovered its jobs' sessions. May take long, as `save`.
        """
        for folder in blob_folders(self._root, self.live):
            if not is_live(folder.live):
                continue
            try:
                kept, gid = read_manifest(folder), (folder.path / "data").stat().st_gid
                blob = self.acquire(folder.id, kept.layout, kept.digests, folder.uid, gid)
            except (OSError, BootseerError) as error:
                _log.warning("%s: cannot be recovered: %s", folder.path, error)
                folder.live.unlink(missing_ok=True)
                continue
            self.release(blob)


def _flaw(folder: BlobFolder) -> str:
    """Why a folder is not one of a blob; "" when it is."""
    try:
        kept = read_manifest(folder)
        data = os.lstat(folder.path / "data")
    except (IntegrityError, OSError) as error:
        return error.message if isinstance(error, IntegrityError) else f"{error.filename}: {error.strerror}"
    if not stat.S_ISREG(data.st_mode) or data.st_size != kept.layout.size_bytes:
        return "data has not the blob's size"
    if not is_live(folder.live) and not (folder.path / "blocks").is_file():
        return "which blocks are there was never saved"
    return ""
