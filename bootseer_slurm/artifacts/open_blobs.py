"""The blobs in use on this node: for each a pin in the cache, and what its handles share (handle.py).

Thread-safe. Mounts of images lie below <run>/images/<uid>/<blob id>, where only root may look; a container
gets a detached copy of one.

The kernel forgets what it unpacked of an image when that is unmounted. So the mount of a whole one stays for
`_IDLE_S` after its last job, and reads the cache's own file from then on: the same job started again on this
node finds all in memory. It holds no pin: the cache may remove the blob, and `close_idle` frees its bytes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bootseer_slurm.artifacts.handle import BlobHandle, OpenBlob
from bootseer_slurm.artifacts.source import BlobDescription
from bootseer_slurm.cache.cache import Cache
from bootseer_slurm.cache.fetching import Usage
from bootseer_slurm.cache.reader import Reader
from bootseer_slurm.cache.sources import OnFault, Source
from bootseer_slurm.errors import NotFound
from bootseer_slurm.fuse import Server
from bootseer_slurm.image.kernel_mount import KernelMount
from bootseer_slurm.mounts import Namespace
from bootseer_slurm.shares import shares_of

_log = logging.getLogger(__name__)

_Key = tuple[int, str]  # user and blob id

# A job that failed is started again within minutes.
_IDLE_S = 600.0
_MOST_IDLE = 16  # each has a loop device


@dataclass(frozen=True, slots=True)
class Use:
    """Who opens a blob, and as what. mtime_ns: the time that its file shows."""

    kind: str
    uid: int
    gid: int
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class _IdleMount:
    """A mount that no job uses, of a file of the cache that was whole."""

    mount: KernelMount
    file: Path
    inode: int
    since_s: float = field(default_factory=time.monotonic)

    @property
    def gone(self) -> bool:
        """Whether the cache removed the file, whose bytes the mount keeps on the disk."""
        try:
            return self.file.stat().st_ino != self.inode
        except OSError:
            return True


class OpenBlobs:
    """Cache, FUSE file systems and mounted images of one node. shares: what its jobs share beside these."""

    def __init__(self, cache: Cache, servers: Mapping[str, Server], images: Path, private: Namespace) -> None:
        """servers: "blobs" for what is read in parts, "checkpoints" for what is read whole.

        images: the folder that images are mounted in. private: for mounts that users serve.
        """
        self.private = private
        self.shares = shares_of(cache.live)
        self._cache = cache
        self._servers = servers
        self._images = images
        self._open: dict[_Key, OpenBlob] = {}
        self._idle: dict[_Key, _IdleMount] = {}
        self._past = Usage()  # of blobs that are not open any more
        self._lock = threading.Lock()

    def open(self, description: BlobDescription, use: Use, on_fault: OnFault) -> BlobHandle:
        """A handle to a blob, with these sources added, until it is closed.

        on_fault: see cache.sources.BlobUser. Raises BootseerError when the cache cannot be used.
        """
        cached = self._cache.acquire(
            description.id, description.layout, description.digests, use.uid, use.gid
        )
        try:
            with self._lock:
                blob = self._open.get((use.uid, description.id))
                if blob is not None:
                    warm = blob.server.known(blob.name)
                    handle = BlobHandle(self, blob, description.sources, on_fault, warm=warm)
                    blob.reader.sources.add(handle)
                else:
                    reader = Reader(cached, mtime_ns=use.mtime_ns)
                    handle = self._serve(reader, use.kind, description.sources, on_fault)
                    self._open[use.uid, description.id] = handle.blob
        except BaseException:
            self._cache.release(cached)
            raise
        handle.begin()
        return handle

    def _serve(self, reader: Reader, kind: str, sources: Sequence[Source], on_fault: OnFault) -> BlobHandle:
        """Make a blob's file, and use the mount that is there of it; with the lock held."""
        server = self._servers["checkpoints" if kind == "checkpoint" else "blobs"]
        folder = self._images / str(reader.uid) / reader.blob.id
        blob = OpenBlob(reader, server, folder)
        if kind == "environment":  # by the kernel or by squashfuse, but never read as a file
            blob.become_mounted()
        warm = server.known(blob.name)
        handle = BlobHandle(self, blob, sources, on_fault, warm=warm)
        reader.sources.add(handle)  # first: where an agent was killed, reads wait for `server.add`
        blob.path = server.add(blob.name, reader)
        idle = self._idle.pop((reader.uid, reader.blob.id), None)
        if idle is not None and idle.gone:
            idle.mount.close()
        blob.mount = KernelMount.reattach(folder)  # of a job, or an agent, before this one
        if blob.mount is not None:
            blob.become_mounted()
        blob.mount_reads_cache = idle is not None and blob.mount is not None
        handle.warm = warm or blob.mount is not None
        return handle

    def describe(self, blob_id: str, uid: int) -> BlobDescription:
        """The cache's description of a blob that an agent before this one had; without sources.

        Raises BootseerError or OSError when the cache does not have it.
        """
        kept = self._cache.manifest(blob_id, uid)
        return BlobDescription(blob_id, kept.layout, kept.digests)

    def clone_mount(self, image: str, uid: int) -> int:
        """A detached mount of an image for its user's container; the caller closes the descriptor.

        image: the served path. Answers at once. Raises BootseerError when the kernel has not mounted it.
        """
        with self._lock:
            blobs = [blob for (owner, _), blob in self._open.items() if owner == uid]
        mount = next((blob.mount for blob in blobs if str(blob.path) == image), None)
        if mount is None:
            raise NotFound(f"image {image[:200]!r}: the kernel has not mounted it for this user")
        return mount.clone()

    def close(self, handle: BlobHandle) -> None:
        """Take a handle's sources away, and let go of the blob when no other job uses it."""
        reader = handle.reader
        reader.sources.remove(handle)

        def forget() -> None:
            with self._lock:
                blob = self._open.pop((reader.uid, reader.blob.id))
                self._past.add(reader.usage)
            with blob.mount_lock:
                blob.gone = True
                self._put_away(blob)
            blob.server.remove(blob.name)

        self._cache.release(reader.blob, on_last=forget)

    def _put_away(self, blob: OpenBlob) -> None:
        """Leave the mount for a while where it can do without the FUSE file, else close it."""
        cached, mount = blob.reader.blob, blob.mount
        if mount is None:
            return
        if cached.complete and not blob.mount_reads_cache:
            try:
                mount.read_from(cached.file.path)
                blob.mount_reads_cache = True
            except OSError as error:
                _log.info("blob %s: its mount is not kept: %s", cached.id[:12], error)
        if blob.mount_reads_cache:
            with self._lock:
                idle = _IdleMount(mount, cached.file.path, os.fstat(cached.file.fd).st_ino)
                self._idle[cached.uid, cached.id] = idle
            self.close_idle()
        else:
            mount.close()

    def close_idle(self, *, all_of_them: bool = False) -> None:
        """Take away the mounts that no job has used for long, and those of blobs that the cache removed."""
        most = 0 if all_of_them else _MOST_IDLE
        with self._lock:
            for key, idle in list(self._idle.items()):  # the longest unused first
                too_many = len(self._idle) > most
                if too_many or idle.gone or time.monotonic() - idle.since_s > _IDLE_S:
                    del self._idle[key]
                    idle.mount.close()

    def mounted_that_wait(self, longer_than_s: float) -> list[OpenBlob]:
        """The blobs that the kernel has mounted, and of which a read has waited for so long.

        Who waits for a user's squashfuse can be killed.
        """
        with self._lock:
            mounted = [blob for blob in self._open.values() if blob.mount is not None]
        return [blob for blob in mounted if blob.reader.waits.longest_now_s() > longer_than_s]

    def usage(self) -> Usage:
        """The reads and fetches of all blobs since the agent started."""
        total = Usage()
        with self._lock:
            for usage in (self._past, *(blob.reader.usage for blob in self._open.values())):
                total.add(usage)
        return total

    def close_unused(self) -> None:
        """Sessions of an agent before this one were taken up: what nobody uses of it goes."""
        with self._lock:
            used = {blob.mount_folder for blob in self._open.values()}
            used |= {idle.mount.folder for idle in self._idle.values()}
            for folder in self._images.glob("*/*"):
                if folder not in used and (mount := KernelMount.reattach(folder)):
                    mount.close()
        for server in self._servers.values():
            server.end_recovery()
