"""Mounts by descriptor, in real mount namespaces."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm import mounts

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of our own, at a path that mountinfo has to escape."""
    point = tmp_path / "a b\\c\td"
    point.mkdir()
    mounts.mount("bootseer-test", point, "tmpfs", mounts.MS_NOSUID, "size=1m")
    yield point
    while mounts.is_mountpoint(point):
        mounts.unmount(point)


def _in_namespace(code: str, *arguments: object, fds: tuple[int, ...] = ()) -> str:
    """Run code in a child with a mount namespace of its own; return what it printed."""
    program = "import os, sys\nfrom bootseer_slurm import mounts\nmounts.unshare_mount_namespace()\n"
    done = subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        pass_fds=fds,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_mountinfo_is_unescaped(tmpfs: Path) -> None:
    assert mounts.is_mountpoint(tmpfs)
    assert not mounts.is_mountpoint(tmpfs.parent)
    (entry,) = mounts.mounts_below(tmpfs.parent)
    assert (entry.point, entry.fstype, entry.source, entry.root) == (tmpfs, "tmpfs", "bootseer-test", "/")
    device = tmpfs.stat().st_dev
    assert entry.device == f"{os.major(device)}:{os.minor(device)}"
    mounts.unmount(tmpfs)
    assert mounts.mounts_below(tmpfs.parent) == []


def test_what_is_on_top_comes_last(tmpfs: Path) -> None:
    mounts.mount("on-top", tmpfs, "tmpfs", 0)
    assert [entry.source for entry in mounts.mounts_at(tmpfs)] == ["bootseer-test", "on-top"]
    mounts.unmount(tmpfs, detach=False)
    assert [entry.source for entry in mounts.mounts_at(tmpfs)] == ["bootseer-test"]


def test_a_file_is_shown_in_a_private_namespace_only(tmpfs: Path) -> None:
    source, target = tmpfs / "blob", tmpfs.parent / "train.sqsh"
    source.write_bytes(b"blob")
    target.write_bytes(b"original")
    fd = mounts.bind_clone(source)
    try:
        output = _in_namespace(
            """
            fd, target, source = int(sys.argv[1]), sys.argv[2], sys.argv[3]
            mounts.move_mount(fd, target)
            print(open(target).read(), mounts.is_mountpoint(target))
            print(os.stat(target).st_ino == os.stat(source).st_ino)
            flags = os.statvfs(target).f_flag
            print(bool(flags & os.ST_RDONLY), bool(flags & os.ST_NOSUID), bool(flags & os.ST_NODEV))
            writes = [lambda: open(target, "r+"), lambda: os.chmod(target, 0), lambda: os.truncate(target, 0)]
            for what in writes:
                try:
                    what()
                    print("written")
                except OSError as error:
                    print(error.strerror)
            """,
            *(fd, target, source),
            fds=(fd,),
        )
    finally:
        os.close(fd)
    assert output.split("\n") == ["blob True", "True", "True True True", *["Read-only file system"] * 3]
    assert target.read_bytes() == b"original"
    assert not mounts.is_mountpoint(target)
    source.write_bytes(b"the source itself is still writable")


def test_a_folder_and_chosen_attributes(tmpfs: Path) -> None:
    (tmpfs / "file").write_bytes(b"1")
    fd = mounts.open_tree_clone(tmpfs)
    try:
        mounts.set_attributes(fd, read_only=False, nosuid=True, nodev=False)
        output = _in_namespace(
            """
            mounts.move_mount(int(sys.argv[1]), sys.argv[2])
            open(sys.argv[2] + "/file", "w").write("2")
            print(bool(os.statvfs(sys.argv[2]).f_flag & os.ST_NODEV))
            """,
            *(fd, tmpfs.parent),
            fds=(fd,),
        )
    finally:
        os.close(fd)
    assert output == "False"
    assert (tmpfs / "file").read_bytes() == b"2"


def test_a_detached_mount_ends_with_its_descriptor(tmpfs: Path) -> None:
    fd = mounts.open_tree_clone(tmpfs)
    with pytest.raises(OSError) as raised:
        mounts.unmount(tmpfs / "missing")
    assert raised.value.errno == errno.ENOENT
    mounts.unmount(tmpfs, detach=False)
    assert list(Path(f"/proc/self/fd/{fd}").iterdir()) == []
    os.close(fd)


def test_errors_name_the_path(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    file = tmp_path / "file"
    file.touch()
    fd = os.open(file, os.O_RDONLY)
    try:
        attempts = [
            (lambda: mounts.bind_clone(missing), errno.ENOENT),
            (lambda: mounts.open_tree_clone(missing), errno.ENOENT),
            (lambda: mounts.mount("x", missing, "tmpfs", 0), errno.ENOENT),
            (lambda: mounts.mount("x", tmp_path, "no-such-type", 0), errno.ENODEV),
            (lambda: mounts.unmount(tmp_path), errno.EINVAL),
            (lambda: mounts.set_attributes(fd), errno.EINVAL),
            (lambda: mounts.move_mount(fd, missing), errno.ENOENT),
        ]
        for attempt, number in attempts:
            with pytest.raises(OSError) as raised:
                attempt()
            assert raised.value.errno == number
            assert raised.value.strerror == os.strerror(number)
            assert raised.value.filename
    finally:
        os.close(fd)


def test_a_symbolic_link_is_not_followed_by_unmount(tmpfs: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmpfs)
    with pytest.raises(OSError):
        mounts.unmount(link)
    assert mounts.is_mountpoint(tmpfs)


def test_owners_are_mapped_for_one_user(tmpfs: Path) -> None:
    """On a tmpfs, as its driver knows it for long: root's file is the user's, another's is nobody's."""
    for name, owner in (("root", 0), ("other", 1000)):
        (tmpfs / name).touch()
        os.chown(tmpfs / name, owner, owner)
    fd = mounts.open_tree_clone(tmpfs)
    namespace = mounts.map_root_to(54321, 54322)
    try:
        mounts.set_attributes(fd, user_namespace=namespace)
        output = _in_namespace(
            """
            mounts.move_mount(int(sys.argv[1]), sys.argv[2])
            for name in ("root", "other"):
                status = os.stat(sys.argv[2] + "/" + name)
                print(status.st_uid, status.st_gid)
            """,
            *(fd, tmpfs.parent),
            fds=(fd,),
        )
        with pytest.raises(OSError):  # once only
            mounts.set_attributes(fd, user_namespace=namespace)
    finally:
        os.close(fd)
        os.close(namespace)
    assert output.split("\n") == ["54321 54322", "65534 65534"]
    assert (tmpfs / "root").stat().st_uid == 0


def test_no_process_is_left_of_a_mapping() -> None:
    before = len(os.listdir("/proc/self/fd"))
    os.close(mounts.map_root_to(54321, 54321))
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_mapping_ends_though_another_child_has_the_end_of_its_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that fork at the same moment: each child waited for the other one's end."""
    pipe, kept = os.pipe, []

    def shared_pipe() -> tuple[int, int]:
        reading, writing = pipe()
        kept.append(os.dup(writing))  # as the other child has it
        return reading, writing

    monkeypatch.setattr(os, "pipe", shared_pipe)
    mapping = threading.Thread(target=lambda: os.close(mounts.map_root_to(54321, 54321)), daemon=True)
    mapping.start()
    mapping.join(20)
    is_stuck = mapping.is_alive()
    for fd in kept:
        os.close(fd)
    assert not is_stuck


def test_attributes_are_locked_in_a_user_namespace_and_in_what_is_cloned_there(tmpfs: Path) -> None:
    fd = mounts.bind_clone(tmpfs)
    try:
        output = _in_namespace(
            """
            target = sys.argv[2]
            mounts.move_mount(int(sys.argv[1]), target)
            def remount():
                try:
                    mounts.mount(None, target, None, mounts.MS_BIND | 32 | mounts.MS_RDONLY | mounts.MS_NOSUID)
                    return "changed"
                except OSError as error:
                    return error.strerror
            print(remount())
            mounts.mount(None, target, None, mounts.MS_BIND | 32 | 7)
            mounts.unshare_user_namespace()
            print(remount())
            clone = mounts.open_tree_clone(target)
            mounts.move_mount(clone, target)
            print(remount(), len(mounts.mounts_at(target)))
            """,
            *(fd, tmpfs.parent),
            fds=(fd,),
        )
    finally:
        os.close(fd)
    assert output.split("\n") == ["changed", "Operation not permitted", "Operation not permitted 2"]


def test_what_is_mounted_in_a_namespace_is_seen_there_only(tmp_path: Path) -> None:
    private, here = mounts.Namespace.create(), os.getcwd()
    point, copy = tmp_path / "point", tmp_path / "copy"
    point.mkdir()
    copy.mkdir()
    try:
        private.run(lambda: mounts.mount("tmpfs", point, "tmpfs", 0))
        private.run((point / "file").touch)
        assert private.run(lambda: mounts.is_mountpoint(point)) and private.run((point / "file").exists)
        assert not mounts.is_mountpoint(point) and not (point / "file").exists()
        assert os.getcwd() == here
        with pytest.raises(FileNotFoundError, match="nothing"):
            private.run(lambda: mounts.unmount(tmp_path / "nothing"))
        fd = private.run(lambda: mounts.bind_clone(point))
    finally:
        private.close()
    assert os.listdir(f"/proc/self/fd/{fd}") == ["file"], "a copy outlives the namespace"
    os.close(fd)
