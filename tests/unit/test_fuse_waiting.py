"""The reads that wait, and how many each user may have."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from bootseer_slurm.fuse.ledger import Ledger, Parked, create
from bootseer_slurm.fuse.waiting import WaitingReads

_MOST = 8


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[WaitingReads]:
    monkeypatch.setattr("bootseer_slurm.fuse.waiting._MOST_PARKED", _MOST)
    fd = create(readers=1)
    yield WaitingReads(Mock(), Ledger(fd, 1))
    os.close(fd)


def park(waiting: WaitingReads, unique: int, *, uid: int, pid: int) -> int:
    """Have a read wait; gives the number of the read that failed for it, 0 for none."""
    waiting.add(waiting._ledger.park(unique, 2, 0, 4096, pid, uid), None)
    dropped = waiting.drop_one_too_many()
    return dropped.unique if dropped else 0


def test_one_user_alone_may_have_all(waiting: WaitingReads) -> None:
    assert [park(waiting, unique, uid=1, pid=1) for unique in range(1, _MOST + 1)] == [0] * _MOST


def test_who_has_the_most_loses_what_was_read_furthest_ahead(waiting: WaitingReads) -> None:
    for unique in range(1, _MOST):
        park(waiting, unique, uid=1, pid=1)
    assert park(waiting, 100, uid=2, pid=2) == 0
    assert park(waiting, 101, uid=2, pid=3) == _MOST - 2, "the last one is what the thread may wait for"
    assert park(waiting, 102, uid=2, pid=4) == _MOST - 3
    assert park(waiting, 103, uid=2, pid=5) == _MOST - 4
    assert park(waiting, 104, uid=1, pid=1) == _MOST - 1, "it asked again: it waits for that no more"
    assert all(unique in waiting for unique in (100, 101, 102, 103, 104))


def test_threads_that_cannot_be_told_apart_may_wait_for_each_of_their_reads(waiting: WaitingReads) -> None:
    for unique in range(1, _MOST + 1):
        park(waiting, unique, uid=1, pid=0)
    assert not waiting._users[1].ahead
    assert park(waiting, _MOST + 1, uid=2, pid=7) == _MOST


def test_what_waits_too_long_fails_and_more_of_it_fails_early(
    waiting: WaitingReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bootseer_slurm.fuse.waiting._EARLY_S", 0.1)
    nodes = [
        Mock(id=number, file=Mock(patience_s=patience_s)) for number, patience_s in ((1, 0.3), (2, 900.0))
    ]
    nodes.append(Mock(id=3, file=None))  # its File is still to come

    def park_one(unique: int, node: Mock) -> Parked:
        parked = waiting._ledger.park(unique, node.id, 0, 4096, unique, 1)
        waiting.add(parked, node)
        return parked

    first = [park_one(unique, node) for unique, node in enumerate(nodes, 1)]
    assert waiting.fail_overdue() == [] and not waiting.hurries
    time.sleep(0.35)
    assert waiting.fail_overdue() == first[:1] and waiting.hurries
    again, _ = park_one(10, nodes[0]), park_one(11, nodes[1])
    time.sleep(0.15)
    assert waiting.fail_overdue() == [again], "sooner than the first"
    good = park_one(12, nodes[0])
    waiting.finish(good, memoryview(b""))
    assert not waiting.hurries, "it had a read that succeeded"
    assert waiting.fail_overdue() == [], "the others wait on"


def test_only_reads_of_one_node_fail_that_wait_since_before_then(waiting: WaitingReads) -> None:
    def park_one(unique: int, node_id: int) -> Parked:
        parked = waiting._ledger.park(unique, node_id, 0, 4096, unique, 1)
        waiting.add(parked, Mock(id=node_id, file=Mock(patience_s=900.0)))
        return parked

    old, other = park_one(1, 1), park_one(2, 2)
    before_s = time.monotonic()
    young = park_one(3, 1)
    assert waiting.fail(1, before_s) == [old] and waiting.fail(1, before_s) == []
    assert young.unique in waiting and other.unique in waiting and not waiting.hurries


def test_nothing_is_kept_of_what_was_answered(waiting: WaitingReads) -> None:
    reads = [waiting._ledger.park(unique, 2, 0, 4096, unique % 2, 1) for unique in range(1, 6)]
    for parked in reads:
        waiting.add(parked, None)
    for parked in (*reads, Parked(0, 99, 2, 0, 1, 1, 1)):
        waiting.finish(parked, memoryview(b""))
    assert not waiting._users and not waiting._reads
