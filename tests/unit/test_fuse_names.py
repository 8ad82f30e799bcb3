"""Names and their nodes, without a mount."""

from __future__ import annotations

import json
import os
import threading

import pytest

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.ledger import Lookups
from bootseer_slurm.fuse.names import Names, State
from bootseer_slurm.fuse.nodes import NodeTable


class Plain:
    """A File of which only the description matters."""

    uid, gid, mtime_ns = 1000, 1000, 1_234_567_890_123_456_789
    patience_s = 900.0

    def __init__(self, size_bytes: int = 10) -> None:
        self.size_bytes = size_bytes

    def ready(self, offset: int, size: int) -> int | None:
        return None

    def fetch(self, offset: int, size: int) -> bytes:
        return bytes(size)


class Saved(Names):
    """Names, their nodes, and what was saved; `counts` is where the nodes keep their look-ups."""

    def __init__(self, counts: bytearray | None = None) -> None:
        self.counts = bytearray(16 * 64) if counts is None else counts
        self.states: list[State] = []
        self.nodes = NodeTable(Lookups(memoryview(self.counts)))
        super().__init__(self.nodes, lambda state: self.states.append(state))

    def successor(self) -> Saved:
        """The names of a process that takes over now."""
        names = Saved(self.counts)
        if self.states:
            names.restore(json.loads(json.dumps(self.states[-1])))
        return names


@pytest.mark.parametrize(
    "path",
    ["", "a", "1000", "1000/", "/a", "x/a", "-1/a", "01/a", "²/a", "4294967295/a", "1/..", "1/.", "1/a/b"],
)
def test_other_paths_are_refused(path: str) -> None:
    for hostile in (path, "1/a\0b", "1/" + "n" * 256):
        with pytest.raises(ValueError, match="uid"):
            Saved().add(hostile, Plain())


def test_names_are_unique_and_removed_once() -> None:
    names = Saved()
    names.add("0/a", Plain())
    with pytest.raises(FileExistsError):
        names.add("0/a", Plain())
    names.remove("0/a")
    with pytest.raises(FileNotFoundError):
        names.remove("0/a")


def test_many_threads_leave_nothing_behind() -> None:
    names = Saved(bytearray(16 * 16))  # a slot that is not given back is missed soon

    def work(uid: int) -> None:
        for number in range(300):
            path = f"{uid % 2}/{uid}-{number}"
            names.add(path, Plain())
            directory = names.nodes.look_up(protocol.ROOT_ID, b"%d" % (uid % 2))
            node = names.nodes.look_up(directory.id, os.fsencode(path.partition("/")[2]))
            names.remove(path)
            names.nodes.forget(node.id, 1)
            names.nodes.forget(directory.id, 1)

    threads = [threading.Thread(target=work, args=(uid,)) for uid in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names.nodes.totals() == (0, 0)
    assert names.nodes.entries(protocol.ROOT_ID, 0) == []


def test_restored_names_have_the_same_nodes_and_counts() -> None:
    names = Saved()
    for path in ("1000/a", "1000/\udcff", "7/ü"):
        names.add(path, Plain(100))
    directory = names.nodes.look_up(protocol.ROOT_ID, b"1000")
    ids = [names.nodes.look_up(directory.id, name).id for name in (b"a", b"\xff", b"a")]
    after = names.successor().successor()  # nothing was saved in between: the first one's state counts
    assert after.nodes.entries(protocol.ROOT_ID, 0) == []
    after = names.successor()
    assert [after.nodes.look_up(directory.id, name).id for name in (b"a", b"\xff")] == ids[:2]
    node = after.nodes.get(ids[0])
    assert (node.size_bytes, node.uid, node.mtime_ns, node.file) == (100, 1000, Plain.mtime_ns, None)
    assert node.attr == names.nodes.get(ids[0]).attr
    assert after.nodes.totals() == (300, 3)
    after.remove("1000/a")
    after.nodes.forget(node.id, 2)
    assert after.nodes.get(node.id) is node  # three look-ups: two of the first server's, one of its own
    after.nodes.forget(node.id, 1)
    with pytest.raises(OSError):
        after.nodes.get(node.id)
    assert after.find("1000/a") is None


def test_add_after_a_restart_takes_the_old_node_or_replaces_it() -> None:
    names = Saved()
    for name in "abc":
        names.add(f"1000/{name}", Plain(100))
    saves = len(names.states)
    directory = names.nodes.look_up(protocol.ROOT_ID, b"1000")
    old = names.nodes.look_up(directory.id, b"b")
    after = names.successor()
    file = Plain(100)
    added = after.add("1000/a", file)
    assert (added.replaced, added.changed, added.gone) == (None, None, [])
    assert added.node.file is file and after.states == [] and len(names.states) == saves
    with pytest.raises(FileExistsError):
        after.add("1000/a", file)
    added = after.add("1000/b", Plain(101))
    assert added.replaced is after.nodes.get(old.id) and not added.replaced.linked
    assert added.gone == [(directory.id, b"b")] and added.node.id > old.id + 1
    assert [name for name, _ in after.nodes.entries(directory.id, 0)] == [b"a", b"c", b"b"]
    assert [entry[0] for entry in after.states[-1]["files"]].count(old.id) == 0
    assert after.remove_without_file() == [(directory.id, b"c")]
    after.save()
    assert {entry[2] for entry in after.states[-1]["files"]} == {"a", "b"}
    new = after.successor().add("1000/new", Plain()).node
    assert new.id > added.node.id


def test_recovery_without_any_file_leaves_nothing() -> None:
    names = Saved()
    names.add("1000/a", Plain())
    after = names.successor()
    assert [name for _, name in after.remove_without_file()] == [b"a", b"1000"]
    after.save()
    assert after.states[-1]["files"] == [] and after.states[-1]["directories"] == {}
    assert after.nodes.entries(protocol.ROOT_ID, 0) == []


def test_a_new_id_is_saved_before_its_name_can_be_looked_up() -> None:
    seen: list[bool] = []
    nodes = NodeTable(Lookups(memoryview(bytearray(160))))
    names = Names(nodes, lambda state: seen.append(names.find("0/a") is None))
    names.add("0/a", Plain())
    assert seen == [True]


def test_what_cannot_be_saved_is_not_added() -> None:
    def fail(state: State) -> None:
        raise BootseerError("full")

    counts = bytearray(16 * 3)
    nodes = NodeTable(Lookups(memoryview(counts)))
    names = Names(nodes, fail)
    for _ in range(5):  # and leaves no slot behind
        with pytest.raises(BootseerError, match="full"):
            names.add("1000/a", Plain())
    assert nodes.totals() == (0, 0) and names.find("1000/a") is None
    names = Saved(bytearray(16 * 3))
    names.add("1000/a", Plain())
    with pytest.raises(BootseerError, match="more than 3 files"):
        names.add("1000/b", Plain())
