"""One connection between two peers: frames over TCP, in both directions.

A frame is a head of 8 bytes, its kind and the length of its body, and the body. The body of a DATA frame is a
chunk, an offset in it, and bytes, 1 MiB at most: they go from a file to the socket (sendfile), and from the
socket to where they shall lie (recv_into), without a copy here. Messages go between the frames of a chunk.

A peer is believed in nothing: a length is compared with its limit before room is made, and what nobody asked
for goes nowhere. Non-blocking; the owner says when the socket is ready. Not thread-safe.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.messages import (
    CHUNK_BYTES,
    MOST_BODY_BYTES,
    BadMessage,
    Join,
    Kind,
    Message,
    decode,
    encode,
    pack_chunk,
    read_chunk,
)

MOST_DATA_BYTES = 2**20
# Bytes of a chunk that count as a sign of life: who sends less in the time that a node may be silent is slow.
SIGN_BYTES = 256 * 1024
_HEAD = struct.Struct("!B3xI")
_DATA = struct.Struct("!II")  # offset in the chunk, and how many bytes follow
_DATA_BYTES = CHUNK_BYTES + _DATA.size
_MOST_QUEUED_BYTES = 4 * 2**20  # of messages: who does not take them is gone
_MOST_WASTED_BYTES = 64 * 2**20  # what was on its way when this end chose another peer
_READ_BYTES = 4 * 2**20  # at a time: others shall have their turn
_READ_MESSAGES = 1024


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes of a chunk are where they shall lie. end: they are the last ones of their frame."""

    chunk: Chunk
    offset: int
    size_bytes: int
    end: bool


# Where bytes of a chunk shall lie, from an offset on: so many writable ones. None: nobody asked for them.
Place = Callable[[Chunk, int, int], memoryview | None]


class OpenFile(Protocol):
    """A file that stays open as long as somebody holds this."""

    def fileno(self) -> int:
        """Its descriptor."""


@dataclass(slots=True)
class _Sending:
    """A frame of bytes from a file. head: what is still to be sent before them."""

    head: bytes
    file: OpenFile
    offset: int
    left_bytes: int


@dataclass(slots=True)
class _Receiving:
    """The frame that comes now. view: where its bytes go. told_bytes: of how many the owner knows."""

    chunk: Chunk
    offset: int
    size_bytes: int
    view: memoryview | None
    done_bytes: int = 0
    told_bytes: int = 0

    @property
    def untold_bytes(self) -> int:
        return 0 if self.view is None else self.done_bytes - self.told_bytes

    def tell(self) -> Received:
        """What the owner does not know yet."""
        told_bytes, self.told_bytes = self.told_bytes, self.done_bytes
        is_whole = self.done_bytes == self.size_bytes
        return Received(self.chunk, self.offset + told_bytes, self.done_bytes - told_bytes, end=is_whole)


class Connection:
    """A connected socket, whose peers have proven who they are (key.py). The owner closes it."""

    def __init__(self, link: socket.socket, node: int, place: Place) -> None:
        """node: the far end, which asks for itself only."""
        link.setblocking(False)
        self._link = link
        self._node = node
        self._place = place
        self._messages = bytearray()
        self._data: deque[_Sending] = deque()
        self._in = memoryview(bytearray(MOST_BODY_BYTES))
        self._have = 0  # bytes of the head, or of the body
        self._head: tuple[int, int] | None = None
        self._receiving: _Receiving | None = None
        self._wasted_bytes = 0  # since there was a use for some
        self._joined: set[int] = set()  # levels of the JOINs that came

    def fileno(self) -> int:
        return self._link.fileno()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._messages or self._data)

    def send(self, message: Message) -> None:
        """Send a message as soon as the socket takes it. Raises BadMessage where the peer takes none."""
        kind, body = encode(message)
        if len(self._messages) + len(body) > _MOST_QUEUED_BYTES:
            raise BadMessage("the peer takes no messages")
        self._messages += _HEAD.pack(kind, len(body)) + body

    def send_bytes(
        self, chunk: Chunk, offset: int, file: OpenFile, file_offset: int, size_bytes: int
    ) -> None:
        """Send bytes of a chunk from a file. size_bytes: MOST_DATA_BYTES at most."""
        head = _HEAD.pack(Kind.DATA, _DATA_BYTES + size_bytes) + pack_chunk(chunk)
        self._data.append(_Sending(head + _DATA.pack(offset, size_bytes), file, file_offset, size_bytes))

    def ignore(self, chunk: Chunk) -> None:
        """What is left of a frame of this chunk, where one comes just now, goes nowhere."""
        if self._receiving is not None and self._receiving.chunk == chunk:
            self._receiving.view = None

    def write(self) -> int:
        """Send what the socket takes now; gives how many frames of bytes were finished. Raises OSError."""
        finished = 0
        try:
            while True:
                frame = self._data[0] if self._data else None
                has_begun = frame is not None and len(frame.head) < _HEAD.size + _DATA_BYTES
                if self._messages and not has_begun:
                    sent = self._link.send(self._messages)
                    del self._messages[:sent]
                elif frame is not None:
                    finished += self._write(frame)
                else:
                    return finished
        except BlockingIOError:
            return finished

    def _write(self, frame: _Sending) -> bool:
        """Send a part of a frame; gives whether that was its end. Raises OSError."""
        if frame.head:
            sent = self._link.send(frame.head, socket.MSG_MORE)
            frame.head = frame.head[sent:]
            return False
        sent = os.sendfile(self._link.fileno(), frame.file.fileno(), frame.offset, frame.left_bytes)
        if not sent:
            raise OSError("the file ends before the bytes that were to be sent")
        frame.offset += sent
        frame.left_bytes -= sent
        if frame.left_bytes:
            return False
        self._data.popleft()
        return True

    def read(self) -> list[Message | Received]:
        """What has come. Raises EOFError at the end, BadMessage or OSError where it is of no use any more."""
        heard: list[Message | Received] = []
        count = 0
        try:
            while count < _READ_BYTES and len(heard) < _READ_MESSAGES:
                count += self._read(heard)
        except BlockingIOError:
            pass
        except (EOFError, ConnectionError):
            if not heard:  # what was heard before the end counts
                raise
        receiving = self._receiving
        if receiving is not None and receiving.untold_bytes >= SIGN_BYTES:
            heard.append(receiving.tell())
        return heard

    def _read(self, heard: list[Message | Received]) -> int:
        """Take what is next. Raises BlockingIOError where nothing is."""
        if self._receiving is not None:
            return self._read_data(self._receiving, heard)
        kind, length = self._head or (0, 0)
        wanted = _HEAD.size if self._head is None else _DATA_BYTES if kind == Kind.DATA else length
        if self._have < wanted:
            count = self._link.recv_into(self._in[self._have : wanted])
            if not count:
                raise EOFError
            self._have += count
            if self._have < wanted:
                return count
        else:
            count = 0
        taken = bytes(self._in[:wanted])
        self._have = 0
        if self._head is None:
            self._head = _checked_head(taken)
        elif kind == Kind.DATA:
            self._receiving = self._begin(taken, length)
            self._head = None
        else:
            self._head = None
            message = decode(kind, taken, self._node)
            if isinstance(message, Join):
                # Each has all lists looked through, so it is sent once in the life of a node.
                if message.level in self._joined:
                    raise BadMessage(f"another JOIN of level {message.level}")
                self._joined.add(message.level)
            heard.append(message)
        return count

    def _begin(self, taken: bytes, length: int) -> _Receiving:
        chunk = read_chunk(taken)
        offset, size_bytes = _DATA.unpack_from(taken, CHUNK_BYTES)
        if size_bytes != length - _DATA_BYTES:
            raise BadMessage(f"{size_bytes} bytes in a frame of {length}")
        view = self._place(chunk, offset, size_bytes)
        if view is not None and view.nbytes != size_bytes:
            raise ValueError(f"a place of {view.nbytes} bytes for {size_bytes}")
        return _Receiving(chunk, offset, size_bytes, view)

    def _read_data(self, receiving: _Receiving, heard: list[Message | Received]) -> int:
        left_bytes = receiving.size_bytes - receiving.done_bytes
        view = receiving.view
        # Nothing is in the buffer for messages while bytes come.
        count = self._link.recv_into(self._in[:left_bytes] if view is None else view[receiving.done_bytes :])
        if not count:
            raise EOFError
        self._wasted_bytes = self._wasted_bytes + count if view is None else 0
        if self._wasted_bytes > _MOST_WASTED_BYTES:
            raise BadMessage("the peer sends what nobody asked for")
        receiving.done_bytes += count
        if receiving.done_bytes == receiving.size_bytes:
            if view is not None:
                heard.append(receiving.tell())
            self._receiving = None
        return count


def unacknowledged_bytes(link: socket.socket) -> int:
    """How much of what was sent the far kernel has not taken yet (tcp(7), SIOCOUTQ)."""
    (count,) = struct.unpack("i", fcntl.ioctl(link, termios.TIOCOUTQ, bytes(4)))
    return int(count)


def _checked_head(taken: bytes) -> tuple[int, int]:
    kind, length = _HEAD.unpack(taken)
    if kind == Kind.DATA:
        is_right = _DATA_BYTES < length <= _DATA_BYTES + MOST_DATA_BYTES
    else:
        is_right = length <= MOST_BODY_BYTES
    if not is_right:
        raise BadMessage(f"a frame of kind {kind} and {length} bytes")
    return kind, length
