"""From the events of a run to its figures: stages, transfers, stragglers, problems, and what it cost.

Pure functions over a Run; nothing is read, written or kept. The stages are those of docs/report.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from bootseer_slurm.events import Event
from bootseer_slurm.report.clock import Clock, clock_of, corrected
from bootseer_slurm.report.collect import NodeEvents, Run
from bootseer_slurm.report.stages import STAGES, NodeStart, first, mark_ns, node_start
from bootseer_slurm.report.stragglers import Straggler, find
from bootseer_slurm.report.transfers import Transfer, transfers
from bootseer_slurm.report.verdict import Verdict, find_verdict

_TRAINING = "training_started"
_SKEW_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage over all nodes that have it."""

    stage: str
    node_count: int
    median_s: float
    slowest_s: float
    slowest_node: str
    derived: bool = False  # on some node: its end is not marked by the job

    @property
    def ratio(self) -> float | None:
        """Slowest over median; None when the median is 0."""
        return self.slowest_s / self.median_s if self.median_s > 0 else None


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
class PlainStarts:
    """What starts of this job class took that were only observed: the median, and of how many."""

    count: int
    median_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run of a job."""

    run: Run
    mode: str | None  # "prefetch" or "observe"
    starts: tuple[NodeStart, ...]
    stages: tuple[StageRow, ...]
    total: StageRow | None  # from the allocation, else the first stamp, until training began
    queue_s: float | None
    start_ns: int | None  # of the allocation, from accounting; else the first stamp of any node
    training_ns: int | None  # the last node's
    gpus: int
    cpus: int
    transfers: tuple[Transfer, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    training_from: str | None = None  # "mark", "gpu" or "io": what said when training began
    wall_s: float | None = None  # of the job, as accounting has it
    stragglers: tuple[Straggler, ...] = ()
    unended_nodes: tuple[str, ...] = ()  # sent events, but not their end, though the job has ended
    plain: PlainStarts | None = None
    verdict: Verdict | None = None  # what held the start up

    @property
    def start_to_training_s(self) -> float | None:
        """Seconds that the allocation waited for training to begin; None when that is not known."""
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


def analyse(run: Run, *, plain: PlainStarts | None = None) -> Report:
    """The figures of a run. Whatever is missing in it is missing in them, and noted where it misleads.

    plain: of this job's class, where it was looked for (report/plain.py).
    """
    clocks = {sent.node: clock_of(sent, run.reader_clock) for sent in run.nodes}
    nodes = tuple(corrected(sent, clocks[sent.node]) for sent in run.nodes)
    record = run.record
    start_ns, end_ns = (record.start_ns, record.end_ns) if record else (None, None)
    training_from, trained = _training(nodes)
    if end_ns is not None:  # a mark's stamp is the job's own word
        trained = {node: stamp and min(stamp, end_ns) for node, stamp in trained.items()}
    stamps = [stamp for stamp in trained.values() if stamp is not None]
    training_ns = max(stamps, default=None)
    begun = (
        node_start(
            sent,
            allocated_ns=start_ns,
            trained_ns=trained[sent.node],
            limit_ns=training_ns,
            end_ns=end_ns,
            clock=clocks[sent.node],
        )
        for sent in nodes
    )
    starts = tuple(start for start in begun if start is not None)
    if start_ns is None:
        start_ns = min((start.begin_ns for start in starts), default=None)
    unended = _unended(nodes) if end_ns is not None else ()
    starts_s = _starts_s(starts, training_ns)
    rows = tuple(row for sent in nodes for row in transfers(sent, starts_s.get(sent.node)))
    mode = _mode(nodes)
    return Report(
        run=run,
        mode=mode,
        starts=starts,
        stages=_stage_rows(starts),
        total=_row("total", [(start.total_s, start.node) for start in starts if start.total_s is not None]),
        queue_s=record.queue_s if record else None,
        start_ns=start_ns,
        training_ns=training_ns,
        gpus=record.gpus if record else 0,
        cpus=record.cpus if record else 0,
        transfers=rows,
        problems=_problems(nodes),
        notes=(
            *run.notes,
            *_notes(run, nodes, starts, training_from, len(stamps)),
            *_clock_notes(run, clocks),
        ),
        training_from=training_from,
        wall_s=(end_ns - record.start_ns) / 1e9 if record and record.start_ns and end_ns else None,
        stragglers=find(starts, nodes),
        unended_nodes=unended,
        plain=plain,
        verdict=None if mode == "observe" else find_verdict(rows, starts_s),
    )


def _starts_s(starts: Sequence[NodeStart], training_ns: int | None) -> dict[str, float]:
    """Seconds of each node's start. A node that did not tell when it trained began so with the last one."""
    known = {}
    for start in starts:
        trained_ns = start.training_ns or training_ns
        if trained_ns is not None:
            known[start.node] = max(0, trained_ns - start.begin_ns) / 1e9
    return known


def _training(nodes: Sequence[NodeEvents]) -> tuple[str | None, dict[str, int | None]]:
    """What tells when training began, and when that was on each node.

    The job's own mark, where any task made one; else the use of the GPUs; else the end of the start's reads.
    """
    step = _training_step(nodes)
    if step is not None:
        return "mark", {
            sent.node: mark_ns(sent.events, _TRAINING, step=step.step, any_step=False) for sent in nodes
        }
    for name in ("gpu", "io"):
        stamps = {sent.node: first(sent.events, "training", name) for sent in nodes}
        if any(stamp is not None for stamp in stamps.values()):
            return name, stamps
    return None, {sent.node: None for sent in nodes}


def _training_step(nodes: Sequence[NodeEvents]) -> Event | None:
    """The mark of the step that first began training. A later step that marks again is not its start."""
    marks = [
        event for sent in nodes for event in sent.events if (event.kind, event.name) == ("mark", _TRAINING)
    ]
    return min(marks, key=lambda event: event.t_ns) if marks else None


def _unended(nodes: Sequence[NodeEvents]) -> tuple[str, ...]:
    """The nodes of a job that has ended which have told no end: they died, or their epilog still runs."""
    return tuple(sent.node for sent in nodes if sent.events and first(sent.events, "session", "end") is None)


def _stage_rows(starts: Sequence[NodeStart]) -> tuple[StageRow, ...]:
    durations: dict[str, list[tuple[float, str]]] = defaultdict(list)
    derived: set[str] = set()
    for start in starts:
        for stage, duration_s in start.stages.items():
            durations[stage].append((duration_s, start.node))
        derived.update(start.derived)
    rows = ((stage, _row(stage, durations[stage])) for stage in STAGES)
    # Of the program only what lies between two things that are loaded can be derived: it is no stage's end.
    return tuple(
        replace(row, derived=stage in derived and stage != "program")
        for stage, row in rows
        if row is not None
    )


def _row(stage: str, durations: Sequence[tuple[float | None, str]]) -> StageRow | None:
    known = [(duration_s, node) for duration_s, node in durations if duration_s is not None]
    if not known:
        return None
    slowest_s, slowest_node = max(known, key=lambda pair: pair[0])
    return StageRow(stage, len(known), median(pair[0] for pair in known), slowest_s, slowest_node)


def _mode(nodes: Sequence[NodeEvents]) -> str | None:
    """What the nodes did; a job that was only observed at first may have asked for more in a step."""
    modes = [event.extra.get("mode") for sent in nodes for event in sent.events if event.kind == "session"]
    known = {mode for mode in modes if mode in ("prefetch", "observe")}
    return "prefetch" if "prefetch" in known else min(known, default=None)


def _problems(nodes: Sequence[NodeEvents]) -> tuple[Problem, ...]:
    """Faults, and shadows that were not shown; the same one on several nodes is one problem."""
    found: dict[tuple[str, str, str | None, str | None, str], dict[str, None]] = defaultdict(dict)
    for sent in nodes:
        for event in sent.events:
            if event.kind == "fault":
                key = (event.level, event.name, event.what, event.target, event.message or event.name)
            elif event.kind == "shadow" and event.name in ("failed", "skipped"):
                level = "warning" if event.level == "info" else event.level
                why = event.message or "no reason given"
                key = (level, f"shadow_{event.name}", event.what, event.target, f"not shown: {why}")
            elif event.kind == "plan" and event.name in ("not_used", "unread"):
                why = event.message or event.name
                key = ("info", f"plan_{event.name}", event.what, event.target, why)
            elif event.kind == "snapshot":
                why = event.message or event.name
                key = (event.level, f"snapshot_{event.name}", event.what, event.target, why)
            else:
                continue
            found[key][sent.node] = None
    order = ("error", "warning", "info")
    return tuple(
        Problem(*key, nodes=tuple(where))
        for key, where in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    )


def _notes(
    run: Run,
    nodes: Sequence[NodeEvents],
    starts: Sequence[NodeStart],
    training_from: str | None,
    known_count: int,
) -> list[str]:
    notes: list[str] = []
    said = {
        "mark": "training_started was marked",
        "gpu": "GPU use was seen",
        "io": "the end of reading was seen",
    }
    if starts and training_from is None:
        notes.append('start not marked: the job never said bootseer_slurm.mark("training_started")')
    elif training_from and known_count < len(starts):
        notes.append(f"{said[training_from]} on {known_count} of {len(starts)} nodes")
    allocated_ns = run.record.start_ns if run.record else None
    if starts and allocated_ns is None:
        notes.append("the start is counted from the first stamp of a node, not from the allocation")
    elif allocated_ns is not None:
        hooks = [first(sent.events, "hook", "begin") for sent in nodes]
        stamps = [stamp_ns for stamp_ns in hooks if stamp_ns is not None]
        early = [stamp_ns for stamp_ns in stamps if stamp_ns < allocated_ns - _SKEW_NS]
        if early:
            lead_s = (allocated_ns - min(early)) / 1e9
            notes.append(
                f"clocks differ: {len(early)} of {len(stamps)} nodes began up to {lead_s:.1f} s before the "
                "allocation; times across nodes are off by that"
            )
    return notes


def _clock_notes(run: Run, clocks: dict[str, Clock | None]) -> list[str]:
    """How far the nodes' clocks can be believed."""
    known = [clock for clock in clocks.values() if clock is not None]
    if not known:
        return ["clock offsets unknown: the store's times do not tell them"] if clocks else []
    against = "this machine's" if run.reader_clock else "the store's"
    worst = max(known, key=lambda clock: abs(clock.offset_s))
    moved = sum(clock.is_certain for clock in known)
    text = f"clocks: {len(known)} of {len(clocks)} nodes compared with {against}, "
    text += f"the furthest is off by {worst.offset_s:+.3f} s (± {worst.error_s:.3f} s); "
    return [text + (f"the stamps of {moved} were moved" if moved else "no stamp was moved")]
