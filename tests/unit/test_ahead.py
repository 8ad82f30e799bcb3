"""Readahead: one block behind each touch, more behind a long run, and little in vain."""

from __future__ import annotations

import random

from bootseer_slurm.blob.ahead import Ahead


def test_a_touch_brings_the_next_block() -> None:
    ahead = Ahead(1000)
    assert ahead.touch(7, 7) == (8, 8)
    assert ahead.touch(20, 21) == (22, 22)
    assert ahead.touch(20, 21) is None, "they were touched before"


def test_a_long_run_brings_more_up_to_a_mebibyte() -> None:
    ahead = Ahead(1000)
    found = [ahead.touch(block, block) for block in range(400)]
    assert found[14] == (15, 15)
    assert found[15] == (16, 17), "the run has 16 blocks"
    assert found[399] == (400, 415)


def test_a_gap_begins_a_new_run() -> None:
    ahead = Ahead(1000)
    for block in range(40):
        ahead.touch(block, block)
    assert ahead.touch(41, 41) == (42, 42)
    assert ahead.touch(40, 40) == (41, 43), "the gap is filled, and 41 blocks lie before its end"


def test_it_grows_whatever_the_order() -> None:
    ahead = Ahead(1000)
    for block in range(31, -1, -1):
        ahead.touch(block, block)
    assert ahead.touch(32, 32) == (33, 35)


def test_nothing_lies_behind_the_end() -> None:
    ahead = Ahead(40)
    assert ahead.touch(0, 37) == (38, 39)
    assert ahead.touch(38, 39) is None


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
        assert len(brought - touched) < len(touched) / 4
