"""The chunks that a node has, told to directories that do not know it: with a WANT that asks for nothing.

What a node had before the job, or got without asking, is in no list: it offers that, some chunks at a time.
The lists of a directory die with its node. The next on the ring begins with empty ones. So each node that has
chunks of them, or reads them from the store, lists itself there. Pure; not thread-safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bootseer_slurm.peers.directory import Answer, Moved, Want
from bootseer_slurm.peers.fetch import AskDirectory, Viewpoint
from bootseer_slurm.peers.groups import Chunk

_OFFERS = 128  # at a time: each costs its directory 50 µs


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which directory is asked."""

    level: int
    owner: int


class Listing:
    """The chunks that one node has, and their level: that of the directory which knows who has them."""

    def __init__(self, here: Viewpoint) -> None:
        self._here = here
        self._levels: dict[Chunk, int] = {}
        self._asked: dict[Chunk, _Asked] = {}

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self._levels

    def add(self, chunk: Chunk, level: int) -> None:
        """The node has it. level: of the last directory that was asked for it."""
        self._levels[chunk] = level

    def forget(self, is_gone: Callable[[Chunk], bool]) -> None:
        """The node has no chunks any more that are so."""
        self._levels = {chunk: level for chunk, level in self._levels.items() if not is_gone(chunk)}
        self._asked = {chunk: asked for chunk, asked in self._asked.items() if not is_gone(chunk)}

    def again(self, missing: Iterable[int], coming: Mapping[Chunk, int], now_s: float) -> list[AskDirectory]:
        """What is to be sent because these nodes are missing now.

        coming: chunks that the node reads from the store, and their levels.
        """
        asks = []
        for node in missing:
            for chunk, level in {**self._levels, **coming}.items():
                owner = self._heir(node, chunk, level, now_s)
                if owner is not None:
                    asks.append(self.ask(chunk, level, owner, now_s))
        return asks

    def answered(self, chunk: Chunk, owner: int, answer: Answer, now_s: float) -> list[AskDirectory]:
        """A directory has answered such a WANT."""
        asked = self._asked.get(chunk)
        if asked is None or asked.owner != owner:
            return []
        level = self._asked.pop(chunk).level
        if isinstance(answer, Moved) and self._here.rings[level].is_before(answer.owner, owner, chunk):
            return [self.ask(chunk, level, answer.owner, now_s)]
        return []

    def failed(self, chunk: Chunk, owner: int) -> None:
        """It has not: others read the chunk once more."""
        if (asked := self._asked.get(chunk)) and asked.owner == owner:
            del self._asked[chunk]

    def ask(self, chunk: Chunk, level: int, owner: int, now_s: float) -> AskDirectory:
        """The WANT by which a directory knows that this node has it."""
        self._asked[chunk] = _Asked(level, owner)
        here = self._here
        want = Want(chunk, here.node, here.serves, missing=here.liveness.missing(now_s), has=True)
        return AskDirectory(owner, level, want)

    def _heir(self, missing: int, chunk: Chunk, level: int, now_s: float) -> int | None:
        """Who keeps a chunk's list after a node that is missing now; None where that one did not keep it."""
        kept = False
        for node in self._here.rings[level].owners(chunk):
            if node == missing:
                kept = True
            elif node == self._here.node or not self._here.liveness.is_absent(node, now_s):
                return node if kept else None
        return None


class Offers:
    """The chunks that no directory knows this node to have."""

    def __init__(self, here: Viewpoint, listing: Listing) -> None:
        self._here = here
        self._listing = listing
        self._chunks: deque[Chunk] = deque()

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def add(self, chunks: Iterable[Chunk]) -> None:
        """The node has these, however it got them."""
        for chunk in chunks:
            if chunk not in self._listing:
                self._listing.add(chunk, 0)
                self._chunks.append(chunk)

    def tell(self, now_s: float) -> list[AskDirectory]:
        """The next of them."""
        chunks = [self._chunks.popleft() for _ in range(min(_OFFERS, len(self._chunks)))]
        listed = [chunk for chunk in chunks if chunk in self._listing]  # others are gone meanwhile
        return [self._listing.ask(chunk, 0, self._owner(chunk, now_s), now_s) for chunk in listed]

    def _owner(self, chunk: Chunk, now_s: float) -> int:
        """Who keeps a chunk's list, as far as this node knows: itself, where it misses all before it."""
        here = self._here
        owners = here.rings[0].owners(chunk)
        return next(node for node in owners if node == here.node or not here.liveness.is_absent(node, now_s))
