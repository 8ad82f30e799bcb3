"""Faults that nodes told, and remarks that a reader needs to trust the figures. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from bootseer_slurm.event_table import MAX_MESSAGE
from bootseer_slurm.events import Event
from bootseer_slurm.report.gather.run import NodeEvents, Run
from bootseer_slurm.report.startup.clock import Clock
from bootseer_slurm.report.startup.figures import Problem
from bootseer_slurm.report.startup.stages import NodeStart, first

_SKEW_NS = 1_000_000_000
_LEVELS = ("error", "warning", "info")


def find_problems(nodes: Sequence[NodeEvents], job_nodes: Collection[str]) -> tuple[Problem, ...]:
    """Faults, and shadows that were not shown; the same one on several nodes is one problem.

    job_nodes: the names of all nodes of the job.
    """
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
    problems = [Problem(*key, nodes=tuple(where)) for key, where in found.items()]
    problems += _of_peers(nodes, frozenset(job_nodes))
    return tuple(sorted(problems, key=lambda problem: _LEVELS.index(problem.level)))


def _of_peers(nodes: Sequence[NodeEvents], job_nodes: frozenset[str]) -> list[Problem]:
    """The trouble that nodes had with one another.

    Of a thousand nodes many may be slow, or fail at times: one line is for all of these.
    """
    banned: dict[str, dict[str, None]] = defaultdict(dict)
    slow: dict[str, None] = {}
    failed: dict[str, int] = defaultdict(int)
    for sent in nodes:
        for event in sent.events:
            if (event.kind, event.name) != ("peers", "summary"):
                continue
            for name in _named(event, "banned", job_nodes):
                banned[name][sent.node] = None
            slow |= dict.fromkeys(_named(event, "slow", job_nodes))
            failed[sent.node] += max(0, int(event.number("fallbacks")))
    chunks = sum(failed.values())
    ban, again = "sent wrong bytes, and is banned for this job", "from the store because other nodes failed"
    rows = [("warning", "peers_banned", f"{name} {ban}", tuple(where)) for name, where in banned.items()]
    rows += [
        ("info", "peers_slow", "sent blocks to other nodes slowly", tuple(slow)),
        (
            "info",
            "peers_failed",
            f"read {chunks:,} {'chunk' if chunks == 1 else 'chunks'} {again}",
            tuple(node for node, count in failed.items() if count),
        ),
    ]
    return [Problem(level, name, None, None, text, where) for level, name, text, where in rows if where]


def _named(event: Event, key: str, job_nodes: frozenset[str]) -> list[str]:
    """The nodes of the job that a field names; its user may have written it, with any other names."""
    text = str(event.extra.get(key, ""))
    names = text.split(",")
    if len(text) >= MAX_MESSAGE:
        del names[-1]  # it may be cut, and read as the name of another node
    return [name for name in names if name in job_nodes]


def notes(
    run: Run,
    nodes: Sequence[NodeEvents],
    starts: Sequence[NodeStart],
    training_from: str | None,
    known_count: int,
) -> list[str]:
    """The remarks without which the figures would mislead.

    training_from: see Report. known_count: nodes on which it is known when training began.
    """
    found: list[str] = []
    said = {
        "mark": "training_started was marked",
        "gpu": "GPU use was seen",
        "io": "the end of reading was seen",
    }
    if starts and training_from is None:
        found.append('start not marked: the job never said bootseer_slurm.mark("training_started")')
    elif training_from and known_count < len(starts):
        found.append(f"{said[training_from]} on {known_count} of {len(starts)} nodes")
    allocated_ns = run.record.start_ns if run.record else None
    if starts and allocated_ns is None:
        found.append("the start is counted from the first stamp of a node, not from the allocation")
    elif allocated_ns is not None:
        hooks = [first(sent.events, "hook", "begin") for sent in nodes]
        stamps = [stamp_ns for stamp_ns in hooks if stamp_ns is not None]
        early = [stamp_ns for stamp_ns in stamps if stamp_ns < allocated_ns - _SKEW_NS]
        if early:
            lead_s = (allocated_ns - min(early)) / 1e9
            found.append(
                f"clocks differ: {len(early)} of {len(stamps)} nodes began up to {lead_s:.1f} s before the "
                "allocation; times across nodes are off by that"
            )
    return found


def clock_notes(run: Run, clocks: dict[str, Clock | None]) -> list[str]:
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
