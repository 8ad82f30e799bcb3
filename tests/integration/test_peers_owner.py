"""The agent's end of peers: readers of two nodes, each with a cache and a peer process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm.blob.manifest import BLOCK_BYTES, CHUNK_BYTES, Manifest, decode
from bootseer_slurm.blob.writer import BlobWriter, Original
from bootseer_slurm.cache.cache import IN_FLIGHT, Cache
from bootseer_slurm.cache.fetching import Claim
from bootseer_slurm.cache.reader import Reader
from bootseer_slurm.cache.sources import Source
from bootseer_slurm.errors import InputError, StoreError
from bootseer_slurm.peers.local import (
    Arrived,
    Counted,
    Have,
    Lost,
    Order,
    Want,
    decode_from_child,
    encode,
)
from bootseer_slurm.peers.owner.outbox import Outbox
from bootseer_slurm.peers.owner.process import PeerProcess
from bootseer_slurm.peers.owner.source import PeerSource, unit_bytes_of
from bootseer_slurm.store import FileStore
from bootseer_slurm.userproc.spare import start

CHUNKS = 6
SIZE_BYTES = CHUNKS * CHUNK_BYTES + 12345
PEER = "bootseer_slurm.peers.child"


class CountingStore:
    """The store of all nodes (a Source), which counts what is read of it."""

    name = "store"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.read_bytes = 0
        self.is_wrong = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        with self._lock:
            self.read_bytes += size_bytes
        if self.is_wrong:
            raise StoreError("it is gone")
        time.sleep(0.01)
        yield memoryview(self.content[offset : offset + size_bytes])


class Node:
    """One node of the job: its cache, its peer process, and the reader of the blob."""

    def __init__(self, folder: Path, number: int, ports: tuple[int, ...], kind: str) -> None:
        self.faults: list[str] = []
        self.cache = Cache(folder / "cache", max_bytes=2**40, min_free_bytes=0, live=folder / "live")
        self.started = start(PEER)
        order = Order(
            uid=os.getuid(),
            gid=os.getgid(),
            user_groups=tuple(os.getgroups()),
            key=bytes(32),
            node=number,
            addresses=("127.0.0.1", "127.0.0.2"),
            ports=ports,
            blocks=((0, 1),),
            upload_bytes_per_s=3e9,
            slots=12,
        )
        self.kind = kind
        self.process = PeerProcess(self.started.process, self.started.socket, order)

    def open(self, manifest: Manifest, store: CountingStore) -> Reader:
        blob = self.cache.acquire(manifest.id, manifest.layout, manifest.digests, os.getuid(), os.getgid())
        self.reader = Reader(blob, mtime_ns=0)
        self.store = store
        self.join()
        return self.reader

    def join(self) -> None:
        """Exchange the blob from now on."""
        self.source = PeerSource(self.process, 7, self.reader.blob, unit_bytes_of(self.kind))
        self.sources: list[Source] = [self.store, self.source]
        self.reader.sources.add(self)

    def on_fault(self, name: str, _message: str) -> None:
        self.faults.append(name)

    def prefetch(self) -> None:
        threads = [threading.Thread(target=self._stream) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def prefetch_alone(self) -> None:
        """Get all from the store, and let no other node know."""
        self.sources = [self.store]
        self.reader.sources.add(self)
        while self.reader.prefetch_run()[1]:
            pass
        self.reader.sources.remove(self)

    def _stream(self) -> None:
        while True:
            first, end = self.reader.prefetch_unit(admit=admitted)
            if end == first:
                return


@contextlib.contextmanager
def admitted(size_bytes: int) -> Iterator[int]:
    yield size_bytes


class Job:
    """Two nodes, a store, and a blob in it."""

    def __init__(self, folder: Path, kind: str = "checkpoint") -> None:
        self.content = os.urandom(SIZE_BYTES)
        file = folder / "model.bin"
        file.write_bytes(self.content)
        (folder / "store").mkdir()
        store = FileStore(folder / "store")
        name = BlobWriter(store, objects=1).store_named(file, Original("checkpoint", str(file), "made"))
        self.manifest = decode((folder / "store" / name.folder / "manifest").read_bytes())
        self.store = CountingStore(self.content)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.nodes = [Node(folder / f"n{number}", number, (port, port + 1), kind) for number in (0, 1)]
        for node in self.nodes:
            node.open(self.manifest, self.store)

    def close(self) -> None:
        for node in self.nodes:
            node.process.close()


@pytest.fixture(params=["checkpoint", "image"])
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    made = Job(tmp_path, request.param)
    yield made
    made.close()


def prefetch_all(job: Job) -> None:
    threads = [threading.Thread(target=node.prefetch) for node in job.nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_nodes_read_one_copy(job: Job) -> None:
    prefetch_all(job)
    for node in job.nodes:
        assert node.reader.blob.file.path.read_bytes() == job.content
        assert node.faults == []
    assert job.store.read_bytes == SIZE_BYTES
    assert sum(node.reader.usage.peer_bytes for node in job.nodes) == SIZE_BYTES


def test_each_node_begins_with_a_unit_of_its_own(job: Job) -> None:
    unit = job.nodes[0].source.unit_blocks
    turns = [node.reader.prefetch_unit(admit=admitted)[0] // unit for node in job.nodes]
    assert turns == [0, 1]
    turns = [node.reader.prefetch_unit(admit=admitted)[0] // unit for node in job.nodes]
    assert turns == [1, 0]
    turns = [node.reader.prefetch_unit(admit=admitted)[0] // unit for node in job.nodes]
    assert turns == [2, 3]


def test_who_waits_gets_a_unit_from_the_node_that_has_it(job: Job) -> None:
    first, second = (node.reader for node in job.nodes)
    assert first.fetch(5_000_000, 10) == job.content[5_000_000:5_000_010]
    assert second.fetch(5_000_100, 10) == job.content[5_000_100:5_000_110]
    assert second.usage.peer_bytes == job.store.read_bytes
    assert second.usage.store_bytes == 0


def test_a_read_of_what_is_being_fetched_waits_for_it(job: Job) -> None:
    reader = job.nodes[0].reader
    threads = [threading.Thread(target=reader.fetch, args=(4096 * number, 100)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reader.blob.file.read(0, 40_000) == job.content[:40_000]
    assert job.store.read_bytes == reader.usage.fetched_bytes


def test_what_a_node_had_before_is_given(tmp_path: Path) -> None:
    job = Job(tmp_path)
    try:
        first, second = job.nodes
        first.source.close()
        first.reader.sources.remove(first)
        first.prefetch_alone()
        first.join()
        before = job.store.read_bytes
        assert before == SIZE_BYTES
        time.sleep(0.5)  # what is here is offered each 50 ms
        second.prefetch()
        assert job.store.read_bytes == before
        assert second.reader.blob.file.path.read_bytes() == job.content
    finally:
        job.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_its_user_ends_or_stops_costs_no_bytes(job: Job, how: signal.Signals) -> None:
    own = job.nodes[0]
    own.started.process.send_signal(how)
    assert own.reader.fetch(5_000_000, 10) == job.content[5_000_000:5_000_010]
    prefetch_all(job)
    for node in job.nodes:
        assert node.reader.blob.file.path.read_bytes() == job.content
    assert not own.process.is_used


def test_a_store_that_fails_is_told_to_those_who_wait(job: Job) -> None:
    first, second = (node.reader for node in job.nodes)
    for reader in (first, second):
        reader.patience_s = 1.0
    job.store.is_wrong = True
    with pytest.raises(OSError, match="Input/output"):
        first.fetch(0, 10)
    job.store.is_wrong = False
    assert second.fetch(0, 10) == job.content[:10]
    assert first.fetch(0, 10) == job.content[:10]


def test_wrong_bytes_of_a_peer_come_from_the_store_instead(job: Job) -> None:
    first, second = job.nodes
    first.prefetch()
    file = first.reader.blob.file
    os.pwrite(file.fd, b"wrong", 5_000_000)
    assert second.reader.fetch(5_000_000, 10) == job.content[5_000_000:5_000_010]
    assert second.faults == ["corrupt_block"]
    assert second.reader.usage.store_bytes


def test_a_full_disk_gives_what_it_cannot_keep_and_has_others_ask_elsewhere(job: Job) -> None:
    first, second = job.nodes
    first.reader.blob.file.full = True
    assert first.reader.fetch(0, 10) == job.content[:10]
    assert job.store.read_bytes == BLOCK_BYTES, "a unit of which nothing is kept would be read for each block"
    assert second.reader.fetch(0, 10) == job.content[:10]


def test_the_process_cannot_write_the_file(job: Job) -> None:
    job.nodes[0].reader.fetch(0, 10)
    pid = job.nodes[0].started.process.pid
    folder = Path(f"/proc/{pid}/fdinfo")
    path = str(job.nodes[0].reader.blob.file.path)
    own = [fd for fd in os.listdir(f"/proc/{pid}/fd") if os.readlink(f"/proc/{pid}/fd/{fd}") == path]
    assert own
    flags = [
        line for fd in own for line in (folder / fd).read_text().splitlines() if line.startswith("flags")
    ]
    assert all(int(line.split()[1], 8) & os.O_ACCMODE == os.O_RDONLY for line in flags)


def wait_until_used(node: Node) -> None:
    deadline_s = time.monotonic() + 5
    while not node.process.is_used:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_stopped_process_is_used_again_when_it_goes_on(job: Job) -> None:
    own = job.nodes[0]
    own.started.process.send_signal(signal.SIGSTOP)
    begin_s = time.monotonic()
    assert own.reader.fetch(0, 10) == job.content[:10]
    assert 0.9 < time.monotonic() - begin_s < 3.0
    begin_s = time.monotonic()
    assert own.reader.fetch(5_000_000, 10) == job.content[5_000_000:5_000_010]
    assert time.monotonic() - begin_s < 0.5, "nobody waits for it a second time"
    assert own.reader.sources.unit_blocks == 0
    own.started.process.send_signal(signal.SIGCONT)
    wait_until_used(own)


def test_nobody_waits_for_a_process_that_does_not_listen(job: Job) -> None:
    own = job.nodes[0]
    own.started.process.send_signal(signal.SIGSTOP)
    begin_s = time.monotonic()
    for _ in range(10_000):
        own.process.say(Have(1, 0))
    assert time.monotonic() - begin_s < 5
    own.started.process.send_signal(signal.SIGCONT)
    assert own.reader.fetch(0, 10) == job.content[:10]
    assert own.process.is_used
    own.started.process.send_signal(signal.SIGSTOP)
    for _ in range(40_000):
        own.process.say(Have(1, 0))
    assert not own.process.is_used, "what it does not take is bounded"
    assert own.reader.fetch(5_000_000, 10) == job.content[5_000_000:5_000_010]


def test_who_waits_does_not_wait_for_the_prefetch_to_have_its_turn(job: Job) -> None:
    reader = job.nodes[0].reader
    is_admitted, is_asked = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def late(size_bytes: int) -> Iterator[int]:
        is_asked.set()
        is_admitted.wait(30)
        yield size_bytes

    prefetch = threading.Thread(target=lambda: reader.prefetch_unit(admit=late))
    prefetch.start()
    assert is_asked.wait(10)
    begin_s = time.monotonic()
    assert reader.fetch(0, 10) == job.content[:10]
    assert time.monotonic() - begin_s < 1
    read_bytes = job.store.read_bytes
    is_admitted.set()
    prefetch.join()
    assert job.store.read_bytes == read_bytes, "it came already"


def test_handles_of_one_job_share_a_blob(job: Job) -> None:
    own = job.nodes[0]
    assert own.source.share(own.reader.blob)
    own.source.close()
    own.reader.fetch(0, 10)
    assert job.nodes[1].reader.fetch(0, 10) == job.content[:10]
    assert job.nodes[1].reader.usage.peer_bytes
    own.source.close()
    assert not own.source.share(own.reader.blob)


def test_a_blob_of_other_chunks_is_not_exchanged(job: Job) -> None:
    own = job.nodes[0]
    with pytest.raises(InputError, match="nodes exchange 8388608"):
        PeerSource(own.process, 7, own.reader.blob, 2 * CHUNK_BYTES)


@pytest.mark.parametrize(
    "said", [b"", b"x", b"\x82\xa4type\xa7Started\xa1x" + b"\x91" * 60_000, encode(Arrived(1, 0, 99, 1, 0.0))]
)
def test_a_process_that_says_what_it_may_not_is_ended(tmp_path: Path, said: bytes) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = subprocess.Popen(["sleep", "60"])
    order = Order(0, 0, (), bytes(32), 0, ("127.0.0.1", "127.0.0.2"), (7070,), ((0, 1),), 1.0, 12)
    process = PeerProcess(child, near, order)
    if said:
        far.send(said)
    else:
        far.close()
    assert child.wait(10) == -signal.SIGKILL
    assert not process.is_used
    process.close()
    far.close()


def test_any_number_of_bytes_is_counted() -> None:
    counted = Counted({1: 2**40}, {1: 2**62}, {}, (), ())
    assert decode_from_child(encode(counted)) == counted


def test_a_process_that_stalled_over_a_question_is_used_again(job: Job) -> None:
    """It says that it runs, also where it has nothing else to say."""
    own = job.nodes[0]
    job.nodes[1].process.close()  # whoever is asked answers late
    time.sleep(0.3)
    got: list[bytes] = []
    own.started.process.send_signal(signal.SIGSTOP)
    reading = threading.Thread(target=lambda: got.append(bytes(own.reader.fetch(0, 10))))
    reading.start()
    reading.join(10)
    assert got == [job.content[:10]]
    own.started.process.send_signal(signal.SIGCONT)
    wait_until_used(own)


def test_what_was_lost_holds_up_nothing(tmp_path: Path) -> None:
    """Want and Lost of a chunk come together, where the agent did not wait for a process that stalled."""
    job = Job(tmp_path, "image")
    own = job.nodes[0]
    own.started.process.send_signal(signal.SIGSTOP)
    for unit in range(8):
        own.process.say(Want(1, (unit,)))
        own.process.say(Lost(1, unit))
    own.started.process.send_signal(signal.SIGCONT)
    time.sleep(1.2)
    assert own.process.is_used
    begin_s = time.monotonic()
    first, end = own.reader.prefetch_unit(20 * own.source.unit_blocks, admit=admitted)
    job.close()
    assert end > first
    assert time.monotonic() - begin_s < 3


def test_a_read_finds_a_claim_that_comes_to_wait_while_it_waits(job: Job) -> None:
    reader = job.nodes[0].reader
    asked, go_on = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def late(size_bytes: int) -> Iterator[int]:
        go_on.wait(30)
        yield size_bytes

    claims = reader._fetching.claims
    park = claims.park

    def parked_late(claim: Claim) -> Claim:
        asked.set()
        time.sleep(0.3)
        return park(claim)

    claims.park = parked_late  # type: ignore[method-assign]
    prefetch = threading.Thread(target=lambda: reader.prefetch_unit(admit=late))
    prefetch.start()
    assert asked.wait(10)
    begin_s = time.monotonic()
    assert reader.fetch(0, 10) == job.content[:10]
    assert time.monotonic() - begin_s < 0.8
    go_on.set()
    prefetch.join()


def test_a_claim_ends_once_whatever_is_raised(job: Job) -> None:
    own = job.nodes[0]

    def fails(*_: object) -> None:
        raise RuntimeError("no more threads")

    own.source.lost = fails  # type: ignore[method-assign]
    own.source.kept = fails  # type: ignore[method-assign]
    job.store.is_wrong = True
    with pytest.raises(RuntimeError):
        own.reader.prefetch_unit(admit=admitted)
    job.store.is_wrong = False
    with pytest.raises(RuntimeError):
        own.reader.prefetch_unit(admit=admitted)
    assert own.reader.blob.blocks.has(0, own.source.unit_blocks - 1), "what is kept stays"
    assert IN_FLIGHT not in own.reader.blob.blocks.states[:]


def test_messages_that_wait_keep_their_order_and_come_once() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    outbox = Outbox(near)
    count = 15_000
    heard: list[int] = []

    def hear() -> None:
        while len(heard) < count:
            heard.append(int(far.recv(100)))
            if len(heard) % 500 == 0:
                time.sleep(0.01)

    listening = threading.Thread(target=hear)
    listening.start()
    for number in range(count):
        fd = os.open("/dev/null", os.O_RDONLY) if number % 50 == 0 else -1
        assert outbox.put(str(number).encode(), fd)
        if fd >= 0:
            os.close(fd)
    listening.join(30)
    assert heard == list(range(count))
    outbox.close()
    near.close()
    far.close()
