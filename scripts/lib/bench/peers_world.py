"""What a simulation of peers is made of: the figures of a cluster, a job, its nodes, and a heap of events."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers.directory import Directory
from bootseer_slurm.peers.fetch import Viewpoint
from bootseer_slurm.peers.groups import Chunk, Ring, group_nodes, rings_of
from bootseer_slurm.peers.policy import Policy
from bootseer_slurm.peers.uploads import Uploads
from scripts.lib.bench.peers_store import SharedStore

_SLOW = 10  # times


@dataclass(frozen=True)
class Inputs:
    """The figures of a cluster.

    store_rates: (readers, bytes a second of all of them), by how many read at once.
    link_bytes_per_s: of a node, each way. connect_s: connection and hello, beside a round trip.
    want_s: the cost of a WANT on the node that answers. The cores bound what a node receives, by
    receive_core_s_per_gb; one core bounds what it sends.
    """

    store_rates: tuple[tuple[int, float], ...]
    link_bytes_per_s: float = 3e9
    round_trip_s: float = 100e-6
    connect_s: float = 330e-6
    want_s: float = 51e-6
    receive_core_s_per_gb: float = 1.64
    send_core_s_per_gb: float = 0.26
    cores: float = 5.0

    @property
    def receive_bytes_per_s(self) -> float:
        return min(self.link_bytes_per_s, self.cores / self.receive_core_s_per_gb * 1e9)

    @property
    def send_bytes_per_s(self) -> float:
        return min(self.link_bytes_per_s, 1 / self.send_core_s_per_gb * 1e9)

    def floor_s(self, size_bytes: int) -> float:
        """How long the store takes to send everything once."""
        return size_bytes / max(rate for _, rate in self.store_rates)


@dataclass(frozen=True)
class Job:
    """One job. skew_s: its nodes start within it, evenly. dead, slow: how many nodes; a slow one has a tenth.

    A dead node is silent from some moment on, as one without power is: between its start and the end of the
    floor or of the skew, so while others need it.
    """

    nodes: int
    size_bytes: int
    skew_s: float = 0.0
    dead: int = 0
    slow: int = 0
    seed: int = 1


@dataclass(slots=True)
class Link:
    """One node's link: its rates, and until when each way is taken."""

    send_bytes_per_s: float
    receive_bytes_per_s: float
    send_free_s: float = 0.0
    receive_free_s: float = 0.0


@dataclass(slots=True)
class Done:
    """What one node has done. sent: chunks. store_reads: by cause."""

    finish_s: float = math.inf
    sent: int = 0
    store_reads: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Node:
    """One node: the product's parts, and what the simulation notes of it. ready_s: JOIN is answered."""

    here: Viewpoint
    policy: Policy
    uploads: Uploads
    directories: tuple[Directory, ...]
    link: Link
    start_s: float = 0.0
    ready_s: float = math.inf
    dead_s: float = math.inf
    directory_free_s: float = 0.0
    depth: dict[Chunk, int] = field(default_factory=dict)  # of chunks that it has: hops from the store
    connections: set[int] = field(default_factory=set)
    done: Done = field(default_factory=Done)

    @property
    def index(self) -> int:
        return self.here.node


class Events:
    """Calls at times, and the time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0

    def at(self, at_s: float, call: Callable[..., None], *arguments: object) -> None:
        """Have it called then; of two at the same time the first goes first."""
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, call, arguments))

    def run(self) -> None:
        """Until nothing happens any more."""
        while self._heap:
            self.now_s, _, call, arguments = heapq.heappop(self._heap)
            call(*arguments)


class World:
    """A job on a cluster."""

    def __init__(self, job: Job, inputs: Inputs) -> None:
        self.job = job
        self.inputs = inputs
        self.events = Events()
        self.store: SharedStore[tuple[Node, Chunk]] = SharedStore(inputs.store_rates)
        self.store_due_s = math.inf
        self.chunks = [Chunk("blob", index) for index in range(-(-job.size_bytes // CHUNK_BYTES))]
        self.nodes = _nodes(job, inputs)

    @property
    def now_s(self) -> float:
        return self.events.now_s

    def is_live(self, node: Node) -> bool:
        """Whether it takes messages."""
        return node.start_s <= self.now_s < node.dead_s

    def way_s(self, one: Node, other: Node) -> float:
        """How long a message takes. The first one between two nodes makes their connection."""
        if other.index in one.connections:
            return self.inputs.round_trip_s / 2
        one.connections.add(other.index)
        other.connections.add(one.index)
        return self.inputs.connect_s + self.inputs.round_trip_s * 1.5


def _nodes(job: Job, inputs: Inputs) -> list[Node]:
    draw = random.Random(job.seed)
    groups = group_nodes([range(job.nodes)])
    slow = set(draw.sample(range(job.nodes), job.slow))
    nodes: list[Node] = []
    for group in groups:
        rings = rings_of(groups, group[0])
        nodes += [_node(index, rings, inputs, 1 / _SLOW if index in slow else 1.0) for index in group]
    starts_s = [draw.uniform(0, job.skew_s) for _ in nodes]
    for node, start_s in zip(nodes, starts_s, strict=True):
        node.start_s = start_s - min(starts_s)
    most_s = max(inputs.floor_s(job.size_bytes), job.skew_s)
    for index in draw.sample(range(job.nodes), job.dead):
        nodes[index].dead_s = nodes[index].start_s + draw.uniform(0, most_s)
    return nodes


def _node(index: int, rings: tuple[Ring, ...], inputs: Inputs, part: float) -> Node:
    here = Viewpoint(index, rings)
    return Node(
        here,
        Policy(here),
        Uploads(inputs.send_bytes_per_s, lambda _: CHUNK_BYTES),
        tuple(Directory(index, ring) for ring in rings if index in ring.members),
        Link(inputs.send_bytes_per_s * part, inputs.receive_bytes_per_s * part),
    )
