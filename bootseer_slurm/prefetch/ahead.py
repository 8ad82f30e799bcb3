"""Readahead: which blocks to bring behind a read, for a blob of which no start was recorded.

The reads themselves tell. Behind each touch of a new block as many shall be there as the run of touched
blocks is long that ends there, `_MOST_BLOCKS` at most. Unlike a window for each reader this needs no order:
it grows too where readers fill a region here and there, as imports do in a snapshot. No block is asked for
twice, and none while half of what shall be there is on its way: a long request costs less CPU for each
byte than short ones. Does no I/O. Not thread-safe: a touch that is lost costs one readahead.
"""

from __future__ import annotations

_MOST_BLOCKS = 16  # 1 MiB of an image or environment


class Ahead:
    """The touched blocks of one blob, and those that were asked for."""

    def __init__(self, blocks: int) -> None:
        self._touched = bytearray(blocks)
        self._asked = bytearray(blocks)  # touched ones too: readers bring these themselves

    def touch(
        self, first: int, last: int, most_blocks: int = _MOST_BLOCKS, *, least_blocks: int = 1
    ) -> tuple[int, int] | None:
        """Note a read of the blocks first to last; which (first, last) to bring behind it, if any.

        most_blocks, least_blocks: that shall be there, at least one; the most counts where both differ.
        None too for a read of blocks that were all touched before. On the way of every read.
        """
        if self._touched.find(0, first, last + 1) < 0:
            return None
        self._touched[first : last + 1] = self._asked[first : last + 1] = b"\1" * (last + 1 - first)
        run_blocks = last - self._touched.rfind(0, 0, first)
        ahead_blocks = min(max(run_blocks, least_blocks), most_blocks, _MOST_BLOCKS)
        end = min(last + ahead_blocks, len(self._touched) - 1)
        start = self._asked.find(0, last + 1, end + 1)
        asked_blocks, wanted_blocks = start - last - 1, end - last
        if start < 0 or 2 * asked_blocks > wanted_blocks:
            return None
        self._asked[start : end + 1] = b"\1" * (end + 1 - start)
        return start, end
