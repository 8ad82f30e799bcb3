"""The order of hot blocks: those that mounts read, those that plans name, both ends of checkpoints.

Also which of them go by one read. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.blob.trace import Plan
from bootseer_slurm.cache.sources import Turn

# Blocks of a plan that lie side by side, and are this near each other in it, go by one read: 16 MiB.
_NEAR_BLOCKS = 256
_END_BYTES = 2**20  # safetensors has its header in front, a zip (.pt) its directory at the end
_LATE_MS = 2**32  # after all that is known to be touched


def both_ends(size_bytes: int) -> tuple[tuple[int, int], ...]:
    """The ranges of a checkpoint's file that tell what is in it."""
    count = min(_END_BYTES, size_bytes)
    return (0, count), (size_bytes - count, count)


def hot_times(
    layout: Layout, plan: Plan, first: Iterable[tuple[int, int]], ends: Iterable[tuple[int, int]]
) -> dict[int, int]:
    """When a start touches each hot block, in ms and in that order; what a mount needs comes before all."""
    times_ms = dict.fromkeys(_blocks_of(layout, first), -1)
    for block, at_ms in zip(plan.blocks, plan.times_ms, strict=True):
        times_ms.setdefault(block, at_ms)
    for block in _blocks_of(layout, ends):
        times_ms.setdefault(block, _LATE_MS)
    return times_ms


def _blocks_of(layout: Layout, ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    for offset, size_bytes in ranges:
        yield from range(offset // layout.block_bytes, (offset + size_bytes - 1) // layout.block_bytes + 1)


def in_turn(given: Iterable[tuple[int, int, int]], turn: Turn) -> list[tuple[int, int, int]]:
    """Runs in the order of one node among those that exchange them."""
    ordered = list(given)
    windows = (ordered[at : at + turn.window] for at in range(0, len(ordered), turn.window))
    return [run for window in windows for run in (*window[turn.first :], *window[: turn.first])]


def runs(blocks: Sequence[int], per_chunk: int) -> Iterator[tuple[int, int, int]]:
    """The blocks as runs within chunks: (the block whose turn it is, the first, the last)."""
    near = set(blocks[:_NEAR_BLOCKS])
    for index, block in enumerate(blocks):
        near.update(blocks[index + _NEAR_BLOCKS : index + _NEAR_BLOCKS + 1])
        if block not in near:
            continue  # it went with an earlier one
        chunk = range(block // per_chunk * per_chunk, (block // per_chunk + 1) * per_chunk)
        first = last = block
        while last + 1 in chunk and last + 1 in near:
            last += 1
        while first - 1 in chunk and first - 1 in near:
            first -= 1
        near.difference_update(range(first, last + 1))
        yield block, first, last
