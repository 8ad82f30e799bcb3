"""Where a blob's bytes come from: the objects behind a handle of the user's process.

A handle ends with its process. The next process of the job opens the same objects again, when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, Layout, decode
from bootseer_slurm.blob.names import publisher_of
from bootseer_slurm.blob.published import is_published
from bootseer_slurm.cache.sources import Source
from bootseer_slurm.errors import InputError, NotFound, StoreError
from bootseer_slurm.image.signing import Key, is_signed
from bootseer_slurm.userproc.client import Found, UserProcess
from bootseer_slurm.userproc.memory_file import memory_file_size
from bootseer_slurm.userproc.protocol import Resolve, StoredBlob

_OPEN_WAIT_S = 5.0  # another source may have the bytes
_FAILED_FOR_S = 2.0  # a store that did not answer is not asked again by each of many reads

# Gives the process of a job, or raises StoreError.
ProcessOfJob = Callable[[], UserProcess]
# Gives a handle to objects that a process has not open. Raises BootseerError.
OpenAgain = Callable[[UserProcess], int]


class Opened(NamedTuple):
    """A handle, and the process whose it is."""

    process: UserProcess
    handle: int


class Trust(NamedTuple):
    """The site's store and key, which tell who published a blob, and what is asked before bytes are kept.

    allow: so many bytes in memory; raises InputError when they are too many.
    """

    store_uri: str
    key: Key
    allow: Callable[[int], None]


class _Failed(NamedTuple):
    """Why a process could not open the objects, and until when it is not asked again."""

    process: UserProcess
    message: str
    until_s: float


class ObjectSource:
    """The objects behind one handle, as a source of the blob (cache.sources.Source). Thread-safe."""

    def __init__(
        self,
        name: str,
        layout: Layout,
        process: ProcessOfJob,
        open_again: OpenAgain,
        opened: Opened | None = None,
    ) -> None:
        """opened: a handle to begin with; without one they are opened when they are first read."""
        self.name = name
        self._layout = layout
        self._process = process
        self._open_again = open_again
        self._opened = opened
        self._failed: _Failed | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        process, handle = self._open()
        extent = self._layout.extent(offset, size_bytes)
        read = process.read(
            handle, extent.object, extent.offset, extent.size_bytes, demand=demand, fixed=fixed
        )
        with read as view:
            yield view

    def _open(self) -> Opened:
        """The handle in the process that there is now. Raises StoreError, NotFound where another file is.

        One reader opens it again. The others wait for that one, and share its failure: each alone would wait
        as long for the same silent store.
        """
        process = self._process()
        if not self._lock.acquire(timeout=_OPEN_WAIT_S):
            raise StoreError("it is being opened again, which takes long")
        try:
            if self._opened is None or self._opened.process is not process:
                failed = self._failed
                if failed and failed.process is process and time.monotonic() < failed.until_s:
                    raise StoreError(failed.message)
                self._opened = Opened(process, self._open_anew(process))
            return self._opened
        finally:
            self._lock.release()

    def _open_anew(self, process: UserProcess) -> int:
        try:
            return self._open_again(process)
        except StoreError as error:
            self._failed = _Failed(process, error.message, time.monotonic() + _FAILED_FOR_S)
            raise


@dataclass(frozen=True, slots=True)
class BlobDescription:
    """A blob's identity, and where its bytes come from. folder: in the store, "" of an unmanaged file.

    publisher: the user who made it, None where nothing but the user's process says so.
    """

    id: str
    layout: Layout
    digests: bytes | None
    sources: list[Source] = field(default_factory=list)
    folder: str = ""
    signature: str = ""
    publisher: int | None = None


def stored_blob(
    process: ProcessOfJob, opened: Opened, stored: StoredBlob, manifest_fd: int, trust: Trust
) -> BlobDescription:
    """A blob of the store, as the user's process says; who published it is found out here.

    opened: a handle to it. Raises IntegrityError, and what `trust.allow` raises.
    """
    publisher = publisher_of(stored.folder)
    in_store = is_published(manifest_fd, stored.folder, trust.store_uri)
    # Of a published one the very file that was looked at is read: the process may put no other beside it.
    size_bytes = os.fstat(manifest_fd).st_size if in_store else memory_file_size(manifest_fd)
    size_bytes = min(size_bytes, MANIFEST_LIMIT_BYTES)
    trust.allow(size_bytes)
    manifest = decode(os.pread(manifest_fd, size_bytes, 0))
    is_proven = in_store or (
        publisher is not None and is_signed(trust.key, publisher, manifest.id, stored.signature)
    )
    publisher = publisher if is_proven else None
    source = store_source(process, manifest.id, stored.folder, manifest.layout, opened)
    return BlobDescription(
        manifest.id, manifest.layout, manifest.digests, [source], stored.folder, stored.signature, publisher
    )


def store_source(
    process: ProcessOfJob, blob_id: str, folder: str, layout: Layout, opened: Opened | None = None
) -> ObjectSource:
    """A blob in this folder of the store."""
    return ObjectSource("store", layout, process, lambda current: current.reopen(blob_id, folder), opened)


def original_source(
    process: ProcessOfJob, original: OriginalFile, layout: Layout, opened: Opened | None = None
) -> ObjectSource:
    """The file where it lies, which holds the blob's bytes one after the other."""
    return ObjectSource("origin", replace(layout, objects=1), process, original.open_again, opened)


@dataclass(frozen=True, slots=True)
class OriginalFile:
    """A file that is used where it lies.

    uid: of the job's user. blob_id: of an unmanaged one; else the blob's digests say enough.
    """

    kind: str
    path: str
    uid: int
    blob_id: str = ""

    def open_again(self, process: UserProcess) -> int:
        """A handle to it. Raises StoreError, or NotFound when another file is there now."""
        try:
            resolved = process.resolve(Resolve(self.kind, self.path))
        except InputError as error:
            raise NotFound(f"{self.path}: is not there any more") from error
        if not isinstance(resolved, Found):
            raise NotFound(f"{self.path}: is a folder now")
        try:
            original = resolved.take_original()
            blob_ids = {""}
            if resolved.reply.identity:
                blob_ids.add(remote_id(resolved.reply.identity))
            elif original is not None:
                status = os.fstat(original)
                # Also as an earlier version's agent, which this one took over from, called another's file.
                blob_ids |= {unmanaged_id(self.path, status, each) for each in (self.uid, status.st_uid)}
            if original is not None:
                os.close(original)
            if resolved.reply.original_handle is None or self.blob_id not in blob_ids:
                raise NotFound(f"{self.path}: was replaced since it was looked up")
            return resolved.reply.original_handle
        finally:
            resolved.close()


def unmanaged_id(path: str, status: os.stat_result, uid: int) -> str:
    """The id of a file that is used where it lies: another one when it was changed or replaced.

    uid: of the user in whose cache it is. What agents kept of another's file before they looked at owners
    counts no more: its reader could reach into the process that read it.
    """
    inode = (path, status.st_dev, status.st_ino)
    content = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    owner = () if status.st_uid == uid else (status.st_uid,)
    identity = inode + content + owner
    return "file-" + hashlib.sha256(repr(identity).encode()).hexdigest()


def remote_id(identity: str) -> str:
    """The id of a file that is used where it lies in another store. identity: of checkpoint.striped."""
    return "file-" + hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()
