"""Reading users' event files as root, with the rights of the user whose they are.

A shared file system may squash root, and a folder that bears a user's number may be another's: read as its
owner, store/local.py refuses that one. So root never reads there itself: a forked process takes the owner's
uid, gid and groups for good, and sends what it reads through a pipe. It has lost its root before it touches
the store, and, having changed its uid, cannot be traced by the user's other processes. One that hangs is
killed.
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

from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.identity import User, close_to_tracers
from bootseer_slurm.report.access.frames import Frame, read_frames, write_all
from bootseer_slurm.report.gather.stored import MAX_TEXT, NO_UID, StoredEvents, user_folders
from bootseer_slurm.store import Store, open_store

_TIMEOUT_S = 60.0  # without a byte; a file system may be slow, and one that hangs holds up one user
_RUN_LIMIT_BYTES = 128 << 20  # of one run's files, which its user wrote; in memory they are six times that
_KILL_S = 5.0  # what is killed goes at once, but for one that waits for a dead server
_NOBODY = 65534

Produce = Callable[[Store], Iterator[Frame]]


def as_owner(
    uid: int,
    store_uri: str,
    produce: Produce,
    *,
    timeout_s: float = _TIMEOUT_S,
    limit_s: float = math.inf,
) -> Iterator[Frame]:
    """The frames that `produce` makes of the store, in a process with the rights of user `uid`. For root.

    timeout_s: how long to wait for the next byte; limit_s: in all, for a user can have a file system of his
    own, which has a byte now and then. Raises what `produce` raised, and StoreError when the
    process is killed or does not answer.
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
        with io.BufferedReader(_Pipe(reading, timeout_s, limit_s), 1 << 20) as pipe:
            yield from read_frames(pipe, limit_bytes=MAX_TEXT)
    finally:
        _end(pid)


def _end(pid: int) -> None:
    """Kill a child of ours. One that the kernel holds is left to whoever inherits it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _KILL_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline_s:
        time.sleep(0.001)


class OwnersEvents:
    """The EventStore for root: each user's files read with that user's rights."""

    def __init__(self, store_uri: str) -> None:
        self._uri = store_uri

    def users(self) -> list[int]:
        """The uids that have a folder. Raises StoreError."""

        def produce(store: Store) -> Iterator[Frame]:
            yield from (Frame({"uid": uid}, b"") for uid in user_folders(store))

        return [frame.header["uid"] for frame in as_owner(0, self._uri, produce)]

    def restarts(self, uid: int, job: int) -> list[int]:
        """The restart counts under which this user's job has events."""

        def produce(store: Store) -> Iterator[Frame]:
            yield from (Frame({"restart": each}, b"") for each in StoredEvents(store).restarts(uid, job))

        return [frame.header["restart"] for frame in as_owner(uid, self._uri, produce)]

    def event_files(self, uid: int, job: int, restart: int) -> Iterator[tuple[str, str]]:
        """(node, text of its file) for each node that sent events."""
        for frame in as_owner(uid, self._uri, lambda store: event_frames(store, uid, job, restart)):
            yield str(frame.header["node"]), frame.content.decode("utf-8", errors="replace")


def event_frames(store: Store, uid: int, job: int, restart: int) -> Iterator[Frame]:
    """Each node's file of one run; those beyond what a run may cost are not read."""
    left_bytes = _RUN_LIMIT_BYTES
    for node, text in StoredEvents(store).event_files(uid, job, restart):
        content = text.encode("utf-8", "replace")[:MAX_TEXT]
        left_bytes -= len(content)
        if left_bytes < 0:
            return
        yield Frame({"job": job, "restart": restart, "node": node}, content)


def _user(uid: int) -> User:
    try:
        return User.of(uid, pwd.getpwuid(uid).pw_gid)
    except KeyError:  # he is not known on this machine: the folder, which is his alone, asks for no group
        return User(uid, _NOBODY, ())


def _serve(user: User, store_uri: str, produce: Produce, writing: int) -> None:
    """Become the user and write the frames (the forked process)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(writing, 1)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if user.uid:
        user.become()
        close_to_tracers()  # it is a copy of root's process
        with contextlib.suppress(KeyError):  # where clients of stores look for the user's credentials
            os.environ["HOME"] = pwd.getpwuid(user.uid).pw_dir
    with os.fdopen(1, "wb", buffering=1 << 20) as pipe:
        write_all(pipe, lambda: _checked(store_uri, produce))
    os._exit(0)


def _checked(store_uri: str, produce: Produce) -> Iterator[Frame]:
    try:
        yield from produce(open_store(store_uri))
    except (OSError, BootseerError) as error:
        raise error if isinstance(error, BootseerError) else StoreError(str(error)) from error


class _Pipe(io.RawIOBase):
    """The reading end of a pipe whose writer must not be silent for long."""

    def __init__(self, fd: int, timeout_s: float, limit_s: float) -> None:
        self._fd = fd
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._deadline_s = time.monotonic() + limit_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wait_s = max(0.0, min(self._timeout_s, self._deadline_s - time.monotonic()))
        ready, _, _ = select.select([self._fd], [], [], wait_s)
        if time.monotonic() >= self._deadline_s:
            raise StoreError(f"not read to its end in {self._limit_s:.0f} s")
        if not ready:
            raise StoreError(f"no answer from the file system in {self._timeout_s:g} s")
        content = os.read(self._fd, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()
