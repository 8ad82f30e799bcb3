"""The order of reads: those that somebody waits for go first, and the prefetch keeps its queue short."""

from __future__ import annotations

import contextlib
import threading
import time

from bootseer_slurm.blob.manifest import BLOCK_BYTES, CHUNK_BYTES
from bootseer_slurm.userproc.link import Link


def began(link: Link, *, within_s: float) -> bool:
    """Whether another run of the prefetch may begin in that time."""
    event = threading.Event()

    def run() -> None:
        with link.prefetch():
            event.set()

    threading.Thread(target=run, daemon=True).start()
    return event.wait(within_s)


def test_no_run_begins_while_a_reader_waits() -> None:
    link = Link()
    with link.demand():
        assert not began(link, within_s=0.1)
    assert began(link, within_s=5)


def test_a_reader_that_never_pauses_does_not_stop_the_prefetch() -> None:
    link = Link()
    with link.demand():
        assert began(link, within_s=5)


def test_one_block_is_in_flight_where_nothing_is_known() -> None:
    """In two halves: one on its way, one asked for."""
    link = Link()
    assert link.step_bytes == BLOCK_BYTES // 2
    with link.prefetch(), link.prefetch():
        assert not began(link, within_s=0.1)


def test_a_fast_path_gets_larger_steps_and_a_slow_one_small_ones() -> None:
    fast, slow = Link(), Link()
    for link, bytes_per_s in ((fast, 3e9), (slow, 3e7)):
        start = time.monotonic()
        while time.monotonic() - start < 0.2:
            time.sleep(0.01)
            link.measured(int(bytes_per_s * 0.01), steps=1, dur_s=0.003)
    assert BLOCK_BYTES < fast.step_bytes <= CHUNK_BYTES
    assert slow.step_bytes == BLOCK_BYTES // 2
    with fast.prefetch() as run_bytes:
        assert run_bytes == CHUNK_BYTES


def test_one_run_is_always_allowed() -> None:
    link = Link()
    for _ in range(3):
        with link.prefetch() as run_bytes:
            assert run_bytes >= BLOCK_BYTES


def test_an_urgent_run_goes_before_those_that_wait() -> None:
    link, order = Link(), []

    def run(name: str, *, urgent: bool) -> None:
        with link.prefetch(urgent=urgent):
            order.append(name)

    with link.prefetch(), link.prefetch():
        threads = []
        for name, urgent in (("whole", False), ("first", True), ("second", True)):
            threads.append(threading.Thread(target=run, args=(name,), kwargs={"urgent": urgent}))
            threads[-1].start()
            time.sleep(0.05)
    for thread in threads:
        thread.join(5)
    assert order == ["first", "second", "whole"]


def test_short_runs_count_as_what_they_are() -> None:
    link = Link()
    start = time.monotonic()
    while time.monotonic() - start < 0.2:
        time.sleep(0.01)
        link.measured(int(3e9 * 0.01), steps=1, dur_s=0.003)
    assert link.step_bytes > 2 * BLOCK_BYTES
    with contextlib.ExitStack() as stack:
        for _ in range(8):  # only four steps would have been
            assert stack.enter_context(link.prefetch(BLOCK_BYTES)) == BLOCK_BYTES


def test_a_long_run_is_not_overtaken_by_short_ones() -> None:
    link, order = Link(), []
    start = time.monotonic()
    while time.monotonic() - start < 0.2:
        time.sleep(0.01)
        link.measured(30_000_000, steps=1, dur_s=0.003)

    def run(size_bytes: int) -> None:
        with link.prefetch(size_bytes):
            order.append(size_bytes)
            time.sleep(0.01)

    with contextlib.ExitStack() as in_flight:
        while began(link, within_s=0.1):  # until there is no room for another one of this length
            in_flight.enter_context(link.prefetch())
        asking = [threading.Thread(target=run, args=(size,)) for size in (CHUNK_BYTES, *[BLOCK_BYTES] * 4)]
        for thread in asking:
            thread.start()
            time.sleep(0.05)
        assert order == []
    for thread in asking:
        thread.join(10)
    assert order == [CHUNK_BYTES, *[BLOCK_BYTES] * 4]
