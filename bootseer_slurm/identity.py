"""Becoming a user: the one place where a process of root's takes a user's rights, for good.

`out_of_reach` and `without_rights` are for what is begun with `subprocess`. All else changes the whole
process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

# When the node's memory is full, users' processes go first, and the agent last (conf/systemd).
_OOM_SCORE_ADJUST = "500"
_SET_SCORE = f"{{ echo {_OOM_SCORE_ADJUST} > /proc/self/oom_score_adj; }} 2>&-"  # a container may forbid it
# The beginning of a command that runs as a user.
KILLED_FIRST = ("sh", "-c", f'{_SET_SCORE}; exec "$@"', "sh")
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_NOBODYS_UID = 61875  # behind those of image.packer, between Linux's own ranges


@dataclass(frozen=True, slots=True)
class User:
    """Whose rights a process has."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def of(cls, uid: int, gid: int) -> User:
        """A user with the groups that this node knows of him."""
        try:
            groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        except KeyError:
            groups = [gid]
        return cls(uid, gid, tuple(groups))

    def become(self) -> None:
        """Take this user's ids and groups, all of them. For root. Raises OSError."""
        with contextlib.suppress(OSError):  # a container may forbid it
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJUST)
        os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)


def out_of_reach(user: User) -> list[str]:
    """The beginning of a command that opens files as this user, and that his other processes cannot trace.

    Its real user is one that nobody is: to trace it all its ids must be one's own (ptrace(2)).
    """
    groups = f"--groups={','.join(map(str, user.groups))}" if user.groups else "--clear-groups"
    ids = (f"--ruid={_NOBODYS_UID}", f"--euid={user.uid}", f"--regid={user.gid}")
    return [
        *KILLED_FIRST,
        "setpriv",
        *ids,
        groups,
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--",
    ]


def without_rights(uid: int) -> list[str]:
    """The beginning of a command that runs as this user and group, without any right nor a way to get one."""
    rights = ("--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")
    return [*KILLED_FIRST, "setpriv", f"--reuid={uid}", f"--regid={uid}", *rights, "--"]


def close_to_tracers() -> None:
    """Have the user's other processes not trace this one, nor open its files in /proc.

    They could without: an exec makes a process dumpable, and a change of rights does where the site wants
    core dumps of such processes (fs.suid_dumpable). To be called after `become`.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def gain_no_rights() -> None:
    """Have no set-user-id program give this process more rights, nor what it executes. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
