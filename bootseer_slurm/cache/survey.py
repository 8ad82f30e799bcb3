"""The cache as an admin sees it: what is there, whether it is right, and removing it.

Works on the files alone, beside an agent or without one. What an agent uses, or used when it was killed, is
looked at and never changed; anything else is changed under the lock of its folder (cache/disk.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bootseer_slurm.blob.digest import DIGEST_BYTES, place_of_digest
from bootseer_slurm.cache.disk import (
    Kept,
    Place,
    make_exclusive,
    places,
    read_kept,
    read_state,
    remove,
    share,
    write_state,
)
from bootseer_slurm.cache.live import MISSING, PRESENT, UNCHECKED
from bootseer_slurm.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class Entry:
    """One blob. present_bytes: of blocks that are there, checked or not. used_s: seconds since the epoch."""

    uid: int
    id: str
    kind: str
    size_bytes: int
    present_bytes: int
    disk_bytes: int
    used_s: float
    in_use: bool
    flaw: str = ""


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with one blob. blocks: those with wrong bytes. mended: they will be fetched again."""

    uid: int
    id: str
    message: str
    blocks: tuple[int, ...] = ()
    mended: bool = False


def entries(root: Path, live: Path) -> list[Entry]:
    """All blobs of a cache, the longest unused first."""
    return [_entry(place) for place in places(root, live)]


def evict(root: Path, live: Path, to_bytes: int) -> list[Entry]:
    """Remove unused blobs, the longest unused first, until the cache takes no more than so much disk."""
    found = [(place, _entry(place)) for place in places(root, live)]
    left_bytes = sum(entry.disk_bytes for _, entry in found)
    removed = []
    for place, entry in found:
        if to_bytes and left_bytes <= to_bytes:
            break
        if remove(place):
            left_bytes -= entry.disk_bytes
            removed.append(entry)
    return removed


def verify(root: Path, live: Path, progress: Callable[[int], None] = lambda _: None) -> list[Damage]:
    """Read all blocks that are there and compare their digests; gives the damage.

    Damaged blocks of unused blobs become missing, so that they are fetched again. progress(bytes): after each
    block that was read.
    """
    damage = []
    for place in places(root, live):
        try:
            with share(place) as lock_fd:
                found = _verify(place, lock_fd, progress)
        except (OSError, IntegrityError) as error:
            if place.folder.exists():  # else it was evicted meanwhile
                found = Damage(place.uid, place.id, f"{error}; the next start of the agent removes it")
            else:
                continue
        if found:
            damage.append(found)
    return damage


def _entry(place: Place) -> Entry:
    disk_bytes, used_s, in_use = place.disk_bytes, place.used_s, place.in_use
    try:
        kept = read_kept(place)
        states, _ = _state(place, kept, os.stat(place.folder / "data"))
    except (OSError, IntegrityError) as error:
        return Entry(place.uid, place.id, "?", 0, 0, disk_bytes, used_s, in_use, flaw=str(error))
    layout, kind = kept.layout, kept.kind
    blocks = states.count(PRESENT) + states.count(UNCHECKED)
    present_bytes = min(blocks * layout.block_bytes, layout.size_bytes)
    return Entry(place.uid, place.id, kind, layout.size_bytes, present_bytes, disk_bytes, used_s, in_use)


def _state(place: Place, kept: Kept, data: os.stat_result) -> tuple[bytes, bytes]:
    """The states and the digests of all blocks."""
    adopted = kept.digests is None
    state = read_state(place, kept.layout, adopted=adopted, data=data)
    states, seen = state or (bytes(kept.layout.blocks), bytes(kept.layout.blocks * DIGEST_BYTES))
    return states, seen if kept.digests is None else kept.digests


def _verify(place: Place, lock_fd: int, progress: Callable[[int], None]) -> Damage | None:
    kept, layout = read_kept(place), read_kept(place).layout
    with open(place.folder / "data", "rb") as file:
        before = os.fstat(file.fileno()), _version(place)
        states, digests = _state(place, kept, before[0])
        checked, wrong = bytearray(states), []
        for block, state in enumerate(states):
            if state not in (PRESENT, UNCHECKED):
                continue
            content = os.pread(file.fileno(), layout.block_size(block), block * layout.block_bytes)
            right = layout.agrees(digests[place_of_digest(block)], content)
            checked[block] = PRESENT if right else MISSING
            if not right:
                wrong.append(block)
            progress(len(content))
        after = os.fstat(file.fileno())
        # Only now: an agent that wants the blob does not wait while it is read.
        mended = (
            make_exclusive(lock_fd, place)
            and (after.st_mtime_ns, _version(place)) == (before[0].st_mtime_ns, before[1])
            and bytes(checked) != states
        )
        if mended:
            os.fdatasync(file.fileno())
            write_state(place.folder, bytes(checked), digests if kept.digests is None else None, after)
    if not wrong:
        return None
    message = f"{len(wrong)} of {layout.blocks - states.count(MISSING)} blocks have not their digest"
    return Damage(place.uid, place.id, message, tuple(wrong), mended)


def _version(place: Place) -> int:
    """Which `blocks` file is there: it is replaced, never changed."""
    try:
        return os.stat(place.folder / "blocks").st_ino
    except FileNotFoundError:
        return 0
