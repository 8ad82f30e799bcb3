"""All that crosses between the agent, which is root, and the process with a job user's rights.

One SEQPACKET message is one JSON object:

    {"become": {…}}                                    the first, with the ring's descriptor: Order
    {"id": 7, "op": "Resolve", …}                      a request
    {"id": 7, "reply": {…}}                            its reply
    {"id": 7, "error": "…", "class": "NotFound"}       or the error that it ended with

The agent believes no reply: its types and limits are checked here, its descriptors are counted, and what it
says of bytes is believed only if a digest agrees. Each operation has one request type and one reply type.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta, Struct

from bootseer_slurm.blob.jobclass import REMEMBERED_LIMIT, Remembered, usable
from bootseer_slurm.errors import BootseerError, IntegrityError, StoreError

MESSAGE_BYTES = 64 * 1024
MESSAGE_DESCRIPTORS = 4
FILES_LIMIT = 48  # of one checkpoint: each is resolved and mounted for itself
_ERROR_LIMIT = 500
_FIRST_LIMIT_BYTES = 64 * 2**20

_Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Path = Annotated[str, Meta(max_length=4096)]
_Text = Annotated[str, Meta(max_length=16384)]
_AnyStruct = TypeVar("_AnyStruct", bound=Struct)


class Order(Struct, frozen=True):
    """Whom the process becomes, and what it works with. home: "" where the user has none."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    store_uri: str
    slots: int
    slot_bytes: int


class Reply(Struct, frozen=True):
    """A reply without anything to say; others derive from it."""

    @property
    def descriptors(self) -> int:
        """How many descriptors come with it."""
        return 0


class Request(Struct, frozen=True, tag_field="op"):
    """An operation; others derive from it. Some come with one descriptor, of a memory file with content."""

    most_descriptors: ClassVar[int] = 0  # that its reply may bring; what comes beyond them is closed


class Ping(Request, frozen=True):
    """Answer at once, whatever else goes on: so the agent sees that the process lives."""


class Resolve(Request, frozen=True):
    """Look an artifact up: what its user named, what the store has of it, and handles to read both.

    digest: of an image, what its tag means now. image: that an environment is used in. job_class: of a job
    that may install to it. rank, nodes: of a job's node, where a checkpoint may be a folder; nodes 0: it is a
    file that was found in one. newest: the newest step of the checkpoint is meant.
    """

    most_descriptors: ClassVar[int] = 3

    kind: str
    name: str
    digest: str = ""
    image: str = ""
    job_class: str = ""
    rank: int = 0
    nodes: int = 0
    newest: bool = False


class StoredBlob(Struct, frozen=True):
    """A blob in the store; its manifest comes as a descriptor.

    That is of a memory file, or of the store's own: of files, where the original is another user's.
    """

    folder: _Path
    handle: _Natural
    signature: _Text


class Resolved(Reply, frozen=True):
    """The answer to Resolve. Descriptors: the original's, where there is one, then each blob's manifest.

    original_handle: of the file where it lies. identity: of one without a path. first: the ranges (offset,
    bytes) that a mount of an image reads first. image: the digest that an environment's snapshot is for.
    role: of a checkpoint's file, its name without the step. warning: why the store's blob is not used.
    """

    has_original: bool = False
    blobs: Annotated[tuple[StoredBlob, ...], Meta(max_length=2)] = ()
    original_handle: _Natural | None = None
    size_bytes: _Natural | None = None
    identity: _Text = ""
    fingerprint: _Text = ""
    first: Annotated[tuple[tuple[int, int], ...], Meta(max_length=8)] = ()
    image: _Text = ""
    role: _Text = ""
    warning: _Text = ""

    @property
    def descriptors(self) -> int:
        return self.has_original + len(self.blobs)

    def first_ranges(self, size_bytes: int) -> tuple[tuple[int, int], ...]:
        """`first`, as far as it can be of a blob of this size."""
        ranges = []
        left_bytes = _FIRST_LIMIT_BYTES
        for offset, count in self.first:
            if 0 <= offset < size_bytes and 0 < count <= min(left_bytes, size_bytes - offset):
                ranges.append((offset, count))
                left_bytes -= count
        return tuple(ranges)


class CheckpointFile(Struct, frozen=True):
    """A file of a checkpoint that is a folder. role: its name without the step. within: its path in it."""

    name: _Text
    role: _Text
    within: _Text


class CheckpointFolder(Reply, frozen=True):
    """The answer to Resolve for a checkpoint that is a folder. count: of all files. message: why this one."""

    files: Annotated[tuple[CheckpointFile, ...], Meta(max_length=FILES_LIMIT)]
    count: _Natural
    message: _Text


class IsSame(Request, frozen=True):
    """Whether an original is still what it was when it was resolved. image: as Resolved has it."""

    kind: str
    path: str
    fingerprint: str
    image: str = ""


class Same(Reply, frozen=True):
    same: bool


class Reopen(Request, frozen=True):
    """Open a blob again, whatever its name stands for now."""

    blob: str
    folder: str


class Opened(Reply, frozen=True):
    handle: _Natural


class Read(Request, frozen=True):
    """Read a range of one object behind a handle into a slot of the ring. step_bytes: with one call.

    demand: somebody waits for it.
    """

    handle: int
    object: int
    offset: int
    size_bytes: int
    slot: int
    step_bytes: int
    demand: bool


class Count(Reply, frozen=True):
    """How many bytes were read."""

    count: _Natural


class Write(Request, frozen=True):
    """Write a small object below the user's folder of the store. With content."""

    path: str


class AskClock(Request, frozen=True):
    """Compare this node's clock with the store's, by an object at this path of the user's folder."""

    path: str


class Clock(Reply, frozen=True):
    offset_s: float
    error_s: float


class KeepTrace(Request, frozen=True):
    """Keep what this start touched of a blob. With content, a trace."""

    job_class: str
    blob: str


class MakePlan(Request, frozen=True):
    """Make a plan of the traces of earlier starts. any_class: of other classes where this one has none."""

    most_descriptors: ClassVar[int] = 1

    job_class: str
    blob: str
    blocks: int
    block_bytes: int
    any_class: bool


class Planned(Reply, frozen=True):
    """A plan comes as a descriptor. warning: which traces could not be used."""

    warning: _Text = ""

    @property
    def descriptors(self) -> int:
        return 1


class Recall(Request, frozen=True):
    """Say what the last start of a class asked for."""

    job_class: str


class Recalled(Reply, frozen=True):
    """Kind, name and owner of each."""

    remembered: Annotated[tuple[tuple[str, str, int | None], ...], Meta(max_length=REMEMBERED_LIMIT)] = ()

    def usable(self) -> list[Remembered]:
        """Those that a request may ask for."""
        return usable(Remembered(*each) for each in self.remembered)


class Remember(Request, frozen=True):
    """Keep what this start of a class asked for. With content, a record."""

    job_class: str


_OfStore = Resolve | IsSame | Reopen | Read | Write | AskClock | KeepTrace | MakePlan | Recall | Remember
AnyRequest = _OfStore | Ping


def encode_order(order: Order) -> bytes:
    return _dump({"become": msgspec.to_builtins(order)})


def decode_order(message: bytes) -> Order:
    """The agent's order. Raises as `decode_request`."""
    return msgspec.convert(json.loads(message)["become"], Order)


def encode_request(number: int, request: Request) -> bytes:
    return _dump({"id": number, **msgspec.to_builtins(request)})


def decode_request(message: bytes) -> tuple[int, AnyRequest]:
    """The agent's request. Raises ValueError, LookupError, TypeError or RecursionError when it is none."""
    fields = json.loads(message)
    return fields["id"], msgspec.convert(fields, AnyRequest)


def encode_reply(number: int, reply: Reply) -> bytes:
    return _dump({"id": number, "reply": {"of": type(reply).__name__, **msgspec.to_builtins(reply)}})


def encode_error(number: int, error: Exception) -> bytes:
    of_ours = isinstance(error, BootseerError)
    text = str(error) if of_ours else f"{type(error).__name__}: {error}"
    name = type(error).__name__ if of_ours else StoreError.__name__
    return _dump({"id": number, "error": text, "class": name})


def decode_answer(message: bytes) -> tuple[int, dict[str, Any] | BootseerError]:
    """Which request an answer is for, and the reply's fields, or the error.

    Raises ValueError, LookupError, TypeError or RecursionError when it is none.
    """
    fields = json.loads(message)
    if "error" in fields:
        text = str(fields["error"])[:_ERROR_LIMIT]
        return fields["id"], BootseerError.of_class(str(fields.get("class")), text)
    reply = fields["reply"]
    if not isinstance(reply, dict):
        raise TypeError("the reply has no fields")
    return fields["id"], reply


def decode_reply(fields: dict[str, Any], *types: type[_AnyStruct]) -> _AnyStruct:
    """The reply, which is of one of these types. Raises IntegrityError: the process is the user's."""
    for each in types:
        if fields.get("of") == each.__name__:
            try:
                return msgspec.convert(fields, each)
            except (msgspec.ValidationError, UnicodeError) as error:  # a lone surrogate where none can be
                raise IntegrityError(f"the user's process answered what cannot be: {error}") from error
    raise IntegrityError(f"the user's process answered {str(fields.get('of'))[:40]!r}")


def _dump(fields: dict[str, Any]) -> bytes:
    # Not msgspec's own encoder: paths hold characters that UTF-8 has not (surrogateescape).
    return json.dumps(fields).encode()
