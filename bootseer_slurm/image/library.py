"""The images in the store: made once, found by name, shown, checked, removed.

An image of a registry is known under its tag's name, with the manifest's digest as fingerprint, and under
its digest's name; all tags of a digest share one blob. Runs as the images' user, on any node. Of several
processes in the cluster that want an image, one makes it (blob/lease.py) and the others wait for that.

A folder (dir:/path) is a snapshot of when it was pushed: nothing looks at the folder again but another push.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from bootseer_slurm.blob.lease import make_once
from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, Layout, Manifest, decode
from bootseer_slurm.blob.names import (
    Name,
    list_names,
    read_name,
    read_published,
    remove_name,
    user_folder,
    write_name,
)
from bootseer_slurm.blob.writer import BlobWriter, Original
from bootseer_slurm.errors import BootseerError, IntegrityError, NotFound
from bootseer_slurm.image import registry
from bootseer_slurm.image.convert import convert, scratch_folder, unpack
from bootseer_slurm.image.reference import Folder, Reference
from bootseer_slurm.image.signed_packing import Packing
from bootseer_slurm.listener import SILENT, Listener, Progress
from bootseer_slurm.scratch import mark_finished
from bootseer_slurm.store import ObjectReader, Store


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An image that the store should have. made_from: the source, or the digest of its tag now."""

    source: Reference | Folder
    made_from: Reference | Folder
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image in the store. also: the other names of its blob."""

    name: Name
    layout: Layout
    also: tuple[str, ...]


def ensure(
    store: Store,
    source: Reference | Folder,
    *,
    digest: str | None = None,
    packing: Packing | None = None,
    listener: Listener = SILENT,
) -> Name:
    """Have an image in the store, as it is now; gives its name there.

    digest: what the registry says, when it was asked already. Without it the registry is asked, and when it
    does not answer, what the store has is used, with a warning.
    packing: makes an image that the kernel may mount; without one, whatever is quickest makes it.
    Raises NotFound when the registry has no such image, StoreError when the store fails, and BootseerError
    when the image cannot be fetched, unpacked or packed.
    """
    uid = os.getuid()
    if isinstance(source, Folder):
        wanted = _Wanted(source, source, _folder_fingerprint(source.path))
    else:
        stored = _usable(store, uid, source.name, "")
        if stored is not None and source.digest == stored.fingerprint:
            return stored  # no registry can have another image of this digest
        if digest is None:
            listener.stage("asking the registry", None)
            try:
                digest = registry.resolve(source)
            except registry.RegistryUnreachable as error:
                if stored is None:
                    raise
                listener.warn(f"{error.message}; the image of {stored.fingerprint[:19]} in the store is used")
                return stored
        wanted = _Wanted(source, source.pinned(digest), digest)
    return _look(store, uid, wanted) or _make_once(store, uid, wanted, packing, listener)


def list_images(store: Store, uid: int) -> tuple[list[Name], list[str]]:
    """The user's images by name, and what is wrong with records that are damaged. Raises StoreError."""
    names, damaged = list_names(store, uid)
    return [each for each in names if each.kind == "image"], damaged


def show(store: Store, uid: int, name: str) -> Image:
    """An image by its name in the store. Raises NotFound, IntegrityError or StoreError."""
    record = _record(store, uid, name)
    names, _ = list_names(store, uid)
    also = tuple(each.name for each in names if each.folder == record.folder and each.name != name)
    return Image(record, _manifest(store, record).layout, also)


def remove(store: Store, uid: int, name: str) -> bool:
    """Forget an image; its blob goes with its last name. Gives whether the blob went.

    The digest's own name does not keep a blob whose last tag is removed. Jobs that read it fall back to
    what their nodes have. Raises NotFound, IntegrityError or StoreError.
    """
    record = _record(store, uid, name)
    remove_name(store, uid, name)
    names, damaged = list_names(store, uid)
    others = [each for each in names if each.folder == record.folder]
    by_digest = [each for each in others if each.name.endswith(f"@{record.fingerprint}")]
    # A damaged record may be a name of this blob: then it stays, for `gc`.
    if damaged or len(others) > len(by_digest):
        return False
    for each in by_digest:
        remove_name(store, uid, each.name)
    store.remove(record.folder)
    return True


def verify(store: Store, uid: int, name: str, *, progress: Progress = lambda count: None) -> list[int]:
    """Read an image's whole blob from the store; gives the blocks whose bytes are not what they were.

    progress: told the bytes read since. Raises NotFound, StoreError when the store cannot be read, and
    IntegrityError when the manifest itself is damaged.
    """
    record = _record(store, uid, name)
    manifest = _manifest(store, record)
    layout = manifest.layout
    readers: list[ObjectReader | None] = []
    try:
        for index in range(layout.objects):
            try:
                readers.append(store.open(f"{record.folder}/{index}", bulk=True))
            except NotFound:
                readers.append(None)
        damaged = []
        buffer = memoryview(bytearray(layout.block_bytes))
        for block in range(layout.blocks):
            view = buffer[: layout.block_size(block)]
            extent = layout.extent(block * layout.block_bytes, len(view))
            reader = readers[extent.object]
            whole = reader is not None and reader.read_into(extent.offset, view) == len(view)
            if not whole or not manifest.agrees(block, view):
                damaged.append(block)
            progress(len(view))
        return damaged
    finally:
        for reader in readers:
            if reader is not None:
                reader.close()


def _make_once(store: Store, uid: int, wanted: _Wanted, packing: Packing | None, listener: Listener) -> Name:
    """Make the image, or wait until another process in the cluster has."""
    made, _ = make_once(
        store,
        uid,
        wanted.made_from.name,
        look=lambda: _look(store, uid, wanted),
        make=lambda: _make(store, uid, wanted, packing, listener),
        on_wait=lambda holder: listener.stage(f"waiting for {holder}", None),
    )
    return made


def _make(store: Store, uid: int, wanted: _Wanted, packing: Packing | None, listener: Listener) -> Name:
    """Convert an image and put it into the store."""
    with scratch_folder() as scratch:
        file = _squashfs(wanted.made_from, scratch, packing, listener)
        if (
            isinstance(wanted.source, Folder)
            and _folder_fingerprint(wanted.source.path) != wanted.fingerprint
        ):
            raise BootseerError(
                f"{wanted.source.name}: was changed while it was packed",
                hint="push it again when it is complete",
            )
        listener.stage("storing", file.stat().st_size)
        made = BlobWriter(store, progress=listener.progress).store_named(
            file,
            Original("image", wanted.made_from.name, wanted.fingerprint),
            sign=packing.signature if packing else lambda blob: "",
        )
    return _known_as(store, uid, made, wanted.source.name)


def _squashfs(source: Reference | Folder, scratch: Path, packing: Packing | None, listener: Listener) -> Path:
    """The image as a file in `scratch`."""
    if packing is None:
        return convert(source, scratch, listener)
    rootfs = Path(source.path) if isinstance(source, Folder) else unpack(source, scratch, listener)
    listener.stage("packing", None)
    file = scratch / "image.sqsh"
    packing.pack(rootfs, file)
    mark_finished(file)
    return file


def _look(store: Store, uid: int, wanted: _Wanted) -> Name | None:
    """The image of this fingerprint, if the store has it under the tag or the digest."""
    found = _usable(store, uid, wanted.source.name, wanted.fingerprint)
    if found is not None or wanted.made_from is wanted.source:
        return found
    found = _usable(store, uid, wanted.made_from.name, wanted.fingerprint)
    return None if found is None else _known_as(store, uid, found, wanted.source.name)


def _known_as(store: Store, uid: int, record: Name, name: str) -> Name:
    """Let an image have another name too."""
    if record.name == name or not record.folder.startswith(f"{user_folder(uid)}/"):
        return record  # root's own blob gets no names of a user
    other = replace(record, name=name)
    write_name(store, uid, other)
    return other


def _usable(store: Store, uid: int, name: str, fingerprint: str) -> Name | None:
    """The record of an image whose blob is there; "" takes any fingerprint. A damaged one is made anew."""
    try:
        record = read_published(store, uid, name)
    except IntegrityError:
        return None
    if record is None or record.kind != "image" or fingerprint not in ("", record.fingerprint):
        return None
    try:
        store.open(f"{record.folder}/manifest").close()
    except NotFound:
        return None
    return record


def _record(store: Store, uid: int, name: str) -> Name:
    record = read_name(store, uid, name)
    if record is None or record.kind != "image":
        raise NotFound(f"image {name}: not in the store", hint="`bootseer image list` shows what is")
    return record


def _manifest(store: Store, record: Name) -> Manifest:
    content = store.read(f"{record.folder}/manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
    manifest = decode(content)
    if manifest.id != record.blob:
        raise IntegrityError(f"image {record.name}: its manifest is not the one it was stored with")
    return manifest


def _folder_fingerprint(path: str) -> str:
    """A digest of names, modes, sizes, times and links of a tree. Raises NotFound or BootseerError."""
    if not Path(path).is_dir():
        raise NotFound(f"{path}: no such folder")
    digest = hashlib.sha256()

    def fail(error: OSError) -> None:
        raise BootseerError(f"{error.filename}: cannot be looked at: {error.strerror}") from error

    for folder, folders, files in os.walk(path, onerror=fail):
        folders.sort()
        for name in sorted((*folders, *files)):
            full = os.path.join(folder, name)
            status = os.lstat(full)
            link = os.readlink(full) if stat.S_ISLNK(status.st_mode) else ""
            # A folder's own size and time change with what lies in it, which is looked at anyway.
            size_time = () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
            row = (os.path.relpath(full, path), status.st_mode, *size_time, link)
            digest.update(repr(row).encode("utf-8", "surrogateescape"))
    return f"tree:{digest.hexdigest()}"
