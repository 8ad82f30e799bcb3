"""The node's cache: one sparse file for each blob, and which of its blocks are there and checked.

    <cache>/<uid>/<blob id>/data      the blocks, at their own offsets; owned by the user, 0400
    <cache>/<uid>/<blob id>/blocks    one byte a block, 1 where present; written after data was synced
    <cache>/<uid>/<blob id>/digests   of a file adopted where it lies: the digests seen so far
    <cache>/<uid>/<blob id>/used      its mtime is the time of the last use

The folders above `data` are root's and closed (0700), so a user reaches it only through a mount that is
read-only. Blobs are kept apart by user: knowing a digest gives no right to the bytes.
A block counts as present in memory as soon as it was written, and on disk only after an fdatasync.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil

from bootseer_slurm.blob.manifest import DIGEST_BYTES, Layout
from bootseer_slurm.errors import BootseerError

_log = logging.getLogger(__name__)

MISSING, PRESENT, IN_FLIGHT = 0, 1, 2
_CHECK_FREE_BYTES = 64 * 2**20  # written between two looks at how much the disk has left


class CachedBlob:
    """The blocks of one blob on this node. Thread-safe.

    `digests` is the manifest's, or None for an adopted file: then a block's digest is what it was when the
    block was first read.
    """

    def __init__(
        self,
        folder: Path,
        blob_id: str,
        layout: Layout,
        digests: bytes | None,
        *,
        uid: int,
        gid: int,
        min_free_bytes: int,
    ) -> None:
        self.id = blob_id
        self.layout = layout
        self.uid, self.gid = uid, gid
        self.folder = folder
        self.pins = 0
        self.full = False  # the disk or the cache is: blocks are no longer kept
        self._min_free_bytes = min_free_bytes
        self._unchecked_bytes = _CHECK_FREE_BYTES
        self.adopted = digests is None
        self.digests = bytearray(digests) if digests else bytearray(layout.blocks * DIGEST_BYTES)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / "data"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o400)
        # Closed with the last reference, not before: a server thread may be about to read from it.
        weakref.finalize(self, os.close, self.fd)
        self.states = bytearray(layout.blocks)
        self.changed = threading.Condition()
        self._missing = layout.blocks
        if os.fstat(self.fd).st_size == layout.size_bytes:
            self._load()
        os.fchown(self.fd, uid, gid)
        os.ftruncate(self.fd, layout.size_bytes)
        self.touch()

    def _load(self) -> None:
        """Take over what an earlier agent saved of this blob, if it is whole."""
        try:
            states = bytearray((self.folder / "blocks").read_bytes())
            digests = bytearray((self.folder / "digests").read_bytes()) if self.adopted else self.digests
        except FileNotFoundError:
            return
        if len(states) == self.layout.blocks and len(digests) == len(self.digests) and set(states) <= {0, 1}:
            self.states, self.digests = states, digests
            self._missing = states.count(MISSING)

    @property
    def complete(self) -> bool:
        return self._missing == 0

    @property
    def present_bytes(self) -> int:
        """Bytes of the blocks that are there (the last block counted whole)."""
        return min((self.layout.blocks - self._missing) * self.layout.block_bytes, self.layout.size_bytes)

    def has(self, first: int, last: int) -> bool:
        """Whether blocks first to last are all present."""
        states = self.states
        return states.find(b"\0", first, last + 1) < 0 and states.find(b"\2", first, last + 1) < 0

    def next_missing(self) -> int:
        """The first block that nobody has or fetches, or -1."""
        return self.states.find(b"\0")

    def claim(self, first: int, last: int) -> int:
        """Take blocks from `first` on, up to `last`, for fetching; gives how many (0: others were faster)."""
        with self.changed:
            end = first
            while end <= last and self.states[end] == MISSING:
                self.states[end] = IN_FLIGHT
                end += 1
            return end - first

    def wait(self, block: int, timeout_s: float) -> None:
        """Wait until whoever fetches a block has it, or gave up."""
        with self.changed:
            self.changed.wait_for(lambda: self.states[block] != IN_FLIGHT, timeout_s)

    def settle(self, first: int, count: int, state: int) -> None:
        """End a claim: the blocks are PRESENT, or MISSING again."""
        with self.changed:
            self.states[first : first + count] = bytes([state]) * count
            if state == PRESENT:
                self._missing -= count
            self.changed.notify_all()

    def write(self, offset: int, view: memoryview) -> bool:
        """Keep checked bytes; False when the disk has no room for them."""
        if self.full:
            return False
        try:
            self._unchecked_bytes += len(view)
            if self._unchecked_bytes >= _CHECK_FREE_BYTES:
                self._unchecked_bytes = 0
                disk = os.fstatvfs(self.fd)
                if disk.f_bavail * disk.f_frsize < self._min_free_bytes:
                    self.full = True
                    return False
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            self.full = True
            return False
        return True

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Bytes of blocks that are present."""
        return os.pread(self.fd, size_bytes, offset)

    def touch(self) -> None:
        """Note that the blob was used now."""
        with contextlib.suppress(OSError):
            (self.folder / "used").touch()

    def save(self) -> None:
        """Put the state on disk, so that what is here survives a reboot."""
        try:
            states = bytes(self.states).replace(b"\2", b"\0")
            digests = bytes(self.digests)
            os.fdatasync(self.fd)
            if self.adopted:
                _replace(self.folder / "digests", digests)
            _replace(self.folder / "blocks", states)
        except OSError as error:
            _log.warning("%s: state cannot be saved: %s", self.folder, error)


class Cache:
    """All blobs on this node. Thread-safe."""

    def __init__(self, root: Path, *, max_bytes: int, min_free_bytes: int) -> None:
        """Open the cache. Raises BootseerError when its folder cannot be used."""
        self._root = root
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._blobs: dict[tuple[int, str], CachedBlob] = {}
        self._lock = threading.Lock()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            root.chmod(0o700)
        except OSError as error:
            raise BootseerError(
                f"cache {root}: cannot be used: {error.strerror}", hint="see [cache] path"
            ) from error

    def acquire(self, blob_id: str, layout: Layout, digests: bytes | None, uid: int, gid: int) -> CachedBlob:
        """The blob, pinned until `release`. Raises BootseerError when there is no room for even its state."""
        with self._lock:
            blob = self._blobs.get((uid, blob_id))
            if blob is None:
                try:
                    blob = CachedBlob(
                        self._root / str(uid) / blob_id,
                        blob_id,
                        layout,
                        digests,
                        uid=uid,
                        gid=gid,
                        min_free_bytes=self._min_free_bytes,
                    )
                except OSError as error:
                    raise BootseerError(f"cache {self._root}: {error.strerror}") from error
                self._blobs[uid, blob_id] = blob
            blob.pins += 1
            if blob.pins == 1 and not self._make_room(whole=True):
                blob.full = True
        return blob

    def release(self, blob: CachedBlob, on_last: Callable[[], None] = lambda: None) -> None:
        """Save the blob's state and take a pin back. When it was the last, `on_last` runs."""
        blob.touch()
        blob.save()  # not under the lock: syncing may take long
        with self._lock:
            blob.pins -= 1
            if blob.pins:
                return
            on_last()
            del self._blobs[blob.uid, blob.id]
            self._make_room(whole=False)

    def _make_room(self, *, whole: bool) -> bool:
        """Remove unused blobs, the longest unused first, until the live ones can grow to their sizes.

        Gives False when that cannot be; then `whole` says to remove nothing.
        """
        unused = [(folder, _disk_bytes(folder)) for _, folder in sorted(self._unused())]
        unused_bytes = sum(size_bytes for _, size_bytes in unused)
        live = [blob for blob in self._blobs.values() if not blob.full]
        growing_bytes = sum(blob.layout.size_bytes - blob.present_bytes for blob in live)
        used_bytes = unused_bytes + sum(blob.layout.size_bytes for blob in live)
        free_bytes = psutil.disk_usage(str(self._root)).free - growing_bytes
        excess_bytes = max(used_bytes - self._max_bytes, self._min_free_bytes - free_bytes)
        if whole and excess_bytes > unused_bytes:
            return False
        for folder, size_bytes in unused:
            if excess_bytes <= 0:
                break
            (folder / "blocks").unlink(missing_ok=True)  # first: what is left without it counts for nothing
            shutil.rmtree(folder, ignore_errors=True)
            excess_bytes -= size_bytes
            _log.info("removed unused blob %s", folder.name)
        return excess_bytes <= 0

    def _unused(self) -> list[tuple[float, Path]]:
        entries = []
        for folder in self._root.glob("[0-9]*/*"):
            if (int(folder.parent.name), folder.name) not in self._blobs:
                with contextlib.suppress(OSError):
                    entries.append(((folder / "used").stat().st_mtime, folder))
        return entries


def _disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("data"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.rename(path)
