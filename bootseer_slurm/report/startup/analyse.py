"""From the events of a run to its figures: stages, transfers, stragglers, problems, and the cost.

Pure functions over a Run; nothing is read, written or kept. The stages are those of docs/report.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from bootseer_slurm.events import Event
from bootseer_slurm.report.gather.run import NodeEvents, Run
from bootseer_slurm.report.startup.clock import clock_of, corrected
from bootseer_slurm.report.startup.figures import PlainStarts, Report, StageRow
from bootseer_slurm.report.startup.problems import clock_notes, find_problems, notes
from bootseer_slurm.report.startup.stages import STAGES, NodeStart, first, mark_ns, node_start
from bootseer_slurm.report.startup.stragglers import find_stragglers
from bootseer_slurm.report.startup.transfers import transfers
from bootseer_slurm.report.startup.verdict import find_verdict

_TRAINING = "training_started"


def analyse(run: Run, *, plain: PlainStarts | None = None) -> Report:
    """The figures of a run. Whatever is missing in it is missing in them, and noted where it misleads.

    plain: of this job's class, where it was looked for (plain.py).
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
        problems=find_problems(nodes, run.node_names),
        notes=(
            *run.notes,
            *notes(run, nodes, starts, training_from, len(stamps)),
            *clock_notes(run, clocks),
        ),
        training_from=training_from,
        wall_s=(end_ns - record.start_ns) / 1e9 if record and record.start_ns and end_ns else None,
        stragglers=find_stragglers(starts, nodes),
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
    """The source of when training began ("mark", "gpu", "io" or None), and the stamp on each node.

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
    """The mode of the nodes; a job that was only observed at first may have asked for more in a step."""
    modes = [event.extra.get("mode") for sent in nodes for event in sent.events if event.kind == "session"]
    known = {mode for mode in modes if mode in ("prefetch", "observe")}
    return "prefetch" if "prefetch" in known else min(known, default=None)
