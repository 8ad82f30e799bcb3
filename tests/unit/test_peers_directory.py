"""A directory: who is sent to whom, and what becomes of its lists when nodes start and die."""

from __future__ import annotations

import pytest

from bootseer_slurm.peers.directory import (
    FAN_OUT,
    Directory,
    First,
    Handover,
    Moved,
    Parent,
    Row,
    Service,
    Want,
)
from bootseer_slurm.peers.groups import GROUP_NODES, Chunk, Ring, group_nodes, rings_of

CHUNK = Chunk("blob", 0)


def owner_of(ring: Ring, chunk: Chunk = CHUNK) -> int:
    return next(ring.owners(chunk))


def ring_of(nodes: int) -> Ring:
    return Ring(0, tuple(range(nodes)))


def sole(nodes: int) -> Directory:
    """The directory of the node that keeps CHUNK's list."""
    ring = ring_of(nodes)
    return Directory(owner_of(ring), ring)


def parent(directory: Directory, want: Want) -> int | None:
    answer = directory.want(want)
    assert not isinstance(answer, Moved)
    return answer.node if isinstance(answer, Parent) else None


def test_the_first_reads_the_store_and_the_others_make_a_flat_tree() -> None:
    directory = sole(128)
    parents = [parent(directory, Want(CHUNK, reader)) for reader in range(15)]
    assert parents == [None, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert FAN_OUT == 2


def test_every_chunk_has_a_list_of_its_own() -> None:
    directory = Directory(0, Ring(0, (0,)))
    assert directory.want(Want(CHUNK, 7)) == First()
    assert directory.want(Want(Chunk("blob", 1), 8)) == First()
    assert directory.want(Want(Chunk("other", 0), 8)) == First()
    assert directory.want(Want(CHUNK, 8)) == Parent(7)


def test_who_left_a_parent_gets_another_that_asked_before_him() -> None:
    directory = sole(16)
    for reader in range(6):
        directory.want(Want(CHUNK, reader))
    # 4 was sent to 1. All before it are full, and 3 and 5 have nobody; but 5 asked later.
    assert parent(directory, Want(CHUNK, 4, lost=(1,))) == 3
    assert parent(directory, Want(CHUNK, 1, lost=(0,))) is None, "only 0 asked before 1"


def test_a_dead_parent_is_named_to_nobody_else() -> None:
    directory = sole(16)
    directory.want(Want(CHUNK, 0))
    directory.want(Want(CHUNK, 1))
    directory.want(Want(CHUNK, 1, lost=(0,)))
    assert parent(directory, Want(CHUNK, 2)) == 1


def test_a_busy_parent_is_named_where_there_is_no_other() -> None:
    directory = sole(16)
    directory.want(Want(CHUNK, 0))
    directory.want(Want(CHUNK, 1))
    assert directory.want(Want(CHUNK, 1, busy=(0,))) == Parent(0, only=True)
    assert directory.want(Want(CHUNK, 2)) == Parent(1)


def test_a_node_that_does_not_serve_is_the_last_choice() -> None:
    directory = sole(16)
    directory.want(Want(CHUNK, 0, serves=False))
    assert directory.want(Want(CHUNK, 1)) == Parent(0, only=True)
    assert directory.want(Want(CHUNK, 2)) == Parent(1)


def test_a_node_that_two_miss_is_named_to_nobody_until_it_is_heard() -> None:
    ring = Ring(0, (0,))
    directory = Directory(0, ring)
    first, second = Chunk("blob", 1), Chunk("blob", 2)
    for chunk in (first, second):
        directory.want(Want(chunk, 5))
    directory.want(Want(CHUNK, 6, missing=(5,)))
    assert directory.want(Want(first, 8)) == Parent(5), "one reader may have a broken link itself"
    directory.want(Want(CHUNK, 7, missing=(5,)))
    assert directory.want(Want(second, 8)) == First()
    directory.want(Want(CHUNK, 5))
    assert directory.want(Want(second, 9)) == Parent(5)


def test_a_reader_that_has_the_chunk_is_listed_and_gets_no_parent() -> None:
    directory = sole(16)
    assert directory.want(Want(CHUNK, 3, has=True)) == First()
    assert directory.want(Want(CHUNK, 4, has=True)) == First()
    assert [parent(directory, Want(CHUNK, reader)) for reader in range(5, 9)] == [3, 3, 4, 4]


def test_a_node_that_starts_takes_its_part() -> None:
    ring = ring_of(8)
    owner = owner_of(ring)
    late = Directory(owner, ring)
    behind = Directory(next(ring.after(owner)), ring)
    assert behind.want(Want(CHUNK, 0)) == First()
    handover = behind.join(owner)
    assert behind.want(Want(CHUNK, 1)) == Moved(owner)
    assert late.take(handover) == {}
    assert late.want(Want(CHUNK, 1)) == Parent(0)
    assert behind.join(owner).lists == {}, "it was handed over"


def test_a_new_owner_knows_who_started_before_it() -> None:
    """The nodes before it joined at the one behind it, which others ask no more."""
    ring = ring_of(8)
    owner = owner_of(ring)
    middle, last = list(ring.after(owner))[:2]
    behind = Directory(last, ring)
    behind.join(owner)
    late = Directory(middle, ring)
    late.take(behind.join(middle))
    assert late.want(Want(CHUNK, 0)) == Moved(owner)


def test_lists_that_come_late_go_on_to_their_owner() -> None:
    ring = ring_of(8)
    owner = owner_of(ring)
    middle, last = list(ring.after(owner))[:2]
    behind, between = Directory(last, ring), Directory(middle, ring)
    behind.want(Want(CHUNK, 0))
    handover = behind.join(middle)
    between.join(owner)  # before what is on its way has come
    onward = between.take(handover)
    assert list(onward) == [owner] and list(onward[owner].lists) == [CHUNK]


def test_two_lists_of_a_chunk_become_one() -> None:
    directory = sole(8)
    directory.want(Want(CHUNK, 6))
    rows = (Row(4, 1, Service.YES), Row(5, 0, Service.YES))
    directory.take(Handover({CHUNK: rows}))
    parents = [parent(directory, Want(CHUNK, reader)) for reader in range(10, 15)]
    assert parents == [4, 5, 5, 6, 6], "4 has a child, and 6 asked last"


def test_a_list_that_comes_late_turns_no_child_into_its_parent_s_parent() -> None:
    directory = sole(8)
    assert directory.want(Want(CHUNK, 4)) == First()
    assert directory.want(Want(CHUNK, 5)) == Parent(4)
    directory.take(
        Handover({CHUNK: (Row(5, 1, Service.YES), Row(6, 0, Service.YES), Row(4, 0, Service.YES))})
    )
    # The order is 6, 4, 5: 4 gets one that asked before it, and not its own child.
    assert parent(directory, Want(CHUNK, 4)) == 6
    assert parent(directory, Want(CHUNK, 6)) is None


def test_a_reader_is_believed_of_the_parents_that_it_was_sent_to_only() -> None:
    directory = sole(16)
    for reader in range(4):
        directory.want(Want(CHUNK, reader))
    everybody = tuple(range(16))
    assert parent(directory, Want(CHUNK, 9, lost=everybody)) is None
    assert directory.want(Want(CHUNK, 10)) == Parent(1), "0 has two"
    directory.want(Want(CHUNK, 10, busy=everybody))
    assert directory.want(Want(CHUNK, 11)) == Parent(2), "1 was named to 10, and is busy"


def test_a_reader_is_sent_to_few_parents() -> None:
    directory = sole(16)
    for reader in range(8):
        directory.want(Want(CHUNK, reader))
    lost: list[int] = []
    while (named := parent(directory, Want(CHUNK, 9, lost=tuple(lost)))) is not None:
        lost.append(named)
    assert len(lost) == 4


def test_a_report_ends_when_its_reader_says_so_no_more() -> None:
    directory = Directory(0, Ring(0, (0,)))
    second = Chunk("blob", 2)
    directory.want(Want(second, 5))
    for reader in (6, 7):
        directory.want(Want(CHUNK, reader, missing=(5,)))
    assert directory.want(Want(second, 8)) == First()
    directory.want(Want(CHUNK, 7))
    assert directory.want(Want(second, 8)) == Parent(5)


def missed_owner() -> tuple[int, Directory]:
    """An owner of CHUNK that two nodes miss, and the directory that took over from it."""
    ring = ring_of(8)
    owner = owner_of(ring)
    heir = Directory(next(ring.after(owner)), ring)
    heir.join(owner)
    for reader in (10, 11):
        heir.want(Want(CHUNK, reader, missing=(owner,)))
    return owner, heir


def test_an_owner_that_two_missed_owns_again_when_it_is_heard() -> None:
    owner, heir = missed_owner()
    assert heir.want(Want(CHUNK, 12)) == Parent(10)
    heir.want(Want(Chunk("blob", 9), owner))
    assert heir.want(Want(CHUNK, 12)) == Moved(owner)


def test_numbers_that_are_on_no_ring_are_no_owners_and_lists_have_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bootseer_slurm.peers.directory._MOST_LISTS", 2)
    ring = ring_of(8)
    directory = sole(8)
    directory.take(Handover({}, tuple(range(2**32 - 100, 2**32))))
    assert directory.join(next(ring.after(directory._node))).live == tuple(
        sorted({directory._node, next(ring.after(directory._node))})
    )
    for number in range(40):
        directory.want(Want(Chunk("many", number), 3))
    assert len(directory._lists) <= 2


def test_a_dead_node_is_not_live_because_an_old_owner_says_so() -> None:
    owner, heir = missed_owner()
    heir.take(Handover({}, (owner,)))
    assert heir.owns(CHUNK)


def test_after_its_death_the_next_on_the_ring_answers() -> None:
    ring = ring_of(8)
    owner = owner_of(ring)
    heir = Directory(next(ring.after(owner)), ring)
    heir.join(owner)
    assert heir.want(Want(CHUNK, 10)) == Moved(owner)
    assert heir.want(Want(CHUNK, 10, missing=(owner,))) == First()
    assert heir.want(Want(CHUNK, 11)) == Moved(owner), "one reader's word does not move the list for all"
    assert heir.want(Want(CHUNK, 11, missing=(owner,))) == Parent(10)
    assert heir.want(Want(CHUNK, 12)) == Parent(10)


@pytest.mark.parametrize("nodes", [1, 3, 128, 129, 1000, 10_000])
def test_groups_have_all_nodes_once_and_at_most_128(nodes: int) -> None:
    groups = group_nodes([range(nodes)])
    assert [node for group in groups for node in group] == list(range(nodes))
    assert max(len(group) for group in groups) <= GROUP_NODES
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    rings = rings_of(groups, nodes - 1)
    assert len(rings) == (1 if nodes <= GROUP_NODES else 2)
    assert all(len(ring.members) <= GROUP_NODES for ring in rings)
    assert nodes - 1 in rings[0].members


def test_groups_follow_the_topology() -> None:
    racks = [range(begin, begin + 40) for begin in range(0, 200, 40)]
    assert [len(group) for group in group_nodes(racks)] == [120, 80]
    assert [len(group) for group in group_nodes([range(300), range(300, 310)])] == [100, 100, 110]
    assert group_nodes([[], [4, 5]]) == ((4, 5),)


def test_chunks_are_spread_over_the_ring() -> None:
    ring = ring_of(100)
    owned = [0] * 100
    for number in range(10_000):
        owned[owner_of(ring, Chunk("a" * 64, number))] += 1
    assert min(owned) > 50 and max(owned) < 160
    assert sorted(ring.owners(CHUNK)) == list(range(100))
    assert next(ring.owners(CHUNK)) == next(Ring(0, tuple(range(100))).owners(Chunk("blob", 0)))
