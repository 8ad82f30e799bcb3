"""What the report needs of a start on this node: told once, when the start is over.

Reads that wait after training began are no reads of the start, and training begins before the start is over:
the agent waits for the marks of the other tasks, or for quiet. So waits are noted when training begins.

Owns the look at the GPUs (gpu.py) and at the kernel's pressure figures (pressure.py) while the start goes on.
Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from bootseer_slurm.artifacts.layer import Layer, summary
from bootseer_slurm.cache.waits import Waited
from bootseer_slurm.events import EventLog
from bootseer_slurm.job.gpu import GpuWatch
from bootseer_slurm.job.pressure import Pressure
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.slurm.allocation import Job


class Telemetry:
    """The figures of one start."""

    def __init__(
        self,
        job: Job,
        log: EventLog,
        phase: JobPhase,
        layers: Callable[[], Sequence[Layer]],
        *,
        limit_s: float,
    ) -> None:
        """layers: gives those that the job has by now. limit_s: how long a start is watched at most."""
        self._log = log
        self._layers = layers
        self._pressure = Pressure()
        self._gpus = GpuWatch(job.gpus, phase, limit_s=limit_s, on_busy=self._busy)
        self._told = self._image_told = self._step_begun = self._is_marked = False
        self._waited: dict[Layer, Waited] | None = None  # until training began, where that was seen
        self._lock = threading.Lock()

    def begin(self) -> None:
        """The session has begun."""
        self._gpus.start()

    def _busy(self, since_ns: int) -> None:
        self._log.emit("training", "gpu", t_ns=since_ns)
        self._note_waits(marked=False)

    def trains(self) -> None:
        """A task marked that it trains. The last one that does so before the start is over counts."""
        self._note_waits(marked=True)

    def _note_waits(self, *, marked: bool) -> None:
        waited = {layer: layer.handle.waited for layer in self._layers()}
        with self._lock:
            if marked or not self._is_marked:  # a mark says it better than a GPU
                self._waited, self._is_marked = waited, marked

    def step(self) -> None:
        """The first step begins: what was read before was for mounting, and is no read of the start."""
        with self._lock:
            if self._step_begun:
                return
            self._step_begun = True
        for layer in self._layers():
            layer.handle.reader.usage.first_ns = 0

    def image_asked(self, name: str) -> None:
        """An importer wants an image. The first of them is told: a job may ask as often as it likes."""
        with self._lock:
            if self._image_told:
                return
            self._image_told = True
        self._log.emit("image", "get", target=name, what="image")

    def over(self, *, read_ns: int = 0) -> None:
        """The start is over. read_ns: when something new was last read, if that is how it is known."""
        with self._lock:
            if self._told:
                return
            self._told = True
            until_training = self._waited
        if read_ns:
            self._log.emit("training", "io", t_ns=read_ns)
        for layer in self._layers():
            waited = layer.handle.waited
            of_start = waited if until_training is None else until_training.get(layer, Waited())
            self._log.emit("access", "start", **summary(layer, of_start))
        lasted_s, stalled = self._pressure.since()
        self._log.emit("load", "start", dur_s=lasted_s, **stalled)

    def end(self) -> None:
        """The job is over: tell what was read of each layer."""
        self.over()
        for layer in self._layers():
            self._log.emit("access", "summary", **summary(layer))
