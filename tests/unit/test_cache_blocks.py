"""The states of blocks: who may claim which, and which digests are learned, not compared."""

from __future__ import annotations

import threading
from mmap import mmap

import pytest

from bootseer_slurm.blob.digest import BLAKE3, NO_DIGEST, digest_slice
from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache.blocks import Blocks
from bootseer_slurm.cache.live import IN_FLIGHT, MISSING, PRESENT, UNCHECKED
from bootseer_slurm.errors import IntegrityError

LAYOUT = Layout(10, block_bytes=4, digest=BLAKE3)
CONTENT = memoryview(b"aaaabbbbcc")


def blocks(states: bytes = bytes(3), digests: bytes | None = None) -> Blocks:
    mapped = mmap(-1, len(states))
    mapped[:] = states
    return Blocks(LAYOUT, mapped, bytearray(LAYOUT.digests_of(CONTENT) if digests is None else digests))


def test_a_claim_takes_neighbours_of_one_state() -> None:
    made = blocks(bytes([MISSING, MISSING, UNCHECKED]))
    assert made.claim(0, 2) == (2, False) and made.states[:] == bytes([IN_FLIGHT, IN_FLIGHT, UNCHECKED])
    assert made.claim(0, 2) == (0, False), "others were faster"
    assert made.next_missing() == 2 and made.claim(2, 2) == (1, True)
    assert made.next_missing() == -1
    made.end_claim(0, 2, PRESENT)
    assert made.has(0, 1) and not made.has(0, 2) and made.present == 2


def test_each_block_is_claimed_by_one_thread() -> None:
    made = blocks()
    claimed: list[int] = []

    def claim() -> None:
        for block in range(3):
            claimed.extend([block] * made.claim(block, block)[0])

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [0, 1, 2]


def test_a_reader_waits_until_the_claim_ends() -> None:
    made = blocks()
    made.claim(0, 0)
    waiting = threading.Thread(target=made.wait, args=(0, 60.0))
    waiting.start()
    made.end_claim(0, 1, MISSING)
    waiting.join(10)
    assert not waiting.is_alive() and made.next_missing() == 0


@pytest.mark.parametrize("learn", [False, True])
def test_a_wrong_block_is_refused(learn: bool) -> None:
    made = blocks()
    made.check(0, 3, CONTENT, learn=learn)
    with pytest.raises(IntegrityError, match="block 1 "):
        made.check(0, 3, memoryview(b"aaaabbxbcc"), learn=learn)


@pytest.mark.parametrize("size_bytes", [0, 4, 9])
def test_bytes_that_lack_are_never_right(size_bytes: int) -> None:
    with pytest.raises(IntegrityError):
        blocks().check(0, 3, CONTENT[:size_bytes], learn=False)


def test_an_unknown_digest_is_learned_once_and_then_compared() -> None:
    known = bytearray(LAYOUT.digests_of(CONTENT))
    known[digest_slice(1)] = NO_DIGEST
    with pytest.raises(IntegrityError, match="block 1 "):
        blocks(digests=bytes(known)).check(0, 3, CONTENT, learn=False)
    made = blocks(digests=bytes(known))
    made.check(0, 3, CONTENT, learn=True)
    assert made.digests == LAYOUT.digests_of(CONTENT)
    with pytest.raises(IntegrityError, match="block 1 "):
        made.check(1, 1, memoryview(b"bbbx"), learn=True)


def test_doubt_has_what_is_there_compared_again() -> None:
    made = blocks(bytes([PRESENT, MISSING, IN_FLIGHT]))
    made.doubt()
    assert made.states[:] == bytes([UNCHECKED, MISSING, IN_FLIGHT])
