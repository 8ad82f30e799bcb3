"""Mounts: the few system calls around them that Python does not offer.

Owns: mount(2), umount2(2), unshare(2), setns(2), the descriptor-based calls open_tree(2), mount_setattr(2)
and move_mount(2), statx(2), the user namespaces that idmapped mounts are made with, and the reading of a
thread's mountinfo. Does not own: what is mounted where, and when; the callers decide that.

A *detached* mount is one that hangs in no mount namespace: only the descriptor holds it. It can be sent to
another process (SCM_RIGHTS) and attached there, in that process's namespace, and it goes away with its last
descriptor.

Threads and processes: no state, safe from any thread. `unshare_mount_namespace` changes the calling thread
only, and a `Namespace` works in threads of its own; `map_root_to` forks, and `unshare_user_namespace` changes
the process: both are for processes of one thread. Every failure is an OSError with the kernel's errno, its
text and the path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

# linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
_MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOVE_MOUNT_T_EMPTY_PATH = 0x00000040
_MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_NOSUID = 2
_MOUNT_ATTR_NODEV = 4
_MOUNT_ATTR_IDMAP = 1 << 20
# linux/fcntl.h, linux/sched.h
_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_UID = 8
_CLONE_FS = 0x200
_CLONE_NEWNS = 0x20000
_CLONE_NEWUSER = 0x10000000
# asm-generic/unistd.h: calls this young have one number on x86_64 and aarch64
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442

_LIBC = ctypes.CDLL(None, use_errno=True)

_Result = TypeVar("_Result")


class _MountAttr(ctypes.Structure):
    """struct mount_attr of linux/mount.h."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _Statx(ctypes.Structure):
    """The parts of struct statx of linux/stat.h that are wanted here."""

    _fields_ = (
        ("_until_uid", ctypes.c_uint32 * 5),
        ("uid", ctypes.c_uint32),
        ("_until_device", ctypes.c_uint32 * 28),
        ("device_major", ctypes.c_uint32),
        ("device_minor", ctypes.c_uint32),
        ("_spare", ctypes.c_uint64 * 14),
    )


class Owner(NamedTuple):
    """The owner of a file, and the device of the file system that says so."""

    uid: int
    device: int


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of a mountinfo (proc_pid_mountinfo(5))."""

    mount_id: int
    device: str  # "major:minor", also the name under /sys/class/bdi
    root: str  # which part of the file system is seen here
    point: Path
    fstype: str
    source: str


def _check(result: int, path: Path | str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return result


def _syscall(path: Path | str, number: int, *arguments: object) -> int:
    return _check(_LIBC.syscall(ctypes.c_long(number), *arguments), path)


def mount(
    source: str | None, target: Path | str, fstype: str | None, flags: int, data: str | None = None
) -> None:
    """Mount a file system, or change a mount, as mount(2) does; flags are the MS_* of this module."""
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, fstype, data)]
    _check(_LIBC.mount(*arguments[:3], ctypes.c_ulong(flags), arguments[3]), target)


def unmount(path: Path | str, *, detach: bool = True, force: bool = False) -> None:
    """Unmount what is on top at path (umount2(2)); a symbolic link is not followed.

    detach: take it out of the tree at once, and let it end when it is no longer in use.
    force: for FUSE, also break the connection to its server: what waits for it gets an error.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0) | (_MNT_FORCE if force else 0)
    _check(_LIBC.umount2(os.fsencode(path), flags), path)


def open_tree_clone(path: Path | str) -> int:
    """Return a new detached mount that shows path, a file or folder (open_tree(2), Linux 5.2).

    Mounts beneath a folder are not taken along; a symbolic link is not followed. The caller closes it.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_SYMLINK_NOFOLLOW
    return _syscall(path, _SYS_OPEN_TREE, ctypes.c_int(_AT_FDCWD), os.fsencode(path), ctypes.c_uint(flags))


def set_attributes(
    fd: int,
    *,
    read_only: bool = True,
    nosuid: bool = True,
    nodev: bool = True,
    user_namespace: int | None = None,
) -> None:
    """Set attributes of the mount that fd stands for, and make it private (mount_setattr(2), Linux 5.12).

    Private, so that what someone mounts on it later never travels to the tree it was cloned from.
    user_namespace: show the files' owners as this namespace maps them; the mount must be detached, and may
    be mapped once only. EINVAL where the file system's driver cannot (squashfs: before Linux 6.2).
    """
    wanted = (
        (_MOUNT_ATTR_RDONLY if read_only else 0)
        | (_MOUNT_ATTR_NOSUID if nosuid else 0)
        | (_MOUNT_ATTR_NODEV if nodev else 0)
        | (_MOUNT_ATTR_IDMAP if user_namespace is not None else 0)
    )
    attributes = _MountAttr(attr_set=wanted, propagation=MS_PRIVATE, userns_fd=user_namespace or 0)
    _syscall(
        f"/proc/self/fd/{fd}",
        _SYS_MOUNT_SETATTR,
        ctypes.c_int(fd),
        b"",
        ctypes.c_uint(_AT_EMPTY_PATH),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def bind_clone(path: Path | str, *, read_only: bool = True) -> int:
    """Return the descriptor of a detached mount of path that is read-only, nosuid, nodev and private."""
    fd = open_tree_clone(path)
    try:
        set_attributes(fd, read_only=read_only)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return fd


def move_mount(fd: int, target: Path | str | int) -> None:
    """Attach the detached mount fd at target, in the caller's mount namespace (move_mount(2), Linux 5.2).

    target: a path, or the descriptor of what is to be mounted on.
    """
    to_fd, to_path = (target, "") if isinstance(target, int) else (_AT_FDCWD, target)
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (_MOVE_MOUNT_T_EMPTY_PATH if isinstance(target, int) else 0)
    _syscall(
        f"/proc/self/fd/{target}" if isinstance(target, int) else target,
        _SYS_MOVE_MOUNT,
        ctypes.c_int(fd),
        b"",
        ctypes.c_int(to_fd),
        os.fsencode(to_path),
        ctypes.c_uint(flags),
    )


def unshare_mount_namespace() -> None:
    """Give the calling thread a mount namespace of its own, in which nothing it mounts is seen outside.

    Later mounts and unmounts of the host still arrive (unshare(2); MS_SLAVE: mount_namespaces(7)).
    """
    _check(_LIBC.unshare(ctypes.c_int(_CLONE_NEWNS)), "/")
    mount(None, "/", None, MS_REC | MS_SLAVE)


class Namespace:
    """A mount namespace that no process needs to be in: its descriptor, and what inherits that, keep it."""

    def __init__(self, fd: int) -> None:
        """Takes the descriptor of a mount namespace."""
        self.fd = fd

    @classmethod
    def create(cls) -> Namespace:
        """A copy of this process's; what is mounted in it is not seen outside. Raises OSError."""

        def make() -> int:
            unshare_mount_namespace()
            return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

        return cls(_in_thread(make))

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Call a function in a thread of its own that is in the namespace; gives what it gives, or raises.

        Descriptors are the process's. A process that the function began would keep the namespace.
        """

        def enter() -> _Result:
            _check(_LIBC.unshare(ctypes.c_int(_CLONE_FS)), "/")  # setns(2) wants it
            _check(_LIBC.setns(ctypes.c_int(self.fd), ctypes.c_int(_CLONE_NEWNS)), "/proc/self/ns/mnt")
            return function()

        return _in_thread(enter)

    def close(self) -> None:
        os.close(self.fd)


def _in_thread(function: Callable[[], _Result]) -> _Result:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def unshare_user_namespace() -> None:
    """Give this process, of one thread, a user namespace, and a mount namespace that belongs to it.

    The tree of mounts that it sees there is a copy whose attributes read-only, nosuid and nodev are locked:
    nobody can take them away, nor from the mounts that are cloned from it (user_namespaces(7)).
    """
    _check(_LIBC.unshare(ctypes.c_int(_CLONE_NEWUSER | _CLONE_NEWNS)), "/")


def map_root_to(uid: int, gid: int) -> int:
    """Return the descriptor of a user namespace in which 0 is this user and this group, and no other id is.

    For `set_attributes`. Forks; needs CAP_SETUID and CAP_SETGID. The caller closes it.
    """
    ready_read, ready_write = os.pipe()
    leave_read, leave_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(leave_write)
            _check(_LIBC.unshare(ctypes.c_int(_CLONE_NEWUSER)), "/proc/self/ns/user")
            os.write(ready_write, b"1")
            os.read(leave_read, 1)  # until the parent closes its end
        finally:
            os._exit(0)
    os.close(ready_write)
    try:
        if not os.read(ready_read, 1):
            raise OSError(errno.EPERM, "a user namespace cannot be made", "/proc/self/ns/user")
        for name, number in (("uid_map", uid), ("gid_map", gid)):
            Path(f"/proc/{child}/{name}").write_text(f"0 {number} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for fd in (ready_read, leave_read, leave_write):
            os.close(fd)
        # Killed: the end of its pipe does not come while another child, forked at this moment, has it too.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def owner_of(fd: int) -> Owner:
    """The owner of an open file, as the kernel knows it: its file system is not asked, and cannot hang.

    (statx(2) with AT_STATX_DONT_SYNC, which Python lacks.)
    """
    found = _Statx()
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    _check(
        _LIBC.statx(
            ctypes.c_int(fd), b"", ctypes.c_int(flags), ctypes.c_uint(_STATX_UID), ctypes.byref(found)
        ),
        f"/proc/self/fd/{fd}",
    )
    return Owner(found.uid, os.makedev(found.device_major, found.device_minor))


def _unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _parse(line: str) -> Mount:
    head, _, tail = line.partition(" - ")
    mount_id, _parent, device, root, point = head.split(" ")[:5]
    fstype, source = tail.split(" ")[:2]
    return Mount(int(mount_id), device, _unescape(root), Path(_unescape(point)), fstype, _unescape(source))


def mounts_below(path: Path | str) -> list[Mount]:
    """Return the mounts at path and beneath it, what is on top last (proc_pid_mountinfo(5)).

    path is taken as it is written: absolute, without symbolic links. As the calling thread sees them.
    """
    lines = Path("/proc/thread-self/mountinfo").read_bytes().decode(errors="surrogateescape").splitlines()
    return [entry for entry in map(_parse, lines) if entry.point.is_relative_to(path)]


def mounts_at(path: Path | str) -> list[Mount]:
    """Return the mounts exactly at path, the one on top last; unlike os.path.ismount it never asks them."""
    return [entry for entry in mounts_below(path) if entry.point == Path(path)]


def mount_of(path: Path | str) -> Mount:
    """The mount that shows path. Raises OSError when there is no such path."""
    real = Path(path).resolve(strict=True)
    over = [entry for entry in mounts_below("/") if real.is_relative_to(entry.point)]
    return max(enumerate(over), key=lambda pair: (len(pair[1].point.parts), pair[0]))[1]


def is_mountpoint(path: Path | str) -> bool:
    """Tell whether something is mounted exactly at path."""
    return bool(mounts_at(path))
