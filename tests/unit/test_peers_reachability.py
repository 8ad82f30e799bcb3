"""Whether nodes can be reached as peers, on addresses of this machine."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from bootseer_slurm.peers.owner import reachability
from bootseer_slurm.peers.owner.reachability import PATIENCE_S, Answer, knock, reach


@contextlib.contextmanager
def listening(address: str, port: int = 0, *, deaf: bool = False) -> Iterator[int]:
    """A port that accepts. deaf: its queue is full, so the kernel answers nobody, as a firewall does."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(family))
        server.bind((address, port))
        server.listen(0)
        place = server.getsockname()[:2]
        for _ in range(4 if deaf else 0):
            caller = stack.enter_context(socket.socket(family))
            caller.setblocking(False)
            caller.connect_ex(place)
        yield place[1]


@pytest.fixture
def free() -> int:
    """A port that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("", 0))
        return int(tried.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_accepts_or_refuses(address: str, free: int) -> None:
    with listening(address) as port:
        assert knock(address, [free, port]) == (Answer.ACCEPTED, (port,))
    assert knock(address, [free, port]) == (Answer.REFUSED, (free, port))


def test_a_silent_port_is_told_though_others_answer_and_costs_half_a_second(free: int) -> None:
    with listening("127.0.0.1") as port, listening("127.0.0.1", deaf=True) as deaf:
        begin_s = time.monotonic()
        assert knock("127.0.0.1", [free, port, deaf]) == (Answer.SILENT, (deaf,))
        assert PATIENCE_S <= time.monotonic() - begin_s < PATIENCE_S + 1


def test_no_way_to_a_node_is_silence() -> None:
    assert knock("255.255.255.255", [7070])[0] is Answer.SILENT


def test_nodes_are_tried_side_by_side_and_told_in_their_order() -> None:
    names = [f"127.0.2.{number}" for number in range(1, 17)]
    advanced: list[int] = []
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(listening(names[0], deaf=True))
        for name in names[1:8]:
            stack.enter_context(listening(name, port, deaf=True))
        begin_s = time.monotonic()
        found = reach(names, "{node}", [port], own="n1", advance=lambda: advanced.append(1))
        assert time.monotonic() - begin_s < 4 * PATIENCE_S
    assert [each.node for each in found] == names
    assert [each.answer for each in found] == [Answer.SILENT] * 8 + [Answer.REFUSED] * 8
    assert len(advanced) == 2 * len(names)


def test_many_ports_are_tried_within_the_files_that_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = most = 0

    def count(address: str, ports: range) -> tuple[Answer, tuple[int, ...]]:
        nonlocal under_way, most
        under_way += len(ports)
        most = max(most, under_way)
        time.sleep(0.02)
        under_way -= len(ports)
        return Answer.REFUSED, ()

    monkeypatch.setattr(reachability, "knock", count)
    names = [f"127.0.2.{number}" for number in range(1, 33)]
    reach(names, "{node}", range(7000, 7256), own="n1", advance=lambda: None)
    assert 256 <= most <= 512


def test_a_name_without_an_address_or_with_this_machines_only(free: int) -> None:
    names = ["localhost", "n1.invalid", "127.0.0.1"]
    found = reach(names, "{node}", [free], own="n1", advance=lambda: None)
    assert [each.answer for each in found] == [Answer.NO_ADDRESS, Answer.NO_ADDRESS, Answer.REFUSED]
    assert found[0].found and not found[1].found
    (own,) = reach(["localhost"], "{node}", [free], own="localhost", advance=lambda: None)
    assert own.answer is Answer.REFUSED, "this node's own name may be loopback, as on Debian"


def test_an_address_of_another_family_than_the_others_have_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"n1": {socket.AF_INET6: "::1"}, "n2": {socket.AF_INET: "127.0.0.2"}}
    known["n3"] = known["n1"] | {socket.AF_INET: "127.0.0.1"}
    monkeypatch.setattr(reachability, "look_up", lambda host: known[host])
    monkeypatch.setattr(reachability, "is_loopback", lambda address: False)
    found = reach(["n1", "n2", "n3"], "{node}", [1], own="n9", advance=lambda: None)
    assert [each.address for each in found] == [None, "127.0.0.2", "127.0.0.1"]


def test_the_pattern_makes_the_name() -> None:
    (found,) = reach(["0.1"], "127.0.{node}", [1], own="n1", advance=lambda: None)
    assert (found.node, found.host, found.address) == ("0.1", "127.0.0.1", "127.0.0.1")
