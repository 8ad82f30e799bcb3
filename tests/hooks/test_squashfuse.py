"""libexec/squashfuse in a user's namespaces, as enroot calls it: with an agent, and with all that can go wrong.

The agent is a small one of ours on a real socket; the mounts are real.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.image.kernel_mount import KernelMount

STAND_IN = Path(__file__).resolve().parents[2] / "libexec" / "squashfuse"
_UID, _GID = 54321, 54322
_OK = b"STATUS=ok\0"

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mksquashfs") is None or not Path("/dev/loop-control").exists(),
    reason="needs root, loop devices and squashfs-tools",
)


class Agent:
    """Answers each connection with fixed bytes and descriptors, or, without bytes, never."""

    def __init__(self, path: Path, reply: bytes | None, fds: Callable[[], list[int]] = list) -> None:
        self.requests: list[bytes] = []
        self.peers: list[int] = []
        self._reply, self._fds = reply, fds
        self._path = path
        self._ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o666)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            link, _ = self._listener.accept()
            with link:
                if self._ended.is_set():
                    return
                if self._reply is None:
                    self._ended.wait(30)
                    return
                self.requests.append(b"".join(iter(lambda link=link: link.recv(65536), b"")))
                fds = self._fds()
                socket.send_fds(link, [self._reply], fds)
                for fd in fds:
                    os.close(fd)

    def stop(self) -> None:
        self._ended.set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect_ex(str(self._path))
        self._thread.join()
        self._listener.close()


class Place:
    """Where the stand-in is installed, before another squashfuse that says how it was called."""

    def __init__(self, home: Path, *, hurried: bool = False) -> None:
        self.socket = home / "agent.sock"
        self.blobs = home / "blobs"
        self.target = home / "lower"
        for folder in (self.blobs, self.target, home / "first", home / "second"):
            folder.mkdir()
        os.chown(self.target, _UID, _GID)
        self.stand_in = home / "first" / "squashfuse"
        text = STAND_IN.read_text()
        assert text.count("/run/bootseer/blobs/") == text.count("/run/bootseer/agent.sock") == 1
        text = text.replace("/run/bootseer/blobs/", f"{self.blobs}/")
        text = text.replace("/run/bootseer/agent.sock", str(self.socket))
        # Machines for tests are busy; only who waits for a hung agent wants to see the real limit.
        assert text.count("\nDEADLINE_S = 0.2 ") == 1
        self.stand_in.write_text(
            text if hurried else text.replace("\nDEADLINE_S = 0.2 ", "\nDEADLINE_S = 20 ")
        )
        self.stand_in.chmod(0o755)
        self.other = home / "second" / "squashfuse"
        self.other.write_text('#!/bin/sh\nprintf "%s|" other "$@"\nulimit -f\nexit 7\n')
        self.other.chmod(0o755)
        self.path = f"{home}/first:{home}/second:/usr/bin:/bin"

    def arguments(self, image: Path | None = None) -> list[str]:
        return ["-f", "-o", f"uid={_UID},gid={_GID}", str(image or self.blobs / "1" / "ab"), str(self.target)]

    def run(self, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.stand_in, *(arguments or self.arguments())],
            env={"PATH": path or self.path},
            capture_output=True,
            text=True,
            timeout=30,
        )

    def given_way(self, *arguments: str) -> str:
        return "|".join(["other", *(arguments or self.arguments())]) + "|unlimited\n"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp/") and os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    yield Place(tmp_path)
    for entry in mounts.mounts_below(tmp_path):
        mounts.unmount(entry.point)


@pytest.fixture
def mount(place: Place, tmp_path: Path) -> Iterator[KernelMount]:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"the image's")
    image = tmp_path / "image.sqsh"
    options = ["-all-root", "-quiet", "-no-progress"]
    subprocess.run(["mksquashfs", tmp_path / "tree", image, *options], check=True, stdout=subprocess.DEVNULL)
    instance = KernelMount.open_image(image, tmp_path / "mounts" / "ab", uid=_UID, gid=_GID)
    yield instance
    instance.close()


# What enroot's start does: the stand-in in the background, looks until something is mounted while it lives.
_ENROOT = """
squashfuse -f -o uid=$(id -u),gid=$(id -g) "$1" "$2" &
pid=$!
i=0
while ! mountpoint -q "$2"; do
    if ! kill -0 $pid || [ $i = 100 ]; then echo failed; exit 1; fi
    i=$((i+1))
    sleep .001
done
echo mounted
stat -c "%u %g %U" "$2/file"
cat "$2/file"; echo
kill -0 $pid && echo alive
"""


def _start(place: Place, then: str) -> subprocess.CompletedProcess[str]:
    """As the user, in namespaces of his, like enroot."""
    return subprocess.run(
        [
            *("unshare", "-Um", f"--map-user={_UID}", f"--map-group={_GID}", "--keep-caps"),
            *("bash", "-c", _ENROOT + then, "enroot", place.blobs / "1" / "ab", place.target),
        ],
        env={"PATH": place.path},
        capture_output=True,
        text=True,
        user=_UID,
        group=_GID,
        extra_groups=[],
        timeout=60,
        cwd="/",
    )


@needs_root
def test_a_container_starts_on_the_mount_of_the_agent(place: Place, mount: KernelMount) -> None:
    agent = Agent(place.socket, _OK, lambda: [mount.clone()])
    try:
        done = _start(place, 'kill $pid; wait $pid; echo "ended $?"; mountpoint -q "$2" || echo unmounted')
    finally:
        agent.stop()
    lines = done.stdout.splitlines()
    assert lines[0] == "mounted", done.stderr
    assert lines[1].startswith(f"{_UID} {_GID} ")
    assert lines[2:] == ["the image's", "alive", "ended 0", "unmounted"]
    assert agent.requests == [b"OP=mount\0IMAGE=" + os.fsencode(place.blobs / "1" / "ab") + b"\0"]
    assert not mounts.is_mountpoint(place.target)


@needs_root
@pytest.mark.parametrize("signal_name", ["HUP", "INT", "TERM"])
def test_signals_end_it(place: Place, mount: KernelMount, signal_name: str) -> None:
    """HUP is what the kernel sends when enroot's processes are gone."""
    agent = Agent(place.socket, _OK, lambda: [mount.clone()])
    try:
        # A shell's job in the background ignores INT, and what it starts does too; the stand-in does not.
        done = _start(place, f'sleep 0.2; kill -{signal_name} $pid; wait $pid; echo "ended $?"')
    finally:
        agent.stop()
    assert done.stdout.splitlines()[-1] == "ended 0", done.stderr


@needs_root
def test_it_ends_when_the_mount_is_gone(place: Place, mount: KernelMount) -> None:
    agent = Agent(place.socket, _OK, lambda: [mount.clone()])
    try:
        done = _start(place, 'umount "$2"; wait $pid; echo "ended $?"')
    finally:
        agent.stop()
    assert done.stdout.splitlines()[-1] == "ended 0", done.stderr


@needs_root
def test_it_is_fast(place: Place, mount: KernelMount) -> None:
    agent = Agent(place.socket, _OK, lambda: [mount.clone()])
    try:
        program = """
            import ctypes, subprocess, sys, time
            target, *command = sys.argv[1:]
            before_s = time.monotonic()
            process = subprocess.Popen(command)
            while target not in open("/proc/self/mountinfo").read():
                assert process.poll() is None
                time.sleep(0.001)
            print(time.monotonic() - before_s)
            process.terminate()
            process.wait()
        """
        times_s = []
        for _ in range(5):
            done = subprocess.run(
                [
                    *("unshare", "-m", sys.executable, "-c", textwrap.dedent(program)),
                    *(f" {place.target} ", place.stand_in, *place.arguments()),
                ],
                capture_output=True,
                text=True,
                check=True,
                timeout=30,
            )
            times_s.append(float(done.stdout))
    finally:
        agent.stop()
    print("until mounted, ms:", [round(each * 1000, 1) for each in times_s])
    assert min(times_s) < 0.1  # 20 ms on an idle machine


def test_images_of_others_are_not_asked_for(place: Place, tmp_path: Path) -> None:
    agent = Agent(place.socket, _OK)
    try:
        for image in (tmp_path / "x.sqsh", place.blobs.parent / "blobs2" / "x", place.blobs / ".." / "x"):
            done = place.run(*place.arguments(image))
            assert (done.returncode, done.stdout, done.stderr) == (
                7,
                place.given_way(*place.arguments(image)),
                "",
            )
        for arguments in (["-h"], ["--", "x y", ""], ["-o", "ro", str(place.blobs / "1" / "ab"), "/t"]):
            done = place.run(*arguments)
            assert (done.returncode, done.stdout) == (7, place.given_way(*arguments))
    finally:
        agent.stop()
    assert agent.requests == []


@pytest.mark.parametrize(
    "reply",
    [
        b"STATUS=error\0MESSAGE=not trusted\0",
        b"",
        b"STATUS=ok\0",
        b"STATUS=okay\0",
        b"\xff" * 70_000,
    ],
    ids=["refused", "closed", "no descriptor", "not ok", "noise"],
)
def test_an_agent_without_a_mount(place: Place, reply: bytes) -> None:
    agent = Agent(place.socket, reply)
    try:
        done = place.run()
    finally:
        agent.stop()
    assert (done.returncode, done.stdout) == (7, place.given_way())
    assert done.stderr.count("\n") == 1
    # Closed without a word: this user has too many connections, and asks again while enroot waits.
    assert (len(agent.requests) > 1) if not reply else (len(agent.requests) == 1)


def test_a_descriptor_that_is_no_mount(place: Place) -> None:
    for count in (1, 2):
        agent = Agent(
            place.socket, _OK, lambda count=count: [os.open("/", os.O_RDONLY) for _ in range(count)]
        )
        try:
            done = place.run()
        finally:
            agent.stop()
            place.socket.unlink()
        assert (done.returncode, done.stdout) == (7, place.given_way())


def test_no_agent_and_a_dead_one(place: Place) -> None:
    done = place.run()
    assert (done.returncode, done.stdout) == (7, place.given_way())
    assert "No such file" in done.stderr
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_behind:
        left_behind.bind(str(place.socket))
    assert place.run().stdout == place.given_way()


def test_a_hung_agent(tmp_path: Path) -> None:
    place = Place(tmp_path, hurried=True)
    agent = Agent(place.socket, reply=None)
    before_s = time.monotonic()
    try:
        assert place.run().stdout == place.given_way()
        assert time.monotonic() - before_s < 5  # 0.2 s on an idle machine
    finally:
        agent.stop()


def test_the_environment_decides_nothing(place: Place, tmp_path: Path) -> None:
    """Nor does a Python of the user's come in by it."""
    evil = tmp_path / "evil"
    evil.mkdir()
    for name in ("select.py", "time.py", "ctypes.py", "sitecustomize.py"):
        (evil / name).write_text("print('evil')")
    env = {"PATH": place.path, "PYTHONPATH": str(evil), "BOOTSEER_AGENT_SOCKET": "/x", "PYTHONSTARTUP": "/x"}
    done = subprocess.run(
        [place.stand_in, *place.arguments()], env=env, cwd=evil, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (7, place.given_way())


def test_copies_of_it_and_broken_programs_are_passed_over(place: Place, tmp_path: Path) -> None:
    for name in ("copy", "link", "folder", "broken"):
        (tmp_path / name).mkdir()
    shutil.copy(place.stand_in, tmp_path / "copy" / "squashfuse")
    (tmp_path / "link" / "squashfuse").symlink_to(place.stand_in)
    (tmp_path / "folder" / "squashfuse").mkdir()
    (tmp_path / "broken" / "squashfuse").write_bytes(b"\x7fELF")
    (tmp_path / "broken" / "squashfuse").chmod(0o755)
    names = ("link", "copy", "folder", "broken")
    before = ":".join(str(tmp_path / name) for name in names)
    done = place.run("-h", path=f"{before}:{place.path}")
    assert (done.returncode, done.stdout) == (7, place.given_way("-h"))
    done = place.run("-h", path=before)
    assert done.returncode == 127
    assert "no other squashfuse" in done.stderr


@needs_root
@pytest.mark.fuse
@pytest.mark.skipif(shutil.which("squashfuse") is None, reason="needs squashfuse")
def test_the_real_one_starts_the_container(place: Place, mount: KernelMount, tmp_path: Path) -> None:
    """Without an agent; as root in a user namespace, for not every machine lets users open /dev/fuse."""
    image = place.blobs / "ab"
    shutil.copy(tmp_path / "image.sqsh", image)
    place.other.unlink()
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", _ENROOT + "kill $pid; wait $pid", "enroot", image, place.target],
        env={"PATH": place.path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[0] == "mounted", done.stderr
    assert done.stdout.splitlines()[2:] == ["the image's", "alive"]


def test_signals_are_as_they_were_for_the_real_one(place: Place) -> None:
    """Python ignores SIGPIPE, and what is ignored stays so in the next program."""
    place.other.write_text("#!/bin/sh\ngrep SigIgn /proc/self/status\n")
    ignored = int(place.run("-h").stdout.split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1))
