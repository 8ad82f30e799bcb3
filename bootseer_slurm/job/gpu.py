"""The first use of its GPUs by a job: a sign that it trains, of jobs that do not say so.

Polls NVML (nvidia-ml-py, `pip install bootseer-slurm[gpu]`) in a thread of its own, for a driver may hang. On
a node without a GPU or without the library nothing runs. Any failure ends the watching with one debug line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bootseer_slurm.phase import JobPhase

_log = logging.getLogger(__name__)

_DRIVER = Path("/dev/nvidiactl")
_EVERY_S = 1.0
# A kernel ran in so much of the last sample (nvmlDeviceGetUtilizationRates), so many looks in a row: what a
# program does on a GPU while it loads is shorter.
_BUSY_PERCENT = 50
_LOOKS = 3
_ROOM = threading.BoundedSemaphore(64)  # for watches; where the driver hangs none of them ends


class GpuWatch:
    """Looks until a GPU is busy, the start is over, or `limit_s` is."""

    def __init__(
        self, gpus: Sequence[int], phase: JobPhase, *, limit_s: float, on_busy: Callable[[int], None]
    ) -> None:
        """gpus: NVML's numbers, all of the node when empty. on_busy: told once, since when (ns).

        limit_s: how long to look at most.
        """
        self._gpus = gpus
        self._limit_s = limit_s
        self._on_busy = on_busy
        self._phase = phase

    def start(self) -> None:
        """Begin to look, where there is something to look at."""
        if not _DRIVER.exists() or importlib.util.find_spec("pynvml") is None:
            return
        if _ROOM.acquire(blocking=False):
            try:
                threading.Thread(target=self._watch, name="gpu", daemon=True).start()
            except RuntimeError:  # no thread can be started now
                _ROOM.release()

    def _watch(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            try:
                numbers = self._gpus or range(pynvml.nvmlDeviceGetCount())
                handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
                self._look(lambda: max(pynvml.nvmlDeviceGetUtilizationRates(each).gpu for each in handles))
            finally:
                with contextlib.suppress(Exception):
                    pynvml.nvmlShutdown()
        except Exception as error:
            _log.debug("GPUs are not watched: %s: %s", type(error).__name__, error)
        finally:
            _ROOM.release()

    def _look(self, percent: Callable[[], int]) -> None:
        deadline_s = time.monotonic() + self._limit_s
        count, since_ns = 0, 0
        while not self._phase.wait_start_over(_EVERY_S) and time.monotonic() < deadline_s:
            now_ns = time.time_ns()
            if percent() < _BUSY_PERCENT:
                count = 0
                continue
            since_ns = since_ns if count else now_ns
            count += 1
            if count == _LOOKS:
                if self._phase.is_starting:
                    self._on_busy(since_ns)
                return
