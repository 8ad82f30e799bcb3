"""This node's parts of the job's directory, on each ring that it is on, and its JOIN when it starts.

JOIN goes to the nodes behind this one, eight at a time, until one of them answers; the answers of those
before that one have 25 ms. They have up to 1 s where their kernels have taken a hello or JOIN, and only their
processes have not had their turn: for without their lists chunks are read once more. What others want
meanwhile waits. Where two nodes are silent and nobody was heard, something is in between, and this node
goes on alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bootseer_slurm.peers.child.links import Links
from bootseer_slurm.peers.directory import JOIN_AT_ONCE, JOIN_WAIT_S, Answer, Directory, Handover, Want
from bootseer_slurm.peers.fetch import Viewpoint
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.messages import Answered, AskList, Given, Join, split

_MOST_HELD = 4096  # WANTs; who is not answered asks elsewhere
_SILENT = 2
_THERE_S = 1.0


@dataclass(slots=True)
class _Joining:
    """A ring, and the nodes of it that were sent JOIN and have neither answered nor refused, in order.

    sent: all that were sent JOIN.
    """

    level: int
    nodes: Iterator[int]
    asked: list[int] = field(default_factory=list)
    sent: set[int] = field(default_factory=set)
    sent_s: float = 0.0
    until_s: float = 0.0
    heard: bool = False
    ready: bool = False


class Lists:
    """The directories of this node."""

    def __init__(self, here: Viewpoint, links: Links, nodes: int, may_be: Callable[[Chunk], bool]) -> None:
        """nodes: how many there are. may_be: whether there is such a chunk, as far as is known."""
        self._here = here
        self._links = links
        self._nodes = nodes
        self._may_be = may_be
        rings = [ring for ring in here.rings if here.node in ring.members]
        self._directories = {ring.level: Directory(here.node, ring) for ring in rings}
        self._joining = [_Joining(ring.level, ring.after(here.node)) for ring in rings]
        self._held: list[tuple[int, AskList]] = []

    @property
    def ready(self) -> bool:
        """Whether it answers. Until then this node asks nothing."""
        return all(each.ready for each in self._joining)

    def until_s(self) -> float | None:
        """When `go_on` is to be called."""
        return min((each.until_s for each in self._joining if not each.ready), default=None)

    def go_on(self, now_s: float) -> None:
        """Send JOIN to the next nodes, where those that were asked have answered or had their time."""
        was_ready = self.ready
        for each in self._joining:
            while not each.ready and (not each.asked or now_s >= each.until_s):
                if (until_s := each.sent_s + self._patience_s(each.asked)) > now_s:
                    each.until_s = min(until_s, now_s + JOIN_WAIT_S)
                    break
                is_cut_off = len(each.asked) >= _SILENT and not self._here.liveness.any_heard
                each.asked = list(itertools.islice(each.nodes, JOIN_AT_ONCE))
                each.sent_s, each.until_s = now_s, now_s + JOIN_WAIT_S
                each.ready = each.heard or is_cut_off or not each.asked
                if each.ready:
                    break
                each.sent.update(each.asked)
                for node in each.asked:
                    self._links.send(node, Join(each.level), now_s)
        if self.ready and not was_ready:
            held, self._held = self._held, []
            for node, asked in held:
                self.asked(node, asked)

    def _patience_s(self, nodes: list[int]) -> float:
        """How long these nodes may take to answer JOIN."""
        return _THERE_S if any(map(self._is_there, nodes)) else 0.0

    def _is_there(self, node: int) -> bool:
        """Whether this node, or its kernel at least, has taken what it was sent."""
        return self._links.link(node) is not None or self._links.proving.reaches(node)

    def want(self, level: int, want: Want) -> Answer | None:
        """The answer of this node; None where it is on no such ring."""
        directory = self._directories.get(level)
        return directory.want(want) if directory else None

    def asked(self, node: int, asked: AskList) -> None:
        """A node sent a WANT. There is no answer where it names what is not there."""
        want = asked.want
        others = max((*want.busy, *want.lost, *want.missing), default=0)
        if others >= self._nodes or not self._may_be(want.chunk):
            return
        if not self.ready:
            if len(self._held) < _MOST_HELD:
                self._held.append((node, asked))
        elif answer := self.want(asked.level, want):
            self._links.send(node, Answered(want.chunk, answer, asked.number))

    def joined(self, node: int, level: int) -> None:
        """A node sent JOIN."""
        directory = self._directories.get(level)
        if directory and node in self._here.rings[level].members:
            for part in split(directory.join(node)):
                self._links.send(node, Given(level, part))

    def given(self, node: int, given: Given, now_s: float) -> None:
        """A node gives lists to this one: of those that were sent JOIN, or lists that are this node's."""
        directory = self._directories.get(given.level)
        if directory is None or node not in self._here.rings[given.level].members:
            return
        is_asked = any(node in each.sent for each in self._joining if each.level == given.level)
        rows = {
            chunk: tuple(row for row in listed if row.node < self._nodes)
            for chunk, listed in given.handover.lists.items()
            if self._may_be(chunk) and (is_asked or directory.owns(chunk))
        }
        live = given.handover.live if is_asked else ()
        for to, onward in directory.take(Handover(rows, live)).items():
            for part in split(onward):
                self._links.send(to, Given(given.level, part), now_s)
        for each in self._joining:
            if each.level == given.level and node in each.asked:
                each.heard = True
                place = each.asked.index(node)
                # Those behind it that are there may have begun just now, and know more than it does.
                behind = filter(self._is_there, each.asked[place + 1 :])
                each.asked = [*each.asked[:place], *behind]

    def ended(self, node: int, now_s: float, *, is_silent: bool) -> None:
        """A node cannot be reached. is_silent: it did not even refuse."""
        for each in self._joining:
            if node in each.asked:
                each.asked.remove(node)
                if is_silent:
                    self._here.liveness.silent(node, now_s)
