"""How many blocks of a file are in the page cache: image_touched.py FILE BLOCK_BYTES RESULT.

Standard library only.
"""

import ctypes
import mmap
import os
import sys


def count_touched(path: str, block_bytes: int) -> int:
    """How many blocks of a file have a page in the page cache (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with open(path, "rb") as file:
        size = ctypes.c_size_t(os.fstat(file.fileno()).st_size)
        pages = -(-size.value // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        area = ctypes.c_void_p(libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0))
        if libc.mincore(area, size, resident) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        libc.munmap(area, size)
    per_block = block_bytes // mmap.PAGESIZE
    states = bytes(state & 1 for state in resident)
    return sum(any(states[at : at + per_block]) for at in range(0, pages, per_block))


path, block_bytes, result = sys.argv[1:]
with open(result, "w") as file:
    file.write(str(count_touched(path, int(block_bytes))))
