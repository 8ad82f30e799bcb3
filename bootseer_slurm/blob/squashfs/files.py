"""Where in a squashfs each file's bytes lie, read from its tables (squashfs 4.0, kernel's squashfs_fs.h).

A file is stored in blocks of the image's block size, each compressed for itself, one after the other; its
tail, or all of a small file, lies in a fragment, which is a block that several files share. The tables are
compressed in pieces of 8 KiB. All of an image is hostile until parsed: every count and offset is checked
against what is there, and a path is never followed, only told.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from bootseer_slurm.blob.squashfs.superblock import NO_TABLE, Superblock, read_superblock
from bootseer_slurm.errors import InputError
from bootseer_slurm.store import ObjectReader

_PIECE_BYTES = 8192  # of a table, before compression
_PIECE_STORED = 0x8000  # this piece is not compressed
_BLOCK_STORED = 1 << 24
_NO_FRAGMENT = 2**32 - 1
_TABLE_LIMIT_BYTES = 2**30  # of inodes or folders, uncompressed: ten million files
_DEPTH_LIMIT = 256
_LIST_LIMIT = 256  # names behind one head, as the kernel has it
_BLOCK_SIZES = {2**n for n in range(12, 21)}
_CODECS = {"gzip": "gzip", "lz4": "lz4_raw", "zstd": "zstd"}  # pyarrow's names

_HEAD = struct.Struct("<HHHHII")  # type, mode, uid, gid, mtime, number
_FOLDER, _FILE, _LINK, _LONG_FOLDER, _LONG_FILE, _LONG_LINK = 1, 2, 3, 8, 9, 10
_DEVICES, _LONG_DEVICES, _PIPES, _LONG_PIPES = (4, 5), (11, 12), (6, 7), (13, 14)
_AS_FOLDER = struct.Struct("<IIHHI")  # block, links, size, offset, parent
_AS_LONG_FOLDER = struct.Struct("<IIIIHHI")  # links, size, block, parent, indices, offset, xattr
_AS_FILE = struct.Struct("<IIII")  # first block, fragment, offset in it, size
_AS_LONG_FILE = struct.Struct("<QQQIIII")  # first block, size, sparse, links, fragment, offset in it, xattr
_AS_LINK = struct.Struct("<II")  # links, size
_INDEX = struct.Struct("<III")  # index, block, size of the name less one
_FRAGMENT = struct.Struct("<QII")  # offset, size, unused
_LIST_HEAD = struct.Struct("<III")  # entries less one, block, number
_ENTRY = struct.Struct("<HhHH")  # offset, number less the head's, type, size of the name less one


class Extent(NamedTuple):
    """Where the bytes of one block of a file lie in the image, compressed."""

    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A regular file. blocks: one extent for each `block_bytes` of it.

    A block that is a hole has an extent of 0 bytes. in_fragment: the last one is that of a fragment.
    """

    size_bytes: int
    blocks: tuple[Extent, ...]
    in_fragment: bool = False


class Squashfs(NamedTuple):
    """An image's regular files by path, in the order of its folders, and how their blocks are compressed."""

    block_bytes: int
    files: dict[str, StoredFile]
    compression: str  # as Superblock.compression_name


def read_files(reader: ObjectReader, name: str) -> Squashfs:
    """All regular files of an image. name: for messages. Raises InputError when it is no whole squashfs."""
    head = read_superblock(reader, name)
    if head.block_bytes not in _BLOCK_SIZES:
        raise InputError(f"image {name}: its blocks have {head.block_bytes} bytes")
    try:
        image = _Image(reader, head)
        fragments = image.fragments()
        inodes = _Inodes(image.table(head.inodes, head.folders), head, fragments)
        return Squashfs(head.block_bytes, dict(_walk(image, head, inodes)), head.compression_name)
    except (struct.error, IndexError, KeyError, ValueError, OverflowError, RecursionError, pa.ArrowException,
            zlib.error, OSError) as error:  # fmt: skip
        raise InputError(f"image {name}: its tables cannot be read: {type(error).__name__}") from error


class _Image:
    """The pieces of the tables."""

    def __init__(self, reader: ObjectReader, head: Superblock) -> None:
        self._reader = reader
        self._head = head

    def _read(self, offset: int, size_bytes: int) -> bytes:
        content = bytearray(size_bytes)
        if self._reader.read_into(offset, memoryview(content)) < size_bytes:
            raise ValueError("a table ends too early")
        return bytes(content)

    def _piece(self, offset: int) -> tuple[bytes, int]:
        """A piece of a table, and where the next one begins."""
        (stored,) = struct.unpack("<H", self._read(offset, 2))
        size_bytes = stored & ~_PIECE_STORED or _PIECE_BYTES
        content = self._read(offset + 2, size_bytes)
        if not stored & _PIECE_STORED:
            content = self._decompressed(content)
        return content, offset + 2 + size_bytes

    def _decompressed(self, content: bytes) -> bytes:
        codec = _CODECS[self._head.compression_name]
        if codec == "gzip":
            return zlib.decompressobj().decompress(content, _PIECE_BYTES)
        if codec == "zstd":
            with pa.CompressedInputStream(pa.BufferReader(content), codec) as stream:
                return bytes(stream.read(_PIECE_BYTES))
        return bytes(pa.Codec(codec).decompress(content, decompressed_size=_PIECE_BYTES))

    def table(self, start: int, end: int) -> _Table:
        """The table that lies from `start` to `end`."""
        pieces: dict[int, int] = {}
        content = bytearray()
        offset = start
        while offset < end:
            pieces[offset - start] = len(content)
            piece, offset = self._piece(offset)
            content += piece
            if len(content) > _TABLE_LIMIT_BYTES:
                raise ValueError("a table is too long")
        return _Table(bytes(content), pieces)

    def end_of_folders(self) -> int:
        """Where the next table's first piece lies, as that table's list of pieces says."""
        lists = (self._head.fragments, self._head.exports, self._head.ids)
        return min(int.from_bytes(self._read(start, 8), "little") for start in lists if start != NO_TABLE)

    def fragments(self) -> list[Extent]:
        """Where each fragment lies."""
        count = self._head.fragment_count
        if not count or self._head.fragments == NO_TABLE:
            return []
        per_piece = _PIECE_BYTES // _FRAGMENT.size
        pieces = -(-count // per_piece)
        offsets = struct.unpack(f"<{pieces}Q", self._read(self._head.fragments, pieces * 8))
        content = b"".join(self._piece(offset)[0] for offset in offsets)
        found = (_FRAGMENT.unpack_from(content, number * _FRAGMENT.size) for number in range(count))
        return [Extent(offset, size & (_BLOCK_STORED - 1)) for offset, size, _ in found]


class _Table(NamedTuple):
    """A table, and where in it each piece begins, by how far in the image that lies behind the first."""

    content: bytes
    pieces: dict[int, int]

    def at(self, piece: int, offset: int) -> int:
        return self.pieces[piece] + offset


class _Folder(NamedTuple):
    piece: int
    offset: int
    size_bytes: int


class _Inodes:
    """The inodes that matter: regular files and folders, by number."""

    def __init__(self, table: _Table, head: Superblock, fragments: list[Extent]) -> None:
        self.files: dict[int, StoredFile] = {}
        self.folders: dict[int, _Folder] = {}
        self._content = table.content
        self._block_bytes = head.block_bytes
        self._fragments = fragments
        self.root = _HEAD.unpack_from(self._content, table.at(head.root >> 16, head.root & 0xFFFF))[5]
        offset = 0
        for _ in range(head.inode_count):
            kind, *_, number = _HEAD.unpack_from(self._content, offset)
            offset = self._take(kind, number, offset + _HEAD.size)

    def _take(self, kind: int, number: int, offset: int) -> int:
        """Note an inode; gives where the next one begins."""
        content = self._content
        if kind == _FILE:
            first, fragment, within, size_bytes = _AS_FILE.unpack_from(content, offset)
            return self._take_file(number, offset + _AS_FILE.size, first, size_bytes, fragment)
        if kind == _LONG_FILE:
            first, size_bytes, _, _, fragment, within, _ = _AS_LONG_FILE.unpack_from(content, offset)
            return self._take_file(number, offset + _AS_LONG_FILE.size, first, size_bytes, fragment)
        if kind == _FOLDER:
            piece, _, size_bytes, within, _ = _AS_FOLDER.unpack_from(content, offset)
            self.folders[number] = _Folder(piece, within, size_bytes)
            return offset + _AS_FOLDER.size
        if kind == _LONG_FOLDER:
            _, size_bytes, piece, _, indices, within, _ = _AS_LONG_FOLDER.unpack_from(content, offset)
            self.folders[number] = _Folder(piece, within, size_bytes)
            offset += _AS_LONG_FOLDER.size
            for _ in range(indices):
                offset += _INDEX.size + _INDEX.unpack_from(content, offset)[2] + 1
            return offset
        if kind in (_LINK, _LONG_LINK):
            _, size_bytes = _AS_LINK.unpack_from(content, offset)
            return int(offset + _AS_LINK.size + size_bytes + 4 * (kind == _LONG_LINK))
        for kinds, size_bytes in ((_DEVICES, 8), (_LONG_DEVICES, 12), (_PIPES, 4), (_LONG_PIPES, 8)):
            if kind in kinds:
                return offset + size_bytes
        raise ValueError("an inode is of no known kind")

    def _take_file(self, number: int, offset: int, first: int, size_bytes: int, fragment: int) -> int:
        in_fragment = fragment != _NO_FRAGMENT
        count = size_bytes // self._block_bytes if in_fragment else -(-size_bytes // self._block_bytes)
        if count * 4 > len(self._content) - offset:
            raise ValueError("a file has more blocks than the table")
        extents = []
        for size in struct.unpack_from(f"<{count}I", self._content, offset):
            stored_bytes = size & (_BLOCK_STORED - 1)
            extents.append(Extent(first, stored_bytes))
            first += stored_bytes
        if in_fragment:
            extents.append(self._fragments[fragment])
        self.files[number] = StoredFile(size_bytes, tuple(extents), in_fragment)
        return offset + 4 * count


def _walk(image: _Image, head: Superblock, inodes: _Inodes) -> Iterator[tuple[str, StoredFile]]:
    """All regular files, by path; what lies in a folder comes before the next folder."""
    table = image.table(head.folders, image.end_of_folders())
    # A small image could otherwise name each of a million files in each of a million folders.
    listed_bytes = sum(max(0, folder.size_bytes - 3) for folder in inodes.folders.values())
    if listed_bytes > len(table.content):
        raise ValueError("folders share their listing")
    seen: set[int] = set()

    def walk(number: int, path: str, depth: int) -> Iterator[tuple[str, StoredFile]]:
        if number in seen or depth > _DEPTH_LIMIT:
            raise ValueError("folders lie in a circle, or too deep")
        seen.add(number)
        folders = []
        for name, inode in _entries(table, inodes.folders[number]):
            if inode in inodes.files:
                yield path + name, inodes.files[inode]
            elif inode in inodes.folders:
                folders.append((f"{path}{name}/", inode))
        for inner, inode in folders:
            yield from walk(inode, inner, depth + 1)

    return walk(inodes.root, "", 0)


def _entries(table: _Table, folder: _Folder) -> Iterator[tuple[str, int]]:
    """The names in a folder, and the numbers of their inodes."""
    offset = table.at(folder.piece, folder.offset) if folder.size_bytes > 3 else 0
    end = offset + folder.size_bytes - 3  # "." and ".." count as three bytes
    while offset < end:
        count, _, first = _LIST_HEAD.unpack_from(table.content, offset)
        offset += _LIST_HEAD.size
        if count >= _LIST_LIMIT:
            raise ValueError("a list of a folder is too long")
        for _ in range(count + 1):
            _, delta, _, size = _ENTRY.unpack_from(table.content, offset)
            offset += _ENTRY.size
            name = table.content[offset : offset + size + 1]
            if len(name) != size + 1 or b"/" in name or b"\0" in name or name in (b"", b".", b".."):
                raise ValueError("a name is none")
            offset += size + 1
            yield os.fsdecode(name), first + delta
