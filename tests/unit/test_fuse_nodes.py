"""The nodes that the kernel knows, without a mount."""

from __future__ import annotations

import errno

import pytest

from bootseer_slurm.fuse import protocol
from tests.unit.test_fuse_names import Plain, Saved


def test_a_removed_node_lives_until_it_is_forgotten() -> None:
    names = Saved()
    assert names.add("1000/a", Plain()).changed == protocol.ROOT_ID
    directory = names.nodes.look_up(protocol.ROOT_ID, b"1000")
    node = names.nodes.look_up(directory.id, b"a")
    names.nodes.look_up(directory.id, b"a")
    assert names.remove("1000/a") == (node, [(directory.id, b"a"), (protocol.ROOT_ID, b"1000")])
    with pytest.raises(OSError) as raised:
        names.nodes.look_up(directory.id, b"a")
    assert raised.value.errno == errno.ENOENT
    assert not names.nodes.count_lookup(node)
    names.nodes.forget(node.id, 1)
    assert names.nodes.get(node.id) is node
    names.nodes.forget(node.id, 1)
    with pytest.raises(OSError) as raised:
        names.nodes.get(node.id)
    assert raised.value.errno == errno.ESTALE
    names.add("1000/a", Plain())
    again = names.nodes.look_up(protocol.ROOT_ID, b"1000")
    assert again.id > node.id and names.nodes.look_up(again.id, b"a").id > node.id


def test_totals_and_entries() -> None:
    names = Saved()
    for number in range(5):
        names.add(f"1000/{number}", Plain(100))
    names.remove("1000/2")
    directory = names.nodes.look_up(protocol.ROOT_ID, b"1000")
    assert names.nodes.totals() == (400, 4)
    listed = [name for name, _ in names.nodes.entries(directory.id, after_id=0)]
    assert listed == [b"0", b"1", b"3", b"4"]
    third = names.nodes.look_up(directory.id, b"1")
    assert [name for name, _ in names.nodes.entries(directory.id, third.id)] == [b"3", b"4"]
