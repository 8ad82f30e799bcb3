"""A simulated job whose nodes run the product's own directory and policy.

Modelled: the store, whose rate its readers share; the way to a node and back, and a connection's first
message; the cost of a WANT; each node's rates. A node that has not started refuses, and a dead one is silent.
Not modelled: lost packets, switches, processors that are busy with other work, reads on demand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers.directory import JOIN_AT_ONCE, JOIN_WAIT_S, Answer, Handover, Want
from bootseer_slurm.peers.fetch import AskDirectory, AskParent, Loss, ReadStore
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.policy import OVERDUE_S, Action, in_order
from bootseer_slurm.peers.uploads import PENDING_S, Get, Held, Reply
from scripts.lib.bench.peers_world import Inputs, Job, Node, World

_PENDING_TICKS = round(PENDING_S / OVERDUE_S)


@dataclass(frozen=True)
class Outcome:
    """Times are seconds since the first start, sorted, of nodes that neither died nor are slow.

    own_s: since each node's own start, sorted too. last_start_s: of all nodes. causes: reads of the store,
    of all nodes. depth: hops from the store, at most. largest_upload: of one node, in copies of the data.
    connections: of one node, at most. unfinished: live nodes that lack something.
    """

    finish_s: tuple[float, ...]
    own_s: tuple[float, ...]
    last_start_s: float
    copies: float
    causes: dict[str, int]
    depth: int
    largest_upload: float
    connections: int
    unfinished: int


def simulate(job: Job, inputs: Inputs) -> Outcome:
    """One run, the same for the same job and inputs."""
    world = World(job, inputs)
    for node in world.nodes:
        world.events.at(node.start_s, _start, world, node)
    world.events.run()
    return _outcome(world)


def _outcome(world: World) -> Outcome:
    chunks = len(world.chunks)
    live = [node for node in world.nodes if node.dead_s == math.inf]
    finished = [node for node in live if node.done.finish_s < math.inf]
    full_per_s = world.inputs.send_bytes_per_s
    healthy = [node for node in finished if node.link.send_bytes_per_s == full_per_s]
    causes: Counter[str] = sum((node.done.store_reads for node in world.nodes), Counter())
    return Outcome(
        finish_s=tuple(sorted(node.done.finish_s for node in healthy)),
        own_s=tuple(sorted(node.done.finish_s - node.start_s for node in healthy)),
        last_start_s=max(node.start_s for node in world.nodes),
        copies=causes.total() / chunks,
        causes=dict(sorted(causes.items())),
        depth=max(depth for node in world.nodes for depth in node.depth.values()),
        largest_upload=max(node.done.sent for node in world.nodes) / chunks,
        connections=max(len(node.connections) for node in world.nodes),
        unfinished=len(live) - len(finished),
    )


# A node starts


def _start(world: World, node: Node) -> None:
    """JOIN goes to the next nodes of each ring, eight at a time, until one of them is there."""
    ready_s = world.now_s
    for level, directory_ring in enumerate(node.here.rings[: len(node.directories)]):
        at_s = world.now_s
        for tried, index in enumerate(directory_ring.after(node.index), 1):
            other = world.nodes[index]
            if other.start_s <= at_s < other.dead_s:
                at_s += world.way_s(node, other)
                world.events.at(at_s, _join, world, node, other, level)
                break
            if other.dead_s <= at_s:
                at_s += JOIN_WAIT_S
            elif tried % JOIN_AT_ONCE == 0:
                at_s += world.inputs.round_trip_s
        ready_s = max(ready_s, at_s + world.inputs.round_trip_s)
    node.ready_s = ready_s
    world.events.at(ready_s, _begin, world, node)


def _join(world: World, node: Node, other: Node, level: int) -> None:
    if world.is_live(other):
        handover = other.directories[level].join(node.index)
        node.here.liveness.heard(other.index)
        world.events.at(world.now_s + world.inputs.round_trip_s / 2, _take, world, node, level, handover)


def _take(world: World, node: Node, level: int, handover: Handover) -> None:
    if not world.is_live(node):
        return
    for index, onward in node.directories[level].take(handover).items():
        other = world.nodes[index]
        world.events.at(world.now_s + world.way_s(node, other), _take, world, other, level, onward)


def _begin(world: World, node: Node) -> None:
    if world.is_live(node):
        world.events.at(world.now_s + OVERDUE_S, _tick, world, node, 1)
        chunks = in_order(world.chunks, node.index, world.job.nodes)
        _do(world, node, node.policy.prefetch(chunks, world.now_s))


def _tick(world: World, node: Node, number: int) -> None:
    """What a node does every 50 ms while it lacks something, and every 100 ms: PENDING."""
    if not world.is_live(node) or len(node.depth) == len(world.chunks):
        return
    if number % _PENDING_TICKS == 0:
        for get in node.uploads.waiting():
            _pending(world, node, get)
    _do(world, node, node.policy.overdue(world.now_s))
    world.events.at(world.now_s + OVERDUE_S, _tick, world, node, number + 1)


def _pending(world: World, node: Node, get: Get) -> None:
    """Its way is left out: an event for each would be half of all events."""
    hops = 0 if get.chunk in node.depth else node.policy.hops(get.chunk, world.now_s)
    if hops is not None:
        reader = world.nodes[get.reader]
        _do(world, reader, reader.policy.pending(get.chunk, node.index, hops, world.now_s))


# Questions and answers


def _do(world: World, node: Node, actions: Sequence[Action]) -> None:
    now_s = world.now_s
    for action in actions:
        if isinstance(action, ReadStore):
            node.done.store_reads[action.cause.value] += 1
            world.store.begin((node, action.chunk), CHUNK_BYTES, now_s)
            _watch_store(world)
        elif isinstance(action, AskDirectory):
            peer = world.nodes[action.to]
            if peer is node:
                _answer(world, node, node, action)
            elif peer.start_s > now_s:
                at_s = now_s + world.inputs.round_trip_s
                world.events.at(at_s, _failed, world, node, peer, action.want.chunk, Loss.REFUSED)
            else:
                world.events.at(now_s + world.way_s(node, peer), _answer, world, node, peer, action)
        elif isinstance(action, AskParent):
            peer = world.nodes[action.to]
            world.events.at(now_s + world.way_s(node, peer), _asked, world, peer, action.get)
        elif world.is_live(world.nodes[action.to]):
            world.nodes[action.to].uploads.called_slow(node.index, now_s)


def _answer(world: World, node: Node, owner: Node, action: AskDirectory) -> None:
    if not world.is_live(owner):
        return
    if world.now_s < owner.ready_s:
        world.events.at(owner.ready_s, _answer, world, node, owner, action)
        return
    answer = owner.directories[action.level].want(action.want)
    owner.directory_free_s = max(owner.directory_free_s, world.now_s) + world.inputs.want_s
    at_s = owner.directory_free_s + (0.0 if owner is node else world.inputs.round_trip_s / 2)
    world.events.at(at_s, _answered, world, node, owner, action.want, answer)


def _answered(world: World, node: Node, owner: Node, want: Want, answer: Answer) -> None:
    if world.is_live(node):
        if owner is not node:
            node.here.liveness.heard(owner.index)
        actions = node.policy.answered(want.chunk, owner.index, answer, world.now_s, has=want.has)
        _do(world, node, actions)


def _failed(world: World, node: Node, peer: Node, chunk: Chunk, loss: Loss) -> None:
    if world.is_live(node):
        if loss is Loss.BUSY:
            node.here.liveness.heard(peer.index)
        _do(world, node, node.policy.failed(chunk, peer.index, loss, world.now_s))


# Chunks


def _asked(world: World, node: Node, get: Get) -> None:
    if not world.is_live(node):
        return
    held = Held.HERE if get.chunk in node.depth else Held.COMING
    if node.uploads.asked(get, held) is Reply.QUEUED:
        _pending(world, node, get)
        _send(world, node)
    else:
        _refuse(world, node, get.chunk, [get.reader])


def _refuse(world: World, node: Node, chunk: Chunk, readers: Sequence[int]) -> None:
    at_s = world.now_s + world.inputs.round_trip_s / 2
    for reader in readers:
        world.events.at(at_s, _failed, world, world.nodes[reader], node, chunk, Loss.BUSY)


def _send(world: World, node: Node) -> None:
    link = node.link
    while get := node.uploads.begin(world.now_s):
        link.send_free_s = max(link.send_free_s, world.now_s) + CHUNK_BYTES / link.send_bytes_per_s
        world.events.at(link.send_free_s, _sent, world, node, get)
    node.here.serves = node.uploads.serves(world.now_s)


def _sent(world: World, node: Node, get: Get) -> None:
    if not world.is_live(node):
        return
    node.uploads.slots.ended(get.reader, world.now_s)
    node.done.sent += 1
    _deliver(world, world.nodes[get.reader], get.chunk, node)
    _send(world, node)


def _deliver(world: World, node: Node, chunk: Chunk, parent: Node | None) -> None:
    """The last byte has left; a node receives one chunk after the other."""
    link = node.link
    arrives_s = world.now_s + world.inputs.round_trip_s / 2
    link.receive_free_s = max(arrives_s, link.receive_free_s + CHUNK_BYTES / link.receive_bytes_per_s)
    world.events.at(link.receive_free_s, _received, world, node, chunk, parent)


def _received(world: World, node: Node, chunk: Chunk, parent: Node | None) -> None:
    if not world.is_live(node) or chunk in node.depth:
        return
    node.depth[chunk] = 1 if parent is None else parent.depth[chunk] + 1
    if len(node.depth) == len(world.chunks):
        node.done.finish_s = world.now_s
    per_s = node.link.receive_bytes_per_s
    if parent is not None:
        per_s = min(per_s, parent.link.send_bytes_per_s)
        node.here.liveness.heard(parent.index)
    busy = node.uploads.arrived(chunk)
    _send(world, node)
    _refuse(world, node, chunk, busy)
    source = None if parent is None else parent.index
    _do(world, node, node.policy.received(chunk, source, CHUNK_BYTES / per_s, world.now_s))


def _watch_store(world: World) -> None:
    """Look when the next read ends. Where another one begins before, that look finds another time due."""
    end_s = world.store.next_end_s()
    if end_s is not None:
        world.store_due_s = max(end_s, world.now_s)
        world.events.at(world.store_due_s, _check_store, world, world.store_due_s)


def _check_store(world: World, due_s: float) -> None:
    if due_s == world.store_due_s:
        for node, chunk in world.store.ended(world.now_s):
            _deliver(world, node, chunk, None)
        _watch_store(world)
