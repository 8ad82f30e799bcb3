"""The requests to the service behind `bootseer-answer.socket`, and its limits.

A request is a line of JSON, the answer a stream of frames (userproc/frames.py). The request names no asker:
the service knows him from the socket.

    {"op": "records", "since_ms": 0}                       frames: the Parquet files that hold such starts
    {"op": "users"}                                        frames: "uid"
    {"op": "restarts", "uid": 1000, "job": 7}              frames: "restart"
    {"op": "events", "uid": 1000, "job": 7, "restart": 0}  frames: "node", and its file
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from bootseer_slurm.errors import InputError

LINE_LIMIT_BYTES = 4096
FILE_LIMIT_BYTES = 1 << 30  # of one frame's content
TIMEOUT_S = 60.0  # without a byte, for either side
BUFFER_BYTES = 1 << 20
_LARGEST = (1 << 47) - 1


@dataclass(frozen=True, slots=True)
class RecordsRequest:
    """The records of starts from `since_ms` (since 1970) on."""

    since_ms: int


@dataclass(frozen=True, slots=True)
class UsersRequest:
    """The users that have events."""


@dataclass(frozen=True, slots=True)
class RestartsRequest:
    """The restart counts under which a user's job has events."""

    uid: int
    job: int


@dataclass(frozen=True, slots=True)
class EventsRequest:
    """The files of one run of a user's job."""

    uid: int
    job: int
    restart: int


Request = RecordsRequest | UsersRequest | RestartsRequest | EventsRequest
_TYPES: dict[str, type[Request]] = {
    "records": RecordsRequest,
    "users": UsersRequest,
    "restarts": RestartsRequest,
    "events": EventsRequest,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


def to_line(request: Request) -> bytes:
    """The request as a line, with its end."""
    return json.dumps({"op": _NAMES[type(request)], **asdict(request)}).encode() + b"\n"


def parse_line(line: bytes) -> Request:
    """The request in a line. Raises InputError when it is none."""
    try:
        given = json.loads(line)
        kind = _TYPES[given["op"]]
        return kind(**{field.name: _number(given[field.name]) for field in fields(kind)})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError("not a request") from None


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError("no number")
    return value
