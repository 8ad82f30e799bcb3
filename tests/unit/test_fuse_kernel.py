"""The messages of /dev/fuse and the node table, without a mount."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import kernel
from bootseer_slurm.fuse.ledger import Ledger, Lookups, create
from bootseer_slurm.fuse.tree import State, Tree

_STRUCTURES = {
    "fuse_in_header": kernel.IN_HEADER.size,
    "fuse_out_header": kernel.OUT_HEADER.size,
    "fuse_init_out": kernel.INIT_OUT.size,
    "fuse_attr": kernel.ATTR.size,
    "fuse_entry_out": kernel.ENTRY_OUT.size + kernel.ATTR.size,
    "fuse_attr_out": kernel.ATTR_OUT.size + kernel.ATTR.size,
    "fuse_open_out": kernel.OPEN_OUT.size,
    "fuse_read_in": kernel.READ_IN.size,
    "fuse_statfs_out": kernel.STATFS_OUT.size,
    "fuse_dirent": kernel.DIRENT.size,
    "fuse_forget_in": kernel.FORGET_IN.size,
    "fuse_batch_forget_in": kernel.BATCH_FORGET_IN.size,
    "fuse_forget_one": kernel.FORGET_ONE.size,
    "fuse_interrupt_in": kernel.INTERRUPT_IN.size,
    "fuse_notify_inval_inode_out": kernel.NOTIFY_INVAL_INODE.size,
    "fuse_notify_inval_entry_out": kernel.NOTIFY_INVAL_ENTRY.size,
    "fuse_notify_store_out": kernel.NOTIFY_STORE.size,
}
# Structure, field, Struct of ours, index of the field in what it unpacks.
_FIELDS = [
    ("fuse_in_header", "unique", kernel.IN_HEADER, 2),
    ("fuse_in_header", "nodeid", kernel.IN_HEADER, 3),
    ("fuse_in_header", "pid", kernel.IN_HEADER, 6),
    ("fuse_out_header", "error", kernel.OUT_HEADER, 1),
    ("fuse_init_in", "flags", kernel.INIT_IN, 3),
    ("fuse_init_out", "flags", kernel.INIT_OUT, 3),
    ("fuse_init_out", "max_background", kernel.INIT_OUT, 4),
    ("fuse_init_out", "max_write", kernel.INIT_OUT, 6),
    ("fuse_init_out", "time_gran", kernel.INIT_OUT, 7),
    ("fuse_init_out", "max_pages", kernel.INIT_OUT, 8),
    ("fuse_init_out", "flags2", kernel.INIT_OUT, 10),
    ("fuse_attr", "blocks", kernel.ATTR, 2),
    ("fuse_attr", "mtime", kernel.ATTR, 4),
    ("fuse_attr", "mtimensec", kernel.ATTR, 7),
    ("fuse_attr", "mode", kernel.ATTR, 9),
    ("fuse_attr", "nlink", kernel.ATTR, 10),
    ("fuse_attr", "uid", kernel.ATTR, 11),
    ("fuse_attr", "gid", kernel.ATTR, 12),
    ("fuse_attr", "blksize", kernel.ATTR, 14),
    ("fuse_read_in", "offset", kernel.READ_IN, 1),
    ("fuse_read_in", "size", kernel.READ_IN, 2),
    ("fuse_dirent", "type", kernel.DIRENT, 3),
    ("fuse_notify_inval_entry_out", "namelen", kernel.NOTIFY_INVAL_ENTRY, 1),
    ("fuse_notify_store_out", "size", kernel.NOTIFY_STORE, 2),
]


class Plain:
    """A File of which only the description matters."""

    uid, gid, mtime_ns = 1000, 1000, 1_234_567_890_123_456_789

    def __init__(self, size_bytes: int = 10) -> None:
        self.size_bytes = size_bytes

    def ready(self, offset: int, size: int) -> int | None:
        return None

    def fetch(self, offset: int, size: int) -> bytes:
        return bytes(size)


class Saved(Tree):
    """A tree, and what it saved; `counts` is where it keeps its look-ups."""

    def __init__(self, counts: bytearray | None = None) -> None:
        self.counts = bytearray(16 * 64) if counts is None else counts
        self.states: list[State] = []
        super().__init__(Lookups(memoryview(self.counts)), lambda state: self.states.append(state))

    def successor(self) -> Saved:
        """The tree of a process that takes over now."""
        tree = Saved(self.counts)
        if self.states:
            tree.restore(json.loads(json.dumps(self.states[-1])))
        return tree


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
    lines += [f'printf("%d\\n", FUSE_{opcode.name});' for opcode in kernel.Opcode]
    lines += [f'printf("%d\\n", FUSE_{flag.name});' for flag in kernel.InitFlag]
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
        *kernel.Opcode,
        *kernel.InitFlag,
    ]
    assert ours == real


def test_parse_and_reply_headers() -> None:
    message = kernel.IN_HEADER.pack(45, kernel.Opcode.LOOKUP, 7, 1, 1000, 100, 4711, 0, 0) + b"name\0"
    request = kernel.parse(memoryview(message))
    assert (request.opcode, request.unique) == (kernel.Opcode.LOOKUP, 7)
    assert (request.node_id, request.pid) == (1, 4711)
    assert bytes(request.body) == b"name\0"
    assert kernel.OUT_HEADER.unpack(kernel.reply_header(7, 100)) == (116, 0, 7)
    assert kernel.OUT_HEADER.unpack(kernel.error_reply(7, errno.EIO)) == (16, -errno.EIO, 7)


def test_init_takes_only_what_the_kernel_offers() -> None:
    offered = kernel.InitFlag.ASYNC_READ | kernel.InitFlag.MAX_PAGES
    agreed, payload = kernel.init_reply(memoryview(kernel.INIT_IN.pack(7, 45, 131072, offered | 1 << 16)))
    assert agreed == offered
    major, _minor, readahead, flags, *limits = kernel.INIT_OUT.unpack(payload)
    assert (major, readahead, flags) == (7, 131072, int(offered))
    assert limits == [0x3FFF, 0x3FFF, 4096, 1, 256, 0, 0]
    with pytest.raises(OSError) as raised:
        kernel.init_reply(memoryview(kernel.INIT_IN.pack(6, 1, 0, 0)))
    assert raised.value.errno == errno.EPROTO


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 1), (512, 1), (513, 2), (1 << 40, 1 << 31)])
def test_attributes_count_every_byte_as_allocated(size: int, blocks: int) -> None:
    fields = kernel.ATTR.unpack(kernel.attributes(5, stat.S_IFREG | 0o400, 1, 2, size, -1))
    assert fields[:3] == (5, size, blocks)
    assert fields[4] == 2**64 - 1 and fields[7] == 999_999_999  # a nanosecond before 1970
    assert fields[9:13] == (stat.S_IFREG | 0o400, 1, 1, 2)


def test_directory_entries_are_padded_to_eight_bytes() -> None:
    for length in range(1, 20):
        record = kernel.directory_entry(9, 11, stat.S_IFDIR, b"x" * length)
        assert len(record) % 8 == 0
        assert kernel.DIRENT.unpack_from(record) == (9, 11, length, 4)
        assert record[24 : 24 + length] == b"x" * length


def test_batch_of_forgets() -> None:
    body = kernel.BATCH_FORGET_IN.pack(2, 0) + kernel.FORGET_ONE.pack(3, 1) + kernel.FORGET_ONE.pack(4, 9)
    assert list(kernel.forgets(memoryview(body))) == [(3, 1), (4, 9)]


def test_notifications() -> None:
    message = kernel.notify_inval_entry(1, b"1000")
    assert kernel.OUT_HEADER.unpack_from(message) == (len(message), 3, 0)
    assert kernel.NOTIFY_INVAL_ENTRY.unpack_from(message, 16) == (1, 4, 0)
    assert message.endswith(b"1000\0")
    message = kernel.notify_inval_inode(5, 4096, 0)
    assert kernel.OUT_HEADER.unpack_from(message) == (len(message), 2, 0)
    assert kernel.NOTIFY_INVAL_INODE.unpack_from(message, 16) == (5, 4096, 0)
    header = kernel.notify_store_header(5, 4096, 100)
    assert kernel.OUT_HEADER.unpack_from(header) == (len(header) + 100, 4, 0)
    assert kernel.NOTIFY_STORE.unpack_from(header, 16) == (5, 4096, 100, 0)


def test_a_removed_node_lives_until_it_is_forgotten() -> None:
    tree = Saved()
    assert tree.add("1000/a", Plain()).changed == kernel.ROOT_ID
    directory = tree.look_up(kernel.ROOT_ID, b"1000")
    node = tree.look_up(directory.id, b"a")
    tree.look_up(directory.id, b"a")
    assert tree.remove("1000/a") == (node, [(directory.id, b"a"), (kernel.ROOT_ID, b"1000")])
    with pytest.raises(OSError) as raised:
        tree.look_up(directory.id, b"a")
    assert raised.value.errno == errno.ENOENT
    assert not tree.count_lookup(node)
    tree.forget(node.id, 1)
    assert tree.get(node.id) is node
    tree.forget(node.id, 1)
    with pytest.raises(OSError) as raised:
        tree.get(node.id)
    assert raised.value.errno == errno.ESTALE
    tree.add("1000/a", Plain())
    again = tree.look_up(kernel.ROOT_ID, b"1000")
    assert again.id > node.id and tree.look_up(again.id, b"a").id > node.id


def test_totals_and_entries() -> None:
    tree = Saved()
    for number in range(5):
        tree.add(f"1000/{number}", Plain(100))
    tree.remove("1000/2")
    directory = tree.look_up(kernel.ROOT_ID, b"1000")
    assert tree.totals() == (400, 4)
    names = [name for name, _ in tree.entries(directory.id, after_id=0)]
    assert names == [b"0", b"1", b"3", b"4"]
    third = tree.look_up(directory.id, b"1")
    assert [name for name, _ in tree.entries(directory.id, third.id)] == [b"3", b"4"]


@pytest.mark.parametrize(
    "path",
    ["", "a", "1000", "1000/", "/a", "x/a", "-1/a", "01/a", "²/a", "4294967295/a", "1/..", "1/.", "1/a/b"],
)
def test_other_paths_are_refused(path: str) -> None:
    for hostile in (path, "1/a\0b", "1/" + "n" * 256):
        with pytest.raises(ValueError, match="uid"):
            Saved().add(hostile, Plain())


def test_names_are_unique_and_removed_once() -> None:
    tree = Saved()
    tree.add("0/a", Plain())
    with pytest.raises(FileExistsError):
        tree.add("0/a", Plain())
    tree.remove("0/a")
    with pytest.raises(FileNotFoundError):
        tree.remove("0/a")


def test_many_threads_leave_nothing_behind() -> None:
    tree = Saved(bytearray(16 * 16))  # a slot that is not given back is missed soon

    def work(uid: int) -> None:
        for number in range(300):
            path = f"{uid % 2}/{uid}-{number}"
            tree.add(path, Plain())
            directory = tree.look_up(kernel.ROOT_ID, b"%d" % (uid % 2))
            node = tree.look_up(directory.id, os.fsencode(path.partition("/")[2]))
            tree.remove(path)
            tree.forget(node.id, 1)
            tree.forget(directory.id, 1)

    threads = [threading.Thread(target=work, args=(uid,)) for uid in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tree.totals() == (0, 0)
    assert tree.entries(kernel.ROOT_ID, 0) == []


def test_a_restored_tree_has_the_same_nodes_and_counts() -> None:
    tree = Saved()
    for path in ("1000/a", "1000/\udcff", "7/ü"):
        tree.add(path, Plain(100))
    directory = tree.look_up(kernel.ROOT_ID, b"1000")
    ids = [tree.look_up(directory.id, name).id for name in (b"a", b"\xff", b"a")]
    after = tree.successor().successor()  # nothing was saved in between: the first one's state counts
    assert after.entries(kernel.ROOT_ID, 0) == []
    after = tree.successor()
    assert [after.look_up(directory.id, name).id for name in (b"a", b"\xff")] == ids[:2]
    node = after.get(ids[0])
    assert (node.size_bytes, node.uid, node.mtime_ns, node.file) == (100, 1000, Plain.mtime_ns, None)
    assert node.attr == tree.get(ids[0]).attr
    assert after.totals() == (300, 3)
    after.remove("1000/a")
    after.forget(node.id, 2)
    assert after.get(node.id) is node  # three look-ups: two of the first server's, one of its own
    after.forget(node.id, 1)
    with pytest.raises(OSError):
        after.get(node.id)
    assert after.find("1000/a") is None


def test_add_after_a_restart_takes_the_old_node_or_replaces_it() -> None:
    tree = Saved()
    for name in "abc":
        tree.add(f"1000/{name}", Plain(100))
    saves = len(tree.states)
    directory = tree.look_up(kernel.ROOT_ID, b"1000")
    old = tree.look_up(directory.id, b"b")
    after = tree.successor()
    file = Plain(100)
    added = after.add("1000/a", file)
    assert (added.replaced, added.changed, added.gone) == (None, None, [])
    assert added.node.file is file and after.states == [] and len(tree.states) == saves
    with pytest.raises(FileExistsError):
        after.add("1000/a", file)
    added = after.add("1000/b", Plain(101))
    assert added.replaced is after.get(old.id) and not added.replaced.linked
    assert added.gone == [(directory.id, b"b")] and added.node.id > old.id + 1
    assert [name for name, _ in after.entries(directory.id, 0)] == [b"a", b"c", b"b"]
    assert [entry[0] for entry in after.states[-1]["files"]].count(old.id) == 0
    assert after.settle() == [(directory.id, b"c")]
    after.save()
    assert {entry[2] for entry in after.states[-1]["files"]} == {"a", "b"}
    new = after.successor().add("1000/new", Plain()).node
    assert new.id > added.node.id


def test_settle_without_any_file_leaves_an_empty_tree() -> None:
    tree = Saved()
    tree.add("1000/a", Plain())
    after = tree.successor()
    assert [name for _, name in after.settle()] == [b"a", b"1000"]
    after.save()
    assert after.states[-1]["files"] == [] and after.states[-1]["directories"] == {}
    assert after.entries(kernel.ROOT_ID, 0) == []


def test_a_new_id_is_saved_before_its_name_can_be_looked_up() -> None:
    seen: list[bool] = []
    tree = Tree(Lookups(memoryview(bytearray(160))), lambda state: seen.append(tree.find("0/a") is None))
    tree.add("0/a", Plain())
    assert seen == [True]


def test_what_cannot_be_saved_is_not_added() -> None:
    def fail(state: State) -> None:
        raise BootseerError("full")

    counts = bytearray(16 * 3)
    tree = Tree(Lookups(memoryview(counts)), fail)
    for _ in range(5):  # and leaves no slot behind
        with pytest.raises(BootseerError, match="full"):
            tree.add("1000/a", Plain())
    assert tree.totals() == (0, 0) and tree.find("1000/a") is None
    tree = Saved(bytearray(16 * 3))
    tree.add("1000/a", Plain())
    with pytest.raises(BootseerError, match="more than 3 files"):
        tree.add("1000/b", Plain())


def test_the_ledger_says_what_was_not_answered() -> None:
    fd = create(readers=3)
    try:
        ledger = Ledger(fd, 3)
        assert ledger.found() == [] and ledger.unanswered(0) is None
        parked = [ledger.park(unique, 5, unique * 4096, 4096, 77, 0) for unique in (12, 10, 14)]
        ledger.release(parked[2])
        for reader, (opcode, unique) in enumerate(
            [(kernel.Opcode.LOOKUP, 20), (kernel.Opcode.FORGET, 22), (kernel.Opcode.READ, 12)]
        ):
            message = kernel.IN_HEADER.pack(45, opcode, unique, 1, 0, 0, 77, 0, 0) + b"name\0"
            ledger.inboxes[reader][: len(message)] = message
        after = Ledger(fd, 3)
        assert [each[1:6] for each in after.found()] == [(10, 5, 40960, 4096, 77), (12, 5, 49152, 4096, 77)]
        left = after.unanswered(0)
        assert left is not None and kernel.parse(left).unique == 20 and left[-5:] == b"name\0"
        assert after.unanswered(1) is None  # to forget twice would be wrong
        assert after.unanswered(2) is None  # parked already
        after.clear(0)
        for each in after.found():
            after.release(each)
        last = Ledger(fd, 3)
        assert last.unanswered(0) is None and last.found() == []
        assert last.unanswered(2) is not None
    finally:
        os.close(fd)
