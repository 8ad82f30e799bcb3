"""Bytes that each node fetched and read of each image, environment or checkpoint. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bootseer_slurm.events import Event
from bootseer_slurm.report.gather.run import NodeEvents
from bootseer_slurm.report.startup.stages import first

TOLERATED = 0.01  # of a node's start: who waits no longer for a thing has it in time
_LEAST_S = 1e-6  # nothing is fetched in less
_WAITS = ("waited_s", "longest_wait_s")  # fields of the event


@dataclass(frozen=True, slots=True)
class Transfer:  # size: a row of the report, as docs/report.md lists it
    """Bytes and waits of one thing on one node. None: no event says so."""

    node: str
    what: str
    target: str
    size_bytes: int | None
    fetched_bytes: int | None
    cached_bytes: int | None
    dur_s: float | None  # of the prefetch, until it ended or was stopped
    in_time: bool | None  # no read of the start, nor all of them together, waited longer than TOLERATED of it
    reads: int | None
    read_bytes: int
    hit_bytes: int
    miss_bytes: int
    blocked_s: float  # in the whole job, added up over reads that waited side by side
    origin_bytes: int | None = None  # of what was fetched: from the original
    peer_bytes: int | None = None  # of what was fetched: from other nodes of the job
    waited_s: float | None = None  # in the start: the time in which at least one read waited
    longest_wait_s: float | None = None  # in the start: of a single read
    start_s: float | None = None  # of this node

    @property
    def store_bytes(self) -> int | None:
        """Of what was fetched: from the store."""
        if self.fetched_bytes is None:
            return None
        return max(0, self.fetched_bytes - (self.origin_bytes or 0) - (self.peer_bytes or 0))

    @property
    def waited_share(self) -> float | None:
        """In how much of this node's start at least one read waited."""
        return None if self.waited_s is None or not self.start_s else self.waited_s / self.start_s

    @property
    def rate(self) -> float | None:
        """Bytes a second fetched; None when nothing was."""
        if not self.fetched_bytes or not self.dur_s or self.dur_s < _LEAST_S:
            return None
        return self.fetched_bytes / self.dur_s


def transfers(sent: NodeEvents, start_s: float | None) -> list[Transfer]:
    """One row for each thing that this node prefetched or read.

    start_s: how long the start took on this node; None when that is not known.
    """
    groups: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in sent.events:
        if event.kind in ("prefetch", "access") and event.target is not None:
            groups[(event.what or "", event.target)].append(event)
    restarted_ns = first(sent.events, "fault", "agent_restarted")
    return [
        _transfer(sent.node, *key, events, start_s, _waits(events, restarted_ns))
        for key, events in groups.items()
    ]


def store_copies(rows: Sequence[Transfer]) -> float | None:
    """The number of copies that all nodes together read from the store; None where nobody can say.

    A copy of a target is the most that one node fetched of it. The nodes together may have lacked more than
    that, if their caches held different parts. Then the number is too high.
    """
    if len({row.node for row in rows}) < 2:
        return None
    groups: dict[tuple[str, str], list[Transfer]] = defaultdict(list)
    for row in rows:
        groups[(row.what, row.target)].append(row)
    copy_bytes = from_store = 0
    for group in groups.values():
        told = [row.fetched_bytes for row in group if row.fetched_bytes is not None]
        if told and len(told) < len(group):
            return None
        if not told or any(row.origin_bytes for row in group):
            continue  # what came from the original is a part of a copy, too
        copy_bytes += max(told)
        from_store += sum(row.store_bytes or 0 for row in group)
    return from_store / copy_bytes if copy_bytes else None


class _Waits(NamedTuple):
    """How long reads of the start waited; None: not known."""

    waited_s: float | None = None
    longest_s: float | None = None


def _waits(events: Sequence[Event], restarted_ns: int | None) -> _Waits:
    """The waits that the node told at the end of its start. Agents before this figure did not tell.

    An agent that is started again in a start does not know what reads had waited before.
    """
    told = [
        event
        for event in events
        if (event.kind, event.name) == ("access", "start")
        and (restarted_ns is None or event.t_ns < restarted_ns)
    ]
    if not told or any(not isinstance(event.extra.get(key), int | float) for event in told for key in _WAITS):
        return _Waits()
    waited_s, longest_s = ([max(0.0, event.number(key)) for event in told] for key in _WAITS)
    return _Waits(sum(waited_s), max(longest_s))


def _transfer(
    node: str, what: str, target: str, events: list[Event], start_s: float | None, waits: _Waits
) -> Transfer:
    begin = next((event for event in events if (event.kind, event.name) == ("prefetch", "begin")), None)
    ends = [event for event in events if event.kind == "prefetch" and event.name in ("end", "stopped")]
    # The summaries are of the whole job; where a node died, what it told at the end of its start is left.
    reads = [event for event in events if (event.kind, event.name) == ("access", "summary")]
    reads = reads or [event for event in events if event.kind == "access"]
    waited_s, longest_s = waits
    if waited_s is not None and start_s is not None:
        waited_s = min(waited_s, start_s)  # where training began before the node saw it
    return Transfer(
        node=node,
        what=what,
        target=target,
        size_bytes=begin.bytes if begin else None,
        fetched_bytes=sum(event.bytes or 0 for event in ends) if ends else None,
        cached_bytes=int(ends[0].number("bytes_cached")) if ends else None,
        dur_s=sum(event.dur_s or 0.0 for event in ends) if ends else None,
        in_time=None if waited_s is None or start_s is None else waited_s <= TOLERATED * start_s,
        reads=sum(int(event.number("reads")) for event in reads) if reads else None,
        read_bytes=sum(int(event.number("read_bytes")) for event in reads),
        hit_bytes=sum(int(event.number("hit_bytes")) for event in reads),
        miss_bytes=sum(int(event.number("miss_bytes")) for event in reads),
        blocked_s=sum(event.number("blocked_s") for event in reads),
        origin_bytes=_bytes_from("origin", "bytes_origin", ends),
        peer_bytes=_bytes_from("peers", "bytes_peers", ends),
        waited_s=waited_s,
        longest_wait_s=longest_s,
        start_s=start_s,
    )


def _bytes_from(source: str, key: str, ends: Sequence[Event]) -> int | None:
    """Of what was fetched, how much came from this source. Agents before the field told one source of all."""
    if not ends:
        return None
    return sum(
        max(0, int(event.number(key)))
        if key in event.extra
        else (event.bytes or 0) * (event.source == source)
        for event in ends
    )
