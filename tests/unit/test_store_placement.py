"""Which objects are given up, by servers that are drawn as a store may draw them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from bootseer_slurm.store.placement import TRIES, Tally

Draw = Callable[[], list[str]]


def place(objects: int, draw: Draw, tally: Tally | None = None) -> tuple[Counter[str], int]:
    """What each server got, and how many objects were given up."""
    tally = tally or Tally()
    kept: Counter[str] = Counter()
    given_up = 0
    for _ in range(objects):
        for number in range(1, TRIES + 1):
            servers = draw()
            if tally.takes(servers, last=number == TRIES):
                kept.update(servers)
                break
            given_up += 1
    return kept, given_up


def of(servers: int, replicas: int = 1) -> Draw:
    generator = random.Random(7)
    return lambda: generator.sample([f"n{number}" for number in range(servers)], replicas)


@pytest.mark.parametrize(
    ("objects", "servers", "replicas", "most"),
    [
        (256, 3, 1, 87),
        (48, 3, 1, 17),
        (8, 3, 1, 3),
        (8, 100, 1, 1),
        (256, 100, 1, 5),
        (48, 3, 2, 34),
        (48, 3, 3, 48),
    ],
)
def test_all_servers_have_as_many(objects: int, servers: int, replicas: int, most: int) -> None:
    kept, given_up = place(objects, of(servers, replicas))
    assert max(kept.values()) <= most and kept.total() == objects * replicas
    assert given_up <= objects


def test_a_writer_on_a_server_has_all_first_replicas_there() -> None:
    kept, given_up = place(64, lambda: ["n1"])
    assert kept == {"n1": 64} and given_up < 16, "another server was never seen"
    others = of(9)
    kept, given_up = place(64, lambda: ["here", *others()])
    assert kept["here"] == 64 and given_up <= 64 + 8


def test_what_is_there_counts() -> None:
    tally = Tally()
    for number in range(32):
        tally.add([f"n{number % 2}"])
    kept, _ = place(16, of(3), tally)
    assert kept["n2"] >= 11, "a third of them otherwise"
