"""The table of events: every event that a node may record, its fields, and what a value of each must be.

The writer (events.EventLog.emit), the reader (events.parse_line) and docs/events.md use this table, and tests
compare all three. A node may be newer than the reader: `parse_line` keeps events and fields that the table
lacks. A writer that records such a one is a bug, which tests find; in production it costs a line of the log.

Lines of events are hostile: a job's user may write them. The checks here bound every value, and remove
characters that could disturb a terminal. Pure.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from bootseer_slurm.errors import InputError

Scalar = str | int | float

MAX_INTEGER = (1 << 63) - 1
MAX_MESSAGE = 1000  # characters; the rest is cut off
NODE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")
ANY = "*"  # the name of an event that is not one of a few
_MAX_TEXT = 16 * 1024
_MAX_PATH = 4096
_MAX_DURATION_S = 1e9
_KIND = re.compile(r"[a-z_]{1,32}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_STEP = re.compile(r"[A-Za-z0-9_.+-]{1,32}")
_WORD = re.compile(r"[a-z]{1,32}")
_LEVELS = ("info", "warning", "error")
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

Check = Callable[[str, object], Scalar]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an event. check: gives the value as it is kept, raises InputError when it is none.

    unit: of a number, "" where it counts or names something. meaning: may differ from event to event.
    """

    key: str
    type: str  # "integer", "number" or "text"
    unit: str
    meaning: str
    check: Check

    def meaning_here(self, meaning: str) -> Field:
        """The same field, with what it means in one event."""
        return replace(self, meaning=meaning)


@dataclass(frozen=True, slots=True)
class EventType:
    """One event. fields: those that may stand in it, beside those of every event."""

    kind: str
    name: str  # or ANY
    meaning: str
    fields: tuple[Field, ...] = ()


def scalar(value: object) -> Scalar | None:
    """A value that the table does not know, as it is kept; None for one that is not kept."""
    if isinstance(value, str):
        return _clean(value, _MAX_TEXT)
    if isinstance(value, int):
        return int(value) if abs(value) <= MAX_INTEGER else None
    if isinstance(value, float) and math.isfinite(value):
        return value
    return None


def unlisted(kind: str, name: str, keys: Iterable[str]) -> str:
    """The part of an event that the table lacks, in words: itself, or fields; "" when it has all."""
    event = EVENTS.get((kind, name)) or EVENTS.get((kind, ANY))
    if event is None:
        return f"event {kind} {name}"
    known = {field.key for field in (*COMMON, *event.fields)}
    more = ", ".join(sorted(key for key in keys if key not in known))
    return f"event {kind} {name}: {more}" if more else ""


def _integer(largest: int) -> Check:
    def check(key: str, value: object) -> int:
        if type(value) is not int or not 0 <= value <= largest:
            raise InputError(f"event field {key} is no integer from 0 to {largest}")
        return value

    return check


def _number(key: str, value: object) -> int | float:
    known = None if isinstance(value, str) else scalar(value)
    if not isinstance(known, int | float):
        raise InputError(f"event field {key} is no number")
    return known


def _duration(key: str, value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value <= _MAX_DURATION_S:  # type: ignore[operator]
        raise InputError(f"event field {key} is no number of seconds")
    return float(value)  # type: ignore[arg-type]


def _text(pattern: re.Pattern[str]) -> Check:
    def check(key: str, value: object) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise InputError(f"event field {key} is not of the form {pattern.pattern}")
        return value

    return check


def _prose(largest: int) -> Check:
    def check(key: str, value: object) -> str:
        if not isinstance(value, str):
            raise InputError(f"event field {key} is no text")
        return _clean(value, largest)

    return check


def _nodelist(key: str, value: object) -> str:
    """A list that is whole: one that is cut reads as the list of fewer nodes."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise InputError(f"event field {key} is no text of at most {_MAX_TEXT} characters")
    return _clean(value, _MAX_TEXT)


def _level(key: str, value: object) -> str:
    if value not in _LEVELS:
        raise InputError(f"event field {key} is none of {', '.join(_LEVELS)}")
    return str(value)


def _clean(text: str, largest: int) -> str:
    """Text that a terminal prints as one line: no control, format, surrogate or line separator characters."""
    text = text[:largest]
    if text.isascii() and text.isprintable():
        return text
    return "".join(" " if unicodedata.category(c) in _UNPRINTABLE else c for c in text).strip()


def _count(key: str, meaning: str) -> Field:
    return Field(key, "integer", "", meaning, _number)


def _bytes(key: str, meaning: str) -> Field:
    return Field(key, "integer", "bytes", meaning, _number)


def _seconds(key: str, meaning: str) -> Field:
    return Field(key, "number", "s", meaning, _number)


def _words(key: str, meaning: str) -> Field:
    return Field(key, "text", "", meaning, _prose(_MAX_TEXT))


COMMON = (
    Field("t_ns", "integer", "ns since the epoch", "CLOCK_REALTIME of the node", _integer(MAX_INTEGER)),
    Field("job", "integer", "", "the job, as SLURM_JOB_ID", _integer((1 << 32) - 1)),
    Field("restart", "integer", "", "which run of the job", _integer(1_000_000)),
    Field("node", "text", "", "Slurm's name of the node, as in the file's name", _text(NODE_NAME)),
    Field("kind", "text", "", "the kind of event, see below", _text(_KIND)),
    Field("name", "text", "", "the event, see below", _text(_NAME)),
)

_LEVEL = Field("level", "text", "", "`info` (when absent), `warning`, `error`", _level)
_IN_STEP = Field("step", "text", "", "`0`, `batch`, `extern`, `interactive`", _text(_STEP))
_TASK = Field("task", "integer", "", "SLURM_PROCID", _integer((1 << 32) - 1))
_TARGET = Field(
    "target",
    "text",
    "",
    "the path, as the user named it; a snapshot below a layer has “, below its layer” behind it",
    _prose(_MAX_PATH),
)
_WHAT = Field("what", "text", "", "`image`, `environment`, `checkpoint`", _text(_WORD))
_BYTES = Field("bytes", "integer", "bytes", "see the events", _integer(MAX_INTEGER))
_DUR_S = Field("dur_s", "number", "s", "how long it took", _duration)
_SOURCE = Field(
    "source", "text", "", "`store`, `origin` or `peers`: the first of these that gave bytes", _text(_WORD)
)
_MESSAGE = Field("message", "text", "", "one line for a person", _prose(MAX_MESSAGE))

_UID = _count("uid", "the job's user")
# Each node writes it: of a job with many nodes, accounting has a long one.
_NODELIST = Field(
    "nodelist", "text", "", "the job's nodes, as Slurm writes them; left out above 16 KiB", _nodelist
)
_MODE = _words("mode", "`prefetch` or `observe`")
_PARTITION = _words("partition", "as Slurm has it")
_JOB_NAME = _words("job_name", "as Slurm has it")

_BYTES_CACHED = _bytes("bytes_cached", "in the node's cache before")
_BYTES_ORIGIN = _bytes("bytes_origin", "of those fetched: from the original")
_BYTES_PEERS = _bytes("bytes_peers", "of those fetched: from other nodes of the job")
_BLOCKS = _count("blocks", "blocks that the plan names")

_ACCESS = (
    _TARGET,
    _WHAT,
    _count("reads", "the kernel's reads"),
    _count("reads_blocked", "reads that had to wait"),
    _bytes("read_bytes", "read by the kernel"),
    _bytes("hit_bytes", "of those: there when they were read"),
    _bytes("miss_bytes", "of those: not there yet"),
    _bytes("pushed_bytes", "given to the kernel ahead of its reads"),
    _seconds("waited_s", "in which at least one read waited for blocks: wall time"),
    _seconds("longest_wait_s", "that a single read waited, at most"),
    _seconds("blocked_s", "that all reads waited, added up"),
    Field("first_ns", "integer", "ns since the epoch", "first read since the first step, 0: none", _number),
    Field("last_ns", "integer", "ns since the epoch", "last read", _number),
    _bytes("cached_bytes", "in the node's cache before"),
    _bytes("store_bytes", "fetched from the store"),
    _bytes("origin_bytes", "fetched from the original"),
    _bytes("peer_bytes", "fetched from other nodes of the job"),
    _seconds("fetch_s", "reading what was fetched, summed over streams that run side by side"),
    _seconds("disk_s", "writing it into the cache, summed likewise"),
)

_SUBJECT = (_TARGET, _WHAT)
_SAID = (*_SUBJECT, _MESSAGE)
_BROUGHT = (
    *_SUBJECT, _BYTES.meaning_here("fetched"), _BYTES_CACHED, _BYTES_ORIGIN, _BYTES_PEERS, _DUR_S, _SOURCE,
)  # fmt: skip
_SNAPSHOT = (*_SUBJECT, _DUR_S, _LEVEL, _MESSAGE)
_SHADOW = (*_SUBJECT, _LEVEL, _MESSAGE)

_ROWS = (
    EventType("hook", "begin", "the prolog's hook started on this node"),
    EventType("hook", "received", "the agent had the hook's message"),
    EventType("hook", "epilog", "the job left this node", (_MESSAGE,)),
    EventType("session", "begin", "the agent took the job",
              (_UID, _NODELIST, _MODE, _PARTITION, _JOB_NAME)),
    EventType("session", "mode", "a job that only the site had observed asked for more in a step", (_MODE,)),
    EventType("session", "end", "the agent is done with the job"),
    EventType("step", "attach", "a step came to this node", (_IN_STEP,)),
    EventType("step", "task_start", "a task of it started", (_IN_STEP, _TASK, _MESSAGE)),
    EventType("prefetch", "begin", "the prefetch of a blob began",
              (*_SUBJECT, _BYTES.meaning_here("the blob's size"))),
    EventType("prefetch", "end", "nothing more of it will be brought", _BROUGHT),
    EventType("prefetch", "stopped", "the job was over first", _BROUGHT),
    EventType("prefetch", "hot", "all that earlier starts touched is there",
              (*_SUBJECT, _BYTES.meaning_here("of those blocks"), _BLOCKS, _DUR_S)),
    EventType("plan", "learned", "brought because this job class asked for it at its last start", _SUBJECT),
    EventType("plan", "not_used", "it was learned, and cannot be used any more", _SAID),
    EventType("plan", "unread", "shown, but not brought: the last start of this job class read nothing of it",
              _SAID),
    EventType("plan", "located", "the newest complete checkpoint in the folder that was named, and how it "
              "was found", _SAID),
    EventType("snapshot", "saved", "a snapshot was made in the background, once the start was over: of an "
              "environment without one, or of packages installed to it", _SNAPSHOT),
    EventType("snapshot", "failed", "it could not be made", _SNAPSHOT),
    EventType("snapshot", "packed", "an image or a snapshot was packed again in the background, in the order "
              "in which starts touch it", _SNAPSHOT),
    EventType("snapshot", "kept", "it could not be packed again", _SNAPSHOT),
    EventType("shadow", "shown", "steps see the blob over its original; once for all steps", _SHADOW),
    EventType("shadow", "skipped", "they do not, and why; once for all steps", _SHADOW),
    EventType("shadow", "failed", "it could not be mounted in a step", (*_SHADOW, _IN_STEP)),
    EventType("image", "get", "pyxis's importer asked for a container's image, for the first time", _SUBJECT),
    EventType("access", "start", "the reads of a blob until the start was over", _ACCESS),
    EventType("access", "summary", "the same of the whole job", _ACCESS),
    EventType("peers", "summary", "the job's exchange between its nodes, on this one",
              (_bytes("received_bytes", "from other nodes"), _bytes("sent_bytes", "to other nodes"),
               _count("fallbacks", "units that were read from the store because peers failed"),
               Field("slow", "text", "", "nodes that were slow", _prose(MAX_MESSAGE)),
               Field("banned", "text", "", "nodes that sent wrong bytes", _prose(MAX_MESSAGE)))),
    EventType("load", "start", "in how much of the start some task of the node waited (`some` of "
              "`/proc/pressure`)",
              (_DUR_S.meaning_here("of the start"), _seconds("cpu_s", "waiting for a CPU"),
               _seconds("io_s", "waiting for I/O"), _seconds("memory_s", "waiting for memory"))),
    EventType("training", "gpu", "since then a GPU was busy"),
    EventType("training", "io", "something new was last read, in a start that ended in quiet"),
    EventType("clock", "store", "the node's clock was compared with that of the store's server",
              (Field("offset_ms", "number", "ms", "by which this node's clock is ahead", _number),
               Field("error_ms", "number", "ms", "by which that may be wrong", _number))),
    EventType("mark", ANY, "the job's own mark; the report knows `image_loaded`, `environment_loaded`, "
              "`checkpoint_loaded`, `training_started`", (_IN_STEP, _TASK)),
    EventType("fault", ANY, "something went wrong; the report shows it", (_LEVEL, _MESSAGE)),
)  # fmt: skip

EVENTS = {(each.kind, each.name): each for each in _ROWS}
# In the order of Event's attributes, which come first in a line.
_ATTRIBUTES = (*COMMON, _LEVEL, _IN_STEP, _TASK, _TARGET, _WHAT, _BYTES, _DUR_S, _SOURCE, _MESSAGE)
FIELDS = {field.key: field for field in _ATTRIBUTES}
FIELDS |= {field.key: field for each in _ROWS for field in each.fields if field.key not in FIELDS}
