"""From the events of a run to its figures: stages per node, transfers, problems, and what the start cost.

Pure functions over a Run; nothing is read, written or kept. The stages are those of docs/report.md. Stamps of
all nodes are taken to be of one clock; where they cannot be, a note says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bootseer_slurm.events import Event
from bootseer_slurm.report.collect import NodeEvents, Run

STAGES = ("prolog", "launch", "image", "environment", "checkpoint", "program")
_MARKS = {"image": "image_loaded", "environment": "environment_loaded", "checkpoint": "checkpoint_loaded"}
_TRAINING = "training_started"
_SKEW_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class NodeStart:
    """The start on one node. stages has the known ones only, in seconds, in their order, without gaps."""

    node: str
    begin_ns: int
    training_ns: int | None  # the last task's mark
    stages: dict[str, float]

    @property
    def total_s(self) -> float | None:
        """Seconds from the first stamp on the node until training began; None when that was not marked."""
        return None if self.training_ns is None else (self.training_ns - self.begin_ns) / 1e9


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage over all nodes that have it."""

    stage: str
    node_count: int
    median_s: float
    slowest_s: float
    slowest_node: str

    @property
    def ratio(self) -> float | None:
        """Slowest over median; None when the median is 0."""
        return self.slowest_s / self.median_s if self.median_s > 0 else None


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

    @property
    def rate(self) -> float | None:
        """Bytes a second fetched from the store; None when nothing was."""
        if not self.fetched_bytes or not self.dur_s:
            return None
        return self.fetched_bytes / self.dur_s


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that went wrong, or a shadow that was not shown, on these nodes."""

    level: str
    name: str
    what: str | None
    target: str | None
    message: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run of a job."""

    run: Run
    mode: str | None  # "prefetch" or "observe"
    starts: tuple[NodeStart, ...]
    stages: tuple[StageRow, ...]
    total: StageRow | None  # first stamp until training began
    queue_s: float | None
    start_ns: int | None  # of the allocation, from accounting; else the first stamp of any node
    training_ns: int | None  # the last node's
    gpus: int
    cpus: int
    transfers: tuple[Transfer, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def start_to_training_s(self) -> float | None:
        """Seconds that the allocation waited for training to begin; None when that was not marked."""
        if self.start_ns is None or self.training_ns is None:
            return None
        return max(0.0, (self.training_ns - self.start_ns) / 1e9)

    @property
    def lost_gpu_s(self) -> float | None:
        """GPU-seconds allocated before training began; None when unknown or when the job has no GPU."""
        waited_s = self.start_to_training_s
        return None if waited_s is None or not self.gpus else waited_s * self.gpus

    @property
    def lost_cpu_s(self) -> float | None:
        """CPU-seconds allocated before training began; None when unknown."""
        waited_s = self.start_to_training_s
        return None if waited_s is None or not self.cpus else waited_s * self.cpus


def analyse(run: Run) -> Report:
    """The figures of a run. Whatever is missing in it is missing in them, and noted where it misleads."""
    step = _training_step(run.nodes)
    trained = {sent.node: _mark(sent.events, _TRAINING, step=step) for sent in run.nodes}
    stamps = [stamp for stamp in trained.values() if stamp is not None]
    training_ns = max(stamps, default=None)
    begun = (_node_start(sent, trained[sent.node], training_ns) for sent in run.nodes)
    starts = tuple(start for start in begun if start is not None)
    record = run.record
    start_ns = record.start_ns if record else None
    if start_ns is None:
        start_ns = min((start.begin_ns for start in starts), default=None)
    return Report(
        run=run,
        mode=_mode(run.nodes),
        starts=starts,
        stages=_stage_rows(starts),
        total=_row("total", [(start.total_s, start.node) for start in starts if start.total_s is not None]),
        queue_s=record.queue_s if record else None,
        start_ns=start_ns,
        training_ns=training_ns,
        gpus=record.gpus if record else 0,
        cpus=record.cpus if record else 0,
        transfers=tuple(
            transfer for sent in run.nodes for transfer in _transfers(sent, trained[sent.node] or training_ns)
        ),
        problems=_problems(run.nodes),
        notes=(*run.notes, *_notes(run, starts, stamps)),
    )


def _first(events: Iterable[Event], kind: str, name: str) -> int | None:
    return next((event.t_ns for event in events if (event.kind, event.name) == (kind, name)), None)


def _training_step(nodes: Sequence[NodeEvents]) -> str | None:
    """The step that first began training. A later step of the same job that marks again is not its start."""
    marks = [
        event for sent in nodes for event in sent.events if (event.kind, event.name) == ("mark", _TRAINING)
    ]
    return min(marks, key=lambda event: event.t_ns).step if marks else None


def _mark(
    events: Iterable[Event], name: str, *, step: str | None = None, until_ns: int | None = None
) -> int | None:
    """When the last task came to this mark; of a task that marks again, its first mark counts."""
    first: dict[tuple[str | None, int | None], int] = {}
    for event in events:
        if (event.kind, event.name) != ("mark", name) or (until_ns is not None and event.t_ns > until_ns):
            continue
        if name == _TRAINING and event.step != step:
            continue
        first.setdefault((event.step, event.task), event.t_ns)
    return max(first.values(), default=None)


def _node_start(sent: NodeEvents, trained_ns: int | None, training_ns: int | None) -> NodeStart | None:
    """The stages of one node; None when it has no stamp to begin with. training_ns is the job's."""
    events = sent.events
    prolog_ns = _first(events, "hook", "begin") or _first(events, "session", "begin")
    attach_ns = _first(events, "step", "attach")
    task_ns = _first([event for event in events if event.step != "extern"], "step", "task_start")
    begin_ns = prolog_ns or attach_ns or task_ns
    if begin_ns is None:
        return None
    boundaries: list[tuple[str, int | None]] = []
    if prolog_ns is not None:
        # Where no step came, the end of the hook is the last that is known of the prolog.
        boundaries.append(("prolog", attach_ns or _first(events, "hook", "received")))
    boundaries.append(("launch", task_ns or attach_ns))
    limit_ns = trained_ns or training_ns
    boundaries += [(stage, _mark(events, mark, until_ns=limit_ns)) for stage, mark in _MARKS.items()]
    boundaries.append(("program", trained_ns))
    stages: dict[str, float] = {}
    last_ns = begin_ns
    for stage, end_ns in boundaries:
        if end_ns is None:
            continue
        # Stages follow one another: a stamp out of order gives a stage of no length, never a negative one.
        end_ns = max(last_ns, end_ns if trained_ns is None else min(end_ns, trained_ns))
        stages[stage] = (end_ns - last_ns) / 1e9
        last_ns = end_ns
    return NodeStart(sent.node, begin_ns, None if trained_ns is None else max(begin_ns, trained_ns), stages)


def _stage_rows(starts: Sequence[NodeStart]) -> tuple[StageRow, ...]:
    rows = (
        _row(stage, [(start.stages[stage], start.node) for start in starts if stage in start.stages])
        for stage in STAGES
    )
    return tuple(row for row in rows if row is not None)


def _row(stage: str, durations: Sequence[tuple[float | None, str]]) -> StageRow | None:
    known = [(duration_s, node) for duration_s, node in durations if duration_s is not None]
    if not known:
        return None
    slowest_s, slowest_node = max(known, key=lambda pair: pair[0])
    return StageRow(stage, len(known), median(pair[0] for pair in known), slowest_s, slowest_node)


def _mode(nodes: Sequence[NodeEvents]) -> str | None:
    for event in (event for sent in nodes for event in sent.events):
        mode = event.extra.get("mode")
        if (event.kind, event.name) == ("session", "begin") and isinstance(mode, str):
            return mode
    return None


def _transfers(sent: NodeEvents, trained_ns: int | None) -> list[Transfer]:
    """One row for each thing that this node prefetched or read."""
    groups: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in sent.events:
        if event.kind in ("prefetch", "access") and event.target is not None:
            groups[(event.what or "", event.target)].append(event)
    return [_transfer(sent.node, *key, events, trained_ns) for key, events in groups.items()]


def _transfer(node: str, what: str, target: str, events: list[Event], trained_ns: int | None) -> Transfer:
    begin = next((event for event in events if (event.kind, event.name) == ("prefetch", "begin")), None)
    ends = [event for event in events if event.kind == "prefetch" and event.name in ("end", "stopped")]
    reads = [event for event in events if event.kind == "access"]
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
    )


def _in_time(events: Sequence[Event], trained_ns: int) -> bool:
    """Whether all that the start needs was there: what is hot, where that is known, else the whole."""
    there = [event for event in events if event.kind == "prefetch" and event.name in ("hot", "end")]
    return any(event.t_ns <= trained_ns for event in there)


def _problems(nodes: Sequence[NodeEvents]) -> tuple[Problem, ...]:
    """Faults, and shadows that were not shown; the same one on several nodes is one problem."""
    found: dict[tuple[str, str, str | None, str | None, str], list[str]] = defaultdict(list)
    for sent in nodes:
        for event in sent.events:
            if event.kind == "fault":
                key = (event.level, event.name, event.what, event.target, event.message or event.name)
            elif event.kind == "shadow" and event.name in ("failed", "skipped"):
                level = "warning" if event.level == "info" else event.level
                why = event.message or "no reason given"
                key = (level, f"shadow_{event.name}", event.what, event.target, f"not shown: {why}")
            elif event.kind == "snapshot":
                why = event.message or event.name
                key = (event.level, f"snapshot_{event.name}", event.what, event.target, why)
            else:
                continue
            if sent.node not in found[key]:
                found[key].append(sent.node)
    order = ("error", "warning", "info")
    return tuple(
        Problem(*key, nodes=tuple(where))
        for key, where in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    )


def _notes(run: Run, starts: Sequence[NodeStart], stamps: Sequence[int]) -> list[str]:
    notes: list[str] = []
    if starts and not stamps:
        notes.append('start not marked: the job never said bootseer_slurm.mark("training_started")')
    elif len(stamps) < len(starts):
        notes.append(f"training_started was marked on {len(stamps)} of {len(starts)} nodes")
    if starts and (run.record is None or run.record.start_ns is None):
        notes.append("the start is counted from the first stamp of a node, not from the allocation")
    elif run.record is not None and run.record.start_ns is not None:
        early = [start for start in starts if start.begin_ns < run.record.start_ns - _SKEW_NS]
        if early:
            lead_s = max(run.record.start_ns - start.begin_ns for start in early) / 1e9
            notes.append(
                f"clocks differ: {len(early)} of {len(starts)} nodes began up to {lead_s:.1f} s before the "
                "allocation; times across nodes are off by that"
            )
    return notes
