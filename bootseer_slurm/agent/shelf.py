"""The blobs in use on this node: for each a pin in the cache, a reader, a file in a FUSE file system, and for
an image that the kernel may mount, that mount.

Jobs of one user that use the same blob share all of them. Thread-safe. Mounts of images lie below
<run>/images/<uid>/<blob id>, where only root may look; a container gets a detached copy of one.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from bootseer_slurm.blob.cache import Cache
from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.blob.reader import OnFault, Reader, Source, Usage
from bootseer_slurm.errors import NotFound
from bootseer_slurm.fuse import Server
from bootseer_slurm.image.kernel import KernelMount

_Key = tuple[int, str]


@dataclass(slots=True)
class _Place:
    """What stands on the shelf for one blob."""

    reader: Reader
    server: Server
    path: Path
    mount: KernelMount | None = None
    mount_lock: threading.Lock = field(default_factory=threading.Lock)
    gone: bool = False
    bypassed: bool = False  # somebody reads the cache's own file


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
                place.mount = KernelMount.adopt(self._folder(reader))  # of an agent before this one
                self._places[uid, blob_id] = place
                return reader, warm
        except BaseException:
            self._cache.release(blob)
            raise

    def hold(
        self, blob_id: str, *, kind: str, uid: int, gid: int, sources: list[Source], on_fault: OnFault
    ) -> Reader:
        """As `take`, of a blob that an agent before this one had: what it is the cache says.

        Raises BootseerError or OSError when it does not.
        """
        kept = self._cache.kept(blob_id, uid)
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
        return reader.blob.path

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
                place.mount = KernelMount.open_image(
                    self.path(reader), folder, uid=reader.uid, gid=reader.gid
                )
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
                if place.mount is not None:
                    place.mount.close()
            place.server.remove(_name(reader))

        self._cache.release(reader.blob, on_last=forget)

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
