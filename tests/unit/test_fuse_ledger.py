"""The memory in which a server leaves what it has not answered."""

from __future__ import annotations

import os

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.ledger import Ledger, create


def test_the_ledger_says_what_was_not_answered() -> None:
    fd = create(readers=3)
    try:
        ledger = Ledger(fd, 3)
        assert ledger.found() == [] and ledger.unanswered(0) is None
        parked = [ledger.park(unique, 5, unique * 4096, 4096, 77, 0) for unique in (12, 10, 14)]
        ledger.release(parked[2])
        for reader, (opcode, unique) in enumerate(
            [(protocol.Opcode.LOOKUP, 20), (protocol.Opcode.FORGET, 22), (protocol.Opcode.READ, 12)]
        ):
            message = protocol.IN_HEADER.pack(45, opcode, unique, 1, 0, 0, 77, 0, 0) + b"name\0"
            ledger.inboxes[reader][: len(message)] = message
        after = Ledger(fd, 3)
        assert [each[1:6] for each in after.found()] == [(10, 5, 40960, 4096, 77), (12, 5, 49152, 4096, 77)]
        left = after.unanswered(0)
        assert left is not None and protocol.parse(left).unique == 20 and left[-5:] == b"name\0"
        assert after.unanswered(1) is None  # to forget twice would be wrong
        assert after.unanswered(2) is None  # parked already
        after.clear(0)
        for each in after.found():
            after.release(each)
        last = Ledger(fd, 3)
        assert last.unanswered(0) is None and last.found() == []
        assert last.unanswered(2) is not None
    finally:
        os.close(fd)
