"""A filter of system calls (seccomp(2)): a process that has it never runs another program, nor traces one.

It closes a whole class: what a library would run for a user (`credential_process` of an AWS profile, a
command in a file of settings) does not run in the agent's service. Such calls fail with EPERM. The filter
cannot be taken off, and children have it too. It asks for no_new_privs (identity.gain_no_rights).
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
# linux/bpf_common.h: load a word, jump when equal, jump when a bit is set, return
_LOAD, _IF_EQUAL, _IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
_X32_BIT = 0x40000000  # calls of the x32 ABI have numbers of their own
# linux/audit.h, and the numbers of execve, execveat, ptrace
_MACHINES = {"x86_64": (0xC000003E, (59, 322, 101)), "aarch64": (0xC00000B7, (221, 281, 117))}


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid_execution() -> bool:
    """Have this process, and what it forks, never execute a program; False where the kernel has no filters.

    To be called before threads begin.
    """
    if platform.machine() not in _MACHINES:
        return False
    architecture, numbers = _MACHINES[platform.machine()]
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
