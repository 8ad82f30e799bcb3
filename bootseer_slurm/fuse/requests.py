"""The threads that take requests from the kernel, and answer at once what they can.

Owns: one inbox and one outbox for each thread, and the reads of what is local: one pread, one writev, no
lock. Does not own: other answers (answers.py), and reads that have to wait (reads.py).

Threads: daemons, one for each inbox of the ledger. None of them waits for anything but the kernel.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.answers import Handler
from bootseer_slurm.fuse.device import Device
from bootseer_slurm.fuse.ledger import Ledger, make_outbox
from bootseer_slurm.fuse.nodes import NodeTable, read_local
from bootseer_slurm.fuse.protocol import Opcode, Request
from bootseer_slurm.fuse.reads import PendingReads


class RequestThreads:
    """Readers of one device."""

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        nodes: NodeTable,
        reads: PendingReads,
        handlers: Mapping[int, Handler],
    ) -> None:
        """ledger: with an inbox for each thread. handlers: of all opcodes that are answered, but READ."""
        self._device = device
        self._ledger = ledger
        self._nodes = nodes
        self._reads = reads
        self._handlers = handlers
        self._stopping = False
        self.threads = [
            threading.Thread(target=self._live, args=(number,), name="bootseer-fuse", daemon=True)
            for number in range(len(ledger.inboxes))
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Have the threads end with their next request, which is left to the next server."""
        self._stopping = True

    def _live(self, number: int) -> None:
        """Answer what the last server left in this inbox, then requests until the end."""
        inbox, outbox = self._ledger.inboxes[number], make_outbox()
        left = self._ledger.unanswered(number)
        if left is not None:
            self._answer(protocol.parse(left), outbox)
        while True:
            self._ledger.clear(number)
            message = self._device.take(inbox)
            if message is None or self._stopping:
                return
            if message:
                self._answer(protocol.parse(message), outbox)

    def _answer(self, request: Request, outbox: memoryview) -> None:
        try:
            payload: memoryview | bytes | None
            if request.opcode == Opcode.READ:
                payload = self._read(request, outbox)
            elif request.opcode in self._handlers:
                payload = self._handlers[request.opcode](request)
            else:  # ENOSYS: the kernel does not ask again
                raise protocol.failure(errno.EROFS if request.opcode in protocol.WRITING else errno.ENOSYS)
            if payload is not None:
                self._device.reply(request.unique, payload)
        except BaseException as error:  # some extension modules raise past Exception; the thread must live
            self._device.fail(request.unique, error)

    def _read(self, request: Request, outbox: memoryview) -> memoryview | None:
        """Give the bytes of a read where all are local; else None, and the read waits."""
        _fh, offset, asked, _, _, _, _ = protocol.READ_IN.unpack_from(request.body)
        node = self._nodes.get(request.node_id)
        if not node.is_file:
            raise protocol.failure(errno.EISDIR)
        size = max(0, min(asked, node.size_bytes - offset))
        part = outbox[:size]
        if size == 0:
            return part
        file = node.file
        if file is not None:
            fd = file.ready(offset, size)
            if fd is not None:
                read_local(file, fd, offset, part)
                return part
        self._reads.park(request, node, file, offset, size)
        return None
