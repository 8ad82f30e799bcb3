"""This node as a parent, where connections end and blobs are closed while it sends."""

from __future__ import annotations

import os
from typing import cast

from bootseer_slurm.peers.child.blobs import Blobs
from bootseer_slurm.peers.child.links import Links, Part
from bootseer_slurm.peers.child.serving import Serving
from bootseer_slurm.peers.fetch import Viewpoint
from bootseer_slurm.peers.groups import Chunk, Ring
from bootseer_slurm.peers.local import OpenBlob
from bootseer_slurm.peers.messages import Message, Pending, Refused
from bootseer_slurm.peers.uploads import Get

MIB = 2**20
BLOB = "ab" * 32


class Readers:
    """What `Serving` needs of Links. ended: nodes whose connection has ended."""

    def __init__(self) -> None:
        self.ended: set[int] = set()
        self.said: list[tuple[int, Message]] = []
        self.parts: list[Part] = []

    def send(self, node: int, message: Message) -> None:
        self.said.append((node, message))

    def send_bytes(self, node: int, parts: list[Part]) -> bool:
        if node not in self.ended:
            self.parts += parts
        return node not in self.ended


def serving() -> tuple[Serving, Readers, Blobs]:
    """It has chunks 0 to 3 of 4 MiB, and chunk 4 comes."""
    readers, blobs = Readers(), Blobs()
    fd = os.open("/dev/null", os.O_RDONLY)
    blobs.open(OpenBlob(1, BLOB, 20 * MIB, 4 * MIB, b"\x0f"), fd)
    blobs.of(Chunk(BLOB, 4)).wanted.add(4)
    here = Viewpoint(0, (Ring(0, (0, 1, 2)),))
    return Serving(here, cast(Links, readers), blobs, 1e12, lambda *_: 0), readers, blobs


def close(serves: Serving, blobs: Blobs) -> None:
    blobs.close(1)
    serves.lost(lambda chunk: chunk.blob == BLOB)


def test_of_a_blob_that_is_closed_only_what_is_on_its_way_is_sent() -> None:
    serves, readers, blobs = serving()
    for number in (0, 1, 2, 4):
        serves.asked(Get(Chunk(BLOB, number), 1), 1.0)
    readers.said.clear()
    close(serves, blobs)
    assert readers.said == [(1, Refused(Chunk(BLOB, number), lacks=True)) for number in (2, 4)]
    readers.said.clear()
    serves.say_pending(1.1)
    assert readers.said == [(1, Pending(Chunk(BLOB, 1), 0))], "that one is behind the first"
    serves.frames_sent(1, 8, 1.2)
    assert serves.sent[1] == 8 * MIB and not serves.is_busy
    serves.asked(Get(Chunk(BLOB, 0), 1), 1.3)
    assert readers.said[1:] == [(1, Refused(Chunk(BLOB, 0), lacks=True))]


def test_what_was_sent_on_a_connection_that_ended_counts_no_more() -> None:
    serves, readers, _ = serving()
    for number in range(3):
        serves.asked(Get(Chunk(BLOB, number), 1), 1.0)
    readers.ended.add(1)
    serves.go_on(1.1)
    serves.frames_sent(1, 4, 1.1)  # of before, and a slot is free: the third begins, in vain
    serves.frames_sent(1, 4, 1.1)
    serves.left(1, 1.2)
    serves.frames_sent(1, 4, 1.2)
    assert serves.sent[1] == 4 * MIB and not serves.is_busy


def test_a_node_that_connects_anew_gets_what_it_asks_for() -> None:
    serves, readers, _ = serving()
    serves.asked(Get(Chunk(BLOB, 0), 1), 1.0)
    serves.left(1, 1.1)
    serves.asked(Get(Chunk(BLOB, 0), 1), 1.2)
    assert len(readers.parts) == 8
    serves.frames_sent(1, 4, 1.3)
    assert serves.sent[1] == 4 * MIB and not serves.is_busy
