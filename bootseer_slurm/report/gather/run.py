"""The records of one run of a job, and the interface by which its events are read. No code of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from bootseer_slurm.events import Event
from bootseer_slurm.slurm.jobs import JobRecord


class EventStore(Protocol):
    """Where `gather` finds events. Unknown users, jobs and restarts give empty answers, no errors."""

    def users(self) -> Iterable[int]:
        """The uids that have a folder."""

    def restarts(self, uid: int, job: int) -> Iterable[int]:
        """The restart counts under which this user's job has events."""

    def event_files(self, uid: int, job: int, restart: int) -> Iterable[tuple[str, str]]:
        """(node, text of its file) for each node that sent events."""


@dataclass(frozen=True, slots=True)
class NodeEvents:
    """One node's file: its events in order of time, and how many of its lines are none."""

    node: str
    events: tuple[Event, ...]
    bad_lines: int


@dataclass(frozen=True, slots=True)
class Offset:
    """How far a clock is ahead of that of the store's server, and by how much that may be wrong."""

    ahead_s: float
    error_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job, with all that events and accounting tell of it."""

    job: int
    restart: int
    restarts: tuple[int, ...]  # all that events or accounting know of
    uid: int | None
    record: JobRecord | None
    nodes: tuple[NodeEvents, ...]
    silent_nodes: tuple[str, ...]  # belong to the job, but sent nothing
    notes: tuple[str, ...]  # what a reader must know to trust the figures
    reader_clock: Offset | None = None  # of the machine that gathers this

    @property
    def node_names(self) -> tuple[str, ...]:
        """All nodes of the job, also those that sent nothing."""
        if self.record and self.record.nodes:
            return tuple(self.record.nodes)
        return (*(sent.node for sent in self.nodes), *self.silent_nodes)
