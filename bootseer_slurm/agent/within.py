"""Running a command of a user's where a mount is seen in the place of a folder, as a job's steps see it.

    python -I -m bootseer_slurm.agent.within <mount fd> <path> <uid> <gid> <group,…> <command> …

In a mount namespace of its own, begun as root, ended as the user. It can gain no rights any more: else a
set-user-id program could be shown a folder of the user's in the place of the system's.
"""

from __future__ import annotations

import ctypes
import os
import sys

from bootseer_slurm import mounts

_PR_SET_NO_NEW_PRIVS = 38


def main(mount_fd: int, path: str, uid: int, gid: int, groups: list[int], command: list[str]) -> None:
    """Become the command. Raises OSError."""
    mounts.unshare_mount_namespace()
    mounts.move_mount(mount_fd, path)
    os.close(mount_fd)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    os.execv(command[0], command)


if __name__ == "__main__":
    _fd, _path, _uid, _gid, _groups, *_command = sys.argv[1:]
    main(int(_fd), _path, int(_uid), int(_gid), [int(each) for each in _groups.split(",") if each], _command)
