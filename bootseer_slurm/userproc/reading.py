"""Reads of a user's process: ranges of objects into the ring's slots, those that somebody waits for first."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator

from bootseer_slurm.userproc.handles import Handles
from bootseer_slurm.userproc.link import HOLD_S
from bootseer_slurm.userproc.protocol import Count, Read


class Reading:
    """Reads into one ring. Thread-safe."""

    def __init__(self, handles: Handles, ring: mmap.mmap, slot_bytes: int) -> None:
        self._handles = handles
        self._ring = memoryview(ring)
        self._slot_bytes = slot_bytes
        self._demands = 0  # reads that somebody waits for
        self._no_demand = threading.Condition()

    def read(self, request: Read, _: bytes) -> tuple[Count, list[int]]:
        start = request.slot * self._slot_bytes
        reader = self._handles.object(request.handle, request.object)
        if request.demand:
            with self._somebody_waits():
                view = self._ring[start : start + request.size_bytes]
                return Count(reader.read_into(request.offset, view)), []
        count = 0
        while count < request.size_bytes:
            with self._no_demand:
                self._no_demand.wait_for(lambda: not self._demands, HOLD_S)
            step_bytes = min(request.step_bytes, request.size_bytes - count)
            view = self._ring[start + count : start + count + step_bytes]
            done = reader.read_into(request.offset + count, view)
            count += done
            if done < step_bytes:
                break
        return Count(count), []

    @contextlib.contextmanager
    def _somebody_waits(self) -> Iterator[None]:
        """No other read begins a step meanwhile."""
        with self._no_demand:
            self._demands += 1
        try:
            yield
        finally:
            with self._no_demand:
                self._demands -= 1
                if not self._demands:
                    self._no_demand.notify_all()
