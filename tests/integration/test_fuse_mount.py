"""Files of a FUSE mount go on being read, byte by byte right, while the processes that serve it are killed.

Here the test is the supervisor: it holds the Mount, and starts server processes (_SERVER), which it tells what to
do on their standard input, kills, and replaces. Everything is read in processes of its own.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.fuse import Mount, protocol

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
_ROOT = Path(protocol.__file__).parents[2]
_SERVER = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
from bootseer_slurm.fuse import Mount, Server, protocol
from bootseer_slurm.fuse import requests

def say(what):
    os.write(1, (json.dumps(what) + "\\n").encode())

class DiskFile:
    uid = gid = 0
    mtime_ns, patience_s = 1_600_000_000_123_456_789, 900.0
    def __init__(self, path, mode):
        self.fd, self.mode, self.reads = os.open(path, os.O_RDONLY), mode, []
        self.size_bytes = os.fstat(self.fd).st_size
    def ready(self, offset, size):
        self.reads.append((offset, size))
        local = self.mode == "ready" or self.mode == "mixed" and offset // 262144 % 3 != 0
        return self.fd if local else None
    def fetch(self, offset, size):
        if self.mode == "stuck":
            say("fetching")
            time.sleep(1000)
        time.sleep(random.random() * 0.03)
        return os.pread(self.fd, size, offset)

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)

def trap(where, opcode):
    owner = requests.RequestThreads if where == "_answer" else requests.Device
    inner, taken = getattr(owner, where), []
    def trapped(self, *arguments):
        request = next((a for a in arguments if isinstance(a, protocol.Request)), None)
        if where == "_answer" and request.opcode == opcode:
            die()
        if where == "reply" and opcode == taken[-1]:
            inner(self, *arguments)
            die()
        return inner(self, *arguments)
    if where == "reply":
        answer = requests.RequestThreads._answer
        def remember(self, request, outbox):
            taken.append(request.opcode)
            answer(self, request, outbox)
        requests.RequestThreads._answer = remember
    setattr(owner, where, trapped)

mount, state = Mount.from_argument(sys.argv[1]), Path(sys.argv[2])
if len(sys.argv) > 3:
    trap(sys.argv[3], int(sys.argv[4]))
server = Server(mount, state, blocking_threads=64)
server.start()
files = {}

def add(*added):
    for path, data, *mode in added if isinstance(added[0], list) else [added]:
        files[path] = DiskFile(data, *(mode or ["ready"]))
        server.add(path, files[path])

def store(path, data, offset, size):
    with open(data, "rb") as stream:
        stream.seek(offset)
        return server.store(path, offset, stream.read(size))

def store_aside(*arguments):
    threading.Thread(target=store, args=arguments, daemon=True).start()

does = {"add": add, "remove": server.remove, "end_recovery": server.end_recovery, "known": server.known, "store": store,
        "store_aside": store_aside, "reads": lambda path: files[path].reads}
for line in sys.stdin:
    name, *arguments = json.loads(line)
    try:
        say(["done", does[name](*arguments)])
    except Exception as error:
        say(["failed", repr(error)])
"""
_READER = """
import mmap, os, random, sys
how, served, original, stop, seed = sys.argv[1:]
chance, truth = random.Random(int(seed)), os.open(original, os.O_RDONLY)
size, turns = os.fstat(truth).st_size, 0

def compare(data, offset, length):
    wanted = os.pread(truth, length, offset)
    if data != wanted:
        sys.exit(f"{how}: wrong bytes at {offset}: {len(data)} instead of {len(wanted)}")

while turns == 0 or not os.path.exists(stop):
    turns += 1
    fd = os.open(served, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if how == "sequential":
        for offset in range(0, size, 1 << 20):
            compare(os.read(fd, 1 << 20), offset, 1 << 20)
        compare(os.read(fd, 1), size, 1)
    elif how == "random":
        for _ in range(40):
            offset, length = chance.randrange(size), chance.randrange(1, 300_000)
            compare(os.pread(fd, length, offset), offset, length)
    elif how == "mapped":
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            for _ in range(40):
                offset, length = chance.randrange(size), chance.randrange(1, 100_000)
                compare(mapped[offset : offset + length], offset, length)
    elif how == "direct":
        room = mmap.mmap(-1, 1 << 20)
        for _ in range(10):
            offset = chance.randrange(size) & ~4095
            compare(room[: os.preadv(fd, [room], offset)], offset, 1 << 20)
    elif how == "names":
        folder = os.path.dirname(served)
        names = os.listdir(folder)
        if sorted(names) != [f"{number:03d}-{'n' * 100}" for number in range(200)] + ["blob", "blob2"]:
            sys.exit(f"names: {len(names)} of them")
        for name in chance.sample(names, 20):
            os.stat(os.path.join(folder, name))
        os.statvfs(folder)
    os.close(fd)
print(turns)
"""


class Serving:
    """A server process. trap: (method, opcode): it kills itself there."""

    def __init__(self, mount: Mount, state: Path, trap: tuple[str, int] | None = None) -> None:
        self.fetching = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, mount.to_argument(), state, *map(str, trap or ())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=mount.fds,
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
        )

    def tell(self, *command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    def heard(self) -> object:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 20)[0], "the server says nothing"
        line = self.process.stdout.readline()
        assert line, "the server is gone"
        return json.loads(line)

    def do(self, *command: object) -> object:
        self.tell(*command)
        while (said := self.heard()) == "fetching":
            self.fetching += 1
        assert isinstance(said, list)
        if said[0] == "failed":
            raise RuntimeError(said[1])
        return said[1]

    def wait_for_fetches(self, count: int = 1) -> None:
        """Wait until that many more fetches have begun, of a file that is stuck."""
        while self.fetching < count:
            assert self.heard() == "fetching"
            self.fetching += 1
        self.fetching -= count

    def kill(self, wait: bool = True) -> None:
        self.process.kill()
        if wait:
            self.process.wait(10)
            self.close()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


class Supervisor:
    """Holds the mount, and the processes that a test started."""

    def __init__(self, folder: Path) -> None:
        self.mount = Mount.open(folder / "blobs")
        self.state = folder / "nodes"
        self.servers: list[Serving] = []
        self.readers: list[subprocess.Popen[str]] = []

    def serve(self, *added: tuple[object, ...], recovered: bool = True, trap: object = None) -> Serving:
        """Start a server, add files to it, and end the recovery."""
        server = Serving(self.mount, self.state, trap)  # type: ignore[arg-type]
        self.servers.append(server)
        if added:
            server.do("add", *map(list, added))
        if recovered and trap is None:
            server.do("end_recovery")
        return server

    def read(self, code: str, *arguments: object) -> subprocess.Popen[str]:
        reader = subprocess.Popen(
            [sys.executable, "-S", "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.readers.append(reader)
        return reader

    @contextlib.contextmanager
    def holding(self, path: Path) -> Iterator[io.FileIO]:
        """Have a file open in the test's own process, which must not wait for an answer when it forks.

        The kernel asks the first time that a file is closed, and the fork of a server would close this one.
        """
        path.open("rb").close()
        with path.open("rb", buffering=0) as stream:
            yield stream

    def close(self) -> None:
        for server in self.servers:
            server.kill(wait=False)
        self.mount.close()  # whoever waits for an answer can end now
        for reader in self.readers:
            reader.kill()
            reader.communicate()
        for server in self.servers:
            server.kill()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.close()
    assert not mounts.is_mountpoint(tmp_path / "blobs")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(random.Random(1).randbytes((12 << 20) + 345))
    return path


@pytest.fixture
def blob(supervisor: Supervisor) -> Path:
    return supervisor.mount.point / "0/blob"


_PREAD = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # one request for each read
print("open", flush=True)
try:
    print(os.pread(fd, int(sys.argv[3]), int(sys.argv[2])).hex())
except OSError as error:
    print(error.errno)
"""


def _result(reader: subprocess.Popen[str], timeout_s: float = 20) -> str:
    output, errors = reader.communicate(timeout=timeout_s)
    assert reader.returncode == 0, errors
    return output.strip().removeprefix("open\n")


def _wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_killed_at_random_moments(supervisor: Supervisor, data: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"small")
    files = [(f"0/{name}", str(data), "mixed") for name in ("blob", "blob2")]
    files += [(f"0/{number:03d}-{'n' * 100}", str(small), "ready") for number in range(200)]
    server = supervisor.serve(*files)
    stop, point = tmp_path / "stop", supervisor.mount.point / "0"
    kinds = ("sequential", "random", "mapped", "direct", "names")
    for number, kind in enumerate(kinds):
        supervisor.read(_READER, kind, point / ("blob2" if number % 2 else "blob"), data, stop, number)
    chance = random.Random(2)
    for turn in range(30):
        time.sleep(chance.uniform(0, 0.15))
        server.kill()
        # Every third is killed while it starts, while it takes over, or before it was told of all files.
        told = files if turn % 3 else files[: chance.randrange(2)]
        server = supervisor.serve(*told, recovered=turn % 3 > 0)
    server.kill()
    server = supervisor.serve(*files)
    stop.touch()
    turns = [int(_result(reader, 60)) for reader in supervisor.readers]
    assert min(turns) >= 1 and sum(turns) > len(kinds)


def test_many_waiting_reads_and_two_kills_before_any_answer(
    supervisor: Supervisor, data: Path, blob: Path
) -> None:
    server = supervisor.serve(("0/blob", str(data), "stuck"))
    offsets = [number << 19 for number in range(12)]
    for offset in offsets:
        supervisor.read(_PREAD, blob, offset, 5000)
    server.wait_for_fetches(len(offsets))
    server.kill()
    supervisor.serve(recovered=False).kill()
    server = supervisor.serve(("0/blob", str(data), "stuck"))
    server.wait_for_fetches(5)
    server.kill()
    server = supervisor.serve(("0/blob", str(data), "fetch"))
    content = data.read_bytes()
    for offset, reader in zip(offsets, supervisor.readers, strict=True):
        assert _result(reader) == content[offset : offset + 5000].hex()
    # What waited goes the way of a new read: asked whether it is local first.
    reads = server.do("reads", "0/blob")
    assert isinstance(reads, list) and len(reads) >= len(offsets)
    server.kill()
    server = supervisor.serve(("0/blob", str(data), "stuck"))
    assert server.do("reads", "0/blob") == []  # what was answered is not asked again


_CALLS = {
    protocol.Opcode.LOOKUP: "os.stat(path)",
    protocol.Opcode.GETATTR: "os.stat(os.path.dirname(os.path.dirname(path)))",
    protocol.Opcode.OPEN: "os.open(path, os.O_RDONLY)",
    protocol.Opcode.READ: "open(path, 'rb').read()",
    protocol.Opcode.READDIR: "os.listdir(os.path.dirname(path)) == ['blob'] or sys.exit(1)",
    protocol.Opcode.READDIRPLUS: "os.listdir(os.path.dirname(path)) == ['blob'] or sys.exit(1)",
    protocol.Opcode.STATFS: "os.statvfs(path)",
}


@pytest.mark.parametrize("where", ["_answer", "reply"])
@pytest.mark.parametrize("opcode", _CALLS)
def test_killed_between_request_and_answer(
    supervisor: Supervisor, data: Path, blob: Path, opcode: protocol.Opcode, where: str
) -> None:
    """Killed with the request just taken, and with the answer given but not yet noted."""
    server = supervisor.serve(trap=(where, int(opcode)))
    server.do("add", "0/blob", str(data))
    reader = supervisor.read(f"import os, sys; path = sys.argv[1]; {_CALLS[opcode]}", blob)
    if opcode not in (
        protocol.Opcode.OPEN,
        protocol.Opcode.READDIR,
    ):  # those two are not asked by every kernel
        assert server.process.wait(20) == -signal.SIGKILL
    else:
        time.sleep(0.5)
        server.kill()
    supervisor.serve(("0/blob", str(data)))
    _result(reader)
    assert (
        supervisor.read(_PREAD, blob, 4096, 100)
        .communicate(timeout=20)[0]
        .endswith(data.read_bytes()[4096:4196].hex() + "\n")
    )


def test_who_waits_in_direct_io_can_be_killed_with_or_without_a_server(
    supervisor: Supervisor, data: Path, blob: Path
) -> None:
    code = """
import mmap, os, sys
os.preadv(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, 4096)], int(sys.argv[2]))
"""
    server = supervisor.serve(("0/blob", str(data), "stuck"))
    readers = [supervisor.read(code, blob, number << 20) for number in range(2)]
    server.wait_for_fetches(2)
    server.kill()
    readers[0].kill()
    supervisor.serve(recovered=False)  # and is told of no file
    assert readers[0].wait(10) == -signal.SIGKILL
    time.sleep(0.2)
    assert readers[1].poll() is None
    readers[1].kill()
    assert readers[1].wait(10) == -signal.SIGKILL


def test_a_reader_that_died_meanwhile_is_in_nobodys_way(
    supervisor: Supervisor, data: Path, blob: Path
) -> None:
    server = supervisor.serve(("0/blob", str(data), "stuck"))
    readers = [supervisor.read(_PREAD, blob, 0, 100) for _ in range(2)]  # one page: one request
    server.wait_for_fetches()
    server.kill()
    readers[0].kill()
    supervisor.serve(("0/blob", str(data), "fetch"))
    assert readers[0].wait(10) == -signal.SIGKILL
    assert _result(readers[1]) == data.read_bytes()[:100].hex()


def test_bound_files_and_mappings_go_on(
    supervisor: Supervisor, data: Path, blob: Path, tmp_path: Path
) -> None:
    server = supervisor.serve(("0/blob", str(data), "mixed"))
    bound, stop = tmp_path / "bound", tmp_path / "stop"
    bound.touch()
    fd = mounts.bind_clone(blob)
    try:
        mounts.move_mount(fd, bound)
        mapped = supervisor.read(_READER, "mapped", bound, data, stop, 1)
        for _ in range(3):
            time.sleep(0.1)
            server.kill()
            server = supervisor.serve(("0/blob", str(data), "mixed"))
        stop.touch()
        assert int(_result(mapped)) >= 1
        server.do("remove", "0/blob")
        assert int(_result(supervisor.read(_READER, "random", bound, data, stop, 2))) == 1
        assert not blob.exists()
        assert server.do("known", "0/blob") is False
    finally:
        os.close(fd)
        if mounts.is_mountpoint(bound):
            mounts.unmount(bound)


def test_the_end_of_recovery_ends_the_waiting_for_a_file_that_does_not_come(
    supervisor: Supervisor, data: Path, blob: Path
) -> None:
    server = supervisor.serve(("0/blob", str(data), "stuck"), ("0/other", str(data)))
    before = supervisor.read(_PREAD, blob, 0, 10)
    server.wait_for_fetches()
    server.kill()
    server = supervisor.serve(("0/other", str(data)), recovered=False)
    during = supervisor.read(_PREAD, blob, 1 << 20, 10)
    assert during.stdout is not None and during.stdout.readline() == "open\n"
    time.sleep(0.2)
    assert before.poll() is None and during.poll() is None
    assert server.do("known", "0/blob") is True
    server.do("end_recovery")
    assert _result(before) == str(errno.EIO) and _result(during) == str(errno.EIO)
    assert os.listdir(blob.parent) == ["other"] and not blob.exists()
    server.do("add", "0/blob", str(data))
    assert blob.read_bytes() == data.read_bytes()
    server.kill()
    server = supervisor.serve(recovered=False)
    server.do("remove", "0/other")
    server.do("end_recovery")
    assert os.listdir(supervisor.mount.point) == []


def test_a_name_that_comes_back_with_another_size_is_another_file(
    supervisor: Supervisor, data: Path, blob: Path, tmp_path: Path
) -> None:
    server = supervisor.serve(("0/blob", str(data), "stuck"))
    reader = supervisor.read(_PREAD, blob, 0, 10)
    with supervisor.holding(blob) as held:
        server.wait_for_fetches()
        server.kill()
        other = tmp_path / "other"
        other.write_bytes(b"another")
        supervisor.serve(("0/blob", str(other), "ready"), recovered=False)
        assert _result(reader) == str(errno.EIO)
        assert blob.read_bytes() == b"another"
        with pytest.raises(OSError) as raised:
            held.read(10)
        assert raised.value.errno == errno.EIO
        assert os.fstat(held.fileno()).st_size == data.stat().st_size


def test_stored_bytes_are_read_without_the_server(supervisor: Supervisor, data: Path, blob: Path) -> None:
    server = supervisor.serve(("0/blob", str(data)))
    size, content = data.stat().st_size, data.read_bytes()
    longer = data.with_name("longer")
    longer.write_bytes(content + bytes(100))
    assert server.do("known", "0/blob") is False and server.do("known", "0/missing") is False
    assert server.do("store", "0/blob", str(data), 0, 4096) is False
    with supervisor.holding(blob) as stream:
        assert server.do("known", "0/blob") is True
        assert server.do("store", "0/blob", str(data), 0, size) is True
        assert stream.read(size) == content
        assert server.do("reads", "0/blob") == []
        with pytest.raises(RuntimeError, match="ends at"):
            server.do("store", "0/blob", str(longer), size - 10, 20)
        server.kill()
        server = supervisor.serve(("0/blob", str(data)))
        assert server.do("known", "0/blob") is True
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert server.do("store", "0/blob", str(data), 1 << 20, 2 << 20) is True
        assert os.pread(stream.fileno(), 2 << 20, 1 << 20) == content[1 << 20 : 3 << 20]
        assert server.do("reads", "0/blob") == []
        assert os.pread(stream.fileno(), 9, 0) == content[:9]
        reads = server.do("reads", "0/blob")
        assert isinstance(reads, list) and reads[0][0] == 0
    server.do("remove", "0/blob")
    assert server.do("store", "0/blob", str(data), 0, 4096) is False


def test_killed_while_it_stores(supervisor: Supervisor, data: Path, blob: Path) -> None:
    server = supervisor.serve(("0/blob", str(data)))
    with supervisor.holding(blob) as stream:
        for turn in range(10):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            server.tell("store", "0/blob", str(data), 0, data.stat().st_size)
            time.sleep(turn * 0.002)
            server.kill()
            server = supervisor.serve(("0/blob", str(data)))
            assert stream.read(1 << 30) == b"" or stream.seek(0) == 0
            stream.seek(0)
            assert stream.readall() == data.read_bytes()


def _is_over(pid: int) -> bool:
    """The first thread of a process is gone, though others may not be."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_one_that_cannot_die_before_its_successor_answers(
    supervisor: Supervisor, data: Path, blob: Path
) -> None:
    server = supervisor.serve(("0/blob", str(data), "stuck"))
    reader = supervisor.read(_PREAD, blob, 0, 100)
    server.wait_for_fetches()
    server.do("store_aside", "0/blob", str(data), 0, 4096)  # waits for the page that the read has locked
    time.sleep(0.3)
    server.kill(wait=False)
    _wait_until(lambda: _is_over(server.process.pid))
    time.sleep(0.3)
    assert server.process.poll() is None
    supervisor.serve(("0/blob", str(data), "fetch"))
    assert _result(reader) == data.read_bytes()[:100].hex()
    assert server.process.wait(10) == -signal.SIGKILL


def test_the_state_of_another_mount_means_nothing(tmp_path: Path, data: Path) -> None:
    for _ in range(2):
        supervisor = Supervisor(tmp_path)
        try:
            server = supervisor.serve(recovered=False)
            assert os.listdir(supervisor.mount.point) == []
            server.do("add", "0/blob", str(data))
            assert (supervisor.mount.point / "0/blob").read_bytes() == data.read_bytes()
            (inode,) = {entry.inode() for entry in os.scandir(supervisor.mount.point / "0")}
            assert inode == 3
            state = json.loads(supervisor.state.read_text())
            assert state["mount"] == supervisor.mount.key and supervisor.state.stat().st_mode & 0o777 == 0o600
        finally:
            supervisor.close()


def test_a_state_that_cannot_be_read_costs_only_what_was_open(
    supervisor: Supervisor, data: Path, blob: Path
) -> None:
    supervisor.serve(("0/blob", str(data))).kill()
    supervisor.state.write_text('{"mount": "' + supervisor.mount.key + '"}')
    supervisor.serve(("0/blob", str(data)))
    assert blob.read_bytes() == data.read_bytes()


def test_a_mount_as_an_argument(supervisor: Supervisor) -> None:
    text = supervisor.mount.to_argument()
    again = Mount.from_argument(text)
    assert vars(again) == vars(supervisor.mount) and set(again.fds) == {again.fd, again.ledger_fd}
    for broken in ("", "{}", text.replace("readers", "writers")):
        with pytest.raises(ValueError):
            Mount.from_argument(broken)
    with pytest.raises(OSError):
        Mount.from_argument(json.dumps(json.loads(text) | {"fd": 10_000}))
