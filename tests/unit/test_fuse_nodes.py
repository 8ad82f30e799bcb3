"""The node table, without a mount."""

from __future__ import annotations

import errno
import json
import os
import threading

import pytest

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.ledger import Lookups
from bootseer_slurm.fuse.nodes import NodeTable, State


class Plain:
    """A File of which only the description matters."""

    uid, gid, mtime_ns = 1000, 1000, 1_234_567_890_123_456_789

    def __init__(self, size_bytes: int = 10) -> None:
        self.size_bytes = size_bytes

    def ready(self, offset: int, size: int) -> int | None:
        return None

    def fetch(self, offset: int, size: int) -> bytes:
        return bytes(size)


class Saved(NodeTable):
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

def test_a_removed_node_lives_until_it_is_forgotten() -> None:
    tree = Saved()
    assert tree.add("1000/a", Plain()).changed == protocol.ROOT_ID
    directory = tree.look_up(protocol.ROOT_ID, b"1000")
    node = tree.look_up(directory.id, b"a")
    tree.look_up(directory.id, b"a")
    assert tree.remove("1000/a") == (node, [(directory.id, b"a"), (protocol.ROOT_ID, b"1000")])
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
    again = tree.look_up(protocol.ROOT_ID, b"1000")
    assert again.id > node.id and tree.look_up(again.id, b"a").id > node.id


def test_totals_and_entries() -> None:
    tree = Saved()
    for number in range(5):
        tree.add(f"1000/{number}", Plain(100))
    tree.remove("1000/2")
    directory = tree.look_up(protocol.ROOT_ID, b"1000")
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
            directory = tree.look_up(protocol.ROOT_ID, b"%d" % (uid % 2))
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
    assert tree.entries(protocol.ROOT_ID, 0) == []


def test_a_restored_tree_has_the_same_nodes_and_counts() -> None:
    tree = Saved()
    for path in ("1000/a", "1000/\udcff", "7/ü"):
        tree.add(path, Plain(100))
    directory = tree.look_up(protocol.ROOT_ID, b"1000")
    ids = [tree.look_up(directory.id, name).id for name in (b"a", b"\xff", b"a")]
    after = tree.successor().successor()  # nothing was saved in between: the first one's state counts
    assert after.entries(protocol.ROOT_ID, 0) == []
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
    directory = tree.look_up(protocol.ROOT_ID, b"1000")
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
    assert after.entries(protocol.ROOT_ID, 0) == []


def test_a_new_id_is_saved_before_its_name_can_be_looked_up() -> None:
    seen: list[bool] = []
    tree = NodeTable(Lookups(memoryview(bytearray(160))), lambda state: seen.append(tree.find("0/a") is None))
    tree.add("0/a", Plain())
    assert seen == [True]


def test_what_cannot_be_saved_is_not_added() -> None:
    def fail(state: State) -> None:
        raise BootseerError("full")

    counts = bytearray(16 * 3)
    tree = NodeTable(Lookups(memoryview(counts)), fail)
    for _ in range(5):  # and leaves no slot behind
        with pytest.raises(BootseerError, match="full"):
            tree.add("1000/a", Plain())
    assert tree.totals() == (0, 0) and tree.find("1000/a") is None
    tree = Saved(bytearray(16 * 3))
    tree.add("1000/a", Plain())
    with pytest.raises(BootseerError, match="more than 3 files"):
        tree.add("1000/b", Plain())
