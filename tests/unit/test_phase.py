"""The phase of a job: it goes one way, and whoever waits for it is woken."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bootseer_slurm.phase import JobPhase, Phase


def woken(wait: Callable[[float], bool], change: Callable[[], object]) -> bool:
    """Whether a thread that waits goes on, with True, once this changes."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(wait(10)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    change()
    thread.join(5)
    return found == [True]


def test_it_goes_one_way() -> None:
    phase = JobPhase()
    assert phase.now is Phase.STARTING and phase.is_starting and not phase.has_ended
    phase.train(marked=False)
    assert phase.now is Phase.TRAINING and not phase.is_marked
    phase.train(marked=True)
    assert phase.now is Phase.TRAINING and phase.is_marked, "a mark after quiet is still known"
    assert phase.end() and not phase.end(), "who ends a session is told so, and no second one"
    phase.train(marked=True)
    assert phase.now is Phase.ENDED


def test_a_job_that_ended_is_not_marked_any_more() -> None:
    phase = JobPhase()
    phase.end()
    phase.train(marked=True)
    assert not phase.is_marked and not phase.announce()


def test_the_marks_of_several_tasks_are_announced_once_until_they_are_taken() -> None:
    phase = JobPhase()
    assert phase.announce() and not phase.announce() and phase.is_announced
    phase.train(marked=True)
    assert phase.is_announced, "what follows from it is not done yet"
    phase.take_announcement()
    assert not phase.is_announced and phase.announce()


def test_each_wait_ends_with_what_it_is_for() -> None:
    phase = JobPhase()
    assert not phase.wait_start_over(0) and not phase.wait_marked(0) and not phase.wait_end(0)
    assert woken(phase.wait_start_over, lambda: phase.train(marked=False))
    assert not phase.wait_marked(0.01), "quiet is no mark"
    assert woken(phase.wait_marked, lambda: phase.train(marked=True))
    assert woken(phase.wait_end, phase.end)


def test_an_end_ends_all_waits() -> None:
    for name in ("wait_start_over", "wait_marked", "wait_end"):
        phase = JobPhase()
        assert woken(getattr(phase, name), phase.end)
