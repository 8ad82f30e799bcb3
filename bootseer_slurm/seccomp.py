"""Filters of system calls (seccomp(2)): what a process, and all that it begins, never calls again.

*Nothing executed* closes a whole class: what a library would run for a user (`credential_process` of an AWS
profile, a command in a file of settings) does not run in the agent's service. *Nothing but files* is for a
program that reads hostile bytes, should these take it over:

    python -I -m bootseer_slurm.seccomp COMMAND…

Such calls fail with EPERM. A filter cannot be taken off. It asks for no_new_privs
(identity.gain_no_rights), or root's rights.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Sequence

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
# linux/bpf_common.h: load a word, jump when equal, jump when a bit is set, return
_LOAD, _IF_EQUAL, _IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
_X32_BIT = 0x40000000  # calls of the x32 ABI have numbers of their own
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
# execve, execveat, ptrace
_EXECUTION = {"x86_64": (59, 322, 101), "aarch64": (221, 281, 117)}
# socket, ptrace, process_vm_readv, process_vm_writev, unshare, setns, mount, bpf, perf_event_open, add_key,
# request_key, keyctl, userfaultfd, io_uring_setup, pidfd_getfd
_ALL_BUT_FILES = {
    "x86_64": (41, 101, 310, 311, 272, 308, 165, 321, 298, 248, 249, 250, 323, 425, 438),
    "aarch64": (198, 117, 270, 271, 97, 268, 40, 280, 241, 217, 218, 219, 282, 425, 438),
}


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid_execution() -> bool:
    """Have this process, and what it forks, never execute a program; False where the kernel has no filters.

    To be called before threads begin.
    """
    return _forbid(_EXECUTION.get(platform.machine(), ()))


def with_files_only(command: Sequence[str]) -> list[str]:
    """The command that runs this one without network, namespaces, keys, or a look into other processes."""
    return [sys.executable, "-I", "-m", __name__, *command]


def main(command: list[str]) -> None:
    """Become the command. Where the kernel has no filters it runs without. For root. Raises OSError."""
    _forbid(_ALL_BUT_FILES.get(platform.machine(), ()))
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python
        signal.signal(ignored, signal.SIG_DFL)
    os.execvp(command[0], command)


def _forbid(numbers: Sequence[int]) -> bool:
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return False
    refuse = _ERRNO | errno.EPERM
    rules = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, refuse),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_SET, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, refuse),
    ]
    for number in numbers:
        rules += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse)]
    rules.append((_RETURN, 0, 0, _ALLOW))
    content = b"".join(struct.pack("=HBBI", *rule) for rule in rules)
    program = _Program(len(rules), content)
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


if __name__ == "__main__":
    main(sys.argv[1:])
