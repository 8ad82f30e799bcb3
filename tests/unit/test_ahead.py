"""Readahead that grows while it is right, and brings nothing in vain that was not right just before."""

from __future__ import annotations

import random

from bootseer_slurm.blob.ahead import Ahead


def test_a_lone_touch_brings_nothing() -> None:
    ahead = Ahead(1000)
    assert [ahead.touch(block, block) for block in range(0, 1000, 7)] == [None] * 143


def test_a_run_brings_as_much_as_was_right_up_to_a_chunk() -> None:
    ahead = Ahead(1000)
    found = [ahead.touch(block, block) for block in range(40)]
    assert found[:4] == [None, (2, 2), (3, 4), (4, 6)]
    assert found[39] == (40, 55)
    assert ahead.touch(39, 39) is None, "it was touched before"


def test_a_block_in_vain_ends_the_growth() -> None:
    ahead = Ahead(1000)
    for block in range(10):
        ahead.touch(block, block)
    assert ahead.touch(11, 11) is None
    assert ahead.touch(12, 12) == (13, 13)


def test_it_grows_whatever_the_order() -> None:
    ahead = Ahead(1000)
    for block in (4, 2, 0, 1, 3):
        ahead.touch(block, block)
    assert ahead.touch(5, 5) == (6, 10)


def test_nothing_lies_behind_the_end() -> None:
    ahead = Ahead(10)
    assert ahead.touch(0, 7) == (8, 9)
    assert ahead.touch(8, 9) is None


def test_what_is_brought_in_vain_is_less_than_what_was_touched() -> None:
    for seed in range(20):
        chance, ahead = random.Random(seed), Ahead(4000)
        touched, brought = set(), set()
        for _ in range(60):
            start, length = chance.randrange(4000), chance.randrange(1, 20)
            for block in range(start, min(4000, start + length)):
                touched.add(block)
                first, last = ahead.touch(block, block) or (1, 0)
                brought.update(range(first, last + 1))
        assert len(brought - touched) < len(touched)
