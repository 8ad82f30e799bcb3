"""Blobs that a job used under an agent that was killed, served again by the agent after that one.

After a restart the agent keeps serving the blob that the job uses, even if its name now points elsewhere. So
each layer leaves a record in the job's journal, and its blob is served from the cache at once. The bytes that
the cache lacks come from where they came from before; that is opened when the first of them is read.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bootseer_slurm.artifacts.handle import BlobHandle
from bootseer_slurm.artifacts.open_blobs import OpenBlobs, Use
from bootseer_slurm.artifacts.source import ObjectSource, original_source, remote_id, unmanaged_id
from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache.sources import OnFault
from bootseer_slurm.errors import InputError, NotFound
from bootseer_slurm.userproc.client import Found as Resolution
from bootseer_slurm.userproc.client import UserProcess
from bootseer_slurm.userproc.protocol import Resolve


@dataclass(frozen=True, slots=True)
class Found:
    """A blob that the job was given. path: of an unmanaged file. folder: of a blob in the store."""

    blob: str
    kind: str
    path: str
    folder: str


class _LateSource:
    """Where the bytes of one such blob come from, opened when it is first read (cache.sources.Source)."""

    def __init__(self, found: Found, layout: Layout, process: Callable[[], UserProcess], uid: int) -> None:
        """process: gives the job's, or raises StoreError. uid: the job's user."""
        self.name = "store" if found.folder else "origin"
        self._layout = layout
        self._found = found
        self._process = process
        self._uid = uid
        self._opened: ObjectSource | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        with self._open().read(offset, size_bytes, demand=demand, fixed=fixed) as view:
            yield view

    def _open(self) -> ObjectSource:
        """Open it. Raises StoreError, or NotFound when another file is there now."""
        with self._lock:
            if self._opened is None:
                process, found = self._process(), self._found
                if found.folder:
                    handle = process.reopen(found.blob, found.folder)
                    self._opened = ObjectSource(self.name, process, handle, self._layout)
                else:
                    handle = _reopen_original(process, found, self._uid)
                    self._opened = original_source(process, handle, self._layout)
            return self._opened


def reattach(
    found: Found, blobs: OpenBlobs, use: Use, process: Callable[[], UserProcess], on_fault: OnFault
) -> BlobHandle:
    """A handle to a blob that a job used before. Raises BootseerError or OSError."""
    description = blobs.describe(found.blob, use.uid)
    description.sources.append(_LateSource(found, description.layout, process, use.uid))
    return blobs.open(description, use, on_fault)


def _reopen_original(process: UserProcess, found: Found, uid: int) -> int:
    """The handle of an unmanaged file. Raises StoreError, or NotFound when another file is there now."""
    try:
        resolved = process.resolve(Resolve(found.kind, found.path))
    except InputError as error:
        raise NotFound(f"{found.path}: is not there any more") from error
    if not isinstance(resolved, Resolution):
        raise NotFound(f"{found.path}: is a folder now")
    try:
        original = resolved.take_original()
        blob_ids: set[str] = set()
        if resolved.reply.identity:
            blob_ids.add(remote_id(resolved.reply.identity))
        elif original is not None:
            status = os.fstat(original)
            # Also as an earlier version's agent, which this one took over from, called another's file.
            blob_ids |= {unmanaged_id(found.path, status, each) for each in (uid, status.st_uid)}
        if original is not None:
            os.close(original)
        if found.blob not in blob_ids or resolved.reply.original_handle is None:
            raise NotFound(f"{found.path}: was replaced since it was looked up")
        return resolved.reply.original_handle
    finally:
        resolved.close()
