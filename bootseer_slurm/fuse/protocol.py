"""The protocol of /dev/fuse: requests, replies and notifications as bytes (linux/fuse.h 7.x; fuse(4)).

Owns: the layout of the messages that a read-only file system sees, and what is agreed on at INIT.
Does not own: descriptors, threads, or what the answers are: see server.py and nodes.py.
No state. Integers are in the machine's byte order and the structures have no implicit padding, hence "=".
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

ROOT_ID = 1
MAX_READ_BYTES = 1 << 20
# The kernel asks for at least 8 KiB; more lets it put many FORGETs into one message.
REQUEST_BUFFER_BYTES = 64 << 10
_MAJOR = 7
_MINOR = 31  # the youngest protocol that anything here comes from
_PAGE_BYTES = 4096  # max_pages counts the kernel's pages; with larger ones max_read is the limit
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system (stat(3type))
_ST_BLKSIZE = 4096

IN_HEADER = Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
OUT_HEADER = Struct("=IiQ")  # len error unique
INIT_IN = Struct("=IIII")  # major minor max_readahead flags; younger kernels send more
INIT_OUT = Struct("=IIIIHHIIHHI28x")  # ... max_background congestion max_write gran max_pages align flags2
ATTR = Struct("=6Q10I")  # ino size blocks atime mtime ctime; 3 nsec mode nlink uid gid rdev blksize flags
ENTRY_OUT = Struct("=4Q2I")  # nodeid generation entry_valid attr_valid and their nsec; then ATTR
ATTR_OUT = Struct("=QII")  # attr_valid nsec dummy; then ATTR
OPEN_OUT = Struct("=QII")  # fh open_flags padding
READ_IN = Struct("=QQIIQII")  # fh offset size read_flags lock_owner flags padding
STATFS_OUT = Struct("=5Q4I24x")  # blocks bfree bavail files ffree; bsize namelen frsize padding
DIRENT = Struct("=QQII")  # ino off namelen type; then the name
FORGET_IN = Struct("=Q")  # nlookup
BATCH_FORGET_IN = Struct("=II")  # count dummy; then FORGET_ONE, count times
FORGET_ONE = Struct("=QQ")  # nodeid nlookup
INTERRUPT_IN = Struct("=Q")  # unique
NOTIFY_INVAL_INODE = Struct("=Qqq")  # ino off len
NOTIFY_INVAL_ENTRY = Struct("=QII")  # parent namelen flags; then the name and a NUL
NOTIFY_STORE = Struct("=QQII")  # nodeid offset size padding; then the bytes


class Opcode(enum.IntEnum):
    """enum fuse_opcode, as far as this file system tells them apart."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    SETXATTR = 21
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    TMPFILE = 51


# No answer is expected; and taking look-ups back twice would drop what the kernel still uses.
FORGETTING = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET})
WRITING = frozenset(
    {
        Opcode.SETATTR,
        Opcode.SYMLINK,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.UNLINK,
        Opcode.RMDIR,
        Opcode.RENAME,
        Opcode.LINK,
        Opcode.WRITE,
        Opcode.SETXATTR,
        Opcode.REMOVEXATTR,
        Opcode.CREATE,
        Opcode.FALLOCATE,
        Opcode.RENAME2,
        Opcode.TMPFILE,
    }
)


def failure(number: int) -> OSError:
    """Return the exception that stands for an error reply."""
    return OSError(number, os.strerror(number))


class InitFlag(enum.IntFlag):
    """Bits of fuse_init_in.flags that are of use here."""

    ASYNC_READ = 1 << 0  # several reads of one file at a time
    DO_READDIRPLUS = 1 << 13  # list and look up in one request ...
    READDIRPLUS_AUTO = 1 << 14  # ... where the kernel thinks that it pays
    NO_OPEN_SUPPORT = 1 << 17  # ENOSYS to OPEN means: open without asking, keep the page cache
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21  # tells an aborted connection from an unmounted one
    MAX_PAGES = 1 << 22  # reads larger than 128 KiB
    EXPLICIT_INVAL_DATA = 1 << 25  # the page cache is dropped only when told to


# Not ASYNC_DIO: with it the kernel waits for O_DIRECT reads in a way that not even SIGKILL ends.
WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.DO_READDIRPLUS
    | InitFlag.READDIRPLUS_AUTO
    | InitFlag.NO_OPEN_SUPPORT
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.ABORT_ERROR
    | InitFlag.MAX_PAGES
    | InitFlag.EXPLICIT_INVAL_DATA
)
FOPEN_KEEP_CACHE = 1 << 1
_NOTIFY_INVAL_INODE = 2
_NOTIFY_INVAL_ENTRY = 3
_NOTIFY_STORE = 4
# Readahead is "background" to the kernel, and at the default of 12 unanswered ones it holds back all others:
# a few reads that wait for the store would stop the reads of every other file. So: half of what the
# ledger has room for. Who has how much of it: waiting.py.
MAX_BACKGROUND = 0x3FFF
_TIME_GRANULARITY_NS = 1
_MAX_WRITE_BYTES = 4096  # the least that the kernel accepts; nothing is ever written


class Request(NamedTuple):
    """One message from the kernel; body is valid until the next one is read into the same buffer."""

    opcode: int
    unique: int
    node_id: int
    pid: int
    body: memoryview


def parse(message: memoryview) -> Request:
    """Split a message read from /dev/fuse."""
    _length, opcode, unique, node_id, _uid, _gid, pid, _, _ = IN_HEADER.unpack_from(message)
    return Request(opcode, unique, node_id, pid, message[IN_HEADER.size :])


def reply_header(unique: int, payload_bytes: int) -> bytes:
    """Return what precedes the payload of a successful reply."""
    return OUT_HEADER.pack(OUT_HEADER.size + payload_bytes, 0, unique)


def error_reply(unique: int, errno: int) -> bytes:
    """Return a whole reply that says errno; the kernel takes 1 to 511 and would ignore anything else."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)


def init_reply(body: memoryview) -> tuple[InitFlag, bytes]:
    """Answer INIT: return the flags that both sides want, and the payload.

    Raises OSError EPROTO on a kernel that does not speak protocol 7, which all have done since 2005.
    """
    major, _minor, max_readahead_bytes, offered = INIT_IN.unpack_from(body)
    if major != _MAJOR:
        raise failure(errno.EPROTO)
    flags = WANTED & offered
    payload = INIT_OUT.pack(
        *(_MAJOR, _MINOR, max_readahead_bytes, flags),
        *(MAX_BACKGROUND, MAX_BACKGROUND, _MAX_WRITE_BYTES),
        *(_TIME_GRANULARITY_NS, MAX_READ_BYTES // _PAGE_BYTES, 0, 0),
    )
    return flags, payload


def attributes(node_id: int, mode: int, uid: int, gid: int, size_bytes: int, mtime_ns: int) -> bytes:
    """Return struct fuse_attr. Every block counts as allocated: `du` shows the size, `cp` sees no holes."""
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    seconds &= 0xFFFF_FFFF_FFFF_FFFF  # before 1970: the kernel reads it as signed
    return ATTR.pack(
        *(node_id, size_bytes, -(-size_bytes // _BLOCK_BYTES), seconds, seconds, seconds),
        *(nanoseconds, nanoseconds, nanoseconds, mode, 1, uid, gid, 0, _ST_BLKSIZE, 0),
    )


def entry_reply(node_id: int, attr: bytes, valid_s: int) -> bytes:
    """Answer LOOKUP; valid_s: how long the kernel may keep name and attributes without asking."""
    return ENTRY_OUT.pack(node_id, 0, valid_s, valid_s, 0, 0) + attr


def attr_reply(attr: bytes, valid_s: int) -> bytes:
    """Answer GETATTR."""
    return ATTR_OUT.pack(valid_s, 0, 0) + attr


def open_reply(flags: int = 0) -> bytes:
    """Answer OPEN or OPENDIR; there are no file handles, reads are by node."""
    return OPEN_OUT.pack(0, flags, 0)


def statfs_reply(size_bytes: int, files: int) -> bytes:
    """Answer STATFS for a file system that is full by nature."""
    return STATFS_OUT.pack(-(-size_bytes // _ST_BLKSIZE), 0, 0, files, 0, _ST_BLKSIZE, 255, _ST_BLKSIZE, 0)


def directory_entry(node_id: int, offset: int, mode: int, name: bytes) -> bytes:
    """Return one record of READDIR; offset is where a later READDIR goes on."""
    record = DIRENT.pack(node_id, offset, len(name), mode >> 12) + name
    return record + bytes(-len(record) % 8)


def forgets(body: memoryview) -> Iterator[tuple[int, int]]:
    """Yield (node id, lookups to take back) of BATCH_FORGET."""
    count, _ = BATCH_FORGET_IN.unpack_from(body)
    for index in range(count):
        yield FORGET_ONE.unpack_from(body, BATCH_FORGET_IN.size + index * FORGET_ONE.size)


def _notification(code: int, payload: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), code, 0) + payload


def notify_inval_entry(parent_id: int, name: bytes) -> bytes:
    """Return the message that makes the kernel drop a name (FUSE_NOTIFY_INVAL_ENTRY)."""
    return _notification(_NOTIFY_INVAL_ENTRY, NOTIFY_INVAL_ENTRY.pack(parent_id, len(name), 0) + name + b"\0")


def notify_inval_inode(node_id: int, offset: int = -1, length: int = 0) -> bytes:
    """Return the message that makes the kernel drop a node's attributes and, from offset >= 0 on, its pages.

    length: bytes, 0 or less for all that follow (FUSE_NOTIFY_INVAL_INODE).
    """
    return _notification(_NOTIFY_INVAL_INODE, NOTIFY_INVAL_INODE.pack(node_id, offset, length))


def notify_store_header(node_id: int, offset: int, size: int) -> bytes:
    """Return what precedes size bytes that the kernel shall keep as a node's pages (FUSE_NOTIFY_STORE).

    Past the end of the file they would make it longer.
    """
    length = OUT_HEADER.size + NOTIFY_STORE.size + size
    return OUT_HEADER.pack(length, _NOTIFY_STORE, 0) + NOTIFY_STORE.pack(node_id, offset, size, 0)
