"""The superblock of a squashfs file, read without mounting it."""

from __future__ import annotations

import struct
from typing import NamedTuple

from bootseer_slurm.errors import InputError
from bootseer_slurm.store import ObjectReader

_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")
NO_TABLE = 2**64 - 1
# More than the tables of ten million files.
_TABLES_LIMIT_BYTES = 64 * 2**20
_COMPRESSIONS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}


# size: a record of the format.
class Superblock(NamedTuple):
    """The first bytes of a squashfs 4.0. root: of the inode, (piece << 16) + offset.

    From ids on: where these tables begin, NO_TABLE where there is none; exports is the table for NFS.
    """

    magic: bytes
    inode_count: int
    made_s: int
    block_bytes: int
    fragment_count: int
    compression: int
    block_log: int
    flags: int
    id_count: int
    major: int
    minor: int
    root: int
    used_bytes: int
    ids: int
    xattrs: int
    inodes: int
    folders: int
    fragments: int
    exports: int

    @property
    def compression_name(self) -> str:
        """Its name, as mksquashfs has it; "" of one that squashfs 4.0 does not know."""
        return _COMPRESSIONS.get(self.compression, "")

    @property
    def tables_start(self) -> int:
        """Where the first table begins."""
        tables = (self.ids, self.xattrs, self.inodes, self.folders, self.fragments, self.exports)
        return min((start for start in tables if start != NO_TABLE), default=self.used_bytes)


def check_squashfs(reader: ObjectReader, name: str) -> None:
    """See that a file is a whole squashfs.

    Raises InputError that says what is wrong: too short, not a squashfs, or truncated.
    """
    used_bytes = read_superblock(reader, name).used_bytes
    if used_bytes > reader.size_bytes:
        raise InputError(f"image {name}: truncated, {reader.size_bytes} of {used_bytes} bytes are there")


def head_and_tables(reader: ObjectReader, name: str) -> list[tuple[int, int]]:
    """The ranges that a mount needs at once, as (offset, bytes): the superblock, and the tables at the end.

    Of very long tables the end, 64 MiB: there lies what the mount itself reads. Raises InputError.
    """
    head = read_superblock(reader, name)
    end = min(head.used_bytes, reader.size_bytes)
    start = max(_SUPERBLOCK.size, head.tables_start, end - _TABLES_LIMIT_BYTES)
    return [(0, _SUPERBLOCK.size), *([(start, end - start)] if start < end else [])]


def read_superblock(reader: ObjectReader, name: str) -> Superblock:
    """The superblock of a file. Raises InputError when it is no squashfs."""
    head = bytearray(_SUPERBLOCK.size)
    if reader.read_into(0, memoryview(head)) < len(head):
        raise InputError(f"image {name}: too short for a squashfs")
    fields = Superblock(*_SUPERBLOCK.unpack(head))
    if fields.magic != b"hsqs":
        raise InputError(f"image {name}: not a squashfs")
    return fields
