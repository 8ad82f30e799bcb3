"""The agent's end of a user's process whose user, or whose file system, does not behave."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.blob.jobclass import Remembered, encode_record
from bootseer_slurm.blob.names import Name, user_folder, write_name
from bootseer_slurm.blob.trace import STARTS, Plan, Trace
from bootseer_slurm.blob.writer import BlobWriter, Original
from bootseer_slurm.config import Config, StoreConfig
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, StoreError
from bootseer_slurm.fuse import Mount
from bootseer_slurm.identity import User
from bootseer_slurm.store import FileStore
from bootseer_slurm.userproc import protocol
from bootseer_slurm.userproc.channel import Channel, NoAnswer
from bootseer_slurm.userproc.client import Found, UserProcess, start_user_process
from bootseer_slurm.userproc.job_process import JobProcess
from bootseer_slurm.userproc.protocol import Resolve
from bootseer_slurm.userproc.spare import Spare, Started

SELF = User(os.getuid(), os.getgid(), ())
CONTENT = os.urandom(2**20)
DEMAND_READS = 4  # in flight at once
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become or to trace another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def process(tmp_path: Path) -> Iterator[UserProcess]:
    made = start_user_process(SELF, f"file://{tmp_path}", streams=1, timeout_s=0.5)
    yield made
    made.kill()


def look_up(process: UserProcess, kind: str, name: str | Path) -> Found:
    """What is found of a file or name; its descriptors are closed."""
    found = process.resolve(Resolve(kind, str(name)))
    assert isinstance(found, Found)
    found.close()
    return found


def resolve(process: UserProcess, path: Path) -> int:
    """The handle of a file where it lies."""
    handle = look_up(process, "checkpoint", path).reply.original_handle
    assert handle is not None
    return handle


def read(process: UserProcess, handle: int, size_bytes: int = 4096) -> bytes:
    with process.read(handle, 0, 0, size_bytes, demand=True) as view:
        return bytes(view)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def open_fds() -> int:
    """How many descriptors of those that HOSTILE sends this process has."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(link.exists() and os.readlink(link) == "/" for link in links)


def open_ring(process: UserProcess) -> int:
    """The ring as the process itself has it, which is the user's and may do what it likes."""
    resolve(process, Path("/etc/hostname"))  # it has taken its user, and the ring
    for link in Path(f"/proc/{process._channel._process.pid}/fd").iterdir():
        if "bootseer-ring" in os.readlink(link):
            return os.open(link, os.O_RDWR)
    raise AssertionError("no ring")


@as_root
def test_its_memory_goes_with_it(tmp_path: Path) -> None:
    """At once: 200 short jobs left 90 rings to the collector of cycles."""
    (tmp_path / "file").write_bytes(os.urandom(2**20))
    rings = [each for each in Path("/proc/self/fd").iterdir() if is_ring(each)]
    process = start_user_process(SELF, f"file://{tmp_path}", streams=1, timeout_s=5)
    found = process.resolve(Resolve("checkpoint", str(tmp_path / "file")))
    assert isinstance(found, Found) and found.reply.original_handle is not None
    with process.read(found.reply.original_handle, 0, 0, 2**20, demand=True, fixed=False) as view:
        process.kill()
        assert len([each for each in Path("/proc/self/fd").iterdir() if is_ring(each)]) == len(rings) + 1
        assert len(bytes(view)) == 2**20, "a read still looks at it"
    del view
    process.close()
    assert [each for each in Path("/proc/self/fd").iterdir() if is_ring(each)] == rings
    found.close()


def is_ring(fd: Path) -> bool:
    with contextlib.suppress(OSError):
        return "bootseer-ring" in os.readlink(fd)
    return False


def test_the_ring_cannot_be_shrunk_under_the_agent(process: UserProcess) -> None:
    ring = open_ring(process)
    size_bytes = os.fstat(ring).st_size
    for other in (0, size_bytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(ring, other)
    os.close(ring)


@as_root
def test_bytes_do_not_change_after_their_check(process: UserProcess, file: Path) -> None:
    handle = resolve(process, file)
    ring = open_ring(process)
    with process.read(handle, 0, 0, len(CONTENT), demand=True) as view:
        overwrite(ring)
        assert bytes(view) == CONTENT
    with process.read(handle, 0, 0, len(CONTENT), demand=True, fixed=False) as view:
        assert bytes(view) == CONTENT, "not copied, where nothing is promised"
        overwrite(ring)
        assert bytes(view) == bytes(len(CONTENT))
    os.close(ring)


def overwrite(ring: int) -> None:
    for offset in range(0, os.fstat(ring).st_size, 2**20):
        os.pwrite(ring, bytes(2**20), offset)


def test_failed_reads_leave_room_for_others(process: UserProcess, file: Path) -> None:
    handle = resolve(process, file)
    for _ in range(2 * DEMAND_READS):
        with pytest.raises(StoreError, match="IndexError"):
            read(process, 99)
        with pytest.raises(StoreError, match="ended after"):
            read(process, handle, 2**20 + 1)
    assert read(process, handle) == CONTENT[:4096]


def test_a_late_read_keeps_its_room_until_it_comes(process: UserProcess, file: Path) -> None:
    handle = resolve(process, file)
    os.kill(process._channel._process.pid, signal.SIGSTOP)
    for _ in range(DEMAND_READS):
        with pytest.raises(StoreError, match="no answer"):
            read(process, handle)
    with pytest.raises(StoreError, match="stuck"):
        read(process, handle)
    os.kill(process._channel._process.pid, signal.SIGCONT)
    until(lambda: process._ring._free[True].qsize() == DEMAND_READS)
    assert read(process, handle) == CONTENT[:4096]


def test_a_stopped_process_holds_nobody(process: UserProcess) -> None:
    os.kill(process._channel._process.pid, signal.SIGSTOP)
    for _ in range(2000):
        with pytest.raises(StoreError) as caught:
            process.write(protocol.Write("a" * 4000), b"", timeout_s=0.0001)
    assert "takes no requests" in str(caught.value)


def put_trace(
    process: UserProcess, job: int, *blocks: int, job_class: str = "c1", partial: bool = False
) -> None:
    touches = tuple((block, 10 * place) for place, block in enumerate(blocks))
    trace = Trace("blob1", "n1", job, 0, time.time_ns(), 100, 262144, partial, "mark", touches)
    process.write(protocol.KeepTrace(job_class, "blob1"), trace.encode(), timeout_s=20)


def get_plan(process: UserProcess, job_class: str = "c1", *, any_class: bool = True) -> tuple[Plan, str]:
    """The plan, and the warning that came with it."""
    return process.make_plan(protocol.MakePlan(job_class, "blob1", 100, 262144, any_class))


def traces(tmp_path: Path, job_class: str = "c1") -> Path:
    return tmp_path / user_folder(os.getuid()) / "traces" / job_class / "blob1"


def test_a_plan_is_made_of_the_traces_of_earlier_starts(process: UserProcess) -> None:
    assert get_plan(process) == (Plan(), "")
    put_trace(process, 1, 7, 3)
    assert get_plan(process) == (Plan((7, 3), (0, 10), 1), "")
    put_trace(process, 2, 7, 4)
    put_trace(process, 3, 7, 4)
    plan, _ = get_plan(process)
    assert plan.blocks == (7, 4) and plan.full_starts == 3


def test_traces_of_old_starts_are_removed(process: UserProcess, tmp_path: Path) -> None:
    for job in range(1, STARTS + 4):
        put_trace(process, job, job)
        put_trace(process, job, job, partial=True)
    left = {path.name for path in traces(tmp_path).iterdir()}
    jobs = range(4, STARTS + 4)
    assert left == {f"{job}.0.n1" for job in jobs} | {f"{job}.0.n1.partial" for job in jobs}


def test_a_new_class_learns_from_the_others(process: UserProcess) -> None:
    put_trace(process, 1, 5)
    put_trace(process, 2, 5, 6, job_class="c2")
    assert get_plan(process, "c3")[0].blocks == (5, 6)
    assert get_plan(process, "c3", any_class=False) == (Plan(), "")
    put_trace(process, 3, 9, job_class="c3")
    assert get_plan(process, "c3")[0].blocks == (9,), "its own are better, once there are some"


def test_damaged_traces_are_left_out_and_said(process: UserProcess, tmp_path: Path) -> None:
    put_trace(process, 1, 5)
    folder = traces(tmp_path)
    (folder / "2.0.n1").write_bytes(b"garbage")
    (folder / "3.0.n1").write_bytes(b"x" * 2_000_000)
    (folder / "4.0.n1").mkdir()
    (folder / "nonsense").symlink_to("/dev/zero")
    (folder / ".5.0.n1.half").write_bytes(b"")
    plan, warning = get_plan(process)
    assert plan == Plan((5,), (0,), 1)
    assert warning and warning.startswith("4 of 5 traces left out")


def test_what_is_no_trace_is_not_kept(process: UserProcess, tmp_path: Path) -> None:
    with pytest.raises(BootseerError, match="trace cannot be used"):
        process.write(protocol.KeepTrace("c1", "blob1"), b"garbage", timeout_s=20)
    assert not traces(tmp_path).exists()


def test_what_a_class_asked_for_is_remembered(process: UserProcess, tmp_path: Path) -> None:
    assert process.recall("c1") == []
    record_of = encode_record([Remembered("image", "/img/x.sqsh", 7)])
    process.write(protocol.Remember("c1"), record_of, timeout_s=20)
    assert process.recall("c1") == [Remembered("image", "/img/x.sqsh", 7)]
    assert process.recall("c2") == []
    record = tmp_path / user_folder(os.getuid()) / "classes" / "c1.json"
    record.write_text("{}")
    with pytest.raises(IntegrityError, match="job class"):
        process.recall("c1")
    record.write_bytes(b" " * 100_000)
    with pytest.raises(StoreError, match="more than"):
        process.recall("c1")
    assert process.recall("c2") == [], "the process lives on"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if shutil.which("mksquashfs") is None:
        pytest.skip("no mksquashfs")
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(300):
        (folder / f"file{number}").write_bytes(os.urandom(20_000))
    made = tmp_path / "image.sqsh"
    arguments = ["mksquashfs", folder, made, "-quiet", "-no-progress", "-processors", "1"]
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    os.utime(made, (1_700_000_000, 1_700_000_000))
    return made


def check_first(first: tuple[tuple[int, int], ...], image: Path) -> None:
    """That the head and these ranges are enough to list the image: the rest of the bytes is wiped."""
    (_, head_bytes), (start, size_bytes) = first
    content = image.read_bytes()
    assert 0 < head_bytes <= 4096 and len(content) // 2 < start < len(content)
    assert content[start + size_bytes :].strip(b"\0") == b""
    wiped = image.with_suffix(".wiped")
    wiped.write_bytes(content[:head_bytes] + bytes(start - head_bytes) + content[start:])
    listing = subprocess.run(["unsquashfs", "-l", wiped], check=True, capture_output=True, text=True).stdout
    assert listing.count("/file") == 300


def test_an_image_says_what_a_mount_needs_first(process: UserProcess, image: Path) -> None:
    check_first(look_up(process, "image", image).reply.first, image)
    assert look_up(process, "checkpoint", image).reply.first == ()


def test_an_image_of_a_registry_is_found_by_name(process: UserProcess, image: Path, tmp_path: Path) -> None:
    store, name = FileStore(tmp_path), "docker://registry.example/app:1"
    assert look_up(process, "image", name).reply.blobs == ()
    record = BlobWriter(store, objects=3).store_named(image, Original("image", name, "sha256:abc"))
    signed = Name(**dataclasses.asdict(record) | {"signature": "hmac"})
    write_name(store, os.getuid(), signed)
    reply = look_up(process, "image", name).reply
    (blob,) = reply.blobs
    assert blob.folder == record.folder and reply.warning == ""
    assert (reply.fingerprint, blob.signature) == ("sha256:abc", "hmac")
    check_first(reply.first, image)
    reply = look_up(process, "checkpoint", name).reply
    assert reply.blobs == () and reply.warning


HOSTILE = """
import json, os, socket, sys, time
link = socket.socket(fileno=int(sys.argv[1]))
fds = [os.open("/", os.O_RDONLY) for _ in range(4)]
link.recv(65536)  # whom to become
while True:
    message, received, _, _ = socket.recv_fds(link, 65536, 4)
    if not message:
        break
    request = json.loads(message)
    name = request.get("name")
    kinds = {"Resolve": "Resolved", "MakePlan": "Planned", "IsSame": "Same", "Recall": "Recalled"}
    reply = {"of": kinds.get(request["op"], "Reply"), "same": True}
    if name == "file":
        blob = {"folder": "f", "handle": 0, "signature": ""}
        reply |= {"has_original": True, "blobs": [blob, blob]}
    if name == "many":
        reply |= {"has_original": True, "blobs": [blob, blob, blob]}
    if name == "late":
        time.sleep(0.3)
    answer = {"id": request["id"], "reply": reply}
    if name == "error":
        answer = {"id": request["id"], "error": "no", "class": "InputError"}
    content = json.dumps(answer).encode()
    if name == "garbage":
        content = b"[" * 60_000
    if name == "nothing":
        content = b""
    socket.send_fds(link, [content], fds)
"""


@pytest.fixture
def hostile() -> Iterator[UserProcess]:
    """A process that sends four descriptors with every reply."""

    def start() -> Started:
        link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            command = [sys.executable, "-c", HOSTILE, str(far.fileno())]
            return Started(subprocess.Popen(command, pass_fds=[far.fileno()]), link)

    made = start_user_process(SELF, "file:///", streams=1, timeout_s=5, take=start)
    yield made
    made.kill()


def test_only_a_resolve_and_a_plan_bring_descriptors(hostile: UserProcess) -> None:
    before = open_fds()
    for request in (protocol.Write("x"), protocol.KeepTrace("c", "b"), protocol.Remember("c")):
        hostile.write(request, b"", timeout_s=5)
    assert hostile.is_same(protocol.IsSame("image", "/x", "f"), timeout_s=5)
    assert hostile.recall("c") == []
    until(lambda: open_fds() == before)
    found = hostile.resolve(Resolve("image", "file"))
    assert isinstance(found, Found)
    assert len(found.manifest_fds) == 2
    until(lambda: open_fds() == before + 3)
    original = found.take_original()
    assert original is not None
    found.close()
    until(lambda: open_fds() == before + 1)
    os.close(original)
    look_up(hostile, "image", "none")
    with pytest.raises(IntegrityError, match="no file in memory"):
        hostile.make_plan(protocol.MakePlan("c", "b", 1, 1, True))
    with pytest.raises(InputError, match="no"):
        hostile.resolve(Resolve("image", "error"))
    with pytest.raises(IntegrityError, match="cannot be"):
        hostile.resolve(Resolve("image", "many"))
    until(lambda: open_fds() == before)


def test_a_late_replys_descriptors_are_closed(hostile: UserProcess) -> None:
    before = open_fds()
    with pytest.raises(StoreError, match="no answer"):
        hostile._ask(Resolve("image", "late"), protocol.Resolved, timeout_s=0.05)
    assert hostile._channel._waiting == {}
    hostile.write(protocol.Write("x"), b"", timeout_s=5)  # replies come in order
    until(lambda: open_fds() == before)


def test_a_reads_reply_is_checked_too(hostile: UserProcess) -> None:
    before = open_fds()
    with pytest.raises(BootseerError, match="answered"), hostile.read(0, 0, 0, 4096, demand=True):
        pass
    until(lambda: open_fds() == before and hostile._ring._free[True].qsize() == DEMAND_READS)


@pytest.mark.parametrize("message", ["garbage", "nothing"])
def test_what_is_no_reply_ends_the_process(hostile: UserProcess, message: str) -> None:
    before = open_fds()
    with pytest.raises(StoreError, match="ended"):
        hostile.resolve(Resolve("image", message))
    with pytest.raises(StoreError, match="takes no requests"):
        hostile.resolve(Resolve("image", "file"))
    until(lambda: open_fds() == before)
    assert hostile._channel._process.wait(5) == -signal.SIGKILL


@pytest.fixture
def impatient(mocker: MockerFixture) -> None:
    mocker.patch("bootseer_slurm.userproc.channel._LOOK_S", 0.1)
    mocker.patch("bootseer_slurm.userproc.channel._SILENT_S", 1.0)


def test_a_stopped_process_is_followed_by_one_more(impatient: None, tmp_path: Path, file: Path) -> None:
    config = dataclasses.replace(Config(), store=StoreConfig(uri=f"file://{tmp_path}"))
    spare = Spare()
    job = JobProcess(os.getuid(), os.getgid(), config, spare)
    try:
        first = job()
        handle = resolve(first, file)
        os.kill(first._channel._process.pid, signal.SIGSTOP)
        with pytest.raises(StoreError, match="ended"):
            read(first, handle)
        second = job()
        assert second is not first and job() is second
        assert read(second, resolve(second, file)) == CONTENT[:4096]
        until(lambda: first._channel._process.returncode == -signal.SIGKILL)
        os.kill(second._channel._process.pid, signal.SIGSTOP)
        with pytest.raises(StoreError, match="ended"):
            look_up(second, "checkpoint", file)
        with pytest.raises(StoreError, match="often enough"):
            job()
    finally:
        job.kill()
        spare.close()


def test_a_process_that_says_nothing_at_all_is_killed(impatient: None) -> None:
    def start() -> Started:
        link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            return Started(subprocess.Popen(["sleep", "60"], pass_fds=[far.fileno()]), link)

    mute = start_user_process(SELF, "file:///", streams=1, timeout_s=5, take=start)
    try:
        with pytest.raises(StoreError, match="ended"):
            mute.is_same(protocol.IsSame("image", "/x", "f"), timeout_s=20)
        assert mute.ended
    finally:
        mute.kill()


# It takes its requests late, and answers each.
LATE = """
import json, os, socket, sys, time
link = socket.socket(fileno=int(sys.argv[1]))
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
link.recv(65536)  # whom to become
while message := link.recv(65536):
    link.send(json.dumps({"id": json.loads(message)["id"], "reply": {"of": "Reply"}}).encode())
"""


def test_a_process_that_took_no_requests_for_a_while_goes_on(impatient: None, tmp_path: Path) -> None:
    may_take = tmp_path / "may"

    def start() -> Started:
        link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            command = [sys.executable, "-S", "-c", LATE, str(far.fileno()), str(may_take)]
            return Started(subprocess.Popen(command, pass_fds=[far.fileno()]), link)

    late = start_user_process(SELF, "file:///", streams=1, timeout_s=5, take=start)
    channel = late._channel
    try:
        sent = [channel.send(protocol.Ping())]
        while not sent[-1].done():  # until the socket is full
            sent.append(channel.send(protocol.Ping()))
        with pytest.raises(NoAnswer):
            channel.wait(sent[0], 0.5)  # it looks whether the process answers
        may_take.touch()
        assert [each.result(5) for each in sent[:-1]]
        time.sleep(1.2)  # longer than a process may be silent, and nobody looks meanwhile
        with pytest.raises(NoAnswer):
            channel.wait(Future(), 2.0)
        assert not late.ended
    finally:
        late.kill()


@as_root
def test_the_memory_of_one_that_was_replaced_goes_too(tmp_path: Path, file: Path) -> None:
    config = dataclasses.replace(Config(), store=StoreConfig(uri=f"file://{tmp_path}"))
    spare = Spare()
    rings = [each for each in Path("/proc/self/fd").iterdir() if is_ring(each)]
    job = JobProcess(os.getuid(), os.getgid(), config, spare)
    first = job()
    with first.read(resolve(first, file), 0, 0, 4096, demand=True, fixed=False) as view:
        os.kill(first._channel._process.pid, signal.SIGKILL)
        until(lambda: first.ended)
        assert job() is not first
        until(lambda: first._channel._process.returncode is not None)
        time.sleep(0.1)  # its memory was to be given back, and a read looked at it
        assert len(bytes(view)) == 4096
    del view
    job.kill()
    job.close()
    spare.close()
    assert [each for each in Path("/proc/self/fd").iterdir() if is_ring(each)] == rings


@as_root
@pytest.mark.fuse
def test_a_process_whose_file_system_says_nothing_goes_on(
    impatient: None, process: UserProcess, tmp_path: Path, file: Path
) -> None:
    mount = Mount.open(tmp_path / "hung")  # which nobody serves
    try:
        for _ in range(2):
            with pytest.raises(NoAnswer):
                process.is_same(
                    protocol.IsSame("checkpoint", str(tmp_path / "hung" / "file"), "f"), timeout_s=1.5
                )
        assert not process.ended
        assert read(process, resolve(process, file)) == CONTENT[:4096]
    finally:
        mount.close()


TRACER = """
import ctypes, sys, time
if ctypes.CDLL(None, use_errno=True).ptrace(0x4206, int(sys.argv[1]), None, None):  # PTRACE_SEIZE
    sys.exit(1)
print("traced", flush=True)
time.sleep(60)
"""


def lingering_connection() -> tuple[socket.socket, socket.socket]:
    """A connection whose last close waits a minute for a peer that reads nothing (SO_LINGER), and its peer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    near.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(65536))
    near.setblocking(True)
    return near, far


def test_descriptors_that_cannot_be_closed_hold_no_jobs_end(mocker: MockerFixture) -> None:
    """The process's user chooses what it sends: a close of it may wait for his file system, or his peer."""
    mocker.patch("bootseer_slurm.userproc.channel._END_S", 0.2)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(Started(subprocess.Popen(["sleep", "100"]), ours), 1)
    near, far = lingering_connection()
    socket.send_fds(theirs, [b"no answer"], [near.fileno()])
    near.close()
    time.sleep(0.5)  # the agent's is the last one now, and is being closed
    killer = threading.Thread(target=channel.kill, daemon=True)
    killer.start()
    killer.join(20)
    stuck = killer.is_alive()
    far.close()
    theirs.close()
    killer.join(20)
    assert not stuck


@as_root
def test_a_process_that_does_not_end_is_left_alone(process: UserProcess, mocker: MockerFixture) -> None:
    # A killed process can be waited for only after its tracer has: it stays, as if a file system held it.
    mocker.patch("bootseer_slurm.userproc.channel._END_S", 0.2)
    tracer = subprocess.Popen(
        [sys.executable, "-c", TRACER, str(process._channel._process.pid)], stdout=subprocess.PIPE, text=True
    )
    assert tracer.stdout
    if not tracer.stdout.readline():
        pytest.skip("processes cannot be traced here")
    killer = threading.Thread(target=process.kill, daemon=True)
    killer.start()
    killer.join(3)
    stuck = killer.is_alive()
    assert process._channel._process.returncode is None
    tracer.kill()
    tracer.communicate()
    assert not stuck
    until(lambda: process._channel._process.returncode is not None)
    with pytest.raises(StoreError, match="takes no requests"):
        process.is_same(protocol.IsSame("image", "/x", "f"), timeout_s=5)


def test_a_file_replaced_while_it_is_looked_up_is_not_mixed_up(process: UserProcess, tmp_path: Path) -> None:
    latest, spare = tmp_path / "latest.pt", tmp_path / "spare"
    files = [tmp_path / name for name in "ab"]
    contents = {}
    for path in files:
        path.write_bytes(path.name.encode() * 4096)
        contents[path.stat().st_ino] = path.read_bytes()
    os.link(files[0], latest)
    over = threading.Event()

    def replace() -> None:
        turn = 0
        while not over.is_set():
            turn ^= 1
            os.link(files[turn], spare)
            os.rename(spare, latest)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(200):
            try:
                found = process.resolve(Resolve("checkpoint", str(latest)))
            except InputError as error:
                assert "was replaced" in str(error)
                continue
            assert isinstance(found, Found)
            assert found.reply.original_handle is not None
            original = found.take_original()
            assert original is not None
            inode = os.fstat(original).st_ino
            os.close(original)
            assert read(process, found.reply.original_handle) == contents[inode]
    finally:
        over.set()
        thread.join()


@as_root
def test_what_another_user_planted_is_not_used(tmp_path: Path, file: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    root = tmp_path / "store"
    (root / "users").mkdir(parents=True)
    (root / "users").chmod(0o1777)
    victim = root / user_folder(20001)
    os.utime(file, (1_700_000_000, 1_700_000_000))
    original = Original("checkpoint", str(file), f"{len(CONTENT)}@1700000000")
    name = BlobWriter(FileStore(root)).store_named(file, original)
    (root / user_folder(0)).rename(victim)
    record = next((victim / "names").iterdir())
    planted = json.loads(record.read_text()) | {"folder": name.folder.replace("users/0/", "users/20001/")}
    record.write_text(json.dumps(planted))
    for folder, _, names in os.walk(victim):
        os.chmod(folder, 0o755)
        os.chown(folder, 20002, 20002)
        for each in names:
            os.chmod(Path(folder) / each, 0o644)
            os.chown(Path(folder) / each, 20002, 20002)
    process = start_user_process(User(20001, 20001, ()), f"file://{root}", streams=1, timeout_s=5)
    try:
        reply = look_up(process, "checkpoint", file).reply
        assert reply.blobs == ()
        assert "belongs to another user" in reply.warning
        os.chmod(victim, 0o777)
        with pytest.raises(BootseerError, match="belongs to another user"):
            process.write(protocol.Write("events/1.0/n1.jsonl"), b"", timeout_s=20)
        assert not (victim / "events").exists()
        for folder, _, names in os.walk(victim):
            os.chown(folder, 20001, 20001)
            os.chmod(folder, 0o700)
            for each in names:
                os.chown(Path(folder) / each, 20001, 20001)
        reply = look_up(process, "checkpoint", file).reply
        assert reply.blobs[0].folder == name.folder.replace("users/0/", "users/20001/"), (
            "the same, when it is the user's own"
        )
    finally:
        process.kill()
