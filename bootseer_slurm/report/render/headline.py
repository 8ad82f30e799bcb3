"""The few figures of a report that a person reads first, in words. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bootseer_slurm.errors import InputError
from bootseer_slurm.report.render.document import node_names
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.report.startup.transfers import Transfer, store_copies
from bootseer_slurm.slurm.hostlist import fold
from bootseer_slurm.units import format_bytes, format_duration, format_share

TRAINING_SAID = {
    "mark": "training marked by the job",
    "gpu": "training seen by the use of GPUs",
    "io": "training seen by the end of reading",
}


class Figure(NamedTuple):
    """One figure with what it is, and a line that explains it."""

    heading: str
    value: str
    detail: str


def printable(text: str) -> str:
    """The text with blanks for control and format characters: these make a name look like another one."""
    return "".join(c if c.isprintable() else " " for c in text)


def nodes_text(nodes: Sequence[str]) -> str:
    """These nodes in Slurm's short form; how many they are where a name is none."""
    try:
        return fold(nodes)
    except InputError:
        return f"{len(nodes)} nodes"


def waited_text(rows: Sequence[Transfer]) -> str:
    """The longest wait for a thing on any node, and its share of that node's start."""
    known = [(row.waited_s, row) for row in rows if row.waited_s is not None]
    if not known:
        return "-"
    waited_s, worst = max(known, key=lambda pair: pair[0])
    share = worst.waited_share
    return format_duration(waited_s) + ("" if share is None else f" ({format_share(share)})")


def headline(report: Report) -> tuple[str, str]:
    """The report's title, and one sentence that says what the start cost."""
    record = report.run.record
    title = f"Start of job {record.shown_id if record else report.run.job}"
    title += f", restart {report.run.restart}" if report.run.restart else ""
    title += f" · {record.name}" if record and record.name else ""
    waited_s = report.start_to_training_s
    if waited_s is None:
        return title, "When training began is not known: the job did not mark it."
    what = f"{report.gpus:,} GPUs" if report.gpus else f"{report.cpus:,} CPUs" if report.cpus else "The job"
    lead = f"{what} waited {format_duration(waited_s)} for training to begin"
    if report.lost_gpu_s is not None:
        lead += f": {_hours(report.lost_gpu_s)} GPU-hours"
    worst = max(report.stages, key=lambda row: row.median_s, default=None)
    if worst is not None and worst.median_s > 0:
        lead += f". The longest stage is {worst.stage}, {format_duration(worst.median_s)} on the median node"
    return title, lead + "."


def _hours(duration_s: float) -> str:
    hours = duration_s / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 10 else f"{hours:.2f}"


def figures(report: Report) -> list[Figure]:
    """The figures for the top of the page."""
    waited_s = report.start_to_training_s
    queued = f"queued {format_duration(report.queue_s)} before" if report.queue_s is not None else ""
    said = TRAINING_SAID.get(report.training_from or "", "not marked by the job")
    found = [
        Figure(
            "allocation until training",
            "not known" if waited_s is None else format_duration(waited_s),
            " · ".join(part for part in (said, queued) if part),
        )
    ]
    if report.lost_gpu_s is not None:
        found.append(
            Figure(
                "GPU time lost", f"{_hours(report.lost_gpu_s)} GPU-hours", f"{report.gpus:,} GPUs allocated"
            )
        )
    elif report.lost_cpu_s is not None:
        found.append(
            Figure(
                "CPU time lost", f"{_hours(report.lost_cpu_s)} CPU-hours", f"{report.cpus:,} CPUs allocated"
            )
        )
    found.append(_plain(report))
    if report.total is not None:
        ratio = f"{report.total.ratio:.1f} × the median node" if report.total.ratio else ""
        slow = len(report.stragglers)
        found.append(
            Figure(
                "slowest node",
                report.total.slowest_node,
                f"{ratio} · {slow:,} of {len(node_names(report)):,} nodes held it up",
            )
        )
    if report.transfers:
        found.append(_bytes(report))
    return found


def _plain(report: Report) -> Figure:
    heading = "a plain start of this job"
    if report.mode == "observe":
        return Figure(heading, "this one", "only observed: nothing was prefetched")
    if report.plain is None:
        return Figure(heading, "unknown", "no plain start of this job was observed")
    detail = f"median of {report.plain.count} that were observed"
    waited_s = report.start_to_training_s
    if waited_s is not None and report.plain.median_s > 0:
        saved = 1 - waited_s / report.plain.median_s
        detail = f"this one is {abs(saved):.0%} {'shorter' if saved >= 0 else 'longer'} · {detail}"
    return Figure(heading, format_duration(report.plain.median_s), detail)


def _bytes(report: Report) -> Figure:
    """Where the bytes came from."""
    cached, store, origin, peers = (
        sum(getattr(row, name) or 0 for row in report.transfers)
        for name in ("cached_bytes", "store_bytes", "origin_bytes", "peer_bytes")
    )
    hit = sum(row.hit_bytes for row in report.transfers)
    miss = sum(row.miss_bytes for row in report.transfers)
    parts = []
    if peers:
        # A node that told nothing may have read more from the store.
        copies = None if report.run.silent_nodes else store_copies(report.transfers)
        parts += [] if copies is None else [f"{copies:.2f} copies"]
        parts.append(f"{format_bytes(peers)} from other nodes")
    parts.append(f"{format_bytes(cached)} cached")
    if origin:
        parts.append(f"{format_bytes(origin)} from originals")
    if hit + miss:
        parts.append(f"{100 * hit / (hit + miss):.0f} % of reads were there")
    return Figure("fetched from the store", format_bytes(store), " · ".join(parts))
