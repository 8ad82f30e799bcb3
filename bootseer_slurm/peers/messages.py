"""The messages of peers to one another, as bytes: the body of each frame of `wire`.

Integers are big endian. A chunk is the 32 bytes of its blob's name, which is 64 hexadecimal digits here, and
its number. Lists are bounded: nothing is made room for before its length is known to be right. Who asks is no
part of a frame: it is the node that has proven itself on the connection.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from bootseer_slurm.peers.directory import First, Handover, Moved, Parent, Row, Service, Want
from bootseer_slurm.peers.groups import GROUP_NODES, Chunk
from bootseer_slurm.peers.uploads import Get

MOST_BODY_BYTES = 256 * 1024
_MOST_NODES = GROUP_NODES
_MOST_ROWS = 16_384  # of one Handover
_CHUNK = struct.Struct("!32sI")
CHUNK_BYTES = _CHUNK.size
_WANT = struct.Struct("!BBIHHH")  # level, flags, number, and how many busy, lost and missing nodes follow
_ANSWERED = struct.Struct("!BIBI")  # the kind of answer, its node, whether only that one, and the number
_ROW = struct.Struct("!IBB")
_SERVES, _HAS = 1, 2
_DEMAND, _ONLY = 1, 2
_SERVICES = tuple(Service)
_NOBODY = -1  # until it is known whose connection it came on


class BadMessage(Exception):
    """Bytes that no peer of this version sends."""


@dataclass(frozen=True, slots=True)
class AskList:
    """A WANT for the directory of a level. number: of this question; the answer brings it back."""

    level: int
    want: Want
    number: int


@dataclass(frozen=True, slots=True)
class Answered:
    """What the directory of a node says to the WANT for this chunk that has this number."""

    chunk: Chunk
    answer: First | Parent | Moved
    number: int


@dataclass(frozen=True, slots=True)
class Pending:
    """The chunk is on its way to the node that was asked. hops: 0 where that reads the store."""

    chunk: Chunk
    hops: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The chunk does not come from here. lacks: not later either."""

    chunk: Chunk
    lacks: bool


@dataclass(frozen=True, slots=True)
class Join:
    """A node has started, and asks for its part of a level's directory."""

    level: int


@dataclass(frozen=True, slots=True)
class Given:
    """A part of a level's directory, which is the receiver's from now on."""

    level: int
    handover: Handover


@dataclass(frozen=True, slots=True)
class Slow:
    """The node that hears this sends slowly."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Nothing is said: only whether the machine of the node is there is to be seen."""


Message = AskList | Answered | Get | Pending | Refused | Join | Given | Slow | Probe


class Kind(enum.IntEnum):
    """The number of a frame's kind. DATA has its own form (wire.py)."""

    DATA = 0
    ASK_LIST = 1
    ANSWERED = 2
    GET = 3
    PENDING = 4
    REFUSED = 5
    JOIN = 6
    GIVEN = 7
    SLOW = 8
    PROBE = 9


def encode(message: Message) -> tuple[Kind, bytes]:
    """A message's kind and body. Raises ValueError for a Handover that is too large: `split` it before."""
    match message:
        case AskList(level, want, number):
            nodes = (want.busy, want.lost, want.missing)
            flags = _SERVES * want.serves | _HAS * want.has
            head = _WANT.pack(level, flags, number, *(min(len(each), _MOST_NODES) for each in nodes))
            listed = [node for each in nodes for node in each[:_MOST_NODES]]
            return Kind.ASK_LIST, pack_chunk(want.chunk) + head + struct.pack(f"!{len(listed)}I", *listed)
        case Answered(chunk, answer, number):
            return Kind.ANSWERED, pack_chunk(chunk) + _ANSWERED.pack(*_answer_fields(answer), number)
        case Get(chunk, _, demand, only):
            return Kind.GET, pack_chunk(chunk) + struct.pack("!B", _DEMAND * demand | _ONLY * only)
        case Pending(chunk, hops):
            return Kind.PENDING, pack_chunk(chunk) + struct.pack("!B", hops)
        case Refused(chunk, lacks):
            return Kind.REFUSED, pack_chunk(chunk) + struct.pack("!B", lacks)
        case Join(level):
            return Kind.JOIN, struct.pack("!B", level)
        case Given(level, handover):
            return Kind.GIVEN, struct.pack("!B", level) + _packed_handover(handover)
        case Slow():
            return Kind.SLOW, b""
        case Probe():
            return Kind.PROBE, b""


def decode(kind: int, body: bytes, node: int) -> Message:
    """The message of a frame that is no DATA, from this node. Raises BadMessage."""
    try:
        form = _FORMS[Kind(kind)]
        message, end = form(body)
    except (struct.error, ValueError, KeyError, IndexError) as error:
        raise BadMessage(f"frame of kind {kind}: {error}") from None
    if end != len(body):
        raise BadMessage(f"frame of kind {kind}: {len(body)} bytes, and {end} of them are read")
    if isinstance(message, AskList):
        return replace(message, want=replace(message.want, reader=node))
    return replace(message, reader=node) if isinstance(message, Get) else message


def pack_chunk(chunk: Chunk) -> bytes:
    """A chunk as it is in a frame: CHUNK_BYTES. Raises ValueError where 64 digits do not name its blob."""
    blob = bytes.fromhex(chunk.blob)
    if len(blob) != 32:
        raise ValueError(f"blob {chunk.blob!r} is not named by 64 hexadecimal digits")
    return _CHUNK.pack(blob, chunk.number)


def read_chunk(body: bytes | memoryview) -> Chunk:
    """The chunk that a body begins with. Raises struct.error."""
    blob, number = _CHUNK.unpack_from(body)
    return Chunk(blob.hex(), number)


def _answer_fields(answer: First | Parent | Moved) -> tuple[int, int, int]:
    match answer:
        case First():
            return 0, 0, 0
        case Parent(node, only):
            return 1, node, only
        case Moved(owner):
            return 2, owner, 0


def _packed_handover(handover: Handover) -> bytes:
    live = handover.live[:_MOST_NODES]
    parts = [struct.pack(f"!H{len(live)}I", len(live), *live)]
    for chunk, rows in handover.lists.items():
        parts.append(pack_chunk(chunk) + struct.pack("!H", len(rows)))
        parts += [_ROW.pack(row.node, min(row.children, 255), _SERVICES.index(row.service)) for row in rows]
    body = b"".join(parts)
    if len(body) >= MOST_BODY_BYTES:
        raise ValueError(f"a handover of {len(body)} bytes is too large for one frame")
    return body


def split(handover: Handover) -> list[Handover]:
    """The same lists in parts that fit into a frame each."""
    parts: list[Handover] = []
    lists: dict[Chunk, tuple[Row, ...]] = {}
    rows = 0
    for chunk, listed in handover.lists.items():
        # A list that is longer than a frame has room for tells of more nodes than anybody needs.
        kept = listed[:_MOST_ROWS]
        if lists and rows + len(kept) > _MOST_ROWS:
            parts.append(Handover(lists, handover.live))
            lists, rows = {}, 0
        lists[chunk] = kept
        rows += len(kept) + CHUNK_BYTES // _ROW.size + 1
    return [*parts, Handover(lists, handover.live)]


_Read = tuple[Message, int]


def _read_want(body: bytes) -> _Read:
    chunk, at = read_chunk(body), CHUNK_BYTES
    level, flags, number, *counts = _WANT.unpack_from(body, at)
    at += _WANT.size
    lists = []
    for count in counts:
        if count > _MOST_NODES:
            raise ValueError(f"{count} nodes")
        lists.append(struct.unpack_from(f"!{count}I", body, at))
        at += 4 * count
    busy, lost, missing = lists
    serves, has = bool(flags & _SERVES), bool(flags & _HAS)
    return AskList(level, Want(chunk, _NOBODY, serves, busy, lost, missing, has), number), at


def _read_answered(body: bytes) -> _Read:
    kind, node, only, number = _ANSWERED.unpack_from(body, CHUNK_BYTES)
    answer = (First(), Parent(node, bool(only)), Moved(node))[kind]
    return Answered(read_chunk(body), answer, number), CHUNK_BYTES + _ANSWERED.size


def _read_get(body: bytes) -> _Read:
    (flags,) = struct.unpack_from("!B", body, CHUNK_BYTES)
    return Get(read_chunk(body), _NOBODY, bool(flags & _DEMAND), bool(flags & _ONLY)), CHUNK_BYTES + 1


def _read_pending(body: bytes) -> _Read:
    (hops,) = struct.unpack_from("!B", body, CHUNK_BYTES)
    return Pending(read_chunk(body), hops), CHUNK_BYTES + 1


def _read_refused(body: bytes) -> _Read:
    (lacks,) = struct.unpack_from("!B", body, CHUNK_BYTES)
    return Refused(read_chunk(body), bool(lacks)), CHUNK_BYTES + 1


def _read_join(body: bytes) -> _Read:
    return Join(struct.unpack_from("!B", body)[0]), 1


def _read_given(body: bytes) -> _Read:
    level, count = struct.unpack_from("!BH", body)
    live = struct.unpack_from(f"!{count}I", body, 3)
    at = 3 + 4 * count
    lists: dict[Chunk, tuple[Row, ...]] = {}
    while at < len(body):
        blob, number, rows = struct.unpack_from("!32sIH", body, at)
        at += CHUNK_BYTES + 2
        listed = []
        for _ in range(rows):
            node, children, service = _ROW.unpack_from(body, at)
            listed.append(Row(node, children, _SERVICES[service]))
            at += _ROW.size
        lists[Chunk(blob.hex(), number)] = tuple(listed)
    return Given(level, Handover(lists, live)), at


_FORMS: dict[Kind, Callable[[bytes], _Read]] = {
    Kind.ASK_LIST: _read_want,
    Kind.ANSWERED: _read_answered,
    Kind.GET: _read_get,
    Kind.PENDING: _read_pending,
    Kind.REFUSED: _read_refused,
    Kind.JOIN: _read_join,
    Kind.GIVEN: _read_given,
    Kind.SLOW: lambda _: (Slow(), 0),
    Kind.PROBE: lambda _: (Probe(), 0),
}
