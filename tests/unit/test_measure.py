"""Measure: which waits are the start's, by what said that training began."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.agent.measure import Measure
from bootseer_slurm.agent.request import Job
from bootseer_slurm.cache.waits import Waited
from bootseer_slurm.events import EventLog


class Start:
    """A start that is measured, and the one blob that it reads."""

    def __init__(self, mocker: MockerFixture) -> None:
        self.log = EventLog(1, 0, "n1")
        self.part = self.add(mocker)
        self.parts = [self.part]
        self.measure = Measure(Job(1, 0, 1000, 1000), self.log, limit_s=60, parts=lambda: self.parts)

    def add(self, mocker: MockerFixture) -> Mock:
        part = mocker.Mock(waited=Waited(0.0, 0.0))
        part.summary = lambda waited: {"waited_s": waited.waited_s, "longest_wait_s": waited.longest_s}
        return part

    def waited(self, waited_s: float) -> None:
        self.part.waited = Waited(waited_s, waited_s / 2)

    def told(self) -> list[tuple[float, float]]:
        self.measure.over(self.parts)
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
        start.measure.trains()
    start.waited(30)
    assert start.told() == [(4, 2)]


def test_without_a_mark_waits_count_until_a_gpu_is_busy(start: Start) -> None:
    start.waited(6)
    start.measure._busy(1)
    start.waited(30)
    assert start.told() == [(6, 3)]


def test_a_mark_counts_before_and_after_a_gpu_is_busy(start: Start) -> None:
    start.measure._busy(1)
    start.waited(10)
    start.measure.trains()
    start.waited(20)
    start.measure._busy(1)
    assert start.told() == [(10, 5)]


def test_what_is_looked_up_once_the_job_trains_waited_for_nothing_in_the_start(
    start: Start, mocker: MockerFixture
) -> None:
    start.waited(2)
    start.measure.trains()
    start.parts.append(start.add(mocker))
    start.parts[1].waited = Waited(5.0, 5.0)
    assert start.told() == [(2, 1), (0, 0)]
