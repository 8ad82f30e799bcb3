"""Running a program of this project's for a user, who cannot enter the process: begun as root, ended as he.

    python -I -m bootseer_slurm.job.background.run_as_user '{"uid": …, "arguments": ["MODULE", …], …}'

The process becomes the user without executing anything: an exec would let his other processes trace it. It
can gain no rights any more. With `seen_at` it has a mount namespace of its own, where a mount is seen in the
place of a folder, as a job's steps see it. The folder must still be the one with this device and inode, and
no link may be in its path: the user opens it, and root mounts on what was opened.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from dataclasses import dataclass

import msgspec

from bootseer_slurm import mounts
from bootseer_slurm.identity import User, close_to_tracers, gain_no_rights
from bootseer_slurm.job.background.aws_profiles import hide_programs

_OPEN_TIMEOUT_S = 10.0  # a file server may not answer


@dataclass(frozen=True, slots=True)
class SeenAt:
    """A mount, by its descriptor, and the folder in whose place it is seen."""

    mount_fd: int
    device: int
    inode: int
    path: str


@dataclass(frozen=True, slots=True)
class Task:
    """The user, the module that is run with its arguments, and what it sees at another place."""

    user: User
    arguments: tuple[str, ...]
    seen_at: SeenAt | None = None

    def command(self) -> list[str]:
        """The command that runs it."""
        return [sys.executable, "-I", "-m", __name__, msgspec.json.encode(self).decode()]


def main(task: Task) -> None:
    """Become the user, and run the module. Raises OSError."""
    if task.seen_at is not None:
        _show(task.seen_at, task.user)
    gain_no_rights()
    task.user.become()
    close_to_tracers()
    hide_programs()
    sys.argv[1:] = task.arguments[1:]
    runpy.run_module(task.arguments[0], run_name="__main__", alter_sys=True)


def _show(seen: SeenAt, user: User) -> None:
    """Have the mount in the place of the folder, in a mount namespace of this process's own."""
    mounts.unshare_mount_namespace()
    folder = _opened_by(user, seen.path)
    status = os.fstat(folder)
    if (status.st_dev, status.st_ino) != (seen.device, seen.inode):
        sys.exit(f"bootseer: {seen.path}: is not any more what it was")
    mounts.move_mount(seen.mount_fd, folder)
    os.close(seen.mount_fd)
    os.close(folder)


def _opened_by(user: User, path: str) -> int:
    """The folder, as a process with the user's rights opens it. Ends this one when it cannot."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            user.become()
            socket.send_fds(there, [b"folder"], [_open_without_links(path)])
        except OSError as error:
            there.send(f"{error.strerror}"[:1000].encode())
        finally:
            os._exit(0)
    there.close()
    here.settimeout(_OPEN_TIMEOUT_S)
    try:
        said, fds, _, _ = socket.recv_fds(here, 1000, 1)
    except TimeoutError:
        said, fds = b"its file system does not answer", []
    here.close()
    if not fds:
        sys.exit(f"bootseer: {path}: {said.decode(errors='replace')}")
    return fds[0]


def _open_without_links(path: str) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open("/", flags)
    for name in path.strip("/").split("/"):
        inner = os.open(name, flags, dir_fd=folder)
        os.close(folder)
        folder = inner
    return folder


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Task))
