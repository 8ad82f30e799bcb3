"""Traces: which blocks of a blob a start touched, in order; and plans, made of the traces of earlier starts.

    <store>/users/<uid>/traces/<job class>/<blob>/<job>.<restart>.<node>            a trace
    <store>/users/<uid>/traces/<job class>/<blob>/<job>.<restart>.<node>.partial    one that may lack blocks

A trace file is MAGIC (its last byte is the version), one line of JSON, the numbers of the blocks in order of
first touch and then the milliseconds from the start's first read to each touch (both uint32, little-endian);
and the sha256 of all that. While readers waited for blocks that clock stood still: so the times are those of
a start that has all it needs. What was read before, to mount the blob, is at 0. A trace is hostile until
parsed: its user can write it.

A trace is partial when reads may have been answered from the kernel's page cache, which this side never sees:
on a warm node, or where blocks were pushed ahead of the readers. What it lacks says nothing.
A trace without touches says that a step was shown the blob and read nothing of it. What takes a checkpoint
file's place at the next start may be larger or smaller: by much, and it is laid out another way.
A start is one job.restart; each of its nodes may have written a trace. Does no I/O.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import threading
import time
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.errors import IntegrityError

MAGIC = b"bstrace\x01"
PLAN_MAGIC = b"bsplan\x00\x01"
SETTLED_STARTS = 3  # with whole traces; then what a plan says is taken to be all that a start touches
STARTS = 8  # that a plan is made of, and that are kept, of full and of partial traces each
NODES = 4  # traces kept of one start: a thousand nodes of a job touch the same blocks
ENDED = ("mark", "quiet", "cap", "end")
# 32 GiB of blocks: what touches more reads the blob whole, and needs no plan.
MAX_TOUCHES = 2**17
_ALIKE = 0.1  # of its blocks, and one, a file may have more or fewer than what takes its place
MAX_AGE_S = 30 * 24 * 3600  # of what a plan is made of
_HEADER_LIMIT_BYTES = 2048
_DIGEST_BYTES = 32
_NUMBER_BYTES = 4
_MOST = 2**32 - 1
LIMIT_BYTES = len(MAGIC) + _HEADER_LIMIT_BYTES + 2 * _NUMBER_BYTES * MAX_TOUCHES + _DIGEST_BYTES
_PARTIAL = ".partial"


class Recorder:
    """First touches of the blocks of one blob, by all readers, since a session's begin. Thread-safe.

    An hour of a node's reads is kept in little memory: three numbers for each block, MAX_TOUCHES blocks.
    """

    def __init__(self, blocks: int, *, begin_s: float, waited_s: Callable[[], float] = lambda: 0.0) -> None:
        """blocks: how many the blob has. begin_s: time.monotonic() of the session's begin.

        waited_s: how long some reader has waited for blocks until now.
        """
        self._blocks = array("I")  # by time
        self._at_ms = array("I")  # since the begin
        self._waited_ms = array("I")  # until then
        self._waited_s = waited_s
        self.last_s = 0.0
        self._begin_s = begin_s
        self._seen = bytearray(blocks)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many blocks were touched."""
        return len(self._blocks)

    @property
    def touches(self) -> list[tuple[int, int]]:
        """(block, ms since the begin), by time."""
        with self._lock:
            return list(zip(self._blocks, self._at_ms, strict=True))

    def first_ms(self, from_ms: int) -> int:
        """When something was first touched, from that time on; that time when nothing was."""
        with self._lock:
            index = bisect_left(self._at_ms, from_ms)
            return self._at_ms[index] if index < len(self._at_ms) else from_ms

    def touch(self, first: int, last: int) -> None:
        """Note that blocks first to last are being read. On the way of every read."""
        if self._seen.find(0, first, last + 1) >= 0:
            self._record(first, last)

    def _record(self, first: int, last: int) -> None:
        with self._lock:
            now_s = time.monotonic()
            at_ms = min(_MOST, max(0, int((now_s - self._begin_s) * 1000)))
            waited_ms = int(self._waited_s() * 1000)
            block = self._seen.find(0, first, last + 1)
            while block >= 0:
                self._seen[block] = 1
                if len(self._blocks) < MAX_TOUCHES:
                    self._blocks.append(block)
                    self._at_ms.append(at_ms)
                    self._waited_ms.append(min(_MOST, waited_ms))
                self.last_s = now_s  # at the latest time that something was new: the start goes on
                block = self._seen.find(0, block + 1, last + 1)

    def touches_since(self, began_ms: int) -> tuple[tuple[int, int], ...]:
        """(block, ms since `began_ms`, without what readers waited) by time; 0 for what was before."""
        with self._lock:
            first = bisect_left(self._at_ms, began_ms)
            # What was waited for before does not count, and the first read's own wait comes behind it.
            from_ms = began_ms - (self._waited_ms[first] if first < len(self._waited_ms) else 0)
            return tuple(
                (block, max(0, at_ms - waited_ms - from_ms))
                for block, at_ms, waited_ms in zip(self._blocks, self._at_ms, self._waited_ms, strict=True)
            )


@dataclass(frozen=True, slots=True)
class Trace:
    """The blocks that one start touched of one blob on one node.

    blocks: that the blob has. ended: why recording ended, one of ENDED. touches: (block, ms since the start's
    first read), by time.
    """

    blob: str
    node: str
    job: int
    restart: int
    made_ns: int
    blocks: int
    block_bytes: int
    partial: bool
    ended: str
    touches: tuple[tuple[int, int], ...]

    @property
    def start(self) -> tuple[int, int]:
        return self.job, self.restart

    def encode(self) -> bytes:
        """The trace file's bytes."""
        names = ("blob", "node", "job", "restart", "made_ns", "blocks", "block_bytes", "partial", "ended")
        return _encode(MAGIC, {name: getattr(self, name) for name in names}, self.touches)


@dataclass(frozen=True, slots=True)
class Plan:
    """The blocks to prefetch of one blob. blocks: in order. times_ms: when a start first touches each.

    full_starts: how many starts with full traces it was made of. Without any and without blocks nothing is
    known; with some and without blocks, that nothing of it is touched.
    """

    blocks: tuple[int, ...] = ()
    times_ms: tuple[int, ...] = ()
    full_starts: int = 0

    def encode(self) -> bytes:
        """As it goes from the user's process to the agent."""
        touches = tuple(zip(self.blocks, self.times_ms, strict=True))
        return _encode(PLAN_MAGIC, {"full_starts": self.full_starts}, touches)


def decode(content: bytes) -> Trace:
    """The trace in a trace file's bytes. Raises IntegrityError when it is not one, or is not whole."""
    try:
        header, touches = _decode(MAGIC, content)
        texts, numbers = ("blob", "node"), ("job", "restart", "made_ns", "blocks", "block_bytes")
        if not all(isinstance(header[key], str) and len(header[key]) <= 256 for key in texts):
            raise ValueError("a name is no text, or too long")
        if not all(type(header[key]) is int and 0 <= header[key] < 2**63 for key in numbers):
            raise ValueError("a value is not a natural number")
        if type(header["partial"]) is not bool or header["ended"] not in ENDED:
            raise ValueError("it does not say how it was recorded")
        values = {key: header[key] for key in (*texts, *numbers, "partial", "ended")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"trace cannot be used: {error}") from error
    return Trace(**values, touches=touches)


def decode_plan(content: bytes, *, blocks: int) -> Plan:
    """The plan that a user's process made, for a blob of so many blocks.

    Raises IntegrityError: the process is the user's.
    """
    try:
        header, touches = _decode(PLAN_MAGIC, content)
        full_starts = header["full_starts"]
        if type(full_starts) is not int or not 0 <= full_starts <= STARTS:
            raise ValueError("its number of starts is wrong")
        if any(block >= blocks for block, _ in touches):
            raise ValueError("it names a block that the blob does not have")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"plan cannot be used: {error}") from error
    return Plan(tuple(block for block, _ in touches), tuple(at_ms for _, at_ms in touches), full_starts)


def merge(traces: Iterable[Trace], *, blocks: int, block_bytes: int, now_ns: int) -> Plan:
    """The plan for a blob of so many blocks.

    Of the last STARTS starts with full traces, and of as many with partial ones: the blocks in at least half
    of the full traces, and those in at least half of all traces, by the median of their first touch, in full
    traces where there are any. No block at all when the last start with full traces read none. Traces older
    than 30 days, of another block size, or of a file of quite another size are left out.
    """
    usable = [
        trace
        for trace in traces
        if trace.block_bytes == block_bytes
        and abs(trace.blocks - blocks) <= 1 + _ALIKE * blocks
        and now_ns - trace.made_ns <= MAX_AGE_S * 10**9
    ]
    full, full_starts = _latest(trace for trace in usable if not trace.partial)
    partial, _ = _latest(trace for trace in usable if trace.partial)
    if full and not any(trace.touches for trace in full if trace.start == full[-1].start):
        return Plan(full_starts=full_starts)
    in_full, in_partial = _times_ms(full), _times_ms(partial)
    hot = []
    for block in in_full | in_partial:
        full_ms, partial_ms = in_full.get(block, []), in_partial.get(block, [])
        often = full and 2 * len(full_ms) >= len(full)
        often = often or 2 * (len(full_ms) + len(partial_ms)) >= len(full) + len(partial)
        if block < blocks and often:
            hot.append((int(statistics.median(full_ms or partial_ms)), block))
    hot.sort()
    del hot[MAX_TOUCHES:]
    return Plan(tuple(block for _, block in hot), tuple(at_ms for at_ms, _ in hot), full_starts)


def _times_ms(traces: Iterable[Trace]) -> dict[int, list[int]]:
    """When each block was touched."""
    times_ms: defaultdict[int, list[int]] = defaultdict(list)
    for trace in traces:
        for block, at_ms in trace.touches:
            times_ms[block].append(at_ms)
    return times_ms


def _latest(traces: Iterable[Trace]) -> tuple[list[Trace], int]:
    """The traces of the last STARTS starts, and how many starts these are."""
    starts: defaultdict[tuple[int, int], list[Trace]] = defaultdict(list)
    for trace in traces:
        starts[trace.start].append(trace)
    latest = sorted(starts.values(), key=lambda each: max(trace.made_ns for trace in each))[-STARTS:]
    return [trace for each in latest for trace in each], len(latest)


def trace_folder(uid: int, job_class: str, blob_id: str) -> str:
    """Where in the store a class's traces of a blob lie."""
    return f"{traces_folder(uid)}/{job_class}/{blob_id}"


def traces_folder(uid: int) -> str:
    """Where in the store a user's traces lie, a folder for each job class."""
    return f"{user_folder(uid)}/traces"


def trace_name(trace: Trace) -> str:
    """The name of its file."""
    return f"{trace.job}.{trace.restart}.{trace.node}{_PARTIAL if trace.partial else ''}"


def surplus(names: Sequence[str]) -> list[str]:
    """Which of a folder's trace files, given from the oldest to the newest, are not needed any more.

    Kept are STARTS starts of full and of partial traces each, and NODES traces of a start.
    """
    left: list[str] = []
    for partial in (False, True):
        starts: dict[str, int] = {}
        for name in reversed([name for name in names if name.endswith(_PARTIAL) == partial]):
            start = ".".join(name.split(".", 2)[:2])
            if start in starts or len(starts) < STARTS:
                starts[start] = starts.get(start, 0) + 1
            if starts.get(start, NODES + 1) > NODES:
                left.append(name)
    return left


def _encode(magic: bytes, header: dict[str, Any], touches: tuple[tuple[int, int], ...]) -> bytes:
    line = json.dumps({**header, "count": len(touches)}, sort_keys=True).encode()
    numbers = array("I", [block for block, _ in touches])
    numbers.extend(at_ms for _, at_ms in touches)
    if sys.byteorder == "big":
        numbers.byteswap()
    content = magic + line + b"\n" + numbers.tobytes()
    return content + hashlib.sha256(content).digest()


def _decode(magic: bytes, content: bytes) -> tuple[Any, tuple[tuple[int, int], ...]]:
    """The line and the touches. Raises ValueError, KeyError, TypeError or RecursionError."""
    if len(content) > LIMIT_BYTES or not content.startswith(magic):
        raise ValueError("not one of this version")
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("it is damaged")
    end = body.find(b"\n", 0, len(magic) + _HEADER_LIMIT_BYTES)
    if end < 0:
        raise ValueError("its line does not end")
    header = json.loads(body[len(magic) : end])
    count = header["count"]
    if type(count) is not int or len(body) - end - 1 != 2 * _NUMBER_BYTES * count:
        raise ValueError("it does not hold what it says")
    numbers = array("I", body[end + 1 :])
    if sys.byteorder == "big":
        numbers.byteswap()
    if len(set(numbers[:count])) != count:
        raise ValueError("a block is in it twice")
    return header, tuple(zip(numbers[:count], numbers[count:], strict=True))
