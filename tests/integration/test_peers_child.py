"""Peer processes on real TCP: several nodes on loopback addresses, each with an owner that is the test's."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers import local
from bootseer_slurm.peers.directory import Handover, Parent
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.key import HELLO_BYTES, KEY_BYTES, PROOF_BYTES, Connects, Listens
from bootseer_slurm.peers.messages import Answered, AskList, Given, Join
from bootseer_slurm.peers.uploads import Get
from bootseer_slurm.peers.wire import MOST_DATA_BYTES, Connection
from scripts.lib.bench.peers_owner import File, Owner, Site, digests_of

PORTS = (7070, 7071)
KEY = b"k" * KEY_BYTES
NAME = "ab" * 32
CHUNKS = 12
SIZE_BYTES = (CHUNKS - 1) * CHUNK_BYTES + 123_457
TIME_S = 30.0


class Job:
    """A job on addresses of its own, its file, and a store whose link is shared: 5 ms a chunk."""

    def __init__(self, folder: Path, nodes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.folder = folder
        self.content = random.Random(1).randbytes(SIZE_BYTES)
        self.file = File(NAME, SIZE_BYTES, digests_of(self.content), chunk_bytes)
        net = f"127.{random.randint(1, 250)}.{random.randint(1, 250)}"
        self.site = Site([f"{net}.{number + 1}" for number in range(nodes)], KEY, PORTS)
        self.owners: dict[int, Owner] = {}
        self.store_s = 0.005
        self._link = threading.Lock()

    def read(self, chunk: int, view: memoryview) -> None:
        with self._link:
            time.sleep(self.store_s)
        view[:] = self.content[chunk * self.file.chunk_bytes :][: len(view)]

    def start(self, node: int, site: Site | None = None) -> Owner:
        path = self.folder / str(node)
        owner = self.owners[node] = Owner(site or self.site, node, self.file, path, self.read)
        return owner

    def start_all(self) -> list[Owner]:
        owners = [self.start(node) for node in range(len(self.site.addresses))]
        for owner in owners:
            until(lambda owner=owner: owner.port is not None)
        return owners

    @property
    def reads(self) -> int:
        return sum(len(owner.store_reads) for owner in self.owners.values())

    def check(self, *owners: Owner, timeout_s: float = TIME_S) -> None:
        """All of it is on these nodes, and right."""
        for owner in owners:
            assert owner.wait(range(self.file.chunks), timeout_s), f"{sorted(owner.here)}"
        for node, owner in self.owners.items():
            if owner in owners:
                assert (self.folder / str(node)).read_bytes() == self.content


def until(is_so: Callable[[], object], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(nodes: int, chunk_bytes: int = CHUNK_BYTES) -> Job:
        jobs.append(Job(tmp_path, nodes, chunk_bytes))
        return jobs[-1]

    yield make
    for owner in [owner for job in jobs for owner in job.owners.values()]:
        owner.close()


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_nodes_read_one_copy_together(make_job: Callable[[int], Job], nodes: int) -> None:
    job = make_job(nodes)
    owners = job.start_all()
    for owner in owners:
        owner.want(range(CHUNKS))
    job.check(*owners)
    assert job.reads == CHUNKS


@pytest.mark.parametrize("chunk_bytes", [2**18, 2**20])
def test_chunks_of_a_blob_may_be_smaller(make_job: Callable[..., Job], chunk_bytes: int) -> None:
    job = make_job(3, chunk_bytes)
    job.store_s = 0.002
    owners = job.start_all()
    for owner in owners:
        owner.want(range(job.file.chunks))
    job.check(*owners)
    assert job.reads <= job.file.chunks + 2


def test_nodes_that_start_one_after_the_other_read_one_copy(make_job: Callable[[int], Job]) -> None:
    job = make_job(4)
    job.store_s = 0.05
    owners = []
    for node in range(4):
        owners.append(job.start(node))
        owners[-1].want(range(CHUNKS))
        time.sleep(0.2)
    job.check(*owners)
    assert job.reads <= CHUNKS + 1


def test_a_node_that_is_killed_costs_the_others_little(make_job: Callable[[int], Job]) -> None:
    job = make_job(4)
    job.store_s = 0.05
    owners = job.start_all()
    for owner in owners:
        owner.want(range(CHUNKS))
    until(lambda: len(owners[3].here) >= 3)
    owners[3].process.send_signal(signal.SIGKILL)
    job.check(*owners[:3])
    assert job.reads <= CHUNKS + 8, "its streams' chunks, which it may have read for all"


def test_a_node_that_is_stopped_keeps_nobody_waiting(make_job: Callable[[int], Job]) -> None:
    job = make_job(3)
    job.store_s = 0.02
    owners = job.start_all()
    owners[2].process.send_signal(signal.SIGSTOP)
    start_s = time.monotonic()
    for owner in owners[:2]:
        owner.want(range(CHUNKS))
    job.check(*owners[:2])
    assert time.monotonic() - start_s < CHUNKS * 0.02 * 2 + 2


def test_what_somebody_waits_for_comes_before_the_prefetch(make_job: Callable[[int], Job]) -> None:
    job = make_job(2)
    job.store_s = 0.05
    owners = job.start_all()
    owners[0].want(range(CHUNKS))
    until(lambda: owners[0].here)
    owners[0].want([CHUNKS - 1], demand=True)
    assert owners[0].wait([CHUNKS - 1], TIME_S)
    assert len(owners[0].here) < CHUNKS
    job.check(owners[0])


def test_a_store_that_fails_on_one_node_fails_no_other(make_job: Callable[[int], Job]) -> None:
    job = make_job(2)

    def fail(chunk: int, view: memoryview) -> None:
        raise OSError("no store")

    owners = [
        Owner(job.site, 0, job.file, job.folder / "0", fail),
        Owner(job.site, 1, job.file, job.folder / "1", job.read),
    ]
    job.owners = dict(enumerate(owners))
    for owner in owners:
        owner.want(range(CHUNKS))
    job.check(owners[1])


def test_another_jobs_key_is_refused(make_job: Callable[[int], Job]) -> None:
    job = make_job(2)
    owners = [job.start(0), job.start(1, Site(job.site.addresses, b"x" * KEY_BYTES, PORTS))]
    for owner in owners:
        owner.want(range(CHUNKS))
    job.check(*owners)
    assert job.reads == 2 * CHUNKS


def test_a_port_that_is_taken_is_passed_by(make_job: Callable[[int], Job]) -> None:
    job = make_job(3)
    with socket.create_server((job.site.addresses[1], PORTS[0])):  # it takes connections, and says nothing
        owners = job.start_all()
        assert owners[1].port == PORTS[1]
        for owner in owners:
            owner.want(range(CHUNKS))
        job.check(*owners)
    assert job.reads < 2 * CHUNKS


def test_a_node_without_a_port_gets_chunks_too(make_job: Callable[[int], Job]) -> None:
    job = make_job(2)
    with contextlib.ExitStack() as stack:
        for port in PORTS:
            stack.enter_context(socket.create_server((job.site.addresses[1], port)))
        owners = job.start_all()
        assert owners[1].port == 0
        owners[1].want([0])
        assert owners[1].wait([0], TIME_S)
        for owner in owners:
            owner.want(range(CHUNKS))
        job.check(*owners)
    assert job.reads < 2 * CHUNKS


def test_nodes_that_do_not_answer_cost_half_a_second_once(make_job: Callable[[int], Job]) -> None:
    job = make_job(4)
    with contextlib.ExitStack() as stack:
        for address in job.site.addresses[1:]:
            for port in PORTS:
                stack.enter_context(socket.create_server((address, port)))
        owner = job.start(0)
        until(lambda: owner.port)
        start_s = time.monotonic()
        owner.want(range(CHUNKS))
        job.check(owner)
        assert time.monotonic() - start_s < CHUNKS * job.store_s + 0.7


def test_a_node_sends_no_faster_than_it_may(make_job: Callable[[int], Job]) -> None:
    job = make_job(2)
    limit = 40e6
    site = Site(job.site.addresses, KEY, PORTS, upload_bytes_per_s=limit)
    owners = [job.start(0, site), job.start(1, site)]
    owners[0].want(range(CHUNKS))
    job.check(owners[0])
    start_s = time.monotonic()
    owners[1].want(range(CHUNKS))
    job.check(owners[1])
    took_s = time.monotonic() - start_s
    until(lambda: owners[0].counted and owners[0].counted.sent.get(1))
    counted = owners[0].counted
    assert counted and counted.sent[1] <= limit * (took_s + 1.1) + 2 * CHUNK_BYTES


def test_the_process_ends_with_its_owner(make_job: Callable[[int], Job]) -> None:
    job = make_job(1)
    owner = job.start(0)
    until(lambda: owner.port)
    owner._link.shutdown(socket.SHUT_RDWR)
    assert owner.process.wait(5) == 0


def test_what_the_owner_says_of_blobs_that_are_not_open_is_ignored(make_job: Callable[..., Job]) -> None:
    job = make_job(2)
    owners = job.start_all()
    for owner in owners:
        for number, chunk in ((7, 0), (0, CHUNKS)):
            owner.say(local.Want(number, (chunk,)))
            owner.say(local.Want(number, (chunk,), demand=True))
            for kind in (local.Have, local.Wrong, local.Lost):
                owner.say(kind(number, chunk))
        owner.say(local.CloseBlob(7))
        owner.want(range(CHUNKS))
    job.check(*owners)


def data_files(owner: Owner, path: Path) -> int:
    """How often the process has this file open."""
    folder = Path(f"/proc/{owner.process.pid}/fd")
    return sum(os.readlink(each) == str(path) for each in folder.iterdir())


def test_a_blob_is_closed_while_it_comes_and_opened_again(make_job: Callable[..., Job]) -> None:
    job = make_job(3)
    job.store_s = 0.03
    owners = job.start_all()
    for _ in range(3):
        for owner in owners:
            owner.want(range(CHUNKS))
            owner.want([CHUNKS - 1, CHUNKS - 2], demand=True)
        until(lambda: len(owners[0].here) >= 3)
        owners[0].reopen()
    owners[0].want(range(CHUNKS))
    job.check(*owners)
    until(lambda: data_files(owners[0], job.folder / "0") == 1)


def test_who_waits_for_a_chunk_of_a_blob_that_is_closed_gets_it_elsewhere(
    make_job: Callable[..., Job],
) -> None:
    job = make_job(2)
    owners = job.start_all()
    job.store_s = 0.5
    owners[0].want([0])
    until(lambda: owners[0].store_reads)
    start_s = time.monotonic()
    owners[1].want([0])
    time.sleep(0.1)
    job.store_s = 0.0
    owners[0].reopen()
    assert owners[1].wait([0], TIME_S)
    assert time.monotonic() - start_s < 1.2 and owners[1].store_reads == [0]


# Strangers


def files(owner: Owner) -> int:
    return len(os.listdir(f"/proc/{owner.process.pid}/fd"))


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * HELLO_BYTES, os.urandom(100_000)])
def test_who_has_no_proof_is_gone_soon(make_job: Callable[[int], Job], said: bytes) -> None:
    job = make_job(2)
    owner = job.start(0)
    until(lambda: owner.port)
    with socket.create_connection((job.site.addresses[0], PORTS[0])) as link:
        link.settimeout(2)
        start_s = time.monotonic()
        with contextlib.suppress(ConnectionError):
            link.sendall(said)
            assert link.recv(1000) == b""
        assert time.monotonic() - start_s < 1
    owner.want(range(CHUNKS))
    job.check(owner)


def test_many_connections_of_strangers_stop_no_peer(make_job: Callable[[int], Job]) -> None:
    job = make_job(3)
    job.store_s = 0.03
    owners = job.start_all()
    before = files(owners[0])
    most_files = 0
    with contextlib.ExitStack() as stack:
        strangers: deque[socket.socket] = deque()
        for number in range(10_000):
            link = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            stack.callback(link.close)
            strangers.append(link)
            with contextlib.suppress(BlockingIOError):
                link.connect((job.site.addresses[0], PORTS[0]))
            if len(strangers) > 2000:
                strangers.popleft().close()
            if number % 1000 == 500:
                most_files = max(most_files, files(owners[0]))
            if number == 1000:
                for owner in owners:
                    owner.want(range(CHUNKS))
        job.check(*owners)
        until(lambda: files(owners[0]) <= before + 4)
    assert most_files < before + 100
    assert job.reads <= CHUNKS + 2


def test_a_hello_that_was_heard_proves_nothing_again(make_job: Callable[[int], Job]) -> None:
    job = make_job(2)
    owner = job.start(0)
    until(lambda: owner.port)
    hello = Connects(KEY, node=1, to=0, nonce=b"n" * 32)
    said = b""
    for is_first in (True, False):
        with socket.create_connection((job.site.addresses[0], PORTS[0])) as link:
            link.settimeout(2)
            link.sendall(hello.hello)
            reply = link.recv(64, socket.MSG_WAITALL)
            said = hello.prove(reply, link.getpeername()) if is_first else said
            link.sendall(said)
            if not is_first:
                with contextlib.suppress(ConnectionError):
                    assert link.recv(1) == b""


# A peer that has the key, and does what it likes


class FakePeer:
    """Node 1 of a job: names itself as the parent of each chunk, and does `serve` for each GET."""

    def __init__(self, job: Job, serve: Callable[[Connection, Get], None]) -> None:
        self._serve = serve
        self._listening = socket.create_server((job.site.addresses[1], PORTS[0]))
        self._stop = False
        self._links: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._listening.settimeout(0.1)
        while not self._stop:
            try:
                link, _ = self._listening.accept()
            except TimeoutError:
                continue
            link.settimeout(5)
            hello = link.recv(HELLO_BYTES, socket.MSG_WAITALL)
            listens = Listens(
                KEY, node=1, nodes=2, nonce=os.urandom(32), hello=hello, place=link.getsockname()
            )
            link.sendall(listens.reply)
            listens.check(link.recv(PROOF_BYTES, socket.MSG_WAITALL))
            self._links.append(link)
            with contextlib.suppress(EOFError, OSError):
                self._talk(Connection(link, 0, lambda *_: None))

    def _talk(self, connection: Connection) -> None:
        while not self._stop:
            writes = [connection] if connection.wants_to_write else []
            ready, _, _ = select.select([connection], writes, [], 0.05)
            for said in connection.read() if ready else ():
                if isinstance(said, Join):
                    connection.send(Given(said.level, Handover({}, (0, 1))))
                elif isinstance(said, AskList):
                    connection.send(Answered(said.want.chunk, Parent(1), said.number))
                elif isinstance(said, Get):
                    self._serve(connection, said)
            connection.write()

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        for link in (*self._links, self._listening):
            link.close()


@contextlib.contextmanager
def fake_peer(job: Job, serve: Callable[[Connection, Get], None]) -> Iterator[None]:
    peer = FakePeer(job, serve)
    try:
        yield
    finally:
        peer.close()


def test_who_sends_wrong_bytes_is_banned(make_job: Callable[[int], Job], tmp_path: Path) -> None:
    job = make_job(2)
    (tmp_path / "wrong").write_bytes(bytes(CHUNK_BYTES))

    def serve(connection: Connection, get: Get) -> None:
        size_bytes = job.file.bytes_of(get.chunk.number)
        for offset in range(0, size_bytes, MOST_DATA_BYTES):
            connection.send_bytes(get.chunk, offset, file, 0, min(MOST_DATA_BYTES, size_bytes - offset))

    with (tmp_path / "wrong").open("rb") as file, fake_peer(job, serve):
        owner = job.start(0)
        owner.want(range(CHUNKS))
        job.check(owner)
        until(lambda: owner.counted and owner.counted.banned == (1,))
    assert owner.counted and owner.counted.fallbacks.get("wrong digest") and not owner.counted.received


def endless(connection: Connection, get: Get) -> None:
    """More than the chunk, and again and again."""
    with tempfile.TemporaryFile() as file:
        file.truncate(MOST_DATA_BYTES)
        for _ in range(200):
            connection.send_bytes(Chunk(get.chunk.blob, 99), 0, file, 0, MOST_DATA_BYTES)
        while connection.wants_to_write:
            select.select([], [connection], [], 1)
            connection.write()


def slow(connection: Connection, get: Get) -> None:
    link = socket.socket(fileno=os.dup(connection.fileno()))
    with link:
        link.setblocking(True)
        head = (40 + 8 + MOST_DATA_BYTES - 4).to_bytes(4, "big")
        link.sendall(bytes(4) + head + bytes.fromhex(get.chunk.blob) + get.chunk.number.to_bytes(4, "big"))
        link.sendall(bytes(4) + MOST_DATA_BYTES.to_bytes(4, "big"))
        for _ in range(20):
            link.sendall(bytes(100))
            time.sleep(0.05)


def huge(connection: Connection, get: Get) -> None:
    os.write(connection.fileno(), b"\3\0\0\0\xff\xff\xff\xff")


@pytest.mark.parametrize(
    "serve", [endless, slow, huge, lambda *_: None], ids=["endless", "slow", "huge", "silent"]
)
def test_who_does_not_send_a_chunk_costs_half_a_second(
    make_job: Callable[[int], Job], serve: Callable[[Connection, Get], None]
) -> None:
    job = make_job(2)
    with fake_peer(job, serve):
        owner = job.start(0)
        until(lambda: owner.port)
        start_s = time.monotonic()
        owner.want(range(CHUNKS))
        job.check(owner)
        assert time.monotonic() - start_s < 2.5
    assert not owner.counted or not owner.counted.received
