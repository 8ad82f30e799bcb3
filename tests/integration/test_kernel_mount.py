"""Images mounted by the kernel: real loop devices, real squashfs, idmapped for users that are not root."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.image.kernel_mount import KernelMount, MountFailed, probe

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="needs squashfs-tools"),
    pytest.mark.skipif(not Path("/dev/loop-control").exists(), reason="needs loop devices"),
]
_UID, _GID, _OTHER = 54321, 54322, 54323


def _loops_over(path: Path) -> list[str]:
    """Loop devices over files below path."""
    backing = (Path(entry, "loop", "backing_file") for entry in Path("/sys/block").glob("loop*"))
    found = []
    for file in backing:
        with contextlib.suppress(OSError):
            if file.read_text().startswith(str(path)):
                found.append(file.parts[3])
    return found


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder that other users can pass; no mount and no loop device is left in it."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp/") and folder.owner() == "root":
            folder.chmod(folder.stat().st_mode | 0o055)
    yield tmp_path
    for entry in mounts.mounts_below(tmp_path):
        mounts.unmount(entry.point)
    deadline_s = time.monotonic() + 10
    while _loops_over(tmp_path) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert _loops_over(tmp_path) == []


@pytest.fixture
def image(home: Path) -> Path:
    tree = home / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "private").write_bytes(b"only the owner's")
    (tree / "private").chmod(0o600)
    (tree / "large").write_bytes(os.urandom(3_000_000))
    os.mknod(tree / "null", 0o666 | 0o020000, os.makedev(1, 3))
    path = home / "image.sqsh"
    options = ["-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(["mksquashfs", tree, path, *options], check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture
def mount(home: Path, image: Path) -> Iterator[KernelMount]:
    (home / "images").mkdir(mode=0o700)
    instance = KernelMount.open_image(image, home / "images" / str(_UID) / "ab", uid=_UID, gid=_GID)
    yield instance
    instance.close()


def _in_user_namespace(
    code: str, *arguments: object, uid: int = _UID, gid: int = _GID, fds: tuple[int, ...] = ()
) -> str:
    """Run code as a user does in a container's namespaces: capable there, and mapped as he is."""
    command = ["unshare", "-Um", f"--map-user={uid}", f"--map-group={gid}", "--keep-caps"]
    # Not through an import: the user may not be able to read where the project lies.
    program = "import ctypes, os, subprocess, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    program += "move = lambda fd, path: libc.syscall(429, fd, b'', -100, os.fsencode(path), 4)\n"
    done = subprocess.run(
        [*command, "/usr/bin/python3", "-c", program + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        pass_fds=fds,
        user=uid,
        group=gid,
        extra_groups=[],
        timeout=60,
        cwd="/",
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def container(home: Path) -> Path:
    """Folders as enroot makes them, the user's."""
    for name in ("", "lower", "upper", "work"):
        (home / "overlay" / name).mkdir()
        os.chown(home / "overlay" / name, _UID, _GID)
    return home / "overlay"


def test_the_user_sees_his_own_files_and_writes_over_them(mount: KernelMount, container: Path) -> None:
    fd = mount.clone()
    try:
        output = _in_user_namespace(
            """
            fd, top = int(sys.argv[1]), sys.argv[2]
            print(move(fd, top + "/lower"))
            status = os.stat(top + "/lower/private")
            print(status.st_uid, status.st_gid, open(top + "/lower/private").read())
            options = f"lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work,xino=off"
            subprocess.run(["mount", "-t", "overlay", "overlay", top, "-o", options], check=True)
            with open(top + "/private", "a") as file:
                file.write(", and more")
            os.mkdir(top + "/d/new")
            os.remove(top + "/large")
            print(open(top + "/private").read(), os.stat(top + "/private").st_uid, sorted(os.listdir(top)))
            """,
            *(fd, container),
            fds=(fd,),
        )
    finally:
        os.close(fd)
    assert output.splitlines() == [
        "0",
        f"{_UID} {_GID} only the owner's",
        f"only the owner's, and more {_UID} ['d', 'null', 'private']",
    ]
    assert not mounts.is_mountpoint(container)
    assert (mount.folder / "private").read_bytes() == b"only the owner's"


def test_the_user_cannot_take_away_what_keeps_the_node_safe(mount: KernelMount, container: Path) -> None:
    """Nor from a copy of the mount; without the lock, nodev goes away in the user's own namespace."""
    fd = mount.clone()
    try:
        output = _in_user_namespace(
            """
            fd, top = int(sys.argv[1]), sys.argv[2]
            print(move(fd, top + "/lower"))
            subprocess.run(["mount", "--bind", top + "/lower", top + "/upper"], check=True)
            for path in (top + "/lower", top + "/upper"):
                for change in ("dev,ro,nosuid", "suid,ro,nodev", "rw,nosuid,nodev"):
                    done = subprocess.run(["mount", "-o", "remount,bind," + change, path], capture_output=True)
                    print(done.returncode)
                flags = os.statvfs(path).f_flag
                print(bool(flags & os.ST_RDONLY), bool(flags & os.ST_NOSUID), bool(flags & os.ST_NODEV))
                try:
                    open(path + "/null").close()
                    print("opened")
                except PermissionError:
                    print("nodev")
            """,
            *(fd, container),
            fds=(fd,),
        )
    finally:
        os.close(fd)
    assert output.splitlines() == ["0", *["32", "32", "32", "True True True", "nodev"] * 2]


def test_another_user_gets_nothing(mount: KernelMount, home: Path) -> None:
    """Not by path; and one who was given a clone by mistake would not be the owner of its files."""
    fd = mount.clone()
    target = home / "target"
    target.mkdir()
    os.chown(target, _OTHER, _OTHER)
    try:
        output = _in_user_namespace(
            """
            fd, folder, target = int(sys.argv[1]), sys.argv[2], sys.argv[3]
            for attempt in (lambda: os.listdir(folder), lambda: open(target + "/private")):
                try:
                    attempt()
                    print("seen")
                except PermissionError:
                    print("refused")
                move(fd, target)
            """,
            *(fd, mount.folder, target),
            uid=_OTHER,
            gid=_OTHER,
            fds=(fd,),
        )
    finally:
        os.close(fd)
    assert output.splitlines() == ["refused", "refused"]


def test_each_clone_is_its_own_and_outlives_the_mount(
    mount: KernelMount, image: Path, container: Path
) -> None:
    first, second = mount.clone(), mount.clone()
    mount.close()
    assert not mount.folder.exists()
    assert len(_loops_over(image)) == 1
    for fd in (first, second):
        code = "print(move(int(sys.argv[1]), sys.argv[2]), os.path.getsize(sys.argv[2] + '/large'))"
        assert _in_user_namespace(code, fd, container / "lower", fds=(fd,)) == "0 3000000"
        os.close(fd)
    with pytest.raises(BootseerError):
        mount.clone()
    mount.close()  # again, which does nothing


def test_an_agent_that_comes_again_reattaches_it(mount: KernelMount, home: Path, container: Path) -> None:
    reattached = KernelMount.reattach(mount.folder)
    assert reattached is not None
    fd = reattached.clone()
    code = "print(move(int(sys.argv[1]), sys.argv[2]), os.stat(sys.argv[2] + '/private').st_uid)"
    assert _in_user_namespace(code, fd, container / "lower", fds=(fd,)) == f"0 {_UID}"
    os.close(fd)
    reattached.close()
    assert KernelMount.reattach(mount.folder) is None
    assert KernelMount.reattach(home) is None


def test_a_damaged_image_is_not_mounted(image: Path, home: Path) -> None:
    folder = home / "mounts" / "x"
    whole = image.read_bytes()
    for content in (
        b"",
        b"hsqs" + bytes(5000),
        whole[:200_000],
        os.urandom(100_000),
        whole[:96] + bytes(len(whole) - 96),
    ):
        image.write_bytes(content)
        with pytest.raises(MountFailed, match=r"image\.sqsh"):
            KernelMount.open_image(image, folder, uid=_UID, gid=_GID)
        assert not folder.exists()
    with pytest.raises(MountFailed, match="No such file"):
        KernelMount.open_image(home / "missing", folder, uid=_UID, gid=_GID)
    image.write_bytes(whole)
    KernelMount.open_image(image, folder, uid=_UID, gid=_GID).close()


def test_an_image_whose_blocks_do_not_come(home: Path) -> None:
    """A server that dies in the middle: the process that mounts must not keep it from dying."""
    program = """
        import sys, threading
        from pathlib import Path
        from bootseer_slurm.fuse.mount import Mount
        from bootseer_slurm.fuse.server import Server
        from bootseer_slurm.image.kernel_mount import KernelMount

        class Hung:
            size_bytes, uid, gid, mtime_ns, patience_s = 1 << 20, 0, 0, 1, 900.0
            def ready(self, offset, size): return None
            def fetch(self, offset, size):
                print("asked", flush=True)
                threading.Event().wait()

        home = Path(sys.argv[1])
        server = Server(Mount.open(home / "blobs"), home / "state")
        server.start()
        image = server.add("0/image", Hung())
        try:
            KernelMount.open_image(image, home / "mounts" / "x", uid=1, gid=1, timeout_s=float(sys.argv[2]))
        except BaseException as error:
            print(error, flush=True)
        sys.stdin.read()
    """
    for timeout_s in ("0.5", "60"):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), home, timeout_s],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "asked\n"
        if timeout_s == "0.5":
            line = next(line for line in process.stdout if line != "asked\n")
            assert "did not come in time" in line
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL  # would hang if a thread of it waited for its own server
        process.communicate()
        assert mounts.mounts_at(home / "mounts" / "x") == []
        for entry in mounts.mounts_below(home):
            mounts.unmount(entry.point, force=True)
        deadline_s = time.monotonic() + 10
        while _loops_over(home) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert _loops_over(home) == []


def test_a_folder_in_use_is_refused(home: Path, image: Path) -> None:
    file = home / "file"
    file.touch()
    with pytest.raises(MountFailed) as raised:
        KernelMount.open_image(image, file / "below", uid=_UID, gid=_GID)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOTDIR


def test_the_probe_says_what_this_kernel_can_do(home: Path) -> None:
    before = _loops_over(Path("/"))
    rows = probe()
    assert [row[0] for row in rows][-1] == "attached by a user"
    assert all(ok for _, ok, _ in rows), rows
    deadline_s = time.monotonic() + 5
    while set(_loops_over(Path("/"))) - set(before) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not [entry for entry in mounts.mounts_below("/") if "bootseer-probe" in str(entry.point)]
