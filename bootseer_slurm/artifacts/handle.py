"""A blob in use by one job: its handle, and what all handles of the same blob share.

The handle is the blob's user: it brings sources, is told of faults, and knows how the blob was used since it
was opened. Jobs of one user that use the same blob share an OpenBlob: the reader, the file in a FUSE file
system, and for an image that the kernel may mount, that mount. Thread-safe.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bootseer_slurm.cache.fetching import Push, Usage
from bootseer_slurm.cache.reader import MOUNTED_PATIENCE_S, Reader
from bootseer_slurm.cache.sources import Exchange, OnFault, Source
from bootseer_slurm.cache.waits import Waited
from bootseer_slurm.fuse import Server
from bootseer_slurm.image.kernel_mount import KernelMount


@dataclass(slots=True, eq=False)
class OpenBlob:
    """One blob in use on this node.

    path: its FUSE file, once the server has it. mount_folder: for an image, where the kernel mounts it.
    mount_reads_cache: the mount reads the cache's own file, not the FUSE file. gone: nobody uses it.
    bypassed: somebody reads the cache's own file, unseen.
    """

    reader: Reader
    server: Server
    mount_folder: Path
    path: Path = Path()
    mount: KernelMount | None = None
    mount_reads_cache: bool = False
    mount_lock: threading.Lock = field(default_factory=threading.Lock)
    gone: bool = False
    bypassed: bool = False

    @property
    def name(self) -> str:
        """Its path below the FUSE file system."""
        return f"{self.reader.uid}/{self.reader.blob.id}"

    def bind_path(self) -> Path:
        """Where it can be bound from: its cache file once it is complete, before that the FUSE file."""
        if not self.reader.blob.complete:
            return self.path
        self.bypassed = True
        return self.reader.blob.file.path

    def mount_image(self) -> Path:
        """Have the kernel mount a trusted squashfs; gives where. Raises BootseerError."""
        reader = self.reader
        self.become_mounted()
        with self.mount_lock:
            if self.mount is None and not self.gone:
                path = self.bind_path()
                self.mount = KernelMount.open_image(path, self.mount_folder, uid=reader.uid, gid=reader.gid)
                self.mount_reads_cache = path == reader.blob.file.path
        return self.mount_folder

    def become_mounted(self) -> None:
        """A file system lies in it: who waits for its blocks cannot be killed, and is not kept waiting."""
        self.reader.patience_s = MOUNTED_PATIENCE_S

    def fail_reads(self, before_s: float) -> bool:
        """Fail its reads that wait since before a time.monotonic(); tells whether there were any."""
        return self.server.fail_reads(self.name, before_s)

    def store(self, offset: int, data: memoryview) -> None:
        """Give bytes of it to the kernel. Raises OSError where the kernel does not know the file."""
        if not self.server.store(self.name, offset, data):
            raise OSError(errno.ENOENT, "the kernel does not know the file", str(self.path))


class _Node(Protocol):
    """The blobs that are open on this node."""

    def close(self, handle: BlobHandle) -> None:
        """The handle's job does not use the blob any more."""


class BlobHandle:
    """A blob in use by one job, until `close`."""

    def __init__(
        self, node: _Node, blob: OpenBlob, sources: Sequence[Source], on_fault: OnFault, *, warm: bool
    ) -> None:
        """warm: the kernel may hold pages of it, and reads of these are not seen."""
        self.blob = blob
        self.reader = blob.reader
        self.sources = sources
        self.on_fault = on_fault
        self.cached_bytes = 0  # when it was opened
        self.push: Push | None = None  # where what is prefetched is given to the kernel
        self._node = node
        self.warm = warm
        self._before = Usage()
        self._waits_from = self.reader.waits.baseline()

    def begin(self) -> None:
        """Count from now on. The reader knows the sources already."""
        self.cached_bytes = self.reader.blob.present_bytes
        self._before = dataclasses.replace(self.reader.usage)

    def exchange(self, source: Exchange) -> None:
        """Have other nodes give and get the blob, until `close`."""
        self.sources = (*self.sources, source)
        self.reader.sources.look_again()

    @property
    def served_path(self) -> Path:
        """Where the blob can be opened by its user."""
        return self.blob.path

    @property
    def usage(self) -> Usage:
        """The use of the blob since it was opened, by the user's other jobs too.

        `first_ns` and `last_ns` are points in time.
        """
        since = dataclasses.replace(self.reader.usage)
        since.add(self._before, times=-1)
        return since

    @property
    def waited(self) -> Waited:
        """How long its reads have waited since it was opened, those of the user's other jobs too."""
        return self.reader.waits.since(self._waits_from)

    @property
    def is_seen(self) -> bool:
        """Whether all reads of it come to the reader, and none is answered by the kernel alone."""
        pushed = self.reader.usage.pushed_bytes > self._before.pushed_bytes
        return not (self.warm or pushed or self.blob.bypassed)

    def push_prefetched(self) -> None:
        """Have what is prefetched given to the kernel, which must know the file for that. Raises OSError."""
        os.stat(self.blob.path)
        self.push = self.blob.store

    def close(self) -> None:
        """Let go of the blob."""
        self.push = None
        self.reader.waits.forget(self._waits_from)
        for source in self.sources:
            if isinstance(source, Exchange):
                source.close()
        self._node.close(self)
