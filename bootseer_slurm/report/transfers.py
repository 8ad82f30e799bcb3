"""What each node fetched and read of each image, environment or checkpoint. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bootseer_slurm.events import Event
from bootseer_slurm.report.collect import NodeEvents

_LEAST_S = 1e-6  # nothing is fetched in less


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one node fetched and read of one thing. None: no event says so."""

    node: str
    what: str
    target: str
    size_bytes: int | None
    fetched_bytes: int | None
    cached_bytes: int | None
    dur_s: float | None  # of the prefetch, until it ended or was stopped
    in_time: bool | None  # the prefetch had ended when training began on this node
    reads: int | None
    read_bytes: int
    hit_bytes: int
    miss_bytes: int
    blocked_s: float
    origin_bytes: int | None = None  # of what was fetched: from the original, not from the store

    @property
    def store_bytes(self) -> int | None:
        """Of what was fetched: from the store."""
        return None if self.fetched_bytes is None else max(0, self.fetched_bytes - (self.origin_bytes or 0))

    @property
    def rate(self) -> float | None:
        """Bytes a second fetched; None when nothing was."""
        if not self.fetched_bytes or not self.dur_s or self.dur_s < _LEAST_S:
            return None
        return self.fetched_bytes / self.dur_s


def transfers(sent: NodeEvents, trained_ns: int | None) -> list[Transfer]:
    """One row for each thing that this node prefetched or read."""
    groups: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in sent.events:
        if event.kind in ("prefetch", "access") and event.target is not None:
            groups[(event.what or "", event.target)].append(event)
    return [_transfer(sent.node, *key, events, trained_ns) for key, events in groups.items()]


def _transfer(node: str, what: str, target: str, events: list[Event], trained_ns: int | None) -> Transfer:
    begin = next((event for event in events if (event.kind, event.name) == ("prefetch", "begin")), None)
    ends = [event for event in events if event.kind == "prefetch" and event.name in ("end", "stopped")]
    # The summaries are of the whole job; where a node died, what it told at the end of its start is left.
    reads = [event for event in events if (event.kind, event.name) == ("access", "summary")]
    reads = reads or [event for event in events if event.kind == "access"]
    planned = begin is not None or bool(ends)
    return Transfer(
        node=node,
        what=what,
        target=target,
        size_bytes=begin.bytes if begin else None,
        fetched_bytes=sum(event.bytes or 0 for event in ends) if ends else None,
        cached_bytes=int(ends[0].number("bytes_cached")) if ends else None,
        dur_s=sum(event.dur_s or 0.0 for event in ends) if ends else None,
        in_time=_in_time(events, trained_ns) if planned and trained_ns is not None else None,
        reads=sum(int(event.number("reads")) for event in reads) if reads else None,
        read_bytes=sum(int(event.number("read_bytes")) for event in reads),
        hit_bytes=sum(int(event.number("hit_bytes")) for event in reads),
        miss_bytes=sum(int(event.number("miss_bytes")) for event in reads),
        blocked_s=sum(event.number("blocked_s") for event in reads),
        origin_bytes=_origin_bytes(ends),
    )


def _origin_bytes(ends: Sequence[Event]) -> int | None:
    """Of what was fetched, how much came from the original."""
    if not ends:
        return None
    return sum(
        int(event.number("bytes_origin"))
        if "bytes_origin" in event.extra
        else (event.bytes or 0) * (event.source == "origin")
        for event in ends
    )


def _in_time(events: Sequence[Event], trained_ns: int) -> bool:
    """Whether all that the start needs was there: what is hot, where that is known, else the whole."""
    there = [event for event in events if event.kind == "prefetch" and event.name in ("hot", "end")]
    return any(event.t_ns <= trained_ns for event in there)
