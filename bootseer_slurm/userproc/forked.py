"""Reading a store with a user's rights for root, piece by piece: a forked process that becomes the user.

A shared file system may squash root, and a folder that bears a user's number may be another's: read as its
owner, store/local.py refuses that one. So root never reads there itself. The forked process takes the user's
uid, gid and groups for good before it touches the store, and sends what it reads through a pipe. Having
changed its uid, it cannot be traced by the user's other processes. One that hangs is killed. To fork costs a
thousandth of what a new interpreter costs, and the report asks for many users in a row.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pwd
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct

from bootseer_slurm.errors import BootseerError, IntegrityError, StoreError
from bootseer_slurm.identity import User, close_to_tracers, gain_no_rights
from bootseer_slurm.seccomp import forbid_execution
from bootseer_slurm.store import Store, open_store
from bootseer_slurm.userproc.frames import Frame, read_frames, write_all

NO_UID = (1 << 32) - 1  # to setresuid(2) it means: stay who you are
_KILL_S = 5.0  # what is killed goes at once, but for one that waits for a dead server
_NOBODY = 65534

# Pieces of a store: what each is, and its content.
Produce = Callable[[Store], Iterator[tuple[Struct, bytes]]]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a user's process is borne. silent_s: without a byte; a file system may be slow. total_s: in
    all, for a user can have a file system of his own, which has a byte now and then. content_bytes: a piece.
    """

    silent_s: float = 60.0
    total_s: float = math.inf
    content_bytes: int = 32 << 20


def read_as_user(
    uid: int, store_uri: str, produce: Produce, kind: Any, limits: Limits = Limits()
) -> Iterator[tuple[Any, bytes]]:
    """The pieces that `produce` makes of the store, in a process with the rights of user `uid`. For root.

    kind: the msgspec type that each piece has; one that has not raises IntegrityError. Raises what `produce`
    raised, and StoreError when the process is killed or does not answer.
    """
    if not 0 <= uid < NO_UID:
        raise StoreError(f"user {uid}: there is no such user")
    user = _user(uid)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _serve(user, store_uri, produce, writing)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        with io.BufferedReader(_Pipe(reading, limits), 1 << 20) as pipe:
            for frame in read_frames(pipe, limit_bytes=limits.content_bytes):
                yield _piece(frame, kind), frame.content
    finally:
        _end(pid)


def _piece(frame: Frame, kind: Any) -> Any:
    try:
        return msgspec.convert(frame.header, kind)
    except (msgspec.ValidationError, UnicodeError) as error:  # a lone surrogate where none can be
        raise IntegrityError(f"the user's process sent what cannot be: {error}") from error


def _end(pid: int) -> None:
    """Kill a child of ours. One that the kernel holds is left to whoever inherits it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _KILL_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline_s:
        time.sleep(0.001)


def _user(uid: int) -> User:
    try:
        return User.of(uid, pwd.getpwuid(uid).pw_gid)
    except KeyError:  # he is not known on this machine: the folder, which is his alone, asks for no group
        return User(uid, _NOBODY, ())


def _serve(user: User, store_uri: str, produce: Produce, writing: int) -> None:
    """Become the user and write the pieces (the forked process)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(writing, 1)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    gain_no_rights()
    if user.uid:
        user.become()
        close_to_tracers()  # it is a copy of root's process
        with contextlib.suppress(KeyError):  # where clients of stores look for the user's credentials
            os.environ["HOME"] = pwd.getpwuid(user.uid).pw_dir
    forbid_execution()
    with os.fdopen(1, "wb", buffering=1 << 20) as pipe:
        write_all(pipe, lambda: _frames(store_uri, produce))
    os._exit(0)


def _frames(store_uri: str, produce: Produce) -> Iterator[Frame]:
    try:
        for piece, content in produce(open_store(store_uri)):
            yield Frame(msgspec.to_builtins(piece), content)
    except (OSError, BootseerError) as error:
        raise error if isinstance(error, BootseerError) else StoreError(str(error)) from error


class _Pipe(io.RawIOBase):
    """The reading end of a pipe whose writer must not be silent for long."""

    def __init__(self, fd: int, limits: Limits) -> None:
        self._fd = fd
        self._limits = limits
        self._deadline_s = time.monotonic() + limits.total_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wait_s = max(0.0, min(self._limits.silent_s, self._deadline_s - time.monotonic()))
        ready, _, _ = select.select([self._fd], [], [], wait_s)
        if time.monotonic() >= self._deadline_s:
            raise StoreError(f"not read to its end in {self._limits.total_s:.0f} s")
        if not ready:
            raise StoreError(f"no answer from the file system in {self._limits.silent_s:g} s")
        content = os.read(self._fd, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()
