"""Running a command of a user's where a mount is seen in the place of a folder, as a job's steps see it.

    python -I -m bootseer_slurm.job.run_in_mount_ns \\
        <mount> <device> <inode> <path> <uid> <gid> <groups> <command>…

In a mount namespace of its own, begun as root, ended as the user. The folder must still be the one with this
device and inode, and no link may be in its path: the user opens it, and root mounts on what was opened. The
command can gain no rights any more: else a set-user-id program could be shown a folder of the user's in the
place of the system's.
"""

from __future__ import annotations

import os
import socket
import sys

from bootseer_slurm import mounts
from bootseer_slurm.identity import User, gain_no_rights

_OPEN_TIMEOUT_S = 10.0  # a file server may not answer


def main(mount_fd: int, identity: tuple[int, int], path: str, user: User, command: list[str]) -> None:
    """Become the command. Raises OSError."""
    mounts.unshare_mount_namespace()
    folder = _opened_by(user, path)
    status = os.fstat(folder)
    if (status.st_dev, status.st_ino) != identity:
        sys.exit(f"bootseer: {path}: is not any more what it was")
    mounts.move_mount(mount_fd, folder)
    os.close(mount_fd)
    os.close(folder)
    gain_no_rights()
    user.become()
    os.execv(command[0], command)


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
    _fd, _device, _inode, _path, _uid, _gid, _groups, *_command = sys.argv[1:]
    _as = User(int(_uid), int(_gid), tuple(int(each) for each in _groups.split(",") if each))
    main(int(_fd), (int(_device), int(_inode)), _path, _as, _command)
