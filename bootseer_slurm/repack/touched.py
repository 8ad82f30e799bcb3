"""Small files in a mounted image that were read: those of which the kernel keeps pages.

The recorder sees blocks of the image, and in a fragment lie many small files. Pages tell them
apart. They are of this mount alone, which was made for the start, so nothing else has read them.
Where memory was short some have gone; then the next start reads such a file in its turn. Runs as
the files' user.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_PAGE_BYTES = mmap.PAGESIZE
_RESIDENT = 1  # in each byte of mincore(2)
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def is_tail_in_memory(path: Path, size_bytes: int, block_bytes: int) -> bool:
    """Whether any page of a file's last block is in memory. size_bytes: of the file, more than 0.

    The file is not read. Raises OSError.
    """
    begin = (size_bytes - 1) // block_bytes * block_bytes
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return any(page & _RESIDENT for page in _resident_pages(fd, begin, size_bytes - begin))
    finally:
        os.close(fd)


def _resident_pages(fd: int, offset: int, size_bytes: int) -> bytes:
    """mincore(2) of a range of a file: a byte for each page."""
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "cannot be mapped")
    try:
        pages = ctypes.create_string_buffer(-(-size_bytes // _PAGE_BYTES))
        if _libc.mincore(address, size_bytes, pages):
            raise OSError(ctypes.get_errno(), "its pages cannot be told")
        return pages.raw
    finally:
        _libc.munmap(address, size_bytes)
