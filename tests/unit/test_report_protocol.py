"""Requests to the service behind bootseer-answer.socket: as they are sent, and lines that are none."""

from __future__ import annotations

import pytest

from bootseer_slurm.errors import InputError
from bootseer_slurm.report.access.protocol import (
    EventsRequest,
    RecordsRequest,
    Request,
    RestartsRequest,
    UsersRequest,
    parse_line,
    to_line,
)


@pytest.mark.parametrize(
    "request_", [RecordsRequest(5), UsersRequest(), RestartsRequest(1000, 7), EventsRequest(1000, 7, 0)]
)
def test_a_request_comes_as_it_was_sent(request_: Request) -> None:
    assert parse_line(to_line(request_)) == request_
    assert to_line(request_).count(b"\n") == 1


def test_this_is_how_it_is_written() -> None:
    assert to_line(EventsRequest(1000, 7, 0)) == b'{"op": "events", "uid": 1000, "job": 7, "restart": 0}\n'


@pytest.mark.parametrize(
    "line",
    [b"", b"[]", b"[" * 5000, b"1", b"{}", b'{"op":"secrets"}', b'{"op":["users"]}', b'{"op":"records"}', b"\xff",
     b'{"op":"records","since_ms":true}', b'{"op":"records","since_ms":-1}', b'{"op":"records","since_ms":140737488355328}'],
)  # fmt: skip
def test_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(InputError, match="not a request"):
        parse_line(line)
