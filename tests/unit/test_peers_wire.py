"""Connections of peers: real sockets and files."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pytest

from bootseer_slurm.peers.directory import Handover, Row, Service, Want
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.messages import (
    MOST_BODY_BYTES,
    AskList,
    BadMessage,
    Given,
    Join,
    Message,
    Pending,
    Probe,
    encode,
    split,
)
from bootseer_slurm.peers.uploads import Get
from bootseer_slurm.peers.wire import MOST_DATA_BYTES, Connection, Received

CHUNK, OTHER = Chunk("ab" * 32, 7), Chunk("cd" * 32, 0)
CHUNK_BYTES = 4 * 2**20


@dataclass
class Pair:
    """Two ends, and the memory into which the near one takes bytes of CHUNK."""

    near_socket: socket.socket
    far_socket: socket.socket
    memory: bytearray = field(default_factory=lambda: bytearray(CHUNK_BYTES))

    def __post_init__(self) -> None:
        self.near = Connection(self.near_socket, 1, self.place)
        self.far = Connection(self.far_socket, 2, lambda *_: None)

    def place(self, chunk: Chunk, offset: int, size_bytes: int) -> memoryview | None:
        return memoryview(self.memory)[offset : offset + size_bytes] if chunk == CHUNK else None

    def heard(self) -> list[Message | Received]:
        """All that comes to the near end until nothing is left to send."""
        heard: list[Message | Received] = []
        while self.far.wants_to_write or select.select([self.near], [], [], 0)[0]:
            self.far.write()
            heard += self.near.read()
        return heard


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair()
    with near, far:
        yield Pair(near, far)


@pytest.fixture
def content(tmp_path: Path) -> Iterator[tuple[BinaryIO, bytes]]:
    content = os.urandom(CHUNK_BYTES)
    (tmp_path / "file").write_bytes(b"before" + content)
    with (tmp_path / "file").open("rb") as file:
        yield file, content


def send_chunk(connection: Connection, chunk: Chunk, file: BinaryIO) -> None:
    for offset in range(0, CHUNK_BYTES, MOST_DATA_BYTES):
        connection.send_bytes(chunk, offset, file, len(b"before") + offset, MOST_DATA_BYTES)


def test_a_chunk_arrives_and_messages_pass_between_its_frames(
    pair: Pair, content: tuple[BinaryIO, bytes]
) -> None:
    send_chunk(pair.far, CHUNK, content[0])
    pair.far.write()
    pair.far.send(Pending(OTHER, 3))
    heard = pair.heard()
    assert bytes(pair.memory) == content[1]
    received = [each for each in heard if isinstance(each, Received)]
    assert (
        sum(each.size_bytes for each in received) == CHUNK_BYTES and sum(each.end for each in received) == 4
    )
    assert Pending(OTHER, 3) in heard[:-4], "it does not wait for the whole chunk"


def test_bytes_that_nobody_asked_for_go_nowhere(pair: Pair, content: tuple[BinaryIO, bytes]) -> None:
    send_chunk(pair.far, OTHER, content[0])
    pair.far.send(Join(0))
    assert pair.heard() == [Join(0)] and not any(pair.memory)


def test_endless_bytes_that_nobody_asked_for_end_the_connection(
    pair: Pair, content: tuple[BinaryIO, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bootseer_slurm.peers.wire._MOST_WASTED_BYTES", CHUNK_BYTES)
    for chunk in (OTHER, CHUNK, OTHER):
        send_chunk(pair.far, chunk, content[0])
    pair.heard()
    send_chunk(pair.far, OTHER, content[0])
    with pytest.raises(BadMessage, match="nobody asked"):
        pair.heard()


def test_part_of_a_frame_is_a_sign_of_life_once_it_is_large_enough(pair: Pair) -> None:
    head = struct.pack("!B3xI", 0, 44 + 2**20) + bytes.fromhex(CHUNK.blob) + struct.pack("!III", 7, 0, 2**20)
    pair.far_socket.setblocking(True)
    pair.far_socket.sendall(head + bytes(1000))
    assert pair.near.read() == [], "who dribbles gives none"
    heard: list[Message | Received] = []
    for _ in range(5):
        pair.far_socket.sendall(bytes(60_000))
        heard += pair.near.read()
    assert heard == [Received(CHUNK, 0, 301_000, end=False)]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(struct.pack("!B3xI", 1, 2**32 - 1), id="a huge message"),
        pytest.param(struct.pack("!B3xI", 0, 44 + 2**20 + 1), id="a huge frame of bytes"),
        pytest.param(struct.pack("!B3xI", 0, 44), id="no bytes"),
        pytest.param(
            struct.pack("!B3xI", 0, 45) + bytes(40) + struct.pack("!I", 2), id="more than the frame"
        ),
        pytest.param(struct.pack("!B3xI", 77, 0), id="an unknown kind"),
        pytest.param(2 * (struct.pack("!B3xI", 6, 1) + b"\1"), id="two JOINs of one level"),
        pytest.param(struct.pack("!B3xI", 6, 2) + b"\0\0", id="a message with something behind it"),
        pytest.param(struct.pack("!B3xI", 3, 1) + b"\0", id="a message that is cut"),
        pytest.param(struct.pack("!B3xI", 7, 7) + b"\0\0\2\0\0\0\1", id="a list that ends early"),
    ],
)
def test_what_no_peer_sends_ends_the_connection(pair: Pair, sent: bytes) -> None:
    pair.far_socket.sendall(sent)
    with pytest.raises(BadMessage):
        pair.near.read()


def test_a_node_joins_each_level_once(pair: Pair) -> None:
    for level in (0, 1):
        pair.far.send(Join(level))
    assert pair.heard() == [Join(0), Join(1)]


def test_the_end_is_told(pair: Pair) -> None:
    pair.far_socket.sendall(struct.pack("!B3x", 6))
    pair.far_socket.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        pair.near.read()


def test_who_takes_no_messages_is_given_up(pair: Pair) -> None:
    want = AskList(0, Want(CHUNK, 1, lost=tuple(range(128)), missing=tuple(range(128))), 1)
    with pytest.raises(BadMessage, match="takes no"):
        for _ in range(10_000):
            pair.near.send(want)
            pair.near.write()


def test_a_file_that_ends_early_ends_the_connection(pair: Pair, content: tuple[BinaryIO, bytes]) -> None:
    pair.far.send_bytes(CHUNK, 0, content[0], CHUNK_BYTES + 6 - 10, 20)
    with pytest.raises(OSError, match="ends before"):
        pair.heard()


def test_a_large_directory_goes_in_parts() -> None:
    lists = {
        Chunk("ab" * 32, number): tuple(Row(node, 2, Service.YES) for node in range(128))
        for number in range(700)
    }
    parts = split(Handover(lists, (1, 2)))
    assert len(parts) > 1 and all(part.live == (1, 2) for part in parts)
    assert all(len(encode(Given(0, part))[1]) <= MOST_BODY_BYTES for part in parts)
    assert {chunk: rows for part in parts for chunk, rows in part.lists.items()} == lists


def test_a_blob_has_64_digits() -> None:
    with pytest.raises(ValueError, match="64 hexadecimal"):
        encode(Pending(Chunk("ab", 0), 0))


@pytest.mark.parametrize("more", [-1, 1])
def test_a_place_of_another_size_is_no_place(pair: Pair, content: tuple[BinaryIO, bytes], more: int) -> None:
    memory = bytearray(MOST_DATA_BYTES + 1)
    near = Connection(pair.near_socket, 1, lambda _chunk, _offset, size: memoryview(memory)[: size + more])
    send_chunk(pair.far, CHUNK, content[0])
    pair.far.write()
    with pytest.raises(ValueError, match="a place of"):
        near.read()
    assert not any(memory)


def test_bytes_of_a_chunk_that_was_left_go_nowhere_from_then_on(pair: Pair) -> None:
    head = struct.pack("!B3xI", 0, 44 + 2**20) + bytes.fromhex(CHUNK.blob) + struct.pack("!III", 7, 0, 2**20)
    pair.far_socket.sendall(head + b"x" * 1000)
    pair.near.read()
    pair.near.ignore(CHUNK)
    pair.far_socket.sendall(b"y" * 1000)
    pair.near.read()
    assert bytes(pair.memory[:2000]) == b"x" * 1000 + bytes(1000)


def test_what_was_said_before_the_end_is_heard(pair: Pair) -> None:
    pair.far.send(Join(0))
    pair.far.write()
    pair.far_socket.shutdown(socket.SHUT_WR)
    assert pair.near.read() == [Join(0)]
    with pytest.raises(EOFError):
        pair.near.read()


def test_who_asks_is_the_node_of_the_connection(pair: Pair) -> None:
    pair.far.send(AskList(0, Want(CHUNK, 77), 9))
    pair.far.send(Get(CHUNK, 77, demand=True))
    assert pair.heard() == [AskList(0, Want(CHUNK, 1), 9), Get(CHUNK, 1, demand=True)]


def test_few_messages_are_taken_at_a_time(pair: Pair) -> None:
    for _ in range(1500):
        pair.far.send(Probe())
    while pair.far.wants_to_write:
        pair.far.write()
    assert [len(pair.near.read()) for _ in range(2)] == [1024, 476]
