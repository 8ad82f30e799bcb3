"""Looking artifacts up with their user's rights: the original, the blobs of the store, handles to read both.

A checkpoint that is a folder is looked up file by file; its files are found here first.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import msgspec

from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, decode
from bootseer_slurm.blob.names import Base, Name, read_published
from bootseer_slurm.blob.squashfs.superblock import head_and_tables
from bootseer_slurm.blob.stripes import Stripes, open_stripes
from bootseer_slurm.checkpoint.locate import named_files, share_of
from bootseer_slurm.checkpoint.striped import MANIFEST, identity_of, open_file
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError
from bootseer_slurm.image.reference import registry_reference
from bootseer_slurm.store import ObjectReader
from bootseer_slurm.userproc.memory_file import make_memory_file
from bootseer_slurm.userproc.protocol import (
    FILES_LIMIT,
    CheckpointFile,
    CheckpointFolder,
    IsSame,
    Opened,
    Reopen,
    Reply,
    Resolve,
    Resolved,
    Same,
    StoredBlob,
)
from bootseer_slurm.userproc.worker.environments import Environments
from bootseer_slurm.userproc.worker.handles import Handles, StoreOfUser
from bootseer_slurm.userproc.worker.original import fingerprint_now, open_original

_WARNING_LIMIT = 4096
_SNAPSHOTS = ("docker://", "dir:/")  # names of images that stand for what was there when they were made


@dataclass(slots=True)
class _OpenBlob:
    """A blob of the store: what is said of it, its manifest's bytes, and its own."""

    said: StoredBlob
    manifest: bytes
    reader: ObjectReader


@dataclass(slots=True)
class _Found:
    """An artifact as far as it is known. readable: its bytes, from the store or where it lies."""

    name: str
    fds: list[int] = field(default_factory=list)
    fingerprint: str = ""
    readable: ObjectReader | None = None
    said: dict[str, Any] = field(default_factory=dict)


class Resolver:
    """Looks artifacts up; each public method is one operation of the protocol."""

    def __init__(self, store: StoreOfUser, handles: Handles) -> None:
        self._store = store
        self._handles = handles
        self._environments = Environments(store)

    def resolve(self, request: Resolve, _: bytes) -> tuple[Reply, list[int]]:
        role = ""
        if request.kind == "checkpoint" and request.nodes:
            files, message = named_files(request.name, newest_step=request.newest)
            if [file for file, _, _ in files] != [request.name]:
                shared = share_of(files, FILES_LIMIT, rank=request.rank, nodes=request.nodes)
                found = tuple(CheckpointFile(*each) for each in shared)
                return CheckpointFolder(found, len(files), message[:1000]), []
            role = files[0][1]
        reply, fds = self._resolve_one(request)
        return (msgspec.structs.replace(reply, role=role) if role else reply), fds

    def is_same(self, request: IsSame, _: bytes) -> tuple[Reply, list[int]]:
        if request.kind == "environment":
            fingerprint = self._environments.fingerprint_now(request.path, request.image)
        else:
            fingerprint = fingerprint_now(request.kind, request.path)
        return Same(fingerprint == request.fingerprint), []

    def reopen(self, request: Reopen, _: bytes) -> tuple[Reply, list[int]]:
        blob = Base(request.blob, request.folder)
        if "://" in blob.folder:
            opened = open_file(blob.folder)
            if opened.manifest is None or opened.manifest.id != blob.blob:
                raise IntegrityError(f"{blob.folder}: was written again since it was looked up")
            return Opened(self._handles.keep(opened.objects)), []
        return Opened(self._open_blob(blob).said.handle), []

    def _resolve_one(self, request: Resolve) -> tuple[Resolved, list[int]]:
        """Look up something that is one file, or one environment."""
        kind, name = request.kind, request.name
        if kind == "checkpoint" and "://" not in name and os.path.exists(f"{name}/{MANIFEST}"):
            return self._remote(f"file://{quote(os.path.realpath(name))}")
        found = _Found(name)
        if "://" not in name and not name.startswith(_SNAPSHOTS):
            self._open_original(kind, found)
        try:
            if not self._open_stored(request, found):
                return self._remote(name)
        except BootseerError as error:
            found.said["warning"] = error.message[:_WARNING_LIMIT]
        if kind == "image" and found.readable is not None:
            with contextlib.suppress(BootseerError):  # without them a mount reads them itself
                ranges = head_and_tables(found.readable, found.name)
                found.said["first"] = tuple((offset, count) for offset, count in ranges)
        return Resolved(fingerprint=found.fingerprint, **found.said), found.fds

    def _open_original(self, kind: str, found: _Found) -> None:
        """Open what the user named where it lies. Raises InputError."""
        found.name, fd, found.fingerprint, original = open_original(kind, found.name)
        found.fds.append(fd)
        found.said["has_original"] = True
        found.readable = original
        if original is not None:
            found.said |= {
                "size_bytes": original.size_bytes,
                "original_handle": self._handles.keep([original]),
            }

    def _open_stored(self, request: Resolve, found: _Found) -> bool:
        """Open what the store has of it; False of a checkpoint's URI that it does not have.

        Raises BootseerError.
        """
        kind, name = request.kind, found.name
        owner = os.fstat(found.fds[0]).st_uid if found.fds else None
        opened: list[_OpenBlob] = []
        if kind == "environment":
            environment = self._environments.look_up(name, request.image, request.job_class, owner)
            record, found.fingerprint = environment.record, environment.fingerprint
            found.said["image"] = environment.image
            if environment.installed:
                opened = self._open_blobs(environment.installed)
        else:
            record = self._record(name, request.digest, owner)
            if record and kind == "image" and name.startswith(_SNAPSHOTS):
                found.fingerprint = record.fingerprint  # what its tag means now is asked elsewhere, if at all
        if not opened and record and record.kind == kind and record.fingerprint == found.fingerprint:
            opened = self._open_blobs(record, or_fail=True)
        if record is None and kind == "checkpoint" and "://" in name:
            return False
        if opened:
            found.fds += [self._manifest_fd(blob, owner) for blob in opened]
            found.said["blobs"] = tuple(blob.said for blob in opened)
            found.readable = opened[0].reader
        elif record:
            changes = self._environments.changes(name, record)
            found.said["warning"] = f"{name} was changed since it was put into the store{changes}"
        return True

    def _remote(self, uri: str) -> tuple[Resolved, list[int]]:
        """A checkpoint that is named by its URI: a striped file, or one that is read as it lies."""
        opened = open_file(uri)
        if opened.manifest is not None:
            blob = StoredBlob(uri, self._handles.keep(opened.objects), "")
            return Resolved(blobs=(blob,)), [make_memory_file(opened.manifest.encode())]
        opened.close()
        identity = identity_of(uri)  # before and after it is opened: its bytes are kept under that
        opened = open_file(uri)
        if identity_of(uri) != identity:
            raise InputError(f"checkpoint {uri}: was written while it was looked up")
        handle, size_bytes = self._handles.keep(opened.objects), opened.layout.size_bytes
        return Resolved(original_handle=handle, size_bytes=size_bytes, identity=identity), []

    def _record(self, name: str, digest: str, owner: int | None) -> Name | None:
        """The record of a name in the store, or of an image under the digest that its tag stands for now."""
        store, uid = self._store.open(), os.getuid()
        record = read_published(store, uid, name, owner=owner)
        if digest and name.startswith("docker://") and not (record and record.fingerprint == digest):
            pinned = read_published(store, uid, registry_reference(name).pinned(digest).name)
            return pinned if pinned and pinned.fingerprint == digest else record
        return record

    def _open_blobs(self, record: Name, *, or_fail: bool = False) -> list[_OpenBlob]:
        """The blob that a name stands for, and the one below it; none where one of them is gone."""
        try:
            return [self._open_blob(blob) for blob in (record, record.base) if blob]
        except BootseerError:
            if or_fail:
                raise
            return []

    def _open_blob(self, blob: Name | Base) -> _OpenBlob:
        """Open a blob of the store. Raises IntegrityError, StoreError."""
        store, folder = self._store.open(), blob.folder
        content = store.read(f"{folder}/manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
        manifest = decode(content)
        if manifest.id != blob.blob:
            raise IntegrityError(f"{folder}: the manifest in the store is not the one that was saved")
        readers = open_stripes(store, folder, manifest.layout)
        said = StoredBlob(folder, self._handles.keep(readers), blob.signature)
        return _OpenBlob(said, content, Stripes(manifest.layout, readers))

    def _manifest_fd(self, blob: _OpenBlob, owner: int | None) -> int:
        """What the agent reads the manifest from: over another user's file it looks whose that is."""
        is_own, folder = owner in (None, os.getuid()), blob.said.folder
        fd = None if is_own else self._store.open().descriptor(f"{folder}/manifest")
        return make_memory_file(blob.manifest) if fd is None else fd
