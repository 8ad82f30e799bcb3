"""Which blocks of the files in a mounted image were read: those whose pages the kernel keeps.

The recorder sees blocks of the image, and in one of 256 KiB lie many small files. Pages tell files apart.
They are of this mount alone, which was made for the start, so nothing else has read them. Runs as the files'
user.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

_PAGE_BYTES = mmap.PAGESIZE
_RESIDENT = 1  # in each byte of mincore(2)
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def touched_blocks(path: Path, size_bytes: int, block_bytes: int) -> tuple[int, ...]:
    """Which blocks of a file have pages in memory, by their numbers. size_bytes: of the file, more than 0.

    The file is not read. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        pages = _resident_pages(fd, size_bytes)
    finally:
        os.close(fd)
    return tuple(_blocks_with(pages, max(1, block_bytes // _PAGE_BYTES)))


def _resident_pages(fd: int, size_bytes: int) -> bytes:
    """mincore(2) of a file: a byte for each page."""
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "cannot be mapped")
    try:
        pages = ctypes.create_string_buffer(-(-size_bytes // _PAGE_BYTES))
        if _libc.mincore(address, size_bytes, pages):
            raise OSError(ctypes.get_errno(), "its pages cannot be told")
        return pages.raw
    finally:
        _libc.munmap(address, size_bytes)


def _blocks_with(pages: bytes, per_block: int) -> Iterator[int]:
    for number, start in enumerate(range(0, len(pages), per_block)):
        if any(page & _RESIDENT for page in pages[start : start + per_block]):
            yield number
