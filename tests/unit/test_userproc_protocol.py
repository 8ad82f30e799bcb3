"""Messages between the agent and a user's process: what goes in comes out, and no hostile reply is believed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bootseer_slurm.blob.jobclass import Remembered
from bootseer_slurm.errors import InputError, IntegrityError, NotFound, StoreError
from bootseer_slurm.userproc import protocol
from bootseer_slurm.userproc.protocol import (
    CheckpointFile,
    CheckpointFolder,
    Clock,
    Count,
    Opened,
    Order,
    Planned,
    Recalled,
    Reply,
    Resolve,
    Resolved,
    Same,
    StoredBlob,
)

ODD = "/data/\udcff\ud800 \u1234"  # a name that is no UTF-8
RESOLVED = Resolved(
    has_original=True,
    blobs=(StoredBlob(ODD, 3, "s"), StoredBlob("b", 0, "")),
    original_handle=7,
    size_bytes=2**40,
    fingerprint=ODD,
    first=((0, 96), (900, 100)),
    warning="w",
)
REQUESTS = [
    Resolve("checkpoint", ODD, rank=1, nodes=4, newest=True),
    protocol.IsSame("image", ODD, "f"),
    protocol.Reopen("b", "f"),
    protocol.Read(1, 2, 3, 4, 5, 6, True),
    protocol.Write("events/1.0/n.jsonl"),
    protocol.AskClock("x"),
    protocol.KeepTrace("c", "b"),
    protocol.MakePlan("c", "b", 1, 2, False),
    protocol.Recall("c"),
    protocol.Remember("c"),
]
REPLIES = [
    RESOLVED,
    CheckpointFolder((CheckpointFile(ODD, "r", "w"),), 9, "m"),
    Reply(),
    Same(True),
    Opened(3),
    Count(4),
    Clock(0.5, 0.1),
    Planned("w"),
    Recalled((("image", "/a", None),)),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda each: type(each).__name__)
def test_a_request_comes_out_as_it_went_in(request_: protocol.Request) -> None:
    assert protocol.decode_request(protocol.encode_request(7, request_)) == (7, request_)


@pytest.mark.parametrize("reply", REPLIES, ids=lambda each: type(each).__name__)
def test_a_reply_comes_out_as_it_went_in(reply: Reply) -> None:
    number, fields = protocol.decode_answer(protocol.encode_reply(7, reply))
    assert isinstance(fields, dict)
    assert (number, protocol.decode_reply(fields, type(reply))) == (7, reply)


def test_an_order_comes_out_as_it_went_in() -> None:
    order = Order(1, 2, (3, 4), "/home/x", "file:///s", 12, 2**22)
    assert protocol.decode_order(protocol.encode_order(order)) == order


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (NotFound("gone"), NotFound("gone")),
        (InputError("x" * 9000), InputError("x" * 500)),
        (KeyError("k"), StoreError("KeyError: 'k'")),
    ],
)
def test_an_error_crosses_with_its_class(error: Exception, found: Exception) -> None:
    number, got = protocol.decode_answer(protocol.encode_error(7, error))
    assert (number, type(got), str(got)) == (7, type(found), str(found))


@pytest.mark.parametrize(
    "name", ["Exception", "SystemExit", "BootseerErrors", "__class__", "annotations", ""]
)
def test_no_other_class_is_made(name: str) -> None:
    _, got = protocol.decode_answer(json.dumps({"id": 1, "error": "x", "class": name}).encode())
    assert type(got) is StoreError


@pytest.mark.parametrize(
    "message", [b"", b"[", b"[]", b"{}", b"7", b'{"id": 1}', b'{"id": 1, "reply": []}', b"[" * 60_000]
)
def test_other_messages_are_no_answers(message: bytes) -> None:
    with pytest.raises((ValueError, LookupError, TypeError, RecursionError)):
        protocol.decode_answer(message)


def decode(expected: type[Reply], **fields: Any) -> Reply:
    return protocol.decode_reply({"of": expected.__name__, **fields}, expected)


@pytest.mark.parametrize(
    ("expected", "fields"),
    [
        (Resolved, {"has_original": 1}),
        (Resolved, {"blobs": [{"folder": "f", "handle": 1, "signature": ""}] * 3}),
        (Resolved, {"blobs": [{"folder": "f", "handle": -1, "signature": ""}]}),
        (Resolved, {"blobs": [{"folder": "f" * 4097, "handle": 1, "signature": ""}]}),
        (Resolved, {"blobs": [{"folder": "f"}]}),
        (Resolved, {"blobs": 7}),
        (Resolved, {"original_handle": "1"}),
        (Resolved, {"original_handle": True}),
        (Resolved, {"size_bytes": -1}),
        (Resolved, {"size_bytes": 2**70}),
        (Resolved, {"size_bytes": 1.0}),
        (Resolved, {"identity": 7}),
        (Resolved, {"fingerprint": None}),
        (Resolved, {"warning": "w" * 20_000}),
        (Resolved, {"first": [[1]]}),
        (Resolved, {"first": [[1, 2, 3]]}),
        (Resolved, {"first": [[0, 1]] * 9}),
        (Resolved, {"first": [["0", 5]]}),
        (CheckpointFolder, {"files": [], "count": 0}),
        (
            CheckpointFolder,
            {"files": [{"name": "a", "role": "b", "within": "c"}] * 49, "count": 49, "message": ""},
        ),
        (CheckpointFolder, {"files": [{"name": 7, "role": "b", "within": "c"}], "count": 1, "message": ""}),
        (Same, {}),
        (Same, {"same": 1}),
        (Opened, {"handle": None}),
        (Count, {"count": -1}),
        (Count, {"\udc80": 1, "count": 5}),
        (Count, {"count": "\udc80"}),
        (Clock, {"offset_s": "x", "error_s": 1}),
        (Clock, {"offset_s": None, "error_s": 1}),
        (Clock, {"offset_s": 10**400, "error_s": 1}),
        (Recalled, {"remembered": [["image", "/a"]]}),
        (Recalled, {"remembered": [["image", "/a", "7"]]}),
        (Recalled, {"remembered": [["image", "/a", None]] * 17}),
    ],
)
def test_a_reply_that_cannot_be_is_refused(expected: type[Reply], fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="cannot be"):
        decode(expected, **fields)


def test_a_reply_to_something_else_is_refused() -> None:
    with pytest.raises(IntegrityError, match="Count"):
        protocol.decode_reply({"of": "Count", "count": 1}, Same)
    with pytest.raises(IntegrityError):
        protocol.decode_reply({"count": 1}, Count)


def test_each_reply_says_how_many_descriptors_it_brings() -> None:
    assert [RESOLVED.descriptors, Resolved().descriptors, Planned().descriptors, Count(1).descriptors] == [
        3,
        0,
        1,
        0,
    ]
    assert max(each.most_descriptors for each in REQUESTS) == 3


@pytest.mark.parametrize(
    ("first", "ranges"),
    [
        ((), ()),
        (((0, 96), (900, 100)), ((0, 96), (900, 100))),
        (((0, 96), (900, 101)), ((0, 96),)),
        (((2**70, 1), (-1, 5), (0, 0), (0, -5), (1000, 1)), ()),
        (((0, 1000),) * 8, ((0, 1000),) * 8),
    ],
)
def test_ranges_that_cannot_be_are_left_out(
    first: tuple[tuple[int, int], ...], ranges: tuple[tuple[int, int], ...]
) -> None:
    assert Resolved(first=first).first_ranges(1000) == ranges


def test_ranges_are_bounded_together() -> None:
    most = 64 * 2**20
    assert Resolved(first=((0, most + 1), (0, most), (0, 1))).first_ranges(2**40) == ((0, most),)


def test_of_a_record_only_what_a_request_may_name_is_recalled() -> None:
    said = (
        ("image", "/a", 7),
        ("image", "a", 7),
        ("shell", "/a", 7),
        ("environment", "s3://b/c", 7),
        ("image", "/\n", 7),
    )
    assert Recalled((*said, ("image", "/a", -1))).usable() == [Remembered("image", "/a", 7)]
