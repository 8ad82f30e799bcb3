"""The messages of /dev/fuse, without a mount."""

from __future__ import annotations

import errno
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from bootseer_slurm.fuse import protocol

_STRUCTURES = {
    "fuse_in_header": protocol.IN_HEADER.size,
    "fuse_out_header": protocol.OUT_HEADER.size,
    "fuse_init_out": protocol.INIT_OUT.size,
    "fuse_attr": protocol.ATTR.size,
    "fuse_entry_out": protocol.ENTRY_OUT.size + protocol.ATTR.size,
    "fuse_attr_out": protocol.ATTR_OUT.size + protocol.ATTR.size,
    "fuse_open_out": protocol.OPEN_OUT.size,
    "fuse_read_in": protocol.READ_IN.size,
    "fuse_statfs_out": protocol.STATFS_OUT.size,
    "fuse_dirent": protocol.DIRENT.size,
    "fuse_forget_in": protocol.FORGET_IN.size,
    "fuse_batch_forget_in": protocol.BATCH_FORGET_IN.size,
    "fuse_forget_one": protocol.FORGET_ONE.size,
    "fuse_interrupt_in": protocol.INTERRUPT_IN.size,
    "fuse_notify_inval_inode_out": protocol.NOTIFY_INVAL_INODE.size,
    "fuse_notify_inval_entry_out": protocol.NOTIFY_INVAL_ENTRY.size,
    "fuse_notify_store_out": protocol.NOTIFY_STORE.size,
}
# Structure, field, Struct of ours, index of the field in what it unpacks.
_FIELDS = [
    ("fuse_in_header", "unique", protocol.IN_HEADER, 2),
    ("fuse_in_header", "nodeid", protocol.IN_HEADER, 3),
    ("fuse_in_header", "pid", protocol.IN_HEADER, 6),
    ("fuse_out_header", "error", protocol.OUT_HEADER, 1),
    ("fuse_init_in", "flags", protocol.INIT_IN, 3),
    ("fuse_init_out", "flags", protocol.INIT_OUT, 3),
    ("fuse_init_out", "max_background", protocol.INIT_OUT, 4),
    ("fuse_init_out", "max_write", protocol.INIT_OUT, 6),
    ("fuse_init_out", "time_gran", protocol.INIT_OUT, 7),
    ("fuse_init_out", "max_pages", protocol.INIT_OUT, 8),
    ("fuse_init_out", "flags2", protocol.INIT_OUT, 10),
    ("fuse_attr", "blocks", protocol.ATTR, 2),
    ("fuse_attr", "mtime", protocol.ATTR, 4),
    ("fuse_attr", "mtimensec", protocol.ATTR, 7),
    ("fuse_attr", "mode", protocol.ATTR, 9),
    ("fuse_attr", "nlink", protocol.ATTR, 10),
    ("fuse_attr", "uid", protocol.ATTR, 11),
    ("fuse_attr", "gid", protocol.ATTR, 12),
    ("fuse_attr", "blksize", protocol.ATTR, 14),
    ("fuse_read_in", "offset", protocol.READ_IN, 1),
    ("fuse_read_in", "size", protocol.READ_IN, 2),
    ("fuse_dirent", "type", protocol.DIRENT, 3),
    ("fuse_notify_inval_entry_out", "namelen", protocol.NOTIFY_INVAL_ENTRY, 1),
    ("fuse_notify_store_out", "size", protocol.NOTIFY_STORE, 2),
]


def _offset(layout: struct.Struct, index: int) -> int:
    """Find where a field begins: the first byte that changes it."""
    zero = bytes(layout.size)
    for position in range(layout.size):
        changed = layout.unpack(zero[:position] + b"\1" + zero[position + 1 :])
        if changed[index] != 0:
            return position
    raise AssertionError("no such field")


def test_structures_are_those_of_the_kernel_header(tmp_path: Path) -> None:
    if shutil.which("gcc") is None or not Path("/usr/include/linux/fuse.h").exists():
        pytest.skip("needs gcc and linux/fuse.h")
    lines = [f'printf("%zu\\n", sizeof(struct {name}));' for name in _STRUCTURES]
    lines += [f'printf("%zu\\n", offsetof(struct {name}, {field}));' for name, field, _, _ in _FIELDS]
    lines += [f'printf("%d\\n", FUSE_{opcode.name});' for opcode in protocol.Opcode]
    lines += [f'printf("%d\\n", FUSE_{flag.name});' for flag in protocol.InitFlag]
    source = tmp_path / "sizes.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <linux/fuse.h>\nint main(void){"
        + "\n".join(lines)
        + "return 0;}\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "sizes", source], check=True)
    real = [int(word) for word in subprocess.check_output([tmp_path / "sizes"], text=True).split()]
    ours = [
        *_STRUCTURES.values(),
        *(_offset(layout, index) for _, _, layout, index in _FIELDS),
        *protocol.Opcode,
        *protocol.InitFlag,
    ]
    assert ours == real


def test_parse_and_reply_headers() -> None:
    message = protocol.IN_HEADER.pack(45, protocol.Opcode.LOOKUP, 7, 1, 1000, 100, 4711, 0, 0) + b"name\0"
    request = protocol.parse(memoryview(message))
    assert (request.opcode, request.unique) == (protocol.Opcode.LOOKUP, 7)
    assert (request.node_id, request.pid) == (1, 4711)
    assert bytes(request.body) == b"name\0"
    assert protocol.OUT_HEADER.unpack(protocol.reply_header(7, 100)) == (116, 0, 7)
    assert protocol.OUT_HEADER.unpack(protocol.error_reply(7, errno.EIO)) == (16, -errno.EIO, 7)


def test_init_takes_only_what_the_kernel_offers() -> None:
    offered = protocol.InitFlag.ASYNC_READ | protocol.InitFlag.MAX_PAGES
    agreed, payload = protocol.init_reply(memoryview(protocol.INIT_IN.pack(7, 45, 131072, offered | 1 << 16)))
    assert agreed == offered
    major, _minor, readahead, flags, *limits = protocol.INIT_OUT.unpack(payload)
    assert (major, readahead, flags) == (7, 131072, int(offered))
    assert limits == [0x3FFF, 0x3FFF, 4096, 1, 256, 0, 0]
    with pytest.raises(OSError) as raised:
        protocol.init_reply(memoryview(protocol.INIT_IN.pack(6, 1, 0, 0)))
    assert raised.value.errno == errno.EPROTO


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 1), (512, 1), (513, 2), (1 << 40, 1 << 31)])
def test_attributes_count_every_byte_as_allocated(size: int, blocks: int) -> None:
    fields = protocol.ATTR.unpack(protocol.attributes(5, stat.S_IFREG | 0o400, 1, 2, size, -1))
    assert fields[:3] == (5, size, blocks)
    assert fields[4] == 2**64 - 1 and fields[7] == 999_999_999  # a nanosecond before 1970
    assert fields[9:13] == (stat.S_IFREG | 0o400, 1, 1, 2)


def test_directory_entries_are_padded_to_eight_bytes() -> None:
    for length in range(1, 20):
        record = protocol.directory_entry(9, 11, stat.S_IFDIR, b"x" * length)
        assert len(record) % 8 == 0
        assert protocol.DIRENT.unpack_from(record) == (9, 11, length, 4)
        assert record[24 : 24 + length] == b"x" * length


def test_batch_of_forgets() -> None:
    body = (
        protocol.BATCH_FORGET_IN.pack(2, 0) + protocol.FORGET_ONE.pack(3, 1) + protocol.FORGET_ONE.pack(4, 9)
    )
    assert list(protocol.forgets(memoryview(body))) == [(3, 1), (4, 9)]


def test_notifications() -> None:
    message = protocol.notify_inval_entry(1, b"1000")
    assert protocol.OUT_HEADER.unpack_from(message) == (len(message), 3, 0)
    assert protocol.NOTIFY_INVAL_ENTRY.unpack_from(message, 16) == (1, 4, 0)
    assert message.endswith(b"1000\0")
    message = protocol.notify_inval_inode(5, 4096, 0)
    assert protocol.OUT_HEADER.unpack_from(message) == (len(message), 2, 0)
    assert protocol.NOTIFY_INVAL_INODE.unpack_from(message, 16) == (5, 4096, 0)
    header = protocol.notify_store_header(5, 4096, 100)
    assert protocol.OUT_HEADER.unpack_from(header) == (len(header) + 100, 4, 0)
    assert protocol.NOTIFY_STORE.unpack_from(header, 16) == (5, 4096, 100, 0)
