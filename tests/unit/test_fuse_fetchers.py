"""The queue that users share."""

from __future__ import annotations

import threading

from bootseer_slurm.fuse.fetchers import FairQueue


def test_users_take_turns_and_none_has_more_than_his_share() -> None:
    queue: FairQueue[str] = FairQueue(2)
    for number in range(4):
        queue.put(1, number, f"a{number}")
    queue.put(2, 0, "b0")
    queue.put(2, 1, "b1")
    assert [queue.take() for _ in range(4)] == [(1, "a0"), (2, "b0"), (1, "a1"), (2, "b1")]
    queue.put(3, 0, "c0")
    assert queue.take() == (3, "c0"), "user 1 has two in hand"
    queue.done(1)
    assert queue.take() == (1, "a2")


def test_who_waits_gets_what_comes_and_the_end() -> None:
    queue: FairQueue[str] = FairQueue(1)
    got: list[object] = []
    threads = [threading.Thread(target=lambda: got.append(queue.take())) for _ in range(3)]
    for thread in threads:
        thread.start()
    queue.put(1, 0, "a")
    queue.put(1, 1, "b")
    queue.put(2, 0, "c")
    for _ in range(2000):
        if len(got) == 2:
            break
        threading.Event().wait(0.005)
    assert sorted(map(str, got)) == ["(1, 'a')", "(2, 'c')"]
    queue.done(1)
    for thread in threads:
        thread.join(10)
    assert (1, "b") in got
    waiting = threading.Thread(target=lambda: got.append(queue.take()))
    waiting.start()
    queue.close()
    waiting.join(10)
    assert got[-1] is None


def test_what_is_forgotten_takes_no_turn() -> None:
    queue: FairQueue[str] = FairQueue(2)
    for number in range(3):
        queue.put(1, number, f"a{number}")
    queue.put(2, 0, "b0")
    queue.forget(1, 0)
    queue.forget(2, 0)
    queue.forget(3, 7)
    assert [queue.take() for _ in range(2)] == [(1, "a1"), (1, "a2")]
