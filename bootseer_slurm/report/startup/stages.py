"""The start on one node as a timeline: spans of stages, one after the other, without gaps.

Owns which stamp ends which stage (docs/report.md). A stage ends with the job's own mark where it makes one;
else with what the node itself saw, and is then called derived. Pure functions over the events of one node,
whose clock is taken to be right (clock.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bootseer_slurm.events import Event
from bootseer_slurm.report.gather.run import NodeEvents
from bootseer_slurm.report.startup.clock import Clock

STAGES = ("allocation", "prolog", "launch", "image", "environment", "checkpoint", "program")
_MARKS = {"image": "image_loaded", "environment": "environment_loaded", "checkpoint": "checkpoint_loaded"}


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time that belongs to one stage. derived: its end is what the node saw, and not a mark."""

    stage: str
    begin_ns: int
    end_ns: int
    derived: bool = False


@dataclass(frozen=True, slots=True)
class NodeStart:
    """The start on one node. spans: the known ones, in order, without gaps, from begin_ns on."""

    node: str
    begin_ns: int  # of the allocation where accounting knows it, else the first stamp on the node
    training_ns: int | None
    spans: tuple[Span, ...]
    end_ns: int | None = None  # of the job, where accounting knows it, else of the session on this node
    clock: Clock | None = None

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each known stage, in their order."""
        known = {span.stage for span in self.spans}
        return {
            stage: sum(span.end_ns - span.begin_ns for span in self.spans if span.stage == stage) / 1e9
            for stage in STAGES
            if stage in known
        }

    @property
    def derived(self) -> tuple[str, ...]:
        """The stages that the job did not mark."""
        return tuple(dict.fromkeys(span.stage for span in self.spans if span.derived))

    @property
    def total_s(self) -> float | None:
        """Seconds from the begin until training began; None when that is not known."""
        return None if self.training_ns is None else (self.training_ns - self.begin_ns) / 1e9

    @property
    def after_s(self) -> float | None:
        """Seconds from the last known stage's end, that is from training on, until the job ended."""
        if self.end_ns is None:
            return None
        return max(0, self.end_ns - (self.spans[-1].end_ns if self.spans else self.begin_ns)) / 1e9


@dataclass(slots=True)
class _Timeline:
    """Spans as they are put one behind the other."""

    at_ns: int
    limit_ns: int | None
    spans: list[Span] = field(default_factory=list)

    def until(self, stage: str, end_ns: int | None, *, derived: bool = False) -> None:
        """The stage goes on until then. A stamp out of order gives a span of no length, no negative one."""
        if end_ns is None:
            return
        if self.limit_ns is not None:
            end_ns = min(end_ns, self.limit_ns)
        end_ns = max(self.at_ns, end_ns)
        self.spans.append(Span(stage, self.at_ns, end_ns, derived))
        self.at_ns = end_ns


def node_start(
    sent: NodeEvents,
    *,
    allocated_ns: int | None,
    trained_ns: int | None,
    limit_ns: int | None,
    end_ns: int | None = None,
    clock: Clock | None = None,
) -> NodeStart | None:
    """The start on a node; None when it has no stamp to begin with.

    allocated_ns: Start of accounting. trained_ns: when this node began training; limit_ns: when the last
    one did. end_ns: when the job ended.
    """
    events = sent.events
    prolog_ns = first(events, "hook", "begin") or first(events, "session", "begin")
    attach_ns = first(events, "step", "attach")
    task_ns = first([event for event in events if event.step != "extern"], "step", "task_start")
    first_ns = prolog_ns or attach_ns or task_ns
    if first_ns is None:
        return None
    begin_ns = first_ns if allocated_ns is None else allocated_ns
    line = _Timeline(begin_ns, end_ns if trained_ns is None else trained_ns)
    if allocated_ns is not None:
        line.until("allocation", first_ns)
    if prolog_ns is not None:
        # Where no step came, the end of the hook is the last that is known of the prolog.
        line.until("prolog", attach_ns or first(events, "hook", "received"))
    limit_ns = trained_ns or limit_ns
    _load(line, events, attach_ns, task_ns, limit_ns)
    line.until("program", trained_ns)
    ended_ns = end_ns if end_ns is not None else first(events, "session", "end")
    trained_ns = None if trained_ns is None else max(begin_ns, trained_ns)
    return NodeStart(sent.node, begin_ns, trained_ns, tuple(line.spans), ended_ns, clock)


def _load(
    line: _Timeline,
    events: Sequence[Event],
    attach_ns: int | None,
    task_ns: int | None,
    limit_ns: int | None,
) -> None:
    """From the first step on: launch, then what is loaded, as far as it is known."""
    marks = {stage: mark_ns(events, name, until_ns=limit_ns) for stage, name in _MARKS.items()}
    reads = _reads(events, limit_ns)
    container = _container(events, reads)
    if container is not None and task_ns is not None and container[0] < task_ns:
        line.until("launch", container[0])
    else:
        line.until("launch", task_ns or attach_ns)
    if container is not None and marks["image"] is None:
        if container[0] > line.at_ns:  # the batch script was at work
            line.until("program", container[0], derived=True)
        line.until("image", container[1], derived=True)
    for stage, marked_ns in marks.items():
        if marked_ns is not None:
            line.until(stage, marked_ns)
            continue
        if stage not in reads or (stage == "image" and container is not None):
            continue
        first_ns, last_ns = reads[stage]
        # A file goes on being read a little after it is loaded: a stage ends where the next thing is begun.
        from_ns = max(first_ns, line.at_ns)
        later = [begin_ns for begin_ns, _ in reads.values() if from_ns < begin_ns < last_ns]
        end_ns = min([last_ns, *later])
        if end_ns > line.at_ns:
            if first_ns > line.at_ns:
                line.until("program", first_ns, derived=True)
            line.until(stage, end_ns, derived=True)


def _container(events: Sequence[Event], reads: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """When pyxis began to bring a container's image to a step, and when that step's task started.

    It does so between the step's attach and its first task; the importer asks for the image, or squashfuse
    reads it.
    """
    steps = [event for event in events if event.kind == "step" and event.step != "extern"]
    read_ns = reads["image"][0] if "image" in reads else None
    for stamp_ns in (first(events, "image", "get"), read_ns):
        if stamp_ns is None:
            continue
        before = [event.name for event in steps if event.t_ns <= stamp_ns]
        after = [event.t_ns for event in steps if event.t_ns > stamp_ns and event.name == "task_start"]
        if before[-1:] == ["attach"] and after:
            return stamp_ns, after[0]
    return None


def _reads(events: Sequence[Event], limit_ns: int | None) -> dict[str, tuple[int, int]]:
    """When the start first and last read of each kind of thing, as far as reads are seen."""
    found: dict[str, tuple[int, int]] = {}
    for event in events:
        first_ns, last_ns = int(event.number("first_ns")), int(event.number("last_ns"))
        if (event.kind, event.name) != ("access", "start") or event.what is None or not first_ns:
            continue
        if limit_ns is not None:
            if first_ns > limit_ns:
                continue
            last_ns = min(last_ns, limit_ns)
        known = found.get(event.what, (first_ns, last_ns))
        found[event.what] = (min(known[0], first_ns), max(known[1], last_ns))
    return found


def first(events: Iterable[Event], kind: str, name: str) -> int | None:
    """The stamp of the first such event."""
    return next((event.t_ns for event in events if (event.kind, event.name) == (kind, name)), None)


def mark_ns(
    events: Iterable[Event],
    name: str,
    *,
    step: str | None = None,
    any_step: bool = True,
    until_ns: int | None = None,
) -> int | None:
    """When the last task came to this mark; of a task that marks again, its first mark counts.

    any_step: all steps count; else those of `step` alone.
    """
    stamps: dict[tuple[str | None, int | None], int] = {}
    for event in events:
        if (event.kind, event.name) != ("mark", name) or (until_ns is not None and event.t_ns > until_ns):
            continue
        if any_step or event.step == step:
            stamps.setdefault((event.step, event.task), event.t_ns)
    return max(stamps.values(), default=None)
