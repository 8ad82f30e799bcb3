"""The prefetch: what it brings first, what it leaves for later, and who never waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bootseer_slurm.artifacts.handle import BlobHandle, OpenBlob
from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.artifacts.source import BlobDescription
from bootseer_slurm.blob.manifest import BLOCK_BYTES, CHUNK_BYTES, Layout
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.blob.trace import Plan
from bootseer_slurm.cache.cache import IN_FLIGHT, MISSING, PRESENT, UNCHECKED, Cache
from bootseer_slurm.cache.reader import Reader
from bootseer_slurm.config import PrefetchConfig
from bootseer_slurm.errors import StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.prefetch import budget, streams
from bootseer_slurm.prefetch.budget import MemoryBudget
from bootseer_slurm.prefetch.order import both_ends, runs
from bootseer_slurm.prefetch.scheduler import Scheduler
from bootseer_slurm.userproc import link as links
from bootseer_slurm.userproc.link import HOLD_S

BLOCKS = 64
CONTENT = os.urandom(BLOCKS * BLOCK_BYTES)


class LinkSource:
    """A source over a link of a certain rate and latency, and what was read over it, in order."""

    name = "store"

    def __init__(self, link: links.Link, *, bytes_per_s: float = 1e12, latency_s: float = 0.0) -> None:
        self.reads: list[tuple[int, int]] = []  # first block, number of blocks
        self.failing = False
        self._link = link
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._free_s = 0.0

    @property
    def blocks(self) -> list[int]:
        return [block for first, count in self.reads for block in range(first, first + count)]

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        start_s = time.monotonic()
        # As the user's process does: one step in flight, and none begins while somebody waits.
        step_bytes = size_bytes if demand else self._link.step_bytes
        with self._link.demand() if demand else contextlib.nullcontext():
            with self._lock:
                self.reads.append((offset // BLOCK_BYTES, -(-size_bytes // BLOCK_BYTES)))
            for done in range(0, size_bytes, step_bytes):
                held_until_s = time.monotonic() + HOLD_S
                while not demand and self._link.is_waited_for and time.monotonic() < held_until_s:
                    time.sleep(0.001)
                self._carry(min(step_bytes, size_bytes - done))
        if not demand:
            self._link.measured(size_bytes, -(-size_bytes // step_bytes), time.monotonic() - start_s)
        yield memoryview(CONTENT)[offset : offset + size_bytes]

    def _carry(self, size_bytes: int) -> None:
        with self._lock:
            if self.failing:
                raise StoreError("the link is down")
            from_s = max(self._free_s, time.monotonic() + self._latency_s)
            self._free_s = from_s + size_bytes / self._bytes_per_s
            until_s = self._free_s
        time.sleep(max(0.0, until_s - time.monotonic()))


class Bringing(Scheduler):
    """The prefetch of one job, whose phase goes with what is asked of it."""

    def __init__(self, scene: Scene, config: PrefetchConfig, phase: JobPhase) -> None:
        super().__init__(scene.link, config, scene.memory, phase, scene.log, scene.told)
        self.phase = phase

    def add(self, layer: Layer, *, plan: Plan | None = None, **ranges: Any) -> None:
        layer.plan = plan or layer.plan
        super().add(layer, **ranges)

    def start_over(self) -> None:
        self.phase.train(marked=True)
        super().start_over()

    def stop(self) -> None:
        self.phase.end()
        super().stop()


class Scene:
    """The prefetch of a job, and what it reads from."""

    def __init__(self, folder: Path) -> None:
        self.link = links.Link()
        self.source = LinkSource(self.link)
        self.faults: list[str] = []
        self.memory = MemoryBudget()
        self.log = EventLog(1, 0, "n1")
        self._cache = Cache(folder / "cache", max_bytes=2**40, min_free_bytes=0, live=folder / "live")
        self._made: list[Bringing] = []

    def start(self, *, streams: int = 4, cold_bytes_per_s: int = 0) -> Bringing:
        config = PrefetchConfig(streams=streams, cold_rate_bytes=cold_bytes_per_s)
        self._made.append(Bringing(self, config, JobPhase()))
        return self._made[-1]

    def told(self, name: str, _message: str) -> None:
        self.faults.append(name)

    def target(self, kind: str = "image", name: str = "file-a", link: LinkSource | None = None) -> Layer:
        layout = Layout(len(CONTENT))
        reader = Reader(self._cache.acquire(name, layout, None, os.getuid(), os.getgid()), mtime_ns=0)
        blob, sources = OpenBlob(reader, cast(Any, None), Path()), [link or self.source]
        handle = BlobHandle(cast(Any, None), blob, sources, self.told, warm=False)
        reader.sources.add(handle)
        description = BlobDescription(name, layout, None, list(sources))
        return Layer(ArtifactRef(kind, f"/{name}"), description, handle, f"/{name}", "key", f"/{name}")

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.to_jsonl().splitlines()]
        return [line for line in lines if line.get("kind") == "prefetch" and line["name"] == name]

    def end(self) -> None:
        for each in self._made:
            each.stop()
            each.join(5)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.end()


def planned(*blocks: int, every_ms: int = 10, from_ms: int = 0) -> Plan:
    return Plan(blocks, tuple(from_ms + every_ms * place for place in range(len(blocks))), 1)


def until(condition: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def block(number: int) -> bytes:
    return CONTENT[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]


# Order


def test_tables_come_first_then_the_plan_in_its_order_and_then_nothing(scene: Scene) -> None:
    target, bringing = scene.target(), scene.start(streams=1, cold_bytes_per_s=2**40)
    bringing.add(target, plan=planned(40, 7, 33, 63, 2), first=[(0, 96), (63 * BLOCK_BYTES + 5, 100)])
    until(lambda: len(scene.events("hot")) == 1)
    assert scene.source.blocks == [0, 63, 40, 7, 33, 2]
    time.sleep(0.2)
    assert len(scene.source.blocks) == 6, "during the start nothing else is brought of what has a plan"
    bringing.start_over()
    until(lambda: target.handle.reader.blob.complete)
    assert target.handle.reader.blob.file.path.read_bytes() == CONTENT
    assert sorted(scene.source.blocks) == list(range(BLOCKS)), "every block once"


def test_plans_of_two_targets_are_followed_by_time(scene: Scene) -> None:
    late, early = LinkSource(scene.link), LinkSource(scene.link)
    order: list[str] = []
    for link, name in ((late, "late"), (early, "early")):
        link.reads = Log(order, name)  # type: ignore[assignment]
    bringing = scene.start(streams=1)
    with scene.link.demand():  # so that both are there before the first read
        second = scene.target("environment", "file-b", late)
        bringing.add(second, plan=planned(10, 20, from_ms=15, every_ms=20))
        target = scene.target("image", "file-a", early)
        bringing.add(target, plan=planned(1, 30, every_ms=20))
    until(lambda: len(scene.events("hot")) == 2)
    # The one stream may have taken the first run of the first target before the second came.
    assert [name for name in order if name][-3:] in (
        ["late", "early", "late"],
        ["early", "early", "late"],
    )


class Log(list[tuple[int, int]]):
    """A list that also tells whose it is when something is put in."""

    def __init__(self, order: list[str], name: str) -> None:
        self._order, self._name = order, name

    def append(self, item: tuple[int, int]) -> None:
        self._order.append(self._name)


def test_neighbours_go_by_one_read_that_ends_with_the_chunk(scene: Scene) -> None:
    scene.link.measured(10**9, 1, 0.001)  # a fast link, so runs may be long
    time.sleep(0.06)
    scene.link.measured(10**9, 1, 0.001)
    target, bringing = scene.target(), scene.start(streams=1)
    bringing.add(target, plan=planned(12, 14, 30, 13, 15, 16, 17, 29))
    until(lambda: len(scene.events("hot")) == 1)
    per_chunk = CHUNK_BYTES // BLOCK_BYTES
    assert per_chunk == 16
    assert scene.source.reads == [(12, 4), (29, 2), (16, 2)]


def test_neighbours_that_are_needed_much_later_do_not_come_early() -> None:
    far = [*range(100, 800, 2), 1]
    found = list(runs([0, *far], 16))
    assert found[0] == (0, 0, 0) and found[-1] == (1, 1, 1)
    assert sorted(first for _, first, _ in found) == sorted([0, *far])


def test_without_a_plan_comes_what_readers_come_to_and_the_rest_once_the_job_trains(scene: Scene) -> None:
    target, bringing = scene.target(), scene.start(cold_bytes_per_s=2**40)
    bringing.add(target, first=[(63 * BLOCK_BYTES, 100)])
    assert bringing.wait_hot(target, 10)
    time.sleep(0.2)
    assert scene.source.blocks == [63], "its tables"
    read(target, 40)
    until(lambda: target.handle.reader.blob.blocks.has(41, 41))
    for number in range(10, 14):
        read(target, number)
    until(lambda: target.handle.reader.blob.blocks.has(14, 14))
    time.sleep(0.2)
    assert {*range(10, 15), 40, 41, 63} <= set(scene.source.blocks) <= {*range(10, 18), 40, 41, 63}
    bringing.start_over()
    until(lambda: target.handle.reader.blob.complete and len(scene.events("end")) == 1)
    assert sorted(scene.source.blocks) == list(range(BLOCKS)), "every block once"


# As many as were read; less on a slow link, and what comes in 3 ms on a fast one.
@pytest.mark.parametrize(("bytes_per_s", "brought"), [(2**20, 1), (2**28, 4), (2**30, 12)])
def test_a_fast_link_brings_more_ahead(scene: Scene, bytes_per_s: int, brought: int) -> None:
    target, bringing = scene.target(), scene.start()
    bringing.add(target)
    scene.link._bytes_per_s = bytes_per_s
    scene.link.measured = lambda *_: None  # type: ignore[method-assign]
    assert target.handle.reader.ready(20 * BLOCK_BYTES, 4 * BLOCK_BYTES) is None
    until(lambda: target.handle.reader.blob.blocks.has(24, 23 + brought))
    time.sleep(0.2)
    assert sorted(scene.source.blocks) == list(range(24, 24 + brought))


def test_when_a_prefetch_has_stopped_reads_bring_no_more_than_they_need(scene: Scene) -> None:
    target, first, second = scene.target(), scene.start(), scene.start()
    first.add(target)
    first.stop()
    for number in range(5):
        read(target, number)
    assert scene.source.blocks == list(range(5))
    second.add(target)
    first.stop()  # which is not the one that is told now
    for number in range(5, 8):
        read(target, number)
    until(lambda: target.handle.reader.blob.blocks.has(8, 8))


def read(target: Layer, number: int) -> None:
    """Read a block, as the FUSE server does."""
    if target.handle.reader.ready(number * BLOCK_BYTES, BLOCK_BYTES) is None:
        assert target.handle.reader.fetch(number * BLOCK_BYTES, BLOCK_BYTES) == block(number)


def test_a_checkpoint_comes_whole_and_after_what_is_hot(scene: Scene) -> None:
    whole, hot = LinkSource(scene.link), LinkSource(scene.link)
    order: list[str] = []
    bringing = scene.start(streams=1)
    image = scene.target("image", "file-a", hot)
    checkpoint = scene.target("checkpoint", "file-b", whole)
    whole.reads, hot.reads = Log(order, "whole"), Log(order, "hot")  # type: ignore[assignment]
    with scene.link.demand():
        bringing.add(image, plan=planned(*range(0, BLOCKS, 2)))
        bringing.add(checkpoint)
    until(lambda: len(scene.events("end")) == 2)
    assert checkpoint.handle.reader.blob.complete
    assert order.index("whole") == 32 and "hot" not in order[32:]


# Waiting for what is hot


def test_the_wait_ends_when_the_hot_blocks_are_there_or_in_time(scene: Scene) -> None:
    slow = LinkSource(scene.link, bytes_per_s=20 * BLOCK_BYTES)
    target, bringing = scene.target(link=slow), scene.start()
    bringing.add(target, plan=planned(*range(0, 40, 2), every_ms=0))
    assert not bringing.wait_hot(target, 0.2)
    start_s = time.monotonic()
    assert bringing.wait_hot(target, 10)
    assert time.monotonic() - start_s < 5
    assert all(target.handle.reader.blob.blocks.has(number, number) for number in range(0, 40, 2))
    (event,) = scene.events("hot")
    assert (event["bytes"], event["blocks"], event["what"]) == (20 * BLOCK_BYTES, 20, "image")
    assert 0.8 < event["dur_s"] < 5


def test_the_wait_ends_early_when_each_block_comes_before_it_is_touched(scene: Scene) -> None:
    slow = LinkSource(scene.link, bytes_per_s=10 * BLOCK_BYTES)
    target, bringing = scene.target(link=slow), scene.start()
    bringing.add(target, plan=planned(*range(0, 40, 2), every_ms=1000))
    assert bringing.wait_hot(target, 10)
    assert scene.events("hot") == [], "2 s of the link, of which a start needs the first block only"
    until(lambda: len(scene.events("hot")) == 1)


def test_tables_without_a_plan_that_others_just_brought_are_there(scene: Scene) -> None:
    """All is present, and the stream that waited for it has not said so yet."""
    scene.link.measured(10**9, 1, 0.001)
    time.sleep(0.06)
    scene.link.measured(10**9, 1, 0.001)
    target, bringing = scene.target(), scene.start(streams=1)
    assert target.handle.reader.blob.blocks.claim(0, 0)[0] == 1  # as another job's read
    bringing.add(target, first=[(0, BLOCK_BYTES)])
    work = bringing._queue.works[0]
    assert not work.comes_in_time(scene.link.bytes_per_s)
    target.handle.reader.blob.blocks.end_claim(0, 1, PRESENT)
    work.hot_over = False
    assert work.comes_in_time(scene.link.bytes_per_s)


def test_there_is_nothing_to_wait_for_without_a_plan_or_with_all_in_the_cache(scene: Scene) -> None:
    slow = LinkSource(scene.link, bytes_per_s=BLOCK_BYTES)
    target, bringing = scene.target(link=slow), scene.start(streams=1)
    bringing.add(target)
    assert bringing.wait_hot(target, 0) and scene.events("hot") == []
    warm = scene.target(name="file-b")
    while warm.handle.reader.prefetch_run()[1]:
        pass
    bringing.add(warm, plan=planned(3, 4))
    assert bringing.wait_hot(warm, 0) and len(scene.events("hot")) == 1
    assert not bringing.wait_hot(scene.target(name="file-c"), 0), "one that nobody brings"


def test_hot_blocks_that_others_fetch_are_waited_for_and_fetched_when_they_fail(scene: Scene) -> None:
    target, bringing = scene.target(), scene.start()
    assert target.handle.reader.blob.blocks.claim(5, 5)[0] == 1  # as another job's read
    bringing.add(target, plan=planned(4, 5))
    assert not bringing.wait_hot(target, 0.3)
    assert target.handle.reader.blob.blocks.states[5] == IN_FLIGHT
    target.handle.reader.blob.blocks.end_claim(5, 1, MISSING)
    assert bringing.wait_hot(target, 10)
    assert scene.source.blocks == [4, 5]


def test_a_lost_source_is_told_and_ends_the_wait(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_ATTEMPTS", 2)
    scene.source.failing = True
    target, bringing = scene.target(), scene.start()
    bringing.add(target, plan=planned(1, 9))
    start_s = time.monotonic()
    assert not bringing.wait_hot(target, 10)
    assert time.monotonic() - start_s < 5
    until(lambda: "prefetch_failed" in scene.faults)
    scene.source.failing = False
    assert target.handle.reader.fetch(9 * BLOCK_BYTES, 10) == block(9)[:10], "readers try again"


def test_a_full_disk_ends_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    target, bringing = scene.target(), scene.start()
    monkeypatch.setattr(
        type(target.handle.reader.blob.file), "write", lambda file, *_: setattr(file, "full", True)
    )
    bringing.add(target, plan=planned(*range(0, BLOCKS, 2)))
    assert not bringing.wait_hot(target, 10)
    until(lambda: bool(scene.events("end")))
    assert len(scene.source.reads) <= 4, "the reads in flight, and no more"
    assert scene.faults == ["cache_full"]


def test_a_stop_ends_the_wait(scene: Scene) -> None:
    target, bringing = scene.target(link=LinkSource(scene.link, bytes_per_s=BLOCK_BYTES)), scene.start()
    bringing.add(target, plan=planned(*range(0, BLOCKS, 2)))
    threading.Timer(0.2, bringing.stop).start()
    start_s = time.monotonic()
    assert not bringing.wait_hot(target, 10)
    assert time.monotonic() - start_s < 3
    assert len(scene.events("stopped")) == 1


# Cold


def test_cold_keeps_to_its_rate(scene: Scene) -> None:
    target = scene.target()
    bringing = scene.start(cold_bytes_per_s=len(CONTENT) * 2 // 3)
    bringing.add(target, plan=planned(0))
    assert bringing.wait_hot(target, 10)
    bringing.start_over()
    start_s = time.monotonic()
    until(lambda: target.handle.reader.blob.complete)
    assert 1.2 < time.monotonic() - start_s < 5
    until(lambda: len(scene.events("end")) == 1)
    assert max(count for _, count in scene.source.reads) <= CHUNK_BYTES // BLOCK_BYTES


def test_without_a_cold_rate_the_rest_stays_where_it_is(scene: Scene) -> None:
    target, bringing = scene.target(), scene.start(cold_bytes_per_s=0)
    bringing.add(target, plan=planned(3, 9))
    until(lambda: len(scene.events("end")) == 1)
    bringing.start_over()
    time.sleep(0.2)
    assert sorted(scene.source.blocks) == [3, 9]
    other = scene.target("checkpoint", "file-b")
    bringing.add(other)
    until(lambda: len(scene.events("end")) == 2)
    assert not other.handle.reader.blob.present_bytes


def test_when_the_start_is_over_what_is_hot_becomes_cold(scene: Scene) -> None:
    slow = LinkSource(scene.link, bytes_per_s=20 * BLOCK_BYTES)
    target, bringing = scene.target(link=slow), scene.start(cold_bytes_per_s=10 * BLOCK_BYTES)
    bringing.add(target, plan=planned(*range(BLOCKS - 2, 0, -2)))
    until(lambda: len(slow.reads) >= 4)
    bringing.start_over()
    assert not bringing.wait_hot(target, 0)
    before = len(slow.reads)
    until(lambda: target.handle.reader.blob.blocks.states[0] != MISSING)
    time.sleep(1)
    assert 3 <= len(slow.blocks) - before <= 20


# Who never waits, and what is never done twice


@pytest.mark.parametrize("queue", ["hot", "whole", "cold"])
def test_a_read_waits_for_no_more_than_what_is_on_its_way(scene: Scene, queue: str) -> None:
    link = LinkSource(scene.link, bytes_per_s=50 * BLOCK_BYTES, latency_s=0.001)
    kind = "checkpoint" if queue == "whole" else "image"
    target, bringing = scene.target(kind, link=link), scene.start(streams=8, cold_bytes_per_s=2**40)
    plans = {"hot": planned(*range(58)), "whole": Plan(), "cold": planned(0)}
    bringing.add(target, plan=plans[queue])
    if queue == "cold":
        bringing.start_over()
    until(lambda: len(link.reads) >= 2)
    waits = []
    for number in range(63, 58, -1):
        start_s = time.monotonic()
        if target.handle.reader.ready(number * BLOCK_BYTES, BLOCK_BYTES) is None:
            assert target.handle.reader.fetch(number * BLOCK_BYTES, BLOCK_BYTES) == block(number)
            waits.append(time.monotonic() - start_s)
    assert not target.handle.reader.blob.complete, "the prefetch was still under way"
    assert sorted(waits)[len(waits) // 2] < 0.1, "one block of 20 ms before it, and its own"


def test_one_fetch_for_each_block_whoever_asks(scene: Scene) -> None:
    link = LinkSource(scene.link, bytes_per_s=400 * BLOCK_BYTES)
    first, second = scene.start(streams=8), scene.start(streams=8)
    target = scene.target(link=link)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for place in range(BLOCKS):
            number = (place * 7 + seed) % BLOCKS
            if bytes(target.handle.reader.fetch(number * BLOCK_BYTES, BLOCK_BYTES)) != block(number):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed * 13,)) for seed in range(4)]
    first.add(target, plan=planned(*range(0, BLOCKS, 3)))
    second.add(target)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sorted(link.blocks) == list(range(BLOCKS))
    assert target.handle.reader.usage.store_bytes == len(CONTENT)


def test_after_a_reboot_what_is_there_is_checked_not_fetched(scene: Scene) -> None:
    target = scene.target()
    while target.handle.reader.prefetch_run()[1]:
        pass
    target.handle.reader.blob.blocks.states[:] = bytes([UNCHECKED]) * BLOCKS
    fetched = len(scene.source.reads)
    bringing = scene.start()
    bringing.add(target, plan=planned(5, 50))
    assert bringing.wait_hot(target, 10) and target.handle.reader.blob.blocks.has(5, 5)
    assert len(scene.source.reads) == fetched and not scene.faults


# The kernel's page cache


def test_hot_blocks_are_pushed_within_the_budget_and_cold_ones_never(scene: Scene) -> None:
    scene.memory.bound(4 * 3 * BLOCK_BYTES)
    pushed: dict[int, bytes] = {}
    target, bringing = scene.target(), scene.start(streams=1, cold_bytes_per_s=2**40)
    target.handle.push = lambda offset, view: pushed.update({offset // BLOCK_BYTES: bytes(view)})
    bringing.add(target, plan=planned(2, 20, 40, 60, 50))
    assert bringing.wait_hot(target, 10)
    bringing.start_over()
    until(lambda: target.handle.reader.blob.complete)
    assert pushed == {number: block(number) for number in (2, 20, 40)}
    assert target.handle.reader.usage.pushed_bytes == 3 * BLOCK_BYTES


def test_the_budget_is_a_share_of_what_is_free_and_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: SimpleNamespace(available=800))
    made = MemoryBudget()
    assert made.may_push(60) and made.may_push(40) and not made.may_push(1)
    made = MemoryBudget()
    made.bound(10_000)
    assert made.may_push(100) and not made.may_push(1), "the job has more than there is"
    made = MemoryBudget()
    made.bound(80)
    assert made.may_push(20) and not made.may_push(1)
    made = MemoryBudget()
    assert made.may_push(30)
    made.bound(80)
    assert not made.may_push(1), "what was given before the job's memory was known counts"


def test_a_checkpoint_larger_than_the_budget_lies_on_disk_beyond_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_BATCH_BYTES", CHUNK_BYTES)
    scene.memory.bound(len(CONTENT) // 4)
    target, bringing = scene.target("checkpoint"), scene.start(streams=2)
    bringing.add(target)
    until(lambda: target.handle.reader.blob.complete and len(scene.events("end")) == 1)
    # What is read from the link behind the budget is synced and dropped; a batch may be left.
    until(lambda: resident_bytes(target.handle.reader.blob.file.path) <= len(CONTENT) // 4 + 2 * CHUNK_BYTES)
    assert target.handle.reader.blob.file.path.read_bytes() == CONTENT and not scene.faults
    image, unbounded = scene.target("image", "file-b"), scene.start(streams=2, cold_bytes_per_s=2**40)
    unbounded.add(image)
    unbounded.start_over()
    until(lambda: image.handle.reader.blob.complete)
    assert resident_bytes(image.handle.reader.blob.file.path) == len(CONTENT), (
        "only checkpoints are as large as memory"
    )


def resident_bytes(path: Path) -> int:
    """How much of a file the kernel keeps in memory (fincore of util-linux)."""
    done = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", path],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_a_checkpoint_on_a_disk_that_fails_to_sync_is_checked_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells once that it lost what was written: whoever hears of it must not keep it to himself."""
    target = scene.target("checkpoint")
    blob = target.handle.reader.blob
    while target.handle.reader.prefetch_run()[1]:
        pass

    def fail(fd: int) -> None:
        raise OSError(5, "lost")

    monkeypatch.setattr(os, "fdatasync", fail)
    blob.drop_pages([(0, CHUNK_BYTES)])
    assert blob.file.full and set(blob.blocks.states[:]) == {UNCHECKED}


# Checkpoints


def test_both_ends_of_a_checkpoint_come_before_the_rest_and_after_all_plans(scene: Scene) -> None:
    model, image, bringing = (
        scene.target("checkpoint"),
        scene.target("image", "file-b"),
        scene.start(streams=1),
    )
    link = LinkSource(scene.link)
    model.handle.reader.sources._sources = (link,)
    image.handle.reader.sources._sources = (link,)
    scene.source = link
    with scene.link.demand():  # nothing is prefetched meanwhile
        bringing.add(model, ends=both_ends(len(CONTENT)))
        bringing.add(image, plan=planned(7, 9))
    until(lambda: model.handle.reader.blob.complete)
    per_end = 2**20 // BLOCK_BYTES
    # One stream may have taken its first run before the image came.
    assert sorted(link.reads[:2] + link.reads[2:4]) == sorted(
        [(0, per_end), (BLOCKS - per_end, per_end), (7, 1), (9, 1)]
    )
    assert link.reads.index((BLOCKS - per_end, per_end)) == 3
    assert both_ends(100) == ((0, 100), (0, 100))


def test_of_a_checkpoint_with_a_plan_nothing_else_is_brought_ever(scene: Scene) -> None:
    bringing = scene.start(cold_bytes_per_s=2**40)
    some, none = scene.target("checkpoint"), scene.target("checkpoint", "file-b")
    bringing.add(some, plan=planned(5, 6, 40))
    bringing.add(none, plan=Plan((), (), 2), ends=both_ends(len(CONTENT)))
    until(lambda: len(scene.events("end")) == 2)
    bringing.start_over()
    time.sleep(0.2)
    assert sorted(scene.source.blocks) == [5, 6, 40], "the next start has another checkpoint"
