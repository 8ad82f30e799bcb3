"""Readahead: which blocks to bring behind a read, for a blob of which no start was recorded.

The reads themselves tell. Behind each touch of a new block as many may be brought as the run of touched
blocks is long that ends there, `_MOST_BLOCKS` at most. Unlike a window for each reader this needs no order:
it grows too where readers fill a region here and there, as imports do in a snapshot. Whoever brings them
takes fewer where the link is slow (agent/prefetch.py). Does no I/O. Not thread-safe: a touch that is lost
costs one readahead.
"""

from __future__ import annotations

_MOST_BLOCKS = 16  # 1 MiB of an image or environment


class Ahead:
    """The touched blocks of one blob."""

    def __init__(self, blocks: int) -> None:
        self._touched = bytearray(blocks)

    def touch(self, first: int, last: int) -> tuple[int, int] | None:
        """Note a read of the blocks first to last; which (first, last) may be brought behind it, if any.

        None too for a read of blocks that were all touched before. On the way of every read.
        """
        if self._touched.find(0, first, last + 1) < 0:
            return None
        self._touched[first : last + 1] = b"\1" * (last + 1 - first)
        run_blocks = last - self._touched.rfind(0, 0, first)
        ahead_blocks = min(run_blocks, _MOST_BLOCKS, len(self._touched) - 1 - last)
        return (last + 1, last + ahead_blocks) if ahead_blocks > 0 else None
