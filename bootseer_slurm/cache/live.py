"""The state of a blob's blocks in memory that outlives a killed agent, but not a reboot.

    <live>/<uid>.<blob id>      one line of JSON, padded to a page; from the next page a byte a block; of an
                                unmanaged file, from the next page the digests seen so far

<live> is root's and closed, and should be on a tmpfs. The line says in which boot the file was made and of
which data file it speaks, so a file that did outlive a reboot counts for nothing.
The file is there as long as an agent uses the blob, and after an agent was killed: so it also says which
blobs may not be removed until a new agent knows what its jobs use.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from bootseer_slurm.blob.digest import DIGEST_BYTES
from bootseer_slurm.blob.manifest import Layout

MISSING, PRESENT, IN_FLIGHT, UNCHECKED = 0, 1, 2, 3
_PAGE_BYTES = mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True, slots=True)
class Live:
    """The maps of one blob's file. digests: only of an unmanaged file."""

    states: mmap.mmap
    digests: mmap.mmap | None


@functools.cache
def boot_id() -> str:
    """Which boot of the node this is."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def is_live(path: Path) -> bool:
    """Whether an agent of this boot uses the blob, or used it when it was killed."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_PAGE_BYTES))
            return bool(header["boot"] == boot_id())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_live(
    path: Path, layout: Layout, *, unmanaged: bool, data: os.stat_result
) -> tuple[bytes, bytes] | None:
    """A copy of the states and digests; None when they are not of this boot and this data file."""
    states_at, digests_at, size_bytes = _offsets(layout, unmanaged)
    try:
        content = path.read_bytes()
        header = json.loads(content[:_PAGE_BYTES])
    except (OSError, ValueError):
        return None
    states = content[states_at : states_at + layout.blocks]
    if header != _header(layout, unmanaged, data) or len(content) != size_bytes or set(states) - {0, 1, 2, 3}:
        return None
    digests = content[digests_at : digests_at + layout.blocks * DIGEST_BYTES] if unmanaged else b""
    return states, digests


def make_live(
    path: Path, layout: Layout, *, unmanaged: bool, data: os.stat_result, states: bytes, digests: bytes
) -> Live:
    """Make the file, in one step, with these states, and map it. Raises OSError (ENOSPC: memory is full)."""
    states_at, digests_at, size_bytes = _offsets(layout, unmanaged)
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # All of it now: a page that cannot be had when it is first touched would kill the process (SIGBUS).
        os.posix_fallocate(fd, 0, size_bytes)
        live = Live(
            mmap.mmap(fd, layout.blocks, offset=states_at),
            mmap.mmap(fd, layout.blocks * DIGEST_BYTES, offset=digests_at) if unmanaged else None,
        )
        live.states[:] = states
        if live.digests is not None:
            live.digests[:] = digests
        os.pwrite(fd, json.dumps(_header(layout, unmanaged, data)).encode().ljust(_PAGE_BYTES), 0)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return live


def _header(layout: Layout, unmanaged: bool, data: os.stat_result) -> dict[str, object]:
    return {
        "boot": boot_id(),
        "inode": data.st_ino,
        "size_bytes": layout.size_bytes,
        "block_bytes": layout.block_bytes,
        "adopted": unmanaged,  # the name is the format's
    }


def _offsets(layout: Layout, unmanaged: bool) -> tuple[int, int, int]:
    """Where the states begin, where the digests, and the file's size."""
    digests_at = _PAGE_BYTES * (1 + -(-layout.blocks // _PAGE_BYTES))
    return _PAGE_BYTES, digests_at, digests_at + (layout.blocks * DIGEST_BYTES if unmanaged else 0)
