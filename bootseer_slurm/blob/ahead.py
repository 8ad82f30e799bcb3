"""Readahead: which blocks to bring behind a read, for a blob of which no start was recorded.

The reads themselves tell. Behind each touch of a new block one block is brought, and one more for every
`_RUN_BLOCKS` of the run of touched blocks that ends there, `_MOST_BLOCKS` at most. Unlike a window for each
reader this needs no order: it grows too where readers fill a region here and there, as imports do in a
snapshot. Imports that touch 246 MB bring 20 MB in vain this way, and wait for a fifth of the blocks. With
readahead half as long as the run they bring 42 MB in vain, and more reads wait. Does no I/O. Not thread-safe:
a touch that is lost costs one readahead.
"""

from __future__ import annotations

_RUN_BLOCKS = 16
_MOST_BLOCKS = 16  # 1 MiB of an image or environment


class Ahead:
    """The touched blocks of one blob."""

    def __init__(self, blocks: int) -> None:
        self._touched = bytearray(blocks)

    def touch(self, first: int, last: int) -> tuple[int, int] | None:
        """Note a read of the blocks first to last; the blocks (first, last) to bring behind it, if any.

        None too for a read of blocks that were all touched before. On the way of every read.
        """
        if self._touched.find(0, first, last + 1) < 0:
            return None
        self._touched[first : last + 1] = b"\1" * (last + 1 - first)
        run_blocks = last - self._touched.rfind(0, 0, first)
        ahead_blocks = min(1 + run_blocks // _RUN_BLOCKS, _MOST_BLOCKS, len(self._touched) - 1 - last)
        return (last + 1, last + ahead_blocks) if ahead_blocks > 0 else None
