"""A node's part of the directory: whom it waits for when it starts, and whose lists it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from bootseer_slurm.peers.child.links import Links
from bootseer_slurm.peers.child.lists import Lists
from bootseer_slurm.peers.directory import First, Handover, Parent, Row, Service, Want
from bootseer_slurm.peers.fetch import Viewpoint
from bootseer_slurm.peers.groups import Chunk, Ring
from bootseer_slurm.peers.messages import Answered, AskList, Given, Join, Message

RING = Ring(0, tuple(range(4)))
CHUNK = Chunk("ab" * 32, 0)
CHUNKS = 3
OWNER = next(RING.owners(CHUNK))
NEXT, FAR, FARTHEST = RING.after(OWNER)
EMPTY = Given(0, Handover({}, ()))


class Others:
    """What `Lists` needs of Links. linked: nodes that are connected. taken: whose kernel has the hello."""

    def __init__(self) -> None:
        self.linked: set[int] = set()
        self.taken: set[int] = set()
        self.sent: list[tuple[int, Message]] = []
        self.proving = SimpleNamespace(reaches=lambda node: node in self.taken)

    def link(self, node: int) -> object | None:
        return self if node in self.linked else None

    def send(self, node: int, message: Message, dial_s: float | None = None) -> None:
        self.sent.append((node, message))


def started() -> tuple[Lists, Others, Viewpoint]:
    """The owner of CHUNK's list has sent JOIN to the three others."""
    others, here = Others(), Viewpoint(OWNER, (RING,))
    lists = Lists(here, cast(Links, others), 4, lambda chunk: chunk.number < CHUNKS)
    lists.go_on(0.0)
    assert others.sent == [(node, Join(0)) for node in (NEXT, FAR, FARTHEST)]
    return lists, others, here


def ready(lists: Lists, now_s: float) -> bool:
    lists.go_on(now_s)
    return lists.ready


def test_who_says_nothing_has_25_ms() -> None:
    lists, _, _ = started()
    assert not ready(lists, 0.024) and ready(lists, 0.026)


def test_who_is_there_has_a_second() -> None:
    for is_linked in (True, False):
        lists, others, _ = started()
        (others.linked if is_linked else others.taken).add(FAR)
        assert not ready(lists, 0.026) and not ready(lists, 0.99) and ready(lists, 1.03)


def test_who_answers_ends_the_wait_for_those_behind_it_that_are_not_there() -> None:
    lists, others, _ = started()
    lists.given(NEXT, EMPTY, 0.01)
    assert ready(lists, 0.01)
    lists, others, _ = started()
    others.linked.add(FARTHEST)
    lists.given(NEXT, EMPTY, 0.01)
    assert not ready(lists, 0.5)
    lists.given(FARTHEST, EMPTY, 0.5)
    assert ready(lists, 0.5)


def test_who_takes_a_hello_and_says_nothing_is_silent() -> None:
    lists, _, here = started()
    lists.ended(NEXT, 0.1, is_silent=False)
    assert not here.liveness.is_missing(NEXT, 0.1)
    lists.ended(FAR, 0.5, is_silent=True)
    assert here.liveness.is_missing(FAR, 0.5)


def test_lists_are_taken_of_who_was_asked_or_where_they_are_this_node_s() -> None:
    foreign = next(
        chunk for number in range(99) if next(RING.owners(chunk := Chunk("ab" * 32, number))) == NEXT
    )
    rows = (Row(NEXT, 0, Service.YES),)
    others = Others()
    lists = Lists(Viewpoint(OWNER, (RING,)), cast(Links, others), 200, lambda _: True)
    lists.given(NEXT, Given(0, Handover({CHUNK: rows, foreign: rows}, (NEXT,))), 0.0)
    assert others.sent == [], "nothing goes on: that list is not believed, nor that the node is live"
    assert lists.want(0, Want(CHUNK, FAR)) == Parent(NEXT)
    lists.given(150, Given(0, Handover({CHUNK: (Row(FARTHEST, 0, Service.YES),)}, ())), 0.0)
    assert lists.want(0, Want(CHUNK, NEXT)) == First(), "150 is not on the ring"


def test_what_is_not_there_gets_no_list() -> None:
    lists, others, _ = started()
    assert ready(lists, 1.0)
    beyond = Chunk(CHUNK.blob, CHUNKS)
    others.sent.clear()
    for want in (Want(beyond, NEXT), Want(CHUNK, NEXT, missing=(4,)), Want(CHUNK, NEXT, lost=(2**32 - 1,))):
        lists.asked(NEXT, AskList(0, want, 1))
    lists.asked(NEXT, AskList(1, Want(CHUNK, NEXT), 1))
    rows = (Row(NEXT, 0, Service.YES),)
    lists.given(NEXT, Given(0, Handover({beyond: rows}, ())), 1.0)
    assert others.sent == [] and lists.want(0, Want(beyond, FAR)) == First()
    lists.asked(NEXT, AskList(0, Want(CHUNK, NEXT), 5))
    assert others.sent == [(NEXT, Answered(CHUNK, First(), 5))]


def test_what_is_not_there_is_not_held_until_the_lists_are_here() -> None:
    lists, others, _ = started()
    others.sent.clear()
    lists.asked(NEXT, AskList(0, Want(Chunk(CHUNK.blob, 2**32 - 1), NEXT), 1))
    assert ready(lists, 1.0) and others.sent == []
