"""Shares: what the users of a node share, so that none of them, nor all together, takes more than there is.

A job has bounds of its own (artifacts/table.py); these are for all jobs of a user at once, and for all users.
What is refused is not shown: the job starts with its originals. Thread-safe.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bootseer_slurm.errors import InputError

# Digests lie in /run too, where other services of the node need room.
_DIGEST_BYTES = 2**30  # of blobs of 8 TiB
_DIGESTS_PART_OF_RUN = 4
_PLAN_BLOCKS = 2**22  # some 250 bytes of memory each: 1 GiB
_PLAN_BLOCK_BYTES = 250
_PLANS_PART_OF_MEMORY = 64
_ARTIFACTS = 8192  # each has up to six descriptors, and the agent 65,536 (systemd unit)


class Share:
    """Something that there is so much of. A user may have half of it."""

    def __init__(self, what: str, total: int) -> None:
        """what: for messages, "memory for digests", say."""
        self._what = what
        self._total = total
        self._taken: Counter[int] = Counter()
        self._lock = threading.Lock()

    def take(self, uid: int, count: int) -> None:
        """Take so much more for a user. Raises InputError when that is too much, and takes nothing."""
        with self._lock:
            if self._taken[uid] + count > self._total // 2:
                raise InputError(f"not shown: user {uid}'s share of this node's {self._what} is used up")
            if self._taken.total() + count > self._total:
                raise InputError(f"not shown: this node's {self._what} is used up by all users together")
            self._taken[uid] += count

    def give_back(self, uid: int, count: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._taken[uid] -= count
            if not self._taken[uid]:
                del self._taken[uid]


@dataclass(frozen=True, slots=True)
class NodeShares:
    """What the jobs of a node share. digests: bytes. plans: blocks. artifacts: how many are looked up."""

    digests: Share
    plans: Share
    artifacts: Share


def shares_of(run: Path) -> NodeShares:
    """The shares of this node. run: where the agent keeps the digests of files; on a tmpfs."""
    disk = os.statvfs(run)
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    plan_blocks = memory_bytes // _PLANS_PART_OF_MEMORY // _PLAN_BLOCK_BYTES
    digest_bytes = (
        disk.f_blocks * disk.f_frsize // _DIGESTS_PART_OF_RUN or _DIGEST_BYTES
    )  # 0: it has no bound
    return NodeShares(
        Share("memory for digests", min(_DIGEST_BYTES, digest_bytes)),
        Share("memory for plans", min(_PLAN_BLOCKS, plan_blocks)),
        Share("descriptors for artifacts", _ARTIFACTS),
    )
