"""The order of touch: which files of an image a start touches, in which order, and what a plan of it costs.

Pure functions over what the image's tables say (blob/squashfs/files.py) and what starts touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.blob.squashfs.files import Extent, Squashfs, StoredFile
from bootseer_slurm.blob.trace import Plan

_File = TypeVar("_File")


class HotFile(NamedTuple):
    """A file that starts touch. at_ms: when first, since the start's first read. blocks: of it, by number.

    is_sparse: most of it is not touched.
    """

    path: str
    at_ms: int
    blocks: tuple[int, ...]
    is_sparse: bool


def hot_files(
    image: Squashfs, plan: Plan, layout: Layout, is_tail_touched: Callable[[str, StoredFile], bool]
) -> list[HotFile]:
    """The files that starts touch, in the order of touch.

    plan: what starts touched of the image, in blocks of its layout. A block of a file was read if
    all of it was touched. That says nothing of small files, and of tails: a fragment holds many.
    is_tail_touched: whether a file's last block was read; asked only where its fragment was touched.
    """
    times_ms = dict(zip(plan.blocks, plan.times_ms, strict=True))

    def touched_ms(extent: Extent) -> int | None:
        known = [times_ms.get(block) for block in _blocks_of((extent,), layout)]
        found = [at_ms for at_ms in known if at_ms is not None]
        is_whole = bool(found) and len(found) == len(known)
        return min(found) if is_whole else None

    hot = []
    for path, file in image.files.items():
        at_ms = {
            number: known
            for number, each in enumerate(file.blocks)
            if (known := touched_ms(each)) is not None
        }
        tail = len(file.blocks) - 1
        if file.in_fragment and tail in at_ms and not is_tail_touched(path, file):
            del at_ms[tail]
        if at_ms:
            hot.append(HotFile(path, min(at_ms.values()), tuple(at_ms), 2 * len(at_ms) < len(file.blocks)))
    return sorted(hot, key=lambda each: each.at_ms)


def hot_extents(image: Squashfs, hot: Iterable[HotFile]) -> dict[Extent, int]:
    """The extents of an image that starts touch, each with the time of its first touch in ms.

    image: of the same files, in whatever order they lie there.
    """
    times_ms: dict[Extent, int] = {}
    for file in hot:
        stored = image.files[file.path].blocks
        for number in file.blocks:
            if number < len(stored) and stored[number].size_bytes:
                times_ms.setdefault(stored[number], file.at_ms)
    return times_ms


def plan_touches(
    extents: Mapping[Extent, int], layout: Layout, ranges: Iterable[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """The blocks that hold these extents, as a trace has them: (block, ms), by time.

    ranges: (offset, bytes) that a mount needs, at 0 ms.
    """
    times_ms = dict.fromkeys(_blocks_of((Extent(*each) for each in ranges), layout), 0)
    for extent, at_ms in extents.items():
        for block in _blocks_of((extent,), layout):
            times_ms[block] = min(at_ms, times_ms.get(block, at_ms))
    return tuple(sorted(times_ms.items(), key=lambda touch: (touch[1], touch[0])))


def blocks_bytes(layout: Layout, blocks: Iterable[int]) -> int:
    """The bytes of these blocks."""
    return sum(layout.block_size(block) for block in blocks)


def content_bytes(image: Squashfs, hot: Iterable[HotFile]) -> int:
    """The bytes of what starts touch, unpacked."""
    return sum(
        max(0, min(image.block_bytes, image.files[file.path].size_bytes - number * image.block_bytes))
        for file in hot
        for number in file.blocks
    )


def in_order_of_touch(tree: Mapping[str, _File], hot: Iterable[HotFile]) -> dict[str, _File]:
    """A tree's entries as they are to be packed: hot files first, of these the sparse ones last.

    So what is hot lies side by side. A tar may have a file before its folder.
    """
    ordered = sorted(hot, key=lambda file: file.is_sparse)
    first = {file.path: tree[file.path] for file in ordered if file.path in tree}
    return first | {path: entry for path, entry in tree.items() if path not in first}


def _blocks_of(extents: Iterable[Extent], layout: Layout) -> Iterator[int]:
    for offset, size_bytes in extents:
        if size_bytes:
            yield from range(
                offset // layout.block_bytes, (offset + size_bytes - 1) // layout.block_bytes + 1
            )
