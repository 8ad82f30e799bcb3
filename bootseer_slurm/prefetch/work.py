"""The work of a prefetch: layers, each with how far it is, and runs of their hot blocks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from bootseer_slurm.artifacts.layer import Layer

AHEAD_MS = -2  # the time of a run behind a read: before all that plans name
_LEAST_S = 0.1  # a shorter time says nothing of a rate
_FORECAST_MARGIN = 1.1  # what is late comes as soon as it is asked for: reads go before the prefetch


@dataclass(slots=True, eq=False)
class Work:  # size: all that is known of one layer, most of it flags
    """One layer. times_ms: when a start touches each hot block, in order; -1: at once.

    hot_left: runs queued and in flight. hot_over: its hot blocks are there, failed, or were dropped.
    exhausted: nothing is left to be begun. ended: and nothing is in flight, which was told.
    """

    layer: Layer
    times_ms: dict[int, int]
    planned: bool
    in_flight: int = 0
    hot_left: int = 0
    hot_over: bool = False
    hot_there: bool = False
    exhausted: bool = False
    ended: bool = False
    start_s: float = field(default_factory=time.monotonic)
    in_time: bool = False  # as forecast at:
    forecast_s: float = -math.inf
    fetched_before: int = 0  # bytes, when it began

    def __post_init__(self) -> None:
        self.fetched_before = self.layer.handle.usage.fetched_bytes

    def lacking(self) -> list[int]:
        """The hot blocks that are not there."""
        blob = self.layer.handle.reader.blob
        return [block for block in self.times_ms if not blob.blocks.has(block, block)]

    def comes_in_time(self, bytes_per_s: float) -> bool:
        """Whether each block that is not there yet will come before a start that begins now touches it.

        bytes_per_s: of the link to the store, over which other nodes bring nothing.
        """
        lacking = self.lacking()
        handle = self.layer.handle
        if handle.reader.sources.unit_blocks:
            since_s = max(_LEAST_S, time.monotonic() - self.start_s)
            bytes_per_s = max(bytes_per_s, (handle.usage.fetched_bytes - self.fetched_before) / since_s)
        if not lacking:
            return True  # and the stream that brought the last one is about to say so
        if not bytes_per_s or any(self.times_ms[block] < 0 for block in lacking):
            return False
        begin_ms = min((at_ms for at_ms in self.times_ms.values() if at_ms > 0), default=0)
        block_bytes = self.layer.handle.reader.blob.layout.block_bytes
        return all(
            count * block_bytes / bytes_per_s * _FORECAST_MARGIN < (self.times_ms[block] - begin_ms) / 1000
            for count, block in enumerate(lacking, start=1)
        )


@dataclass(slots=True, order=True)
class Run:
    """Hot blocks that one read may bring. at_ms: when a start touches them. ahead: they lie behind a read."""

    at_ms: int
    number: int
    first: int = field(compare=False)
    last: int = field(compare=False)
    work: Work = field(compare=False)

    @property
    def ahead(self) -> bool:
        return self.at_ms == AHEAD_MS

    @property
    def is_needed(self) -> bool:
        return not self.work.ended if self.ahead else not self.work.hot_over
