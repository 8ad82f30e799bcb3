"""The agent's end of a fetch process whose user, or whose file system, does not behave."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.blob.jobclass import Remembered, encode_wishes
from bootseer_slurm.blob.names import Name, user_folder, write_name
from bootseer_slurm.blob.trace import STARTS, Plan, Trace, decode_plan
from bootseer_slurm.blob.writer import BlobWriter, Original
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, StoreError
from bootseer_slurm.fetch.process import FetchProcess, Reply
from bootseer_slurm.fetch.spare import Started
from bootseer_slurm.identity import User
from bootseer_slurm.store import FileStore

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
def process(tmp_path: Path) -> Iterator[FetchProcess]:
    made = FetchProcess(SELF, f"file://{tmp_path}", streams=1, timeout_s=0.5)
    yield made
    made.kill()


def resolve(process: FetchProcess, path: Path) -> int:
    """The handle of a file where it lies."""
    reply = process.call("resolve", kind="checkpoint", name=str(path))
    close(reply)
    return int(reply.fields["origin"])


def close(reply: Reply) -> None:
    for fd in reply.fds:
        os.close(fd)


def read(process: FetchProcess, handle: int, size_bytes: int = 4096) -> bytes:
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


def open_ring(process: FetchProcess) -> int:
    """The ring as the process itself has it, which is the user's and may do what it likes."""
    resolve(process, Path("/etc/hostname"))  # it has taken its user, and the ring
    for link in Path(f"/proc/{process._process.pid}/fd").iterdir():
        if "bootseer-ring" in os.readlink(link):
            return os.open(link, os.O_RDWR)
    raise AssertionError("no ring")


@as_root
def test_the_ring_cannot_be_shrunk_under_the_agent(process: FetchProcess) -> None:
    ring = open_ring(process)
    size_bytes = os.fstat(ring).st_size
    for other in (0, size_bytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(ring, other)
    os.close(ring)


@as_root
def test_bytes_do_not_change_after_their_check(process: FetchProcess, file: Path) -> None:
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


def test_failed_reads_leave_room_for_others(process: FetchProcess, file: Path) -> None:
    handle = resolve(process, file)
    for _ in range(2 * DEMAND_READS):
        with pytest.raises(StoreError, match="IndexError"):
            read(process, 99)
        with pytest.raises(StoreError, match="ended after"):
            read(process, handle, 2**20 + 1)
    assert read(process, handle) == CONTENT[:4096]


def test_a_late_read_keeps_its_room_until_it_comes(process: FetchProcess, file: Path) -> None:
    handle = resolve(process, file)
    os.kill(process._process.pid, signal.SIGSTOP)
    for _ in range(DEMAND_READS):
        with pytest.raises(StoreError, match="no answer"):
            read(process, handle)
    with pytest.raises(StoreError, match="stuck"):
        read(process, handle)
    os.kill(process._process.pid, signal.SIGCONT)
    until(lambda: process._slots[True].qsize() == DEMAND_READS)
    assert read(process, handle) == CONTENT[:4096]


def test_a_stopped_process_holds_nobody(process: FetchProcess) -> None:
    os.kill(process._process.pid, signal.SIGSTOP)
    for _ in range(2000):
        with pytest.raises(StoreError) as caught:
            process.call("write", path="a" * 4000, timeout_s=0.0001)
    assert "takes no requests" in str(caught.value)


def send(process: FetchProcess, op: str, content: bytes, **fields: str) -> None:
    """Have an operation write this."""
    fd = os.memfd_create("content")
    try:
        os.write(fd, content)
        process.call(op, fds=(fd,), timeout_s=20, **fields)
    finally:
        os.close(fd)


def put_trace(
    process: FetchProcess, job: int, *blocks: int, job_class: str = "c1", partial: bool = False
) -> None:
    touches = tuple((block, 10 * place) for place, block in enumerate(blocks))
    trace = Trace("blob1", "n1", job, 0, time.time_ns(), 100, 262144, partial, "mark", touches)
    send(process, "trace", trace.encode(), **{"class": job_class, "blob": "blob1"})


def get_plan(process: FetchProcess, job_class: str = "c1", *, any_class: bool = True) -> tuple[Plan, str | None]:
    """The plan, and the warning that came with it."""
    fields = {"class": job_class, "blob": "blob1", "blocks": 100, "block_bytes": 262144, "any_class": any_class}
    reply = process.call("plan", **fields)
    content = os.pread(reply.fds[0], 2**20, 0)
    close(reply)
    return decode_plan(content, blocks=100), reply.fields.get("warning")


def traces(tmp_path: Path, job_class: str = "c1") -> Path:
    return tmp_path / user_folder(os.getuid()) / "traces" / job_class / "blob1"


def test_a_plan_is_made_of_the_traces_of_earlier_starts(process: FetchProcess) -> None:
    assert get_plan(process) == (Plan(), None)
    put_trace(process, 1, 7, 3)
    assert get_plan(process) == (Plan((7, 3), (0, 10), 1), None)
    put_trace(process, 2, 7, 4)
    put_trace(process, 3, 7, 4)
    plan, _ = get_plan(process)
    assert plan.blocks == (7, 4) and plan.full_starts == 3


def test_traces_of_old_starts_are_removed(process: FetchProcess, tmp_path: Path) -> None:
    for job in range(1, STARTS + 4):
        put_trace(process, job, job)
        put_trace(process, job, job, partial=True)
    left = {path.name for path in traces(tmp_path).iterdir()}
    jobs = range(4, STARTS + 4)
    assert left == {f"{job}.0.n1" for job in jobs} | {f"{job}.0.n1.partial" for job in jobs}


def test_a_new_class_learns_from_the_others(process: FetchProcess) -> None:
    put_trace(process, 1, 5)
    put_trace(process, 2, 5, 6, job_class="c2")
    assert get_plan(process, "c3")[0].blocks == (5, 6)
    assert get_plan(process, "c3", any_class=False) == (Plan(), None)
    put_trace(process, 3, 9, job_class="c3")
    assert get_plan(process, "c3")[0].blocks == (9,), "its own are better, once there are some"


def test_damaged_traces_are_left_out_and_said(process: FetchProcess, tmp_path: Path) -> None:
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


def test_what_is_no_trace_is_not_kept(process: FetchProcess, tmp_path: Path) -> None:
    with pytest.raises(BootseerError, match="trace cannot be used"):
        send(process, "trace", b"garbage", **{"class": "c1", "blob": "blob1"})
    assert not traces(tmp_path).exists()


def test_what_a_class_asked_for_is_remembered(process: FetchProcess, tmp_path: Path) -> None:
    assert process.call("recall", **{"class": "c1"}).fields["wishes"] == []
    send(process, "remember", encode_wishes([Remembered("image", "/img/x.sqsh", 7)]), **{"class": "c1"})
    assert process.call("recall", **{"class": "c1"}).fields["wishes"] == [["image", "/img/x.sqsh", 7]]
    assert process.call("recall", **{"class": "c2"}).fields["wishes"] == []
    record = tmp_path / user_folder(os.getuid()) / "classes" / "c1.json"
    record.write_text("{}")
    with pytest.raises(IntegrityError, match="job class"):
        process.call("recall", **{"class": "c1"})
    record.write_bytes(b" " * 100_000)
    with pytest.raises(StoreError, match="more than"):
        process.call("recall", **{"class": "c1"})
    assert process.call("recall", **{"class": "c2"}).fields["wishes"] == [], "the process lives on"


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


def check_first(first: list[list[int]], image: Path) -> None:
    """That the head and these ranges are enough to list the image: the rest of the bytes is wiped."""
    (_, head_bytes), (start, size_bytes) = first
    content = image.read_bytes()
    assert 0 < head_bytes <= 4096 and len(content) // 2 < start < len(content)
    assert content[start + size_bytes :].strip(b"\0") == b""
    wiped = image.with_suffix(".wiped")
    wiped.write_bytes(content[:head_bytes] + bytes(start - head_bytes) + content[start:])
    listing = subprocess.run(["unsquashfs", "-l", wiped], check=True, capture_output=True, text=True).stdout
    assert listing.count("/file") == 300


def test_an_image_says_what_a_mount_needs_first(process: FetchProcess, image: Path) -> None:
    reply = process.call("resolve", kind="image", name=str(image))
    close(reply)
    check_first(reply.fields["first"], image)
    assert "first" not in process.call("resolve", kind="checkpoint", name=str(image)).fields


def test_an_image_of_a_registry_is_found_by_name(process: FetchProcess, image: Path, tmp_path: Path) -> None:
    store, name = FileStore(tmp_path), "docker://registry.example/app:1"
    assert "blob" not in process.call("resolve", kind="image", name=name).fields
    record = BlobWriter(store, objects=3).store_named(image, Original("image", name, "sha256:abc"))
    signed = Name(**dataclasses.asdict(record) | {"signature": "hmac"})
    write_name(store, os.getuid(), signed)
    reply = process.call("resolve", kind="image", name=name)
    close(reply)
    (blob,) = reply.fields["blobs"]
    assert blob["folder"] == record.folder and "warning" not in reply.fields
    assert (reply.fields["fingerprint"], blob["signature"]) == ("sha256:abc", "hmac")
    check_first(reply.fields["first"], image)
    reply = process.call("resolve", kind="checkpoint", name=name)
    assert "blob" not in reply.fields and reply.fields["warning"]


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
    name, reply = request.get("name"), {"id": request["id"]}
    if name == "late":
        time.sleep(0.3)
    if name == "error":
        reply |= {"error": "no", "class": "InputError"}
    content = json.dumps(reply).encode()
    if name == "garbage":
        content = b"[" * 60_000
    if name == "nothing":
        content = b""
    socket.send_fds(link, [content], fds)
"""


@pytest.fixture
def hostile(mocker: MockerFixture) -> Iterator[FetchProcess]:
    """A process that sends four descriptors with every reply."""

    def start() -> Started:
        link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            command = [sys.executable, "-c", HOSTILE, str(far.fileno())]
            return Started(subprocess.Popen(command, pass_fds=[far.fileno()]), link)

    mocker.patch("bootseer_slurm.fetch.spare.start", start)
    made = FetchProcess(SELF, "file:///", streams=1, timeout_s=5)
    yield made
    made.kill()


def test_only_a_resolve_and_a_plan_bring_descriptors(hostile: FetchProcess) -> None:
    before = open_fds()
    for op in ("write", "same", "trace", "recall", "remember"):
        assert hostile.call(op).fds == []
    until(lambda: open_fds() == before)
    reply = hostile.call("resolve", name="file")
    assert len(reply.fds) == 3
    until(lambda: open_fds() == before + 3)
    close(reply)
    reply = hostile.call("plan")
    assert len(reply.fds) == 1
    until(lambda: open_fds() == before + 1)
    close(reply)
    with pytest.raises(InputError, match="no"):
        hostile.call("resolve", name="error")
    until(lambda: open_fds() == before)


def test_a_late_replys_descriptors_are_closed(hostile: FetchProcess) -> None:
    before = open_fds()
    with pytest.raises(StoreError, match="no answer"):
        hostile.call("resolve", name="late", timeout_s=0.05)
    assert hostile._waiting == {}
    hostile.call("write")  # replies come in order
    until(lambda: open_fds() == before)


@pytest.mark.parametrize("message", ["garbage", "nothing"])
def test_what_is_no_reply_ends_the_process(hostile: FetchProcess, message: str) -> None:
    before = open_fds()
    with pytest.raises(StoreError, match="ended"):
        hostile.call("resolve", name=message, timeout_s=5)
    with pytest.raises(StoreError, match="takes no requests"):
        hostile.call("resolve", name="file", timeout_s=5)
    until(lambda: open_fds() == before)
    assert hostile._process.wait(5) == -signal.SIGKILL


TRACER = """
import ctypes, sys, time
if ctypes.CDLL(None, use_errno=True).ptrace(0x4206, int(sys.argv[1]), None, None):  # PTRACE_SEIZE
    sys.exit(1)
print("traced", flush=True)
time.sleep(60)
"""


@as_root
def test_a_process_that_does_not_end_is_left_alone(process: FetchProcess, mocker: MockerFixture) -> None:
    # A killed process can be waited for only after its tracer has: it stays, as if a file system held it.
    mocker.patch("bootseer_slurm.fetch.process._END_S", 0.2)
    tracer = subprocess.Popen(
        [sys.executable, "-c", TRACER, str(process._process.pid)], stdout=subprocess.PIPE, text=True
    )
    assert tracer.stdout
    if not tracer.stdout.readline():
        pytest.skip("processes cannot be traced here")
    killer = threading.Thread(target=process.kill, daemon=True)
    killer.start()
    killer.join(3)
    stuck = killer.is_alive()
    assert process._process.returncode is None
    tracer.kill()
    tracer.communicate()
    assert not stuck
    until(lambda: process._process.returncode is not None)
    with pytest.raises(StoreError, match="takes no requests"):
        process.call("same")


def test_a_file_replaced_while_it_is_looked_up_is_not_mixed_up(process: FetchProcess, tmp_path: Path) -> None:
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
                reply = process.call("resolve", kind="checkpoint", name=str(latest))
            except InputError as error:
                assert "was replaced" in str(error)
                continue
            inode = os.fstat(reply.fds[0]).st_ino
            close(reply)
            assert read(process, reply.fields["origin"]) == contents[inode]
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
    process = FetchProcess(User(20001, 20001, ()), f"file://{root}", streams=1, timeout_s=5)
    try:
        reply = process.call("resolve", kind="checkpoint", name=str(file))
        close(reply)
        assert "blob" not in reply.fields
        assert "belongs to another user" in reply.fields["warning"]
        os.chmod(victim, 0o777)
        with pytest.raises(BootseerError, match="belongs to another user"):
            fd = os.memfd_create("events")
            process.call("write", path="events/1.0/n1.jsonl", fds=(fd,))
        os.close(fd)
        assert not (victim / "events").exists()
        for folder, _, names in os.walk(victim):
            os.chown(folder, 20001, 20001)
            os.chmod(folder, 0o700)
            for each in names:
                os.chown(Path(folder) / each, 20001, 20001)
        reply = process.call("resolve", kind="checkpoint", name=str(file))
        close(reply)
        assert reply.fields["blobs"][0]["folder"] == name.folder.replace("users/0/", "users/20001/"), "the same, when it is the user's own"
    finally:
        process.kill()
