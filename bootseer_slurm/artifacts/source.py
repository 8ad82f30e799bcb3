"""Where a blob's bytes come from: the objects behind a handle of the user's process."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, Layout, decode
from bootseer_slurm.blob.names import publisher_of
from bootseer_slurm.blob.published import is_published
from bootseer_slurm.cache.sources import Source
from bootseer_slurm.image.signing import Key, is_signed
from bootseer_slurm.userproc.client import UserProcess
from bootseer_slurm.userproc.memory_file import memory_file_size
from bootseer_slurm.userproc.protocol import StoredBlob


class ObjectSource:
    """The objects behind one handle, as a source of the blob (cache.sources.Source)."""

    def __init__(self, name: str, process: UserProcess, handle: int, layout: Layout) -> None:
        self.name = name
        self._process = process
        self._handle = handle
        self._layout = layout

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        extent = self._layout.extent(offset, size_bytes)
        read = self._process.read(
            self._handle, extent.object, extent.offset, extent.size_bytes, demand=demand, fixed=fixed
        )
        with read as view:
            yield view


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
    process: UserProcess,
    stored: StoredBlob,
    manifest_fd: int,
    *,
    store_uri: str,
    key: Key,
    allow: Callable[[int], None],
) -> BlobDescription:
    """A blob of the store, as the user's process says; who published it is found out here.

    key: the site's. allow: asked before so many bytes are kept in memory. Raises IntegrityError, and what
    `allow` raises.
    """
    publisher = publisher_of(stored.folder)
    in_store = is_published(manifest_fd, stored.folder, store_uri)
    # Of a published one the very file that was looked at is read: the process may put no other beside it.
    size_bytes = os.fstat(manifest_fd).st_size if in_store else memory_file_size(manifest_fd)
    size_bytes = min(size_bytes, MANIFEST_LIMIT_BYTES)
    allow(size_bytes)
    manifest = decode(os.pread(manifest_fd, size_bytes, 0))
    if not in_store and (publisher is None or not is_signed(key, publisher, manifest.id, stored.signature)):
        publisher = None
    source = ObjectSource("store", process, stored.handle, manifest.layout)
    return BlobDescription(
        manifest.id, manifest.layout, manifest.digests, [source], stored.folder, stored.signature, publisher
    )


def original_source(process: UserProcess, handle: int, layout: Layout) -> ObjectSource:
    """The file where it lies, which holds the blob's bytes one after the other."""
    return ObjectSource("origin", process, handle, replace(layout, objects=1))


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
