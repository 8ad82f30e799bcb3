"""The blobs that the owner has opened: numbers of chunks that are there, their sizes and places."""

from __future__ import annotations

import os

import pytest

from bootseer_slurm.peers.child.blobs import Blobs
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.local import OpenBlob
from bootseer_slurm.peers.uploads import Held
from bootseer_slurm.peers.wire import MOST_DATA_BYTES

MIB = 2**20
LARGE, SMALL = "ab" * 32, "cd" * 32


def open_file() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def opened() -> Blobs:
    """Two blobs of 9 MiB and 5 bytes: one of chunks of 4 MiB, one of chunks of 1 MiB."""
    blobs = Blobs()
    blobs.open(OpenBlob(1, LARGE, 9 * MIB + 5, 4 * MIB, b"\xff\xff"), open_file())
    blobs.open(OpenBlob(2, SMALL, 9 * MIB + 5, MIB, b"\x02"), open_file())
    return blobs


def test_each_blob_has_chunks_of_its_own_size() -> None:
    blobs = opened()
    assert [blobs.size_of(Chunk(LARGE, number)) for number in range(3)] == [4 * MIB, 4 * MIB, MIB + 5]
    assert [blobs.size_of(Chunk(SMALL, number)) for number in (0, 8, 9)] == [MIB, MIB, 5]
    parts = list(blobs.parts(Chunk(LARGE, 2)))
    assert [part[1] for part in parts] == [0, MOST_DATA_BYTES]
    assert [part[3:] for part in parts] == [(8 * MIB, MIB), (9 * MIB, 5)]
    assert [part[3:] for part in blobs.parts(Chunk(SMALL, 7))] == [(7 * MIB, MIB)]


def test_chunks_beyond_the_end_are_not_there() -> None:
    blobs = opened()
    assert blobs.held(Chunk(LARGE, 2)) is Held.HERE, "it was said to be here"
    for chunk in (Chunk(LARGE, 3), Chunk(LARGE, 9), Chunk(SMALL, 10), Chunk(SMALL, 2**32 - 1)):
        assert not blobs.may_be(chunk) and blobs.held(chunk) is Held.LACKS
    assert blobs.may_be(Chunk(SMALL, 9)) and blobs.held(Chunk(SMALL, 1)) is Held.HERE
    assert blobs.may_be(Chunk("ef" * 32, 99)), "another node may have opened it first"


def test_the_owner_s_numbers_that_are_not_there_name_no_chunk() -> None:
    blobs = opened()
    assert blobs.chunk(2, 9) == Chunk(SMALL, 9) and blobs.chunk(1, 2) == Chunk(LARGE, 2)
    assert [blobs.chunk(*each) for each in ((2, 10), (1, 3), (0, 0), (3, 0), (1, -1))] == [None] * 5


def test_what_is_closed_is_not_there_and_may_be_opened_by_another_number() -> None:
    blobs = opened()
    assert blobs.close(1) == LARGE and blobs.close(1) is None and blobs.close(7) is None
    assert blobs.chunk(1, 0) is None and blobs.held(Chunk(LARGE, 0)) is Held.LACKS
    assert blobs.may_be(Chunk(LARGE, 0)), "others may have it open"
    blobs.open(OpenBlob(3, LARGE, 9 * MIB + 5, 4 * MIB), open_file())
    assert blobs.chunk(1, 0) is None and blobs.chunk(3, 0) == Chunk(LARGE, 0)
    assert blobs.held(Chunk(LARGE, 0)) is Held.LACKS, "nothing is here any more"


def test_the_end_of_a_number_does_not_end_the_next_one() -> None:
    blobs = opened()
    blobs.open(OpenBlob(3, LARGE, 9 * MIB + 5, 4 * MIB), open_file())
    assert blobs.close(1) is None and blobs.chunk(3, 0) == Chunk(LARGE, 0)
    assert blobs.close(3) == LARGE


def test_a_file_is_open_until_its_last_part_is_sent() -> None:
    blobs, fd = Blobs(), open_file()
    blobs.open(OpenBlob(1, LARGE, 9 * MIB, 4 * MIB, b"\xff"), fd)
    parts = list(blobs.parts(Chunk(LARGE, 0)))
    blobs.close(1)
    while len(parts) > 1:
        del parts[0]
    os.fstat(fd)
    parts.clear()
    with pytest.raises(OSError):
        os.fstat(fd)
