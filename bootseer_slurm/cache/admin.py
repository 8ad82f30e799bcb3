"""The cache as an admin sees it: what is there, whether it is right, and removing it.

Works on the files alone, beside an agent or without one. What an agent uses, or used when it was killed, is
looked at and never changed; anything else is changed under the lock of its folder (cache/disk.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bootseer_slurm.blob.digest import DIGEST_BYTES
from bootseer_slurm.cache.disk import (
    BlobFolder,
    CachedManifest,
    blob_folders,
    make_exclusive,
    read_manifest,
    read_state,
    remove,
    share,
    write_state,
)
from bootseer_slurm.cache.live import MISSING, PRESENT, UNCHECKED
from bootseer_slurm.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class CacheEntry:
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
    """The damage of one blob. blocks: those with wrong bytes. mended: they will be fetched again."""

    uid: int
    id: str
    message: str
    blocks: tuple[int, ...] = ()
    mended: bool = False


def entries(root: Path, live: Path) -> list[CacheEntry]:
    """All blobs of a cache, the longest unused first."""
    return [_entry(folder) for folder in blob_folders(root, live)]


def evict(root: Path, live: Path, to_bytes: int) -> list[CacheEntry]:
    """Remove unused blobs, the longest unused first, until the cache takes no more than so much disk."""
    found = [(folder, _entry(folder)) for folder in blob_folders(root, live)]
    left_bytes = sum(entry.disk_bytes for _, entry in found)
    removed = []
    for folder, entry in found:
        if to_bytes and left_bytes <= to_bytes:
            break
        if remove(folder):
            left_bytes -= entry.disk_bytes
            removed.append(entry)
    return removed


def verify(root: Path, live: Path, progress: Callable[[int], None] = lambda _: None) -> list[Damage]:
    """Read all blocks that are there and compare their digests; gives the damage.

    Damaged blocks of unused blobs become missing, so that they are fetched again. progress(bytes): after each
    block that was read.
    """
    damage = []
    for folder in blob_folders(root, live):
        try:
            with share(folder) as lock_fd:
                found = _verify(folder, lock_fd, progress)
        except (OSError, IntegrityError) as error:
            if folder.path.exists():  # else it was evicted meanwhile
                found = Damage(folder.uid, folder.id, f"{error}; the next start of the agent removes it")
            else:
                continue
        if found:
            damage.append(found)
    return damage


def _entry(folder: BlobFolder) -> CacheEntry:
    disk_bytes, used_s, in_use = folder.disk_bytes, folder.used_s, folder.in_use
    try:
        kept = read_manifest(folder)
        states, _ = _state(folder, kept, os.stat(folder.path / "data"))
    except (OSError, IntegrityError) as error:
        return CacheEntry(folder.uid, folder.id, "?", 0, 0, disk_bytes, used_s, in_use, flaw=str(error))
    layout, kind = kept.layout, kept.kind
    blocks = states.count(PRESENT) + states.count(UNCHECKED)
    present_bytes = min(blocks * layout.block_bytes, layout.size_bytes)
    size_bytes = layout.size_bytes
    return CacheEntry(folder.uid, folder.id, kind, size_bytes, present_bytes, disk_bytes, used_s, in_use)


def _state(folder: BlobFolder, kept: CachedManifest, data: os.stat_result) -> tuple[bytes, bytes]:
    """The states and the digests of all blocks."""
    unmanaged = kept.digests is None
    state = read_state(folder, kept.layout, unmanaged=unmanaged, data=data)
    states, seen = state or (bytes(kept.layout.blocks), bytes(kept.layout.blocks * DIGEST_BYTES))
    return states, seen if kept.digests is None else kept.digests


def _verify(folder: BlobFolder, lock_fd: int, progress: Callable[[int], None]) -> Damage | None:
    kept, layout = read_manifest(folder), read_manifest(folder).layout
    # Not waiting for a lease of its user: that is an error (O_NONBLOCK).
    with open(os.open(folder.path / "data", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        before = os.fstat(file.fileno()), _version(folder)
        states, digests = _state(folder, kept, before[0])
        checked, wrong = bytearray(states), []
        for block, state in enumerate(states):
            if state not in (PRESENT, UNCHECKED):
                continue
            content = os.pread(file.fileno(), layout.block_size(block), block * layout.block_bytes)
            checked[block] = PRESENT
            for each in layout.wrong_blocks(digests, range(block, block + 1), content):
                checked[each] = MISSING
                wrong.append(each)
            progress(len(content))
        after = os.fstat(file.fileno())
        # Only now: an agent that wants the blob does not wait while it is read.
        mended = (
            make_exclusive(lock_fd, folder)
            and (after.st_mtime_ns, _version(folder)) == (before[0].st_mtime_ns, before[1])
            and bytes(checked) != states
        )
        if mended:
            os.fdatasync(file.fileno())
            write_state(folder.path, bytes(checked), digests if kept.digests is None else None, after)
    if not wrong:
        return None
    message = f"{len(wrong)} of {layout.blocks - states.count(MISSING)} blocks have not their digest"
    return Damage(folder.uid, folder.id, message, tuple(wrong), mended)


def _version(folder: BlobFolder) -> int:
    """Which `blocks` file is there: it is replaced, never changed."""
    try:
        return os.stat(folder.path / "blocks").st_ino
    except FileNotFoundError:
        return 0
