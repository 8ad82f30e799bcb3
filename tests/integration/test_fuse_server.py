"""The FUSE server on real mounts.

Files are read in child processes where a reader could get stuck or maps the file: see the server's docstring.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import logging
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import Mount, Server, protocol

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
_BLOCK = 256 << 10
_MTIME_NS = 1_600_000_000_123_456_789


class MemoryFile:
    """A File in a memfd; `local` says which reads are ready, `fetch` can be replaced."""

    def __init__(self, data: bytes, *, uid: int = 0, local: Callable[[int, int], bool] | None = None) -> None:
        self.size_bytes, self.uid, self.gid, self.mtime_ns = len(data), uid, uid, _MTIME_NS
        self.data = data
        self.patience_s = 900.0
        self.local = local or (lambda offset, size: True)
        self.reads: list[tuple[int, int]] = []
        self.fd = os.memfd_create("blob", os.MFD_CLOEXEC)
        os.write(self.fd, data)
        weakref.finalize(self, os.close, self.fd)

    def ready(self, offset: int, size: int) -> int | None:
        self.reads.append((offset, size))
        return self.fd if self.local(offset, size) else None

    def fetch(self, offset: int, size: int) -> bytes | memoryview:
        return memoryview(self.data)[offset : offset + size]


class StuckFile(MemoryFile):
    """Nothing is local, and every fetch waits for `released`."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, local=lambda offset, size: False)
        self.released = threading.Event()
        self.waiting = threading.Semaphore(0)

    def fetch(self, offset: int, size: int) -> bytes | memoryview:
        self.waiting.release()
        self.released.wait(60)
        return super().fetch(offset, size)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.owner() == "root" and parent != Path("/") and parent.name != "tmp":
            parent.chmod(parent.stat().st_mode | 0o055)  # another user has to get here
    yield tmp_path / "blobs"
    while mounts.is_mountpoint(tmp_path / "blobs"):
        mounts.unmount(tmp_path / "blobs", force=True)


@contextlib.contextmanager
def _serving(mountpoint: Path, *, readers: int = 2, blocking_threads: int = 64) -> Iterator[Server]:
    mount = Mount.open(mountpoint, readers=readers)
    server = Server(mount, mountpoint.with_name("nodes"), blocking_threads=blocking_threads)
    server.start()
    try:
        yield server
    finally:
        mount.close()
        server.stop()


@pytest.fixture
def server(mountpoint: Path) -> Iterator[Server]:
    with _serving(mountpoint) as server:
        yield server


@pytest.fixture
def stuck() -> Iterator[StuckFile]:
    file = StuckFile(random.Random(1).randbytes(4 << 20))
    yield file
    file.released.set()


def _drop_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _python(code: str, *arguments: object, uid: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-S", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        user=uid,
        group=uid,
        extra_groups=None if uid is None else [],
    )


def _output(code: str, *arguments: object, uid: int | None = None) -> str:
    with _python(code, *arguments, uid=uid) as child:
        try:
            output, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 0, errors
    return output.strip()


def _wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


_SIZES = [0, 1, 511, 4095, 4096, 4097, 131073, (1 << 20) - 1, (1 << 20) + 1, 5_000_011]


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("size", _SIZES)
def test_bytes_are_equal(server: Server, size: int, local: bool) -> None:
    data = random.Random(size).randbytes(size)
    path = server.add("0/blob", MemoryFile(data, local=lambda offset, length: local))
    assert path.read_bytes() == data
    _drop_pages(path)
    with path.open("rb", buffering=0) as stream:
        for offset in {0, 1, size // 2, max(0, size - 1), max(0, size - 4096), size, size + 5000}:
            _drop_pages(path)
            assert os.pread(stream.fileno(), 10_000, offset) == data[offset : offset + 10_000]


def test_some_blocks_local_and_some_not(server: Server) -> None:
    data = random.Random(2).randbytes(8 << 20)
    file = MemoryFile(data, local=lambda offset, size: offset // _BLOCK % 3 == 0)
    assert server.add("0/blob", file).read_bytes() == data
    assert max(size for _, size in file.reads) == protocol.MAX_READ_BYTES
    assert sum(size for _, size in file.reads) == len(data)


def test_direct_io(server: Server) -> None:
    data = random.Random(3).randbytes((3 << 20) + 700)
    path = server.add("0/blob", MemoryFile(data))
    code = """
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
room = mmap.mmap(-1, 8 << 20)
print(hashlib.sha256(room[:os.preadv(fd, [room], 0)]).hexdigest())
"""
    assert _output(code, path) == hashlib.sha256(data).hexdigest()


def test_random_reads_of_eight_threads(server: Server) -> None:
    data = random.Random(4).randbytes((16 << 20) + 12_345)
    path = server.add("0/blob", MemoryFile(data, local=lambda offset, size: offset // _BLOCK % 5 != 0))
    wrong: list[int] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        fd = os.open(path, os.O_RDONLY)
        for turn in range(150):
            offset, size = chance.randrange(len(data)), chance.randrange(1, 300_000)
            if os.pread(fd, size, offset) != data[offset : offset + size]:
                wrong.append(offset)
            if turn % 10 == 0:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_mapped_reads(server: Server) -> None:
    data = random.Random(5).randbytes((4 << 20) + 17)
    path = server.add("0/blob", MemoryFile(data, local=lambda offset, size: offset % (2 << 20) == 0))
    code = """
import hashlib, mmap, sys
stream = open(sys.argv[1], "rb")
mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
tail = bytes(mapped[-5:])
print(hashlib.sha256(mapped).hexdigest(), tail.hex())
"""
    assert _output(code, path) == f"{hashlib.sha256(data).hexdigest()} {data[-5:].hex()}"


def test_attributes(server: Server, mountpoint: Path) -> None:
    path = server.add("1234/blob", MemoryFile(bytes(1_000_001), uid=1234))
    status = path.stat()
    assert (status.st_size, status.st_mode, status.st_uid, status.st_gid) == (1_000_001, 0o100400, 1234, 1234)
    assert (status.st_mtime_ns, status.st_nlink) == (_MTIME_NS, 1)
    assert 512 * status.st_blocks >= status.st_size
    assert (path.parent.stat().st_mode, path.parent.stat().st_uid) == (0o040500, 1234)
    assert (mountpoint.stat().st_mode, mountpoint.stat().st_uid) == (0o040755, 0)
    total = os.statvfs(mountpoint)
    assert total.f_blocks * total.f_frsize >= 1_000_001 and total.f_bfree == 0
    with pytest.raises(OSError) as raised:
        os.listxattr(path)
    assert raised.value.errno == errno.ENOTSUP
    with path.open("rb") as stream:
        assert os.lseek(stream.fileno(), 0, os.SEEK_HOLE) == 1_000_001
    (entry,) = mounts.mounts_at(mountpoint)
    assert (entry.fstype, entry.source) == ("fuse.bootseer", "bootseer")
    readahead = Path("/sys/class/bdi", entry.device, "read_ahead_kb")
    assert not os.access(readahead, os.W_OK) or readahead.read_text() == "1024\n"


def test_only_the_owner_and_root_may_read(server: Server) -> None:
    path = server.add("1234/blob", MemoryFile(b"secret", uid=1234))
    code = """
import os, sys
for what in (lambda: open(sys.argv[1]).read(), lambda: len(os.listdir(os.path.dirname(sys.argv[1])))):
    try:
        print(what())
    except OSError as error:
        print(error.strerror)
"""
    assert _output(code, path, uid=1234).split("\n") == ["secret", "1"]
    assert _output(code, path, uid=1235).split("\n") == ["Permission denied"] * 2
    assert _output(code, path).split("\n") == ["secret", "1"]


def test_nothing_can_be_written(server: Server) -> None:
    path = server.add("0/blob", MemoryFile(b"data"))
    attempts: list[Callable[[], object]] = [
        lambda: path.open("r+b"),
        path.unlink,
        lambda: path.chmod(0o777),
        lambda: path.rename(path.with_name("other")),
        lambda: path.with_name("new").touch(),
        lambda: path.with_name("new").mkdir(),
        lambda: os.truncate(path, 0),
        lambda: os.utime(path),
        lambda: os.setxattr(path, "user.a", b"b"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as raised:
            attempt()
        assert raised.value.errno in (errno.EROFS, errno.EACCES)
    assert path.read_bytes() == b"data"


def test_a_directory_lists_what_is_there(server: Server, mountpoint: Path) -> None:
    assert list(mountpoint.iterdir()) == []
    file = MemoryFile(b"x")
    names = {f"{number:04d}-{'n' * (number % 200)}" for number in range(1000)}
    for name in names:
        server.add(f"0/{name}", file)
    server.add("7/ümläut", file)
    assert {path.name for path in mountpoint.iterdir()} == {"0", "7"}
    assert [path.name for path in (mountpoint / "7").iterdir()] == ["ümläut"]
    assert {path.name for path in (mountpoint / "0").iterdir()} == names
    listed = subprocess.check_output(["ls", "-la", mountpoint / "0"], text=True).splitlines()
    assert len(listed) == 1 + 2 + 1000
    assert not (mountpoint / "0" / "missing").exists()
    before_ns = (mountpoint / "0").stat().st_mtime_ns
    server.add("0/missing", file)
    assert (mountpoint / "0" / "missing").read_bytes() == b"x"
    assert (mountpoint / "0").stat().st_mtime_ns > before_ns


def test_a_thousand_files_come_and_go(server: Server, mountpoint: Path) -> None:
    files = [MemoryFile(b"%d" % number) for number in range(1000)]
    alive = weakref.WeakSet(files)
    for number, file in enumerate(files):
        path = server.add(f"{number % 3}/{number}", file)
        assert path.read_bytes() == b"%d" % number
    del file, files
    for number in range(1000):
        server.remove(f"{number % 3}/{number}")
        assert not (mountpoint / f"{number % 3}/{number}").exists()
    assert list(mountpoint.iterdir()) == []

    def forgotten() -> bool:
        gc.collect()
        return not alive

    _wait_until(forgotten)


def test_removed_while_open(server: Server, mountpoint: Path) -> None:
    data = random.Random(6).randbytes(3 << 20)
    file = MemoryFile(data)
    alive = weakref.ref(file)
    path = server.add("0/blob", file)
    del file
    stream = path.open("rb", buffering=0)
    bound = mountpoint.with_name("bound")
    bound.touch()
    fd = mounts.bind_clone(path)
    try:
        mounts.move_mount(fd, bound)
        server.remove("0/blob")
        assert not path.exists()
        assert stream.read(len(data)) == data
        _drop_pages(bound)
        assert bound.read_bytes() == data
        assert server.add("0/blob", MemoryFile(b"another")).read_bytes() == b"another"
        assert bound.stat().st_size == len(data)
        assert alive() is not None
    finally:
        stream.close()
        os.close(fd)
        if mounts.is_mountpoint(bound):
            mounts.unmount(bound)
    _wait_until(lambda: alive() is None)


def test_stuck_fetches_hold_up_nothing_else(mountpoint: Path, stuck: StuckFile) -> None:
    read = "import os,sys; print(len(os.pread(os.open(sys.argv[1], os.O_RDONLY), 1 << 20, int(sys.argv[2]))))"
    children = []
    serving = _serving(mountpoint, readers=1, blocking_threads=16)  # four for one user
    server = serving.__enter__()
    try:
        paths = [server.add(f"0/stuck{number}", stuck) for number in range(8)]
        # More than the 12 background requests that the kernel allows by default.
        children = [_python(read, path, turn << 21) for path in paths for turn in range(2)]
        for _ in range(4):
            assert stuck.waiting.acquire(timeout=20)
        _wait_until(lambda: len(stuck.reads) >= 16, 30)
        data = random.Random(7).randbytes(32 << 20)
        started_s = time.monotonic()
        fast = server.add("0/fast", MemoryFile(data))
        assert fast.read_bytes() == data
        assert paths[0].stat().st_size == stuck.size_bytes
        assert len(list(mountpoint.joinpath("0").iterdir())) == 9
        server.remove("0/stuck0")
        assert time.monotonic() - started_s < 5
        children[0].kill()
        children[0].wait(5)  # who waits for a page can be killed
        stuck.released.set()
        assert {child.communicate(timeout=30)[0].strip() for child in children[1:]} == {str(1 << 20)}
    finally:
        stuck.released.set()
        serving.__exit__(None, None, None)
        for child in children:
            child.kill()
            child.communicate()


def test_one_user_cannot_keep_another_waiting(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """He stops what brings his bytes, and reads with many threads and far ahead."""
    monkeypatch.setattr("bootseer_slurm.fuse.waiting._MOST_PARKED", 256)
    data = random.Random(3).randbytes(8 << 20)
    stuck = StuckFile(random.Random(2).randbytes(128 << 20))
    read = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY)
for offset in range(0, 128 << 20, 1 << 18):
    os.posix_fadvise(fd, offset, 1 << 18, os.POSIX_FADV_WILLNEED)
print("ahead", flush=True)
parts = {}
def take(offset):
    parts[offset] = os.pread(fd, 100_000, offset)
threads = [threading.Thread(target=take, args=(number << 20,)) for number in range(100)]
for thread in threads: thread.start()
print("waiting", flush=True)
for thread in threads: thread.join()
import hashlib
print(hashlib.sha256(b"".join(parts[number << 20] for number in range(100))).hexdigest())
"""
    with _serving(mountpoint, readers=2, blocking_threads=8) as server:
        stuck.uid = 12345
        path = server.add("12345/stuck", stuck)
        child = _python(read, path, uid=12345)
        assert child.stdout
        assert [child.stdout.readline() for _ in range(2)] == ["ahead\n", "waiting\n"]
        for _ in range(2):
            assert stuck.waiting.acquire(timeout=20)
        assert not stuck.waiting.acquire(timeout=0.5), "a quarter of eight"
        other = server.add("0/cold", MemoryFile(data, local=lambda offset, size: False))
        started_s = time.monotonic()
        assert other.read_bytes() == data
        assert time.monotonic() - started_s < 5
        stuck.released.set()
        output, errors = child.communicate(timeout=60)
        expected = b"".join(stuck.data[number << 20 :][:100_000] for number in range(100))
        assert output.strip() == hashlib.sha256(expected).hexdigest(), errors


def test_one_user_cannot_fill_the_table_of_readahead(mountpoint: Path) -> None:
    """He asks for more single pages than the kernel has room for; another's reads go on, waiting ones too."""
    pages = protocol.MAX_BACKGROUND + 4000
    ahead = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for page in range(int(sys.argv[2])):
    os.posix_fadvise(fd, page << 12, 1 << 12, os.POSIX_FADV_WILLNEED)
print("done", flush=True)
os.pread(fd, 1, int(sys.argv[2]) - 1 << 12)
print("read", flush=True)
"""
    read = """
import hashlib, os, sys
print("begins", flush=True)
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
"""
    attacked, fast = StuckFile(bytes(pages << 12)), MemoryFile(random.Random(7).randbytes(8 << 20))
    waited = StuckFile(random.Random(8).randbytes(8 << 20))
    attacked.uid, fast.uid, waited.uid = 12345, 12346, 12346
    children = []
    try:
        with _serving(mountpoint, blocking_threads=16) as server:
            children.append(_python(read, server.add("12346/waited", waited), uid=12346))
            assert waited.waiting.acquire(timeout=20)
            first = set(server._waiting._users[12346].latest) | set(server._waiting._users[12346].ahead)
            attacker = _python(ahead, server.add("12345/attacked", attacked), pages, uid=12345)
            children.append(attacker)
            assert attacker.stdout
            assert select.select([attacker.stdout], [], [], 60)[0], "it waits for the kernel's table"
            assert attacker.stdout.readline() == "done\n"
            _wait_until(lambda: sum(len(user) for user in server._waiting._users.values()) > 12_000)
            children.append(_python(read, server.add("12346/fast", fast), uid=12346))
            output, errors = children[-1].communicate(timeout=20)
            assert output.split()[-1] == hashlib.sha256(fast.data).hexdigest(), errors
            users = server._waiting._users
            # Each reader thread parks a read before it drops one too many.
            most = protocol.MAX_BACKGROUND * 3 // 4 + len(server._requests.threads)
            assert sum(len(user) for user in users.values()) <= most
            assert first <= set(users[12346].latest) | set(users[12346].ahead), "what waited waits"
            attacked.released.set()
            waited.released.set()
            output, errors = children[0].communicate(timeout=60)
            assert output.split()[-1] == hashlib.sha256(waited.data).hexdigest(), errors
            assert attacker.communicate(timeout=60)[0] == "read\n", (
                "a page whose readahead failed is read when needed"
            )
            assert not server._waiting._users and not server._waiting._reads
    finally:
        attacked.released.set()
        waited.released.set()
        for child in children:
            child.kill()
            child.communicate()


def test_a_killed_reader_in_direct_io_goes_at_once(server: Server, stuck: StuckFile) -> None:
    code = """
import mmap, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
os.preadv(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, 4096)], 0)
print("read")
"""
    path = server.add("0/stuck", stuck)
    children = [_python(code, path) for _ in range(2)]
    try:
        for _ in children:
            assert stuck.waiting.acquire(timeout=20)
        children[0].terminate()
        assert children[0].wait(5) == -signal.SIGTERM
        children[1].send_signal(signal.SIGUSR1)  # not deadly: the read goes on
        time.sleep(0.3)
        assert children[1].poll() is None
        stuck.released.set()
        assert children[1].communicate(timeout=10)[0] == "read\n"
    finally:
        stuck.released.set()
        for child in children:
            child.kill()
            child.communicate()


class _Panic(BaseException):
    """As hdfs-native raises it."""


@pytest.mark.parametrize(
    ("error", "number", "logged"),
    [
        (OSError(errno.ESTALE, "gone"), errno.ESTALE, False),
        (OSError(errno.EIO, "broken"), errno.EIO, False),
        (TimeoutError("no errno"), errno.EIO, False),
        (OSError(100_000, "not an errno"), errno.EIO, False),
        (RuntimeError("a bug"), errno.EIO, True),
        (_Panic("past Exception"), errno.EIO, True),
    ],
)
@pytest.mark.parametrize("where", ["ready", "fetch"])
def test_errors_of_a_file_go_to_its_reader(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    number: int,
    logged: bool,
    where: str,
) -> None:
    def fail(offset: int, size: int) -> int:
        raise error

    file = MemoryFile(b"data", local=lambda offset, size: False)
    monkeypatch.setattr(file, where, fail)
    path = server.add("0/broken", file)
    with caplog.at_level(logging.ERROR), pytest.raises(OSError) as raised:
        path.read_bytes()
    assert raised.value.errno == number
    assert any(record.exc_info for record in caplog.records) == logged
    monkeypatch.undo()
    assert path.read_bytes() == b"data"  # and the file works again when its trouble is over
    assert server.add("0/good", MemoryFile(b"good")).read_bytes() == b"good"


def test_a_file_that_gives_too_little_is_an_error_not_a_short_read(server: Server) -> None:
    short = MemoryFile(bytes(100_000), local=lambda offset, size: False)
    short.data = bytes(99_999)
    truncated = MemoryFile(bytes(100_000))
    os.ftruncate(truncated.fd, 50_000)
    odd = MemoryFile(bytes(50_000), local=lambda offset, size: False)
    odd.fetch = lambda offset, size: memoryview(bytes(2 * size))[::2]  # type: ignore[method-assign]
    for name, file in (("short", short), ("truncated", truncated), ("odd", odd)):
        with pytest.raises(OSError) as raised:
            server.add(f"0/{name}", file).read_bytes()
        assert raised.value.errno == errno.EIO


def _our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bootseer")]


def _our_descriptors() -> list[str]:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:
            continue  # the listing's own
    return sorted(link for link in links if link == "/dev/fuse")


def test_closing_and_stopping_leave_nothing(mountpoint: Path) -> None:
    mount = Mount.open(mountpoint)
    server = Server(mount, mountpoint.with_name("nodes"))
    server.start()
    assert len(_our_descriptors()) == 2 and _our_threads()
    path = server.add("0/blob", MemoryFile(bytes(1 << 20)))
    stream = path.open("rb", buffering=0)
    mount.close()
    server.stop()
    assert not mounts.is_mountpoint(mountpoint)
    assert _our_threads() == [] and _our_descriptors() == []
    with pytest.raises(OSError) as raised:
        stream.read(10)
    assert raised.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    with contextlib.suppress(OSError):  # close(2) would tell the server
        stream.close()
    server.remove("0/blob")  # nobody to tell
    mount.close()
    server.stop()


def test_a_fetch_that_does_not_come_back(
    mountpoint: Path, stuck: StuckFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bootseer_slurm.fuse.server._STOP_TIMEOUT_S", 0.3)
    with _serving(mountpoint) as server:
        path = server.add("0/stuck", stuck)
        child = _python("import sys; open(sys.argv[1], 'rb').read()", path)
        assert stuck.waiting.acquire(timeout=20)
    with child:
        assert child.wait(10) == 1
    assert not mounts.is_mountpoint(mountpoint)
    stuck.released.set()
    _wait_until(lambda: _our_threads() == [] and _our_descriptors() == [])


@pytest.fixture
def fusectl() -> Iterator[None]:
    folder = Path("/sys/fs/fuse/connections")
    ours = not folder.is_mount()
    if ours:
        mounts.mount("fusectl", folder, "fusectl", 0)
    yield
    if ours:
        mounts.unmount(folder)


@pytest.mark.parametrize("held", [False, True])
def test_the_mount_was_taken_away(mountpoint: Path, fusectl: None, held: bool) -> None:
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:  # close(2) would tell the server
        with _serving(mountpoint) as server:
            path = server.add("0/blob", MemoryFile(bytes(10)))
            if held:
                opened.enter_context(path.open("rb", buffering=0))
            mounts.unmount(mountpoint)
        assert _our_threads() == [] and _our_descriptors() == []


def _start_and_kill(mountpoint: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(protocol.__file__).parents[2])!r})
from pathlib import Path
from bootseer_slurm.fuse import Mount, Server
mount = Mount.open(Path(sys.argv[1]))
Server(mount, Path(sys.argv[1] + ".nodes")).start()
print("up", flush=True)
time.sleep(100)
"""
    with _python(code, mountpoint) as child:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        list(mountpoint.iterdir())  # the kernel has the root's attributes now
        child.kill()


def test_the_mount_of_a_killed_supervisor_is_replaced(mountpoint: Path) -> None:
    _start_and_kill(mountpoint)
    with pytest.raises(OSError) as raised:
        os.statvfs(mountpoint)
    assert raised.value.errno == errno.ENOTCONN
    with _serving(mountpoint) as server:
        assert server.add("0/blob", MemoryFile(b"data")).read_bytes() == b"data"
        assert len(mounts.mounts_at(mountpoint)) == 1


def test_a_mount_that_somebody_holds_and_nobody_serves_is_replaced(
    mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bootseer_slurm.fuse.mount._ANSWER_TIMEOUT_S", 0.3)
    mountpoint.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
        mounts.mount("bootseer", mountpoint, "fuse.bootseer", 0, options)
        Mount.open(mountpoint).close()
    finally:
        os.close(device)
    assert not mounts.is_mountpoint(mountpoint)


def test_what_is_alive_is_left_alone(server: Server, mountpoint: Path) -> None:
    path = server.add("0/blob", MemoryFile(b"data"))
    with pytest.raises(BootseerError, match="in use") as raised:
        Mount.open(mountpoint)
    assert raised.value.hint
    assert path.read_bytes() == b"data"
    other = mountpoint.with_name("other")
    other.mkdir()
    mounts.mount("not-ours", other, "tmpfs", 0)
    try:
        with pytest.raises(BootseerError, match="not-ours"):
            Mount.open(other)
    finally:
        mounts.unmount(other)


def test_open_says_why_it_cannot(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mountpoint.touch()
    with pytest.raises(BootseerError, match="mount point"):
        Mount.open(mountpoint)
    mountpoint.unlink()

    def refuse(*arguments: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr("bootseer_slurm.mounts._LIBC.mount", refuse)
    with pytest.raises(BootseerError, match=r"cannot mount FUSE at .*: Operation not permitted") as raised:
        Mount.open(mountpoint)
    assert raised.value.hint and _our_descriptors() == [] and _our_threads() == []
