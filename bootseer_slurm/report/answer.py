"""What people may see of other people's starts: the service that root runs for them, and their end of it.

A user's own events lie in the store, open to him, and what is here adds nothing to his rights. The records of
`bootseer collect` are root's; through the socket a user gets those of his own starts, root and those whom
Slurm has as Operator or Administrator get all, and these also the events of others' jobs, read with their
owners' rights. Who asks is known from the socket (SO_PEERCRED), never from the request.

systemd listens, and starts one process for each connection, with the socket as its stdin (Accept=yes). It
reads requests, each a line of JSON, answers in frames, and ends after `_LIMIT_S` at the latest.

    {"op": "records", "since_ms": 0}                       frames: the Parquet files that hold such starts
    {"op": "users"}                                        frames: "uid"
    {"op": "restarts", "uid": 1000, "job": 7}              frames: "restart"
    {"op": "events", "uid": 1000, "job": 7, "restart": 0}  frames: "node", and its file
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from bootseer_slurm.agentapi.protocol import peer
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.report.archive import Archive
from bootseer_slurm.report.collect import EventStore
from bootseer_slurm.report.frames import Frame, read_frames, write_all
from bootseer_slurm.report.owners import OwnersEvents
from bootseer_slurm.report.stored import StoredEvents
from bootseer_slurm.slurm.sacctmgr import is_operator
from bootseer_slurm.store import open_store

_LIMIT_S = 120
_REQUEST_LIMIT_BYTES = 4096
_CLIENT_TIMEOUT_S = 60.0
_FILE_LIMIT_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20


def answer(link: socket.socket, config: Config) -> None:
    """Answer the requests of a connection until it ends. Raises OSError when the client goes away."""
    signal.alarm(_LIMIT_S)  # the default action ends the process
    _, uid, _ = peer(link)
    sees_all = _sees_all(uid)
    with link.makefile("rb") as reading, link.makefile("wb", buffering=_BUFFER_BYTES) as writing:
        link.settimeout(_CLIENT_TIMEOUT_S)
        while line := reading.readline(_REQUEST_LIMIT_BYTES):
            frames = partial(_answer, line, None if sees_all else uid, config)
            write_all(cast(BinaryIO, writing), frames)
            if not line.endswith(b"\n"):
                break  # too long, or the last


def _answer(line: bytes, only_uid: int | None, config: Config) -> Iterator[Frame]:
    """The answer to one request of somebody who may see all, or the starts of one user."""
    try:
        request = json.loads(line)
        op = request["op"]
        numbers = {name: _number(request[name]) for name in _NUMBERS.get(op, ())}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError("not a request") from None
    if op == "records":
        yield from _records(Archive(config.records.path), numbers["since_ms"], only_uid)
    elif op not in _NUMBERS:
        raise InputError("not a request")
    elif only_uid is not None:
        raise InputError("other users' jobs are for Slurm's operators to see")
    else:
        yield from _events(OwnersEvents(config.store.uri), op, numbers)


_NUMBERS = {
    "records": ("since_ms",),
    "users": (),
    "restarts": ("uid", "job"),
    "events": ("uid", "job", "restart"),
}


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 47:
        raise ValueError("no number")
    return value


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


def _events(events: OwnersEvents, op: str, numbers: dict[str, int]) -> Iterator[Frame]:
    if op == "users":
        yield from (Frame({"uid": uid}, b"") for uid in events.users())
    elif op == "restarts":
        yield from (Frame({"restart": each}, b"") for each in events.restarts(numbers["uid"], numbers["job"]))
    else:
        for node, text in events.event_files(numbers["uid"], numbers["job"], numbers["restart"]):
            yield Frame({"node": node}, text.encode("utf-8", "replace"))


def records(config: Config, *, since_ms: int) -> Iterator[Path | pa.Buffer]:
    """The records that this person may see: root's own files, or what the service gives.

    Raises InputError when there is no service here.
    """
    if os.geteuid() == 0:
        yield from Archive(config.records.path).files(since_ms=since_ms)
    else:
        for frame in _Service(config.records.socket).ask({"op": "records", "since_ms": since_ms}):
            yield pa.py_buffer(frame.content)


def events(config: Config) -> EventStore:
    """The events that this person may see, of any job."""
    if os.geteuid() == 0:
        return OwnersEvents(config.store.uri)
    return _Visible(config)


class _Visible:
    """The EventStore of a person: his own from the store, others' from the service where it allows that."""

    def __init__(self, config: Config) -> None:
        self._own = StoredEvents(open_store(config.store.uri))
        self._service = _Service(config.records.socket)

    def users(self) -> list[int]:
        with contextlib.suppress(BootseerError):
            return [frame.header["uid"] for frame in self._service.ask({"op": "users"})]
        return [os.geteuid()]

    def restarts(self, uid: int, job: int) -> list[int]:
        if uid == os.geteuid():
            return self._own.restarts(uid, job)
        request = {"op": "restarts", "uid": uid, "job": job}
        return self._allowed(request, lambda frame: frame.header["restart"])

    def event_files(self, uid: int, job: int, restart: int) -> Iterator[tuple[str, str]]:
        if uid == os.geteuid():
            return self._own.event_files(uid, job, restart)
        request = {"op": "events", "uid": uid, "job": job, "restart": restart}
        return iter(
            self._allowed(
                request, lambda frame: (frame.header["node"], frame.content.decode("utf-8", "replace"))
            )
        )

    def _allowed(self, request: dict[str, Any], value: Callable[[Frame], Any]) -> list[Any]:
        try:
            return [value(frame) for frame in self._service.ask(request)]
        except BootseerError as error:
            raise InputError(
                f"job {request['job']} is another user's: {error.message}",
                hint="operators see all jobs on the machine where bootseer-answer.socket is",
            ) from error


class _Service:
    """A connection to the service, made when it is first asked. Answers are to be read to their end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._link: socket.socket | None = None

    def ask(self, request: dict[str, Any]) -> Iterator[Frame]:
        """The answer. Raises what the service refused, InputError when nobody answers here."""
        try:
            if self._link is None:
                self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._link.settimeout(_CLIENT_TIMEOUT_S)
                self._link.connect(str(self._path))
            self._link.sendall(json.dumps(request).encode() + b"\n")
            with self._link.makefile("rb", buffering=_BUFFER_BYTES) as reading:
                yield from read_frames(cast(BinaryIO, reading), limit_bytes=_FILE_LIMIT_BYTES)
        except OSError as error:
            self._link = None
            raise InputError(
                f"{self._path}: nobody answers: {error.strerror or error}",
                hint="ask on the machine that runs bootseer-answer.socket, see docs/overhead.md",
            ) from error
