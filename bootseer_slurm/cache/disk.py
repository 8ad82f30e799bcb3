"""A blob's folder in the cache: its files, when they can be believed, and who may remove them.

    <cache>/<uid>/<blob id>/manifest  what the blob is (blob/manifest.py); written first
    <cache>/<uid>/<blob id>/data      the blocks, at their own offsets; its user may read it (datafile.py)
    <cache>/<uid>/<blob id>/blocks    which of them are there: one line of JSON, a byte a block, their sha256;
                                      written after data was synced. The line says in which
                                      boot, and what inode and time of change data had then
    <cache>/<uid>/<blob id>/digests   of an unmanaged file: the digests seen so far, and their sha256
    <cache>/<uid>/<blob id>/used      its time is that of the last use; whoever uses the blob holds a shared
                                      flock(2) on it, whoever removes it the exclusive one

A file is replaced in one step. Blocks count at once where `blocks` was written in this boot and data did not
change since; otherwise their digests are compared before they are shown (UNCHECKED).
Any process of root may use this module; nothing here waits for more than a removal.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bootseer_slurm.blob.digest import DIGEST_BYTES, NO_DIGEST, digest_slice
from bootseer_slurm.blob.manifest import Layout, decode, decode_unmanaged
from bootseer_slurm.cache.live import IN_FLIGHT, MISSING, PRESENT, UNCHECKED, boot_id, is_live, read_live
from bootseer_slurm.errors import IntegrityError

_UNMANAGED = "file-"  # what the ids of unmanaged files begin with


@dataclass(frozen=True, slots=True)
class BlobFolder:
    """The folder of one blob of one user on this node, and the blob's file of live state."""

    uid: int
    id: str
    path: Path
    live: Path

    @property
    def in_use(self) -> bool:
        """Whether an agent uses the blob, or did when it was killed."""
        if is_live(self.live):
            return True
        try:
            with open(self.path / "used", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    @property
    def disk_bytes(self) -> int:
        """Bytes that its data takes on the disk."""
        with contextlib.suppress(OSError):
            return os.lstat(self.path / "data").st_blocks * 512
        return 0

    @property
    def used_s(self) -> float:
        """When it was last used, in seconds since the epoch; 0 when that is not known."""
        with contextlib.suppress(OSError):
            return os.lstat(self.path / "used").st_mtime
        return 0.0

    def touch(self) -> None:
        """Note that the blob was used now."""
        with contextlib.suppress(OSError):
            os.utime(self.path / "used")


@dataclass(frozen=True, slots=True)
class CachedManifest:
    """The manifest that a folder has of its blob. digests: None for an unmanaged file."""

    kind: str
    layout: Layout
    digests: bytes | None


def blob_folder(root: Path, live: Path, uid: int, blob_id: str) -> BlobFolder:
    """The folder of a blob, whether it is there or not."""
    return BlobFolder(uid, blob_id, root / str(uid) / blob_id, live / f"{uid}.{blob_id}")


def blob_folders(root: Path, live: Path) -> list[BlobFolder]:
    """The folders of all blobs of a cache, the longest unused first."""
    found = [blob_folder(root, live, int(each.parent.name), each.name) for each in root.glob("[0-9]*/*")
             if each.parent.name.isdecimal()]  # fmt: skip
    return sorted(found, key=lambda folder: folder.used_s)


def read_manifest(folder: BlobFolder) -> CachedManifest:
    """The manifest in a folder. Raises IntegrityError or OSError when there is none of this blob."""
    content = (folder.path / "manifest").read_bytes()
    if folder.id.startswith(_UNMANAGED):
        return CachedManifest("file", decode_unmanaged(content), None)
    manifest = decode(content)
    if hashlib.sha256(content).hexdigest() != folder.id:
        raise IntegrityError("manifest is not this blob's")
    return CachedManifest(manifest.kind, manifest.layout, manifest.digests)


def keep_manifest(folder: BlobFolder, manifest: bytes) -> bool:
    """Put the manifest into the folder; gives whether it was there. Raises OSError."""
    path = folder.path / "manifest"
    with contextlib.suppress(OSError):
        if path.read_bytes() == manifest:
            return True
    # First: digests that another manifest left would count as this one's, were the agent killed here.
    folder.live.unlink(missing_ok=True)
    (folder.path / "blocks").unlink(missing_ok=True)
    replace(path, manifest)
    return False


def read_state(
    folder: BlobFolder, layout: Layout, *, unmanaged: bool, data: os.stat_result
) -> tuple[bytes, bytes] | None:
    """The states of the blocks and, of an unmanaged file, the digests; None when nothing can be believed.

    data: the status of the data file. Gives MISSING, PRESENT and UNCHECKED only.
    """
    if data.st_size != layout.size_bytes:
        return None
    live = read_live(folder.live, layout, unmanaged=unmanaged, data=data)
    states, digests = live or _read_saved(folder.path, layout, unmanaged, data) or (b"", b"")
    if len(states) != layout.blocks or set(states) - {MISSING, PRESENT, IN_FLIGHT, UNCHECKED}:
        return None
    if unmanaged:
        return _without_torn(states, digests)
    return states.replace(bytes([IN_FLIGHT]), bytes([MISSING])), digests


def write_state(folder: Path, states: bytes, digests: bytes | None, data: os.stat_result) -> None:
    """Put the state on disk; data was synced, and had this status then. Raises OSError."""
    if digests is not None:
        replace(folder / "digests", _sealed(digests))
    header = {"boot": boot_id(), "inode": data.st_ino, "mtime_ns": data.st_mtime_ns}
    line = json.dumps(header).encode() + b"\n"
    replace(folder / "blocks", _sealed(line + states.replace(bytes([IN_FLIGHT]), bytes([MISSING]))))


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step. Raises OSError, and leaves the old one."""
    temporary = path.with_suffix(".new")
    try:
        temporary.write_bytes(content)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def use(folder: Path) -> int:
    """Take the right to use a folder, making it first where it is not there; closing the descriptor ends it.

    Waits while the folder is being removed. Raises OSError.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # removed just now
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if _is_at(fd, folder / "used"):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


@contextlib.contextmanager
def share(folder: BlobFolder) -> Iterator[int]:
    """Use a folder that is there for a while. Gives the descriptor of its lock. Raises OSError."""
    fd = os.open(folder.path / "used", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield fd
    finally:
        os.close(fd)


def make_exclusive(fd: int, folder: BlobFolder) -> bool:
    """Turn a shared use into the exclusive one, if nobody else uses the blob."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_at(fd, folder.path / "used") and not is_live(folder.live)


def remove(folder: BlobFolder) -> bool:
    """Remove a blob that nobody uses; False when somebody does. Cut off, it leaves no wrong state."""
    try:
        fd = os.open(folder.path / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:  # not a blob's folder at all: nobody can be using it
        _clear(folder.path)
        return not folder.path.exists()
    try:
        if not make_exclusive(fd, folder):
            return False
        _clear(folder.path)
        folder.live.unlink(missing_ok=True)
    finally:
        os.close(fd)
    return True


def _clear(folder: Path) -> None:
    """Remove a folder: `blocks` first, since nothing counts without it, and `used`, with its lock, last."""
    with contextlib.suppress(OSError):
        (folder / "blocks").unlink(missing_ok=True)
    if folder.is_symlink() or not folder.is_dir():
        with contextlib.suppress(OSError):
            folder.unlink()
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "used"):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_at(fd: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    return False


def _read_saved(
    folder: Path, layout: Layout, unmanaged: bool, data: os.stat_result
) -> tuple[bytes, bytes] | None:
    try:
        line, _, states = _unsealed((folder / "blocks").read_bytes()).partition(b"\n")
        header = json.loads(line)
        unchanged = header == {"boot": boot_id(), "inode": data.st_ino, "mtime_ns": data.st_mtime_ns}
        digests = _unsealed((folder / "digests").read_bytes()) if unmanaged else b""
    except (OSError, ValueError):
        return None
    if unmanaged and len(digests) != layout.blocks * DIGEST_BYTES:
        return None
    return (states if unchanged else states.replace(bytes([PRESENT]), bytes([UNCHECKED]))), digests


def _without_torn(states: bytes, digests: bytes) -> tuple[bytes, bytes]:
    """A block in flight has a digest that may be half written; a block without one has no proof."""
    whole, kept = bytearray(states), bytearray(digests)
    for block, state in enumerate(states):
        own = digest_slice(block)
        if state == IN_FLIGHT:
            kept[own] = NO_DIGEST
        if state == IN_FLIGHT or kept[own] == NO_DIGEST:
            whole[block] = MISSING
    return bytes(whole), bytes(kept)


def _sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def _unsealed(content: bytes) -> bytes:
    """The content that was sealed. Raises ValueError where it is not whole."""
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise ValueError("is not whole")
    return content[:-DIGEST_BYTES]
