"""This node as a reader: which answers count, and what a closed blob leaves behind."""

from __future__ import annotations

import os
from typing import cast

import pytest

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers.child.blobs import Blobs
from bootseer_slurm.peers.child.incoming import Incoming
from bootseer_slurm.peers.child.links import Links
from bootseer_slurm.peers.child.lists import Lists
from bootseer_slurm.peers.child.owner import Owner
from bootseer_slurm.peers.child.reach import Reach
from bootseer_slurm.peers.child.reading import Reading, Ways
from bootseer_slurm.peers.directory import First, Parent
from bootseer_slurm.peers.fetch import Viewpoint
from bootseer_slurm.peers.groups import Chunk, Ring
from bootseer_slurm.peers.local import Arrived, FromChild, OpenBlob, Read
from bootseer_slurm.peers.messages import Answered, AskList, Message, Pending, Refused
from bootseer_slurm.peers.policy import Policy
from bootseer_slurm.peers.uploads import Get
from bootseer_slurm.peers.wire import MOST_DATA_BYTES, Received

MIB = 2**20
RING = Ring(0, tuple(range(4)))
BLOB = "ab" * 32
CHUNKS = [Chunk(BLOB, number) for number in range(40)]
CHUNK = CHUNKS[0]
OWNER, PARENT, NODE = list(RING.owners(CHUNK))[:3]


class World:
    """What `Reading` needs of all others, and what it says to them."""

    def __init__(self) -> None:
        self.said: list[FromChild] = []
        self.sent: list[tuple[int, Message]] = []
        self.ignored: list[tuple[int, Chunk]] = []
        self.blobs, self.incoming = Blobs(), Incoming(memoryview(bytearray(CHUNK_BYTES)), 1)
        self.open(1)
        here = Viewpoint(NODE, (RING,))
        here.liveness.heard(OWNER)
        owner, links = cast(Owner, self), cast(Links, self)
        parts = (links, cast(Lists, self), self.blobs, self.incoming, cast(Reach, self))
        self.policy = Policy(here)
        self.reading = Reading(Ways(NODE, 4, owner, *parts), self.policy)

    def open(self, number: int) -> None:
        self.blobs.open(OpenBlob(number, BLOB, 40 * MIB, MIB), os.open("/dev/null", os.O_RDONLY))

    def close(self, number: int) -> None:
        assert self.blobs.close(number) == BLOB
        self.reading.closed(BLOB, 0.0)

    def say(self, message: FromChild) -> None:
        self.said.append(message)

    def send(self, node: int, message: Message, _now_s: float = 0.0) -> None:
        self.sent.append((node, message))

    def ignore(self, node: int, chunk: Chunk) -> None:
        self.ignored.append((node, chunk))

    def asked(self) -> int:
        """The number of the WANT that OWNER was sent last."""
        node, ask = self.sent.pop()
        assert node == OWNER and isinstance(ask, AskList) and ask.want.chunk == CHUNK
        return ask.number

    def get(self, now_s: float = 0.0) -> None:
        """CHUNK is wanted, and PARENT is asked for it."""
        self.reading.want([CHUNK], demand=True, now_s=now_s)
        self.reading.answered(OWNER, Answered(CHUNK, Parent(PARENT), self.asked()), now_s)
        assert self.sent.pop() == (PARENT, Get(CHUNK, NODE, demand=True))

    def bring(self, node: int = PARENT) -> None:
        """All of CHUNK comes."""
        if self.incoming.place(node, CHUNK, 0, MOST_DATA_BYTES) is not None:
            self.reading.took(node, Received(CHUNK, 0, MOST_DATA_BYTES, end=True), 0.0)


@pytest.fixture
def world() -> World:
    return World()


def test_who_waits_hurries_a_read_of_the_store_that_is_under_way(world: World) -> None:
    world.reading.want([CHUNK], demand=False, now_s=0.0)
    world.reading.answered(OWNER, Answered(CHUNK, First(), world.asked()), 0.0)
    assert world.said == [Read(1, 0, demand=False)]
    world.reading.want([CHUNK], demand=True, now_s=0.1)
    assert world.said[1:] == [Read(1, 0, demand=True)]


def test_only_the_answer_to_the_last_question_counts(world: World) -> None:
    world.reading.want([CHUNK], demand=True, now_s=0.0)
    number = world.asked()
    for node, answered in (
        (OWNER, Answered(CHUNK, First(), number + 1)),
        (OWNER, Answered(CHUNKS[1], First(), number)),
        (PARENT, Answered(CHUNK, First(), number)),
    ):
        world.reading.answered(node, answered, 0.0)
    assert world.said == [] and world.sent == []
    world.reading.answered(OWNER, Answered(CHUNK, First(), number), 0.0)
    world.reading.answered(OWNER, Answered(CHUNK, First(), number), 0.0)
    assert world.said == [Read(1, 0, demand=True)]


def test_the_answer_of_before_a_blob_was_closed_is_none_to_what_is_asked_after(world: World) -> None:
    world.reading.want([CHUNK], demand=True, now_s=0.0)
    late = world.asked()
    world.close(1)
    world.open(2)
    world.reading.want([CHUNK], demand=True, now_s=0.0)
    number = world.asked()
    world.reading.answered(OWNER, Answered(CHUNK, First(), late), 0.0)
    assert world.said == []
    world.reading.answered(OWNER, Answered(CHUNK, First(), number), 0.0)
    assert world.said == [Read(2, 0, demand=True)]


def test_a_late_answer_of_a_directory_takes_nothing_from_a_parent(world: World) -> None:
    world.reading.want([CHUNK], demand=True, now_s=0.0)
    _, ask = world.sent.pop()
    assert isinstance(ask, AskList)
    late = ask.number
    world.reading.answered(OWNER, Answered(CHUNK, Parent(PARENT), late), 0.0)
    world.reading.answered(PARENT, Answered(CHUNK, First(), late), 0.0)
    world.sent.clear()
    world.reading.parent_said(PARENT, Refused(CHUNK, lacks=True), 0.0)
    node, ask = world.sent.pop()
    assert node == OWNER and isinstance(ask, AskList) and ask.want.lost == (PARENT,)


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_closed_blob_frees_its_slot(world: World, is_whole: bool) -> None:
    world.get()
    if is_whole:
        world.bring()
        assert world.said.pop() == Arrived(1, 0, 0, PARENT, 0.0)
    world.close(1)
    assert world.ignored == ([] if is_whole else [(PARENT, CHUNK)])
    world.bring()
    world.reading.parent_said(PARENT, Pending(CHUNK, 0), 0.0)
    world.reading.parent_said(PARENT, Refused(CHUNK, lacks=True), 0.0)
    world.reading.ended(PARENT, 0.0, is_silent=False)
    assert world.said == [] and world.sent == []
    world.open(2)
    world.get()
    world.bring()
    assert world.said == [Arrived(2, 0, 0, PARENT, 0.0)]


def test_bytes_of_a_node_that_came_back_end_nothing(world: World) -> None:
    world.get()
    world.reading._asked.ended(PARENT)
    world.bring()
    assert world.said == [Arrived(1, 0, 0, PARENT, 0.0)]
