"""What a squashfs file says of itself, read without mounting it."""

from __future__ import annotations

import struct

from bootseer_slurm.errors import InputError
from bootseer_slurm.store import ObjectReader

# squashfs 4.0: magic, inodes, time, block size, fragments, compression, block log, flags, ids, version (2),
# root inode, bytes used
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQ")
_BYTES_USED = -1


def check_squashfs(reader: ObjectReader, name: str) -> None:
    """See that a file is a whole squashfs.

    Raises InputError that says what is wrong: too short, not a squashfs, or truncated.
    """
    head = bytearray(_SUPERBLOCK.size)
    if reader.read_into(0, memoryview(head)) < len(head):
        raise InputError(f"image {name}: too short for a squashfs")
    fields = _SUPERBLOCK.unpack(head)
    if fields[0] != b"hsqs":
        raise InputError(f"image {name}: not a squashfs")
    if fields[_BYTES_USED] > reader.size_bytes:
        raise InputError(
            f"image {name}: truncated, {reader.size_bytes} of {fields[_BYTES_USED]} bytes are there",
        )
