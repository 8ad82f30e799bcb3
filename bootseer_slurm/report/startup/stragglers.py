"""The nodes that held the start up, and why, as far as their own figures tell.

A node straggles when a stage took it noticeably longer than the median node. The cause is looked for in what
its agent told at the end of the start (events `access start` and `load start`), set against the median node:
bytes fetched, the rate of a stream, the rate of the cache's disk, and how long tasks waited for a CPU. Pure
functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import median

from bootseer_slurm.report.gather.run import NodeEvents
from bootseer_slurm.report.startup.stages import NodeStart
from bootseer_slurm.units import format_bytes

# A stage is worth a word only when its slowest node waits noticeably longer than the others.
NOTICEABLE_S = 1.0
SLOW = 1.5
_MORE = 1.2  # times what the median node fetched: then it had less in its cache
_CPU_SHARE = 0.2  # of the start, in which tasks waited for a CPU, more than on the median node
_EXPLAINS = 0.2  # of what a node lost, that a cause has to explain


@dataclass(frozen=True, slots=True)
class NodeWork:
    """The work of a node during its start. fetch_s and disk_s: summed over streams that run side by side."""

    fetched_bytes: float = 0.0
    cached_bytes: float = 0.0
    fetch_s: float = 0.0
    disk_s: float = 0.0
    cpu_share: float = 0.0  # of the start, in which some task waited for a CPU (PSI)

    @property
    def rate(self) -> float | None:
        """Bytes a second that one stream fetched."""
        return self.fetched_bytes / self.fetch_s if self.fetched_bytes and self.fetch_s else None

    @property
    def disk_rate(self) -> float | None:
        """Bytes a second that one stream wrote into the cache."""
        return self.fetched_bytes / self.disk_s if self.fetched_bytes and self.disk_s else None


@dataclass(frozen=True, slots=True)
class Straggler:
    """A node that was slower than the others. lost_s: over the median, in the stage where it lost most."""

    node: str
    stage: str
    lost_s: float
    cause: str
    detail: str


def work_of(sent: NodeEvents) -> NodeWork:
    """The node's figures at the end of its start; zeros for what it did not tell."""
    access = [event for event in sent.events if (event.kind, event.name) == ("access", "start")]
    load = [event for event in sent.events if (event.kind, event.name) == ("load", "start")]

    def total(*keys: str) -> float:
        return sum(max(0.0, event.number(key)) for event in access for key in keys)

    lasted_s = load[0].dur_s if load else None
    return NodeWork(
        fetched_bytes=total("store_bytes", "origin_bytes", "peer_bytes"),
        cached_bytes=total("cached_bytes"),
        fetch_s=total("fetch_s"),
        disk_s=total("disk_s"),
        cpu_share=min(1.0, max(0.0, load[0].number("cpu_s")) / lasted_s) if lasted_s else 0.0,
    )


def find_stragglers(starts: Sequence[NodeStart], nodes: Sequence[NodeEvents]) -> tuple[Straggler, ...]:
    """The stragglers among the nodes, the worst first."""
    if len(starts) < 2:
        return ()
    stages = {start.node: start.stages for start in starts}
    medians: dict[str, float] = {}
    for stage in {stage for known in stages.values() for stage in known}:
        # A node without the stage spent no time in it.
        medians[stage] = median(known.get(stage, 0.0) for known in stages.values())
    totals = {start.node: start.total_s for start in starts if start.total_s is not None}
    usual_s = median(totals.values()) if totals else 0.0
    slow = []
    for node, known in stages.items():
        lost = {stage: duration_s - medians[stage] for stage, duration_s in known.items()}
        if totals.get(node, usual_s) - usual_s < NOTICEABLE_S:
            lost.pop("program", None)  # it waited there for the others
        worst = max(lost, key=lambda stage: lost[stage], default="")
        if not worst:
            continue
        if lost[worst] >= NOTICEABLE_S and known[worst] >= SLOW * medians[worst]:
            slow.append((node, worst, lost[worst]))
    if not slow:
        return ()
    figures = {sent.node: work_of(sent) for sent in nodes}
    usual = _median(figures.values())
    found = [
        Straggler(node, stage, lost_s, *_cause(stage, lost_s, figures[node], usual))
        for node, stage, lost_s in slow
    ]
    return tuple(sorted(found, key=lambda straggler: -straggler.lost_s))


def _median(figures: Iterable[NodeWork]) -> NodeWork:
    known = list(figures)
    return NodeWork(*(median(getattr(each, name.name) for each in known) for name in fields(NodeWork)))


def _cause(stage: str, lost_s: float, node: NodeWork, usual: NodeWork) -> tuple[str, str]:
    """The likely cause and the figures that say so."""
    if stage == "allocation":
        return "late allocation", "its prolog began later than the others'"
    if node.cpu_share >= usual.cpu_share + _CPU_SHARE:
        text = f"tasks waited for a CPU {node.cpu_share:.0%} of the start"
        return "contention", f"{text}, on the median node {usual.cpu_share:.0%}"
    causes = _explained(node, usual)
    if causes:
        explained_s, cause, detail = max(causes)
        # Of streams that run side by side: one of them alone must have lost this.
        if explained_s >= _EXPLAINS * lost_s:
            return cause, detail
    if node == NodeWork():
        return "not known", "its agent told no figures"
    return "not known", "what it fetched, and how fast, is as on the others"


def _explained(node: NodeWork, usual: NodeWork) -> list[tuple[float, str, str]]:
    """The cost of a slow link, a slow disk and a cold cache to this node, in seconds of streams."""
    causes = []
    rate, usual_rate = node.rate, usual.rate
    if rate and usual_rate and usual_rate >= SLOW * rate:
        text = f"fetched {format_bytes(rate)}/s a stream, the median node {format_bytes(usual_rate)}/s"
        causes.append((node.fetch_s - node.fetched_bytes / usual_rate, "slow link", text))
    disk_rate, usual_disk_rate = node.disk_rate, usual.disk_rate
    if disk_rate and usual_disk_rate and usual_disk_rate >= SLOW * disk_rate:
        text = f"its cache took {format_bytes(disk_rate)}/s a stream"
        text += f", the median node's {format_bytes(usual_disk_rate)}/s"
        causes.append((node.disk_s - node.fetched_bytes / usual_disk_rate, "slow disk", text))
    more_bytes = node.fetched_bytes - usual.fetched_bytes
    if more_bytes > 0 and node.fetched_bytes >= _MORE * usual.fetched_bytes:
        text = (
            f"fetched {format_bytes(node.fetched_bytes)} and had {format_bytes(node.cached_bytes)}, "
            f"the median node {format_bytes(usual.fetched_bytes)} and {format_bytes(usual.cached_bytes)}"
        )
        fastest = max(rate or 0.0, usual_rate or 0.0)
        causes.append((more_bytes / fastest if fastest else 0.0, "cold cache", text))
    return causes
