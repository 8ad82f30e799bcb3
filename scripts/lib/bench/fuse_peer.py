"""Serves one file with pyfuse3, the usual way, so that a benchmark can measure a peer of our FUSE server.

    python fuse_peer.py FILE MOUNTPOINT     serves FILE as MOUNTPOINT/blob until SIGTERM or fusermount3 -u

Says "ready" on standard output when it serves. Needs pyfuse3 from PyPI, in a virtual environment of its own:
built with gcc, pkg-config and libfuse3-dev. Reads are as large as pyfuse3 lets them be: it takes libfuse's
defaults at INIT, where no read is larger than 128 KiB, whatever readahead the caller sets at
/sys/class/bdi/<major:minor>/read_ahead_kb.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

_FILE_INODE = pyfuse3.ROOT_INODE + 1
_VALID_S = 86400


class OneFile(pyfuse3.Operations):  # type: ignore[misc]
    """A folder with one file, "blob", whose bytes come from a descriptor."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._size_bytes = os.fstat(fd).st_size

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.attr_timeout = entry.entry_timeout = _VALID_S
        is_file = inode == _FILE_INODE
        entry.st_mode = stat.S_IFREG | 0o444 if is_file else stat.S_IFDIR | 0o755
        entry.st_size = self._size_bytes if is_file else 0
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if parent_inode != pyfuse3.ROOT_INODE or name != b"blob":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_FILE_INODE)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(self._fd, size, off)


def main() -> None:
    """Serve until unmounted."""
    path, mountpoint = sys.argv[1:]
    options = set(pyfuse3.default_options) | {"fsname=peer", "ro"}
    pyfuse3.init(OneFile(os.open(path, os.O_RDONLY)), mountpoint, options)
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
