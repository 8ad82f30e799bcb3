"""Readahead: as much behind a touch as was touched before it."""

from __future__ import annotations

import random

from bootseer_slurm.prefetch.ahead import Ahead


def test_a_touch_brings_the_next_block() -> None:
    ahead = Ahead(1000)
    assert ahead.touch(7, 7) == (8, 8)
    assert ahead.touch(20, 21) == (22, 23)
    assert ahead.touch(20, 21) is None, "they were touched before"


def test_a_run_has_as_much_behind_it_as_it_is_long_up_to_a_mebibyte() -> None:
    ahead = Ahead(1000)
    found = [ahead.touch(block, block) for block in range(40)]
    assert found[:4] == [(1, 1), (2, 3), (4, 5), (6, 7)]
    asked_until = 0
    for block, asked in enumerate(found):
        _, asked_until = asked or (0, asked_until)
        shall_be_there = min(block + 1, 16)
        assert shall_be_there / 2 <= asked_until - block <= shall_be_there


def test_a_long_run_asks_for_half_a_mebibyte_at_once() -> None:
    ahead = Ahead(1000)
    found = [ahead.touch(block, block) for block in range(200)]
    late = [each for each in found[100:] if each]
    assert {last - first + 1 for first, last in late} == {8}
    assert [first for first, _ in late[1:]] == [last + 1 for _, last in late[:-1]], "each block once"


def test_no_more_is_asked_for_than_shall_be_there() -> None:
    ahead = Ahead(1000)
    found = [ahead.touch(block, block, 1) for block in range(10)]
    assert found == [(block + 1, block + 1) for block in range(10)]


def test_some_shall_be_there_behind_a_single_touch_too() -> None:
    ahead = Ahead(1000)
    assert ahead.touch(7, 7, least_blocks=5) == (8, 12)
    assert ahead.touch(8, 8, least_blocks=5) is None, "four of five were asked for"
    assert ahead.touch(10, 10, least_blocks=5) == (13, 15)
    assert ahead.touch(50, 50, 3, least_blocks=5) == (51, 53), "no more than the most"
    assert ahead.touch(100, 100, least_blocks=50) == (101, 116), "nor than a mebibyte"


def test_a_gap_begins_a_new_run() -> None:
    ahead = Ahead(1000)
    for block in range(10):
        ahead.touch(block, block, 1)
    assert ahead.touch(11, 11) == (12, 12)
    assert ahead.touch(10, 10) == (13, 21), "the gap is filled, and 12 was asked for"


def test_it_grows_whatever_the_order() -> None:
    ahead = Ahead(1000)
    for block in (4, 2, 0, 1, 3):
        ahead.touch(block, block, 1)
    assert ahead.touch(6, 6) == (7, 7)
    assert ahead.touch(5, 5) == (8, 11), "6 shall be there, of which two were asked for"


def test_nothing_lies_behind_the_end() -> None:
    ahead = Ahead(40)
    assert ahead.touch(0, 37) == (38, 39)
    assert ahead.touch(38, 39) is None


def test_what_is_brought_in_vain_is_no_more_than_what_was_touched() -> None:
    for seed in range(20):
        chance, ahead = random.Random(seed), Ahead(4000)
        touched, brought = set(), set()
        for _ in range(60):
            start, length = chance.randrange(4000), chance.randrange(1, 20)
            for block in range(start, min(4000, start + length)):
                touched.add(block)
                first, last = ahead.touch(block, block) or (1, 0)
                brought.update(range(first, last + 1))
        assert len(brought - touched) <= len(touched)
