"""All that a job's peer process and its owner, the node's agent, say to each other.

Each is one SEQPACKET message. The first one, to the process, brings two descriptors: of a memory file with
the Order, and of the ring, slots of 4 MiB that both map. Then, from the owner:

    OpenBlob       a blob of this job, and a descriptor of its data file, for reading only
    CloseBlob      nothing more of it is wanted or given, and its descriptor is closed
    Want           get these chunks
    Have           a chunk is in the data file: its digests are right
    Wrong          the chunk that came has a wrong digest
    Lost           a chunk cannot be had here: its read failed, or it is not kept

and from the process:

    Started        it listens, and has its part of the directory
    Read           read this chunk from the store; the same again with demand: somebody waits for it now
    Arrived        a chunk lies in a slot of the ring, until Have, Wrong or Lost is said of it, or CloseBlob
    Alive          it runs; each 250 ms while chunks are wanted, else each second
    Counted        figures since the start

The owner has a slot of 4 MiB for each of eight chunks of the prefetch, and for each that it demands at once.
It believes no Arrived before it has compared digests, of a copy: the process can change what is in the ring.
"""

from __future__ import annotations

import os
import socket
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

MESSAGE_BYTES = 64 * 1024
MOST_CHUNKS = 8192  # of one Want
_ORDER_LIMIT_BYTES = 16 * 2**20
_Natural = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_Bytes = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Order(Struct, frozen=True):
    """Whose process it is, and which node of which nodes.

    addresses: of all nodes, IPv4 or IPv6. ports: on which a node may listen, its first choice first. blocks:
    the nodes under each switch (groups.group_nodes). upload_bytes_per_s: what it sends at most.
    """

    uid: int
    gid: int
    user_groups: tuple[int, ...]
    key: bytes
    node: int
    addresses: tuple[str, ...]
    ports: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    upload_bytes_per_s: float
    slots: int


class OpenBlob(Struct, frozen=True, tag=True):
    """A blob, `blob` from now on. name: 64 hexadecimal digits. here: a bit for each chunk, lowest first.

    chunk_bytes: of this blob's chunks, the same on all nodes; CHUNK_BYTES at most.
    """

    blob: int
    name: str
    size_bytes: int
    chunk_bytes: int
    here: bytes = b""


class CloseBlob(Struct, frozen=True, tag=True):
    """The owner uses the blob no more; its number is not used again.

    A Read or Arrived that crosses it counts no more. Chunks that are on their way to other nodes still go on:
    the file may be unlinked, and its bytes stay as they are.
    """

    blob: int


class Want(Struct, frozen=True, tag=True):
    """Get these chunks: of the prefetch in the order of the plan, or because somebody waits (demand)."""

    blob: int
    chunks: tuple[int, ...]
    demand: bool = False


class Have(Struct, frozen=True, tag=True):
    """The chunk is in the data file, however it came: its digests are right."""

    blob: int
    chunk: int


class Wrong(Struct, frozen=True, tag=True):
    """The chunk that Arrived has a wrong digest."""

    blob: int
    chunk: int


class Lost(Struct, frozen=True, tag=True):
    """The chunk cannot be had here now."""

    blob: int
    chunk: int


class Started(Struct, frozen=True, tag=True):
    """It has begun. port: where it listens; 0 where all ports are taken."""

    port: _Natural


class Read(Struct, frozen=True, tag=True):
    """Read this chunk from the store."""

    blob: _Natural
    chunk: _Natural
    demand: bool


class Arrived(Struct, frozen=True, tag=True):
    """The bytes of a chunk lie in a slot. node: who sent them. dur_s: from the first byte to the last."""

    blob: _Natural
    chunk: _Natural
    slot: _Natural
    node: _Natural
    dur_s: float


class Alive(Struct, frozen=True, tag=True):
    """It runs. is_cut_off: no node can be reached."""

    is_cut_off: bool


class Counted(Struct, frozen=True, tag=True):
    """Figures since the start. received, sent: bytes, by node. fallbacks: reads of the store, by cause.

    slow: nodes that were told so. banned: those that sent wrong bytes.
    """

    received: dict[_Natural, _Bytes]
    sent: dict[_Natural, _Bytes]
    fallbacks: dict[Annotated[str, Meta(max_length=32)], _Natural]
    slow: tuple[_Natural, ...]
    banned: tuple[_Natural, ...]


FromOwner: TypeAlias = OpenBlob | CloseBlob | Want | Have | Wrong | Lost
FromChild: TypeAlias = Started | Read | Arrived | Alive | Counted

_encoder = msgspec.msgpack.Encoder()
_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)
_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)
_order: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


def encode(message: FromOwner | FromChild) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


def decode_from_child(message: bytes) -> FromChild:
    """What the process says. Raises msgspec.MsgspecError for all that is no such message."""
    return _from_child.decode(message)


def decode_from_owner(message: bytes) -> FromOwner:
    """What the owner says."""
    return _from_owner.decode(message)


def send_order(link: socket.socket, order: Order, ring_fd: int) -> None:
    """The first message to the process. Raises OSError."""
    fd = os.memfd_create("bootseer-peers", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(_encoder.encode(order))
        socket.send_fds(link, [b"order"], [fd, ring_fd])
    finally:
        os.close(fd)


def receive_order(link: socket.socket) -> tuple[Order, int] | None:
    """The order and the ring's descriptor; None where there is no owner any more."""
    message, fds, _, _ = socket.recv_fds(link, MESSAGE_BYTES, 2)
    if not message:
        return None
    order_fd, ring_fd = fds
    order = _order.decode(os.pread(order_fd, _ORDER_LIMIT_BYTES, 0))
    os.close(order_fd)
    return order, ring_fd
