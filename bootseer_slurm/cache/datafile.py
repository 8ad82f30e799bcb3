"""The file of a cached blob's bytes, at their own offsets: sparse, root's, and readable by its user.

Its user may read it by an ACL (acl(5)), and does not own it: an owner can take a lease, and whoever opens the
file for writing would wait for that (fcntl(2), F_SETLEASE). Where the disk has no ACLs he does own it, and
nothing here waits for his lease. Knows nothing of blocks: which bytes count is said in cache/blocks.py.
Thread-safe.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
import weakref
from collections.abc import Iterable

from bootseer_slurm.blob.digest import DIGEST_BYTES
from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache.bounds import Bounds
from bootseer_slurm.cache.disk import BlobFolder, read_state

_log = logging.getLogger(__name__)
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# linux/posix_acl_xattr.h: the version; then tag, permissions and id of each entry, in the order of the tags
_ACL_VERSION = struct.Struct("<I").pack(2)
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_OWNER, _ACL_USER, _ACL_GROUP, _ACL_MASK, _ACL_OTHER = 1, 2, 4, 16, 32
_ACL_READ, _ACL_NO_ID = 4, 0xFFFFFFFF


class DataFile:
    """The open file, until the last reference goes or `close`."""

    def __init__(self, folder: BlobFolder, fd: int, size_bytes: int, bounds: Bounds) -> None:
        """fd: the open file, which is closed with this. size_bytes: of the whole blob."""
        self.path = folder.path / "data"
        self.fd = fd
        # Not before the last reference goes: a server thread may be about to read from it.
        self.close = weakref.finalize(self, os.close, fd)
        self._size_bytes = size_bytes
        self._bounds = bounds
        self._unasked_bytes = bounds.step_bytes
        self._writing = threading.Lock()  # the kernel takes one write of a file, and has others spin
        self._uid = folder.uid
        self.why_full = bounds.refusal(0, blob_bytes=size_bytes, uid=folder.uid)
        self.full = bool(self.why_full)  # the disk, the cache or its user's share is: bytes are not kept

    def write(self, offset: int, view: memoryview) -> bool:
        """Keep checked bytes; False when the disk or the cache has no room for them."""
        if self.full:
            return False
        try:
            self._unasked_bytes += len(view)
            if self._unasked_bytes >= self._bounds.step_bytes:
                self._unasked_bytes = 0
                if why := self._bounds.refusal(len(view), blob_bytes=self._size_bytes, uid=self._uid):
                    self.why_full, self.full = why, True
                    return False
            done = 0
            with self._writing:
                while done < len(view):
                    done += os.pwrite(self.fd, view[done:], offset + done)
        except OSError as error:  # full, or now read-only: the bytes in hand are served all the same
            _log.warning("%s: blocks are no longer kept: %s", self.path, error.strerror)
            self.why_full, self.full = "the cache's disk is full", True
            return False
        return True

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Bytes of blocks that are present, or claimed as unchecked. Raises OSError."""
        return os.pread(self.fd, size_bytes, offset)

    def sync(self) -> bool:
        """Have on disk what was written.

        False where that fails: the kernel may have lost it, and says so once. No more bytes are kept then.
        """
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            _log.warning("%s: cannot be synced: %s", self.path, error)
            self.why_full, self.full = "the cache's disk fails", True
            return False
        return True

    def drop_pages(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the synced bytes of these ranges (offset, bytes) leave the kernel's memory."""
        for offset, size_bytes in ranges:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)


def open_data(
    folder: BlobFolder, layout: Layout, gid: int, *, unmanaged: bool, known: bool
) -> tuple[int, bytes, bytes]:
    """Take over the file that is there, else make a new one.

    Gives its descriptor, the states of the blocks and, of an unmanaged file, their digests.
    known: the folder had this blob's manifest already. Raises OSError.
    """
    path = folder.path / "data"
    # BlockingIOError: its user has a lease on it, and he may keep that file.
    with contextlib.suppress(FileNotFoundError, BlockingIOError), contextlib.ExitStack() as on_error:
        fd = os.open(path, _FLAGS)
        on_error.callback(os.close, fd)
        _let_read(fd, folder.uid, gid)
        state = read_state(folder, layout, unmanaged=unmanaged, data=os.fstat(fd))
        if known and state is not None:
            on_error.pop_all()
            return fd, *state
    # Another file, and not this one emptied: a container may still have that.
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with contextlib.ExitStack() as on_error:
        fd = os.open(new, _FLAGS | os.O_CREAT | os.O_EXCL, 0o400)
        on_error.callback(os.close, fd)
        _let_read(fd, folder.uid, gid)
        os.ftruncate(fd, layout.size_bytes)
        new.rename(path)
        on_error.pop_all()
    return fd, bytes(layout.blocks), bytes(layout.blocks * DIGEST_BYTES if unmanaged else 0)


def _let_read(fd: int, uid: int, gid: int) -> None:
    """Have a user read the file, and nobody else. Raises OSError."""
    entries = (
        (_ACL_OWNER, _ACL_READ, _ACL_NO_ID),
        (_ACL_USER, _ACL_READ, uid),
        (_ACL_GROUP, 0, _ACL_NO_ID),
        (_ACL_MASK, _ACL_READ, _ACL_NO_ID),
        (_ACL_OTHER, 0, _ACL_NO_ID),
    )
    acl = _ACL_VERSION + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)
    owner = 0
    try:
        os.setxattr(fd, "system.posix_acl_access", acl)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        owner = uid
        os.fchmod(fd, 0o400)
    os.fchown(fd, owner, gid)
