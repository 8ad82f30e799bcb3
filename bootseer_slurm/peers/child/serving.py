"""The chunks that this node sends: those that `Uploads` chooses, at the rate that the order allows.

The rate is kept by beginning no chunk before those that began earlier have had their time.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from bootseer_slurm.peers.child.blobs import Blobs
from bootseer_slurm.peers.child.links import Links
from bootseer_slurm.peers.fetch import TOO_DEEP, Viewpoint
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.messages import Pending, Refused
from bootseer_slurm.peers.uploads import Get, Held, Reply, Uploads

_BURST_S = 0.02  # of chunks that may begin at once after a rest


@dataclass(slots=True)
class _Sending:
    """A chunk that a connection has: so many frames are left."""

    get: Get
    size_bytes: int
    frames: int


class Serving:
    """This node as a parent. hops: what `Policy.hops` gives for a chunk that is not here."""

    def __init__(
        self,
        here: Viewpoint,
        links: Links,
        blobs: Blobs,
        bytes_per_s: float,
        hops: Callable[[Chunk, float], int | None],
    ) -> None:
        self.sent: Counter[int] = Counter()
        self._here = here
        self._links = links
        self._blobs = blobs
        self._bytes_per_s = bytes_per_s
        self._hops = hops
        self._uploads = Uploads(bytes_per_s, blobs.size_of)
        self._sending: dict[int, deque[_Sending]] = {}
        self._free_from_s = 0.0
        self._is_held_back = False

    def asked(self, get: Get, now_s: float) -> None:
        """A node asks for a chunk."""
        reply = self._uploads.asked(get, self._blobs.held(get.chunk))
        if reply is Reply.QUEUED:
            self._say_pending(get, now_s)
            self.go_on(now_s)
        else:
            self._links.send(get.reader, Refused(get.chunk, lacks=reply is Reply.LACK))

    def arrived(self, chunk: Chunk, now_s: float) -> None:
        """A chunk is in the data file."""
        for reader in self._uploads.arrived(chunk):
            self._links.send(reader, Refused(chunk, lacks=False))
        self.go_on(now_s)

    def lost(self, is_lost: Callable[[Chunk], bool]) -> None:
        """Chunks that are so do not come. One that is on its way to a node goes on."""
        for get in self._uploads.lost(is_lost):
            self._links.send(get.reader, Refused(get.chunk, lacks=True))

    def frames_sent(self, node: int, frames: int, now_s: float) -> None:
        """So many frames to a node have left."""
        queue = self._sending.get(node, deque())
        self._uploads.slots.moved(node, now_s)
        for _ in range(frames):
            if not queue:
                return  # they are of a connection that ended
            first = queue[0]
            first.frames -= 1
            if not first.frames:
                queue.popleft()
                self.sent[node] += first.size_bytes
                self._uploads.slots.ended(node, now_s)
        if not queue:
            del self._sending[node]
        self.go_on(now_s)

    def left(self, node: int, now_s: float) -> None:
        """A node's connection ended."""
        self._uploads.left(node)
        self._sending.pop(node, None)
        self.go_on(now_s)

    def called_slow(self, node: int, now_s: float) -> None:
        """A child says that this node is slow."""
        self._uploads.called_slow(node, now_s)

    def go_on(self, now_s: float) -> None:
        """Begin what may begin now."""
        while not (is_held_back := now_s < self._free_from_s) and (get := self._uploads.begin(now_s)):
            parts = list(self._blobs.parts(get.chunk))
            if not self._links.send_bytes(get.reader, parts):
                self._uploads.left(get.reader)
                self._sending.pop(get.reader, None)
                continue
            size_bytes = self._blobs.size_of(get.chunk)
            self._sending.setdefault(get.reader, deque()).append(_Sending(get, size_bytes, len(parts)))
            self._free_from_s = max(self._free_from_s, now_s - _BURST_S) + size_bytes / self._bytes_per_s
        self._is_held_back = is_held_back
        self._here.serves = self._uploads.serves(now_s)

    @property
    def is_busy(self) -> bool:
        """Whether nodes wait for something."""
        return bool(self._sending) or bool(self._uploads.waiting())

    def say_pending(self, now_s: float) -> None:
        """What those hear that wait, each 100 ms. One chunk of a connection is under way, others wait.

        Who takes nothing is left.
        """
        for node in self._uploads.slots.stalled(now_s):
            self._links.leave(node)
        behind = (list(queue)[1:] for queue in self._sending.values())
        for get in [*self._uploads.waiting(), *(each.get for each in itertools.chain.from_iterable(behind))]:
            self._say_pending(get, now_s)

    def until_s(self) -> float | None:
        """When the next chunk may begin, where the rate has it wait."""
        return self._free_from_s if self._is_held_back else None

    def _say_pending(self, get: Get, now_s: float) -> None:
        slots = self._uploads.slots
        # One that is sent may be of a blob that was closed.
        if self._blobs.held(get.chunk) is not Held.HERE and not slots.is_sending(get.chunk, get.reader):
            hops = self._hops(get.chunk, now_s)
        else:
            hops = TOO_DEEP if slots.is_stuck(now_s) else 0
        if hops is not None:
            self._links.send(get.reader, Pending(get.chunk, hops))
