"""Who is silent for want of a core, at this end or at the other, is not called missing at once."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import cast

import pytest

from bootseer_slurm.peers.child import clock
from bootseer_slurm.peers.child.links import Links
from bootseer_slurm.peers.child.reach import Reach
from bootseer_slurm.peers.directory import Parent
from bootseer_slurm.peers.fetch import FIRST_ANSWER_S, REACHED_S, Viewpoint
from bootseer_slurm.peers.groups import Chunk, Ring
from bootseer_slurm.peers.messages import Probe
from bootseer_slurm.peers.policy import Policy

CHUNK = Chunk("blob", 0)
RING = Ring(0, tuple(range(8)))
OWNERS = list(RING.owners(CHUNK))


def test_time_in_which_this_process_stood_still_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    wall_s, cpu_s = 100.0, 5.0
    monkeypatch.setattr(
        clock, "time", SimpleNamespace(monotonic=lambda: wall_s, thread_time=lambda: cpu_s), raising=True
    )
    own = clock.Clock()
    wall_s, cpu_s = wall_s + 1.0, cpu_s + 0.3  # it worked for 0.3 s, and stood for 0.7 s
    own.waits()
    assert own.now_s() == pytest.approx(100.3)
    wall_s += 0.55  # of a wait for 0.05 s
    own.woke(100.35)
    assert own.now_s() == pytest.approx(100.35)
    wall_s += 0.01
    own.waits()
    assert own.now_s() == pytest.approx(100.36), "less is no matter"


@pytest.mark.parametrize("demand", [False, True])
def test_a_silent_node_whose_machine_is_there_has_more_time(demand: bool) -> None:
    here = Viewpoint(99, (RING,))
    here.liveness.heard(50)
    policy = Policy(here)
    begun = policy.demand(CHUNK, 0.0) if demand else policy.prefetch([CHUNK], 0.0)
    assert begun
    end_s = REACHED_S / 2 if demand else REACHED_S
    for now_s in (FIRST_ANSWER_S, end_s - 0.01):
        assert policy.overdue(now_s, {OWNERS[0]}) == []
    assert policy.answered(CHUNK, OWNERS[0], Parent(5), end_s - 0.01), "its answer is late, and counts"
    assert policy.overdue(2 * end_s, {5}) and here.liveness.is_missing(5, 2 * end_s)


def test_a_silent_node_is_probed_once_and_its_kernel_is_heard() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        made = socket.create_connection(listening.getsockname())
        far = listening.accept()[0]
    link = SimpleNamespace(socket=made, connection=SimpleNamespace(wants_to_write=False))
    sent: list[tuple[int, object]] = []
    links = SimpleNamespace(
        link=lambda node: link if node == 1 else None,
        send=lambda *message: sent.append(message),
        proving=SimpleNamespace(reaches=lambda node: node == 2),
    )
    with made, far:
        reach = Reach(cast(Links, links))
        reach.heard(1, 10.0)
        assert reach.among([1, 2, 3], 10.05) == {2} and sent == []
        assert reach.among([1], 10.5) == {1} and sent == [(1, Probe())], "nobody is judged in the same moment"
        link.connection.wants_to_write = True
        assert reach.among([1], 10.55) == set(), "not even this kernel has it"
        link.connection.wants_to_write = False
        assert reach.among([1], 10.6) == {1} and len(sent) == 1
        reach.heard(1, 10.7)
        assert reach.among([1], 10.75) == set()
