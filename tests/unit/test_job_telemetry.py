"""Telemetry: which waits are the start's, by what said that training began."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.cache.fetching import Usage
from bootseer_slurm.cache.waits import Waited
from bootseer_slurm.events import EventLog
from bootseer_slurm.job.telemetry import Telemetry
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.slurm.allocation import Job


class Start:
    """A start that is measured, and the one blob that it reads."""

    def __init__(self, mocker: MockerFixture) -> None:
        self.log = EventLog(1, 0, "n1")
        self.layer = self.add(mocker)
        self.layers = [self.layer]
        self.telemetry = Telemetry(
            Job(1, 0, 1000, 1000), self.log, JobPhase(), lambda: self.layers, limit_s=60
        )

    def add(self, mocker: MockerFixture) -> Mock:
        layer = mocker.Mock(label="a")
        layer.ref.kind = "image"
        layer.handle.configure_mock(waited=Waited(0.0, 0.0), usage=Usage(), cached_bytes=0)
        return layer

    def waited(self, waited_s: float) -> None:
        self.layer.handle.waited = Waited(waited_s, waited_s / 2)

    def told(self) -> list[tuple[float, float]]:
        self.telemetry.over()
        events = [event for event in self.log.events() if (event.kind, event.name) == ("access", "start")]
        return [(event.number("waited_s"), event.number("longest_wait_s")) for event in events]


@pytest.fixture
def start(mocker: MockerFixture) -> Start:
    return Start(mocker)


def test_without_a_sign_of_training_waits_count_until_the_start_is_over(start: Start) -> None:
    start.waited(8)
    assert start.told() == [(8, 4)]


def test_waits_after_the_last_tasks_mark_are_not_the_starts(start: Start) -> None:
    for waited_s in (2, 4):
        start.waited(waited_s)
        start.telemetry.trains()
    start.waited(30)
    assert start.told() == [(4, 2)]


def test_without_a_mark_waits_count_until_a_gpu_is_busy(start: Start) -> None:
    start.waited(6)
    start.telemetry._busy(1)
    start.waited(30)
    assert start.told() == [(6, 3)]


def test_a_mark_counts_before_and_after_a_gpu_is_busy(start: Start) -> None:
    start.telemetry._busy(1)
    start.waited(10)
    start.telemetry.trains()
    start.waited(20)
    start.telemetry._busy(1)
    assert start.told() == [(10, 5)]


def test_what_is_looked_up_once_the_job_trains_waited_for_nothing_in_the_start(
    start: Start, mocker: MockerFixture
) -> None:
    start.waited(2)
    start.telemetry.trains()
    start.layers.append(start.add(mocker))
    start.layers[1].handle.waited = Waited(5.0, 5.0)
    assert start.told() == [(2, 1), (0, 0)]
