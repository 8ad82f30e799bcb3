"""Stage records of a job's start: one Event, its line of JSON, and the log that a node keeps for a job.

Owns the format (docs/events.md) and its checks. It does not decide what is recorded (agent) or what it
means (report). Events of a job lie in a folder that the job's user may write, so every line read is treated
as hostile: `parse_line` checks types and ranges and removes what could disturb a terminal.

All stamps are CLOCK_REALTIME in ns since the epoch. Layout in the store, one file per node:
    users/<uid>/events/<job>.<restart>/<node>.jsonl

kind      name                      fields beside t_ns, job, restart, node
hook      begin, received, epilog   the prolog as seen on the node; begin is stamped as the hook starts
session   begin, end                uid, user, nodelist, mode ("prefetch" | "observe"), partition, job_name
          mode                      mode: a job that the site only observed asked for more in a step
step      attach, task_start        step; task_start also task
prefetch  begin, end                target, what; begin: bytes = size of the blob;
                                    end: bytes = fetched, of these bytes_origin not from the store,
                                    bytes_cached = there already, dur_s
          hot                       target, what, bytes, blocks, dur_s: all that the plan names is there
plan      learned                   target, what: asked for by the last start of this job class
          not_used                  target, what, message: it was learned, and cannot be used any more
          unread                    target, what, message: not brought, for the last start did not read it
          located                   target, what; message: the newest checkpoint in that folder, and why
snapshot  saved, failed             target, what, dur_s; message
          packed, kept              the same; it was, or could not be, packed again in the order of touch
shadow    shown, skipped, failed    target, what; message = why
image     get                       target, what: pyxis's importer first asked for a container's image
access    summary                   target, what, reads, reads_blocked, read_bytes, hit_bytes,
                                    miss_bytes, pushed_bytes,
                                    waited_s = time in which at least one read waited for blocks,
                                    longest_wait_s = the longest wait of a single read,
                                    blocked_s = the waits of all reads, added up, first_ns, last_ns,
                                    cached_bytes = there before, store_bytes and origin_bytes = fetched,
                                    fetch_s and disk_s = what reading and keeping them took, over all streams
          start                     the same, when the start was over; of waits those until training began
load      start                     dur_s of the start; cpu_s, io_s, memory_s: in how much of it a task of the
                                    node waited for that (PSI)
training  gpu, io                   since when a GPU was busy; when the last new thing was read
clock     store                     offset_ms = how far this node's clock is ahead of the store's; error_ms
mark      <name>                    step, task; image_loaded, environment_loaded, checkpoint_loaded and
                                    training_started have a meaning to the report
fault     <short name>              level, message; the report shows it to the user

`what` is "image", "environment" or "checkpoint". `target` is the path as the user named it; of the snapshot
that lies below a layer it ends in BELOW_LAYER.
EventLog may be used from several threads; everything else here is pure.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bootseer_slurm.errors import InputError

log = logging.getLogger(__name__)

VERSION = 1
MAX_LINE = 128 * 1024
_MAX_TEXT = 16 * 1024
_MAX_MESSAGE = 1000
_MAX_EXTRA = 32
_MAX_INTEGER = (1 << 63) - 1
_MAX_DURATION_S = 1e9

Scalar = str | int | float

BELOW_LAYER = ", below its layer"

_KIND = re.compile(r"[a-z_]{1,32}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NODE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")
_STEP = re.compile(r"[A-Za-z0-9_.+-]{1,32}")
_WORD = re.compile(r"[a-z]{1,32}")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,31}")
_LEVELS = ("info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened on one node for one job. The module's docstring lists kinds and fields."""

    t_ns: int
    job: int
    restart: int
    node: str
    kind: str
    name: str
    level: str = "info"
    step: str | None = None
    task: int | None = None
    target: str | None = None
    what: str | None = None
    bytes: int | None = None
    dur_s: float | None = None
    source: str | None = None
    message: str | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)

    def to_json(self) -> str:
        """The event as one line of ASCII JSON, without the line's end."""
        record: dict[str, object] = {"v": VERSION}
        for key in _FIELDS:
            value = getattr(self, key)
            if value is not None and not (key == "level" and value == "info"):
                record[key] = value
        record.update((key, value) for key, value in self.extra.items() if key not in record)
        return json.dumps(record, separators=(",", ":"), allow_nan=False)

    def number(self, key: str) -> float:
        """The extra field as a number that fits 64 bits; 0 when it is absent or no number."""
        value = self.extra.get(key, 0)
        # A user may write 1e308: sums of such are no numbers any more.
        return max(-_MAX_INTEGER, min(value, _MAX_INTEGER)) if isinstance(value, int | float) else 0


_FIELDS = tuple(name for name in Event.__slots__ if name != "extra")


def parse_line(line: str) -> Event:
    """The event of one line of JSON.

    Texts are cut to a sane length and freed of control characters; unknown fields are kept if scalar.
    Raises InputError when the line is no event. Never raises anything else.
    """
    if len(line) > MAX_LINE:
        raise InputError(f"event line of {len(line)} characters is longer than {MAX_LINE}")
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"event line is no JSON: {type(error).__name__}") from None
    if not isinstance(record, dict):
        raise InputError("event line is no JSON object")
    version = record.pop("v", None)
    if type(version) is not int or version != VERSION:
        raise InputError("event line has another version than 1")
    return _checked(record)


def read_events(lines: Iterable[str]) -> tuple[list[Event], int]:
    """The events of these lines in order, and how many lines are no events. Empty lines do not count."""
    events: list[Event] = []
    bad_count = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            events.append(parse_line(line))
        except InputError:
            bad_count += 1
    return events, bad_count


class EventLog:
    """The events of one job on one node: in memory, and in a local file when a path is given.

    A log whose file exists goes on where it ended: an agent that was restarted keeps a live job's events.
    Thread-safe. A full disk costs the file, never the caller: events stay in memory, one warning is logged.
    """

    # A job may mark, and have steps, as often as it likes; the rest comes a bounded number of times.
    MAX_USER_EVENTS = 20_000
    _USER_KINDS = frozenset({"mark", "step", "shadow"})

    def __init__(self, job: int, restart: int, node: str, *, path: Path | None = None) -> None:
        self.job = job
        self.restart = restart
        self.node = node
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._fd: int | None = None
        if path is not None:
            self._open(path)
        self._user_count = sum(event.kind in self._USER_KINDS for event in self._events)
        self._full_noted = self._user_count > self.MAX_USER_EVENTS

    def emit(self, kind: str, name: str, *, t_ns: int | None = None, **fields: Scalar | None) -> Event:
        """Record an event now, or at t_ns. Fields that are None are left out.

        Raises InputError when a field has a value that `parse_line` would refuse.
        """
        given = {key: value for key, value in fields.items() if value is not None}
        given.update(job=self.job, restart=self.restart, node=self.node, kind=kind, name=name)
        given["t_ns"] = time.time_ns() if t_ns is None else t_ns
        event = _checked(given)
        with self._lock:
            if kind in self._USER_KINDS:
                self._user_count += 1
                if self._user_count > self.MAX_USER_EVENTS:
                    self._note_full()
                    return event
            self._append(event)
        return event

    def events(self) -> list[Event]:
        """A copy of what was recorded so far, in order of recording."""
        with self._lock:
            return list(self._events)

    def to_jsonl(self) -> str:
        """All events as lines of JSON, each with its line's end."""
        return "".join(f"{event.to_json()}\n" for event in self.events())

    def close(self) -> None:
        """Close the file. Events in memory stay readable; later ones are kept in memory only."""
        with self._lock:
            self._close_file()

    def _open(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)
            text = path.read_text("utf-8", errors="replace")
            self._events, _ = read_events(text.split("\n"))
            if text and not text.endswith("\n"):
                os.write(self._fd, b"\n")  # the last writer was killed in the middle of a line
        except OSError as error:
            log.warning("job=%d events stay in memory, file %s: %s", self.job, path, error)
            self._close_file()

    def _append(self, event: Event) -> None:
        self._events.append(event)
        if self._fd is None:
            return
        line = f"{event.to_json()}\n".encode("ascii")
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError("the line was written in part only")
        except OSError as error:
            log.warning("job=%d events stay in memory from now on: %s", self.job, error)
            self._close_file()

    def _close_file(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _note_full(self) -> None:
        if self._full_noted:
            return
        self._full_noted = True
        record = {
            "t_ns": time.time_ns(),
            "job": self.job,
            "restart": self.restart,
            "node": self.node,
            "kind": "fault",
            "name": "too_many_events",
            "level": "warning",
            "message": f"marks, steps, shadows: of these {self.MAX_USER_EVENTS} are kept of a node",
        }
        self._append(_checked(record))


def _checked(record: Mapping[str, object]) -> Event:
    """The event of these fields. Raises InputError when one is missing or not what it should be."""
    known: dict[str, object] = {}
    extra: dict[str, Scalar] = {}
    for key, value in record.items():
        if value is None:
            continue
        if key in _CHECKS:
            known[key] = _CHECKS[key](key, value)
        elif _KEY.fullmatch(key) and len(extra) < _MAX_EXTRA:
            scalar = _scalar(value)
            if scalar is not None:
                extra[key] = scalar
    missing = [key for key in ("t_ns", "job", "restart", "node", "kind", "name") if key not in known]
    if missing:
        raise InputError(f"event has no {', '.join(missing)}")
    return Event(**known, extra=extra)  # type: ignore[arg-type]  # each value went through its check


def _integer(largest: int) -> Callable[[str, object], int]:
    def check(key: str, value: object) -> int:
        if type(value) is not int or not 0 <= value <= largest:
            raise InputError(f"event field {key} is no integer from 0 to {largest}")
        return value

    return check


def _text(pattern: re.Pattern[str]) -> Callable[[str, object], str]:
    def check(key: str, value: object) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise InputError(f"event field {key} is not of the form {pattern.pattern}")
        return value

    return check


def _prose(largest: int) -> Callable[[str, object], str]:
    def check(key: str, value: object) -> str:
        if not isinstance(value, str):
            raise InputError(f"event field {key} is no text")
        return _clean(value, largest)

    return check


def _level(key: str, value: object) -> str:
    if value not in _LEVELS:
        raise InputError(f"event field {key} is none of {', '.join(_LEVELS)}")
    return str(value)


def _duration(key: str, value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value <= _MAX_DURATION_S:  # type: ignore[operator]
        raise InputError(f"event field {key} is no number of seconds")
    return float(value)  # type: ignore[arg-type]


def _scalar(value: object) -> Scalar | None:
    """The value as an extra field keeps it; None for what is not kept."""
    if isinstance(value, str):
        return _clean(value, _MAX_TEXT)
    if isinstance(value, int):
        return int(value) if abs(value) <= _MAX_INTEGER else None
    if isinstance(value, float) and math.isfinite(value):
        return value
    return None


def _clean(text: str, largest: int) -> str:
    """Text that a terminal prints as one line: no control, format, surrogate or line separator characters."""
    text = text[:largest]
    if text.isascii() and text.isprintable():
        return text
    return "".join(" " if unicodedata.category(c) in _UNPRINTABLE else c for c in text).strip()


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_CHECKS: dict[str, Callable[[str, object], Scalar]] = {
    "t_ns": _integer(_MAX_INTEGER),
    "job": _integer((1 << 32) - 1),
    "restart": _integer(1_000_000),
    "node": _text(NODE_NAME),
    "kind": _text(_KIND),
    "name": _text(_NAME),
    "level": _level,
    "step": _text(_STEP),
    "task": _integer((1 << 32) - 1),
    "target": _prose(4096),
    "what": _text(_WORD),
    "bytes": _integer(_MAX_INTEGER),
    "dur_s": _duration,
    "source": _text(_WORD),
    "message": _prose(_MAX_MESSAGE),
}
