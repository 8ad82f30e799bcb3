"""The clocks of a job's nodes, made one.

A node writes a small file into the store and compares the time of change that the store's server gives it
with its own clock (store.clock_offset); that is the event `clock`. The offset to the server is known within
half the time that the writing took, and half of what the store rounds its times by. Whoever reads the report
does the same, so each node is set against this machine's clock: the controller's, where it is read there.
Stamps are moved only by an offset that is larger than its error. Pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bootseer_slurm.report.gather.run import NodeEvents, Offset

_MAX_NS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Clock:
    """How far a node's clock is ahead, in seconds, and by how much that may be wrong."""

    offset_s: float
    error_s: float

    @property
    def is_certain(self) -> bool:
        """Whether the clock is surely wrong, and its stamps are to be moved."""
        return abs(self.offset_s) > self.error_s


def clock_of(sent: NodeEvents, reader: Offset | None) -> Clock | None:
    """A node's clock against the reader's, or against the store's server when that is not known.

    None: the node could not tell.
    """
    found = [
        Offset(event.number("offset_ms") / 1e3, abs(event.number("error_ms")) / 1e3)
        for event in sent.events
        if (event.kind, event.name) == ("clock", "store") and "error_ms" in event.extra
    ]
    if not found:
        return None
    best = min(found, key=lambda offset: offset.error_s)
    base = reader or Offset(0.0, 0.0)
    return Clock(best.ahead_s - base.ahead_s, best.error_s + base.error_s)


def corrected(sent: NodeEvents, clock: Clock | None) -> NodeEvents:
    """The node's events on the common clock."""
    if clock is None or not clock.is_certain:
        return sent
    shift_ns = round(clock.offset_s * 1e9)
    moved = []
    for event in sent.events:
        extra = {
            key: _moved(value, shift_ns)
            if key in ("first_ns", "last_ns") and isinstance(value, int) and value
            else value
            for key, value in event.extra.items()
        }
        moved.append(replace(event, t_ns=_moved(event.t_ns, shift_ns), extra=extra))
    return replace(sent, events=tuple(moved))


def _moved(stamp_ns: int, shift_ns: int) -> int:
    """The user may have written any offset: what is moved out of time stays at its edge."""
    return max(0, min(stamp_ns - shift_ns, _MAX_NS))
