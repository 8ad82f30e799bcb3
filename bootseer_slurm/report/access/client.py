"""The events and records that the person at the command line may see.

Root reads as each owner. Everyone else has his own events from the store, and asks the service
(report/answer.py) for the rest, which it gives as far as he may see it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.report.access import protocol
from bootseer_slurm.report.access.owners import OwnersEvents
from bootseer_slurm.report.access.protocol import EventsRequest, Request, RestartsRequest, UsersRequest
from bootseer_slurm.report.gather.run import EventStore
from bootseer_slurm.report.gather.stored import StoredEvents
from bootseer_slurm.store import open_store
from bootseer_slurm.userproc.frames import Frame, read_frames


def visible_events(config: Config) -> EventStore:
    """The events that this person may see, of any job."""
    if os.geteuid() == 0:
        return OwnersEvents(config.store.uri)
    return _VisibleEvents(config)


class AnswerClient:
    """A connection to the service, made when it is first asked. Answers are to be read to their end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._link: socket.socket | None = None

    def ask(self, request: Request) -> Iterator[Frame]:
        """The answer. Raises the service's refusal, and InputError when nobody answers here."""
        try:
            if self._link is None:
                self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._link.settimeout(protocol.TIMEOUT_S)
                self._link.connect(str(self._path))
            self._link.sendall(protocol.to_line(request))
            with self._link.makefile("rb", buffering=protocol.BUFFER_BYTES) as reading:
                yield from read_frames(cast(BinaryIO, reading), limit_bytes=protocol.FILE_LIMIT_BYTES)
        except OSError as error:
            self._link = None
            raise InputError(
                f"{self._path}: nobody answers: {error.strerror or error}",
                hint="ask on the machine that runs bootseer-answer.socket, see docs/overhead.md",
            ) from error


class _VisibleEvents:
    """The EventStore of a person: his own from the store, others' from the service where it allows that."""

    def __init__(self, config: Config) -> None:
        self._own = StoredEvents(open_store(config.store.uri))
        self._service = AnswerClient(config.records.socket)

    def users(self) -> list[int]:
        with contextlib.suppress(BootseerError):
            return [frame.header["uid"] for frame in self._service.ask(UsersRequest())]
        return [os.geteuid()]

    def restarts(self, uid: int, job: int) -> list[int]:
        if uid == os.geteuid():
            return self._own.restarts(uid, job)
        return self._allowed(RestartsRequest(uid, job), lambda frame: frame.header["restart"])

    def event_files(self, uid: int, job: int, restart: int) -> Iterator[tuple[str, str]]:
        if uid == os.geteuid():
            return self._own.event_files(uid, job, restart)
        return iter(
            self._allowed(
                EventsRequest(uid, job, restart),
                lambda frame: (frame.header["node"], frame.content.decode("utf-8", "replace")),
            )
        )

    def _allowed(self, request: RestartsRequest | EventsRequest, value: Callable[[Frame], Any]) -> list[Any]:
        try:
            return [value(frame) for frame in self._service.ask(request)]
        except BootseerError as error:
            raise InputError(
                f"job {request.job} is another user's: {error.message}",
                hint="operators see all jobs on the machine where bootseer-answer.socket is",
            ) from error
