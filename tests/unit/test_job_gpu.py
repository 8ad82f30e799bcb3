"""When a job first uses its GPUs. There is no GPU here: NVML's answers are given to the watch."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pynvml
import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.job import gpu
from bootseer_slurm.job.gpu import GpuWatch
from bootseer_slurm.phase import JobPhase


class Gpus:
    """What NVML says of two GPUs, look by look, and what was asked of it."""

    def __init__(self, mocker: MockerFixture, tmp_path: Path, percents: list[tuple[int, int]]) -> None:
        mocker.patch.object(gpu, "_EVERY_S", 0.01)
        mocker.patch.object(gpu, "_DRIVER", tmp_path)
        self.init = mocker.patch.object(pynvml, "nvmlInit")
        self.shutdown = mocker.patch.object(pynvml, "nvmlShutdown")
        mocker.patch.object(pynvml, "nvmlDeviceGetCount", return_value=2)
        self.handles: list[int] = []
        mocker.patch.object(pynvml, "nvmlDeviceGetHandleByIndex", side_effect=self._handle)
        mocker.patch.object(pynvml, "nvmlDeviceGetUtilizationRates", side_effect=self._rates)
        self._percents = percents
        self.looks = 0
        self.busy_ns: list[int] = []
        self.busy = threading.Event()

    def _handle(self, number: int) -> int:
        self.handles.append(number)
        return number

    def _rates(self, handle: int) -> Any:
        look = self._percents[min(self.looks // len(self.handles), len(self._percents) - 1)]
        self.looks += 1
        return type("Utilization", (), {"gpu": look[handle]})

    def watch(self, *gpus: int, limit_s: float = 5) -> JobPhase:
        def told(since_ns: int) -> None:
            self.busy_ns.append(since_ns)
            self.busy.set()

        phase = JobPhase()
        GpuWatch(gpus, phase, limit_s=limit_s, on_busy=told).start()
        return phase


def ended() -> bool:
    """Whether the watch's thread has ended, waiting for it."""
    for thread in threading.enumerate():
        if thread.name == "gpu":
            thread.join(5)
            return not thread.is_alive()
    return True


def test_use_that_lasts_is_told_with_its_beginning(mocker: MockerFixture, tmp_path: Path) -> None:
    gpus = Gpus(mocker, tmp_path, [(0, 0), (0, 90), (0, 0), (3, 80), (90, 80), (0, 70)])
    before_ns = time.time_ns()
    gpus.watch()
    assert gpus.busy.wait(5) and ended()
    assert len(gpus.busy_ns) == 1
    # The third look in a row that is busy is the sixth; told is the stamp of the first of them.
    assert gpus.looks == 12
    assert before_ns < gpus.busy_ns[0] < time.time_ns() - 15_000_000
    gpus.shutdown.assert_called_once()


def test_only_the_jobs_own_gpus_are_looked_at(mocker: MockerFixture, tmp_path: Path) -> None:
    gpus = Gpus(mocker, tmp_path, [(0, 99)])
    gpus.watch(0, limit_s=0.2)
    assert ended()
    assert (gpus.handles, gpus.busy_ns) == ([0], [])


def test_it_ends_when_the_start_is_over(mocker: MockerFixture, tmp_path: Path) -> None:
    gpus = Gpus(mocker, tmp_path, [(0, 0)])
    phase = gpus.watch()
    phase.train(marked=True)
    assert ended()
    assert gpus.busy_ns == []
    gpus.shutdown.assert_called_once()


def test_a_failure_of_the_driver_is_no_fault_of_the_job(
    mocker: MockerFixture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = Gpus(mocker, tmp_path, [(0, 0)])
    gpus.init.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with caplog.at_level("DEBUG"):
        gpus.watch()
        assert ended()
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert gpus.busy_ns == []


def test_a_driver_that_hangs_holds_up_nobody(mocker: MockerFixture, tmp_path: Path) -> None:
    gpus = Gpus(mocker, tmp_path, [(0, 0)])
    answers = threading.Event()
    gpus.init.side_effect = lambda: answers.wait(10)
    phase = gpus.watch()
    phase.train(marked=True)
    assert any(thread.name == "gpu" and thread.daemon for thread in threading.enumerate())
    answers.set()
    assert ended()


def test_a_driver_that_hangs_holds_a_bounded_number_of_threads(mocker: MockerFixture, tmp_path: Path) -> None:
    mocker.patch.object(gpu, "_ROOM", threading.BoundedSemaphore(3))
    gpus = Gpus(mocker, tmp_path, [(0, 99)])
    answers = threading.Event()
    gpus.init.side_effect = lambda: answers.wait(10)
    phases = [gpus.watch() for _ in range(5)]
    assert sum(thread.name == "gpu" for thread in threading.enumerate()) == 3
    answers.set()
    for phase in phases:
        phase.end()
    while not ended():
        pass
    gpus.watch()
    assert gpus.busy.wait(5)  # there is room again
    assert ended()


@pytest.mark.parametrize("lacks", ["driver", "library"])
def test_without_a_gpu_or_the_library_nothing_runs(mocker: MockerFixture, tmp_path: Path, lacks: str) -> None:
    gpus = Gpus(mocker, tmp_path, [(99, 99)])
    if lacks == "driver":
        mocker.patch.object(gpu, "_DRIVER", tmp_path / "none")
    else:
        mocker.patch("importlib.util.find_spec", return_value=None)
    gpus.watch()
    assert not any(thread.name == "gpu" for thread in threading.enumerate())
    gpus.init.assert_not_called()
