"""`bootseer answer`: the service that root runs for people who want to see other people's starts.

A user's own events lie in the store, open to him, and the service adds nothing to his rights there. The
records of `bootseer collect` are root's: through the socket a user gets those of his own starts. Root and
Slurm's Operators and Administrators get all, and also the events of others' jobs, read with their owners'
rights. The asker is known from the socket (SO_PEERCRED), never from the request.

systemd listens, and starts one process for each connection, with the socket as its stdin (Accept=yes). It
reads requests (access/protocol.py), answers in frames, and ends after `_LIMIT_S` at the latest.
"""

from __future__ import annotations

import contextlib
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


def answer(link: socket.socket, config: Config) -> None:
    """Answer the requests of a connection until it ends. Raises OSError when the client goes away."""
    signal.alarm(_LIMIT_S)  # the default action ends the process
    _, uid, _ = peer(link)
    sees_all = _sees_all(uid)
    with (
        link.makefile("rb") as reading,
        link.makefile("wb", buffering=protocol.BUFFER_BYTES) as writing,
    ):
        link.settimeout(protocol.TIMEOUT_S)
        while line := reading.readline(protocol.LINE_LIMIT_BYTES):
            frames = partial(_answer, line, None if sees_all else uid, config)
            write_all(cast(BinaryIO, writing), frames)
            if not line.endswith(b"\n"):
                break  # too long, or the last


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
