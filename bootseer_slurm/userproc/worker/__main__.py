"""The process with a job user's rights: it takes the agent's requests and answers them.

The agent starts one for each job and node. It holds no secret and decides nothing: the agent believes no byte
of it unless a digest agrees, or unless the bytes are shown to this user alone. When a file system hangs, the
agent kills this process and stays well itself. It executes nothing: no library that reads a user's settings
can run a program of his here.

    python -I -m bootseer_slurm.userproc.worker <socket fd>

The first message says whom to become: until then the process is root, and reads nothing else. The process
ends when the agent's end of the socket is closed. One thread for each slot of the ring; protocol.py has the
messages.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bootseer_slurm.identity import User, close_to_tracers, gain_no_rights
from bootseer_slurm.seccomp import forbid_execution
from bootseer_slurm.userproc import protocol
from bootseer_slurm.userproc.protocol import AnyRequest, Order, Reply
from bootseer_slurm.userproc.worker.handles import Handles, StoreOfUser
from bootseer_slurm.userproc.worker.reading import Reading
from bootseer_slurm.userproc.worker.records import Records
from bootseer_slurm.userproc.worker.resolve import Resolver

# Gives the reply to a request with this content, and descriptors that go with it and are closed then.
Operation = Callable[[Any, bytes], tuple[Reply, list[int]]]


class Worker:
    """Answers the agent's requests."""

    def __init__(self, link: socket.socket, operations: Mapping[type, Operation]) -> None:
        self._link = link
        self._operations = operations
        self._requests: queue.SimpleQueue[tuple[int, AnyRequest, bytes]] = queue.SimpleQueue()

    def run(self, threads: int) -> None:
        """Serve until the agent goes away."""
        for number in range(threads):
            threading.Thread(target=self._work, name=f"worker-{number}", daemon=True).start()
        while True:
            message, fds, _, _ = socket.recv_fds(self._link, protocol.MESSAGE_BYTES, 1)
            if not message:
                return
            number, request = protocol.decode_request(message)
            if isinstance(request, protocol.Ping):  # here, for a store may hold all other threads
                self._send(protocol.encode_reply(number, Reply()))
            else:
                self._requests.put((number, request, b"".join(map(_content, fds))))

    def _work(self) -> None:
        while True:
            number, request, content = self._requests.get()
            fds: list[int] = []
            try:
                reply, fds = self._operations[type(request)](request, content)
                message = protocol.encode_reply(number, reply)
            except Exception as error:
                message = protocol.encode_error(number, error)
            self._send(message, fds)
            for fd in fds:
                os.close(fd)

    def _send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._link, [message], fds)
        except OSError:
            os._exit(0)  # the agent is gone


def _content(fd: int) -> bytes:
    try:
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _become(order: Order) -> None:
    """Be the job's user for good; an agent that is not root has its own rights to give only."""
    gain_no_rights()
    if os.geteuid() == 0:
        User(order.uid, order.gid, order.groups).become()
    if order.home:
        os.environ["HOME"] = order.home
    close_to_tracers()
    forbid_execution()


def main() -> None:
    """The process the agent starts; see the module's first lines for its argument."""
    os.umask(0o077)
    link = socket.socket(fileno=int(sys.argv[1]))
    message, fds, _, _ = socket.recv_fds(link, protocol.MESSAGE_BYTES, 1)
    if not message:
        return  # it was a spare one, and is not needed
    order = protocol.decode_order(message)
    _become(order)
    ring = mmap.mmap(fds[0], 0)
    os.close(fds[0])
    store, handles = StoreOfUser(order.store_uri), Handles()
    resolver, records = Resolver(store, handles), Records(store)
    operations: dict[type, Operation] = {
        protocol.Resolve: resolver.resolve,
        protocol.IsSame: resolver.is_same,
        protocol.Reopen: resolver.reopen,
        protocol.Read: Reading(handles, ring, order.slot_bytes).read,
        protocol.Write: records.write,
        protocol.AskClock: records.clock,
        protocol.KeepTrace: records.keep_trace,
        protocol.MakePlan: records.make_plan,
        protocol.Recall: records.recall,
        protocol.Remember: records.remember,
    }
    Worker(link, operations).run(order.slots)
    os._exit(0)  # threads may hang in a file system that does not answer


if __name__ == "__main__":
    main()
