"""The blobs in use on this node: for each a pin in the cache, a reader, a file in a FUSE file system, and for
an image that the kernel may mount, that mount.

Jobs of one user that use the same blob share all of them. Thread-safe. Mounts of images lie below
<run>/images/<uid>/<blob id>, where only root may look; a container gets a detached copy of one.

The kernel forgets what it unpacked of an image when that is unmounted. So the mount of a whole one stays for
`_IDLE_S` after its last job, and reads the cache's own file from then on: the same job started again on this
node finds all in memory. It holds no pin: the cache may remove the blob, and `close_idle` frees its bytes.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache.cache import Cache
from bootseer_slurm.cache.reader import OnFault, Reader, Source, Usage
from bootseer_slurm.errors import NotFound
from bootseer_slurm.fuse import Server
from bootseer_slurm.image.kernel import KernelMount

_log = logging.getLogger(__name__)

_Key = tuple[int, str]

# A job that failed is started again within minutes.
_IDLE_S = 600.0
_MOST_IDLE = 16  # each has a loop device


@dataclass(slots=True)
class _Place:
    """What stands on the shelf for one blob."""

    reader: Reader
    server: Server
    path: Path
    mount: KernelMount | None = None
    mount_reads_cache: bool = False  # its own file there, not the FUSE file
    mount_lock: threading.Lock = field(default_factory=threading.Lock)
    gone: bool = False
    bypassed: bool = False  # somebody reads the cache's own file


@dataclass(frozen=True, slots=True)
class _Idle:
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


class Shelf:
    """Cache, FUSE file systems and mounted images of one node."""

    def __init__(self, cache: Cache, servers: Mapping[str, Server], images: Path) -> None:
        """servers: "blobs" for what is read in parts, "checkpoints" for what is read whole.

        images: the folder that images are mounted in.
        """
        self._cache = cache
        self._servers = servers
        self._images = images
        self._places: dict[_Key, _Place] = {}
        self._idle: dict[_Key, _Idle] = {}
        self._past = Usage()  # of what is not here any more
        self._lock = threading.Lock()

    def take(
        self,
        blob_id: str,
        layout: Layout,
        digests: bytes | None,
        *,
        kind: str,
        uid: int,
        gid: int,
        mtime_ns: int,
        sources: list[Source],
        on_fault: OnFault,
    ) -> tuple[Reader, bool]:
        """The reader of a blob, with these sources added, until `give_back`; and whether it is warm.

        A blob is warm when the kernel may hold pages of it: reads of these are not seen.
        Raises BootseerError when the cache cannot be used.
        """
        blob = self._cache.acquire(blob_id, layout, digests, uid, gid)
        try:
            with self._lock:
                place = self._places.get((uid, blob_id))
                if place is not None:
                    place.reader.add_user(sources, on_fault)
                    return place.reader, place.server.known(_name(place.reader))
                reader = Reader(blob, mtime_ns=mtime_ns)
                reader.add_user(sources, on_fault)  # first: where an agent was killed, reads wait for `add`
                server = self._servers["checkpoints" if kind == "checkpoint" else "blobs"]
                warm = server.known(_name(reader))
                place = _Place(reader, server, server.add(_name(reader), reader))
                self._adopt_mount(place)
                self._places[uid, blob_id] = place
                return reader, warm or place.mount is not None
        except BaseException:
            self._cache.release(blob)
            raise

    def _adopt_mount(self, place: _Place) -> None:
        """Use the mount of a job, or an agent, before this one; with the lock held."""
        reader = place.reader
        idle = self._idle.pop((reader.uid, reader.blob.id), None)
        if idle is not None and idle.gone:
            idle.mount.close()
        place.mount = KernelMount.adopt(self._folder(reader))
        place.mount_reads_cache = idle is not None and place.mount is not None

    def hold(
        self, blob_id: str, *, kind: str, uid: int, gid: int, sources: list[Source], on_fault: OnFault
    ) -> Reader:
        """As `take`, of a blob that an agent before this one had: what it is the cache says.

        Raises BootseerError or OSError when it does not.
        """
        kept = self._cache.manifest(blob_id, uid)
        reader, _ = self.take(
            blob_id,
            kept.layout,
            kept.digests,
            kind=kind,
            uid=uid,
            gid=gid,
            mtime_ns=0,
            sources=sources,
            on_fault=on_fault,
        )
        return reader

    def path(self, reader: Reader) -> Path:
        """Where the blob can be bound from: its cache file once it is complete, before that the FUSE file."""
        if not reader.blob.complete:
            return self.served_path(reader)
        self._places[reader.uid, reader.blob.id].bypassed = True
        return reader.blob.file.path

    def bypassed(self, reader: Reader) -> bool:
        """Whether `path` ever gave the cache's own file, whose reads are not seen."""
        return self._places[reader.uid, reader.blob.id].bypassed

    def push(self, reader: Reader) -> None:
        """Have blocks that are prefetched given to the kernel, which must know the file for that."""
        place = self._places[reader.uid, reader.blob.id]

        def push(offset: int, data: memoryview) -> None:
            if not place.server.store(_name(reader), offset, data):
                raise OSError(errno.ENOENT, "the kernel does not know the file", str(place.path))

        os.stat(place.path)
        reader.push = push

    def served_path(self, reader: Reader) -> Path:
        """The FUSE file, which its user may open by path."""
        return self._places[reader.uid, reader.blob.id].path

    def mount_image(self, reader: Reader) -> Path:
        """Have the kernel mount a trusted squashfs; gives where. Raises BootseerError."""
        place = self._places[reader.uid, reader.blob.id]
        folder = self._folder(reader)
        with place.mount_lock:
            if place.mount is None and not place.gone:
                path = self.path(reader)
                place.mount = KernelMount.open_image(path, folder, uid=reader.uid, gid=reader.gid)
                place.mount_reads_cache = path == reader.blob.file.path
        return folder

    def clone_mount(self, image: str, uid: int) -> int:
        """A detached mount of an image for its user's container; the caller closes the descriptor.

        image: the served path. Answers at once. Raises BootseerError when the kernel has not mounted it.
        """
        with self._lock:
            places = [place for (owner, _), place in self._places.items() if owner == uid]
        mount = next((place.mount for place in places if str(place.path) == image), None)
        if mount is None:
            raise NotFound(f"image {image[:200]!r}: the kernel has not mounted it for this user")
        return mount.clone()

    def give_back(self, reader: Reader, sources: list[Source], on_fault: OnFault) -> None:
        """Take the sources away, and let go of the blob when no other job uses it."""
        reader.remove_user(sources, on_fault)

        def forget() -> None:
            with self._lock:
                place = self._places.pop((reader.uid, reader.blob.id))
                _add(self._past, place.reader.usage)
            reader.push = None
            with place.mount_lock:
                place.gone = True
                self._put_away(place)
            place.server.remove(_name(reader))

        self._cache.release(reader.blob, on_last=forget)

    def _put_away(self, place: _Place) -> None:
        """Leave the mount for a while where it can do without the FUSE file, else close it."""
        blob, mount = place.reader.blob, place.mount
        if mount is None:
            return
        if blob.complete and not place.mount_reads_cache:
            try:
                mount.read_from(blob.file.path)
                place.mount_reads_cache = True
            except OSError as error:
                _log.info("blob %s: its mount is not kept: %s", blob.id[:12], error)
        if place.mount_reads_cache:
            with self._lock:
                self._idle[blob.uid, blob.id] = _Idle(mount, blob.file.path, os.fstat(blob.file.fd).st_ino)
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

    def usage(self) -> Usage:
        """What was read and fetched of all blobs since the agent started."""
        total = Usage()
        with self._lock:
            for usage in (self._past, *(place.reader.usage for place in self._places.values())):
                _add(total, usage)
        return total

    def settle(self) -> None:
        """Sessions of an agent before this one were taken up: what nobody uses of it goes."""
        with self._lock:
            used = {self._folder(place.reader) for place in self._places.values()}
            used |= {idle.mount.folder for idle in self._idle.values()}
            for folder in self._images.glob("*/*"):
                if folder not in used and (mount := KernelMount.adopt(folder)):
                    mount.close()
        for server in self._servers.values():
            server.settle()

    def _folder(self, reader: Reader) -> Path:
        return self._images / str(reader.uid) / reader.blob.id


def _add(total: Usage, more: Usage) -> None:
    for each in fields(Usage):
        if not each.name.endswith("_ns"):  # those are points in time
            setattr(total, each.name, getattr(total, each.name) + getattr(more, each.name))


def _name(reader: Reader) -> str:
    return f"{reader.uid}/{reader.blob.id}"
