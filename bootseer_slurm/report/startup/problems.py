"""Faults that nodes told, and remarks that a reader needs to trust the figures. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bootseer_slurm.report.gather.run import NodeEvents, Run
from bootseer_slurm.report.startup.clock import Clock
from bootseer_slurm.report.startup.figures import Problem
from bootseer_slurm.report.startup.stages import NodeStart, first

_SKEW_NS = 1_000_000_000


def find_problems(nodes: Sequence[NodeEvents]) -> tuple[Problem, ...]:
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
