"""The records that a report is made of. No code of its own but sums."""

from __future__ import annotations

from dataclasses import dataclass

from bootseer_slurm.report.gather.run import Run
from bootseer_slurm.report.startup.stages import NodeStart
from bootseer_slurm.report.startup.stragglers import Straggler
from bootseer_slurm.report.startup.transfers import Transfer
from bootseer_slurm.report.startup.verdict import Verdict


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
    """A fault, or a file that was not shown, on these nodes."""

    level: str
    name: str
    what: str | None
    target: str | None
    message: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlainStarts:
    """How long starts of this job class take that are only observed: the median, and of how many."""

    count: int
    median_s: float


@dataclass(frozen=True, slots=True)
class Report:  # size: the figures that docs/report.md lists, one each
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
