"""`bootseer answer`: the service that root runs for people who want to see other people's starts.

A user's own events lie in the store, open to him, and the service adds nothing to his rights there. The
records of `bootseer collect` are root's: through the socket a user gets those of his own starts. Root and
Slurm's Operators and Administrators get all, and also the events of others' jobs, read with their owners'
rights. The asker is known from the socket (SO_PEERCRED), never from the request.

systemd listens, and starts one process for each connection, with the socket as its stdin (Accept=yes). It
reads requests (access/protocol.py), answers in frames, and ends after `_LIMIT_S` at the latest. Who has
`_MOST_OF_USER` connections is refused at once. They are counted by locks in systemd's RUNTIME_DIRECTORY:

    <folder>/<uid>.<number>    empty, locked while a process answers this user, never removed
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import signal
import socket
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, cast

from bootseer_slurm.agentapi.protocol import peer
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.report.access import protocol
from bootseer_slurm.report.access.owners import OwnersEvents
from bootseer_slurm.report.access.protocol import RecordsRequest, RestartsRequest, UsersRequest
from bootseer_slurm.report.records.archive import Archive
from bootseer_slurm.slurm.sacctmgr import is_operator
from bootseer_slurm.userproc.frames import Frame, write_all

_LIMIT_S = 120
_REFUSAL_S = 1.0  # for a request that is refused
_MOST_OF_USER = 16  # as MaxConnectionsPerSource, which not every systemd counts for Unix sockets


def answer(link: socket.socket, config: Config) -> None:
    """Answer the requests of a connection until it ends. Raises OSError when the client goes away."""
    signal.alarm(_LIMIT_S)  # the default action ends the process
    _, uid, _ = peer(link)
    is_counted = _take_share(uid)
    sees_all = is_counted and _sees_all(uid)
    with (
        link.makefile("rb") as reading,
        link.makefile("wb", buffering=protocol.BUFFER_BYTES) as writing,
    ):
        link.settimeout(protocol.TIMEOUT_S if is_counted else _REFUSAL_S)
        if not is_counted:
            reading.readline(protocol.LINE_LIMIT_BYTES)  # else the kernel takes the refusal back with it
            write_all(cast(BinaryIO, writing), _refuse)
            return
        while line := reading.readline(protocol.LINE_LIMIT_BYTES):
            frames = partial(_answer, line, None if sees_all else uid, config)
            write_all(cast(BinaryIO, writing), frames)
            if not line.endswith(b"\n"):
                break  # too long, or the last


def _refuse() -> Iterator[Frame]:
    raise InputError(f"you have {_MOST_OF_USER} connections already")


def _take_share(uid: int) -> bool:
    """Count this process among those that answer a user, until it ends; False when they are too many.

    Root is not counted.
    """
    folder = os.environ.get("RUNTIME_DIRECTORY")
    if not folder or not uid:
        return True
    for number in range(_MOST_OF_USER):
        fd = os.open(f"{folder}/{uid}.{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True  # it stays open
        os.close(fd)
    return False


def _answer(line: bytes, only_uid: int | None, config: Config) -> Iterator[Frame]:
    """The answer to one request of somebody who may see all, or the starts of one user."""
    request = protocol.parse_line(line)
    if isinstance(request, RecordsRequest):
        yield from _records(Archive(config.records.path), request.since_ms, only_uid)
        return
    if only_uid is not None:
        raise InputError("other users' jobs are for Slurm's operators to see")
    events = OwnersEvents(config.store.uri)
    if isinstance(request, UsersRequest):
        yield from (Frame({"uid": uid}, b"") for uid in events.users())
    elif isinstance(request, RestartsRequest):
        yield from (Frame({"restart": each}, b"") for each in events.restarts(request.uid, request.job))
    else:
        for node, text in events.event_files(request.uid, request.job, request.restart):
            yield Frame({"node": node}, text.encode("utf-8", "replace"))


def _sees_all(uid: int) -> bool:
    if uid == 0:
        return True
    try:
        return is_operator(pwd.getpwuid(uid).pw_name)
    except (KeyError, BootseerError):  # without accounting nobody but root is known to be one
        return False


def _records(archive: Archive, since_ms: int, uid: int | None) -> Iterator[Frame]:
    for path in archive.files(since_ms=since_ms, uid=uid):
        with contextlib.suppress(FileNotFoundError):  # collect has just replaced it
            yield Frame({}, path.read_bytes())
