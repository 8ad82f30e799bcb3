"""What a squashfs file says of itself, read without mounting it."""

from __future__ import annotations

import struct

from bootseer_slurm.errors import InputError
from bootseer_slurm.store import ObjectReader

# squashfs 4.0: magic, inodes, time, block size, fragments, compression, block log, flags, ids, version (2),
# root inode, bytes used; then where these begin: ids, extended attributes, inodes, folders, fragments, and
# the table for NFS, all ones where there is none
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")
_BYTES_USED = 12
_TABLES = slice(13, 19)
_NO_TABLE = 2**64 - 1
# More than the tables of ten million files.
_TABLES_LIMIT_BYTES = 64 * 2**20


def check_squashfs(reader: ObjectReader, name: str) -> None:
    """See that a file is a whole squashfs.

    Raises InputError that says what is wrong: too short, not a squashfs, or truncated.
    """
    fields = _superblock(reader, name)
    if fields[_BYTES_USED] > reader.size_bytes:
        raise InputError(
            f"image {name}: truncated, {reader.size_bytes} of {fields[_BYTES_USED]} bytes are there",
        )


def head_and_tables(reader: ObjectReader, name: str) -> list[tuple[int, int]]:
    """What a mount needs at once, as (offset, bytes): the superblock, and the tables at the end.

    Of very long tables the end, 64 MiB: there lies what the mount itself reads. Raises InputError.
    """
    fields = _superblock(reader, name)
    end = min(fields[_BYTES_USED], reader.size_bytes)
    start = min((place for place in fields[_TABLES] if place != _NO_TABLE), default=end)
    start = max(_SUPERBLOCK.size, start, end - _TABLES_LIMIT_BYTES)
    return [(0, _SUPERBLOCK.size), *([(start, end - start)] if start < end else [])]


def _superblock(reader: ObjectReader, name: str) -> tuple[int, ...]:
    head = bytearray(_SUPERBLOCK.size)
    if reader.read_into(0, memoryview(head)) < len(head):
        raise InputError(f"image {name}: too short for a squashfs")
    fields = _SUPERBLOCK.unpack(head)
    if fields[0] != b"hsqs":
        raise InputError(f"image {name}: not a squashfs")
    return fields
