"""Targets that come from other nodes: the first bytes of a connection, messages, and whole streams."""

from __future__ import annotations

import socket

from bootseer_slurm.peers import key
from bootseer_slurm.peers.directory import First, Handover, Moved, Parent, Row, Service, Want
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.messages import (
    Answered,
    AskList,
    BadMessage,
    Given,
    Join,
    Message,
    Pending,
    Probe,
    Refused,
    Slow,
    decode,
    encode,
)
from bootseer_slurm.peers.uploads import Get
from bootseer_slurm.peers.wire import Connection, Received
from scripts.lib.fuzz.target import Target

_CHUNK = Chunk("ab" * 32, 7)
_KEY, _NONCE = bytes(32), bytes(range(32))
_PLACE = ("10.0.0.1", 7070)
_STREAM_BYTES = 64 * 1024  # what a socket takes at once


def _messages() -> list[Message]:
    rows = (Row(1, 2, Service.YES), Row(2, 0, Service.GONE))
    return [
        AskList(1, Want(_CHUNK, 3, False, (1,), (2, 4), (5,), True), 2**32 - 1),
        Answered(_CHUNK, First(), 0),
        Answered(_CHUNK, Parent(3, True), 1),
        Answered(_CHUNK, Moved(9), 2**32 - 1),
        Get(_CHUNK, 3, True, True),
        Pending(_CHUNK, 2),
        Refused(_CHUNK, True),
        Join(1),
        Given(0, Handover({_CHUNK: rows, Chunk("cd" * 32, 0): ()}, (1, 2, 3))),
        Slow(),
        Probe(),
    ]


def _framed(message: Message) -> bytes:
    kind, body = encode(message)
    return bytes((kind,)) + body


def _read_framed(content: bytes) -> Message:
    return decode(content[0] if content else 0, content[1:], 3)


def _streams() -> list[bytes]:
    near, far = socket.socketpair()
    with near, far:
        sender = Connection(near, 0, lambda *_: None)
        for message in _messages():
            sender.send(message)
        sender.write()
        stream = far.recv(_STREAM_BYTES)
    data = b"\0" * 4 + (36 + 8 + 5).to_bytes(4, "big") + bytes(40) + (5).to_bytes(4, "big") + b"bytes"
    return [stream, data, data + stream]


def _read_stream(content: bytes) -> list[Message | Received]:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(content[:_STREAM_BYTES])
        far.shutdown(socket.SHUT_WR)
        receiver = Connection(near, 3, lambda chunk, offset, size: memoryview(bytearray(size)))
        heard: list[Message | Received] = []
        try:
            while True:
                heard += receiver.read()
        except EOFError:
            return heard


def _hellos() -> list[bytes]:
    return [key.Connects(_KEY, node=2, to=1, nonce=_NONCE).hello]


TARGETS = [
    Target(
        "peers: a hello",
        _hellos,
        lambda content: key.Listens(_KEY, node=1, nodes=4, nonce=_NONCE, hello=content, place=_PLACE).other,
        (key.NoProof,),
    ),
    Target(
        "peers: a message", lambda: [*map(_framed, _messages())], _read_framed, (BadMessage,), render=_framed
    ),
    Target("peers: a stream", _streams, _read_stream, (BadMessage,)),
]
