"""The chunks that a node sends just now: at most so many, two of them to one node, and the rate that is seen.

A node that takes nothing holds its two slots for 5 s at most: then its connection is to be closed. Pure: time
is a parameter, in seconds of a clock that only goes forward. Not thread-safe.
"""

from __future__ import annotations

from bootseer_slurm.peers.groups import Chunk

SLOTS = 8
SLOTS_OF_READER = 2  # one that takes nothing shall not have all
STALLED_S = 5.0
_STUCK_S = 1.0
_NEW = 0.2  # the weight of a new figure in the mean rate
_WINDOW_S = 0.05  # of one figure: ends of chunks come in bursts


class Slots:
    """The slots of one node, by reader."""

    def __init__(self, bytes_per_s: float) -> None:
        """bytes_per_s: a first guess."""
        self.bytes_per_s = bytes_per_s
        self._chunks: dict[int, dict[Chunk, int]] = {}  # and their bytes, the oldest first
        self._moved_s: dict[int, float] = {}
        self._since_s = 0.0
        self._busy_s = 0.0
        self._ended_bytes = 0

    @property
    def taken(self) -> int:
        """How many are taken."""
        return sum(map(len, self._chunks.values()))

    @property
    def taken_bytes(self) -> int:
        """The bytes of the chunks that have them."""
        return sum(sum(chunks.values()) for chunks in self._chunks.values())

    def has_room(self, reader: int) -> bool:
        """Whether one more chunk may go to this node."""
        return self.taken < SLOTS and len(self._chunks.get(reader, ())) < SLOTS_OF_READER

    def is_sending(self, chunk: Chunk, reader: int) -> bool:
        """Whether this chunk is on its way to this node."""
        return chunk in self._chunks.get(reader, ())

    def begin(self, chunk: Chunk, reader: int, size_bytes: int, now_s: float) -> None:
        """A chunk of so many bytes takes a slot."""
        if not self._chunks:
            self._since_s = now_s
        if reader not in self._chunks:
            self._moved_s[reader] = now_s
        self._chunks.setdefault(reader, {})[chunk] = size_bytes

    def moved(self, reader: int, now_s: float) -> None:
        """Some bytes have left for this node."""
        if reader in self._moved_s:
            self._moved_s[reader] = now_s

    def ended(self, reader: int, now_s: float) -> None:
        """The oldest chunk of a node was sent."""
        chunks = self._chunks[reader]
        self._ended_bytes += chunks.pop(next(iter(chunks)))
        self._moved_s[reader] = now_s
        if not chunks:
            self.left(reader)
        self._busy_s += now_s - self._since_s
        self._since_s = now_s
        if self._busy_s >= _WINDOW_S:
            seen = self._ended_bytes / self._busy_s
            self.bytes_per_s += _NEW * (seen - self.bytes_per_s)
            self._busy_s, self._ended_bytes = 0.0, 0

    def left(self, reader: int) -> None:
        """A node's connection ended: what was on its way is not sent."""
        self._chunks.pop(reader, None)
        self._moved_s.pop(reader, None)

    def stalled(self, now_s: float) -> list[int]:
        """The nodes that have taken nothing for too long."""
        return [reader for reader, moved_s in self._moved_s.items() if now_s - moved_s >= STALLED_S]

    def is_stuck(self, now_s: float) -> bool:
        """Whether all are taken, and none gets on."""
        return self.taken >= SLOTS and now_s - max(self._moved_s.values()) >= _STUCK_S
