"""Slots of the ring, and what peers may write into them."""

from __future__ import annotations

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers.child.incoming import Coming, Incoming
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.wire import MOST_DATA_BYTES, Received

CHUNK, OTHER = Chunk("ab" * 32, 0), Chunk("ab" * 32, 1)
SIZE_BYTES = MOST_DATA_BYTES + 100


def incoming(slots: int = 1) -> Incoming:
    made = Incoming(memoryview(bytearray(slots * CHUNK_BYTES)), slots)
    assert made.expect(CHUNK, 5, SIZE_BYTES)
    return made


def bring(to: Incoming, offset: int, size_bytes: int) -> Coming | None:
    """A frame of CHUNK, from its parent."""
    if to.place(5, CHUNK, offset, size_bytes) is None:
        return None
    return to.took(5, Received(CHUNK, offset, size_bytes, end=True), 0.0)


def test_what_the_owner_looks_at_is_not_written_again() -> None:
    to = incoming()
    bring(to, 0, MOST_DATA_BYTES)
    coming = bring(to, MOST_DATA_BYTES, 100)
    assert coming and coming.is_whole
    assert to.leave(CHUNK) is None and not to.expect(OTHER, 5, SIZE_BYTES), "its slot is not free"
    assert to.place(5, CHUNK, 0, MOST_DATA_BYTES) is None
    assert to.free(CHUNK) is coming and to.expect(OTHER, 5, SIZE_BYTES)


def test_a_chunk_under_way_that_is_left_frees_its_slot() -> None:
    to = incoming()
    bring(to, 0, MOST_DATA_BYTES)
    assert to.leave(CHUNK) and to.place(5, CHUNK, MOST_DATA_BYTES, 100) is None
    assert to.expect(OTHER, 6, SIZE_BYTES)


def test_small_frames_and_bytes_that_came_before_go_nowhere() -> None:
    to = incoming()
    assert to.place(5, CHUNK, 0, 1) is None
    assert to.place(6, CHUNK, 0, MOST_DATA_BYTES) is None, "nobody asked this node"
    assert bring(to, 0, MOST_DATA_BYTES)
    assert to.place(5, CHUNK, 0, MOST_DATA_BYTES) is None
    assert to.place(5, CHUNK, MOST_DATA_BYTES, 99) is None and bring(to, MOST_DATA_BYTES, 100)
