"""Waits: the time in which any read waits, and the longest wait of one, for each user of a blob."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from bootseer_slurm.cache import waits as module
from bootseer_slurm.cache.waits import Waits


class Clock:
    """Stands for the module time: waits of many seconds cannot be made to happen in a test."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_reads_that_wait_side_by_side_count_once(clock: Clock) -> None:
    waits = Waits()
    baseline = waits.baseline()
    first, second = ExitStack(), ExitStack()
    first.enter_context(waits.one())
    clock.now_s += 2
    second.enter_context(waits.one())
    clock.now_s += 3
    first.close()
    assert waits.any_now and waits.waited_s() == 5
    clock.now_s += 1
    second.close()
    clock.now_s += 50
    assert not waits.any_now
    assert waits.waited_s() == 6
    assert waits.since(baseline) == (6, 5), "the first of them waited 5 s, the second 4 s"


def test_a_read_that_still_waits_counts_with_its_wait_until_then(clock: Clock) -> None:
    waits = Waits()
    baseline = waits.baseline()
    with waits.one():
        clock.now_s += 13
        assert waits.since(baseline) == (13, 13)
        with waits.one():
            clock.now_s += 1
            assert waits.since(baseline) == (14, 14), "the earliest is the longest"
    clock.now_s += 5
    assert waits.since(baseline) == (14, 14)


def test_who_comes_later_counts_from_his_own_begin(clock: Clock) -> None:
    waits = Waits()
    early = waits.baseline()
    with waits.one():
        clock.now_s += 10
    with waits.one():
        clock.now_s += 4
        late = waits.baseline()
        assert waits.since(late) == (0, 0)
        clock.now_s += 3
        assert waits.since(late) == (3, 3)
    with waits.one():
        clock.now_s += 1
    assert waits.since(early) == (18, 10)
    assert waits.since(late) == (4, 3)
    waits.forget(late)
    with waits.one():
        clock.now_s += 20
    assert waits.since(early) == (38, 20)


def test_a_read_that_fails_has_waited_too(clock: Clock) -> None:
    waits = Waits()
    baseline = waits.baseline()
    with pytest.raises(OSError, match="no source"), waits.one():
        clock.now_s += 7
        raise OSError("no source has it")
    assert not waits.any_now
    assert waits.since(baseline) == (7, 7)


def test_many_threads_leave_nothing_behind() -> None:
    waits = Waits()
    baseline = waits.baseline()
    begin = threading.Barrier(16)

    def read() -> None:
        begin.wait()
        for _ in range(200):
            with waits.one():
                pass

    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited_s, longest_s = waits.since(baseline)
    assert not waits.any_now
    assert 0 < longest_s <= waited_s == waits.waited_s()
