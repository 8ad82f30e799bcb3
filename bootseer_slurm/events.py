"""Stage records of a job's start: one Event, its line of JSON, and the log that a node keeps for a job.

Owns the format of a line (docs/events.md). The agent decides when an event is recorded, the report what it
means. Events of a job lie in a folder that the job's user may write, so every line read is treated
as hostile: `parse_line` checks types and ranges and removes characters that could disturb a terminal.

All stamps are CLOCK_REALTIME in ns since the epoch. Layout in the store, one file per node:
    users/<uid>/events/<job>.<restart>/<node>.jsonl

The events and their fields are those of event_table.py. `target` is the path as the user named it; of the
snapshot that lies below a layer it ends in BELOW_LAYER.
EventLog may be used from several threads; everything else here is pure.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bootseer_slurm.errors import InputError
from bootseer_slurm.event_table import COMMON, FIELDS, MAX_INTEGER, Scalar, scalar, unlisted

log = logging.getLogger(__name__)

VERSION = 1
MAX_LINE = 128 * 1024
_MAX_EXTRA = 32

_KEY = re.compile(r"[a-z][a-z0-9_]{0,31}")
BELOW_LAYER = ", below its layer"


@dataclass(frozen=True, slots=True)
class Event:  # size: one line of the format, an attribute for each field that several events have
    """One event on one node, of one job. extra: its fields that are no attributes."""

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
        for key in _ATTRIBUTES:
            value = getattr(self, key)
            if value is not None and not (key == "level" and value == "info"):
                record[key] = value
        record.update((key, value) for key, value in self.extra.items() if key not in record)
        return json.dumps(record, separators=(",", ":"), allow_nan=False)

    def number(self, key: str) -> float:
        """The extra field as a number that fits 64 bits; 0 when it is absent or no number."""
        value = self.extra.get(key, 0)
        # A user may write 1e308: sums of such are no numbers any more.
        return max(-MAX_INTEGER, min(value, MAX_INTEGER)) if isinstance(value, int | float) else 0


_ATTRIBUTES = tuple(name for name in Event.__slots__ if name != "extra")


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

    # A job may mark, and have steps, as often as it likes: of these together, on a node.
    MAX_USER_EVENTS = 20_000
    _USER_KINDS = frozenset({"mark", "step", "shadow"})
    # Of each other event, and each mark that the report knows: what comes in a loop leaves room for the end.
    MAX_EVENTS_OF_NAME = 1_000
    _KNOWN_MARKS = frozenset(("image_loaded", "environment_loaded", "checkpoint_loaded", "training_started"))

    def __init__(self, job: int, restart: int, node: str, *, path: Path | None = None) -> None:
        self.job = job
        self.restart = restart
        self.node = node
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._fd: int | None = None
        if path is not None:
            self._open(path)
        self._counts = Counter(self._counted_as(event.kind, event.name) for event in self._events)

    def emit(self, kind: str, name: str, *, t_ns: int | None = None, **fields: Scalar | None) -> bool:
        """Record an event now, or at t_ns. Fields that are None are left out. False where there are too many.

        Raises InputError when a field has a value that `parse_line` would refuse. An event or a field that is
        not in the table is a bug of the caller: it is logged, and recorded all the same.
        """
        if more := unlisted(kind, name, fields):
            log.error("job=%d not in the table of events: %s", self.job, more)
        given = {key: value for key, value in fields.items() if value is not None}
        given.update(job=self.job, restart=self.restart, node=self.node, kind=kind, name=name)
        given["t_ns"] = time.time_ns() if t_ns is None else t_ns
        event = _checked(given)
        with self._lock:
            counted_as = self._counted_as(kind, name)
            most = self.MAX_EVENTS_OF_NAME if counted_as else self.MAX_USER_EVENTS
            self._counts[counted_as] += 1
            if self._counts[counted_as] > most + 1:
                return False
            if self._counts[counted_as] > most:
                self._note_full(counted_as or "marks, steps, shadows", most)
                return False
            self._append(event)
        return True

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

    @classmethod
    def _counted_as(cls, kind: str, name: str) -> str:
        """The events that this one is counted with; "": all that a job makes as it likes."""
        is_users = kind in cls._USER_KINDS and name not in cls._KNOWN_MARKS
        return "" if is_users else f"{kind} {name}"

    def _note_full(self, what: str, most: int) -> None:
        record = {
            "t_ns": time.time_ns(),
            "job": self.job,
            "restart": self.restart,
            "node": self.node,
            "kind": "fault",
            "name": "too_many_events",
            "level": "warning",
            "message": f"{what}: of these {most} are kept of a node",
        }
        self._append(_checked(record))


def _checked(record: Mapping[str, object]) -> Event:
    """The event of these fields. Raises InputError when one is missing or not what it should be."""
    known: dict[str, object] = {}
    extra: dict[str, Scalar] = {}
    for key, value in record.items():
        if value is None:
            continue
        if key in _ATTRIBUTES:
            known[key] = FIELDS[key].check(key, value)
        elif _KEY.fullmatch(key) and len(extra) < _MAX_EXTRA:
            kept = _extra(key, value)
            if kept is not None:
                extra[key] = kept
    missing = [field.key for field in COMMON if field.key not in known]
    if missing:
        raise InputError(f"event has no {', '.join(missing)}")
    return Event(**known, extra=extra)  # type: ignore[arg-type]  # each value went through its check


def _extra(key: str, value: object) -> Scalar | None:
    """The value of a field that is no attribute; None where it is of another type, or no scalar."""
    if key not in FIELDS:
        return scalar(value)
    try:
        return FIELDS[key].check(key, value)
    except InputError:
        return None


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")
