"""The blocks of one cached blob: their states, their digests, and who fetches which. Thread-safe.

A block is MISSING, IN_FLIGHT (claimed by a thread of this process), PRESENT (written, and its digest agreed)
or UNCHECKED (on disk since before a reboot: it counts only after its digest was compared). The states lie in
memory that outlives this process (cache/live.py), and a block becomes PRESENT there only after its bytes were
written, so a successor of a killed process goes on where that one was. Does no I/O.
"""

from __future__ import annotations

import threading
from mmap import mmap

from bootseer_slurm.blob.digest import NO_DIGEST, digest_slice
from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache.live import IN_FLIGHT, MISSING, PRESENT, UNCHECKED
from bootseer_slurm.errors import IntegrityError


class Blocks:
    """The states and digests of the blocks, by number."""

    def __init__(self, layout: Layout, states: mmap, digests: mmap | bytearray) -> None:
        """states: a byte a block. digests: one after the other, zeros where none is known yet."""
        self.states = states
        self.digests = digests
        self.unsaved = True  # some state is not on disk
        self._layout = layout
        self._changed = threading.Condition()

    @property
    def present(self) -> int:
        """How many blocks are there and checked."""
        return self.states[:].count(PRESENT)

    def has(self, first: int, last: int) -> bool:
        """Whether blocks first to last are all present."""
        return self.states[first : last + 1].count(PRESENT) == last + 1 - first

    def next_missing(self, first: int = 0, end: int | None = None) -> int:
        """The first block from `first` on that nobody has or fetches, or that is unchecked; -1 without one.

        end: the block behind those that count; without it all do.
        """
        end = len(self.states) if end is None else end
        missing = self.states.find(bytes([MISSING]), first, end)
        unchecked = self.states.find(bytes([UNCHECKED]), first, end)
        return max(missing, unchecked) if missing < 0 or unchecked < 0 else min(missing, unchecked)

    def claim(self, first: int, last: int) -> tuple[int, bool]:
        """Take blocks from `first` on, up to `last`, for fetching or, where they are unchecked, for checking.

        Gives how many (0: others were faster), and whether they are unchecked: all of them, or none.
        """
        with self._changed:
            state = self.states[first]
            if state not in (MISSING, UNCHECKED):
                return 0, False
            end = first
            while end <= last and self.states[end] == state:
                self.states[end] = IN_FLIGHT
                end += 1
            return end - first, state == UNCHECKED

    def claim_all(self, first: int, last: int) -> bool:
        """Take these blocks for fetching, where all of them are missing; else none."""
        with self._changed:
            if self.states[first : last + 1].count(MISSING) != last + 1 - first:
                return False
            self.states[first : last + 1] = bytes([IN_FLIGHT]) * (last + 1 - first)
            return True

    def wait(self, block: int, timeout_s: float) -> None:
        """Wait until whoever fetches a block has it, or gave up."""
        with self._changed:
            self._changed.wait_for(lambda: self.states[block] != IN_FLIGHT, timeout_s)

    def check(self, first: int, count: int, view: memoryview, *, learn: bool) -> None:
        """Compare the digests of claimed blocks, `view` being their bytes.

        learn: a block without a known digest gets the one of these bytes; else it is wrong.
        Raises IntegrityError at the first block that is wrong.
        """
        for block in self._layout.wrong_blocks(self.digests, range(first, first + count), view):
            own = digest_slice(block)
            if not learn or self.digests[own] != NO_DIGEST:
                raise IntegrityError(f"block {block} has not the digest that was promised")
            start = (block - first) * self._layout.block_bytes
            self.digests[own] = self._layout.digests_of(view[start : start + self._layout.block_bytes])

    def end_claim(self, first: int, count: int, state: int) -> None:
        """The claimed blocks are PRESENT, or MISSING again. Before PRESENT their bytes were written."""
        with self._changed:
            self.states[first : first + count] = bytes([state]) * count
            self.unsaved = True
            self._changed.notify_all()

    def doubt(self) -> None:
        """The kernel may have lost bytes: the digests of all that is there are to be compared again."""
        with self._changed:
            self.states[:] = self.states[:].replace(bytes([PRESENT]), bytes([UNCHECKED]))
