"""The nodes of a job in groups, and the rings of nodes over which a directory is spread.

A job of at most 128 nodes has one ring: all its nodes. A larger job has groups of at most 128 nodes, each
with a ring of its own, and one ring above them for the whole job. On that ring are 128 nodes, spread over
the groups: so a node that starts has to look for few others, however large the job is. Nodes are numbers:
the index in the job's node list. Pure: no I/O, no clock, no state.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GROUP_NODES = 128


class Chunk(NamedTuple):
    """A part of a blob, of 4 MiB at most: what nodes ask one another for. number: its place in the blob."""

    blob: str
    number: int


@dataclass(frozen=True, slots=True)
class Ring:
    """Nodes in a fixed order, the same on every node. level: 0 for the ring that is asked first."""

    level: int
    members: tuple[int, ...]

    def owners(self, chunk: Chunk) -> Iterator[int]:
        """The nodes that may keep this chunk's list, the first choice first: once around the ring."""
        place = zlib.crc32(b"%d %d %s" % (self.level, chunk.number, chunk.blob.encode())) % len(self.members)
        yield from self.members[place:]
        yield from self.members[:place]

    def is_before(self, one: int, other: int, chunk: Chunk) -> bool:
        """Whether both are on the ring, and one comes before the other among the owners of this chunk."""
        order = {node: place for place, node in enumerate(self.owners(chunk))}
        return one in order and other in order and order[one] < order[other]

    def after(self, node: int) -> Iterator[int]:
        """The other nodes, from the one behind this member on: there a node that starts finds its part."""
        place = self.members.index(node)
        yield from self.members[place + 1 :]
        yield from self.members[:place]


def rings_of(groups: Sequence[Sequence[int]], node: int) -> tuple[Ring, ...]:
    """The rings that a node asks, the nearest first. groups: of `group_nodes`, with all nodes of the job.

    The node is on the first. It may be missing on the second.
    """
    if len(groups) == 1:
        return (Ring(0, tuple(groups[0])),)
    own = next(group for group in groups if node in group)
    nodes = [each for group in groups for each in group]
    return Ring(0, tuple(own)), Ring(1, tuple(nodes[:: -(-len(nodes) // GROUP_NODES)]))


def group_nodes(blocks: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Groups of at most 128 nodes, near ones together.

    blocks: the nodes under each switch or block of the topology, neighbours side by side. A single block of
    all nodes where the topology is not known. A large block is cut into even groups, and small ones that are
    side by side become one group.
    """
    groups: list[tuple[int, ...]] = []
    for block in blocks:
        count = -(-len(block) // GROUP_NODES)
        cuts = [len(block) * number // count for number in range(count + 1)] if count else [0]
        for begin, end in itertools.pairwise(cuts):
            part = tuple(block[begin:end])
            if groups and len(groups[-1]) + len(part) <= GROUP_NODES:
                groups[-1] += part
            else:
                groups.append(part)
    return tuple(groups)
